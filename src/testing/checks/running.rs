//! `guard.run(job)`: the job runs as long as the lock is held, and not a step longer.

use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::task::yield_now;
use tokio::time::Instant;

use crate::testing::Subject;
use crate::testing::steps::{joined, ok, poll_up_to, within};
use crate::{ErrorKind, LockGuard, LockOptions, Loss};

/// A job that ends in time gives its output; one whose future is dropped leaves the lock held.
pub async fn a_job_is_run_to_its_end(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let output = ok(
        "the end of the job",
        guard.run(async {
            yield_now().await;
            3
        }),
    );
    assert_eq!(output.await, 3);
    let (job, dropped) = endless();
    let mut running = Box::pin(guard.run(job));
    assert!(poll_up_to(1, &mut running).await.is_none());
    drop(running);
    within("the drop of the job", dropped).await.expect_err("it never ends");
    assert!(!guard.is_lost());
    assert!(ok("a try", other.create_lock("job").try_acquire()).await.is_none(), "two have it");
    ok("the release", guard.release()).await;
}

/// The job is dropped when the TTL has run out.
pub async fn expiry_stops_the_job(subject: Subject) {
    let ttl = subject.short_ttl();
    let unrenewed = LockOptions::new().ttl(ttl).auto_renew(false);
    let began = Instant::now();
    let guard = ok("the grant", subject.provider_with(unrenewed).await.create_lock("job").acquire()).await;
    stops(guard, async { Loss::Expired }).await;
    let ran = began.elapsed();
    assert!(ran <= ttl + subject.slack(), "with a ttl of {ttl:?} the job ran for {ran:?}");
}

/// The job is dropped within a heartbeat, a third of the TTL, after the lock was taken away. Ignored where nobody can
/// do that.
pub async fn taking_away_stops_the_job(subject: Subject) {
    let ttl = subject.heartbeat_ttl();
    let provider = subject.provider_with(LockOptions::new().ttl(ttl)).await;
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let began = Instant::now();
    stops(guard, subject.lose("job")).await;
    let late = began.elapsed();
    assert!(late <= ttl / 3 + subject.slack(), "the job was stopped after {late:?}; the ttl is {ttl:?}");
}

/// Once the guard has been released its job doesn't go on either.
pub async fn a_release_stops_the_job(subject: Subject) {
    let guard = ok("the grant", subject.provider().await.create_lock("job").acquire()).await;
    let (job, dropped) = endless();
    let running = tokio::spawn(guard.run(job));
    ok("the release", guard.release()).await;
    let error = joined("the end of the job", running).await.expect_err("it was released");
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, None));
    within("the drop of the job", dropped).await.expect_err("it never ends");
}

/// A job that was frozen for longer than the TTL takes no further step, although it is polled.
pub async fn a_frozen_job_takes_no_further_step(subject: Subject) {
    let ttl = subject.short_ttl();
    let provider = subject.provider_with(LockOptions::new().ttl(ttl).auto_renew(false)).await;
    let lock = provider.create_lock("job");
    let freeze = || std::thread::sleep(ttl + Duration::from_millis(1)); // not a wait: this thread is frozen
    for frozen_inside in [true, false] {
        let guard = ok("the grant", lock.acquire()).await;
        let stepped = AtomicBool::new(false);
        let mut running = Box::pin(guard.run(async {
            if frozen_inside {
                freeze();
            }
            yield_now().await;
            stepped.store(true, Ordering::Relaxed);
        }));
        assert!(poll_up_to(1, &mut running).await.is_none(), "the job had not come to its end");
        if !frozen_inside {
            freeze();
        }
        let outcome = poll_up_to(1, &mut running).await.expect("the lock was lost before this poll");
        assert_eq!(outcome.expect_err("the lock was lost").loss(), Some(Loss::Expired));
        assert!(!stepped.load(Ordering::Relaxed), "the job went on after the lock was lost");
    }
}

/// Runs a job that never ends, and `lose` beside it: the job must be dropped for the reason that `lose` tells.
async fn stops(guard: LockGuard, lose: impl Future<Output = Loss>) {
    let (job, mut dropped) = endless();
    let mut running = Box::pin(guard.run(job));
    assert!(poll_up_to(1, &mut running).await.is_none(), "it never ends");
    let (error, expected) = tokio::join!(within("the end of the job", &mut running), lose);
    let error = error.expect_err("the lock is lost");
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, Some(expected)));
    assert_eq!(dropped.try_recv(), Err(TryRecvError::Closed), "the job was not dropped, only forgotten");
}

/// A job that never ends, and what resolves when it is dropped.
fn endless() -> (impl Future<Output = ()> + Send, oneshot::Receiver<()>) {
    let (alive, dropped) = oneshot::channel();
    let job = async move {
        let _alive: oneshot::Sender<()> = alive;
        pending::<()>().await;
    };
    (job, dropped)
}
