//! The backends: a server for each, what is written by hand against it, and what the goals are.

#[cfg(feature = "azure")]
mod azure;
mod file;
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "sqlserver")]
mod sqlserver;

use crate::child::play;
use crate::locker::{OURS, Ours, Result};
use crate::workload::{Targets, Workload};

/// What is written by hand.
pub(crate) struct Limit {
    /// What the process that does it is called with.
    pub(crate) way: &'static str,
    pub(crate) says: &'static str,
    /// Of ours beside it.
    pub(crate) targets: Targets,
}

pub(crate) struct Backend {
    pub(crate) name: &'static str,
    pub(crate) start: fn(Purpose) -> Result<Box<dyn Site>>,
    /// The first is the one to be measured by; none, if the workload makes no sense here.
    pub(crate) limits: fn(Workload) -> Vec<Limit>,
    pub(crate) pace: Pace,
    /// How many locks are held while growth is measured.
    pub(crate) held: &'static [usize],
}

/// How much of each is a part of a second.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// Locks taken and given back one after the other.
    pub(crate) cycles: usize,
    /// The same by many tasks.
    pub(crate) many: usize,
    pub(crate) handovers: usize,
}

/// What a server is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "postgres"), allow(dead_code, reason = "only there they differ"))]
pub(crate) enum Purpose {
    Times,
    /// Commands are counted.
    Counts,
    /// So many locks are held.
    Holding(usize),
}

/// A backend with its server, if it has one, which is gone once this is dropped.
pub(crate) trait Site {
    fn url(&self) -> String;

    /// Where those by hand connect to.
    fn raw_url(&self) -> String {
        self.url()
    }

    /// How many commands clients have sent so far, if only this way of taking locks was used.
    fn commands(&self, _way: &str) -> Option<u64> {
        None
    }

    /// How many connections clients have.
    fn connections(&self) -> Option<u64> {
        None
    }

    /// What the server has in memory, in bytes.
    fn memory(&self) -> Option<u64> {
        None
    }
}

/// Those of this build.
pub(crate) const BACKENDS: &[Backend] = &[
    #[cfg(feature = "redis")]
    Backend {
        name: "redis",
        start: |_| Ok(Box::new(redis::Redis::start())),
        limits: redis::limits,
        pace: Pace { cycles: 1_000, many: 25_600, handovers: 80 },
        held: &[0, 1_000, 100_000],
    },
    #[cfg(feature = "postgres")]
    Backend {
        name: "postgres",
        start: |purpose| {
            Ok(Box::new(match purpose {
                Purpose::Times => postgres::Postgres::start(64, false),
                Purpose::Counts => postgres::Postgres::start(256, true),
                Purpose::Holding(locks) => {
                    // A hundred times as many locks, and some more.
                    let each = u32::try_from(locks / 100 + locks / 1_000)?;
                    postgres::Postgres::start(each.max(64), false)
                }
            }))
        },
        limits: postgres::limits,
        pace: Pace { cycles: 1_000, many: 15_360, handovers: 80 },
        // A hundred thousand on one session keep the server busy for minutes.
        held: &[0, 1_000, 10_000],
    },
    Backend {
        name: "memory",
        start: |_| Ok(Box::new(memory::Memory)),
        limits: memory::limits,
        pace: Pace { cycles: 20_000, many: 128_000, handovers: 80 },
        held: &[0, 1_000, 100_000],
    },
    Backend {
        name: "file",
        start: |_| Ok(Box::new(file::Directory::make()?)),
        limits: file::limits,
        pace: Pace { cycles: 400, many: 2_048, handovers: 80 },
        held: &[],
    },
    #[cfg(feature = "azure")]
    Backend {
        name: "azure",
        start: |_| Ok(Box::new(azure::Azurite::start())),
        limits: azure::limits,
        pace: Pace { cycles: 40, many: 0, handovers: 3 },
        held: &[],
    },
    #[cfg(feature = "sqlserver")]
    Backend {
        name: "sqlserver",
        start: |_| Ok(Box::new(sqlserver::StandIn::start())),
        limits: sqlserver::limits,
        pace: Pace { cycles: 300, many: 0, handovers: 80 },
        held: &[],
    },
];

/// Does in this process as it is told.
pub(crate) async fn play_as(backend: &str, way: &str, url: &str) -> Result<()> {
    match backend {
        _ if way == OURS => play(Ours::connect(url).await?).await,
        "memory" => play(memory::Map::default()).await,
        "file" => play(file::Flock::new(way, url)).await,
        #[cfg(feature = "redis")]
        "redis" => redis::play_by_hand(way, url).await,
        #[cfg(feature = "postgres")]
        "postgres" => postgres::play_by_hand(way, url).await,
        #[cfg(feature = "azure")]
        "azure" => play(azure::Raw::connect(url)?).await,
        #[cfg(feature = "sqlserver")]
        "sqlserver" => play(sqlserver::Raw::connect(url).await?).await,
        other => Err(format!("unknown backend {other}").into()),
    }
}
