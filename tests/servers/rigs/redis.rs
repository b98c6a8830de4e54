//! One Redis server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::redis::lock_key;

use super::{Kind, Part, Rig};
use super::super::locks::Random;
use super::super::redis::RedisServer;

pub(super) const KIND: Kind = Kind {
    name: "redis",
    feature: "redis",
    short_ttl: Duration::from_millis(1000),
    lacks: &[(Part::Minority, "it is one server: `redlock` is several")],
    start: || Arc::new(RedisRig(RedisServer::options().durable().with_clock().start())),
};

#[derive(Debug)]
struct RedisRig(RedisServer);

impl Rig for RedisRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        vec![self.0.addr()]
    }

    fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String {
        format!("redis://{}?ttl={}ms", addrs[0], ttl.as_millis())
    }

    fn kill(&self, _: usize) {
        self.0.kill();
    }

    fn restart(&self, _: usize) {
        self.0.restart();
    }

    fn freeze(&self, _: usize) {
        self.0.freeze();
    }

    fn thaw(&self, _: usize) {
        self.0.thaw();
    }

    fn wipe(&self, _: usize) {
        self.0.restart_empty();
    }

    fn set_clock_offset(&self, _: usize, seconds: i64) {
        self.0.set_clock_offset(seconds);
    }

    fn take_away(&self, name: &str) {
        self.0.command(&["DEL", &lock_key(name)]);
    }

    fn disturb(&self, random: &mut Random) -> bool {
        disturb(&self.0, random);
        false
    }

    fn connections(&self) -> usize {
        connections(&self.0)
    }

    fn entries(&self) -> usize {
        entries(&self.0)
    }
}

/// Does something to a server that frees no lock.
pub(super) fn disturb(server: &RedisServer, random: &mut Random) {
    let commands: [&[&str]; 4] = [
        &["SCRIPT", "FLUSH"],
        &["CLIENT", "KILL", "TYPE", "pubsub"],
        &["CLIENT", "KILL", "TYPE", "normal"],
        &["CLIENT", "PAUSE", "100", "WRITE"],
    ];
    // It may be down, and it may end the connection that asks.
    let _ = server.try_command(commands[random.below(4) as usize]);
}

pub(super) fn connections(server: &RedisServer) -> usize {
    server.command(&["CLIENT", "LIST"]).lines().filter(|line| !line.is_empty()).count() - 1
}

pub(super) fn entries(server: &RedisServer) -> usize {
    server.command(&["DBSIZE"]).parse().expect("a number")
}
