//! The service provider interface: what a backend says about its server, and nothing else.
//!
//! A backend claims, renews and releases. Queueing, renewal in time, loss, cancellation, release on drop, back-off and
//! tracing are the engine's: [`Provider`](crate::Provider) makes a [`LockProvider`](crate::LockProvider) of any
//! [`Backend`]. `examples/custom_backend.rs` is a whole one; `fencelock::testing` (feature `testing`) is the suite that it must pass.

use std::fmt;
use std::fmt::{Debug, Write as _};
use std::future::Future;
use std::num::NonZeroU32;
use std::time::Duration;

use crate::capabilities::Capabilities;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;
use crate::guard::Loss;
use crate::name::LockName;

pub use crate::clock::Instant;
pub use crate::tenure::session::Session;

/// A request for a lock, owned, so that it can be queued.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Claim {
    /// Which lock, the provider's prefix included.
    pub name: LockName,
    /// How it is to be held.
    pub mode: Mode,
    /// How long a grant stands without renewal.
    pub ttl: Duration,
    /// Who asks. New for each attempt: it proves whose grant it is when an answer was lost.
    pub owner: OwnerId,
}

impl Claim {
    /// A claim by a new owner.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] if the system has no random numbers to give.
    pub fn new(name: LockName, mode: Mode, ttl: Duration) -> Result<Self> {
        Ok(Self { name, mode, ttl, owner: OwnerId::random()? })
    }
}

/// How a lock is held. Today the engine asks for [`Mode::Exclusive`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// By nobody else.
    Exclusive,
    /// By any number of others that share it.
    Shared,
    /// By at most so many at a time.
    Permit {
        /// How many.
        of: NonZeroU32,
    },
}

/// 128 random bits that stand for one attempt. Whoever knows them can release its grant: they are kept out of `Debug`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerId(u128);

impl OwnerId {
    pub(crate) fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| {
            Error::new(ErrorKind::Unavailable, "the system gives no random numbers").with_source(error)
        })?;
        Ok(Self(u128::from_ne_bytes(bytes)))
    }

    /// The bits.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The bits as 32 hexadecimal digits.
    #[must_use]
    pub fn to_hex(self) -> String {
        let mut hex = String::with_capacity(32);
        write!(hex, "{:032x}", self.0).expect("a String takes whatever is written");
        hex
    }
}

impl Debug for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnerId(..)")
    }
}

/// A claim that was granted.
#[derive(Debug)]
pub struct Grant<H> {
    pub(crate) hold: H,
    pub(crate) token: FencingToken,
    pub(crate) validity: Validity,
    pub(crate) to_be_confirmed: bool,
}

#[derive(Debug)]
pub(crate) enum Validity {
    Until(Instant),
    Session(Session),
}

impl<H> Grant<H> {
    /// A grant that stands until `valid_until` unless it is renewed. Count it from [`Instant::now`] **before** the
    /// request was sent, and never promise more than the server does.
    pub fn lease(hold: H, token: FencingToken, valid_until: Instant) -> Self {
        Self { hold, token, validity: Validity::Until(valid_until), to_be_confirmed: false }
    }

    /// The server gave it for a short time only, so as not to wait long for a holder who may be dead: the first renewal
    /// confirms that it has arrived, and is sent even if the lock is not to be renewed.
    #[must_use]
    pub fn to_be_confirmed(mut self) -> Self {
        self.to_be_confirmed = true;
        self
    }

    /// A grant that stands as long as the session does: a connection, a file handle. Many may be on one;
    /// [`Session::end`] tells all of them at once.
    pub fn on_session(hold: H, token: FencingToken, session: &Session) -> Self {
        Self { hold, token, validity: Validity::Session(session.clone()), to_be_confirmed: false }
    }

    /// The same grant, with what a backend above another makes of its hold.
    #[cfg(any(feature = "postgres", feature = "sqlserver"))]
    pub(crate) fn map<T>(self, change: impl FnOnce(H) -> T) -> Grant<T> {
        let Self { hold, token, validity, to_be_confirmed } = self;
        Grant { hold: change(hold), token, validity, to_be_confirmed }
    }

    /// Whether it has run out before it could be used.
    pub(crate) fn has_expired(&self) -> bool {
        match &self.validity {
            Validity::Until(until) => until.has_passed(),
            Validity::Session(session) => session.ended().is_some() || session.deadline().has_passed(),
        }
    }
}

/// What a claim came to.
#[derive(Debug)]
pub enum Outcome<H> {
    /// The lock is ours.
    Granted(Grant<H>),
    /// It is somebody else's.
    Busy {
        /// When to look again at the latest: after the holder's remaining TTL, if the server tells it. Zero: now, since
        /// something has changed. `None`: no idea, the engine backs off.
        retry_after: Option<Duration>,
    },
}

