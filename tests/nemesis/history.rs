//! [`Event`]: what happened when, of grants and of faults, as the workers and the coordinator note it.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::time::{ClockId, clock_gettime};

/// Microseconds by a clock that all processes of the machine share, and that nobody sets.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let micros = time.tv_sec * 1_000_000 + time.tv_nsec / 1000;
    u64::try_from(micros).expect("the machine runs")
}

/// One call for a lock, and the grant that it may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Id {
    /// The place of the worker, behind proxies of its own.
    pub(crate) slot: u32,
    /// The how manieth process in this place.
    pub(crate) life: u32,
    pub(crate) task: u32,
    pub(crate) number: u32,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}.{}", self.slot, self.life, self.task, self.number)
    }
}

impl FromStr for Id {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Vec<u32> = text.split('.').map_while(|number| number.parse().ok()).collect();
        match numbers[..] {
            [slot, life, task, number] => Ok(Self { slot, life, task, number }),
            _ => Err(format!("no id: {text}")),
        }
    }
}

/// What a worker does with a lock.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// About to ask for it.
    Asked { name: String, how: String },
    /// Has a guard.
    Got { token: u64 },
    /// At this time the lock was believed to be held: the time was noted, and after that it wasn't lost.
    Held,
    /// Saw that it was lost.
    Lost,
    /// `release` said yes.
    Released,
    /// The guard, or the release under way, was dropped.
    Dropped,
    /// Busy.
    None,
    /// Gave up waiting.
    Cancelled,
    /// A call was an error of this kind.
    Failed { call: String, kind: String, says: String },
    /// The resource was written, or refused it.
    Wrote { value: u64, current: u64, accepted: bool },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked { name, how } => write!(f, "asked {name} {how}"),
            Self::Got { token } => write!(f, "got {token}"),
            Self::Held => f.write_str("held"),
            Self::Lost => f.write_str("lost"),
            Self::Released => f.write_str("released"),
            Self::Dropped => f.write_str("dropped"),
            Self::None => f.write_str("none"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Failed { call, kind, says } => write!(f, "failed {call} {kind} {says}"),
            Self::Wrote { value, current, accepted } => {
                write!(f, "wrote {value} over {current}{}", if *accepted { "" } else { ", refused" })
            }
        }
    }
}

impl FromStr for Step {
    type Err = String;

    /// Of what workers print.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.splitn(4, ' ');
        let kind = words.next().unwrap_or_default();
        let mut word = || words.next().unwrap_or_default().to_owned();
        Ok(match kind {
            "asked" => Self::Asked { name: word(), how: word() },
            "got" => Self::Got { token: word().parse().map_err(|_| format!("no token: {text}"))? },
            "held" => Self::Held,
            "lost" => Self::Lost,
            "released" => Self::Released,
            "dropped" => Self::Dropped,
            "none" => Self::None,
            "cancelled" => Self::Cancelled,
            "failed" => Self::Failed { call: word(), kind: word(), says: word() },
            _ => return Err(format!("no step: {text}")),
        })
    }
}

/// What a fault may have done to locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing: those who hold them still do, or know that they don't.
    Nothing,
    /// It may have freed them before their holders can know.
    Frees,
    /// A process stood still.
    Freezes,
}

/// Something that was done to a process, a server, or a network.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) number: usize,
    pub(crate) kind: String,
    /// Whose locks are concerned: those of this place, or everybody's.
    pub(crate) slot: Option<u32>,
    /// Which locks are concerned: those of this name, or all.
    pub(crate) name: Option<String>,
    pub(crate) effect: Effect,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum What {
    Of(Id, Step),
    Began(Fault),
    Ended {
        number: usize,
        effect: Effect,
    },
    /// What never may be, such as a worker that ends by itself.
    Trouble(String),
    /// What the resource has in the end.
    Counter {
        name: String,
        value: u64,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) at: u64,
    pub(crate) what: What,
}

/// All events so far, in the order in which they were heard of.
#[derive(Debug, Default)]
pub(crate) struct Log {
    events: Mutex<Vec<Event>>,
    faults: Mutex<usize>,
}

impl Log {
    pub(crate) fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, at: u64, what: What) {
        self.events().push(Event { at, what });
    }

    pub(crate) fn trouble(&self, says: impl Into<String>) {
        self.note(now(), What::Trouble(says.into()));
    }

    /// A fault begins. Until it has ended it may have any effect that it began with.
    pub(crate) fn begin(&self, kind: &str, slot: Option<u32>, name: Option<&str>, effect: Effect) -> usize {
        let number = {
            let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
            *faults += 1;
            *faults
        };
        let (kind, name) = (kind.to_owned(), name.map(str::to_owned));
        self.note(now(), What::Began(Fault { number, kind, slot, name, effect }));
        number
    }

    pub(crate) fn end(&self, number: usize, effect: Effect) {
        self.note(now(), What::Ended { number, effect });
    }

    /// A fault that is over when `act` has returned.
    pub(crate) fn during<T>(
        &self,
        kind: &str,
        slot: Option<u32>,
        name: Option<&str>,
        effect: Effect,
        act: impl FnOnce() -> T,
    ) -> T {
        let number = self.begin(kind, slot, name, effect);
        let result = act();
        self.end(number, effect);
        result
    }
}
