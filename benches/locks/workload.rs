//! The workloads, and what is to be reached in them.

/// What everybody wants in W3 and W4.
pub(crate) const CONTENDED: &str = "job";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Acquire and release, one task, a new name each time.
    W1,
    /// So many tasks of one process, each with names of its own.
    W2(usize),
    /// Release in one process to acquired in another.
    W3,
    /// 32 tasks of one process on one name, held for no time.
    W4a,
    /// 4 processes with 8 tasks each.
    W4b,
    /// The same, held for 2 ms, with 20 ms of other work.
    W4c,
    /// 10,000 locks held for 12 s with a TTL of 3 s.
    W5,
    /// 1,000 locks held by one process.
    W6(Taken),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    OneByOne,
    AtOnce,
}

impl Workload {
    pub(crate) const ALL: [Self; 10] = [
        Self::W1,
        Self::W2(64),
        Self::W2(256),
        Self::W3,
        Self::W4a,
        Self::W4b,
        Self::W4c,
        Self::W5,
        Self::W6(Taken::OneByOne),
        Self::W6(Taken::AtOnce),
    ];

    /// What a filter calls it.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::W1 => "w1",
            Self::W2(_) => "w2",
            Self::W3 => "w3",
            Self::W4a => "w4a",
            Self::W4b => "w4b",
            Self::W4c => "w4c",
            Self::W5 => "w5",
            Self::W6(_) => "w6",
        }
    }

    pub(crate) fn label(self) -> String {
        match self {
            Self::W1 => "W1, acquire + release".into(),
            Self::W2(tasks) => format!("W2, {tasks} tasks"),
            Self::W3 => "W3, hand-over".into(),
            Self::W4a => "W4a, 32 tasks, one name".into(),
            Self::W4b => "W4b, 4 × 8 tasks, one name".into(),
            Self::W4c => "W4c, the same, held 2 ms".into(),
            Self::W5 => "W5, 10,000 held".into(),
            Self::W6(Taken::OneByOne) => "W6, 1,000 held, taken one by one".into(),
            Self::W6(Taken::AtOnce) => "W6, taken at once".into(),
        }
    }

    /// Whether its figure is a number per second, of which more is better, and not a time.
    pub(crate) fn is_rate(self) -> bool {
        matches!(self, Self::W2(_) | Self::W4a | Self::W4b)
    }

    /// What its figure is.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::W1 | Self::W3 => "median",
            Self::W2(_) => "ops/s",
            Self::W4a | Self::W4b => "acquisitions/s",
            Self::W4c => "99 % of waits",
            Self::W5 | Self::W6(_) => "taken in",
        }
    }
}

/// What ours is to reach. Times in nanoseconds, sizes in bytes, shares of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Targets {
    /// To the limit: at least, where more is better, or at most.
    pub(crate) ratio: Option<f64>,
    pub(crate) commands: Option<f64>,
    pub(crate) fewest_most: Option<f64>,
    pub(crate) worst: Option<f64>,
    pub(crate) busy: Option<f64>,
    pub(crate) per_second: Option<f64>,
    pub(crate) cpu: Option<f64>,
    pub(crate) memory: Option<f64>,
    pub(crate) lost: Option<f64>,
    pub(crate) connections: Option<f64>,
}

#[cfg_attr(not(any(feature = "postgres", feature = "redis")), allow(dead_code, reason = "others have none"))]
impl Targets {
    pub(crate) const NONE: Self = Self {
        ratio: None,
        commands: None,
        fewest_most: None,
        worst: None,
        busy: None,
        per_second: None,
        cpu: None,
        memory: None,
        lost: None,
        connections: None,
    };
    pub(crate) const W4A: Self = Self {
        ratio: Some(0.9),
        commands: Some(1.1),
        fewest_most: Some(0.9),
        worst: Some(30e6),
        ..Self::NONE
    };
    pub(crate) const W4B: Self = Self {
        ratio: Some(0.9),
        commands: Some(2.2),
        fewest_most: Some(0.8),
        worst: Some(50e6),
        ..Self::NONE
    };
    pub(crate) const W4C: Self = Self { ratio: Some(1.1), busy: Some(0.92), ..Self::NONE };
    pub(crate) const W5: Self = Self {
        ratio: Some(1.3),
        per_second: Some(40.0),
        cpu: Some(0.02),
        memory: Some(40.0 * 1_048_576.0),
        lost: Some(0.0),
        ..Self::NONE
    };
    pub(crate) const W6: Self = Self { ratio: Some(2.0), connections: Some(4.0), ..Self::NONE };
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// Too little for figures that mean anything.
    pub(crate) quick: bool,
}

impl Scale {
    pub(crate) fn rounds(self) -> usize {
        if self.quick { 2 } else { 7 }
    }

    pub(crate) fn of(self, full: usize) -> usize {
        if self.quick { (full / 20).max(1) } else { full }
    }

    pub(crate) fn millis(self, full: u64) -> u64 {
        if self.quick { (full / 10).max(50) } else { full }
    }
}
