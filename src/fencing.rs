//! Fencing: the [`FencingToken`] of a grant, and the [`FencingGate`] with which a resource refuses a stale holder.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, ErrorKind, Result};

/// A number that is larger for every later grant of the same lock, on every backend.
///
/// Pass it to whatever the lock protects, and let that refuse a number below the largest it has seen: then a
/// holder that was frozen past its lease can do no harm when it wakes. See [`FencingGate`] and the README's recipes.
///
/// Tokens of all backends are of one domain, `max(last + 1, microseconds since 1970)`, so that a restart, a lost
/// counter or a move to another backend does not turn them back. They are between 1 and `i64::MAX`, in practice
/// below 2^53, so that they fit a `bigint` column and a JSON number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken(NonZeroU64);

impl FencingToken {
    /// The largest token that [`after`](Self::after) draws, 2^53 - 1: what a JSON number and Lua carry exactly.
    pub const MAX_DRAWN: u64 = (1 << 53) - 1;

    /// A token of this value, or `None` unless it is within `1..=i64::MAX`.
    #[must_use]
    pub const fn new(value: u64) -> Option<Self> {
        if value > i64::MAX as u64 {
            return None;
        }
        match NonZeroU64::new(value) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// The value.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The value for a signed column, such as SQL's `bigint`. Never negative.
    #[must_use]
    pub const fn to_i64(self) -> i64 {
        self.0.get().cast_signed() // at most i64::MAX, as `new` saw to
    }

    /// For backends that draw the token in this process: the token after `last` (0: there is none yet) at the time
    /// `now`, `max(last + 1, microseconds since 1970)`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exhausted`] past [`MAX_DRAWN`](Self::MAX_DRAWN).
    pub fn after(last: u64, now: SystemTime) -> Result<Self> {
        let micros = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
        let clock = u64::try_from(micros).unwrap_or(u64::MAX);
        let next = last.saturating_add(1).max(clock);
        if next > Self::MAX_DRAWN {
            return Err(Error::new(
                ErrorKind::Exhausted,
                "the next fencing token would be larger than 2^53 - 1: is the clock or the stored counter wrong?",
            ));
        }
        Self::new(next).ok_or_else(|| Error::new(ErrorKind::Exhausted, "no fencing token is left"))
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl From<FencingToken> for u64 {
    fn from(token: FencingToken) -> Self {
        token.get()
    }
}

impl From<FencingToken> for i64 {
    fn from(token: FencingToken) -> Self {
        token.to_i64()
    }
}

/// A write was refused: its holder's grant is older than one that was seen already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fencing token {offered} is stale: {highest} has been seen")]
#[non_exhaustive]
pub struct StaleToken {
    /// The token that the write came with.
    pub offered: FencingToken,
    /// The largest token that the gate has let through.
    pub highest: FencingToken,
}

/// Stands in front of a protected resource and refuses every holder whose token is below the largest seen.
///
/// This is the resource's side of fencing, for resources that live in a process: the check and the write must be
/// one step, or a holder could be frozen between the two. In a database the same is one statement:
/// `UPDATE … SET …, fence = $1 WHERE id = $2 AND fence <= $1`.
///
/// ```
/// use fencelock::{FencingGate, FencingToken};
///
/// let gate = FencingGate::new(Vec::new());
/// let (older, newer) = (FencingToken::new(33).unwrap(), FencingToken::new(34).unwrap());
/// gate.enter(newer, |lines| lines.push("from the holder of 34")).unwrap();
/// assert!(gate.enter(older, |lines| lines.push("too late")).is_err());
/// gate.enter(newer, |lines| lines.push("the same holder again")).unwrap();
/// assert_eq!(gate.into_inner().len(), 2);
/// ```
#[derive(Debug, Default)]
pub struct FencingGate<T = ()> {
    state: Mutex<GateState<T>>,
}

#[derive(Debug, Default)]
struct GateState<T> {
    highest: Option<FencingToken>,
    resource: T,
}

impl<T> FencingGate<T> {
    /// A gate in front of `resource` that has seen no token yet.
    pub const fn new(resource: T) -> Self {
        Self { state: Mutex::new(GateState { highest: None, resource }) }
    }

    /// A gate that goes on from a [`highest`](Self::highest) stored with the resource: without it a restart
    /// would forget whom to refuse.
    pub const fn resume(resource: T, highest: FencingToken) -> Self {
        Self { state: Mutex::new(GateState { highest: Some(highest), resource }) }
    }

    /// Runs `write` on the resource if `token` is at least the largest seen; check and write are one step.
    ///
    /// The token counts as seen even if `write` panics.
    ///
    /// # Errors
    ///
    /// [`StaleToken`], and `write` has not run.
    pub fn enter<R>(&self, token: FencingToken, write: impl FnOnce(&mut T) -> R) -> Result<R, StaleToken> {
        // A panic inside `write` is the writer's affair; what the gate itself keeps is whole at every point.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.highest {
            Some(highest) if token < highest => Err(StaleToken { offered: token, highest }),
            _ => {
                state.highest = Some(token);
                Ok(write(&mut state.resource))
            }
        }
    }

    /// The largest token seen, to be stored with the resource.
    pub fn highest(&self) -> Option<FencingToken> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).highest
    }

    /// The resource itself.
    pub fn into_inner(self) -> T {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).resource
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn tokens_are_within_bigint() {
        assert_eq!(FencingToken::new(0), None);
        assert_eq!(FencingToken::new(i64::MAX as u64 + 1), None);
        assert_eq!(FencingToken::new(i64::MAX as u64).map(FencingToken::to_i64), Some(i64::MAX));
    }

    #[test]
    fn the_next_token_rises_whatever_the_clock_says() {
        let at = |micros| UNIX_EPOCH + Duration::from_micros(micros);
        assert_eq!(FencingToken::after(0, at(500)).unwrap().get(), 500);
        assert_eq!(FencingToken::after(500, at(500)).unwrap().get(), 501);
        assert_eq!(FencingToken::after(500, at(3)).unwrap().get(), 501);
        assert_eq!(FencingToken::after(0, UNIX_EPOCH - Duration::from_secs(1)).unwrap().get(), 1);
    }

    #[test]
    fn the_end_of_the_numbers_is_an_error() {
        let exhausted =
            |last, now| FencingToken::after(last, now).unwrap_err().kind() == ErrorKind::Exhausted;
        assert!(exhausted(FencingToken::MAX_DRAWN, UNIX_EPOCH));
        assert!(exhausted(u64::MAX, UNIX_EPOCH));
        assert!(exhausted(0, UNIX_EPOCH + Duration::from_secs(300 * 365 * 86_400)));
        assert!(FencingToken::after(FencingToken::MAX_DRAWN - 1, UNIX_EPOCH).is_ok());
    }

    #[test]
    fn a_gate_goes_on_after_a_restart_and_a_panic() {
        let token = |value| FencingToken::new(value).unwrap();
        let gate = FencingGate::resume((), token(7));
        assert_eq!(gate.enter(token(6), |()| ()), Err(StaleToken { offered: token(6), highest: token(7) }));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = gate.enter(token(8), |()| panic!("the writer"));
        }));
        assert!(panicked.is_err());
        assert_eq!(gate.highest(), Some(token(8)));
        assert!(gate.enter(token(7), |()| ()).is_err());
    }
}
