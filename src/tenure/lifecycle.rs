//! The life of one grant as a few atomics: held, then released or lost, and never back.
//!
//! Guard, keeper and releaser race on it from any thread. It knows nothing of tokio or of clocks, so that
//! `tests/lifecycle_loom.rs` can run this very file through every interleaving.

use super::sync::{AtomicBool, AtomicI64, AtomicU8, Ordering};
use crate::guard::Loss;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Held,
    Released,
    Lost(Loss),
}

#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: AtomicU8,
    /// In nanoseconds of [`Instant`](crate::clock::Instant); passed when the clock has reached it.
    deadline: AtomicI64,
    cleaned_up: AtomicBool,
}

const HELD: u8 = 0;
const RELEASED: u8 = 1;
const LOSSES: [Loss; 5] = [Loss::Expired, Loss::Taken, Loss::SessionEnded, Loss::MaxHold, Loss::Closed];
const FIRST_LOSS: u8 = 2;

fn code(loss: Loss) -> u8 {
    match loss {
        Loss::Expired => FIRST_LOSS,
        Loss::Taken => FIRST_LOSS + 1,
        Loss::SessionEnded => FIRST_LOSS + 2,
        Loss::MaxHold => FIRST_LOSS + 3,
        Loss::Closed => FIRST_LOSS + 4,
    }
}

fn decode(code: u8) -> State {
    match code {
        HELD => State::Held,
        RELEASED => State::Released,
        loss => State::Lost(LOSSES[usize::from(loss - FIRST_LOSS)]),
    }
}

impl Lifecycle {
    pub(crate) fn new(deadline: i64) -> Self {
        Self {
            state: AtomicU8::new(HELD),
            deadline: AtomicI64::new(deadline),
            cleaned_up: AtomicBool::new(false),
        }
    }

    pub(crate) fn deadline(&self) -> i64 {
        self.deadline.load(Ordering::Acquire)
    }

    /// The state as of `now`: a passed deadline makes it lost for good. The flag says whether this call did.
    pub(crate) fn state(&self, now: i64) -> (State, bool) {
        match decode(self.state.load(Ordering::Acquire)) {
            State::Held if self.deadline() <= now => self.end(code(Loss::Expired)),
            state => (state, false),
        }
    }

    /// Moves the deadline ahead, never back, and only while the grant is held and the old deadline stands: a grant
    /// that has expired doesn't come back to life, whatever the server says later. The flag is `state`'s.
    pub(crate) fn extend(&self, until: i64, now: i64) -> (State, bool) {
        let (state, ended) = self.state(now);
        if state == State::Held {
            self.deadline.fetch_max(until, Ordering::AcqRel);
        }
        (state, ended)
    }

    /// Ends it by a loss, unless it has ended. The flag says whether this call did.
    pub(crate) fn lose(&self, loss: Loss) -> (State, bool) {
        self.end(code(loss))
    }

    /// Ends it by a release, unless it has ended, by the passing of its deadline too. The flag says whether this call
    /// ended it in whatever way.
    pub(crate) fn release(&self, now: i64) -> (State, bool) {
        match self.state(now) {
            (State::Held, _) => self.end(RELEASED),
            ended => ended,
        }
    }

    /// True for exactly one caller: who frees the grant on the server.
    pub(crate) fn claim_cleanup(&self) -> bool {
        !self.cleaned_up.swap(true, Ordering::AcqRel)
    }

    fn end(&self, how: u8) -> (State, bool) {
        match self.state.compare_exchange(HELD, how, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => (decode(how), true),
            Err(earlier) => (decode(earlier), false),
        }
    }
}
