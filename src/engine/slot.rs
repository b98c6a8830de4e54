//! [`Slot`]: what this process does about one name, and who waits for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use super::holding::Holding;
use crate::backend::{Backend, Claim, Mode};
use crate::clock::Instant;
use crate::error::Error;
use crate::guard::LockGuard;
use crate::name::LockName;
use crate::options::Terms;

pub(super) struct Slot<B: Backend> {
    pub(super) holder: Option<Arc<Holding<B>>>,
    pub(super) activity: Activity,
    pub(super) waiters: VecDeque<Waiter>,
    /// Tries that wait for the outcome of what is under way.
    pub(super) watchers: Option<Arc<Watchers>>,
    /// Wakes the driver when its last waiter is gone.
    pub(super) stop: Option<Arc<Notify>>,
    /// The outage that the driver is riding out.
    pub(super) trouble: Option<Trouble>,
    /// The run of transfers inside this process: how many, since when.
    pub(super) streak: Option<(u32, Instant)>,
    /// The run has just been cut short for the sake of others: let them go first.
    pub(super) yields: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    Idle,
    /// A caller's own future is claiming.
    Claiming,
    /// The driver task is claiming for the waiters.
    Driving,
    /// A release or an abandonment is queued or under way.
    Freeing,
}

/// What a failing server has said so far.
pub(super) struct Trouble {
    pub(super) since: Instant,
    pub(super) failures: u32,
    pub(super) error: Error,
}

impl Trouble {
    pub(super) fn new(since: Instant, error: &Error) -> Self {
        Self { since, failures: 1, error: error.duplicate() }
    }
}

/// A local waiter, in the order of its number.
pub(super) struct Waiter {
    pub(super) number: u64,
    pub(super) arrived: Instant,
    pub(super) display_name: LockName,
    pub(super) terms: Terms,
    pub(super) mode: Mode,
    /// Where the waiter lives.
    pub(super) runtime: Handle,
    pub(super) deliver: oneshot::Sender<Delivery>,
}

impl Waiter {
    /// Whether a grant of this claim would do for this waiter.
    pub(super) fn fits(&self, claim: &Claim) -> bool {
        self.terms.ttl == claim.ttl && self.mode == claim.mode
    }
}

pub(super) enum Delivery {
    Granted(LockGuard),
    Failed(Error),
    /// Who served the queue is gone with its runtime: queue again, and see that somebody serves it.
    Again,
}

/// Wakes tries when what they watch is over, and tells them of a claim that found the lock busy.
#[derive(Default)]
pub(super) struct Watchers {
    over: AtomicBool,
    changed: Notify,
    pub(super) busy: AtomicU64,
}

impl Watchers {
    pub(super) async fn changed(&self) {
        let changed = self.changed.notified();
        if !self.over.load(Ordering::Acquire) {
            changed.await;
        }
    }

    pub(super) fn notify(&self) {
        self.over.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Whether a claim that began after the call of this number has found the lock busy.
    pub(super) fn found_busy_after(&self, number: u64) -> bool {
        self.busy.load(Ordering::Acquire) > number
    }
}

/// What has to be done after a change, once the shard is unlocked.
#[must_use]
#[derive(Debug)]
pub(super) enum Next {
    Nothing,
    /// Spawn the driver there, where the first waiter lives: that runtime is being polled. The slot says `Driving`
    /// already.
    Drive(Handle, Arc<Notify>),
}

impl<B: Backend> Slot<B> {
    pub(super) fn new(activity: Activity) -> Self {
        Self {
            holder: None,
            activity,
            waiters: VecDeque::new(),
            watchers: None,
            stop: None,
            trouble: None,
            streak: None,
            yields: false,
        }
    }

    pub(super) fn notify(&mut self) {
        if let Some(watchers) = self.watchers.take() {
            watchers.notify();
        }
    }

    pub(super) fn watch(&mut self) -> Arc<Watchers> {
        self.watchers.get_or_insert_default().clone()
    }

    /// In the order of the numbers, so that a waiter who comes back has its old place.
    pub(super) fn enqueue(&mut self, waiter: Waiter) {
        let place = self.waiters.partition_point(|other| other.number < waiter.number);
        self.waiters.insert(place, waiter);
        // A try that watches what is under way comes after this one: it finds the lock busy.
        self.notify();
    }

    /// What is to be done now that nothing is under way and nobody holds the lock.
    pub(super) fn serve_waiters(&mut self) -> Next {
        let Some(first) = self.waiters.front() else { return Next::Nothing };
        let runtime = first.runtime.clone();
        self.activity = Activity::Driving;
        let stop = Arc::new(Notify::new());
        self.stop = Some(stop.clone());
        self.notify();
        Next::Drive(runtime, stop)
    }

    /// Whether the driver that was given this `stop` is the one that serves the slot now.
    pub(super) fn is_driven_by(&self, stop: &Arc<Notify>) -> bool {
        self.stop.as_ref().is_some_and(|current| Arc::ptr_eq(current, stop))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.holder.is_none() && self.activity == Activity::Idle && self.waiters.is_empty()
    }
}
