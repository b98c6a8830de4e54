//! Grants that wait for replicas.

use std::time::Instant;

use fencelock::ErrorKind;
use fencelock::redis::lock_key;

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::locks::within;
use super::servers::redis::RedisServer;
use tokio::task::JoinSet;

use super::{connected, everything, is_free, take, until_queued, waits};

fn master_and_replica() -> (RedisServer, RedisServer) {
    let master = RedisServer::start();
    let replica = RedisServer::options().replica_of(master.addr()).start();
    replica.until(&["ROLE"], |role| role.contains("connected"));
    master.until(&["INFO", "replication"], |said| said.contains("state=online"));
    (master, replica)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_is_on_the_replica_when_it_is_given() {
    if left_out("redis") {
        return;
    }
    let (master, replica) = master_and_replica();
    let url = format!("{}?replicas=1&replica_timeout=1s&ttl=10s", master.url());
    let (one, other) = (connected(&url).await, connected(&url).await);
    let key = lock_key("x");
    let owner = || replica.command(&["GET", &key]);
    let mut seen = vec!["(nil)".to_owned()];
    for _ in 0..20 {
        let guard = take(&*one, "x").await;
        let first = owner();
        assert!(!seen.contains(&first), "{first}");
        // Two of one process, so that there is one to hand over to without the server too.
        let mut waiters = JoinSet::new();
        for _ in 0..2 {
            let lock = other.create_lock("x");
            waiters.spawn(async move { lock.acquire().await });
        }
        until_queued(&master, "x", 1);
        guard.release().await.expect("released");
        while let Some(guard) = within("a waiter has the lock", waiters.join_next()).await {
            let guard = guard.expect("no panic").expect("granted");
            let now = owner();
            assert!(now != first && !seen.contains(&now), "{now}");
            seen.push(now);
            guard.release().await.expect("released");
        }
        seen.push(first);
        master.until(&["EXISTS", &key], |there| there == "0");
        replica.until(&["EXISTS", &key], |there| there == "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_that_too_few_replicas_have_is_taken_back() {
    if left_out("redis") {
        return;
    }
    let (master, replica) = master_and_replica();
    let url = |count: u32| format!("{}?replicas={count}&replica_timeout=300ms&ttl=60s", master.url());
    let at_once = |count: u32| url(count) + "&retry_for=0s";
    let (enough, too_few) = (connected(&at_once(1)).await, connected(&at_once(2)).await);
    let patient = connected(&url(1)).await;
    let plain = connected(&master.url()).await;
    let refused = async |provider: &dyn fencelock::LockProvider, waiting: bool| {
        let (lock, began) = (provider.create_lock("x"), Instant::now());
        let answer = if waiting {
            within("an answer", lock.acquire()).await.map(Some)
        } else {
            within("an answer", lock.try_acquire()).await
        };
        let error = answer.expect_err("the replica hasn't got it");
        assert!(
            matches!(error.kind(), ErrorKind::Unknown | ErrorKind::Unavailable),
            "{}",
            everything(&error)
        );
        assert!(began.elapsed() < secs(3), "{:?}", began.elapsed());
        // The possible grant is taken back in the background: long before the TTL.
        within("it is free again", async {
            while !is_free(&*plain, "x").await {
                tokio::time::sleep(ms(5)).await;
            }
        })
        .await;
        assert!(began.elapsed() < secs(10), "{:?}", began.elapsed());
    };
    refused(&*too_few, false).await;
    refused(&*too_few, true).await;
    take(&*patient, "x").await.release().await.expect("released");

    replica.freeze();
    refused(&*enough, false).await;
    refused(&*enough, true).await;
    // What was in the queue and gets the lock by the release must pass too.
    let guard = take(&*plain, "x").await;
    let a_second = connected(&(url(1) + "&retry_for=1s")).await;
    let waiter = waits(&*a_second, "x");
    until_queued(&master, "x", 1);
    guard.release().await.expect("released");
    let answer = within("an answer", waiter).await.expect("no panic");
    let error = answer.expect_err("the replica hasn't got it");
    assert!(matches!(error.kind(), ErrorKind::Unknown | ErrorKind::Unavailable), "{}", everything(&error));
    replica.thaw();
    take(&*patient, "x").await.release().await.expect("released");

    replica.kill();
    refused(&*enough, false).await;
    replica.restart();
    master.until(&["INFO", "replication"], |said| said.contains("state=online"));
    take(&*patient, "x").await.release().await.expect("released");
}
