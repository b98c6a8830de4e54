//! How one comes to a Redis server: URLs, users and their rights, TLS, Sentinel, replicas, connections of one's own; and
//! others at the same keys.

#[path = "../common/mod.rs"]
mod common;
#[path = "../servers/mod.rs"]
mod servers;

mod foreign;
mod own;
mod replicas;
mod rights;
mod sentinel;
#[cfg(any(feature = "rustls", feature = "native-tls"))]
mod tls;
mod urls;

use std::error::Error as _;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use common::ms;
use fencelock::redis::driver::Client;
use fencelock::redis::{RedisLocks, lock_key};
use fencelock::{Error, LockGuard, LockOptions, LockProvider, Provider, connect};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use servers::locks::within;
use servers::redis::RedisServer;
use tokio::task::JoinHandle;

/// A password with everything that means something in a URL.
const PASSWORD: &str = "never/to@be:seen#?,%&=";

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

async fn connected(url: &str) -> Box<dyn LockProvider> {
    within("connect", connect(url)).await.unwrap_or_else(|error| panic!("{}", everything(&error)))
}

async fn refused(url: &str) -> Error {
    match within("connect", connect(url)).await {
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

/// Locks of one server, without `connect`.
fn locks(addr: SocketAddr, ttl: Duration) -> Provider<RedisLocks> {
    let client = Client::open(format!("redis://{addr}")).expect("a URL of ours");
    built(RedisLocks::new(client), ttl)
}

fn built<B: fencelock::backend::Backend>(locks: B, ttl: Duration) -> Provider<B> {
    Provider::builder(locks).options(LockOptions::new().ttl(ttl)).build().expect("possible options")
}

async fn take(provider: &dyn LockProvider, name: &str) -> LockGuard {
    within("the lock is taken", provider.create_lock(name).acquire())
        .await
        .unwrap_or_else(|error| panic!("{}", everything(&error)))
}

async fn is_free(provider: &dyn LockProvider, name: &str) -> bool {
    let answer = within("an answer", provider.create_lock(name).try_acquire()).await;
    answer.unwrap_or_else(|error| panic!("{}", everything(&error))).is_some()
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

/// Waits until so many are in the server's queue.
fn until_queued(server: &RedisServer, name: &str, count: usize) {
    let queue = lock_key(name) + ":queue";
    server.until(&["ZCARD", &queue], |reply| reply == count.to_string());
}

/// What a provider is for: one takes the lock, another is refused, waits and is woken, it is renewed and released.
async fn shows_what_it_can(
    one: &dyn LockProvider,
    other: &dyn LockProvider,
    server: &RedisServer,
    name: &str,
) {
    let guard = take(one, name).await;
    assert!(!is_free(other, name).await);
    let waiter = waits(other, name);
    until_queued(server, name, 1);
    guard.release().await.expect("released");
    let released = std::time::Instant::now();
    let guard = granted(waiter).await;
    // Without the message it would be the next look, up to a second later.
    assert!(released.elapsed() < ms(700), "it wasn't woken: {:?}", released.elapsed());
    assert!(!is_free(one, name).await);
    drop(guard);
    drop(take(one, name).await);
}
