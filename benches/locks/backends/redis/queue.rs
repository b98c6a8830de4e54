//! A queue in the server: whoever finds the lock taken is put into a list, and the release gives it to the first in
//! there and publishes that to its process.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fencelock::redis::driver::aio::MultiplexedConnection;
use fencelock::redis::driver::{Client, Script};
use futures_util::StreamExt;
use tokio::sync::oneshot;

use super::raw::{TTL, millis};
use crate::locker::{Locker, Result};

const LOCK: &str = "if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end \
     redis.call('RPUSH', KEYS[2], ARGV[1]) return 0";

const UNLOCK: &str = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end \
     local next = redis.call('LPOP', KEYS[2]) \
     if next then redis.call('SET', KEYS[1], next, 'PX', ARGV[2]) \
     redis.call('PUBLISH', string.match(next, '^[^ ]+'), next) \
     else redis.call('DEL', KEYS[1]) end return 1";

#[derive(Clone)]
pub(super) struct Queue {
    connection: MultiplexedConnection,
    lock: Arc<Script>,
    unlock: Arc<Script>,
    waiters: Arc<Mutex<HashMap<String, oneshot::Sender<()>>>>,
    owners: Arc<AtomicU64>,
}

impl Queue {
    pub(super) async fn connect(url: &str) -> Result<Self> {
        let client = Client::open(url)?;
        let mut messages = client.get_async_pubsub().await?;
        messages.subscribe(channel()).await?;
        let this = Self {
            connection: client.get_multiplexed_async_connection().await?,
            lock: Arc::new(Script::new(LOCK)),
            unlock: Arc::new(Script::new(UNLOCK)),
            waiters: Arc::default(),
            owners: Arc::default(),
        };
        let waiters = this.waiters.clone();
        tokio::spawn(async move {
            let mut messages = messages.into_on_message();
            while let Some(message) = messages.next().await {
                let Ok(owner) = message.get_payload::<String>() else { continue };
                let waiter = waiters.lock().unwrap_or_else(PoisonError::into_inner).remove(&owner);
                if let Some(waiter) = waiter {
                    let _ = waiter.send(()); // at the end nobody wants it
                }
            }
        });
        Ok(this)
    }
}

fn channel() -> String {
    format!("by-hand-{}", std::process::id())
}

impl Locker for Queue {
    type Guard = (String, String);

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<Self::Guard> {
        self.lock(name).await
    }

    async fn lock(&self, name: &str) -> Result<Self::Guard> {
        let owner = format!("{} {}", channel(), self.owners.fetch_add(1, Ordering::Relaxed));
        let (sender, handed) = oneshot::channel();
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner).insert(owner.clone(), sender);
        let mut lock = self.lock.key(name);
        lock.key(format!("{name}:queue")).arg(&owner).arg(millis(TTL));
        let granted: u64 = lock.invoke_async(&mut self.connection.clone()).await?;
        if granted == 1 {
            self.waiters.lock().unwrap_or_else(PoisonError::into_inner).remove(&owner);
        } else {
            handed.await?;
        }
        Ok((name.to_owned(), owner))
    }

    async fn unlock(&self, (name, owner): Self::Guard) -> Result<()> {
        let mut unlock = self.unlock.key(&name);
        unlock.key(format!("{name}:queue")).arg(&owner).arg(millis(TTL));
        let unlocked: u64 = unlock.invoke_async(&mut self.connection.clone()).await?;
        if unlocked == 1 { Ok(()) } else { Err("the lock was lost".into()) }
    }
}
