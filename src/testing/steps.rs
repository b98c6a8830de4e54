//! The steps that checks are made of: events that have to come, futures polled by hand, threads without a runtime.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::{DistributedLock, LockGuard, Result};

/// How long an event is awaited before its check fails. Far more than anything takes, on a busy machine too.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Awaits an event; if it doesn't come, the check fails and says which.
#[track_caller]
pub(super) fn within<F: Future>(event: &'static str, future: F) -> impl Future<Output = F::Output> {
    let place = Location::caller();
    async move {
        let in_time = timeout(PATIENCE, future).await.ok();
        in_time.unwrap_or_else(|| panic!("{place}: awaited {event}, and it did not come within {PATIENCE:?}"))
    }
}

/// Awaits an event that must not be an error either.
#[track_caller]
pub(super) fn ok<T>(event: &'static str, future: impl Future<Output = Result<T>>) -> impl Future<Output = T> {
    let place = Location::caller();
    let awaited = within(event, future);
    async move {
        match awaited.await {
            Ok(output) => output,
            Err(error) => panic!("{place}: awaited {event}, and it failed: {error}"),
        }
    }
}

/// Awaits the end of a task, and panics as it did.
#[track_caller]
pub(super) fn joined<T>(event: &'static str, task: JoinHandle<T>) -> impl Future<Output = T> {
    let awaited = within(event, task);
    async move {
        match awaited.await {
            Ok(output) => output,
            Err(error) => resume_unwind(error.into_panic()), // nobody aborts them
        }
    }
}

/// Polls `future` whenever it wants to be polled, at most `polls` times. `None`: it wasn't ready by then.
pub(super) async fn poll_up_to<F: Future + Unpin>(polls: usize, future: &mut F) -> Option<F::Output> {
    let mut polled = 0;
    poll_fn(|cx| {
        polled += 1;
        match Pin::new(&mut *future).poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if polled >= polls => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// A task that waits for the lock. When this returns, it stands in line: a caller has come when `acquire` is first
/// polled.
pub(super) async fn in_line(lock: Box<dyn DistributedLock>) -> JoinHandle<Result<LockGuard>> {
    let (came, comes) = oneshot::channel();
    let task = tokio::spawn(async move {
        let mut acquiring = lock.acquire();
        let at_once = poll_up_to(1, &mut acquiring).await;
        let _ = came.send(());
        match at_once {
            Some(outcome) => outcome,
            None => acquiring.await,
        }
    });
    within("the first poll of a waiter", comes).await.expect("the task polls it before it ends");
    task
}

/// Runs `job` on a thread of its own, which belongs to no runtime, and panics as it does.
pub(super) async fn on_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || ended.send(catch_unwind(AssertUnwindSafe(job))).is_ok());
    match within("the end of a thread", end).await.expect("the thread sends how it ended") {
        Ok(output) => output,
        Err(panic) => resume_unwind(panic),
    }
}

/// A runtime for a thread that belongs to none.
pub(super) fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime can be built")
}
