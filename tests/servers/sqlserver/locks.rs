//! The lock manager: application locks, and locks of rows and tables, in one queue per resource.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::values::RowKey;

/// The number of a session.
pub(super) type Spid = u16;

/// What a lock is on. All names but that of an application's resource are in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// Database, principal, resource.
    Application(Arc<str>, Arc<str>, Arc<str>),
    /// Database and table.
    Table(Arc<str>, Arc<str>),
    /// Database, table, and what identifies the row.
    Row(Arc<str>, Arc<str>, RowKey),
}

/// In which way it is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    IntentShared,
    Shared,
    Update,
    IntentExclusive,
    /// What a holder of `Shared` or `Update` has when it gets `IntentExclusive` too, or the other way round.
    SharedIntentExclusive,
    UpdateIntentExclusive,
    Exclusive,
}

impl Mode {
    /// By the name that `sp_getapplock` takes.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name.trim_end().to_lowercase().as_str() {
            "shared" => Self::Shared,
            "update" => Self::Update,
            "exclusive" => Self::Exclusive,
            "intentshared" => Self::IntentShared,
            "intentexclusive" => Self::IntentExclusive,
            _ => return None,
        })
    }

    /// The name that `APPLOCK_MODE` returns.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::IntentShared => "IntentShared",
            Self::Shared => "Shared",
            Self::Update => "Update",
            Self::IntentExclusive => "IntentExclusive",
            Self::SharedIntentExclusive => "SharedIntentExclusive",
            Self::UpdateIntentExclusive => "UpdateIntentExclusive",
            Self::Exclusive => "Exclusive",
        }
    }

    /// Whether two owners may have these modes at once.
    fn goes_with(self, other: Self) -> bool {
        use Mode::{IntentExclusive, IntentShared, Shared, Update};
        match (self, other) {
            (IntentShared, mode) | (mode, IntentShared) => mode != Self::Exclusive,
            (Shared, Shared | Update) | (Update, Shared) | (IntentExclusive, IntentExclusive) => true,
            _ => false,
        }
    }

    /// What an owner has who has both.
    fn and(self, other: Self) -> Self {
        use Mode::{
            Exclusive, IntentExclusive, IntentShared, Shared, SharedIntentExclusive, Update,
            UpdateIntentExclusive,
        };
        match (self, other) {
            (one, other) if one == other => one,
            (Exclusive, _) | (_, Exclusive) => Exclusive,
            (IntentShared, mode) | (mode, IntentShared) => mode,
            (Shared, Update) | (Update, Shared) => Update,
            (Shared | SharedIntentExclusive, IntentExclusive | SharedIntentExclusive)
            | (IntentExclusive | SharedIntentExclusive, Shared | SharedIntentExclusive) => {
                SharedIntentExclusive
            }
            _ => UpdateIntentExclusive,
        }
    }
}

/// To whom a lock belongs: it ends with the session, or already with its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    Session(Spid),
    Transaction(Spid),
}

impl Owner {
    /// The session.
    pub(super) fn spid(self) -> Spid {
        match self {
            Self::Session(spid) | Self::Transaction(spid) => spid,
        }
    }
}

/// What became of a request.
#[derive(Debug)]
pub(super) enum Answer {
    Granted,
    /// It is in the queue. The receiver gets something once it is granted.
    Queued(u64, oneshot::Receiver<()>),
    /// It would wait for somebody who waits for this session.
    Deadlock,
}

#[derive(Debug)]
struct Grant {
    owner: Owner,
    mode: Mode,
    count: u32,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    owner: Owner,
    mode: Mode,
    granted: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Resource {
    grants: Vec<Grant>,
    queue: VecDeque<Waiter>,
}

impl Resource {
    /// Whose locks, and whose earlier requests, are in the way of this one. `ahead` is how much of the queue comes
    /// before it. The locks of one's own session never are.
    fn in_the_way(&self, owner: Owner, mode: Mode, ahead: usize) -> impl Iterator<Item = Spid> {
        let grants = self.grants.iter().map(|grant| (grant.owner.spid(), grant.mode));
        let earlier = self.queue.iter().take(ahead).map(|waiter| (waiter.owner.spid(), waiter.mode));
        grants
            .chain(earlier)
            .filter(move |(spid, other)| *spid != owner.spid() && !mode.goes_with(*other))
            .map(|(spid, _)| spid)
    }

