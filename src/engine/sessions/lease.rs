//! [`Lease`]: a session that one claim has for itself.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::Server;
use super::pool::Pool;
use super::session::User;
use crate::engine::lock;

/// A session that one claim has for itself. Once it is in use, it is thrown away unless it is given back.
pub(super) struct Lease<S: Server> {
    user: User<S::Connection>,
    pool: Arc<Pool<S>>,
    slot: Option<OwnedSemaphorePermit>,
    /// Nothing is held on it.
    is_free: bool,
}

impl<S: Server> Lease<S> {
    pub(super) fn new(
        user: User<S::Connection>,
        pool: Arc<Pool<S>>,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self { user, pool, slot, is_free: true }
    }

    pub(super) fn user(&self) -> &User<S::Connection> {
        &self.user
    }

    /// From now on something may be held on it.
    pub(super) fn in_use(mut self) -> Self {
        self.is_free = false;
        self
    }

    /// Nothing is held on it any more.
    pub(super) fn give_back(mut self) {
        self.is_free = true;
    }
}

impl<S: Server> Drop for Lease<S> {
    fn drop(&mut self) {
        if self.is_free && self.user.ended().is_none() {
            lock(&self.pool.idle).push(self.user.session().clone());
        } else {
            self.user.break_off();
        }
        drop(self.slot.take()); // last: the next one finds the session idle
    }
}
