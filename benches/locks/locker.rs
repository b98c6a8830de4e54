//! [`Locker`]: what a workload needs of locks, whether they are ours or written by hand.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use fencelock::{LockGuard, LockOptions, LockProvider};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The way that is compared with the others.
pub(crate) const OURS: &str = "fencelock";

/// Takes locks and gives them back. Those by hand do no more than they must: nothing is noticed, nobody is rescued.
pub(crate) trait Locker: Clone + Send + Sync + 'static {
    type Guard: Send + Sync + 'static;

    /// One attempt at a lock that must be free.
    fn try_lock(&self, name: &str, ttl: Option<Duration>)
    -> impl Future<Output = Result<Self::Guard>> + Send;

    /// Waits for a lock.
    fn lock(&self, name: &str) -> impl Future<Output = Result<Self::Guard>> + Send;

    fn unlock(&self, guard: Self::Guard) -> impl Future<Output = Result<()>> + Send;

    /// From now on, these are renewed.
    fn keep(&self, _guards: &Arc<Vec<Self::Guard>>, _ttl: Duration) {}

    fn is_lost(_guard: &Self::Guard) -> bool {
        false
    }
}

#[derive(Clone)]
pub(crate) struct Ours(Arc<dyn LockProvider>);

impl Ours {
    pub(crate) async fn connect(url: &str) -> Result<Self> {
        Ok(Self(fencelock::connect(url).await?.into()))
    }
}

impl Locker for Ours {
    type Guard = LockGuard;

    async fn try_lock(&self, name: &str, ttl: Option<Duration>) -> Result<LockGuard> {
        let lock = match ttl {
            None => self.0.create_lock(name),
            Some(ttl) => self.0.create_lock_with(name, LockOptions::new().ttl(ttl)),
        };
        Ok(lock.try_acquire().await?.ok_or("busy")?)
    }

    async fn lock(&self, name: &str) -> Result<LockGuard> {
        Ok(self.0.create_lock(name).acquire().await?)
    }

    async fn unlock(&self, guard: LockGuard) -> Result<()> {
        Ok(guard.release().await?)
    }

    fn is_lost(guard: &LockGuard) -> bool {
        guard.is_lost()
    }
}
