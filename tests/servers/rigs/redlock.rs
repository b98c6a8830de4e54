//! Redlock over three Redis servers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::redis::lock_key;

use super::super::locks::Random;
use super::super::redis::RedisServer;
use super::redis::{connections, disturb, end_connections, entries, lasting_entries, waiters};
use super::{Kind, Rig};

/// A server that has restarted has no vote for so long.
const LONGEST_TTL: Duration = Duration::from_secs(3);

pub(super) const KIND: Kind = Kind {
    name: "redlock",
    feature: "redis",
    short_ttl: Duration::from_millis(1500),
    lacks: &[],
    start: || {
        let server = || RedisServer::options().durable().with_clock().start();
        Arc::new(RedlockRig([server(), server(), server()]))
    },
};

#[derive(Debug)]
struct RedlockRig([RedisServer; 3]);

impl Rig for RedlockRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        self.0.iter().map(RedisServer::addr).collect()
    }

    fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String {
        let hosts: Vec<_> = addrs.iter().map(SocketAddr::to_string).collect();
        format!(
            "redlock://{}?ttl={}ms&longest_ttl={}ms",
            hosts.join(","),
            ttl.as_millis(),
            LONGEST_TTL.max(ttl).as_millis()
        )
    }

    fn kill(&self, server: usize) {
        self.0[server].kill();
    }

    fn restart(&self, server: usize) {
        self.0[server].restart();
    }

    fn freeze(&self, server: usize) {
        self.0[server].freeze();
    }

    fn thaw(&self, server: usize) {
        self.0[server].thaw();
    }

    fn wipe(&self, server: usize) {
        self.0[server].restart_empty();
    }

    fn set_clock_offset(&self, server: usize, seconds: i64) {
        self.0[server].set_clock_offset(seconds);
    }

    fn take_away(&self, name: &str) {
        for server in &self.0 {
            server.command(&["DEL", &lock_key(name)]);
        }
    }

    fn end_connections(&self) {
        self.0.iter().for_each(end_connections);
    }

    fn wrong_password(&self) -> String {
        for server in &self.0 {
            server.command(&["CONFIG", "SET", "requirepass", "right"]);
        }
        // What the first host has goes for all.
        self.url(KIND.short_ttl).replace("redlock://", "redlock://:wrong@")
    }

    fn claim_part(&self, _: &str, ttl: Duration) -> Vec<u8> {
        // Renewals have it, too.
        format!("\r\n{}\r\n", ttl.as_millis()).into_bytes()
    }

    fn waiters(&self, name: &str) -> Option<usize> {
        // As many as a majority knows of: a server that hasn't voted for the holder lines nobody up.
        let mut counts = self.0.each_ref().map(|server| waiters(server, name));
        counts.sort_unstable();
        Some(counts[1])
    }

    fn disturb(&self, random: &mut Random) -> bool {
        disturb(random.pick(&self.0), random);
        false
    }

    fn connections(&self) -> usize {
        self.0.iter().map(connections).sum()
    }

    fn entries(&self) -> usize {
        self.0.iter().map(entries).sum()
    }

    fn lasting_entries(&self) -> usize {
        self.0.iter().map(lasting_entries).sum()
    }
}
