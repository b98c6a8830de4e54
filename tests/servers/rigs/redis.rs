//! One Redis server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::redis::lock_key;

use super::super::locks::Random;
use super::super::redis::RedisServer;
use super::{Kind, Part, Rig};

pub(super) const KIND: Kind = Kind {
    name: "redis",
    feature: "redis",
    short_ttl: Duration::from_secs(1),
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

    fn end_connections(&self) {
        end_connections(&self.0);
    }

    fn wrong_password(&self) -> String {
        self.0.command(&["CONFIG", "SET", "requirepass", "right"]);
        self.url(KIND.short_ttl).replace("redis://", "redis://:wrong@")
    }

    fn claim_part(&self, _: &str, _: Duration) -> Vec<u8> {
        // The first claim of an acquire doesn't wait.
        b"\r\ntry\r\n".to_vec()
    }

    fn waiters(&self, name: &str) -> Option<usize> {
        Some(waiters(&self.0, name))
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

    fn lasting_entries(&self) -> usize {
        lasting_entries(&self.0)
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
    let command: &&[&str] = random.pick(&commands);
    let _ = server.try_command(command);
}

pub(super) fn end_connections(server: &RedisServer) {
    for kind in ["pubsub", "normal"] {
        // It ends the connection that asks, too.
        let _ = server.try_command(&["CLIENT", "KILL", "TYPE", kind]);
    }
}

pub(super) fn waiters(server: &RedisServer, name: &str) -> usize {
    server.command(&["ZCARD", &(lock_key(name) + ":queue")]).parse().expect("a number")
}

pub(super) fn connections(server: &RedisServer) -> usize {
    server.command(&["CLIENT", "LIST"]).lines().filter(|line| !line.is_empty()).count() - 1
}

pub(super) fn entries(server: &RedisServer) -> usize {
    server.command(&["DBSIZE"]).parse().expect("a number")
}

pub(super) fn lasting_entries(server: &RedisServer) -> usize {
    let keyspace = server.command(&["INFO", "keyspace"]);
    let number = |field: &str| {
        let (_, rest) = keyspace.split_once(field).unwrap_or(("", "0"));
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<usize>().expect("a number")
    };
    number("keys=") - number("expires=")
}
