//! Servers that are there, and refuse.

use std::time::Instant;

use fencelock::{ErrorKind, LockGuard, LockOptions};
use tokio::time::sleep;

use crate::servers::locks::{SLACK, granted, take, waits, within};
use crate::servers::postgres::PostgresServer;
use crate::servers::redis::RawConnection;
use crate::stage::{Stage, impatient, ms, secs};

/// It is denied at once, and not tried again.
pub(crate) async fn wrong_password(stage: &Stage) {
    let url = stage.rig.wrong_password();
    let began = Instant::now();
    let error = within("an error", fencelock::connect(&url)).await.expect_err("the password is wrong");
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    assert!(!error.is_retryable());
    assert!(began.elapsed() < stage.look() + SLACK, "waiting doesn't mend it: {:?}", began.elapsed());
    stage.report("denied", began.elapsed());
}

/// It is a mistake in the URL.
pub(crate) async fn database_missing(stage: &Stage) {
    let url = stage.url(stage.kind.short_ttl);
    let (before, parameters) = url.split_once('?').expect("it has a TTL");
    let (server, _) = before.rsplit_once('/').expect("it has a database");
    let (missing, began) = (format!("{server}/missing?{parameters}"), Instant::now());
    let error =
        within("an error", fencelock::connect(&missing)).await.expect_err("there is no such database");
    assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    assert!(began.elapsed() < SLACK, "waiting doesn't mend it: {:?}", began.elapsed());
    stage.report("said", began.elapsed());
}

/// What each server replies to a command.
fn redis(stage: &Stage, command: &[&str]) -> Vec<String> {
    let reply = |addr| RawConnection::open(addr).and_then(|mut server| server.command(command));
    stage.rig.addrs().into_iter().map(|addr| reply(addr).expect("it is there")).collect()
}

/// A server may forget the scripts between any two steps.
pub(crate) async fn scripts_flushed(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let [a, b] = stage.providers(ttl).await;
    let flush = || assert!(redis(stage, &["SCRIPT", "FLUSH"]).iter().all(|reply| reply == "OK"));
    for name in ["x", "y"] {
        flush();
        let held = take(&a, name).await;
        flush();
        let waiter = waits(&b, name);
        stage.until_waiting(name, 1).await;
        for _ in 0..4 {
            flush();
            sleep(ttl / 3).await;
        }
        assert!(!held.is_lost() && !waiter.is_finished());
        flush();
        let guard = stage.hand_over(held, waiter, "the waiter after the release").await;
        flush();
        guard.release().await.expect("it is held");
    }
}

/// Servers that take no writes are not available, which is not the same as busy. What was held is still held if it ends
/// in time.
pub(crate) async fn writes_refused(stage: &Stage) {
    let set = |key: &str, value: &str| {
        assert!(redis(stage, &["CONFIG", "SET", key, value]).iter().all(|reply| reply == "OK"));
    };
    for refusal in ["MISCONF", "READONLY"] {
        let ttl = secs(10);
        let [a, b] = stage.providers(ttl).await;
        let held = take(&a, "held").await;
        if refusal == "MISCONF" {
            // As when its disk is full: it can't save.
            for reply in redis(stage, &["CONFIG", "GET", "dir"]) {
                std::fs::remove_dir_all(reply.lines().nth(1).expect("a path")).expect("it is the test's");
            }
            set("save", "3600 1");
            redis(stage, &["BGSAVE"]);
            let refuses =
                || redis(stage, &["SET", "unrelated", "1"]).iter().all(|reply| reply.starts_with("-MISCONF"));
            crate::servers::wait_until("no writes are taken", refuses);
        } else {
            redis(stage, &["REPLICAOF", "127.0.0.1", "1"]);
        }
        let error =
            within("an error", impatient(&b, "x").try_acquire()).await.expect_err("no writes are taken");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{refusal}: {error:?}");
        let (began, patience) = (Instant::now(), ms(500));
        let some = b.create_lock_with("x", LockOptions::new().retry_for(patience));
        let error = within("an error", some.acquire()).await.expect_err("no writes are taken");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{refusal}: {error:?}");
        assert!(began.elapsed() < patience + SLACK, "{refusal}: {:?}", began.elapsed());
        stage.report(&format!("{refusal}: the error (retry_for {patience:?})"), began.elapsed());
        let waiter = waits(&b, "x");
        sleep(ms(200)).await;
        assert!(!waiter.is_finished() && !held.is_lost());
        if refusal == "MISCONF" {
            set("save", "");
        } else {
            redis(stage, &["REPLICAOF", "NO", "ONE"]);
        }
        let ended = Instant::now();
        let (guard, at) = granted(waiter).await;
        let took = at.saturating_duration_since(ended);
        assert!(took < secs(1) + SLACK, "{refusal}: {took:?}");
        stage.report(&format!("{refusal}: the waiter after it"), took);
        guard.release().await.expect("it is held");
        held.release().await.expect("it is held");
    }
}

/// One more lock is an error of its own kind, and costs none of those that are held.
pub(crate) async fn lock_table_full(stage: &Stage) {
    let server = PostgresServer::options()
        .config("max_locks_per_transaction", "10")
        .config("max_connections", "20")
        .config("max_wal_senders", "0")
        .start();
    let provider =
        fencelock::connect(&format!("{}?ttl=2s", server.url())).await.expect("the server is there");
    let mut held: Vec<LockGuard> = Vec::new();
    let error = loop {
        assert!(held.len() < 5000, "the table is never full");
        match within("an answer", provider.create_lock(&held.len().to_string()).try_acquire()).await {
            Ok(guard) => held.push(guard.expect("it is free")),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
    let began = Instant::now();
    let error = within("an error", provider.create_lock("one more").acquire()).await.expect_err("it is full");
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
    assert!(began.elapsed() < SLACK, "waiting doesn't mend it: {:?}", began.elapsed());
    stage.report(&format!("the error with {} locks", held.len()), began.elapsed());
    // Heartbeats need no room.
    sleep(secs(2) + ms(700)).await;
    assert!(held.iter().all(|guard| !guard.is_lost()));
    for guard in held.drain(..40) {
        within("the release", guard.release()).await.expect("it is held");
    }
    take(&provider, "one more").await.release().await.expect("it is held");
    drop(held);
    within("the provider is closed", provider.close()).await.expect("it is closed");
}
