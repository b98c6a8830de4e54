//! The `memory` backend: locks between the tasks of one process, for tests and for a service of one instance. It is
//! also the reference of what a backend does.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;

use crate::backend::{Backend, Claim, Due, Grant, Instant, Outcome, OwnerId, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::lock;
use crate::error::Result;
use crate::fencing::FencingToken;
use crate::guard::Loss;
use crate::name::LockName;

/// Locks in memory. Clones share them.
///
/// It runs on tokio's paused clock, so that a test can let a lease expire without waiting; and
/// [`revoke`](Self::revoke) takes a lock away, so that a service can test what it does then.
///
/// ```
/// use fencelock::memory::Memory;
/// use fencelock::{LockProvider, Provider};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> fencelock::Result<()> {
/// let memory = Memory::new();
/// let (here, there) = (Provider::new(memory.clone()), Provider::new(memory));
/// let guard = here.create_lock("report").acquire().await?;
/// assert!(there.create_lock("report").try_acquire().await?.is_none());
/// # drop(guard); Ok(()) }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Memory {
    store: Arc<Mutex<Store>>,
}

#[derive(Debug, Default)]
struct Store {
    locks: HashMap<LockName, Entry>,
    /// The last token drawn, of whatever lock.
    last_token: u64,
}

#[derive(Debug, Default)]
struct Entry {
    holder: Option<Holder>,
    waiters: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Holder {
    owner: OwnerId,
    until: Instant,
}

#[derive(Debug)]
struct Waiter {
    owner: OwnerId,
    ttl: Duration,
    granted: oneshot::Sender<(FencingToken, Instant)>,
}

/// A grant in memory.
#[derive(Debug)]
pub struct MemoryHold {
    name: LockName,
    owner: OwnerId,
}

impl Memory {
    /// A store of its own.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The store of this name in this process: that of the URL `memory:NAME`. It lasts as long as anybody has it, or a
    /// lock in it is held, if only for [`hold_at_least`](crate::LockOptions::hold_at_least).
    #[must_use]
    pub fn named(name: &str) -> Self {
        static STORES: LazyLock<Mutex<HashMap<String, Memory>>> = LazyLock::new(Mutex::default);
        let mut stores = lock(&STORES);
        stores.retain(|_, memory| Arc::strong_count(&memory.store) > 1 || memory.lock().holds_any());
        stores.entry(name.to_owned()).or_default().clone()
    }

    /// Takes the lock away from whoever holds it, as an administrator would. The holder notices at its next renewal
    /// ([`Loss::Taken`]). False if nobody held it. The name is the server's: with the provider's prefix, if it has one.
    #[must_use = "false says that nobody held it"]
    pub fn revoke(&self, name: &str) -> bool {
        let mut store = self.lock();
        let name = LockName::new(name);
        let held = store.locks.get_mut(&name).is_some_and(|entry| entry.live_holder().is_some());
        if held {
            store.vacate(&name);
        }
        held
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    /// One attempt; a claim that waits is queued when it is busy.
    fn attempt(&self, claim: &Claim, waits: bool) -> Result<Attempted> {
        let mut store = self.lock();
        let entry = store.locks.entry(claim.name.clone()).or_default();
        if entry.live_holder().is_none() {
            // Its time is up: the first in the queue is next, not whoever looks first; unless that is the first.
            while entry.waiters.front().is_some_and(|w| w.owner != claim.owner && w.granted.is_closed()) {
                entry.waiters.pop_front();
            }
            if entry.waiters.front().is_some_and(|first| first.owner == claim.owner) {
                entry.waiters.pop_front();
            } else if !entry.waiters.is_empty() {
                store.vacate(&claim.name);
            }
        }
        let entry = store.locks.entry(claim.name.clone()).or_default();
        let Some(holder) = entry.live_holder() else {
            let (token, until) = store.grant(&claim.name, claim.owner, claim.ttl)?;
            return Ok(Attempted::Granted(token, until));
        };
        let remaining = holder.until.remaining();
        if !waits {
            return Ok(Attempted::Busy(remaining));
        }
        let (granted, receiver) = oneshot::channel();
        let waiter = Waiter { owner: claim.owner, ttl: claim.ttl, granted };
        match entry.waiters.iter_mut().find(|waiter| waiter.owner == claim.owner) {
            Some(place) => *place = waiter,
            None => entry.waiters.push_back(waiter),
        }
        Ok(Attempted::Queued(receiver, remaining))
    }
}

enum Attempted {
    Granted(FencingToken, Instant),
    Busy(Duration),
    Queued(oneshot::Receiver<(FencingToken, Instant)>, Duration),
}

impl Entry {
    fn live_holder(&self) -> Option<&Holder> {
        self.holder.as_ref().filter(|holder| !holder.until.has_passed())
    }

