//! One PostgreSQL server, and what goes wrong with it, on the way to it, and with those who hold its locks.
//! `--nocapture` shows how long things took.

mod common;
mod servers;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::history::History;
use common::{ms, secs};
use fencelock::postgres::driver::{Config, NoTls};
use fencelock::postgres::{PostgresLocks, lock_key};
use fencelock::{
    DistributedLock, ErrorKind, FencingGate, LockGuard, LockOptions, LockProvider, Loss, Provider,
};
use servers::holder::{Holder, Step};
use servers::left_out;
use servers::locks::{Drawn, Fault, Random, SLACK, granted, judge, report, take, take_within, waits, within};
use servers::postgres::{DATABASE, PASSWORD, PostgresServer, USER};
use servers::postgres_locks::{
    backend_of, backends, is_about, terminate, until, until_all_free, until_announced, until_blocked,
    until_free,
};
use servers::proxy::Proxy;
use tokio::task::{JoinSet, block_in_place};
use tokio::time::timeout;

type Locks = Provider<PostgresLocks>;

/// Far longer than any test: what is free before is free for another reason.
const MINUTES: Duration = Duration::from_secs(300);

fn locks_as(user: &str, addr: SocketAddr) -> PostgresLocks {
    let mut config = Config::new();
    config.host(addr.ip().to_string()).port(addr.port()).user(user).password(PASSWORD).dbname(DATABASE);
    PostgresLocks::new(config)
}

fn locks(addr: SocketAddr) -> PostgresLocks {
    locks_as(USER, addr)
}

fn build(locks: PostgresLocks, options: LockOptions) -> Locks {
    Provider::builder(locks).options(options).build().expect("possible options")
}

fn provider(addr: SocketAddr, options: LockOptions) -> Locks {
    build(locks(addr), options)
}

fn with_ttl(addr: SocketAddr, ttl: Duration) -> Locks {
    provider(addr, LockOptions::new().ttl(ttl))
}

/// One whose waiters have no sessions of their own.
fn without_sessions(addr: SocketAddr, ttl: Duration) -> Locks {
    build(locks(addr).waiting_sessions(0), LockOptions::new().ttl(ttl))
}

/// Takes the lock by a provider that otherwise gives up at once, also where it has to connect first.
async fn take_patiently(provider: &Locks, name: &str) -> LockGuard {
    let lock = provider.create_lock_with(name, LockOptions::new().retry_for(secs(20)));
    within("the lock is taken", lock.acquire()).await.expect("the server is there")
}

fn holder_url(server: &PostgresServer, ttl: Duration) -> String {
    format!("{}?ttl={}s", server.url(), ttl.as_secs())
}

/// What a request about this lock contains.
fn key_bytes(name: &str) -> [u8; 8] {
    lock_key(name).to_be_bytes()
}

#[test]
#[ignore = "a process that other tests start"]
fn holder_process() {
    servers::holder::play();
}

// Holders and waiters that die.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_of_a_killed_holder_is_granted_at_once() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let mut holder = Holder::start(&holder_url(&server, MINUTES), "x");
    let dead = holder.holds().await;
    let provider = with_ttl(server.addr(), MINUTES);
    let waiter = waits(&provider, "x");
    until_blocked(&server, "x", 1).await;
    let killed = Instant::now();
    holder.kill();
    let (guard, at) = granted(waiter).await;
    assert!(guard.fencing_token() > dead);
    assert!(at - killed < SLACK, "{:?}", at - killed);
    report("after the holder was killed", at - killed);
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_without_a_session_has_the_lock_of_a_killed_holder_within_half_a_second() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let mut holder = Holder::start(&holder_url(&server, MINUTES), "x");
    let dead = holder.holds().await;
    let provider = without_sessions(server.addr(), MINUTES);
    let waiter = waits(&provider, "x");
    until_announced(&server, 1).await;
    let killed = Instant::now();
    holder.kill();
    let (guard, at) = granted(waiter).await;
    assert!(guard.fencing_token() > dead);
    assert!(at - killed < ms(500) + SLACK, "{:?}", at - killed);
    report("without a session, after the holder was killed", at - killed);
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_waiter_is_passed_over_at_once() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let [holder, next] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let held = take(&holder, "x").await;
    let mut first = Holder::start(&holder_url(&server, MINUTES), "x");
    until_blocked(&server, "x", 1).await;
    let waiter = waits(&next, "x");
    until_blocked(&server, "x", 2).await;
    first.kill();
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    report("past a killed waiter", at - released);
    guard.release().await.unwrap();
    until_free(&server, "x").await;
}

/// The server looks once a second whether those who wait are still there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_waiter_leaves_the_line_although_nobody_releases() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = with_ttl(server.addr(), MINUTES);
    let held = take(&provider, "x").await;
    let mut waiter = Holder::start(&holder_url(&server, MINUTES), "x");
    until_blocked(&server, "x", 1).await;
    let killed = Instant::now();
    waiter.kill();
    until_blocked(&server, "x", 0).await;
    assert!(killed.elapsed() < secs(1) + SLACK, "{:?}", killed.elapsed());
    report("a killed waiter is gone from the line", killed.elapsed());
    held.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_waiter_is_passed_over_within_its_ttl_and_gets_its_turn_later() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(2);
    let server = PostgresServer::start();
    let [holder, next] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let held = take(&holder, "x").await;
    let mut first = Holder::start(&holder_url(&server, ttl), "x");
    until_blocked(&server, "x", 1).await;
    let waiter = waits(&next, "x");
    until_blocked(&server, "x", 2).await;
    first.freeze();
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < ttl + SLACK, "{:?}", at - released);
    report("past a frozen waiter (ttl 2 s)", at - released);

    // It was handed the lock, which is over by now: it must not believe that it has it.
    first.thaw();
    until_blocked(&server, "x", 1).await;
    assert!(first.is_silent());
    let token = guard.fencing_token();
    guard.release().await.unwrap();
    assert!(first.holds().await > token);
}

