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

use std::net::SocketAddr;
use std::time::Duration;

use common::ms;
use fencelock::redis::driver::Client;
use fencelock::redis::{RedisLocks, lock_key};
use fencelock::{LockProvider, Provider};
use servers::connecting::{
    assert_no_secret, built, connected, encoded, everything, granted, is_free, refused, take, waits,
};
use servers::redis::RedisServer;

/// A password with everything that means something in a URL.
const PASSWORD: &str = "never/to@be:seen#?,%&=";

/// Locks of one server, without `connect`.
fn locks(addr: SocketAddr, ttl: Duration) -> Provider<RedisLocks> {
    let client = Client::open(format!("redis://{addr}")).expect("a URL of ours");
    built(RedisLocks::new(client), ttl)
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