    /// The mode in which `owner` would have it, and the part of the queue that it has to respect: one who has the
    /// lock in another mode goes before those who don't have it at all.
    fn wanted(&self, owner: Owner, mode: Mode, ahead: usize) -> (Mode, usize) {
        match self.grants.iter().find(|grant| grant.owner == owner) {
            Some(grant) => (grant.mode.and(mode), 0),
            None => (mode, ahead),
        }
    }

    fn is_free_for(&self, owner: Owner, mode: Mode, ahead: usize) -> bool {
        if self.grants.iter().any(|grant| grant.owner == owner && grant.mode.and(mode) == grant.mode) {
            return true;
        }
        let (mode, ahead) = self.wanted(owner, mode, ahead);
        self.in_the_way(owner, mode, ahead).next().is_none()
    }

    /// Returns whether it is new to its owner.
    fn grant(&mut self, owner: Owner, mode: Mode) -> bool {
        if let Some(grant) = self.grants.iter_mut().find(|grant| grant.owner == owner) {
            grant.mode = grant.mode.and(mode);
            grant.count += 1;
            return false;
        }
        self.grants.push(Grant { owner, mode, count: 1 });
        true
    }
}

/// All locks of the server.
#[derive(Debug, Default)]
pub(super) struct Locks {
    resources: HashMap<Key, Resource>,
    held: HashMap<Owner, HashSet<Key>>,
    waiting: HashMap<Spid, Key>,
    last_id: u64,
}

impl Locks {
    /// Takes a lock, or queues for it, unless that would be a deadlock.
    pub(super) fn request(&mut self, key: &Key, owner: Owner, mode: Mode) -> Answer {
        if self.take(key, owner, mode) {
            return Answer::Granted;
        }
        if self.would_deadlock(key, owner, mode) {
            return Answer::Deadlock;
        }
        self.last_id += 1;
        let (granted, receiver) = oneshot::channel();
        let resource = self.resources.entry(key.clone()).or_default();
        resource.queue.push_back(Waiter { id: self.last_id, owner, mode, granted });
        self.waiting.insert(owner.spid(), key.clone());
        Answer::Queued(self.last_id, receiver)
    }

    /// Takes a lock if nobody is in the way.
    pub(super) fn take(&mut self, key: &Key, owner: Owner, mode: Mode) -> bool {
        if !self.is_free_for(key, owner, mode) {
            return false;
        }
        if self.resources.entry(key.clone()).or_default().grant(owner, mode) {
            self.held.entry(owner).or_default().insert(key.clone());
        }
        true
    }

    /// Whether [`take`](Self::take) would.
    pub(super) fn is_free_for(&self, key: &Key, owner: Owner, mode: Mode) -> bool {
        self.resources.get(key).is_none_or(|resource| resource.is_free_for(owner, mode, resource.queue.len()))
    }

    /// Gives up waiting. False if the lock was granted in the meantime.
    pub(super) fn forget(&mut self, key: &Key, id: u64) -> bool {
        let Some(resource) = self.resources.get_mut(key) else { return false };
        let Some(place) = resource.queue.iter().position(|waiter| waiter.id == id) else { return false };
        let waiter = resource.queue.remove(place).expect("it is there");
        self.waiting.remove(&waiter.owner.spid());
        self.pass_on(key);
        true
    }

    /// Gives a lock back once. False if `owner` doesn't have it.
    pub(super) fn release(&mut self, key: &Key, owner: Owner) -> bool {
        let Some(resource) = self.resources.get_mut(key) else { return false };
        let Some(place) = resource.grants.iter().position(|grant| grant.owner == owner) else { return false };
        resource.grants[place].count -= 1;
        if resource.grants[place].count == 0 {
            resource.grants.remove(place);
            if let Some(held) = self.held.get_mut(&owner) {
                held.remove(key);
            }
            self.pass_on(key);
        }
        true
    }

