//! [`Capabilities`]: what a backend really provides, so that nobody has to guess.

use std::time::Duration;

/// What ends a grant whose holder is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Expiry {
    /// The server ends it when its TTL runs out, whatever happened to the holder: also one that is frozen.
    Ttl,
    /// It ends with the holder's connection, file handle or process. One that is frozen keeps it.
    Session,
    /// It ends with the holder's connection, and the server ends that when the TTL runs out: also of one that is frozen.
    SessionOrTtl,
}

/// In which order waiters get a lock. Inside one process it is always first come, first served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fairness {
    /// Processes race for it.
    None,
    /// Processes, too, get it in the order in which they came.
    Fifo,
}

/// What a backend really provides: [`LockProvider::capabilities`](crate::LockProvider::capabilities).
///
/// ```
/// # use fencelock::LockProvider;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> fencelock::Result<()> {
/// let provider = fencelock::connect("memory:").await?;
/// assert!(provider.capabilities().wakes_waiters);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent yes or no, not a state")]
pub struct Capabilities {
    /// The shortest TTL that it takes.
    pub min_ttl: Duration,
    /// The longest TTL that it takes.
    pub max_ttl: Duration,
    /// What ends a grant whose holder is gone.
    pub expiry: Expiry,
    /// Whether it has shared locks (many readers, one writer).
    pub shared: bool,
    /// Whether it has permits (a semaphore).
    pub permits: bool,
    /// Whether the backend itself sees to [`hold_at_least`](crate::LockOptions::hold_at_least), so that it outlives the
    /// provider and the process that asked for it (of `memory` nothing outlives the process). If not, the process does.
    pub keeps_after_exit: bool,
    /// The longest [`hold_at_least`](crate::LockOptions::hold_at_least) that it takes.
    pub max_hold_at_least: Duration,
    /// Whether a release wakes the next waiter, in whatever process. If not, waiters poll.
    pub wakes_waiters: bool,
    /// In which order processes get a lock.
    pub fairness: Fairness,
}

impl Capabilities {
    /// A backend that takes TTLs from `min_ttl` to `max_ttl`, and has none of the rest.
    #[must_use]
    pub const fn new(min_ttl: Duration, max_ttl: Duration, expiry: Expiry) -> Self {
        Self {
            min_ttl,
            max_ttl,
            expiry,
            shared: false,
            permits: false,
            keeps_after_exit: false,
            max_hold_at_least: Duration::MAX,
            wakes_waiters: false,
            fairness: Fairness::None,
        }
    }

    /// Sets [`shared`](Self::shared).
    #[must_use]
    pub const fn shared(mut self, shared: bool) -> Self {
        self.shared = shared;
        self
    }

    /// Sets [`permits`](Self::permits).
    #[must_use]
    pub const fn permits(mut self, permits: bool) -> Self {
        self.permits = permits;
        self
    }

    /// Sets [`keeps_after_exit`](Self::keeps_after_exit).
    #[must_use]
    pub const fn keeps_after_exit(mut self, keeps: bool) -> Self {
        self.keeps_after_exit = keeps;
        self
    }

    /// Sets [`max_hold_at_least`](Self::max_hold_at_least).
    #[must_use]
    pub const fn max_hold_at_least(mut self, limit: Duration) -> Self {
        self.max_hold_at_least = limit;
        self
    }

    /// Sets [`wakes_waiters`](Self::wakes_waiters).
    #[must_use]
    pub const fn wakes_waiters(mut self, wakes: bool) -> Self {
        self.wakes_waiters = wakes;
        self
    }

    /// Sets [`fairness`](Self::fairness).
    #[must_use]
    pub const fn fairness(mut self, fairness: Fairness) -> Self {
        self.fairness = fairness;
        self
    }
}
