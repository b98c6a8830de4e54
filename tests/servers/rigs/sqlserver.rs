//! The stand-in for SQL Server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::sqlserver::lock_resource;

use super::super::locks::Random;
use super::super::sqlserver::{DATABASE, PASSWORD, SqlServer, USER};
use super::{Kind, Part, Rig};

pub(super) const KIND: Kind = Kind {
    name: "sqlserver",
    feature: "sqlserver",
    short_ttl: Duration::from_millis(1500),
    lacks: &[
        (Part::Expiry, "the server ends no session by itself, so a frozen holder keeps its lock"),
        (Part::Persistence, "its locks are its sessions', and end with them"),
        (Part::Minority, "it is one server"),
        (Part::Data, "its locks are never stored: a restart is the end of all of them"),
    ],
    start: || Arc::new(SqlServerRig(SqlServer::start())),
};

#[derive(Debug)]
struct SqlServerRig(SqlServer);

impl Rig for SqlServerRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        vec![self.0.addr()]
    }

    fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String {
        format!("sqlserver://{USER}:{PASSWORD}@{}/{DATABASE}?encrypt=off&ttl={}ms", addrs[0], ttl.as_millis())
    }

    fn kill(&self, _: usize) {
        self.0.stop();
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

    fn set_clock_offset(&self, _: usize, seconds: i64) {
        self.0.set_clock_offset(seconds * 1_000_000);
    }

    fn take_away(&self, name: &str) {
        if let Some(holder) = self.0.holder(DATABASE, &lock_resource(name)) {
            self.0.kill(holder);
        }
    }

    fn end_connections(&self) {
        for session in self.0.sessions() {
            self.0.kill(session.spid);
        }
    }

    fn wrong_password(&self) -> String {
        self.url(KIND.short_ttl).replace(&format!(":{PASSWORD}@"), ":wrong@")
    }

    fn claim_part(&self, name: &str, _: Duration) -> Vec<u8> {
        lock_resource(name).encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    fn waiters(&self, name: &str) -> Option<usize> {
        Some(self.0.waiters(DATABASE, &lock_resource(name)))
    }

    fn disturb(&self, random: &mut Random) -> bool {
        let sessions = self.0.sessions();
        if sessions.is_empty() {
            return false;
        }
        let session = random.pick(&sessions);
        if random.below(2) == 0 { self.0.kill(session.spid) } else { self.0.kill_with_error(session.spid) }
    }

    fn connections(&self) -> usize {
        self.0.sessions().len()
    }

    fn entries(&self) -> usize {
        self.0.rows(DATABASE)
    }
}
