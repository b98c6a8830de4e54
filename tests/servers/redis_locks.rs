//! What a Redis server shows of locks.

use std::time::Duration;

use fencelock::redis::lock_key;
use tokio::time::sleep;

use super::locks::within;
use super::redis::RedisServer;

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
