//! [`SessionHold`]: a lock that is held on a session, and its one unlock.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::lease::Lease;
use super::occupied::Occupied;
use super::session::{LockSession, User};
use super::{Connection, ENDED, Ended, Server, Sessions};
use crate::backend::{Claim, Grant, Released, Session};
use crate::engine::carried::Carried;
use crate::engine::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// A lock that is held on a session.
pub(crate) struct SessionHold<S: Server>(Arc<Hold<S>>);

impl<S: Server> Clone for SessionHold<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Hold<S: Server> {
    session: Arc<LockSession<S::Connection>>,
    stands: Session,
    state: Mutex<State<S>>,
}

enum State<S: Server> {
    Held(Place<S>),
    /// The one unlock is under way, or over.
    Unlocking(watch::Receiver<Option<Unlocked>>),
    /// Another grant has it.
    Transferred,
}

/// What a lock occupies: dropped only when it is known to be free, or with its session.
pub(super) struct Place<S: Server> {
    pub(super) occupied: Occupied<S>,
    pub(super) on: On<S>,
}

/// The session of a lock, which many share or which is its own.
pub(super) enum On<S: Server> {
    Shared(User<S::Connection>),
    Own(Lease<S>),
}

impl<S: Server> On<S> {
    pub(super) fn user(&self) -> &User<S::Connection> {
        match self {
            Self::Shared(user) => user,
            Self::Own(lease) => lease.user(),
        }
    }

    /// Nothing is held on it for this claim any more.
    pub(super) fn give_back(self) {
        if let Self::Own(lease) = self {
            lease.give_back();
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Unlocked {
    Yes,
    NotHeld,
    /// With its session, before it could be unlocked, or perhaps after.
    Ended {
        unlocked_perhaps: bool,
    },
}

impl<S: Server> SessionHold<S> {
    pub(super) fn new(place: Place<S>) -> Self {
        let session = place.on.user().session().clone();
        let stands = session.stands();
        place.occupied.is_on(&session);
        Self(Arc::new(Hold { session, stands, state: Mutex::new(State::Held(place)) }))
    }

    pub(super) fn session(&self) -> &Arc<LockSession<S::Connection>> {
        &self.0.session
    }

    pub(super) fn grant(self, token: FencingToken) -> Grant<Self> {
        let stands = self.0.stands.clone();
        Grant::on_session(self, token, &stands)
    }

    /// Unlocks it, once, however often this is called.
    pub(super) async fn release(&self, pool: &Sessions<S>) -> Result<Released> {
        let session = self.session();
        let (mut unlocked, carried) = {
            let mut state = lock(&self.0.state);
            match &*state {
                State::Transferred => return Ok(Released::NotHeld),
                State::Unlocking(unlocked) => (unlocked.clone(), None),
                State::Held(_) => {
                    let (done, unlocked) = watch::channel(None);
                    let State::Held(place) =
                        std::mem::replace(&mut *state, State::Unlocking(unlocked.clone()))
                    else {
                        unreachable!("it was held")
                    };
                    let carried = Carried::new(&session.runtime, unlock(place, done));
                    (unlocked, Some(carried))
                }
            }
        };
        if let Some(carried) = carried {
            carried.await;
        }
        let outcome = match unlocked.wait_for(Option::is_some).await {
            Ok(outcome) => *outcome,
            Err(_) => None,
        };
        // Its runtime is gone, and the connection with it.
        match outcome.unwrap_or(Unlocked::Ended { unlocked_perhaps: true }) {
            Unlocked::Yes => Ok(Released::Yes),
            Unlocked::NotHeld => Ok(Released::NotHeld),
            Unlocked::Ended { unlocked_perhaps } => {
                // The server may not know that it has ended.
                pool.0.terminate(session).await?;
                if unlocked_perhaps { Ok(Released::Yes) } else { Err(Error::lost(ENDED)) }
            }
        }
    }

    /// Lets another claim have it, with a token of its own. `None`: it can't.
    pub(super) async fn transfer(&self, to: &Claim) -> Result<Option<Grant<Self>>> {
        let session = self.session().clone();
        if session.ttl() != to.ttl || session.ended().is_some() {
            return Ok(None);
        }
        let key = {
            let state = lock(&self.0.state);
            let State::Held(place) = &*state else { return Ok(None) };
            place.occupied.key().clone()
        };
        let draw = {
            let session = session.clone();
            async move { session.request(session.connection.token(&key)).await }
        };
        let token = match Carried::new(&session.runtime, draw).await {
            Ok(token) => token,
            // The lock is where it was, and can be released.
            Err(error) if error.kind() != ErrorKind::Unknown => {
                tracing::debug!(%error, "no fencing token for a transfer");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut state = lock(&self.0.state);
        if session.ended().is_some() || !matches!(&*state, State::Held(_)) {
            return Ok(None);
        }
        let State::Held(place) = std::mem::replace(&mut *state, State::Transferred) else {
            unreachable!("it was held")
        };
        drop(state);
        Ok(Some(Self::new(place).grant(token)))
    }
}

/// The unlock itself. What it comes to is noted before the place is free for others.
async fn unlock<S: Server>(place: Place<S>, done: watch::Sender<Option<Unlocked>>) {
    let user = place.on.user();
    let answer = user.request(user.connection.unlock(place.occupied.key())).await;
    let outcome = match answer {
        Ok(true) => Unlocked::Yes,
        Ok(false) => Unlocked::NotHeld,
        Err(error) => {
            let may_be_done = error.kind() == ErrorKind::Unknown || user.ended().is_none();
            // Whether it is still held there nobody can say: nobody shall get it as their own.
            if user.ended() != Some(Ended::ByServer) {
                tracing::debug!(%error, "an unlock failed: the session is thrown away");
                user.break_off();
            }
            Unlocked::Ended { unlocked_perhaps: may_be_done }
        }
    };
    let Place { occupied, on } = place;
    match outcome {
        Unlocked::Yes | Unlocked::NotHeld => on.give_back(),
        Unlocked::Ended { .. } => drop(on),
    }
    drop(occupied);
    done.send_replace(Some(outcome));
}

impl<S: Server> Drop for Hold<S> {
    /// A grant that nobody took, or whose release was given up: what nobody knows of mustn't be kept alive by others on the
    /// same session.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let State::Held(place) = std::mem::replace(state, State::Transferred) {
            let (done, _) = watch::channel(None);
            drop(Carried::new(&self.session.runtime, unlock(place, done))); // it is carried to its end
        }
    }
}

impl<S: Server> fmt::Debug for SessionHold<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionHold").field("session", &self.0.session).finish_non_exhaustive()
    }
}

impl<S: Server> Sessions<S> {
    /// [`Backend::release`](crate::backend::Backend::release).
    pub(crate) async fn release(&self, hold: &SessionHold<S>) -> Result<Released> {
        hold.release(self).await
    }

    /// [`Backend::transfer`](crate::backend::Backend::transfer).
    pub(crate) async fn transfer(
        &self,
        hold: &SessionHold<S>,
        to: &Claim,
    ) -> Result<Option<Grant<SessionHold<S>>>> {
        hold.transfer(to).await
    }
}
