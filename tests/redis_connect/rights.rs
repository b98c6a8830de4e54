//! The least that a user of locks must be allowed, to copy from.

use std::error::Error as _;
use std::sync::Arc;

use fencelock::redis::lock_key;
use fencelock::{Error, ErrorKind};
use tokio::task::JoinSet;

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::locks::within;
use super::servers::redis::RedisServer;
use super::{PASSWORD, assert_no_secret, connected, encoded, everything};

/// What a user of `redis:` needs. This line stands in the module's documentation.
const REDIS: &str = "~fencelock:* &fencelock:* +eval +evalsha +subscribe +publish +time +exists +get +set +del +pttl \
                     +pexpire +zadd +zrange +zrem +zscore +hget +hset +hdel";

/// By this, `connect` tells a Sentinel, and a part of a cluster, from a server of its own.
const USEFUL: &str = "+info +script|load";

/// What a user of `redlock:` needs besides.
const REDLOCK: &str = "+info +hmget";

fn start(rights: &str) -> RedisServer {
    let redis = RedisServer::start();
    let password = format!(">{PASSWORD}");
    let mut command = vec!["ACL", "SETUSER", "locker", "on", &password];
    command.extend(rights.split_whitespace());
    assert_eq!(redis.command(&command), "OK", "{rights}");
    redis
}

fn host(redis: &RedisServer) -> String {
    format!("locker:{}@{}", encoded(PASSWORD), redis.addr())
}

/// Does all that locks can do.
async fn use_everything(url: &str, servers: &[RedisServer]) -> Result<(), Error> {
    let (one, other) = (fencelock::connect(url).await?, fencelock::connect(url).await?);
    let name = "x";
    let guard = one.create_lock(name).acquire().await?;
    assert!(other.create_lock(name).try_acquire().await?.is_none());
    // Two of one process, longer than it takes to ask again, and to renew.
    let mut waiters = JoinSet::new();
    for _ in 0..2 {
        let lock = other.create_lock(name);
        waiters.spawn(async move { lock.acquire().await });
    }
    if let Ok(ended) = tokio::time::timeout(ms(1500), waiters.join_next()).await {
        drop(ended.expect("two").expect("no panic")?);
        panic!("granted what another holds");
    }
    assert!(!guard.is_lost(), "it was not renewed");
    guard.release().await?;
    while let Some(guard) = waiters.join_next().await {
        guard.expect("no panic")?.release().await?;
    }
    // Given up while it waits.
    let guard = one.create_lock(name).acquire().await?;
    assert!(other.create_lock(name).try_acquire_for(ms(200)).await?.is_none());
    guard.release().await?;
    let options = fencelock::LockOptions::new().hold_at_least(secs(20));
    one.create_lock_with("kept", options).acquire().await?.release().await?;
    for server in servers {
        assert_eq!(server.command(&["EXISTS", &lock_key("kept")]), "1");
    }
    one.close().await?;
    other.close().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_rights_are_enough() {
    if left_out("redis") {
        return;
    }
    for rights in [REDIS.to_owned(), format!("{REDIS} {USEFUL}")] {
        let redis = start(&rights);
        let url = format!("redis://{}?ttl=3s&retry_for=5s", host(&redis));
        let used = within("all of it", use_everything(&url, std::slice::from_ref(&redis))).await;
        used.unwrap_or_else(|error| panic!("{rights}: {}", everything(&error)));
        assert_eq!(
            redis.command(&["ACL", "LOG"]).matches("locker").count(),
            usize::from(!rights.contains("+info")) * 4
        );
    }
    // A database that isn't 0, and replicas.
    let redis = start(&format!("{REDIS} +select +wait"));
    let replica = RedisServer::options().replica_of(redis.addr()).start();
    replica.until(&["ROLE"], |role| role.contains("connected"));
    let url = format!("redis://{}/1?ttl=5s&replicas=1&replica_timeout=1s", host(&redis));
    drop(super::take(&*connected(&url).await, "x").await);

    let servers: Vec<_> = (0..3).map(|_| start(&format!("{REDIS} {REDLOCK} {USEFUL}"))).collect();
    let hosts: Vec<_> = servers.iter().map(host).collect();
    let url = format!("redlock://{}?ttl=3s&retry_for=5s", hosts.join(","));
    let used = within("all of it", use_everything(&url, &[])).await;
    used.unwrap_or_else(|error| panic!("{}", everything(&error)));
    for server in &servers {
        assert_eq!(server.command(&["ACL", "LOG"]), "");
    }
}

/// Takes each right away in turn, and expects that the user is told. Without the `hidden` ones, which the scripts ride
/// out, whoever waits isn't woken, and looks again and again.
async fn each_is_needed(rights: &str, hidden: &[&str], scheme: &'static str, count: usize) {
    let all: Arc<Vec<String>> = Arc::new(rights.split_whitespace().map(str::to_owned).collect());
    let mut cases = JoinSet::new();
    for missing in all.iter().filter(|right| !hidden.contains(&right.as_str())).cloned() {
        let rest: Vec<_> = all.iter().filter(|right| **right != missing).cloned().collect();
        cases.spawn(async move {
            let rest = rest.join(" ");
            let servers =
                tokio::task::spawn_blocking(move || (0..count).map(|_| start(&rest)).collect::<Vec<_>>());
            let servers = servers.await.expect("they start");
            let hosts: Vec<_> = servers.iter().map(host).collect();
            let url = format!("{scheme}://{}?ttl=3s&retry_for=5s", hosts.join(","));
            let error = within(&format!("an answer without {missing}"), use_everything(&url, &[])).await;
            let error = error.expect_err(&format!("it works without {missing}"));
            let said = everything(&error);
            // A release of Redlock that fails is unknown, whatever the reason, which is its source then.
            let kind = error.source().map_or(error.kind(), |source| {
                source.downcast_ref::<Error>().map_or(error.kind(), Error::kind)
            });
            assert_eq!(kind, ErrorKind::Denied, "without {missing}: {said}");
            assert_no_secret(&said);
        });
    }
    while let Some(case) = cases.join_next().await {
        case.expect("as expected");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_right_of_redis_is_needed_and_its_lack_is_told() {
    if left_out("redis") {
        return;
    }
    each_is_needed(REDIS, &["+publish"], "redis", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_right_of_redlock_is_needed_and_its_lack_is_told() {
    if left_out("redis") {
        return;
    }
    let only_to_be_woken = ["&fencelock:*", "+subscribe", "+publish"];
    each_is_needed(&format!("{REDIS} {REDLOCK}"), &only_to_be_woken, "redlock", 3).await;
}
