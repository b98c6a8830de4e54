//! Taking locks, and what a Redis server shows of them.

use std::time::{Duration, Instant};

use fencelock::redis::lock_key;
use fencelock::{LockGuard, LockProvider};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::redis::RedisServer;

/// How much longer than promised a busy machine may take.
pub(crate) const SLACK: Duration = Duration::from_secs(2);

/// Far longer than anything takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(30);

/// Awaits what has to happen.
pub(crate) async fn within<F: Future>(event: &str, future: F) -> F::Output {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {event}"))
}

/// Shows with `--nocapture` how long something took.
pub(crate) fn report(what: &str, took: Duration) {
    println!("{what}: {:.1} ms", took.as_secs_f64() * 1e3);
}

/// Waits for a lock in a task, which says when it got it.
pub(crate) fn waits(provider: &impl LockProvider, name: &str) -> JoinHandle<(LockGuard, Instant)> {
    let lock = provider.create_lock(name);
    tokio::spawn(async move {
        let guard = lock.acquire().await.expect("granted in the end");
        (guard, Instant::now())
    })
}

pub(crate) async fn granted(waiter: JoinHandle<(LockGuard, Instant)>) -> (LockGuard, Instant) {
    within("a waiter has the lock", waiter).await.expect("it doesn't panic")
}

pub(crate) async fn take(provider: &impl LockProvider, name: &str) -> LockGuard {
    within("the lock is taken", provider.create_lock(name).acquire()).await.expect("the server is there")
}

/// Repeats a command until its reply is as wanted. Doesn't block the runtime, which others may need for that.
pub(crate) async fn until(server: &RedisServer, command: &[&str], wanted: impl Fn(&str) -> bool) {
    let wanted = async {
        while !wanted(&server.command(command)) {
            sleep(Duration::from_millis(2)).await;
        }
    };
    within(&format!("the wanted reply to {command:?}"), wanted).await;
}

/// Waits until so many are in a server's queue for a lock.
pub(crate) async fn until_queued(server: &RedisServer, name: &str, count: usize) {
    let queue = lock_key(name) + ":queue";
    until(server, &["ZCARD", &queue], |reply| reply == count.to_string()).await;
}

/// Waits until a majority of these servers have so many in their queues, or more: a vote that was late may have left
/// somebody behind, and a server that hasn't voted for the holder lines nobody up.
pub(crate) async fn until_queued_on(servers: &[RedisServer], name: &str, count: usize) {
    let queue = lock_key(name) + ":queue";
    let has = |server: &&RedisServer| {
        server.command(&["ZCARD", &queue]).parse::<usize>().is_ok_and(|queued| queued >= count)
    };
    let queued = async {
        while servers.iter().filter(has).count() <= servers.len() / 2 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    within("a majority of servers have them queued", queued).await;
}

/// Waits until so many providers listen for messages.
pub(crate) async fn until_listening(server: &RedisServer, count: usize) {
    let channels = ["PUBSUB", "CHANNELS", "fencelock:wake:*"];
    until(server, &channels, |reply| reply.lines().count() == count).await;
}

/// Waits until the lock's key isn't there.
pub(crate) async fn until_free(server: &RedisServer, name: &str) {
    until(server, &["EXISTS", &lock_key(name)], |reply| reply == "0").await;
}

/// For how many milliseconds the lock's key stays.
pub(crate) fn pttl(server: &RedisServer, name: &str) -> i64 {
    server.command(&["PTTL", &lock_key(name)]).parse().expect("a number")
}

/// Waits until the lock has been renewed on the server.
pub(crate) async fn renewed(server: &RedisServer, name: &str) {
    let rises = async {
        // A grant of Redlock doesn't wait for the slowest of its servers.
        until(server, &["EXISTS", &lock_key(name)], |reply| reply == "1").await;
        let mut last = pttl(server, name);
        loop {
            sleep(Duration::from_millis(5)).await;
            let left = pttl(server, name);
            assert!(left > 0, "the lock is gone");
            if left > last + 20 {
                return;
            }
            last = left;
        }
    };
    within("a renewal", rises).await;
}
