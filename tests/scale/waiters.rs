//! Very many who wait for one lock.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use fencelock::{Fairness, LockGuard, LockProvider};
use tokio::task::{JoinSet, yield_now};

use crate::measures::{at_most, memory, settled, tasks};
use crate::stage::{Stage, within};

/// Those of another provider, which know nothing of the others.
const STRANGERS: usize = 10;

const NAME: &str = "wanted by all";

/// Tasks that a provider may have more once somebody has waited.
const WAITING_TASKS: usize = 4;

/// What waiting may cost.
pub(crate) struct Size {
    /// So many of one provider, of which the trial has its name.
    pub(crate) count: usize,
    pub(crate) connections: u64,
    /// Requests for each acquisition and its release.
    pub(crate) commands: f64,
    /// Keys, rows, blobs, files that may stay.
    pub(crate) entries: usize,
}

/// What is done with the lock: one at a time, in the order of tokens.
#[derive(Debug, Default)]
struct Resource {
    busy: AtomicBool,
    last_token: AtomicU64,
    visits: AtomicUsize,
    /// The next one of those who came in order.
    next: AtomicUsize,
}

impl Resource {
    /// The number of this visit.
    async fn visit(&self, guard: &LockGuard) -> usize {
        assert!(!self.busy.swap(true, Ordering::SeqCst), "two at once");
        let token = guard.fencing_token().get();
        assert!(self.last_token.swap(token, Ordering::SeqCst) < token, "a token that doesn't rise");
        let number = self.visits.fetch_add(1, Ordering::SeqCst);
        yield_now().await;
        assert!(!guard.is_lost(), "lost within a moment");
        self.busy.store(false, Ordering::SeqCst);
        number
    }
}

/// All are served, one at a time and in their order, over few connections, by few requests.
pub(crate) async fn many_waiters(stage: &Stage, size: &Size) {
    let count = size.count;
    let ttl = stage.kind.short_ttl.max(Duration::from_secs(10));
    let ours = stage.counted(ttl).await;
    let theirs = stage.counted(ttl).await;
    let resource = Arc::new(Resource::default());
    let first = within("the lock is taken", ours.create_lock(NAME).acquire()).await.expect("it is free");
    let before = memory();
    let mut waiters = JoinSet::new();
    for place in 0..count {
        let (lock, resource) = (ours.create_lock(NAME), resource.clone());
        let mut waiter = Box::pin(async move {
            let guard = lock.acquire().await.expect("granted in the end");
            assert_eq!(resource.next.fetch_add(1, Ordering::SeqCst), place, "not in its turn");
            resource.visit(&guard).await;
            leave(guard, place).await;
        });
        // Here, so that they queue in this order.
        poll_fn(|context| {
            assert!(waiter.as_mut().poll(context).is_pending(), "somebody has it");
            Poll::Ready(())
        })
        .await;
        waiters.spawn(waiter);
    }
    let each = memory().saturating_sub(before) / count;
    let mut strangers = JoinSet::new();
    for place in 0..STRANGERS {
        let (lock, resource) = (theirs.create_lock(NAME), resource.clone());
        strangers.spawn(async move {
            let guard = lock.acquire().await.expect("granted in the end");
            let number = resource.visit(&guard).await;
            leave(guard, place).await;
            number
        });
    }
    until_strangers_wait(stage).await;
    let (began, commands) = (Instant::now(), stage.commands());
    first.release().await.expect("it was held");
    within("all are served", waiters.join_all()).await;
    let last = within("the strangers are served", strangers.join_all()).await.into_iter().max();
    let took = began.elapsed();
    let commands = per(stage.commands() - commands, count + STRANGERS);
    let connections = stage.connections();
    println!(
        "{}: {count} waiters and {STRANGERS} of another provider served in {took:.1?}: {connections} connections, \
         {commands:.2} commands each, {each} bytes each",
        stage.kind.name,
    );
    assert_eq!(resource.visits.load(Ordering::SeqCst), count + STRANGERS);
    if ours.capabilities().fairness == Fairness::Fifo {
        // They came last, but wait as one, which stands in line with the other provider.
        assert!(last < Some(count / 10), "strangers had to wait for {last:?}");
    }
    assert!(connections <= size.connections, "{connections} connections");
    assert!(commands <= size.commands, "{commands} commands for each");
    all_give_up(stage, &*ours, count).await;
    for provider in [ours, theirs] {
        within("the provider is closed", provider.close()).await.expect("it is closed");
    }
    let after = stage.counted(ttl).await;
    let guard = within("the lock is free", after.create_lock(NAME).try_acquire()).await.expect("it is asked");
    let guard = guard.expect("nobody has it");
    resource.visit(&guard).await;
    guard.release().await.expect("it was held");
    within("the provider is closed", after.close()).await.expect("it is closed");
    at_most("entries", size.entries, || stage.rig.lasting_entries()).await;
}

/// They wait again, and none stays to be served. Nothing is left of them.
async fn all_give_up(stage: &Stage, provider: &dyn LockProvider, count: usize) {
    let holder = within("the lock is taken", provider.create_lock(NAME).acquire()).await.expect("it is free");
    let before = settled("tasks", tasks).await;
    let mut waiters = Vec::new();
    for _ in 0..count {
        let lock = provider.create_lock(NAME);
        let mut waiter = Box::pin(async move { lock.acquire().await });
        poll_fn(|context| {
            assert!(waiter.as_mut().poll(context).is_pending(), "somebody has it");
            Poll::Ready(())
        })
        .await;
        waiters.push(waiter);
    }
    drop(waiters);
    at_most("tasks", before + WAITING_TASKS, tasks).await;
    at_most("waiters that the server knows", 0, || stage.rig.waiters(NAME).unwrap_or(0)).await;
    holder.release().await.expect("it was held");
}

async fn leave(guard: LockGuard, place: usize) {
    if place.is_multiple_of(2) {
        guard.release().await.expect("it was held");
    }
}

/// Until the server knows of them, or must do so.
async fn until_strangers_wait(stage: &Stage) {
    if stage.rig.waiters(NAME).is_none() {
        return tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let waiting = async {
        while stage.rig.waiters(NAME) == Some(0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within("strangers wait", waiting).await;
}

#[expect(clippy::cast_precision_loss, reason = "these numbers are small")]
pub(crate) fn per(all: u64, count: usize) -> f64 {
    all as f64 / count as f64
}
