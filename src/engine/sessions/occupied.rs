//! [`Occupied`]: the keys that a provider's claims and holds have, since a session would be given again what it holds.

use std::sync::{Arc, Weak};

use super::Server;
use super::pool::Pool;
use super::session::LockSession;
use crate::backend::OwnerId;
use crate::engine::lock;

/// Who has a key, and on which session once that is known.
pub(super) struct Occupant<S: Server> {
    owner: OwnerId,
    session: Option<Weak<LockSession<S::Connection>>>,
}

impl<S: Server> Occupant<S> {
    fn is_gone(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.upgrade().is_none_or(|session| session.ended().is_some()))
    }
}

/// A key that a claim or a hold of this provider has.
pub(super) struct Occupied<S: Server> {
    pool: Arc<Pool<S>>,
    key: S::Key,
    owner: OwnerId,
}

impl<S: Server> Occupied<S> {
    pub(super) fn key(&self) -> &S::Key {
        &self.key
    }

    /// It is occupied on this session, and only as long as that lives.
    pub(super) fn is_on(&self, session: &Arc<LockSession<S::Connection>>) {
        if let Some(occupant) =
            lock(&self.pool.occupied).get_mut(&self.key).filter(|it| it.owner == self.owner)
        {
            occupant.session = Some(Arc::downgrade(session));
        }
    }
}

impl<S: Server> Pool<S> {
    /// Takes a key for a claim, unless another name or claim of this provider has it.
    pub(super) fn occupy(self: &Arc<Self>, key: &S::Key, owner: OwnerId) -> Option<Occupied<S>> {
        let mut occupied = lock(&self.occupied);
        // On a session that has ended it isn't in anybody's way, although its guard may still be there.
        if occupied.get(key).is_some_and(|occupant| !occupant.is_gone()) {
            return None;
        }
        occupied.insert(key.clone(), Occupant { owner, session: None });
        Some(Occupied { pool: self.clone(), key: key.clone(), owner })
    }
}

impl<S: Server> Drop for Occupied<S> {
    fn drop(&mut self) {
        let mut occupied = lock(&self.pool.occupied);
        if occupied.get(&self.key).is_some_and(|occupant| occupant.owner == self.owner) {
            occupied.remove(&self.key);
        }
    }
}