impl<H> Outcome<H> {
    /// The same outcome, with what a backend above another makes of the hold.
    #[cfg(any(feature = "postgres", feature = "sqlserver"))]
    pub(crate) fn map<T>(self, change: impl FnOnce(H) -> T) -> Outcome<T> {
        match self {
            Self::Granted(grant) => Outcome::Granted(grant.map(change)),
            Self::Busy { retry_after } => Outcome::Busy { retry_after },
        }
    }
}

/// A grant whose renewal is due.
#[derive(Debug)]
pub struct Due<'a, H> {
    /// The grant; of those on one session, one stands for all.
    pub hold: &'a H,
    /// How long it shall stand from now on.
    pub ttl: Duration,
}

/// What a renewal came to.
#[derive(Debug)]
pub enum Renewal {
    /// It stands until then, counted from before the request was sent. On a session without a deadline the instant is
    /// not looked at.
    Until(Instant),
    /// It doesn't stand any more.
    Lost(Loss),
    /// Nobody knows; the old deadline stands, and the engine tries again. A short answer counts as this.
    Failed(Error),
}

/// What a release came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// It was ours, and it is free now (or will be after `keep_for`).
    Yes,
    /// It wasn't ours any more. After an ambiguous first try and before the deadline the engine takes this as success.
    NotHeld,
}

/// A kind of server that locks can be had from.
///
/// Every future may be dropped at any await point; each method says what the engine does then. Errors of kind
/// [`Unavailable`](ErrorKind::Unavailable) mean that nothing was done, [`Unknown`](ErrorKind::Unknown) that nobody can
/// tell; both are retried by the engine with back-off, and a driver below must not retry claims by itself. The engine
/// adds the lock's name, the backend and the operation to every error.
pub trait Backend: Debug + Send + Sync + 'static {
    /// What identifies a grant to the server. Dropping it must not block.
    type Hold: Debug + Send + Sync + 'static;

    /// What the backend is called in errors and traces: its URL scheme, if it has one. Default: `custom`.
    fn name(&self) -> &'static str {
        "custom"
    }

    /// What the server provides.
    fn capabilities(&self) -> Capabilities;

    /// Tries to get the lock.
    ///
    /// With `wait` zero: one attempt. Otherwise it first registers for the release, where the server has such a thing,
    /// then tries, and may wait up to `wait` for a grant or a hint (then `Busy { retry_after: Some(ZERO) }`). It may
    /// also ignore `wait` and answer `Busy` at once: then the engine polls.
    ///
    /// A dropped future and an [`Unknown`](ErrorKind::Unknown) error are always followed by
    /// [`abandon`](Self::abandon), and so is the last `Busy` of a claim that had a `wait`.
    fn try_claim(
        &self,
        claim: &Claim,
        wait: Duration,
    ) -> impl Future<Output = Result<Outcome<Self::Hold>>> + Send;

    /// Leaves any queue, and frees the lock if this owner got it. When it returns `Ok`, the claim can't hold anything
    /// any more. Idempotent, and retried until it succeeds or the TTL has passed. There is no default, because forgetting
    /// it leaks a grant.
    fn abandon(&self, claim: &Claim) -> impl Future<Output = Result<()>> + Send;

    /// Renews many grants in as few requests as the server allows, each only if it is still the owner's; answers in the
    /// same order. May run while the same grant is being released: that must win.
    fn renew(&self, due: &[Due<'_, Self::Hold>]) -> impl Future<Output = Vec<Renewal>> + Send;

    /// Frees the lock if this grant still holds it, or makes it free itself after `keep_for`
    /// ([`hold_at_least`](crate::LockOptions::hold_at_least)). `keep_for` is zero unless the capabilities say
    /// [`keeps_after_exit`](Capabilities::keeps_after_exit). A dropped or failed release is called again, unless it failed because
    /// the lock had been lost: [`Error::lost`] says why, where `NotHeld` would say that somebody has taken it.
    fn release(&self, hold: &Self::Hold, keep_for: Duration)
    -> impl Future<Output = Result<Released>> + Send;

    /// Hands the lock over to a waiter in the same process in one step, with a new token. `None`: not transferred, and
    /// `hold` still stands. After an error or a dropped future the engine releases `hold` and abandons `to`.
    fn transfer(
        &self,
        hold: &Self::Hold,
        to: &Claim,
    ) -> impl Future<Output = Result<Option<Grant<Self::Hold>>>> + Send {
        let _ = (hold, to);
        async { Ok(None) }
    }

    /// Ends what the backend keeps open. Called once nothing is left to release, but grants that the caller still
    /// has may be released or renewed afterwards where the server allows it; sessions that end here end with
    /// [`Loss::Closed`].
    fn close(&self) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }
}
