//! The locks of this process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{Kind, Part, Rig};

const NO_SERVER: &str = "it has no server";

pub(super) const KIND: Kind = Kind {
    name: "memory",
    feature: "memory",
    short_ttl: Duration::from_millis(500),
    lacks: &[
        (Part::Processes, "its locks are those of one process, and end with it"),
        (Part::Server, NO_SERVER),
        (Part::Persistence, NO_SERVER),
        (Part::Minority, NO_SERVER),
        (Part::Connections, NO_SERVER),
        (Part::Password, "it asks for no password"),
        (Part::Data, "its data is the process's own memory"),
        (Part::Clock, "it doesn't look at a wall clock, but for tokens"),
        (Part::TakeAway, "nobody else gets at the process's memory"),
    ],
    start: || {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        Arc::new(MemoryRig(NUMBER.fetch_add(1, Ordering::Relaxed)))
    },
};

/// The number that its name ends with.
#[derive(Debug)]
struct MemoryRig(u32);

impl Rig for MemoryRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        Vec::new()
    }

    fn url_by(&self, _: &[SocketAddr], ttl: Duration) -> String {
        format!("memory:rig-{}?ttl={}ms", self.0, ttl.as_millis())
    }

    fn connections(&self) -> usize {
        0
    }

    fn entries(&self) -> usize {
        0
    }
}