    fn is_held_by(&self, owner: OwnerId) -> bool {
        self.live_holder().is_some_and(|holder| holder.owner == owner)
    }
}

impl Store {
    fn holds_any(&self) -> bool {
        self.locks.values().any(|entry| entry.live_holder().is_some())
    }

    fn grant(&mut self, name: &LockName, owner: OwnerId, ttl: Duration) -> Result<(FencingToken, Instant)> {
        let token = FencingToken::after(self.last_token, SystemTime::now())?;
        self.last_token = token.get();
        let until = Instant::now() + ttl;
        self.locks.entry(name.clone()).or_default().holder = Some(Holder { owner, until });
        Ok((token, until))
    }

    /// Ends whatever holds the lock, and gives it to the first who waits.
    fn vacate(&mut self, name: &LockName) {
        let Some(entry) = self.locks.get_mut(name) else { return };
        entry.holder = None;
        while let Some(entry) = self.locks.get_mut(name)
            && let Some(waiter) = entry.waiters.pop_front()
        {
            if waiter.granted.is_closed() {
                continue; // it has gone away
            }
            // Without a token left, the waiter learns it from its own next attempt.
            let Ok((token, until)) = self.grant(name, waiter.owner, waiter.ttl) else { break };
            if waiter.granted.send((token, until)).is_ok() {
                return;
            }
        }
        self.locks.remove(name);
    }
}

fn hold(claim: &Claim, (token, until): (FencingToken, Instant)) -> Grant<MemoryHold> {
    Grant::lease(MemoryHold { name: claim.name.clone(), owner: claim.owner }, token, until)
}

impl Backend for Memory {
    type Hold = MemoryHold;

    fn name(&self) -> &'static str {
        "memory"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Duration::from_millis(1), Duration::from_secs(365 * 86_400), Expiry::Ttl)
            .keeps_after_exit(true)
            .wakes_waiters(true)
            .fairness(Fairness::Fifo)
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<MemoryHold>> {
        let give_up_at = Instant::now() + wait;
        loop {
            let waits = !give_up_at.has_passed();
            let (mut granted, remaining) = match self.attempt(claim, waits)? {
                Attempted::Granted(token, until) => return Ok(Outcome::Granted(hold(claim, (token, until)))),
                Attempted::Busy(remaining) => return Ok(Outcome::Busy { retry_after: Some(remaining) }),
                Attempted::Queued(granted, remaining) => (granted, remaining),
            };
            // A timer rounds up to its clock's grain; one that fires early goes round once more.
            let nap = remaining.min(give_up_at.remaining());
            if let Ok(granted) = tokio::time::timeout(nap, &mut granted).await {
                match granted {
                    Ok(granted) => return Ok(Outcome::Granted(hold(claim, granted))),
                    Err(_) => continue, // dropped from the queue
                }
            }
            // It may have been granted in this very moment.
            if let Ok(granted) = granted.try_recv() {
                return Ok(Outcome::Granted(hold(claim, granted)));
            }
        }
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        let mut store = self.lock();
        if let Some(entry) = store.locks.get_mut(&claim.name) {
            entry.waiters.retain(|waiter| waiter.owner != claim.owner);
            if entry.is_held_by(claim.owner) || entry.live_holder().is_none() {
                store.vacate(&claim.name);
            }
        }
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, MemoryHold>]) -> Vec<Renewal> {
        let mut store = self.lock();
        let mut renew = |Due { hold, ttl }: &Due<'_, MemoryHold>| {
            let holder = store.locks.get_mut(&hold.name).and_then(|entry| entry.holder.as_mut());
            match holder {
                Some(holder) if holder.owner == hold.owner && holder.until.has_passed() => {
                    Renewal::Lost(Loss::Expired)
                }
                Some(holder) if holder.owner == hold.owner => {
                    holder.until = holder.until.max(Instant::now() + *ttl);
                    Renewal::Until(holder.until)
                }
                _ => Renewal::Lost(Loss::Taken),
            }
        };
        due.iter().map(&mut renew).collect()
    }

    async fn release(&self, hold: &MemoryHold, keep_for: Duration) -> Result<Released> {
        let mut store = self.lock();
        match store.locks.get_mut(&hold.name) {
            Some(entry) if entry.is_held_by(hold.owner) => {
                if keep_for.is_zero() {
                    store.vacate(&hold.name);
                } else {
                    entry.holder = Some(Holder { owner: hold.owner, until: Instant::now() + keep_for });
                }
                Ok(Released::Yes)
            }
            _ => Ok(Released::NotHeld),
        }
    }

    async fn transfer(&self, hold_: &MemoryHold, to: &Claim) -> Result<Option<Grant<MemoryHold>>> {
        let mut store = self.lock();
        match store.locks.get(&hold_.name) {
            Some(entry) if entry.is_held_by(hold_.owner) => {
                store.grant(&to.name, to.owner, to.ttl).map(|granted| Some(hold(to, granted)))
            }
            _ => Ok(None),
        }
    }
}
