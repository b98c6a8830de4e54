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

use std::error::Error as _;
use std::fmt::Write as _;
use std::time::Duration;

use fencelock::backend::Backend;
use fencelock::postgres::driver::{Client, Config, NoTls};
use fencelock::postgres::{AdvisoryKey, PostgresLocks, lock_key};
use fencelock::{Error, LockGuard, LockOptions, LockProvider, Provider, connect};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use servers::postgres::PostgresServer;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use common::ms;

#[test]
#[ignore = "a process that other tests start"]
fn holder_process() {
    servers::holder::play();
}

/// A password with everything that means something in a URL.
const PASSWORD: &str = "never/to@be:seen#?,%&=+ ";

/// Far longer than anything takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(30);

/// How many sessions wait for an advisory lock.
const WAITING: &str = "select count(*) from pg_locks where locktype = 'advisory' and not granted";

/// Awaits what has to happen.
async fn within<F: Future>(event: &str, future: F) -> F::Output {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {event}"))
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

async fn connected(url: &str) -> Box<dyn LockProvider> {
    within("connect", Box::pin(connect(url))).await.unwrap_or_else(|error| panic!("{}", everything(&error)))
}

async fn refused(url: &str) -> Error {
    match within(&format!("an answer to {url}"), Box::pin(connect(url))).await {
        Ok(provider) => panic!("accepted: {provider:?}"),
        Err(error) => {
            assert_no_secret(&everything(&error));
            error
        }
    }
}

/// What an error can show in any way.
fn everything(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(cause) = source {
        write!(text, " <- {cause} {cause:?}").expect("a string takes all");
        source = cause.source();
    }
    text
}

fn assert_no_secret(text: &str) {
    for secret in [PASSWORD, &encoded(PASSWORD), "never"] {
        assert!(!text.contains(secret), "a password is shown: {text}");
    }
}

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

fn built<B: Backend>(locks: B, ttl: Duration) -> Provider<B> {
    Provider::builder(locks).options(LockOptions::new().ttl(ttl)).build().expect("possible options")
}

async fn take(provider: &dyn LockProvider, name: &str) -> LockGuard {
    within("the lock is taken", provider.create_lock(name).acquire())
        .await
        .unwrap_or_else(|error| panic!("{}", everything(&error)))
}

async fn is_free(provider: &dyn LockProvider, name: &str) -> bool {
    match within("an answer", provider.create_lock(name).try_acquire()).await {
        Ok(Some(guard)) => {
            released(guard).await;
            true
        }
        Ok(None) => false,
        Err(error) => panic!("{}", everything(&error)),
    }
}

/// What a try fails with that isn't repeated.
async fn fails(provider: &dyn LockProvider, name: &str) -> Error {
    let lock = provider.create_lock_with(name, LockOptions::new().retry_for(Duration::ZERO));
    let error = within("an answer", lock.try_acquire()).await.expect_err("it can't be had");
    assert_no_secret(&everything(&error));
    error
}

async fn released(guard: LockGuard) {
    let answer = within("the lock is released", guard.release()).await;
    answer.unwrap_or_else(|error| panic!("{}", everything(&error)));
}

async fn closed(provider: &dyn LockProvider) {
    within("the provider is closed", provider.close()).await.expect("closed");
}

/// Waits in a task.
fn waits(provider: &dyn LockProvider, name: &str) -> JoinHandle<fencelock::Result<LockGuard>> {
    let lock = provider.create_lock(name);
    tokio::spawn(async move { lock.acquire().await })
}

async fn granted(waiter: JoinHandle<fencelock::Result<LockGuard>>) -> LockGuard {
    let answer = within("a waiter has the lock", waiter).await.expect("it doesn't panic");
    answer.unwrap_or_else(|error| panic!("{}", everything(&error)))
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
