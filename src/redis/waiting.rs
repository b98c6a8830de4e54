//! What a waiting claim knows of its place in the server's queue, and what follows from an answer: the half of the
//! protocol that doesn't run in the server. No clock, no I/O: `tests/redis_queue_model` drives this very code.

use std::ops::Add;
use std::time::Duration;

/// What the claim script answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Granted {
        token: u64,
    },
    /// It had been granted before; so much of its time is left.
    Mine {
        token: u64,
        left: Duration,
    },
    /// Somebody else has it, for so long unless they renew; `None`: for ever.
    Busy {
        left: Option<Duration>,
    },
    /// Neither held nor queued: handed over and run out, or dropped from the queue.
    Gone,
}

/// A grant, in the server's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted<T> {
    pub(crate) token: u64,
    pub(crate) until: T,
    /// It was given for a short time only, until the new holder shows that it is there.
    pub(crate) to_be_confirmed: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step<T> {
    Granted(Granted<T>),
    /// Wait for the message, and ask again after this time at the latest.
    Wait(Duration),
    /// Ask again, as somebody new.
    StartOver,
}

/// How long a waiter that was handed the lock has it before it must have confirmed, and how long it counts as alive
/// after it was last heard of: short, so that the dead are passed over quickly.
pub(crate) fn grace(ttl: Duration) -> Duration {
    whole_millis(ttl).min(Duration::from_secs(3))
}

/// The server counts in milliseconds: what it is promised here must not be longer.
pub(crate) fn whole_millis(duration: Duration) -> Duration {
    Duration::from_millis(millis(duration))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// One attempt's place in the queue. `T` is a moment.
#[derive(Clone, Debug)]
pub(crate) struct Waiting<T> {
    ttl: Duration,
    generation: u32,
    joined: bool,
    /// When the last question was sent that found the lock busy, or the first one. What is handed over was free at no
    /// time before, so its grace can't have begun earlier.
    counts_from: Option<T>,
}

impl<T: Copy + Add<Duration, Output = T>> Waiting<T> {
    pub(crate) fn new(ttl: Duration) -> Self {
        Self { ttl: whole_millis(ttl), generation: 0, joined: false, counts_from: None }
    }

    /// Part of the owner id: who was handed the lock once, or dropped from the queue, starts over as somebody new.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether the server is known to have put it into the queue. Until then a claim may still be on its way.
    pub(crate) fn has_joined(&self) -> bool {
        self.joined
    }

    /// Until when the server surely takes it for alive; `None` if it was never in the queue.
    pub(crate) fn alive_until(&self) -> Option<T> {
        self.counts_from.filter(|_| self.joined).map(|from| from + grace(self.ttl))
    }

    /// It is being asked for now.
    pub(crate) fn asks(&mut self, now: T) {
        self.counts_from.get_or_insert(now);
    }

    /// How often the server has to hear of it.
    pub(crate) fn interval(&self) -> Duration {
        grace(self.ttl) / 3
    }

    pub(crate) fn answered(&mut self, sent: T, reply: Reply) -> Step<T> {
        match reply {
            Reply::Granted { token } => {
                Step::Granted(Granted { token, until: sent + self.ttl, to_be_confirmed: false })
            }
            // Its time began before this question, and may be a grace only.
            Reply::Mine { token, left } => {
                Step::Granted(Granted { token, until: sent + left, to_be_confirmed: true })
            }
            Reply::Busy { left } => {
                self.joined = true;
                self.counts_from = Some(sent);
                // Nobody tells when it runs out: one millisecond later it is free.
                let look = left.unwrap_or(Duration::MAX).saturating_add(Duration::from_millis(1));
                Step::Wait(look.min(self.interval()))
            }
            Reply::Gone => {
                self.generation = self.generation.wrapping_add(1);
                self.joined = false;
                self.counts_from = None;
                Step::StartOver
            }
        }
    }

    /// A message says that this generation was handed the lock. `None`: it is about an earlier one.
    pub(crate) fn handed(&self, generation: u32, token: u64) -> Option<Granted<T>> {
        let from = self.counts_from.filter(|_| generation == self.generation)?;
        Some(Granted { token, until: from + grace(self.ttl), to_be_confirmed: true })
    }
}
