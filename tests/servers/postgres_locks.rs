//! What a PostgreSQL server shows of locks.

use std::collections::BTreeSet;
use std::time::Duration;

use fencelock::postgres::lock_key;
use tokio::task::block_in_place;
use tokio::time::sleep;

use super::locks::within;
use super::postgres::{PostgresServer, USER};

/// Repeats some SQL until its result is as wanted. Doesn't block the runtime, which others may need for that. Needs one
/// with several threads.
pub(crate) async fn until(server: &PostgresServer, sql: &str, wanted: impl Fn(&str) -> bool) -> String {
    let wanted = async {
        loop {
            let result = block_in_place(|| server.sql(sql));
            if wanted(&result) {
                return result;
            }
            sleep(Duration::from_millis(2)).await;
        }
    };
    within(&format!("the wanted result of {sql}"), wanted).await
}

/// Which rows of `pg_locks` are about the lock of this name.
pub(crate) fn is_about(name: &str) -> String {
    let key = lock_key(name).cast_unsigned();
    format!(
        "locktype = 'advisory' AND classid = {} AND objid = {} AND objsubid = 1",
        key >> 32,
        key & 0xffff_ffff
    )
}

/// Waits until so many block on the server for a lock.
pub(crate) async fn until_blocked(server: &PostgresServer, name: &str, count: usize) {
    let sql = format!("SELECT count(*) FROM pg_locks WHERE {} AND NOT granted", is_about(name));
    until(server, &sql, |found| found == count.to_string()).await;
}

/// Waits until so many have announced that they want to hear of releases.
pub(crate) async fn until_announced(server: &PostgresServer, count: usize) {
    // Not those that are held for a moment by who draws a token.
    let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted \
               AND (classid::bigint << 32 | objid::bigint) <> 4799424324863618230";
    until(server, sql, |found| found == count.to_string()).await;
}

/// Waits until nobody holds the lock of this name, or waits for it.
pub(crate) async fn until_free(server: &PostgresServer, name: &str) {
    let sql = format!("SELECT count(*) FROM pg_locks WHERE {}", is_about(name));
    until(server, &sql, |found| found == "0").await;
}

/// Waits until no advisory lock at all is held or waited for.
pub(crate) async fn until_all_free(server: &PostgresServer) {
    until(server, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", |found| found == "0").await;
}

/// Whose session holds the lock, or waits for it.
pub(crate) fn backend_of(server: &PostgresServer, name: &str, granted: bool) -> u32 {
    let sql = format!("SELECT pid FROM pg_locks WHERE {} AND granted = {granted} LIMIT 1", is_about(name));
    block_in_place(|| server.sql(&sql))
        .parse()
        .unwrap_or_else(|_| panic!("nobody has {name} (granted: {granted})"))
}

/// Ends a session, as an administrator does.
pub(crate) fn terminate(server: &PostgresServer, backend: u32) {
    assert_eq!(block_in_place(|| server.sql(&format!("SELECT pg_terminate_backend({backend})"))), "t");
}

/// The sessions of the ordinary user.
pub(crate) fn backends(server: &PostgresServer) -> BTreeSet<u32> {
    let sql = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{USER}'");
    let pids = block_in_place(|| server.sql(&sql));
    pids.lines().map(|pid| pid.parse().expect("a number")).collect()
}
