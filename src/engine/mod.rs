//! Everything that every backend needs and none writes: queueing, waiting, renewal, loss, release, close.
//!
//! One [`Engine`] serves one provider. What goes on for a name is kept in [`queue`], in its [`slot`]. [`acquire`] brings
//! grants in, with the help of a [`driver`] for those who wait; [`holding`] is a grant as long as it is held, [`keeper`]
//! keeps it alive, and [`releaser`] brings it back. Nothing here knows a server, and no backend is asked anything that
//! isn't in [`Backend`].

mod acquire;
mod attempt;
pub(crate) mod backoff;
#[cfg(any(feature = "postgres", feature = "sqlserver"))]
pub(crate) mod carried;
mod driver;
#[cfg(any(feature = "postgres", feature = "redis", feature = "sqlserver"))]
pub(crate) mod flight;
mod holding;
mod keeper;
mod provider;
mod queue;
mod releaser;
mod request;
#[cfg(any(feature = "postgres", feature = "sqlserver"))]
pub(crate) mod sessions;
mod slot;
pub(crate) mod worker;

use std::collections::hash_map::RandomState;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;

#[cfg(feature = "postgres")]
pub(crate) use self::provider::check_prefix;
pub use self::provider::{Provider, ProviderBuilder};

use self::keeper::Keeper;
use self::queue::Queues;
use self::releaser::Releaser;
use self::request::answered;
use crate::backend::Backend;
use crate::capabilities::{Capabilities, Expiry};
use crate::error::{Error, ErrorKind, Result};
use crate::options::LockOptions;

pub(crate) struct Engine<B: Backend> {
    backend: B,
    capabilities: Capabilities,
    queues: Queues<B>,
    keeper: Keeper<B>,
    releaser: Releaser<B>,
    closed: AtomicBool,
    backend_closed: tokio::sync::OnceCell<()>,
    /// Numbers calls, claims and grants in the order in which they began.
    sequence: AtomicU64,
    /// The longest TTL asked for so far, in nanoseconds: what bounds `close`.
    longest_ttl: AtomicU64,
}

impl<B: Backend> Engine<B> {
    fn new(backend: B) -> Arc<Self> {
        Arc::new(Self {
            capabilities: backend.capabilities(),
            backend,
            queues: Queues::new(RandomState::new()),
            keeper: Keeper::new(),
            releaser: Releaser::new(),
            closed: AtomicBool::new(false),
            backend_closed: tokio::sync::OnceCell::new(),
            sequence: AtomicU64::new(1),
            longest_ttl: AtomicU64::new(0),
        })
    }

    fn next_number(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Sees that keeper and releaser run, on the caller's runtime if they don't run on another one. Returns the
    /// caller's.
    fn ensure_workers(self: &Arc<Self>) -> Result<Handle> {
        let runtime = current_runtime()?;
        self.keeper.ensure_running(self, &runtime);
        self.releaser.ensure_running(self, &runtime);
        Ok(runtime)
    }

    /// Whether a lock is kept for `hold_at_least` that would be free as soon as this process is gone.
    fn keeps_for_the_server(&self) -> bool {
        self.capabilities.expiry != Expiry::Ttl && self.keeper.keeps_any()
    }

    async fn close(self: &Arc<Self>) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        self.queues.fail_all(|| Error::new(ErrorKind::Closed, "the provider has been closed"));
        let runtime = self.ensure_workers()?;
        let bound = Duration::from_nanos(self.longest_ttl.load(Ordering::Relaxed));
        let quiet = async {
            loop {
                let settled = self.queues.settled();
                if self.queues.is_settled() && self.releaser.is_idle() && !self.keeps_for_the_server() {
                    return;
                }
                self.releaser.ensure_running(self, &runtime);
                self.releaser.help(self, &runtime);
                settled.await;
            }
        };
        if tokio::time::timeout(bound, quiet).await.is_err() {
            tracing::warn!(
                lock.backend = self.backend.name(),
                "closed with releases still under way: their ttl frees them"
            );
        }
        for holding in self.keeper.live() {
            tracing::warn!(
                lock.name = %holding.display_name().quoted(),
                lock.backend = self.backend.name(),
                "the provider was closed while this lock is held"
            );
        }
        let patience = bound.max(LockOptions::DEFAULT_RETRY_FOR);
        self.backend_closed.get_or_try_init(|| answered(patience, self.backend.close())).await.map(drop)
    }
}

impl<B: Backend> Drop for Engine<B> {
    fn drop(&mut self) {
        self.keeper.stop();
        self.releaser.stop();
    }
}

impl<B: Backend> fmt::Debug for Engine<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("backend", &self.backend)
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

/// The runtime that the caller is in.
pub(crate) fn current_runtime() -> Result<Handle> {
    Handle::try_current().map_err(|_| {
        Error::new(ErrorKind::Config, "locks need a tokio runtime with its timer: call this from inside one")
    })
}

/// Locks a mutex of the engine or a backend. None is ever left half-changed by a panic: what runs under them is the
/// crate's own.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::lock::LockProvider;
    use crate::memory::Memory;

    /// Whatever was done with however many names, nothing is kept of it; and nothing outlives the provider.
    #[tokio::test(start_paused = true)]
    async fn nothing_piles_up() {
        let provider = Provider::new(Memory::new());
        let other = Provider::new(provider.backend().clone());
        for round in 0..300 {
            let lock = provider.create_lock(&round.to_string());
            let guard = lock.acquire().await.unwrap();
            assert!(lock.try_acquire().await.unwrap().is_none());
            let elsewhere = other.create_lock(lock.name());
            assert!(elsewhere.try_acquire_for(Duration::from_millis(1)).await.unwrap().is_none());
            match round % 3 {
                0 => guard.release().await.unwrap(),
                1 => drop(guard),
                _ => {
                    assert!(provider.backend().revoke(lock.name()));
                    guard.lost().await;
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
        for engine in [&provider.engine, &other.engine] {
            assert_eq!(engine.queues.len(), 0);
            assert!(engine.keeper.live().is_empty());
            assert!(engine.releaser.is_idle());
        }
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(tasks(), 4, "keeper and releaser of each provider");

        let engine = Arc::downgrade(&provider.engine);
        drop((provider, other));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(engine.upgrade().is_none());
        assert_eq!(tasks(), 0);
    }
}
