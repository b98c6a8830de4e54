//! How one comes to a PostgreSQL server: URLs, users and their rights, poolers, connections of one's own; and others at the
//! same locks.

#[path = "../common/mod.rs"]
mod common;
#[path = "../servers/mod.rs"]
mod servers;

mod errors;
mod keys;
mod own;
mod pgbouncer;
mod sessions;
#[cfg(any(feature = "rustls", feature = "native-tls"))]
mod tls;
mod transaction;
mod urls;

use std::time::Duration;

use fencelock::postgres::driver::{Client, Config, NoTls};
use fencelock::postgres::{AdvisoryKey, PostgresLocks, lock_key};
use fencelock::{LockProvider, Provider};
use servers::connecting::{
    PASSWORD, assert_no_secret, built, closed, connected, encoded, everything, fails, granted, is_free,
    refused, released, take, waits,
};
use servers::locks::{PATIENCE, within};
use servers::postgres::PostgresServer;
use tokio::time::{sleep, timeout};

use common::ms;

#[test]
#[ignore = "a process that other tests start"]
fn holder_process() {
    servers::holder::play();
}

/// How many sessions wait for an advisory lock.
const WAITING: &str = "select count(*) from pg_locks where locktype = 'advisory' and not granted";

fn config(url: &str) -> Config {
    url.parse().expect("a URL of ours")
}

/// A connection of the driver's, which is closed when it is dropped.
async fn client(url: &str) -> Client {
    let (client, connection) = config(url).connect(NoTls).await.expect("it is there");
    tokio::spawn(connection);
    client
}

/// Locks on a server, without `connect`.
fn locks(server: &PostgresServer, ttl: Duration) -> Provider<PostgresLocks> {
    built(PostgresLocks::new(config(&server.url())), ttl)
}

/// Repeats some SQL until its result is as wanted, without blocking the runtime for as long.
async fn until(server: &PostgresServer, statement: &str, wanted: &str) {
    let mut result = String::new();
    let reached = timeout(PATIENCE, async {
        loop {
            result = server.sql(statement);
            if result == wanted {
                return;
            }
            sleep(ms(5)).await;
        }
    });
    let reached = reached.await;
    assert!(reached.is_ok(), "{statement} is {result}, not {wanted}");
}

/// Waits until so many sessions wait for a lock on the server.
async fn until_waiting(server: &PostgresServer, count: usize) {
    until(server, WAITING, &count.to_string()).await;
}

/// How many hold the lock, by the server's own account.
fn holders(server: &PostgresServer, key: impl Into<AdvisoryKey>) -> usize {
    server.sql(&shows(key.into())).parse().expect("a number")
}

/// Waits until nobody holds it.
async fn until_free(server: &PostgresServer, name: &str) {
    until(server, &shows(lock_key(name).into()), "0").await;
}

/// The statement that counts the holders.
fn shows(key: AdvisoryKey) -> String {
    let (class, object, sub) = match key {
        AdvisoryKey::One(key) => {
            (format!("(('{key}'::bigint >> 32) & 4294967295)"), format!("('{key}'::bigint & 4294967295)"), 1)
        }
        AdvisoryKey::Two(first, second) => {
            (format!("('{first}'::bigint & 4294967295)"), format!("('{second}'::bigint & 4294967295)"), 2)
        }
    };
    format!(
        "select count(*) from pg_locks where locktype = 'advisory' and granted and classid::bigint = {class} \
         and objid::bigint = {object} and objsubid = {sub}"
    )
}

/// What a provider is for: one takes the lock, another is refused, waits and is woken, and both release.
async fn shows_what_it_can(
    one: &dyn LockProvider,
    other: &dyn LockProvider,
    server: &PostgresServer,
    name: &str,
) {
    let guard = take(one, name).await;
    let first = guard.fencing_token();
    assert!(!is_free(other, name).await);
    let waiter = waits(other, name);
    until_waiting(server, 1).await;
    released(guard).await;
    let began = std::time::Instant::now();
    let guard = granted(waiter).await;
    // By the server; the next look would be half a second later.
    assert!(began.elapsed() < ms(450), "it wasn't woken: {:?}", began.elapsed());
    assert!(guard.fencing_token() > first);
    assert!(!is_free(one, name).await);
    released(guard).await;
    assert!(is_free(one, name).await);
}