// A holder that was frozen.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_was_frozen_for_too_long_sees_it_before_its_next_step() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(2);
    let server = PostgresServer::start();
    let mut holder = Holder::start(&holder_url(&server, ttl), "x");
    let stale = holder.holds().await;
    holder.tell_to_step();
    assert_eq!(holder.stepped().await, Step::Done);
    let provider = with_ttl(server.addr(), ttl);
    let waiter = waits(&provider, "x");
    until_blocked(&server, "x", 1).await;
    holder.freeze();
    let frozen = Instant::now();
    let (guard, at) = granted(waiter).await;
    // The last heartbeat was at most a third of the TTL ago, and the deadline is counted from there.
    assert!(at - frozen > ttl / 2 && at - frozen < ttl + SLACK, "{:?}", at - frozen);
    report("after the holder was frozen (ttl 2 s)", at - frozen);

    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).unwrap();
    holder.tell_to_step();
    holder.thaw();
    assert_eq!(holder.stepped().await, Step::SawTheLoss);
    let refused = gate.enter(stale, |()| panic!("a stale write")).unwrap_err();
    assert_eq!((refused.offered, refused.highest), (stale, guard.fencing_token()));
    // Whatever it sent when it woke up, it isn't its lock.
    tokio::time::sleep(ttl + ttl / 3).await;
    assert!(!guard.is_lost());
    guard.release().await.unwrap();
}

// Sessions that end.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_shared_session_is_the_loss_of_all_its_locks_at_once_and_of_nothing_else() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = with_ttl(server.addr(), MINUTES);
    let others = provider.create_lock_with("other", LockOptions::new().ttl(MINUTES * 2));
    let other = within("the lock", others.acquire()).await.unwrap();
    for round in 0..5 {
        let mut held = Vec::new();
        for name in ["x", "y", "z"] {
            held.push(take(&provider, name).await);
        }
        let backend = backend_of(&server, "x", true);
        assert_eq!(backend, backend_of(&server, "z", true), "they share a session");
        let ended = Instant::now();
        terminate(&server, backend);
        for guard in &held {
            assert_eq!(within("the loss", guard.lost()).await, Loss::SessionEnded);
        }
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
        report(&format!("round {round}: three losses after the end of their session"), ended.elapsed());
        let again = take(&provider, "x").await;
        report(&format!("round {round}: the lock again"), ended.elapsed());
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
        assert!(held.iter().all(|guard| guard.fencing_token() < again.fencing_token()));
        for guard in held {
            assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
        }
        // What was lost frees nothing of what was made later.
        assert!(provider.create_lock("x").try_acquire().await.unwrap().is_none());
        again.release().await.unwrap();
        until_free(&server, "x").await;
    }
    assert!(!other.is_lost());
    other.release().await.unwrap();
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_session_ends_has_the_lock_in_the_end() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let [holder, waiting] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let held = take(&holder, "x").await;
    let waiter = waits(&waiting, "x");
    for round in 0..5 {
        until_blocked(&server, "x", 1).await;
        let backend = backend_of(&server, "x", false);
        let ended = Instant::now();
        terminate(&server, backend);
        let is_another = |found: &str| found.parse::<u32>().is_ok_and(|found| found != backend);
        let sql = format!("SELECT max(pid) FROM pg_locks WHERE {} AND NOT granted", is_about("x"));
        until(&server, &sql, is_another).await;
        report(&format!("round {round}: it waits again after the end of its session"), ended.elapsed());
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
    }
    let (token, released) = (held.fencing_token(), Instant::now());
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    assert!(guard.fencing_token() > token);

    // Now that session holds it.
    terminate(&server, backend_of(&server, "x", true));
    let ended = Instant::now();
    assert_eq!(within("the loss", guard.lost()).await, Loss::SessionEnded);
    assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
    let again = take(&waiting, "x").await;
    assert!(again.fencing_token() > guard.fencing_token());
    again.release().await.unwrap();
    drop(guard);
    until_all_free(&server).await;
}

/// The announcements are gone with the session, and nobody else wakes a waiter without one of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_without_a_session_survives_the_end_of_the_one_it_listens_on() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let (holder, waiting) = (with_ttl(server.addr(), MINUTES), without_sessions(server.addr(), MINUTES));
    let held = take(&holder, "x").await;
    let waiter = waits(&waiting, "x");
    until_announced(&server, 1).await;
    let holders = backend_of(&server, "x", true);
    let listens = backends(&server).into_iter().find(|backend| *backend != holders).expect("there are two");
    terminate(&server, listens);
    until_announced(&server, 1).await;
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < ms(500) + SLACK, "{:?}", at - released);
    report("without a session, after the end of another", at - released);
    guard.release().await.unwrap();
    until_all_free(&server).await;
}

// Servers that restart or stand still.

