//! Claims in line: they have no session of their own yet, and hear of releases over a shared one.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{AcquireError, OwnedSemaphorePermit};

use super::claim::Entry;
use super::hold::SessionHold;
use super::listeners::Listening;
use super::occupied::Occupied;
use super::pool::Pool;
use super::session::User;
use super::{Connection, Server};
use crate::backend::{Claim, Instant};
use crate::engine::backoff::jitter;
use crate::engine::carried::Carried;
use crate::engine::lock;
use crate::error::Result;
use crate::fencing::FencingToken;

/// How often who waits without a session of its own looks although it has heard nothing: holders that die say nothing.
const LOOK_EVERY: Duration = Duration::from_millis(500);

type Slot = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// The place of a claim that has no session of its own yet.
pub(super) struct Waiting<S: Server> {
    /// Its place in the line for one.
    slot: Option<Slot>,
    listening: Listening<S::Key>,
    /// Where releases are heard for it.
    announced: Option<User<S::Connection>>,
}

/// How long to sleep until the next look, at most until then.
pub(super) fn nap(until: Instant) -> Duration {
    until.remaining().min(LOOK_EVERY / 2 + jitter(LOOK_EVERY / 2))
}

impl<S: Server> Pool<S> {
    /// Waits without a session: for one, or for a release that gives a try a chance.
    pub(super) async fn wait_in_line(
        self: &Arc<Self>,
        claim: &Claim,
        occupied: Occupied<S>,
        entry: &Arc<Entry<S>>,
        until: Instant,
    ) -> Result<Lined<S>> {
        let key = occupied.key().clone();
        if let Err(error) = self.announce(claim, &key, entry).await {
            return Err(self.fails(claim, entry, error).await);
        }
        match self.try_once(claim, occupied, entry, false).await {
            Ok(Some((hold, token))) => return Ok(Lined::Granted(hold, token)),
            Ok(None) => {}
            Err(error) => return Err(self.fails(claim, entry, error).await),
        }
        // If this is dropped while it waits, its place in line is lost, and nothing else.
        let Some((mut slot, heard)) = lock(&entry.waiting).as_mut().map(|waiting| {
            let slot = waiting.slot.take();
            let slot = slot.unwrap_or_else(|| Box::pin(self.slots.clone().acquire_owned()));
            (slot, waiting.listening.heard())
        }) else {
            return Ok(Lined::Again);
        };
        let granted = tokio::select! {
            biased;
            slot = &mut slot => slot.ok(),
            () = heard.notified() => None,
            () = tokio::time::sleep(nap(until)) => None,
        };
        if let Some(granted) = granted {
            // Its own session blocks, which a try of the same claim must not disturb.
            return Ok(match self.occupy(&key, claim.owner) {
                Some(occupied) => Lined::Slot(occupied, granted),
                None => Lined::Again,
            });
        }
        if let Some(waiting) = lock(&entry.waiting).as_mut() {
            waiting.slot = Some(slot);
        }
        Ok(if until.has_passed() { Lined::TimeIsUp } else { Lined::Again })
    }

    /// Sees to it that releases of the lock are heard for this claim.
    async fn announce(self: &Arc<Self>, claim: &Claim, key: &S::Key, entry: &Arc<Entry<S>>) -> Result<()> {
        let is_heard =
            |waiting: &Waiting<S>| waiting.announced.as_ref().is_some_and(|user| user.ended().is_none());
        if !self.server.shares() || lock(&entry.waiting).as_ref().is_some_and(is_heard) {
            lock(&entry.waiting).get_or_insert_with(|| Waiting {
                slot: None,
                listening: self.listeners.listen(key),
                announced: None,
            });
            return Ok(());
        }
        let user = self.shared(claim.ttl).await?;
        let runtime = user.runtime.clone();
        // Noted before it is sent, so that an announcement of which nobody has heard is withdrawn, too.
        let slot = lock(&entry.waiting).take().and_then(|waiting| waiting.slot);
        *lock(&entry.waiting) =
            Some(Waiting { slot, listening: self.listeners.listen(key), announced: Some(user.clone()) });
        let key = key.clone();
        let announce = async move { user.errand(user.connection.announce(&key)).await };
        if let Err(error) = Carried::new(&runtime, announce).await {
            tracing::debug!(%error, "a release may not be heard: the lock is looked at instead"); // twice a second
        }
        Ok(())
    }
}

/// What waiting in line came to.
pub(super) enum Lined<S: Server> {
    Granted(SessionHold<S>, FencingToken),
    Slot(Occupied<S>, OwnedSemaphorePermit),
    Again,
    TimeIsUp,
}

/// Lets the server tell nobody of releases that nobody waits for any more.
pub(super) async fn withdraw<S: Server>(waiting: Option<Waiting<S>>) {
    if let Some(withdraw) = withdrawal(waiting) {
        withdraw.await;
    }
}

pub(super) fn withdraw_in_background<S: Server>(waiting: Option<Waiting<S>>) {
    drop(withdrawal(waiting)); // it is carried to its end
}

fn withdrawal<S: Server>(waiting: Option<Waiting<S>>) -> Option<Carried<()>> {
    let Waiting { announced, listening, .. } = waiting?;
    let (user, key) = (announced?, listening.key().clone());
    let runtime = user.runtime.clone();
    Some(Carried::new(&runtime, async move {
        if let Err(error) = user.errand(user.connection.withdraw(&key)).await {
            tracing::debug!(%error, "a waiter's announcement stays until its session ends");
        }
    }))
}
