//! What this process does about each name: who holds it, who waits for it, and the one request under way for it.
//!
//! At most one request per name is under way at a time: a claim in a caller's own future, a driver task that waits on
//! the server for all local waiters, or a release. Everything else queues here, first come, first served.
//!
//! Nothing may look at a tenure's state with a shard locked: a loss noticed there would come back here.

use std::collections::hash_map::{Entry, RandomState};
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::futures::Notified;
use tokio::sync::{Notify, oneshot};

use super::holding::Holding;
use super::lock;
use super::slot::{Activity, Delivery, Next, Slot, Trouble, Waiter, Watchers};
use crate::backend::{Backend, Claim, Mode};
use crate::clock::Instant;
use crate::error::Error;
use crate::name::LockName;

const SHARDS: usize = 32;

/// How often in a row a lock may pass from hand to hand inside this process while others may be waiting on the server.
const MAX_TRANSFERS: u32 = 16;
/// For how long, too.
const MAX_TRANSFER_TIME: Duration = Duration::from_millis(20);

pub(crate) struct Queues<B: Backend> {
    shards: [Mutex<HashMap<LockName, Slot<B>, RandomState>>; SHARDS],
    hasher: RandomState,
    settled: Notify,
}

/// How a call may go on.
pub(crate) enum Begin<B: Backend> {
    /// The slot is the caller's: claim.
    Claim,
    /// Somebody here has it or is before us.
    Busy,
    /// Something is under way: look again when it is over.
    Watch(Arc<Watchers>),
    /// The holder's time is up and nobody has noticed: notice it, outside.
    Expired(Arc<Holding<B>>),
    Queued(oneshot::Receiver<Delivery>),
}

/// What a claim in a caller's own future came to, as far as the queue is concerned.
pub(crate) enum ClaimEnd<B: Backend> {
    Granted(Arc<Holding<B>>),
    /// Busy; the number is the claim's.
    Busy(u64),
    Failed,
}

/// What a driver shall do next.
pub(crate) enum Head {
    /// Claim for the first waiter, with its TTL and mode.
    Claim {
        ttl: Duration,
        mode: Mode,
        /// Claims that have failed in a row: back off first.
        failures: u32,
        /// Let other processes go first.
        yields: bool,
    },
    /// Nobody waits; the driver's job has ended with this answer.
    Nobody,
}