#[derive(Clone, Copy, Debug, PartialEq)]
enum Restart {
    /// One of its processes is killed, so it starts anew by itself.
    Crash,
    Kill,
    Stop,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_is_a_loss_at_once_and_no_more_than_that() {
    if left_out("postgres") {
        return;
    }
    for restart in [Restart::Crash, Restart::Kill, Restart::Stop] {
        let server = PostgresServer::start();
        let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
        let c = without_sessions(server.addr(), MINUTES);
        let held = take(&a, "x").await;
        let other = take(&c, "other").await;
        let blocked = waits(&b, "x");
        until_blocked(&server, "x", 1).await;
        let announced = waits(&c, "x");
        until_announced(&server, 1).await;
        let began = Instant::now();
        match restart {
            // Not the one that holds anything.
            Restart::Crash => server.crash_backend(backend_of(&server, "x", false)),
            Restart::Kill => server.kill(),
            Restart::Stop => server.stop_fast(),
        }
        for guard in [&held, &other] {
            assert_eq!(within("the loss", guard.lost()).await, Loss::SessionEnded, "{restart:?}");
        }
        // A stop takes until all have ended, and a crash until it has recovered.
        report(&format!("{restart:?}: the losses"), began.elapsed());
        if restart != Restart::Crash {
            assert!(began.elapsed() < SLACK, "{restart:?}: {:?}", began.elapsed());
            server.restart();
        }
        let up = Instant::now();
        assert_eq!(held.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
        let history = History::default();
        let mut waiters = JoinSet::new();
        waiters.spawn(granted(blocked));
        waiters.spawn(granted(announced));
        while let Some(next) = waiters.join_next().await {
            let (guard, at) = next.unwrap();
            report(&format!("{restart:?}: a waiter has it"), at.saturating_duration_since(up));
            assert!(at.saturating_duration_since(up) < secs(2) + SLACK, "{restart:?}");
            history.hold(guard, ms(5)).await.unwrap();
        }
        assert_eq!(history.judge(), 2);
        take(&a, "x").await.release().await.unwrap();
        until_all_free(&server).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_down_for_too_long_is_unavailable() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let patience = ms(800);
    let options = LockOptions::new().ttl(MINUTES);
    let some = provider(server.addr(), options.clone().retry_for(patience));
    let impatient = provider(server.addr(), options.clone().retry_for(Duration::ZERO));
    let patient = provider(server.addr(), options);
    let held = take_patiently(&some, "x").await;
    take_patiently(&impatient, "y").await.release().await.unwrap();
    let waiting = some.create_lock("z");
    let other = take(&patient, "z").await;
    let waiter = tokio::spawn(async move { waiting.acquire().await });
    until_blocked(&server, "z", 1).await;
    server.kill();
    let down = Instant::now();
    let error = within("an error", waiter).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "of who waited: {error:?}");
    assert!(down.elapsed() < patience + SLACK, "{:?}", down.elapsed());
    report("the error of who waited (retry_for 800 ms)", down.elapsed());
    for kind in ["try", "acquire", "timed"] {
        for (provider, patience) in [(&some, patience), (&impatient, Duration::ZERO)] {
            let (began, lock) = (Instant::now(), provider.create_lock("new"));
            let error = match kind {
                "try" => within("an error", lock.try_acquire()).await.map(drop).unwrap_err(),
                "timed" => within("an error", lock.try_acquire_for(secs(20))).await.map(drop).unwrap_err(),
                _ => within("an error", lock.acquire()).await.map(drop).unwrap_err(),
            };
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{kind}: {error:?}");
            assert!(began.elapsed() < patience + SLACK, "{kind}: {:?}", began.elapsed());
            report(&format!("the error of {kind} (retry_for {patience:?})"), began.elapsed());
        }
    }
    assert_eq!((held.is_lost(), other.is_lost()), (true, true));
    assert_eq!(held.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
    let waiter = waits(&patient, "x");
    server.restart();
    granted(waiter).await.0.release().await.unwrap();
    take_patiently(&some, "x").await.release().await.unwrap();
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_for_a_moment_changes_nothing() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(3);
    let server = PostgresServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_blocked(&server, "x", 1).await;
    for _ in 0..2 {
        server.freeze();
        tokio::time::sleep(secs(1) + ms(500)).await;
        server.thaw();
        tokio::time::sleep(ttl / 3).await;
        assert!(!held.is_lost());
    }
    tokio::time::sleep(ttl).await;
    let history = History::default();
    let released = Instant::now();
    history.hold(held, ms(0)).await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    history.hold(guard, ms(0)).await.unwrap();
    assert_eq!(history.judge(), 2);
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_for_longer_than_the_ttl_never_has_two_holders() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(2);
    let server = PostgresServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let c = without_sessions(server.addr(), ttl);
    let d = provider(server.addr(), LockOptions::new().ttl(ttl).retry_for(Duration::ZERO));
    for (provider, name) in [(&b, "b"), (&c, "c"), (&d, "d")] {
        take_patiently(provider, name).await.release().await.unwrap();
    }
    let before = Instant::now();
    let held = take(&a, "x").await;
    let blocked = waits(&b, "x");
    until_blocked(&server, "x", 1).await;
    let announced = waits(&c, "x");
    until_announced(&server, 1).await;
    let near = Instant::now();
    server.freeze();
    let frozen = Instant::now();
    // A claim that is carried out when nobody expects it any more.
    let late = tokio::spawn({
        let lock = d.create_lock("late");
        async move { lock.try_acquire().await }
    });
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    let lost = Instant::now();
    assert!(lost - before >= ttl && lost - frozen < ttl + SLACK, "{:?}", lost - frozen);
    assert!(lost - near > ttl / 2, "{:?}", lost - near);
    report("the loss while the server stands still (ttl 2 s)", lost - frozen);
    let error = within("the error", late).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error:?}");
    tokio::time::sleep((2 * ttl).saturating_sub(frozen.elapsed())).await;
    let thawed = Instant::now();
    server.thaw();
    let history = History::default();
    let mut waiters = JoinSet::new();
    waiters.spawn(granted(blocked));
    waiters.spawn(granted(announced));
    while let Some(next) = waiters.join_next().await {
        let (guard, at) = next.unwrap();
        assert!(at >= thawed && guard.fencing_token() > held.fencing_token());
        report("a waiter after a server stood still for 4 s (ttl 2 s)", at - thawed);
        history.hold(guard, ms(5)).await.unwrap();
    }
    assert_eq!(history.judge(), 2);
    take(&a, "x").await.release().await.unwrap();
    take_patiently(&d, "late").await.release().await.unwrap();
    drop(held);
    until_all_free(&server).await;
    report("nothing is left", thawed.elapsed());
}

/// The claim is carried out after its client has given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_grant_is_taken_back_soon() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let a = provider(server.addr(), LockOptions::new().ttl(MINUTES).retry_for(Duration::ZERO));
    let b = with_ttl(server.addr(), MINUTES);
    take_patiently(&a, "x").await.release().await.unwrap();
    take(&b, "y").await.release().await.unwrap();
    server.freeze();
    let error = within("the error", a.create_lock("x").try_acquire()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error:?}");
    tokio::time::sleep(secs(1)).await;
    server.thaw();
    let thawed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(thawed.elapsed() < secs(5), "{:?}", thawed.elapsed());
    report("free after a late grant", thawed.elapsed());
    guard.release().await.unwrap();
    until_all_free(&server).await;
}

// The network.

/// Nothing is lost here but time: a connection that has lost something is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_network_does_for_less_than_the_ttl_is_no_loss() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(3);
    let server = Arc::new(PostgresServer::start());
    let mut cases = JoinSet::new();
    let by = ms(400);
    for fault in [Fault::HoldRequests, Fault::HoldReplies, Fault::DelayRequests(by), Fault::DelayReplies(by)]
    {
        let server = server.clone();
        cases.spawn(async move {
            let proxy = Proxy::start(server.addr());
            let (provider, name) = (with_ttl(proxy.addr(), ttl), format!("{fault:?}"));
            let held = take(&provider, &name).await;
            let backend = backend_of(&server, &name, true);
            for _ in 0..3 {
                let before = proxy.traffic();
                fault.begin(&proxy);
                // A heartbeat is stuck.
                match fault {
                    Fault::HoldReplies | Fault::DelayReplies(_) => {
                        proxy.until(|traffic| traffic.commands > before.commands).await
                    }
                    _ => proxy.until(|traffic| traffic.waiting > 0).await,
                };
                tokio::time::sleep(ttl / 6).await;
                Fault::end(&proxy);
                proxy.until(|traffic| traffic.replies > before.replies).await;
                assert!(!held.is_lost(), "{fault:?}: {:?}", held.lost().await);
            }
            tokio::time::sleep(ttl + ttl / 3).await;
            assert!(!held.is_lost(), "{fault:?}");
            assert_eq!(backend_of(&server, &name, true), backend, "{fault:?}");
            held.release().await.unwrap();
            until_free(&server, &name).await;
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_network_does_for_longer_than_the_ttl_is_a_loss_on_time() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(2);
    let server = Arc::new(PostgresServer::start());
    let mut cases = JoinSet::new();
    for fault in [
        Fault::HoldRequests,
        Fault::HoldReplies,
        Fault::CutRequests,
        Fault::CutReplies,
        Fault::DelayRequests(2 * ttl),
        Fault::DelayReplies(2 * ttl),
    ] {
        let server = server.clone();
        cases.spawn(async move {
            let proxy = Proxy::start(server.addr());
            let (provider, other) = (with_ttl(proxy.addr(), ttl), with_ttl(server.addr(), ttl));
            let name = format!("{fault:?}");
            let before = Instant::now();
            let held = Arc::new(take(&provider, &name).await);
            fault.begin(&proxy);
            let after = Instant::now();
            let waiter = tokio::spawn({
                let (lock, held) = (other.create_lock(&name), held.clone());
                async move {
                    let guard = lock.acquire().await.expect("granted in the end");
                    assert!(held.is_lost(), "two at once");
                    (guard, Instant::now())
                }
            });
            assert_eq!(within("the loss", held.lost()).await, Loss::Expired, "{fault:?}");
            let lost = Instant::now();
            assert!(lost - before >= ttl && lost - after < ttl + SLACK, "{fault:?}: {:?}", lost - after);
            // In the worst case a last heartbeat has reached the server just before the loss.
            let (guard, at) = granted(waiter).await;
            assert!(at - after < 2 * ttl + SLACK, "{fault:?}: {:?}", at - after);
            report(&format!("the next holder during a {fault:?} (ttl 2 s)"), at - after);
            assert!(guard.fencing_token() > held.fencing_token());

            // What comes late changes nothing.
            let backend = backend_of(&server, &name, true);
            Fault::end(&proxy);
            let healed = Instant::now();
            proxy.until(|traffic| traffic.waiting == 0).await;
            tokio::time::sleep(ttl / 2).await;
            assert_eq!(backend_of(&server, &name, true), backend, "{fault:?}");
            assert!(!guard.is_lost());
            guard.release().await.unwrap();
            let again = take(&provider, &name).await;
            report(&format!("the old holder again, after a {fault:?}"), healed.elapsed());
            again.release().await.unwrap();
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_whose_reply_is_lost_is_given_back_soon() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let a = provider(proxy.addr(), LockOptions::new().ttl(MINUTES).retry_for(Duration::ZERO));
    let b = with_ttl(server.addr(), MINUTES);
    take_patiently(&a, "x").await.release().await.unwrap();

    // The connection stays, but nothing is heard on it.
    proxy.drop_reply_to(&key_bytes("x"));
    let began = Instant::now();
    let error = within("the error", a.create_lock("x").try_acquire()).await.unwrap_err();
    assert_eq!((error.kind(), proxy.is_aiming()), (ErrorKind::Unknown, false), "{error:?}");
    report("the error after the reply to a grant was lost", began.elapsed());
    let failed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(failed.elapsed() < secs(5), "{:?}", failed.elapsed());
    report("free after the reply to a grant was lost", failed.elapsed());
    guard.release().await.unwrap();
    take_patiently(&a, "x").await.release().await.unwrap();
    report("the same client again", failed.elapsed());

    // The connection is reset instead.
    proxy.reset_in_reply_to(&key_bytes("x"), 0);
    let error = within("the error", a.create_lock("x").try_acquire()).await.unwrap_err();
    assert_eq!((error.kind(), proxy.is_aiming()), (ErrorKind::Unknown, false), "{error:?}");
    let failed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(failed.elapsed() < secs(5), "{:?}", failed.elapsed());
    guard.release().await.unwrap();

    // Who waits gets it after all.
    let patient = with_ttl(proxy.addr(), MINUTES);
    take(&patient, "x").await.release().await.unwrap();
    for bytes in [None, Some(0)] {
        match bytes {
            None => proxy.drop_reply_to(&key_bytes("x")),
            Some(bytes) => proxy.reset_in_reply_to(&key_bytes("x"), bytes),
        }
        let began = Instant::now();
        let guard = take(&patient, "x").await;
        assert!(!proxy.is_aiming() && began.elapsed() < secs(15), "{:?}", began.elapsed());
        report("the lock for one who waits, although a reply was lost", began.elapsed());
        guard.release().await.unwrap();
    }
    until_all_free(&server).await;
}

/// The server doesn't hear that the connection is closed, either: somebody has to tell it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_the_server_believes_in_is_ended_by_the_provider() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let a = provider(proxy.addr(), LockOptions::new().ttl(MINUTES).retry_for(Duration::ZERO));
    let b = with_ttl(server.addr(), MINUTES);
    let held = take_patiently(&a, "held").await;
    let orphan = backend_of(&server, "held", true);
    // What comes after this on its connection stays on its way, the end of the connection included.
    proxy.hold_requests_with(&key_bytes("stuck"));
    proxy.drop_reply_to(&key_bytes("x"));
    let before = proxy.traffic();
    let [x, stuck] = ["x", "stuck"].map(|name| a.create_lock(name));
    let x = tokio::spawn(async move { x.try_acquire().await });
    proxy.until(|traffic| traffic.lost_replies > before.lost_replies).await;
    let stuck = tokio::spawn(async move { stuck.try_acquire().await });
    proxy.until(|traffic| traffic.waiting > 0).await;
    for claim in [x, stuck] {
        let error = within("the error", claim).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unknown, "{error:?}");
    }
    let failed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(failed.elapsed() < secs(5), "{:?}", failed.elapsed());
    report("free after the server was asked to end a session", failed.elapsed());
    assert!(!backends(&server).contains(&orphan));
    assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded);
    guard.release().await.unwrap();
    proxy.release_requests();
    take_patiently(&a, "stuck").await.release().await.unwrap();
    take_patiently(&a, "x").await.release().await.unwrap();
    drop(held);
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_grant_is_cut_short_has_the_lock_in_the_end() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let (a, b) = (with_ttl(server.addr(), MINUTES), with_ttl(proxy.addr(), MINUTES));
    for _ in 0..4 {
        let held = take(&a, "x").await;
        let waiter = waits(&b, "x");
        until_blocked(&server, "x", 1).await;
        // The answer to a wait that is under way can't be aimed at: all that is on its way is lost.
        proxy.hold_replies();
        let token = held.fencing_token();
        held.release().await.unwrap();
        let granted_to = format!("SELECT count(*) FROM pg_locks WHERE {} AND granted", is_about("x"));
        until(&server, &granted_to, |found| found == "1").await;
        let reset = Instant::now();
        proxy.reset_all();
        proxy.release_replies();
        let (guard, at) = granted(waiter).await;
        assert!(at - reset < SLACK, "{:?}", at - reset);
        assert!(guard.fencing_token() > token);
        report("a waiter whose grant was cut short", at - reset);
        guard.release().await.unwrap();
    }
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_whose_reply_is_lost_frees_the_lock_and_is_no_obstacle() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let a = with_ttl(proxy.addr(), MINUTES);
    let b = with_ttl(server.addr(), MINUTES);
    for reset in [true, false] {
        let held = take(&a, "x").await;
        if reset {
            proxy.reset_in_reply_to(&key_bytes("x"), 0);
        } else {
            proxy.drop_reply_to(&key_bytes("x"));
        }
        let began = Instant::now();
        let token = held.fencing_token();
        let release = tokio::spawn(held.release());
        servers::wait_until("the release is on its way", || !proxy.is_aiming());
        let guard = take(&b, "x").await;
        report(&format!("free although the reply to its release was lost (reset: {reset})"), began.elapsed());
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        assert!(guard.fencing_token() > token);
        let released = within("the release", release).await.unwrap();
        report(&format!("the release says {released:?}"), began.elapsed());
        // If it was tried again, it hasn't freed what is another's.
        assert!(!guard.is_lost());
        guard.release().await.unwrap();
        let again = take(&a, "x").await;
        assert!(began.elapsed() < secs(20), "{:?}", began.elapsed());
        report("the same client again", began.elapsed());
        again.release().await.unwrap();
    }
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_reset_in_mid_frame_is_never_used_again() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let provider = with_ttl(proxy.addr(), secs(3));
    take(&provider, "x").await.release().await.unwrap();
    let mut last = take(&provider, "x").await;
    for bytes in [0, 1, 4, 9, 20, 40] {
        let token = last.fencing_token();
        last.release().await.unwrap();
        let before = proxy.traffic();
        proxy.reset_in_reply_to(&key_bytes("x"), bytes);
        let began = Instant::now();
        last = take(&provider, "x").await;
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        report(&format!("a grant, reset after {bytes} bytes of the first reply"), began.elapsed());
        assert!(last.fencing_token() > token && !proxy.is_aiming());
        let now = proxy.traffic();
        assert!(now.connections - before.connections <= 3, "{before:?} {now:?}");
        assert!(now.connections > before.connections);
    }
    // In the middle of the answer to a heartbeat.
    for bytes in [0, 3, 12] {
        // The next reply may be to a heartbeat of another session, which holds nothing.
        let loss = async {
            loop {
                proxy.reset_in_reply(bytes);
                if let Ok(loss) = timeout(secs(4), last.lost()).await {
                    return loss;
                }
            }
        };
        assert_eq!(within("the loss", loss).await, Loss::SessionEnded);
        assert!(!proxy.is_aiming());
        let again = take(&provider, "x").await;
        assert!(again.fencing_token() > last.fencing_token());
        assert_eq!(last.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
        last = again;
    }
    last.release().await.unwrap();
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_network_is_only_slow() {
    if left_out("postgres") {
        return;
    }
    let ttl = secs(5);
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    proxy.delay_requests(ms(100));
    proxy.delay_replies(ms(100));
    let slow = with_ttl(proxy.addr(), ttl);
    let fast = with_ttl(server.addr(), ttl);
    let history = History::default();
    let began = Instant::now();
    let held = take(&slow, "x").await;
    report("the first grant, with 200 ms for a round trip", began.elapsed());
    let waiter = waits(&fast, "x");
    until_blocked(&server, "x", 1).await;
    history.hold(held, ttl + secs(1)).await.unwrap();
    let (guard, _) = granted(waiter).await;
    let began = Instant::now();
    assert!(within("the timeout", slow.create_lock("x").try_acquire_for(secs(1))).await.unwrap().is_none());
    assert!(began.elapsed() < secs(1) + SLACK, "{:?}", began.elapsed());
    let waiter = waits(&slow, "x");
    until_blocked(&server, "x", 1).await;
    history.hold(guard, ms(10)).await.unwrap();
    let (guard, _) = granted(waiter).await;
    history.hold(guard, ttl + secs(1)).await.unwrap();
    assert_eq!(history.judge(), 3);
    until_all_free(&server).await;
}

// Waits that end.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_that_are_given_up_leave_nothing_behind() {
    const ROUNDS: u64 = 100;
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let [holder, waiting] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let names = ["a", "b", "c", "d", "e"];
    let mut held = Vec::new();
    for name in names {
        held.push(take(&holder, name).await);
    }
    let give_up = async || {
        let mut all = JoinSet::new();
        for (place, name) in names.into_iter().enumerate() {
            let lock = waiting.create_lock(name);
            all.spawn(async move {
                for round in 0..ROUNDS {
                    let time = ms((round * 7 + place as u64) % 25);
                    if round % 2 == 0 {
                        assert!(take_within(&lock, time).await.is_none());
                    } else {
                        assert!(tokio::time::timeout(time, lock.acquire()).await.is_err());
                    }
                }
            });
        }
        while let Some(one) = all.join_next().await {
            one.unwrap();
        }
    };
    let began = Instant::now();
    give_up().await;
    for name in names {
        until_blocked(&server, name, 0).await;
    }
    until_announced(&server, 0).await;
    report("500 waits that were given up", began.elapsed());
    // All sessions that it may have are there: as many wait at the same time.
    let longer: Vec<_> = names.iter().map(|name| waits(&waiting, name)).collect();
    let blocked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    until(&server, blocked, |count| count == "3").await;
    for waiter in longer {
        waiter.abort();
    }
    until(&server, blocked, |count| count == "0").await;
    let before = backends(&server);
    assert_eq!(before.len(), 5, "one that holds, one that tries, three that wait");
    give_up().await;
    for name in names {
        until_blocked(&server, name, 0).await;
    }
    until_announced(&server, 0).await;
    assert_eq!(backends(&server), before, "sessions are used again");
    for guard in held {
        guard.release().await.unwrap();
    }
    for name in names {
        take(&waiting, name).await.release().await.unwrap();
    }
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_ends_as_the_lock_is_released_leaves_nothing_behind() {
    const ROUNDS: u64 = 400;
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let (holder, waiting) = (with_ttl(server.addr(), MINUTES), with_ttl(proxy.addr(), MINUTES));
    let history = Arc::new(History::default());
    let (mut got, mut missed) = (0, 0);
    // All that it needs is there.
    let held = take(&holder, "x").await;
    let waiter = waits(&waiting, "x");
    until_blocked(&server, "x", 1).await;
    held.release().await.unwrap();
    granted(waiter).await.0.release().await.unwrap();
    let before = proxy.connections();
    for round in 0..ROUNDS {
        let held = take(&holder, "x").await;
        let (lock, theirs) = (waiting.create_lock("x"), history.clone());
        let waiter = tokio::spawn(async move {
            match take_within(&lock, ms(8)).await {
                Some(guard) => theirs.hold(guard, ms(0)).await.map(|()| true).unwrap(),
                None => false,
            }
        });
        // From well before the end of the wait until well after.
        history.hold(held, Duration::from_micros(5_000 + round * 97 % 5_000)).await.unwrap();
        if within("the waiter", waiter).await.unwrap() {
            got += 1;
        } else {
            missed += 1;
        }
    }
    println!("{got} in time, {missed} too late");
    assert_eq!(history.judge() as u64, ROUNDS + got);
    until_all_free(&server).await;
    let connections = proxy.connections() - before;
    assert!(connections <= 3, "sessions are used again, not {connections} made");
}

/// Opening a session takes longer than anybody waits, and still somebody gets to use it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_waits_over_a_slow_network_open_few_connections() {
    const WAITS: u64 = 60;
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let proxy = Proxy::start(server.addr());
    let (holder, waiting) = (with_ttl(server.addr(), MINUTES), with_ttl(proxy.addr(), MINUTES));
    let held = take(&holder, "x").await;
    take(&waiting, "y").await.release().await.unwrap();
    proxy.delay_requests(ms(10));
    proxy.delay_replies(ms(10));
    let before = proxy.connections();
    let lock = waiting.create_lock("x");
    for _ in 0..WAITS {
        assert!(take_within(&lock, ms(30)).await.is_none());
    }
    let connections = proxy.connections() - before;
    println!("{connections} connections for {WAITS} short waits");
    assert!(connections <= 6, "{connections} connections for {WAITS} short waits");
    held.release().await.unwrap();
    until_all_free(&server).await;
}

// Fencing tokens.

/// Several providers that take and release locks until they are told to stop.
struct Loops {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    tasks: JoinSet<(usize, Vec<Drawn>)>,
}

impl Loops {
    const NAMES: usize = 3;
    const PROVIDERS: usize = 3;

    fn start(server: &PostgresServer) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        for _ in 0..Self::PROVIDERS {
            let provider = Arc::new(with_ttl(server.addr(), secs(20)));
            for name in 0..Self::NAMES {
                let (provider, stop, count) = (provider.clone(), stop.clone(), count.clone());
                tasks.spawn(async move {
                    let (lock, mut drawn) = (provider.create_lock(&name.to_string()), Vec::new());
                    while !stop.load(Ordering::Relaxed) {
                        let asked = Instant::now();
                        let Ok(Some(guard)) = lock.try_acquire_for(secs(5)).await else { continue };
                        drawn.push(Drawn { token: guard.fencing_token(), asked, got: Instant::now() });
                        count.fetch_add(1, Ordering::Relaxed);
                        let _ = guard.release().await; // it may be lost
                    }
                    (name, drawn)
                });
            }
        }
        Self { stop, count, tasks }
    }

    /// Waits for so many more grants.
    async fn until_more(&self, grants: usize) {
        let wanted = self.count.load(Ordering::Relaxed) + grants;
        let reached = async {
            while self.count.load(Ordering::Relaxed) < wanted {
                tokio::time::sleep(ms(1)).await;
            }
        };
        within("some grants", reached).await;
    }

    /// Ends them. Tokens of a name must be distinct, and rise where it is certain which was drawn first.
    async fn judge(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let mut names = vec![Vec::new(); Self::NAMES];
        while let Some(task) = within("a loop ends", self.tasks.join_next()).await {
            let (name, drawn) = task.expect("it doesn't panic");
            names[name].extend(drawn);
        }
        names.iter().map(|drawn| judge(drawn)).sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_over_crashes_of_the_server() {
    const CRASHES: usize = 20;
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options().durable().start();
    let loops = Loops::start(&server);
    let mut random = Random::new();
    for crash in 0..CRASHES {
        loops.until_more(20).await;
        tokio::time::sleep(ms(random.below(300))).await;
        if crash % 4 == 3 {
            let sessions = backends(&server);
            let victim = sessions.iter().nth(usize::try_from(random.below(sessions.len() as u64)).unwrap());
            block_in_place(|| server.crash_backend(*victim.expect("there are sessions")));
        } else {
            block_in_place(|| server.restart());
        }
    }
    loops.until_more(20).await;
    println!("{} grants over {CRASHES} crashes", loops.judge().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_when_the_servers_clock_is_moved() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start_with_clock();
    let loops = Loops::start(&server);
    for offset in [0, 3600, 0, -3600, 7200, -7200, 1, 0] {
        server.set_clock_offset(offset);
        loops.until_more(200).await;
    }
    println!("{} grants with a clock that was moved", loops.judge().await);
    until_all_free(&server).await;
}

// Many locks.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_locks_take_four_connections() {
    const LOCKS: usize = 1000;
    const WAITED_FOR: usize = 20;
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let other = with_ttl(server.addr(), MINUTES);
    for closes in [false, true] {
        let provider = with_ttl(server.addr(), MINUTES);
        let mut others = Vec::new();
        for i in 0..WAITED_FOR {
            others.push(take(&other, &format!("waited for {i}")).await);
        }
        let mut claims = JoinSet::new();
        let began = Instant::now();
        for i in 0..LOCKS {
            let lock = provider.create_lock(&format!("held {i}"));
            claims.spawn(async move { lock.acquire().await.expect("it is free") });
        }
        let mut held = within("all are held", claims.join_all()).await;
        report("a thousand locks taken", began.elapsed());
        let theirs = backend_of(&server, "waited for 0", true);
        let ours = || backends(&server).into_iter().filter(|backend| *backend != theirs).count();
        assert_eq!(ours(), 1);
        let waiters: Vec<_> = (0..WAITED_FOR).map(|i| waits(&provider, &format!("waited for {i}"))).collect();
        until_announced(&server, WAITED_FOR - 3).await;
        assert_eq!(ours(), 4);
        let released = Instant::now();
        drop(others);
        for waiter in waiters {
            held.push(granted(waiter).await.0);
        }
        report("twenty waiters served", released.elapsed());
        assert!(released.elapsed() < secs(5), "{:?}", released.elapsed());
        assert!(ours() <= 4, "{}", ours());
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'";
        until(&server, sql, |count| count == (LOCKS + WAITED_FOR).to_string()).await;
        assert!(held.iter().all(|guard| !guard.is_lost()));
        let ended = Instant::now();
        drop(held);
        if closes {
            within("the provider is closed", provider.close()).await.unwrap();
            until_all_free(&server).await;
            until(&server, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'", |count| {
                count == "1"
            })
            .await;
        }
        until_all_free(&server).await;
        report(&format!("all are free (close: {closes})"), ended.elapsed());
        assert!(ended.elapsed() < secs(10), "{:?}", ended.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_names_can_be_waited_for_at_once() {
    const NAMES: usize = 200;
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let [holder, waiting] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let mut held = Vec::new();
    for i in 0..NAMES {
        held.push(take(&holder, &i.to_string()).await);
    }
    let waiters: Vec<_> = (0..NAMES).map(|i| waits(&waiting, &i.to_string())).collect();
    until_announced(&server, NAMES - 3).await;
    assert!(backends(&server).len() <= 5, "{:?}", backends(&server));
    let released = Instant::now();
    drop(held);
    for waiter in waiters {
        let (guard, at) = granted(waiter).await;
        assert!(at - released < secs(5), "{:?}", at - released);
        drop(guard);
    }
    report("two hundred waiters served", released.elapsed());
    until_all_free(&server).await;
    assert!(backends(&server).len() <= 5, "{:?}", backends(&server));
}

// What administrators do to users and servers.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_role_has_set_changes_nothing() {
    const ROLE_SETTINGS: [&str; 7] = [
        "lock_timeout = '1s'",
        "statement_timeout = '2s'",
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "idle_session_timeout = '1s'",
        "idle_in_transaction_session_timeout = '1s'",
        "search_path = 'nowhere'",
    ];
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for setting in ROLE_SETTINGS {
        server.sql(&format!("ALTER ROLE {USER} SET {setting}"));
    }
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), secs(20)));
    let c = without_sessions(server.addr(), secs(20));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_blocked(&server, "x", 1).await;
    let backend = backend_of(&server, "x", false);
    let announced = waits(&c, "x");
    until_announced(&server, 1).await;
    let history = History::default();
    // Longer than any of these.
    history.hold(held, secs(3)).await.unwrap();
    let (guard, _) = granted(waiter).await;
    assert_eq!(backend_of(&server, "x", true), backend, "it has waited without a break");
    history.hold(guard, secs(3)).await.unwrap();
    history.hold(granted(announced).await.0, ms(0)).await.unwrap();
    assert_eq!(history.judge(), 3);
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_lock_table_is_exhausted_and_costs_no_lock() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options()
        .config("max_locks_per_transaction", "10")
        .config("max_connections", "20")
        .config("max_wal_senders", "0")
        .start();
    let ttl = secs(2);
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let other = take(&b, "other").await;
    let mut held = Vec::new();
    for round in 0..2 {
        let error = loop {
            assert!(held.len() < 5000, "the table is never full");
            match within("an answer", a.create_lock(&format!("{round} {}", held.len())).try_acquire()).await {
                Ok(guard) => held.push(guard.expect("it is free")),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
        assert!(error.to_string().contains("max_locks_per_transaction"), "{error}");
        println!("full with {} locks", held.len());
        let began = Instant::now();
        let acquire = within("an error", a.create_lock("one more").acquire()).await.map(drop);
        assert_eq!(acquire.unwrap_err().kind(), ErrorKind::Exhausted);
        assert!(began.elapsed() < SLACK, "waiting doesn't mend it: {:?}", began.elapsed());
        // Heartbeats need no room.
        tokio::time::sleep(ttl + ttl / 3).await;
        assert!(held.iter().all(|guard| !guard.is_lost()) && !other.is_lost());

        // Others want every place that becomes free, and no release needs one.
        let stop = Arc::new(AtomicBool::new(false));
        let greedy = tokio::spawn({
            let stop = stop.clone();
            let wanted: Vec<_> = (0..20).map(|i| b.create_lock(&format!("wanted {i}"))).collect();
            async move {
                let mut got = Vec::new();
                for lock in wanted.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    match lock.try_acquire().await {
                        Ok(guard) => got.extend(guard),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}"),
                    }
                    if got.len() == 20 {
                        got.clear();
                    }
                }
                got
            }
        });
        for guard in held.drain(held.len() - 40..) {
            within("the release", guard.release()).await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        drop(within("the others", greedy).await.unwrap());
        assert!(held.iter().all(|guard| !guard.is_lost()) && !other.is_lost());
        // What has failed has left nothing behind.
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
        until(&server, sql, |count| count == (held.len() + 1).to_string()).await;
        take(&a, "one more").await.release().await.unwrap();
    }
    for guard in held {
        guard.release().await.unwrap();
    }
    other.release().await.unwrap();
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_connections_left_is_exhausted() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options().config("max_connections", "12").start();
    let a = with_ttl(server.addr(), MINUTES);
    let held = take(&a, "x").await;
    let mut config = Config::new();
    config.host("127.0.0.1").port(server.port()).user(USER).password(PASSWORD).dbname(DATABASE);
    let mut others = Vec::new();
    let full = async {
        while let Ok((client, connection)) = config.connect(NoTls).await {
            others.push((client, tokio::spawn(connection)));
        }
    };
    within("there are no more", full).await;
    let b = with_ttl(server.addr(), MINUTES);
    let lock = b.create_lock("y");
    let error = within("an error", lock.try_acquire()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
    let error = within("an error", lock.acquire()).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
    // Who has a session needs no other.
    take(&a, "y").await.release().await.unwrap();
    assert!(!held.is_lost());
    drop(others);
    until(&server, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'", |count| count == "1").await;
    take(&b, "y").await.release().await.unwrap();
    held.release().await.unwrap();
    until_all_free(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_that_is_dropped_is_an_error_and_leaves_nothing_held() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let held = take(&a, "held").await;
    take(&b, "x").await.release().await.unwrap();
    let waiter = b.create_lock("held");
    let waiter = tokio::spawn(async move { waiter.acquire().await });
    until_blocked(&server, "held", 1).await;
    // The one who waits uses the sequence in its statement, so that this waits for it.
    let dropped = tokio::task::spawn_blocking({
        let psql = server.superuser_url();
        move || {
            let mut psql =
                std::process::Command::new("psql").args(["-Atq", &psql, "-c", DROP]).spawn().unwrap();
            psql.wait().unwrap().success()
        }
    });
    let token = held.fencing_token();
    until(
        &server,
        "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted",
        |count| count == "1",
    )
    .await;
    within("the release", held.release()).await.unwrap();
    let guard = within("the grant, or the error", waiter).await.unwrap();
    assert!(within("it is dropped", dropped).await.unwrap());
    if let Ok(guard) = guard {
        assert!(guard.fencing_token() > token);
        guard.release().await.unwrap();
    }
    for provider in [&a, &b] {
        for name in ["x", "held"] {
            let lock = provider.create_lock(name);
            for error in [
                within("an error", lock.try_acquire()).await.map(drop).unwrap_err(),
                within("an error", lock.acquire()).await.map(drop).unwrap_err(),
            ] {
                assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
                assert!(error.to_string().contains("sequence"), "{error}");
            }
        }
    }
    until_all_free(&server).await;
    // Somebody makes it again.
    let c = with_ttl(server.addr(), MINUTES);
    take(&c, "x").await.release().await.unwrap();
    for provider in [&a, &b] {
        let guard = take(provider, "x").await;
        assert!(guard.fencing_token() > token);
        guard.release().await.unwrap();
    }
    until_all_free(&server).await;
}

const DROP: &str = "DROP SEQUENCE public.fencelock_token";

/// How many files this process has open.
fn files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux has it").count()
}

/// In a process of its own, since other tests open files, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process that another test starts"]
async fn many_cycles_alone() {
    let server = PostgresServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let cycles = async |count: usize| {
        for _ in 0..count {
            take(&a, "x").await.release().await.unwrap();
        }
        let held = take(&b, "x").await;
        let lock = a.create_lock("x");
        for i in 0..count as u64 / 10 {
            assert!(take_within(&lock, ms(i % 10)).await.is_none());
        }
        held.release().await.unwrap();
        until_all_free(&server).await;
    };
    cycles(100).await;
    let before = (files(), backends(&server));
    cycles(2000).await;
    assert_eq!((files(), backends(&server)), before);
}

#[test]
fn many_cycles_leave_no_connection_and_no_file_open() {
    if left_out("postgres") {
        return;
    }
    let alone = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "many_cycles_alone", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = [alone.stdout, alone.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(alone.status.success() && said.contains("1 passed"), "{said}");
}

// Everything at once.

/// A grant, as it was lived through: it was surely held from then until then.
#[derive(Clone, Copy, Debug)]
struct Lived {
    drawn: Drawn,
    to: Instant,
    /// The server has freed it before this was heard.
    lost: bool,
}

/// Two at once may only be where one was lost, for the moment that the news took.
fn judge_lives(lives: &mut [Lived]) {
    lives.sort_by_key(|life| life.drawn.got);
    for (place, first) in lives.iter().enumerate() {
        for second in &lives[place + 1..] {
            let news = if first.lost || second.lost { SLACK } else { Duration::ZERO };
            assert!(first.to <= second.drawn.got + news, "two at once: {first:?} {second:?}");
        }
    }
    judge(&lives.iter().map(|life| life.drawn).collect::<Vec<_>>());
}

/// Takes the lock again and again, in this process.
async fn lives_here(lock: Box<dyn DistributedLock>, stop: Arc<AtomicBool>, mut random: Random) -> Vec<Lived> {
    let mut lives = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let Ok(Some(guard)) = lock.try_acquire_for(secs(10)).await else { continue };
        let drawn = Drawn { token: guard.fencing_token(), asked, got: Instant::now() };
        tokio::time::sleep(ms(random.below(30))).await;
        let to = Instant::now();
        // The server says whether it was still held.
        let lost = guard.release().await.is_err();
        lives.push(Lived { drawn, to: if lost { drawn.got } else { to }, lost });
    }
    lives
}

/// The sessions that were ended, by what they call themselves.
type Killed = Arc<Mutex<HashSet<String>>>;

/// The same in processes that are killed.
async fn lives_elsewhere(
    url: String,
    who: &'static str,
    stop: Arc<AtomicBool>,
    killed: Killed,
    mut random: Random,
) -> Vec<Lived> {
    let mut lives = Vec::new();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (asked, name) = (Instant::now(), format!("{who}{number}"));
        let mut holder = Holder::start(&format!("{url}&application_name={name}"), "x");
        let drawn = Drawn { token: holder.holds().await, asked, got: Instant::now() };
        tokio::time::sleep(ms(random.below(30))).await;
        let to = Instant::now();
        holder.tell_to_step();
        let stepped = holder.stepped().await;
        holder.kill();
        let lost = killed.lock().expect("no code panics under it").contains(&name);
        assert!(lost || stepped == Step::Done, "nobody has ended its session");
        lives.push(Lived { drawn, to: if lost { drawn.got } else { to }, lost });
    }
    lives
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_killed_there_is_one_holder_and_tokens_rise() {
    const TIME: Duration = Duration::from_secs(10);
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), secs(20)));
    let mut random = Random::new();
    let stop = Arc::new(AtomicBool::new(false));
    let mut lives = JoinSet::new();
    let killed = Killed::default();
    for (provider, who) in [(&a, "first-"), (&b, "second-")] {
        for _ in 0..2 {
            let their_random = Random(random.below(u64::MAX) | 1);
            lives.spawn(lives_here(provider.create_lock("x"), stop.clone(), their_random));
        }
        let their_random = Random(random.below(u64::MAX) | 1);
        let url = holder_url(&server, secs(20));
        lives.spawn(lives_elsewhere(url, who, stop.clone(), killed.clone(), their_random));
    }
    let (began, mut kills) = (Instant::now(), 0);
    while began.elapsed() < TIME {
        tokio::time::sleep(ms(random.below(150))).await;
        let sessions = backends(&server);
        let place = usize::try_from(random.below(sessions.len().max(1) as u64)).unwrap();
        if let Some(victim) = sessions.iter().nth(place) {
            // Noted before it is done. It may have ended by itself.
            let named = format!("SELECT application_name FROM pg_stat_activity WHERE pid = {victim}");
            let name = block_in_place(|| server.sql(&named));
            killed.lock().expect("no code panics under it").insert(name);
            let kill = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = {victim}");
            block_in_place(|| server.sql(&kill));
            kills += 1;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    while let Some(some) = within("they end", lives.join_next()).await {
        all.extend(some.unwrap());
    }
    judge_lives(&mut all);
    let lost = all.iter().filter(|life| life.lost).count();
    println!("{} grants, {lost} of them lost, with {kills} sessions killed", all.len());
    assert!(all.len() > 50);
    until_all_free(&server).await;
}
