//! Clients and connections that the user has made.

use fencelock::redis::driver::Client;
use fencelock::redis::driver::aio::ConnectionManager;
use fencelock::redis::{RedisLocks, Redlock};
use fencelock::{ErrorKind, LockProvider};

use tokio::task::JoinSet;

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::locks::within;
use super::servers::redis::RedisServer;
use super::{
    PASSWORD, assert_no_secret, built, encoded, everything, granted, is_free, locks, shows_what_it_can, take,
    waits,
};

fn client(redis: &RedisServer) -> Client {
    Client::open(format!("redis://:{}@{}", encoded(PASSWORD), redis.addr())).expect("a URL of ours")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().password(PASSWORD).start();
    let provider = || built(RedisLocks::new(client(&redis)), secs(10));
    let (one, other) = (provider(), provider());
    shows_what_it_can(&one, &other, &redis, "x").await;
    let guard = take(&one, "x").await;
    assert_no_secret(&format!("{one:?} {:?} {:?} {guard:?}", one.backend(), one.create_lock("x")));

    redis.kill();
    let lock = built(RedisLocks::new(client(&redis)), secs(10));
    let lock = lock.create_lock_with("x", fencelock::LockOptions::new().retry_for(secs(0)));
    let error = within("an answer", lock.try_acquire()).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_no_secret(&everything(&error));
}

/// Over which nobody can be woken: who waits looks again and again.
async fn polls(one: &dyn LockProvider, other: &dyn LockProvider) {
    assert!(!one.capabilities().wakes_waiters);
    let guard = take(one, "x").await;
    assert!(!is_free(other, "x").await);
    let waiter = waits(other, "x");
    assert!(!is_free(one, "x").await);
    guard.release().await.expect("released");
    let guard = granted(waiter).await;
    assert!(!is_free(one, "x").await);
    assert_no_secret(&format!("{one:?} {other:?} {guard:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().password(PASSWORD).start();
    let connection = client(&redis).get_multiplexed_async_connection().await.expect("it is there");
    let provider = || built(RedisLocks::with_connection(connection.clone()), secs(10));
    polls(&provider(), &provider()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_manager_comes_back_by_itself() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().password(PASSWORD).start();
    let manager = ConnectionManager::new(client(&redis)).await.expect("it is there");
    let provider = || built(RedisLocks::with_connection(manager.clone()), secs(10));
    let (one, other) = (provider(), provider());
    polls(&one, &other).await;
    redis.restart();
    polls(&one, &other).await;
}

#[test]
fn redlock_takes_no_server_twice() {
    let client = |port: u16| Client::open(format!("redis://:never@127.0.0.1:{port}")).expect("a URL of ours");
    for ports in [&[][..], &[1], &[1, 2], &[1, 2, 1]] {
        let error = Redlock::new(ports.iter().copied().map(client)).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert_no_secret(&everything(&error));
    }
    let locks = Redlock::new([1, 2, 3].map(client)).expect("three");
    assert_no_secret(&format!("{locks:?}"));
}

/// All that a busy lock leaves in the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_lock_share_a_hash_tag_and_run_out() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let keys = || redis.command(&["KEYS", "*"]).lines().map(str::to_owned).collect::<Vec<_>>();
    let check = |least: usize| {
        let keys = keys();
        assert!(keys.len() >= least, "{keys:?}");
        for key in keys {
            assert!(key.starts_with("fencelock:{x}"), "{key}");
            let left: i64 = redis.command(&["PTTL", &key]).parse().expect("a number");
            assert!(left > 0 || left == -2, "{key} stays for ever: {left}");
        }
    };
    let providers: Vec<_> = (0..4).map(|_| locks(redis.addr(), secs(5))).collect();
    let guard = take(&providers[0], "x").await;
    let mut waiters = JoinSet::new();
    for provider in &providers[1..] {
        let lock = provider.create_lock("x");
        waiters.spawn(async move { lock.acquire().await?.release().await });
    }
    super::until_queued(&redis, "x", 3);
    check(4);
    // One gives up, one is broken off.
    let lock = providers[1].create_lock("x");
    assert!(lock.try_acquire_for(ms(50)).await.expect("an answer").is_none());
    assert!(tokio::time::timeout(ms(50), lock.acquire()).await.is_err());
    check(4);
    guard.release().await.expect("released");
    while let Some(done) = within("a waiter has had the lock", waiters.join_next()).await {
        done.expect("no panic").expect("granted and released");
    }
    for provider in &providers {
        within("closed", provider.close()).await.expect("closed");
    }
    check(1);
    // What was broken off before it was answered stays refused for a while.
    let left: Vec<_> = keys().into_iter().filter(|key| !key.contains(":dead:")).collect();
    assert_eq!(left, ["fencelock:{x}:fence"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_redlock_share_a_hash_tag_and_run_out() {
    if left_out("redis") {
        return;
    }
    let servers: Vec<_> = (0..3).map(|_| RedisServer::start()).collect();
    let clients = || servers.iter().map(|server| Client::open(server.url()).expect("a URL of ours"));
    let provider = || built(Redlock::new(clients()).expect("three"), secs(5));
    let (one, other) = (provider(), provider());
    let guard = take(&one, "x").await;
    let waiter = waits(&other, "x");
    super::until_queued(&servers[0], "x", 1);
    let check = |wanted: &[&str]| {
        for server in &servers {
            let mut seen = Vec::new();
            for key in server.command(&["KEYS", "*"]).lines().filter(|key| *key != "fencelock:redlock") {
                let left: i64 = server.command(&["PTTL", key]).parse().expect("a number");
                assert!(left > 0 || left == -2, "{key} stays for ever: {left}");
                assert!(key.starts_with("fencelock:{x}"), "{key}");
                seen.push(key.to_owned());
            }
            seen.sort();
            assert!(wanted.iter().all(|key| seen.iter().any(|seen| seen == key)), "{seen:?}");
        }
    };
    check(&["fencelock:{x}", "fencelock:{x}:fence"]);
    guard.release().await.expect("released");
    granted(waiter).await.release().await.expect("released");
    for provider in [&one, &other] {
        within("closed", provider.close()).await.expect("closed");
    }
    for server in &servers {
        server.until(&["KEYS", "*"], |keys| {
            let mut left: Vec<_> = keys.lines().filter(|key| !key.contains(":dead:")).collect();
            left.sort_unstable();
            left == ["fencelock:redlock", "fencelock:{x}:fence"]
        });
    }
    check(&["fencelock:{x}:fence"]);
}