    /// Gives back all that `owner` has, and returns whether that was anything.
    pub(super) fn release_all(&mut self, owner: Owner) -> bool {
        let Some(held) = self.held.remove(&owner) else { return false };
        for key in held {
            if let Some(resource) = self.resources.get_mut(&key) {
                resource.grants.retain(|grant| grant.owner != owner);
            }
            self.pass_on(&key);
        }
        true
    }

    /// Gives back all that a session has, and lets it no longer wait.
    pub(super) fn end(&mut self, spid: Spid) {
        if let Some(key) = self.waiting.remove(&spid) {
            if let Some(resource) = self.resources.get_mut(&key) {
                resource.queue.retain(|waiter| waiter.owner.spid() != spid);
            }
            self.pass_on(&key);
        }
        self.release_all(Owner::Transaction(spid));
        self.release_all(Owner::Session(spid));
    }

    /// In which mode `owner` has the lock.
    pub(super) fn mode(&self, key: &Key, owner: Owner) -> Option<Mode> {
        let resource = self.resources.get(key)?;
        resource.grants.iter().find(|grant| grant.owner == owner).map(|grant| grant.mode)
    }

    /// What a session has, and what it waits for.
    pub(super) fn of(&self, spid: Spid) -> (Vec<&Key>, Option<&Key>) {
        let owners = [Owner::Session(spid), Owner::Transaction(spid)];
        let held = owners.iter().filter_map(|owner| self.held.get(owner)).flatten().collect();
        (held, self.waiting.get(&spid))
    }

    /// Who has application locks on a resource, under any principal, and how many wait for them.
    pub(super) fn on(&self, database: &str, resource: &str) -> (Vec<Spid>, usize) {
        let mut found = (Vec::new(), 0);
        for (key, state) in &self.resources {
            if matches!(key, Key::Application(base, _, name) if &**base == database && &**name == resource) {
                found.0.extend(state.grants.iter().map(|grant| grant.owner.spid()));
                found.1 += state.queue.len();
            }
        }
        found
    }

    /// Grants what has become possible, in the order of the queue.
    fn pass_on(&mut self, key: &Key) {
        let Some(resource) = self.resources.get_mut(key) else { return };
        let mut place = 0;
        while place < resource.queue.len() {
            let (owner, mode) = (resource.queue[place].owner, resource.queue[place].mode);
            if !resource.is_free_for(owner, mode, place) {
                place += 1;
                continue;
            }
            let waiter = resource.queue.remove(place).expect("it is there");
            self.waiting.remove(&owner.spid());
            if resource.grant(owner, mode) {
                self.held.entry(owner).or_default().insert(key.clone());
            }
            // If nobody receives it, the request was cancelled at this very moment: the session has the lock.
            let _ = waiter.granted.send(());
        }
        if resource.grants.is_empty() && resource.queue.is_empty() {
            self.resources.remove(key);
        }
    }

    fn would_deadlock(&self, key: &Key, owner: Owner, mode: Mode) -> bool {
        let resource = &self.resources[key];
        let (wanted, ahead) = resource.wanted(owner, mode, resource.queue.len());
        let mut open: Vec<Spid> = resource.in_the_way(owner, wanted, ahead).collect();
        let mut seen = HashSet::new();
        while let Some(spid) = open.pop() {
            if spid == owner.spid() {
                return true;
            }
            if !seen.insert(spid) {
                continue;
            }
            let Some(resource) = self.waiting.get(&spid).and_then(|key| self.resources.get(key)) else {
                continue;
            };
            let place = resource.queue.iter().position(|waiter| waiter.owner.spid() == spid);
            let Some(place) = place else { continue };
            let waiter = &resource.queue[place];
            let (wanted, ahead) = resource.wanted(waiter.owner, waiter.mode, place);
            open.extend(resource.in_the_way(waiter.owner, wanted, ahead));
        }
        false
    }
}
