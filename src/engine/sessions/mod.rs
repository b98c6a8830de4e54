//! What backends share whose locks live on connections: many locks on few sessions, and waiters that block on the server.
//!
//! A backend says how to open a [`Connection`] and what it can do ([`Server`]); everything else is here. A session runs one
//! statement at a time, and a lock can't move to another one, so:
//!
//! - **Shared** sessions, one for each TTL in use, do all tries and hold what they get. They never block: a release would
//!   stand in line behind the wait.
//! - **Own** sessions block on the server for a single claim, which holds the session from then on. Their number is limited.
//!   Whoever finds none announces itself, tries on the shared session whenever it hears of a release or some time has
//!   passed, and takes the next own session that is free, first come, first served.
//! - A server whose locks can't share a connection has own sessions only.
//!
//! No request that changes who holds what can be broken off: it is [`Carried`](super::carried::Carried) to its end, and what
//! it came to is noted down. A lock is unlocked exactly once, since an unlock has no owner check: a second one would free
//! the next holder on the same session. A session of which anything is unknown is thrown away, with all that is on it, and
//! [terminated](Connection::terminate) on the server.
//!
//! [`claim`] brings locks in, [`mod@line`] those without a session of their own, and [`abandon`] gives claims up; [`hold`] is a
//! lock that is held. [`pool`] has the sessions, [`session`] is one of those, and the [`warden`] watches over it.

mod abandon;
mod claim;
mod hold;
mod lease;
mod line;
mod listeners;
mod occupied;
mod pool;
mod session;
#[cfg(test)]
mod tests;
mod warden;

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use self::hold::SessionHold;
pub(crate) use self::listeners::Listeners;
pub(crate) use self::pool::Sessions;

use crate::error::Result;
use crate::fencing::FencingToken;
use crate::guard::Loss;

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Many locks; never blocks.
    Shared,
    /// One lock, for which it may have blocked.
    Own,
}

/// Where sessions come from.
pub(crate) trait Server: Debug + Send + Sync + 'static {
    /// What a lock is called there. Two names with the same key are one lock.
    type Key: Clone + Eq + Hash + Debug + Send + Sync + 'static;
    type Connection: Connection<Key = Self::Key>;

    /// Whether a connection can hold several locks.
    fn shares(&self) -> bool {
        true
    }

    /// Opens a connection on the current runtime, for locks of this TTL. What it hears of releases goes to `listeners`.
    fn open(
        &self,
        role: Role,
        ttl: Duration,
        listeners: &Arc<Listeners<Self::Key>>,
    ) -> impl Future<Output = Result<Self::Connection>> + Send;
}

/// One connection. Requests may be sent before others are answered; the driver or the implementation puts them in order.
///
/// An error of kind [`Unknown`](crate::ErrorKind::Unknown) means that nobody can tell what the connection holds: it is
/// not used any more. Any other error means that the request has left nothing behind, unless it says otherwise here.
///
/// The futures may move from one runtime to another, so they can't use timers. Those that change what is held are never
/// dropped before their end.
pub(crate) trait Connection: Debug + Send + Sync + 'static {
    type Key;

    /// One attempt, and the fencing token in the same round trip. `None`: busy.
    fn try_lock(&self, key: &Self::Key) -> impl Future<Output = Result<Option<FencingToken>>> + Send;

    /// Waits on the server until it is granted, or [`cancel`](Self::cancel)led over another connection. After an
    /// error the connection may hold the lock all the same: [`clear`](Self::clear) follows.
    fn lock(&self, key: &Self::Key) -> impl Future<Output = Result<FencingToken>> + Send;

    /// `false`: it wasn't held.
    fn unlock(&self, key: &Self::Key) -> impl Future<Output = Result<bool>> + Send;

    /// Another fencing token for a lock that is held.
    fn token(&self, key: &Self::Key) -> impl Future<Output = Result<FencingToken>> + Send;

    /// Shows the server that this end lives, and this end that the session is the same.
    fn beat(&self) -> impl Future<Output = Result<()>> + Send;

    /// From now on the server ends the session when it hasn't heard from it for so long. Nothing is held.
    fn set_ttl(&self, ttl: Duration) -> impl Future<Output = Result<()>> + Send;

    /// Frees all that it may hold after a [`lock`](Self::lock) that failed or was cancelled.
    fn clear(&self) -> impl Future<Output = Result<()>> + Send;

    /// Breaks off the wait on another connection to the same server, if it is waiting just then.
    fn cancel(&self, waiting: &Self) -> impl Future<Output = Result<()>> + Send;

    /// Whether the server has nothing to do for another connection: what that waits for is lost, if it doesn't come soon.
    fn has_answered(&self, other: &Self) -> impl Future<Output = Result<bool>> + Send;

    /// Ends on the server the session of another connection, which doesn't work any more. Once this returns, nothing is
    /// held there.
    fn terminate(&self, other: &Self) -> impl Future<Output = Result<()>> + Send;

    /// Lets releases of this lock be heard here, until [`withdraw`](Self::withdraw). By default nobody tells of any: who waits
    /// without a session looks.
    fn announce(&self, key: &Self::Key) -> impl Future<Output = Result<()>> + Send {
        let _ = key;
        async { Ok(()) }
    }

    fn withdraw(&self, key: &Self::Key) -> impl Future<Output = Result<()>> + Send {
        let _ = key;
        async { Ok(()) }
    }

    /// Whether it has ended as far as this end knows, without waiting for it.
    fn is_over(&self) -> Option<Ended>;

    /// Resolves once the connection has ended.
    fn closed(&self) -> impl Future<Output = Ended> + Send + 'static;

    /// Closes it at once, whatever is under way.
    fn break_off(&self);

    /// Closes it in an orderly way. Nothing is held or under way.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The server has said that it ends the session: nothing is held there any more.
    ByServer,
    /// Only the connection is known to have ended.
    Somehow,
}

/// Why the guards on a session that has ended are lost.
const ENDED: Loss = Loss::SessionEnded;
