//! Every future may be dropped at every await point: the lock is free again at once, long before its TTL.
//!
//! "At every await point" means: polled once and dropped, polled twice and dropped, and so on until it is ready.

use std::future::Future;
use std::pin::Pin;

use crate::testing::Subject;
use crate::testing::steps::{PATIENCE, joined, ok, poll_up_to, within};
use crate::{DistributedLock, LockGuard, LockProvider, Result};

type Attempt<'a> = Pin<Box<dyn Future<Output = Result<Option<LockGuard>>> + Send + 'a>>;

/// More polls than any attempt asks for.
const ENDLESS: usize = 1000;

/// How an attempt finds the lock.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Found {
    Free,
    /// The same provider has it until the attempt is dropped.
    HeldHere,
    /// Another provider has it until the attempt is dropped.
    HeldElsewhere,
    /// The same provider frees it as soon as the attempt has been polled.
    FreedHere,
    /// Another provider frees it as soon as the attempt has been polled.
    FreedElsewhere,
    /// The same provider has just dropped its guard.
    DroppedHere,
}

/// [`acquire`](DistributedLock::acquire).
pub async fn acquire(subject: Subject) {
    attempts(&subject, |lock| Box::pin(async move { lock.acquire().await.map(Some) })).await;
}

/// [`try_acquire`](DistributedLock::try_acquire).
pub async fn try_acquire(subject: Subject) {
    attempts(&subject, |lock| lock.try_acquire()).await;
}

/// [`try_acquire_for`](DistributedLock::try_acquire_for).
pub async fn try_acquire_for(subject: Subject) {
    attempts(&subject, |lock| lock.try_acquire_for(PATIENCE)).await;
}

/// [`LockGuard::release`].
pub async fn release(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let (lock, others) = (provider.create_lock("job"), other.create_lock("job"));
    for polls in 1..ENDLESS {
        let guard = ok("the grant", lock.acquire()).await;
        let mut releasing = Box::pin(guard.release());
        let released = within("the polls of a release", poll_up_to(polls, &mut releasing)).await;
        drop(releasing);
        everybody_gets_it(&*lock, &*others).await;
        if let Some(released) = released {
            released.expect("it was not lost");
            return;
        }
    }
    panic!("a release was not done after {ENDLESS} polls");
}

async fn attempts(subject: &Subject, attempt: impl Fn(&dyn DistributedLock) -> Attempt<'_>) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    for found in [Found::HeldHere, Found::HeldElsewhere] {
        cancel(&*provider, &*other, found, 1, &attempt).await; // nothing would ask for a second poll
    }
    for found in [Found::Free, Found::DroppedHere, Found::FreedHere, Found::FreedElsewhere] {
        let mut polls = 1..ENDLESS;
        while !cancel(&*provider, &*other, found, polls.next().expect("it is ready in the end"), &attempt)
            .await
        {}
    }
    ok("the end of the provider", provider.close()).await;
    ok("the end of the other provider", other.close()).await;
}

/// Polls an attempt so many times, drops it, and says whether it was ready by then. The lock must be free afterwards.
async fn cancel(
    provider: &dyn LockProvider,
    other: &dyn LockProvider,
    found: Found,
    polls: usize,
    attempt: impl Fn(&dyn DistributedLock) -> Attempt<'_>,
) -> bool {
    let (lock, others) = (provider.create_lock("job"), other.create_lock("job"));
    let mut holder = match found {
        Found::Free => None,
        Found::HeldHere | Found::FreedHere => Some(ok("the grant", lock.acquire()).await),
        Found::HeldElsewhere | Found::FreedElsewhere => Some(ok("the grant", others.acquire()).await),
        Found::DroppedHere => {
            drop(ok("the grant", lock.acquire()).await);
            None
        }
    };
    let mut attempting = attempt(&*lock);
    let mut ready = poll_up_to(1, &mut attempting).await;
    let mut freeing = None;
    if let Found::FreedHere | Found::FreedElsewhere = found {
        freeing = holder.take().map(|guard| tokio::spawn(guard.release()));
    }
    if ready.is_none() && polls > 1 {
        ready = within("the polls of an attempt", poll_up_to(polls - 1, &mut attempting)).await;
    }
    drop(attempting);
    let ready =
        ready.map(|outcome| outcome.unwrap_or_else(|error| panic!("{found:?}, {polls} polls: {error}")));
    if let Some(freeing) = freeing {
        joined("the holder's release", freeing).await.expect("the holder had not lost it");
    }
    if let Some(holder) = holder {
        assert!(!matches!(ready, Some(Some(_))), "{found:?}: two have it");
        ok("the holder's release", holder.release()).await;
    }
    let was_ready = ready.is_some();
    drop(ready);
    everybody_gets_it(&*lock, &*others).await;
    was_ready
}

/// The lock can be had through both providers, which it couldn't if an abandoned grant were still there.
async fn everybody_gets_it(lock: &dyn DistributedLock, others: &dyn DistributedLock) {
    for lock in [others, lock] {
        let guard = ok("a free lock after a cancelled call", lock.acquire()).await;
        ok("the release", guard.release()).await;
    }
}