impl<B: Backend> Queues<B> {
    pub(crate) fn new(hasher: RandomState) -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::new(HashMap::with_hasher(hasher.clone()))),
            hasher,
            settled: Notify::new(),
        }
    }

    fn shard(&self, name: &LockName) -> MutexGuard<'_, HashMap<LockName, Slot<B>, RandomState>> {
        // The map uses the low bits of the same hash.
        let hash = self.hasher.hash_one(name) >> 32;
        lock(&self.shards[usize::try_from(hash).unwrap_or_default() % SHARDS])
    }

    /// Runs `change` on the slot of this name if there is one, and drops the slot if nothing is left in it.
    fn with<R>(&self, name: &LockName, change: impl FnOnce(&mut Slot<B>) -> R) -> Option<R> {
        let mut shard = self.shard(name);
        let slot = shard.get_mut(name)?;
        let result = change(slot);
        let idle = slot.activity == Activity::Idle;
        // What is taken out is dropped once the shard is unlocked: a holder's end may have work to do.
        let removed = slot.is_empty().then(|| shard.remove(name));
        drop(shard);
        if let Some(Some(mut slot)) = removed {
            slot.notify();
        }
        if idle {
            self.settled.notify_waiters();
        }
        Some(result)
    }

    /// Whether a try may claim now.
    pub(crate) fn begin_try(&self, name: &LockName) -> Begin<B> {
        self.begin(name, |slot| match slot.activity {
            _ if !slot.waiters.is_empty() => Begin::Busy,
            Activity::Idle => Begin::Busy, // held
            Activity::Claiming | Activity::Freeing | Activity::Driving => Begin::Watch(slot.watch()),
        })
    }

    /// Claims if nothing is in the way, or queues what `waiter` makes.
    pub(crate) fn begin_acquire(
        &self,
        name: &LockName,
        waiter: impl FnOnce(oneshot::Sender<Delivery>) -> Waiter,
    ) -> Begin<B> {
        self.begin(name, |slot| {
            let (deliver, receiver) = oneshot::channel();
            slot.enqueue(waiter(deliver));
            Begin::Queued(receiver)
        })
    }

    /// Lets the caller claim if nothing is in the way; if something is, `otherwise` says what to do.
    fn begin(&self, name: &LockName, otherwise: impl FnOnce(&mut Slot<B>) -> Begin<B>) -> Begin<B> {
        match self.shard(name).entry(name.clone()) {
            Entry::Vacant(vacant) => {
                vacant.insert(Slot::new(Activity::Claiming));
                Begin::Claim
            }
            Entry::Occupied(mut occupied) => {
                let slot = occupied.get_mut();
                match &slot.holder {
                    Some(holder) if holder.is_overdue() => Begin::Expired(holder.clone()),
                    None if slot.activity == Activity::Idle && slot.waiters.is_empty() => {
                        slot.activity = Activity::Claiming;
                        Begin::Claim
                    }
                    _ => otherwise(slot),
                }
            }
        }
    }

    /// Ends a claim that `begin_…` allowed. `waiter` queues the caller itself, `trouble` is what the claim failed of.
    pub(crate) fn end_claim(
        &self,
        name: &LockName,
        end: ClaimEnd<B>,
        waiter: Option<Waiter>,
        trouble: Option<Trouble>,
    ) -> Next {
        self.with(name, |slot| {
            slot.activity = Activity::Idle;
            match end {
                ClaimEnd::Granted(holding) => slot.holder = Some(holding),
                ClaimEnd::Busy(number) => {
                    if let Some(watchers) = &slot.watchers {
                        watchers.busy.fetch_max(number, Ordering::AcqRel);
                    }
                }
                ClaimEnd::Failed => {}
            }
            if let Some(waiter) = waiter {
                slot.enqueue(waiter);
            }
            slot.trouble = trouble;
            slot.notify();
            if slot.holder.is_none() { slot.serve_waiters() } else { Next::Nothing }
        })
        .unwrap_or(Next::Nothing)
    }

    /// The caller's own claim has an outcome that nobody knows: it waits, at its place, until that is cleared up.
    pub(crate) fn wait_for_freeing(&self, name: &LockName, waiter: Waiter, trouble: Trouble) {
        self.with(name, |slot| {
            slot.enqueue(waiter);
            slot.trouble = Some(trouble);
        });
    }

    /// A claim was broken off, or a grant ends: whatever it was is to be freed on the server, and until then the name
    /// stays occupied.
    pub(crate) fn begin_freeing(&self, name: &LockName) {
        let holder = self.with(name, |slot| {
            slot.activity = Activity::Freeing;
            slot.stop = None;
            slot.holder.take()
        });
        drop(holder); // with the shard unlocked
    }

    /// A release takes effect only when `hold_at_least` is over: until then the name is held.
    pub(crate) fn keep(&self, holding: &Arc<Holding<B>>) {
        self.with(&holding.name, |slot| {
            slot.holder = Some(holding.clone());
            slot.activity = Activity::Idle;
            slot.notify();
        });
    }

    /// The driver's task is gone with its runtime.
    pub(crate) fn driver_died(&self, name: &LockName, stop: &Arc<Notify>) {
        let waiters = self.with(name, |slot| {
            if !slot.is_driven_by(stop) {
                return VecDeque::new(); // its claim is being abandoned, and perhaps there is a new driver by now
            }
            if slot.activity == Activity::Driving {
                slot.activity = Activity::Idle;
            }
            slot.stop = None;
            slot.notify();
            std::mem::take(&mut slot.waiters)
        });
        for waiter in waiters.into_iter().flatten() {
            let _ = waiter.deliver.send(Delivery::Again); // it may have left
        }
    }

    /// Ends what `begin_freeing` began.
    pub(crate) fn end_freeing(&self, name: &LockName) -> Next {
        self.with(name, |slot| {
            if slot.activity != Activity::Freeing {
                return Next::Nothing;
            }
            slot.streak = None;
            slot.activity = Activity::Idle;
            slot.notify();
            slot.serve_waiters()
        })
        .unwrap_or(Next::Nothing)
    }

    /// Whom a lock that is being freed could be handed to: the TTL and mode of the first waiter. `None` if nobody waits,
    /// or the lock has passed from hand to hand here for long enough.
    pub(crate) fn transfer_candidate(&self, name: &LockName) -> Option<(Duration, Mode)> {
        self.with(name, |slot| {
            let first = slot.waiters.front()?;
            let (count, since) = *slot.streak.get_or_insert_with(|| (0, Instant::now()));
            if count >= MAX_TRANSFERS || since.elapsed() > MAX_TRANSFER_TIME {
                slot.yields = true;
                return None;
            }
            slot.streak = Some((count + 1, since));
            Some((first.terms.ttl, first.mode))
        })?
    }

    /// Gives a grant of `claim` to the first waiter, as the holding that `hold` makes of it. `None`, with `hold` unused
    /// and the slot `Freeing`, if nobody is there whom the grant fits.
    pub(crate) fn deliver(
        &self,
        claim: &Claim,
        hold: impl FnOnce(&Waiter) -> Arc<Holding<B>>,
    ) -> Option<(Arc<Holding<B>>, Waiter)> {
        self.with(&claim.name, |slot| {
            slot.stop = None;
            slot.trouble = None;
            let fitting = slot.waiters.front().is_some_and(|first| first.fits(claim));
            let Some(waiter) = fitting.then(|| slot.waiters.pop_front()).flatten() else {
                slot.activity = Activity::Freeing;
                return None;
            };
            let holding = hold(&waiter);
            slot.holder = Some(holding.clone());
            slot.activity = Activity::Idle;
            slot.notify();
            Some((holding, waiter))
        })?
    }

    /// For whom the driver claims next, if anybody waits.
    pub(crate) fn head(&self, name: &LockName, stop: &Arc<Notify>) -> Head {
        self.with(name, |slot| {
            if !slot.is_driven_by(stop) {
                return Head::Nobody;
            }
            let Some(first) = slot.waiters.front() else {
                slot.activity = Activity::Idle;
                slot.stop = None;
                slot.notify();
                return Head::Nobody;
            };
            Head::Claim {
                ttl: first.terms.ttl,
                mode: first.mode,
                failures: slot.trouble.as_ref().map_or(0, |trouble| trouble.failures),
                yields: std::mem::take(&mut slot.yields),
            }
        })
        .unwrap_or(Head::Nobody)
    }

    /// Whether the driver's claim has become pointless: nobody waits, or the first waiter needs another one. Then the slot
    /// is `Freeing` from this answer on.
    pub(crate) fn give_up(&self, claim: &Claim) -> bool {
        self.with(&claim.name, |slot| {
            let pointless = !slot.waiters.front().is_some_and(|first| first.fits(claim));
            if pointless {
                slot.activity = Activity::Freeing;
            }
            pointless
        })
        .unwrap_or(true)
    }

    /// The driver's claim has been answered: the server is there.
    pub(crate) fn clear_trouble(&self, name: &LockName) {
        self.with(name, |slot| slot.trouble = None);
    }

    /// The driver's claim has failed. Takes out the waiters who have ridden out the outage long enough, or the first
    /// one if the error won't go away by itself.
    pub(crate) fn fail(&self, name: &LockName, since: Instant, error: &Error) {
        let failed = self.with(name, |slot| {
            if !error.is_retryable() {
                return slot.waiters.pop_front().into_iter().collect();
            }
            let mut trouble = Trouble::new(since, error);
            if let Some(before) = slot.trouble.take() {
                trouble.since = before.since;
                trouble.failures = before.failures.saturating_add(1);
            }
            let since = trouble.since;
            slot.trouble = Some(trouble);
            let (failed, patient) = slot
                .waiters
                .drain(..)
                .partition(|waiter| (since.max(waiter.arrived) + waiter.terms.retry_for).has_passed());
            slot.waiters = patient;
            failed
        });
        for waiter in failed.unwrap_or_default() {
            let _ = waiter.deliver.send(Delivery::Failed(error.duplicate())); // it may have left
        }
    }

    /// A waiter is gone. If it was the last, the driver stops. Says what the outage is, if there is one.
    pub(crate) fn leave(&self, name: &LockName, number: u64) -> Option<Error> {
        self.with(name, |slot| {
            if let Ok(place) = slot.waiters.binary_search_by_key(&number, |waiter| waiter.number) {
                slot.waiters.remove(place);
            }
            if slot.waiters.is_empty()
                && let Some(stop) = &slot.stop
            {
                stop.notify_one();
            }
            slot.trouble.as_ref().map(|trouble| trouble.error.duplicate())
        })?
    }

    /// Who holds it here.
    pub(crate) fn holder(&self, name: &LockName) -> Option<Arc<Holding<B>>> {
        self.with(name, |slot| slot.holder.clone())?
    }

    /// Sends every waiter away with an error.
    pub(crate) fn fail_all(&self, error: impl Fn() -> Error) {
        self.clear(|| Delivery::Failed(error()));
    }

    /// Who served the queues is gone with its runtime: every waiter and every try has to see for itself.
    pub(crate) fn start_again(&self) {
        self.clear(|| Delivery::Again);
    }

    fn clear(&self, delivery: impl Fn() -> Delivery) {
        for shard in &self.shards {
            let mut waiters = Vec::new();
            for slot in lock(shard).values_mut() {
                waiters.extend(slot.waiters.drain(..));
                slot.notify();
                if let Some(stop) = &slot.stop {
                    stop.notify_one();
                }
            }
            for waiter in waiters {
                let _ = waiter.deliver.send(delivery()); // it may have left
            }
        }
    }

    /// Says that something which isn't in the queues has settled.
    pub(crate) fn notify_settled(&self) {
        self.settled.notify_waiters();
    }

    /// Resolves at the next change that may have settled everything. Take it before asking
    /// [`is_settled`](Self::is_settled).
    pub(crate) fn settled(&self) -> Notified<'_> {
        self.settled.notified()
    }

    /// How many names anything is known of.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether nothing is under way for any name.
    pub(crate) fn is_settled(&self) -> bool {
        self.shards.iter().all(|shard| lock(shard).values().all(|slot| slot.activity == Activity::Idle))
    }
}
