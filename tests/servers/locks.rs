//! Taking locks, of whatever server.

use std::time::{Duration, Instant};

use fencelock::{LockGuard, LockProvider};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How much longer than promised a busy machine may take.
pub(crate) const SLACK: Duration = Duration::from_secs(2);

/// Far longer than anything takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(30);

/// Awaits what has to happen.
pub(crate) async fn within<F: Future>(event: &str, future: F) -> F::Output {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {event}"))
}

/// Shows with `--nocapture` how long something took.
pub(crate) fn report(what: &str, took: Duration) {
    println!("{what}: {:.1} ms", took.as_secs_f64() * 1e3);
}

/// Waits for a lock in a task, which says when it got it.
pub(crate) fn waits(provider: &impl LockProvider, name: &str) -> JoinHandle<(LockGuard, Instant)> {
    let lock = provider.create_lock(name);
    tokio::spawn(async move {
        let guard = lock.acquire().await.expect("granted in the end");
        (guard, Instant::now())
    })
}

pub(crate) async fn granted(waiter: JoinHandle<(LockGuard, Instant)>) -> (LockGuard, Instant) {
    within("a waiter has the lock", waiter).await.expect("it doesn't panic")
}

pub(crate) async fn take(provider: &impl LockProvider, name: &str) -> LockGuard {
    within("the lock is taken", provider.create_lock(name).acquire()).await.expect("the server is there")
}
