//! `SET NX PX`, and a script that deletes what is ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fencelock::redis::driver::aio::MultiplexedConnection;
use fencelock::redis::driver::{Client, Script, cmd};

use crate::locker::{Locker, Result};
use crate::transfer::Passing;

/// What a lock's TTL is unless it matters.
pub(super) const TTL: Duration = Duration::from_secs(30);

const DELETE_IF_OURS: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

const PASS_ON: &str = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end \
     redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) return 1";

const RENEW: &str = "local kept = 0 for i, key in ipairs(KEYS) do \
     if redis.call('GET', key) == ARGV[i + 1] then redis.call('PEXPIRE', key, ARGV[1]) kept = kept + 1 end end \
     return kept";

/// Locks that one script renews.
const RENEWED_TOGETHER: usize = 500;

#[derive(Clone)]
pub(super) struct Raw {
    connection: MultiplexedConnection,
    scripts: Arc<Scripts>,
    owners: Arc<AtomicU64>,
}

struct Scripts {
    delete: Script,
    pass_on: Script,
    renew: Script,
}

impl Raw {
    pub(super) async fn connect(url: &str) -> Result<Self> {
        let scripts = Scripts {
            delete: Script::new(DELETE_IF_OURS),
            pass_on: Script::new(PASS_ON),
            renew: Script::new(RENEW),
        };
        Ok(Self {
            connection: Client::open(url)?.get_multiplexed_async_connection().await?,
            scripts: Arc::new(scripts),
            owners: Arc::default(),
        })
    }

    async fn set(&self, name: &str, owner: &str, ttl: Duration) -> Result<bool> {
        let mut set = cmd("SET");
        set.arg(name).arg(owner).arg("NX").arg("PX").arg(millis(ttl));
        let answer: Option<String> = set.query_async(&mut self.connection.clone()).await?;
        Ok(answer.is_some())
    }

    async fn delete(&self, name: &str, owner: &str) -> Result<()> {
        let deleted: u64 =
            self.scripts.delete.key(name).arg(owner).invoke_async(&mut self.connection.clone()).await?;
        if deleted == 1 { Ok(()) } else { Err("the lock was lost".into()) }
    }
}

pub(super) fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)
}

/// Owners that no other process has.
fn own(number: u64) -> String {
    format!("{}-{number}", std::process::id())
}

impl Locker for Raw {
    type Guard = (String, String);

    async fn try_lock(&self, name: &str, ttl: Option<Duration>) -> Result<Self::Guard> {
        let owner = own(self.owners.fetch_add(1, Ordering::Relaxed));
        if !self.set(name, &owner, ttl.unwrap_or(TTL)).await? {
            return Err("busy".into());
        }
        Ok((name.to_owned(), owner))
    }

    async fn lock(&self, name: &str) -> Result<Self::Guard> {
        self.try_lock(name, None).await
    }

    async fn unlock(&self, (name, owner): Self::Guard) -> Result<()> {
        self.delete(&name, &owner).await
    }

    fn keep(&self, guards: &Arc<Vec<Self::Guard>>, ttl: Duration) {
        let (this, guards) = (self.clone(), guards.clone());
        tokio::spawn(async move {
            let mut connection = this.connection.clone();
            loop {
                tokio::time::sleep(ttl / 3).await;
                for some in guards.chunks(RENEWED_TOGETHER) {
                    let mut renew = this.scripts.renew.prepare_invoke();
                    renew.arg(millis(ttl));
                    for (name, owner) in some {
                        renew.key(name).arg(owner);
                    }
                    match renew.invoke_async::<usize>(&mut connection).await {
                        Ok(kept) if kept == some.len() => {}
                        other => eprintln!("the locks by hand weren't all renewed: {other:?}"),
                    }
                }
            }
        });
    }
}

impl Passing for Raw {
    async fn take(&self, name: &str, owner: u64) -> Result<bool> {
        self.set(name, &own(owner), TTL).await
    }

    async fn pass(&self, name: &str, from: u64, to: u64) -> Result<()> {
        let mut pass_on = self.scripts.pass_on.key(name);
        pass_on.arg(own(from)).arg(own(to)).arg(millis(TTL));
        let passed: u64 = pass_on.invoke_async(&mut self.connection.clone()).await?;
        if passed == 1 { Ok(()) } else { Err("the lock was lost".into()) }
    }

    async fn give_back(&self, name: &str, owner: u64) -> Result<()> {
        self.delete(name, &own(owner)).await
    }
}
