//! One PostgreSQL server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::postgres::lock_key;

use super::super::locks::Random;
use super::super::postgres::{DATABASE, PASSWORD, PostgresServer, USER};
use super::super::postgres_locks::is_about;
use super::{Kind, Part, Rig};

pub(super) const KIND: Kind = Kind {
    name: "postgres",
    feature: "postgres",
    short_ttl: Duration::from_millis(1500),
    lacks: &[
        (Part::Persistence, "its locks are its sessions', and end with them"),
        (Part::Minority, "it is one server"),
        (Part::Data, "its locks are never stored: a restart is the end of all of them"),
    ],
    start: || Arc::new(PostgresRig(PostgresServer::options().durable().with_clock().start())),
};

#[derive(Debug)]
struct PostgresRig(PostgresServer);

impl Rig for PostgresRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        vec![self.0.addr()]
    }

    fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String {
        format!("postgres://{USER}:{PASSWORD}@{}/{DATABASE}?ttl={}ms", addrs[0], ttl.as_millis())
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

    fn set_clock_offset(&self, _: usize, seconds: i64) {
        self.0.set_clock_offset(seconds);
    }

    fn take_away(&self, name: &str) {
        let holder = format!("SELECT pid FROM pg_locks WHERE {} AND granted", is_about(name));
        self.0.sql(&format!("SELECT pg_terminate_backend(pid) FROM ({holder}) AS holder"));
    }

    fn end_connections(&self) {
        let all = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{USER}'");
        self.0.sql(&all);
    }

    fn wrong_password(&self) -> String {
        self.url(KIND.short_ttl).replace(&format!(":{PASSWORD}@"), ":wrong@")
    }

    fn claim_part(&self, name: &str, _: Duration) -> Vec<u8> {
        lock_key(name).to_be_bytes().to_vec()
    }

    fn waiters(&self, name: &str) -> Option<usize> {
        let count = format!("SELECT count(*) FROM pg_locks WHERE {} AND NOT granted", is_about(name));
        Some(self.0.sql(&count).parse().expect("a number"))
    }

    fn disturb(&self, random: &mut Random) -> bool {
        let (what, frees) = match random.below(3) {
            0 => ("pg_cancel_backend(pid)", false),
            1 => ("pg_terminate_backend(pid)", true),
            _ => ("pg_reload_conf()", false),
        };
        // It may be down.
        let _ = self.0.try_sql(&format!(
            "SELECT {what} FROM (SELECT pid FROM pg_stat_activity WHERE usename = '{USER}' \
             ORDER BY pid OFFSET {} LIMIT 1) AS session",
            random.below(8)
        ));
        frees
    }

    fn connections(&self) -> usize {
        let count = self.0.sql(&format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{USER}'"));
        count.parse().expect("a number")
    }

    fn entries(&self) -> usize {
        let count = self.0.sql(
            "SELECT (SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace) + \
             (SELECT coalesce(sum(n_live_tup), 0) FROM pg_stat_user_tables)",
        );
        count.parse().expect("a number")
    }
}
