//! One Redis server, and what can be done by hand with its driver.

mod blpop;
mod queue;
mod raw;

use crate::backends::{Limit, Site};
use crate::child::play;
use crate::locker::Result;
use crate::servers::redis::RedisServer;
use crate::transfer::Transfer;
use crate::workload::{Targets, Workload};

pub(crate) struct Redis(RedisServer);

impl Redis {
    pub(crate) fn start() -> Self {
        Self(RedisServer::start())
    }
}

/// What scripts call, and nobody else in the ways that use scripts.
const INSIDE_SCRIPTS: &[&str] = &[
    "del", "exists", "expire", "get", "hdel", "hget", "hset", "info", "lpop", "pexpire", "pttl", "publish",
    "rpush", "set", "time", "zadd", "zrange", "zrem", "zscore",
];

impl Site for Redis {
    fn url(&self) -> String {
        self.0.url()
    }

    fn commands(&self, way: &str) -> Option<u64> {
        let inside = if way == "blpop" { &["info"] } else { INSIDE_SCRIPTS };
        let stats = self.0.command(&["INFO", "commandstats"]);
        let calls = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
            let is_counted = !inside.contains(&name);
            is_counted.then(|| rest.split(',').next()?.parse::<u64>().ok()).flatten()
        };
        Some(stats.lines().filter_map(calls).sum())
    }

    fn connections(&self) -> Option<u64> {
        let lines = self.0.command(&["CLIENT", "LIST"]);
        Some((lines.lines().filter(|line| !line.is_empty()).count() - 1) as u64) // one of them asks
    }
}

pub(crate) fn limits(workload: Workload) -> Vec<Limit> {
    let limit = |way, says, targets| Limit { way, says, targets };
    let none = Targets::NONE;
    match workload {
        Workload::W1 => {
            vec![limit("raw", "`SET NX PX` + compare-and-delete", Targets { ratio: Some(1.10), ..none })]
        }
        Workload::W2(_) => {
            vec![limit("raw", "the same, on one connection", Targets { ratio: Some(0.92), ..none })]
        }
        Workload::W3 => vec![
            limit("queue", "server-side queue", Targets { ratio: Some(1.1), ..none }),
            limit("blpop", "`BLPOP`", Targets { ratio: Some(1.1), ..none }),
        ],
        Workload::W4a => vec![
            limit("transfer", "in-process transfer", Targets::W4A),
            limit("queue", "server-side queue", none),
        ],
        Workload::W4b => {
            vec![limit("queue", "server-side queue", Targets::W4B), limit("blpop", "`BLPOP`", none)]
        }
        Workload::W4c => vec![limit("queue", "server-side queue", Targets::W4C)],
        Workload::W5 => vec![limit("raw", "one script per 500 locks", Targets::W5)],
        Workload::W6(_) => vec![limit("raw", "`SET NX PX` on one connection", none)],
    }
}

pub(crate) async fn play_by_hand(way: &str, url: &str) -> Result<()> {
    match way {
        "raw" => play(raw::Raw::connect(url).await?).await,
        "transfer" => play(Transfer::new(raw::Raw::connect(url).await?)).await,
        "queue" => play(queue::Queue::connect(url).await?).await,
        "blpop" => play(blpop::Blpop::connect(url).await?).await,
        other => Err(format!("redis has no way {other}").into()),
    }
}
