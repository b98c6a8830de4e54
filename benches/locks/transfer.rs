//! In-process transfer by hand: who waits in this process stands in line here, and whoever gives the lock back passes
//! it to the first of them with one command.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::locker::{Locker, Result};

/// The commands that it takes.
pub(crate) trait Passing: Clone + Send + Sync + 'static {
    /// Whether it was free.
    fn take(&self, name: &str, owner: u64) -> impl Future<Output = Result<bool>> + Send;
    fn pass(&self, name: &str, from: u64, to: u64) -> impl Future<Output = Result<()>> + Send;
    fn give_back(&self, name: &str, owner: u64) -> impl Future<Output = Result<()>> + Send;
}

type Lines = HashMap<String, VecDeque<oneshot::Sender<u64>>>;

#[derive(Clone)]
pub(crate) struct Transfer<P> {
    server: P,
    /// By name, for each lock that this process has.
    lines: Arc<Mutex<Lines>>,
    owners: Arc<AtomicU64>,
}

impl<P: Passing> Transfer<P> {
    pub(crate) fn new(server: P) -> Self {
        Self { server, lines: Arc::default(), owners: Arc::default() }
    }

    fn next_owner(&self) -> u64 {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }

    fn stand_in_line(&self, name: &str) -> Option<oneshot::Receiver<u64>> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match lines.entry(name.to_owned()) {
            Entry::Vacant(free) => {
                free.insert(VecDeque::new());
                None
            }
            Entry::Occupied(mut line) => {
                let (sender, receiver) = oneshot::channel();
                line.get_mut().push_back(sender);
                Some(receiver)
            }
        }
    }

    fn first_in_line(&self, name: &str) -> Option<oneshot::Sender<u64>> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let first = lines.get_mut(name).and_then(VecDeque::pop_front);
        if first.is_none() {
            lines.remove(name);
        }
        first
    }
}

impl<P: Passing> Locker for Transfer<P> {
    type Guard = (String, u64);

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<Self::Guard> {
        self.lock(name).await
    }

    async fn lock(&self, name: &str) -> Result<Self::Guard> {
        let owner = if let Some(passed) = self.stand_in_line(name) {
            passed.await?
        } else {
            let owner = self.next_owner();
            // The one before may still be giving it back.
            while !self.server.take(name, owner).await? {
                tokio::task::yield_now().await;
            }
            owner
        };
        Ok((name.to_owned(), owner))
    }

    async fn unlock(&self, (name, owner): Self::Guard) -> Result<()> {
        let Some(next) = self.first_in_line(&name) else { return self.server.give_back(&name, owner).await };
        let to = self.next_owner();
        self.server.pass(&name, owner, to).await?;
        next.send(to).map_err(|_| "whoever stood in line is gone")?;
        Ok(())
    }
}
