//! One SQL Server, and what goes wrong with it, on the way to it, and with those who hold its locks.
//! `--nocapture` shows how long things took.

mod common;
mod servers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::history::History;
use common::{ms, secs};
use fencelock::sqlserver::SqlServerLocks;
use fencelock::{ErrorKind, FencingGate, LockGuard, LockOptions, LockProvider, Loss, Provider};
use servers::holder::{Holder, Step};
use servers::left_out;
use servers::locks::{Drawn, Fault, Random, SLACK, granted, judge, report, take, take_within, waits, within};
use servers::proxy::Proxy;
use servers::sqlserver::{DATABASE, PASSWORD, SqlServer, USER};
use servers::sqlserver_locks::{Place, config};
use tokio::task::JoinSet;
use tokio::time::timeout;

type Locks = Provider<SqlServerLocks>;

/// Far longer than any test: what is free before is free for another reason.
const MINUTES: Duration = Duration::from_secs(300);

/// What only a claim that waits on the server contains.
const WAIT: &str = "@P6";

/// What claims contain, and besides them only what opens a session.
const CLAIM: &str = "@LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = ";

/// What only a release contains.
const RELEASE: &str = "EXEC @r = sp_releaseapplock";

/// What only a heartbeat contains.
const BEAT: &str = "SELECT @P1, CAST(@@SPID AS int)";

/// What draws a token.
const DRAW: &str = "EXEC sp_executesql @P5";

fn url(addr: SocketAddr) -> String {
    format!("sqlserver://{USER}:{PASSWORD}@{addr}/{DATABASE}?encrypt=off")
}

fn locks(addr: SocketAddr) -> SqlServerLocks {
    SqlServerLocks::new(config(&url(addr)))
}

fn build(locks: SqlServerLocks, options: LockOptions) -> Locks {
    Provider::builder(locks).options(options).build().expect("possible options")
}

fn with_ttl(addr: SocketAddr, ttl: Duration) -> Locks {
    build(locks(addr), LockOptions::new().ttl(ttl))
}

/// One whose waiters have no sessions of their own.
fn without_sessions(addr: SocketAddr, ttl: Duration) -> Locks {
    build(locks(addr).waiting_sessions(0), LockOptions::new().ttl(ttl))
}

/// One that tries nothing twice.
fn impatient(addr: SocketAddr, ttl: Duration) -> Locks {
    build(locks(addr), LockOptions::new().ttl(ttl).retry_for(Duration::ZERO))
}

/// Takes the lock by a provider that otherwise gives up at once, also where it has to connect first.
async fn take_patiently(provider: &Locks, name: &str) -> LockGuard {
    let lock = provider.create_lock_with(name, LockOptions::new().retry_for(secs(20)));
    within("the lock is taken", lock.acquire()).await.expect("the server is there")
}

/// What a single try of a provider fails with.
async fn fails(provider: &Locks, name: &str) -> fencelock::Error {
    let lock = provider.create_lock(name);
    within("an answer", lock.try_acquire()).await.expect_err("it can't be had")
}

/// Spoils the next heartbeat on the session of this lock. The next one of all may be of another session, which holds
/// nothing.
async fn spoil_heartbeat(server: &SqlServer, held: &LockGuard, spoil: impl FnOnce()) {
    server.aim_only_at(Some(server.holder_of(held.name())));
    spoil();
    within("the loss by a heartbeat", held.lost()).await;
    server.aim_only_at(None);
}

fn holder_url(server: &SqlServer, ttl: Duration) -> String {
    format!("{}&ttl={}s", server.url(), ttl.as_secs())
}

#[test]
#[ignore = "a process that other tests start"]
fn holder_process() {
    servers::holder::play();
}

// Holders and waiters that die, or are frozen.

/// The server frees the locks of a connection that is closed, which a kernel does for a process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_of_a_killed_holder_is_granted_at_once() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let mut holder = Holder::start(&holder_url(&server, MINUTES), "x");
    let dead = holder.holds().await;
    let provider = with_ttl(server.addr(), MINUTES);
    let waiter = waits(&provider, "x");
    server.until_blocked("x", 1).await;
    let killed = Instant::now();
    holder.kill();
    let (guard, at) = granted(waiter).await;
    assert!(guard.fencing_token() > dead);
    assert!(at - killed < SLACK, "{:?}", at - killed);
    report("after the holder was killed", at - killed);
    guard.release().await.unwrap();
}

/// The same for one who looks twice a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_without_a_session_has_the_lock_of_a_killed_holder_within_half_a_second() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let mut holder = Holder::start(&holder_url(&server, MINUTES), "x");
    let dead = holder.holds().await;
    let provider = without_sessions(server.addr(), MINUTES);
    assert!(provider.create_lock("x").try_acquire().await.unwrap().is_none());
    let waiter = waits(&provider, "x");
    let killed = Instant::now();
    holder.kill();
    let (guard, at) = granted(waiter).await;
    assert!(guard.fencing_token() > dead);
    assert!(at - killed < ms(500) + SLACK, "{:?}", at - killed);
    guard.release().await.unwrap();
}

/// A waiter that dies leaves the queue, whether the server sees that while it waits or only when it is granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_waiter_is_passed_over_at_once() {
    if left_out("sqlserver") {
        return;
    }
    for notices in [true, false] {
        let server = SqlServer::options().notices_closed_sockets(notices).start();
        let [holder, next] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
        let held = take(&holder, "x").await;
        let mut first = Holder::start(&holder_url(&server, MINUTES), "x");
        server.until_blocked("x", 1).await;
        let waiter = waits(&next, "x");
        server.until_blocked("x", 2).await;
        first.kill();
        if notices {
            server.until_blocked("x", 1).await;
        }
        let (token, released) = (held.fencing_token(), Instant::now());
        held.release().await.unwrap();
        let (guard, at) = granted(waiter).await;
        assert!(at - released < SLACK, "{:?}", at - released);
        assert!(guard.fencing_token() > token);
        report(&format!("past a killed waiter (seen: {notices})"), at - released);
        guard.release().await.unwrap();
        server.until_all_free().await;
    }
}

/// Nobody may end its session, so that its lock stays; but it knows that it is lost before it does anything, and gives it
/// back then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_holder_keeps_its_lock_and_sees_the_loss_before_its_next_step() {
    if left_out("sqlserver") {
        return;
    }
    let ttl = secs(2);
    let server = SqlServer::start();
    let mut holder = Holder::start(&holder_url(&server, ttl), "x");
    let stale = holder.holds().await;
    holder.tell_to_step();
    assert_eq!(holder.stepped().await, Step::Done);
    let provider = with_ttl(server.addr(), ttl);
    let mut waiter = waits(&provider, "x");
    server.until_blocked("x", 1).await;
    holder.freeze();
    assert!(timeout(2 * ttl, &mut waiter).await.is_err(), "the session of the frozen holder has the lock");
    holder.tell_to_step();
    let thawed = Instant::now();
    holder.thaw();
    assert_eq!(holder.stepped().await, Step::SawTheLoss);
    let (guard, at) = granted(waiter).await;
    assert!(at - thawed < SLACK, "{:?}", at - thawed);
    report("after the holder was thawed", at - thawed);
    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).unwrap();
    let refused = gate.enter(stale, |()| panic!("a stale write")).unwrap_err();
    assert_eq!((refused.offered, refused.highest), (stale, guard.fencing_token()));
    // Whatever it sent when it woke up, it isn't its lock.
    tokio::time::sleep(ttl + ttl / 3).await;
    assert!(!guard.is_lost());
    guard.release().await.unwrap();
}

// Sessions that end.

/// `KILL` of a session on which nothing is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_shared_session_is_the_loss_of_all_its_locks_at_once_and_of_nothing_else() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let provider = with_ttl(server.addr(), MINUTES);
    let others = provider.create_lock_with("other", LockOptions::new().ttl(MINUTES * 2));
    let other = within("the lock", others.acquire()).await.unwrap();
    for round in 0..5 {
        let mut held = Vec::new();
        for name in ["x", "y", "z"] {
            held.push(take(&provider, name).await);
        }
        let session = server.holder_of("x");
        assert_eq!(session, server.holder_of("z"), "they share a session");
        let ended = Instant::now();
        assert!(server.kill(session));
        for guard in &held {
            assert_eq!(within("the loss", guard.lost()).await, Loss::SessionEnded);
        }
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
        report(&format!("round {round}: three losses after the end of their session"), ended.elapsed());
        let again = take(&provider, "x").await;
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
        assert!(held.iter().all(|guard| guard.fencing_token() < again.fencing_token()));
        for guard in held {
            assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
        }
        // What was lost frees nothing of what was made later.
        assert!(provider.create_lock("x").try_acquire().await.unwrap().is_none());
        again.release().await.unwrap();
        server.until_gone("x").await;
    }
    assert!(!other.is_lost());
    other.release().await.unwrap();
    server.until_all_free().await;
}

/// `KILL` of one that waits, with and without error 596, and of one that has waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_session_ends_has_the_lock_in_the_end() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let [holder, waiting] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let held = take(&holder, "x").await;
    let waiter = waits(&waiting, "x");
    for round in 0..6 {
        server.until_blocked("x", 1).await;
        let (session, ended) = (server.waiter_of("x"), Instant::now());
        if round % 2 == 0 {
            server.kill(session)
        } else {
            server.kill_with_error(session)
        };
        // The wait that was ended is no longer there.
        server.until_blocked("x", 1).await;
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
        report(&format!("round {round}: it waits again after the end of its session"), ended.elapsed());
    }
    let (token, released) = (held.fencing_token(), Instant::now());
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    assert!(guard.fencing_token() > token);

    // Now that session holds it.
    server.kill(server.holder_of("x"));
    let ended = Instant::now();
    assert_eq!(within("the loss", guard.lost()).await, Loss::SessionEnded);
    assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
    let again = take(&waiting, "x").await;
    assert!(again.fencing_token() > guard.fencing_token());
    again.release().await.unwrap();
    drop(guard);
    server.until_all_free().await;
}

/// `KILL` of a session while a claim is under way on it, which was carried out already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_ends_under_a_request_is_a_loss_and_the_claim_is_repeated() {
    if left_out("sqlserver") {
        return;
    }
    for told in [false, true] {
        let server = SqlServer::start();
        let provider = with_ttl(server.addr(), MINUTES);
        let held = take(&provider, "x").await;
        server.delay_answers(secs(1));
        let claim = waits(&provider, "y");
        server.until("the claim is carried out", || server.holder(DATABASE, "y").is_some()).await;
        let (session, ended) = (server.holder_of("x"), Instant::now());
        assert_eq!(session, server.holder_of("y"));
        if told {
            server.kill_with_error(session)
        } else {
            server.kill(session)
        };
        server.delay_answers(Duration::ZERO);
        assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded, "error 596: {told}");
        assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
        let (guard, at) = granted(claim).await;
        assert!(at - ended < SLACK, "{:?}", at - ended);
        assert!(guard.fencing_token() > held.fencing_token());
        guard.release().await.unwrap();
        drop(held);
        server.until_all_free().await;
    }
}

/// An error of a class from 20 on is the end of the session, whichever request it answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fatal_error_is_the_end_of_the_session() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let ttl = secs(3);
    let provider = with_ttl(server.addr(), ttl);
    for part in [CLAIM, DRAW, RELEASE, BEAT, WAIT] {
        let held = take(&provider, "held").await;
        let began = Instant::now();
        if part == RELEASE {
            let other = take(&provider, "x").await;
            server.fail_next(part, 823, 24, "a disk is broken");
            let released = within("the release", other.release()).await;
            println!("a release in a session that the server ends: {released:?}");
        } else if part == BEAT {
            spoil_heartbeat(&server, &held, || server.fail_next(part, 823, 24, "a disk is broken")).await;
        } else if part == WAIT {
            let other = with_ttl(server.addr(), ttl);
            server.fail_next(part, 823, 24, "a disk is broken");
            let waiter = waits(&other, "held");
            server.until("it was struck", || !server.is_aiming()).await;
            server.until_blocked("held", 1).await;
            assert!(!held.is_lost(), "it is another session");
            held.release().await.unwrap();
            granted(waiter).await.0.release().await.unwrap();
            continue;
        } else {
            server.fail_next(part, 823, 24, "a disk is broken");
            take(&provider, "x").await.release().await.unwrap();
        }
        assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded, "{part}");
        assert!(part == BEAT || began.elapsed() < SLACK, "{part}: {:?}", began.elapsed());
        assert!(!server.is_aiming(), "{part}");
        assert_eq!(server.holder(DATABASE, "held"), None, "{part}: the server has ended it too");
        drop(held);
        take(&provider, "held").await.release().await.unwrap();
    }
    server.until_all_free().await;
}

// Servers that restart or stand still.

/// Locks are the sessions', and end with them; the table of tokens stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_is_a_loss_at_once_and_no_more_than_that() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let c = without_sessions(server.addr(), MINUTES);
    for _ in 0..3 {
        let held = take(&a, "x").await;
        let other = take(&c, "other").await;
        let blocked = waits(&b, "x");
        server.until_blocked("x", 1).await;
        let looks = waits(&c, "x");
        let began = Instant::now();
        server.stop();
        for guard in [&held, &other] {
            assert_eq!(within("the loss", guard.lost()).await, Loss::SessionEnded);
        }
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        report("the losses after a stop", began.elapsed());
        server.restart();
        let up = Instant::now();
        let history = History::default();
        let mut waiters = JoinSet::new();
        waiters.spawn(granted(blocked));
        waiters.spawn(granted(looks));
        while let Some(next) = waiters.join_next().await {
            let (guard, at) = next.unwrap();
            assert!(at.saturating_duration_since(up) < secs(2) + SLACK);
            assert!(guard.fencing_token() > held.fencing_token());
            history.hold(guard, ms(5)).await.unwrap();
        }
        assert_eq!(history.judge(), 2);
        assert_eq!(held.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
        drop(other);
        take(&a, "x").await.release().await.unwrap();
        server.until_all_free().await;
    }
}

/// `retry_for` bounds how long a server that is down is put up with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_down_for_too_long_is_unavailable() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let patience = ms(800);
    let some = build(locks(server.addr()), LockOptions::new().ttl(MINUTES).retry_for(patience));
    let none = impatient(server.addr(), MINUTES);
    let patient = with_ttl(server.addr(), MINUTES);
    let held = take_patiently(&some, "x").await;
    let other = take(&patient, "z").await;
    let waiting = some.create_lock("z");
    let waiter = tokio::spawn(async move { waiting.acquire().await });
    server.until_blocked("z", 1).await;
    let down = Instant::now();
    server.stop();
    let error = within("an error", waiter).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "of who waited: {error:?}");
    assert!(down.elapsed() < patience + SLACK, "{:?}", down.elapsed());
    for (provider, patience) in [(&some, patience), (&none, Duration::ZERO)] {
        let (began, lock) = (Instant::now(), provider.create_lock("new"));
        let error = within("an error", lock.try_acquire()).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        let error = within("an error", lock.acquire()).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert!(began.elapsed() < 2 * patience + SLACK, "{:?}", began.elapsed());
    }
    assert_eq!((held.is_lost(), other.is_lost()), (true, true));
    let waiter = waits(&patient, "x");
    server.restart();
    granted(waiter).await.0.release().await.unwrap();
    take_patiently(&none, "x").await.release().await.unwrap();
    server.until_all_free().await;
}

/// Heartbeats that are late are no loss as long as the TTL isn't over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_for_a_moment_changes_nothing() {
    if left_out("sqlserver") {
        return;
    }
    // A heartbeat comes within the moment, and the last one before it isn't older than 5/12 of this.
    let ttl = secs(4);
    let server = SqlServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    let before = server.connections();
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
    assert_eq!((history.judge(), server.connections()), (2, before));
    server.until_all_free().await;
}

/// The loss comes by the holder's own clock, and the waiter, who waits on the server, gets the lock only after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_for_longer_than_the_ttl_never_has_two_holders() {
    if left_out("sqlserver") {
        return;
    }
    let ttl = secs(2);
    let server = SqlServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let c = without_sessions(server.addr(), ttl);
    let d = impatient(server.addr(), ttl);
    for (provider, name) in [(&b, "b"), (&c, "c"), (&d, "d")] {
        take_patiently(provider, name).await.release().await.unwrap();
    }
    let before = Instant::now();
    let held = take(&a, "x").await;
    let blocked = waits(&b, "x");
    server.until_blocked("x", 1).await;
    let looks = waits(&c, "x");
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
    report("the loss while the server stands still (ttl 2 s)", lost - frozen);
    let error = within("the error", late).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error:?}");
    tokio::time::sleep((2 * ttl).saturating_sub(frozen.elapsed())).await;
    let thawed = Instant::now();
    server.thaw();
    let history = History::default();
    let mut waiters = JoinSet::new();
    waiters.spawn(granted(blocked));
    waiters.spawn(granted(looks));
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
    server.until_all_free().await;
    report("nothing is left", thawed.elapsed());
}

// Answers that are lost, late, others', or cut short.

/// The claim is carried out, and its connection stays open. It ends with the TTL, and nothing stays locked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_whose_answer_is_lost_is_given_back() {
    if left_out("sqlserver") {
        return;
    }
    let ttl = secs(2);
    let server = SqlServer::start();
    let (a, b) = (impatient(server.addr(), ttl), with_ttl(server.addr(), MINUTES));
    let held = take_patiently(&a, "held").await;
    server.lose_answer_to("lost-claim");
    let began = Instant::now();
    let error = fails(&a, "lost-claim").await;
    assert_eq!((error.kind(), server.is_aiming()), (ErrorKind::Unknown, false), "{error:?}");
    assert!(began.elapsed() < ttl + SLACK, "{:?}", began.elapsed());
    report("the error after the answer to a grant was lost (ttl 2 s)", began.elapsed());
    let guard = take(&b, "lost-claim").await;
    assert!(began.elapsed() < 2 * ttl + SLACK, "{:?}", began.elapsed());
    report("free after the answer to a grant was lost (ttl 2 s)", began.elapsed());
    guard.release().await.unwrap();
    assert!(held.is_lost(), "on a session that doesn't answer");
    drop(held);
    take_patiently(&a, "lost-claim").await.release().await.unwrap();

    // Who is patient gets it after all.
    let patient = with_ttl(server.addr(), ttl);
    take(&patient, "y").await.release().await.unwrap();
    server.lose_answer_to("lost-claim");
    let began = Instant::now();
    let guard = take(&patient, "lost-claim").await;
    assert!(!server.is_aiming() && began.elapsed() < 2 * ttl + SLACK, "{:?}", began.elapsed());
    guard.release().await.unwrap();
    server.until_all_free().await;
}

/// A lock that a session has only while it works at a wait tells others that it doesn't any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_answer_is_lost_has_the_lock_in_the_end() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let (a, b) = (with_ttl(server.addr(), MINUTES), with_ttl(server.addr(), MINUTES));
    let held = take(&a, "x").await;
    server.lose_answer_to(WAIT);
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    assert!(!server.is_aiming());
    let (token, released) = (held.fencing_token(), Instant::now());
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < secs(15), "{:?}", at - released);
    assert!(guard.fencing_token() > token);
    report("a waiter whose answer was lost", at - released);
    guard.release().await.unwrap();
    server.until_all_free().await;
}

/// Also where nothing went wrong a wait for which nothing is heard for long goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_is_not_broken_off_while_the_server_works_at_it() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let (a, b) = (with_ttl(server.addr(), secs(2)), with_ttl(server.addr(), secs(2)));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    let session = server.waiter_of("x");
    // Longer than it takes until others look whether its answer is lost.
    tokio::time::sleep(secs(9)).await;
    assert_eq!(server.waiter_of("x"), session, "it has waited without a break");
    held.release().await.unwrap();
    granted(waiter).await.0.release().await.unwrap();
    server.until_all_free().await;
}

/// An answer to an earlier request than the one that was asked is never taken for its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_another_request_is_never_taken_for_ones_own() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let ttl = secs(3);
    let (a, b) = (with_ttl(server.addr(), ttl), with_ttl(server.addr(), MINUTES));
    let theirs = take(&b, "taken").await;
    for part in ["taken", CLAIM, RELEASE, BEAT] {
        let held = take(&a, "held").await;
        let before = server.connections();
        let began = Instant::now();
        if part == BEAT {
            spoil_heartbeat(&server, &held, || server.repeat_answer_before(part)).await;
        } else {
            // The last answer on this connection is a grant.
            server.repeat_answer_before(part);
        }
        match part {
            "taken" => {
                assert!(within("an answer", a.create_lock("taken").try_acquire()).await.unwrap().is_none());
            }
            CLAIM => take(&a, "x").await.release().await.unwrap(),
            RELEASE => {
                // Done or not, it isn't there afterwards, and was done once.
                let released = within("the release", held.release()).await;
                println!("a release whose answer was another's: {released:?}");
                server.until_gone("held").await;
                assert!(!server.is_aiming());
                server.until("there is another session", || server.connections() > before).await;
                continue;
            }
            _ => {}
        }
        assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded, "{part}");
        assert!(part == BEAT || began.elapsed() < SLACK, "{part}: {:?}", began.elapsed());
        assert!(!server.is_aiming(), "{part}");
        // The next round's would wait for it otherwise, and be had on a session of its own.
        server.until_gone("held").await;
        drop(held);
        take(&a, "x").await.release().await.unwrap();
        assert!(server.connections() > before, "{part}");
    }
    assert!(!theirs.is_lost());
    theirs.release().await.unwrap();
    server.until_all_free().await;
}

/// Where the answer is cut short the claim is repeated, with another connection and another token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_reset_in_mid_answer_is_never_used_again() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let provider = with_ttl(server.addr(), secs(3));
    let mut last = take(&provider, "x").await;
    for bytes in [0, 1, 4, 9, 20, 40] {
        let token = last.fencing_token();
        last.release().await.unwrap();
        let before = server.connections();
        server.reset_in_answer_to(CLAIM, bytes);
        let began = Instant::now();
        last = take(&provider, "x").await;
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        report(&format!("a grant, reset after {bytes} bytes of the first answer"), began.elapsed());
        assert!(last.fencing_token() > token && !server.is_aiming());
        let connections = server.connections() - before;
        assert!((1..=3).contains(&connections), "{connections}");
    }
    // In the middle of the answer to a heartbeat.
    for bytes in [0, 3, 12] {
        spoil_heartbeat(&server, &last, || server.reset_in_answer_to(BEAT, bytes)).await;
        assert_eq!(last.lost().await, Loss::SessionEnded);
        let again = take(&provider, "x").await;
        assert!(again.fencing_token() > last.fencing_token());
        assert_eq!(last.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));
        last = again;
    }
    last.release().await.unwrap();
    // Of a wait.
    let other = with_ttl(server.addr(), secs(3));
    for bytes in [0, 1, 30] {
        let held = take(&provider, "x").await;
        server.reset_in_answer_to(WAIT, bytes);
        let waiter = waits(&other, "x");
        server.until_blocked("x", 1).await;
        let (token, released) = (held.fencing_token(), Instant::now());
        held.release().await.unwrap();
        let (guard, at) = granted(waiter).await;
        assert!(at - released < SLACK && guard.fencing_token() > token, "{:?}", at - released);
        assert!(!server.is_aiming());
        guard.release().await.unwrap();
    }
    server.until_all_free().await;
}

/// It is done, or is done by the end of its session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_whose_answer_is_lost_frees_the_lock_and_is_no_obstacle() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let ttl = secs(2);
    let (a, b) = (with_ttl(server.addr(), ttl), with_ttl(server.addr(), MINUTES));
    for reset in [Some(0), Some(12), None] {
        let held = take(&a, "x").await;
        match reset {
            Some(bytes) => server.reset_in_answer_to(RELEASE, bytes),
            None => server.lose_answer_to(RELEASE),
        }
        let (token, began) = (held.fencing_token(), Instant::now());
        let release = tokio::spawn(held.release());
        server.until_free(DATABASE, "x").await;
        let guard = take(&b, "x").await;
        assert!(began.elapsed() < SLACK && !server.is_aiming(), "{:?}", began.elapsed());
        assert!(guard.fencing_token() > token);
        let released = within("the release", release).await.unwrap();
        report(&format!("the release (reset: {reset:?}) says {released:?}"), began.elapsed());
        assert!(began.elapsed() < 2 * ttl + SLACK, "{:?}", began.elapsed());
        // If it was tried again, it hasn't freed what is another's.
        assert!(!guard.is_lost());
        assert_ne!(server.holder(DATABASE, "x"), None);
        guard.release().await.unwrap();
        take(&a, "x").await.release().await.unwrap();
    }
    server.until_all_free().await;
}

/// Slow is not broken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_server_is_only_slow() {
    if left_out("sqlserver") {
        return;
    }
    let ttl = secs(4);
    let server = SqlServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    server.delay_answers(ms(300));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    let before = server.connections();
    let history = History::default();
    history.hold(held, ttl + secs(1)).await.unwrap();
    let (guard, _) = granted(waiter).await;
    let began = Instant::now();
    assert!(within("the timeout", a.create_lock("x").try_acquire_for(secs(1))).await.unwrap().is_none());
    assert!(began.elapsed() < secs(1) + SLACK, "{:?}", began.elapsed());
    history.hold(guard, ttl + secs(1)).await.unwrap();
    assert_eq!(history.judge(), 2);
    assert!(server.connections() - before <= 1, "one to wait on");
    server.until_all_free().await;
}

// What the server says of a claim.

/// What `sp_getapplock` returns for claims that may be made again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_the_server_breaks_off_is_made_again() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let (patient, impatient) = (with_ttl(server.addr(), MINUTES), impatient(server.addr(), MINUTES));
    let other = take(&patient, "other").await;
    take_patiently(&impatient, "x").await.release().await.unwrap();
    for (code, says) in [(-3, "deadlock"), (-2, "cancelled")] {
        server.getapplock_of_returns("x", code);
        let error = fails(&impatient, "x").await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{code}: {error:?}");
        assert!(error.to_string().contains(says), "{error}");
        server.getapplock_of_returns("x", code);
        take(&patient, "x").await.release().await.unwrap();
        // One who waits.
        let held = take_patiently(&impatient, "x").await;
        let lock = patient.create_lock("x");
        assert!(lock.try_acquire().await.unwrap().is_none());
        server.getapplock_of_returns("x", code);
        let waiter = waits(&patient, "x");
        server.until_blocked("x", 1).await;
        held.release().await.unwrap();
        granted(waiter).await.0.release().await.unwrap();
    }
    // A wrong call stays a wrong one.
    server.getapplock_of_returns("x", -999);
    let error = fails(&patient, "x").await;
    assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    assert!(error.to_string().contains("db_principal"), "{error}");
    assert!(!other.is_lost(), "its session goes on");
    other.release().await.unwrap();
    server.until_all_free().await;
}

/// A server that says -999 of a lock that is busy means busy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_a_busy_lock_for_a_wrong_call_is_understood() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().busy_is_999().start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let held = take(&a, "x").await;
    assert!(b.create_lock("x").try_acquire().await.unwrap().is_none());
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    held.release().await.unwrap();
    granted(waiter).await.0.release().await.unwrap();
    server.until_all_free().await;
}

/// The lock is granted, and its token can't be drawn: the lock isn't left held, and the session goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_can_not_be_drawn_leaves_nothing_held_and_costs_no_other_lock() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let (a, b) = (impatient(server.addr(), MINUTES), with_ttl(server.addr(), MINUTES));
    let other = take_patiently(&a, "other").await;
    take(&b, "x").await.release().await.unwrap();
    let before = server.connections();
    for (number, class, kind) in [
        (1222, 16, ErrorKind::Unavailable),
        (9002, 17, ErrorKind::Unavailable),
        (3906, 16, ErrorKind::Unavailable),
        (1205, 13, ErrorKind::Unavailable),
        (229, 14, ErrorKind::Denied),
        (8115, 16, ErrorKind::Exhausted),
    ] {
        server.fail_next(DRAW, number, class, "no token");
        let error = fails(&a, "x").await;
        assert_eq!((error.kind(), server.is_aiming()), (kind, false), "{number}: {error:?}");
        assert_eq!(server.holder(DATABASE, "x"), None, "{number}");
        assert!(!other.is_lost(), "{number}");
        take(&b, "x").await.release().await.unwrap();
    }
    assert_eq!(server.connections(), before);

    // Of one who has waited: it is made again, with another one in between or not.
    let held = take_patiently(&a, "x").await;
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    held.release().await.unwrap();
    granted(waiter).await.0.release().await.unwrap();
    let held = take_patiently(&a, "x").await;
    server.fail_next(WAIT, 1222, 16, "no lock");
    let waiter = waits(&b, "x");
    server.until("it was struck", || !server.is_aiming()).await;
    held.release().await.unwrap();
    granted(waiter).await.0.release().await.unwrap();
    other.release().await.unwrap();
    server.until_all_free().await;
}

/// An error about the table isn't one of the session: what it holds stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_dropped_is_made_again_and_tokens_rise() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let place = Place::of(&server);
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), MINUTES));
    let held = take(&a, "held").await;
    let mut last = held.fencing_token();
    for round in 0..3 {
        place.sql(DATABASE, "DROP TABLE dbo.fencelock_token").await.unwrap();
        for provider in [&a, &b] {
            let began = Instant::now();
            let guard = take(provider, "x").await;
            assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
            assert!(guard.fencing_token() > last, "round {round}");
            last = guard.fencing_token();
            guard.release().await.unwrap();
        }
        assert!(!held.is_lost(), "round {round}");
    }
    held.release().await.unwrap();
    server.until_all_free().await;
    // By one who has waited.
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    server.until_blocked("x", 1).await;
    place.sql(DATABASE, "DROP TABLE dbo.fencelock_token").await.unwrap();
    held.release().await.unwrap();
    let (guard, _) = granted(waiter).await;
    assert!(guard.fencing_token() > last);
    guard.release().await.unwrap();
    server.until_all_free().await;
}

/// Many programs come to an empty database at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_start_at_once_on_an_empty_database() {
    if left_out("sqlserver") {
        return;
    }
    for _ in 0..10 {
        let server = SqlServer::start();
        let mut starts = JoinSet::new();
        for _ in 0..20 {
            let provider = with_ttl(server.addr(), secs(20));
            starts.spawn(async move {
                provider.backend().connect().await.expect("it connects");
                let guard = take(&provider, "x").await;
                let token = guard.fencing_token();
                guard.release().await.expect("released");
                token
            });
        }
        let mut tokens = within("all have had it", starts.join_all()).await;
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), 20);
    }
}

// Waits that end, or don't.

/// A wait for which nobody waits any more is broken off on the server, also on one that doesn't look at closed sockets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_that_are_given_up_leave_nothing_behind() {
    if left_out("sqlserver") {
        return;
    }
    for notices in [true, false] {
        let server = SqlServer::options().notices_closed_sockets(notices).start();
        let holder = with_ttl(server.addr(), MINUTES);
        let held = take(&holder, "x").await;
        let waiting: Vec<_> = (0..50).map(|_| with_ttl(server.addr(), MINUTES)).collect();
        for round in 0..2 {
            let waiters: Vec<_> = waiting.iter().map(|provider| waits(provider, "x")).collect();
            server.until_blocked("x", 50).await;
            let given_up = Instant::now();
            for waiter in &waiters {
                waiter.abort();
            }
            server.until_blocked("x", 0).await;
            assert!(given_up.elapsed() < SLACK, "{:?}", given_up.elapsed());
            report(
                &format!("round {round}: 50 waits are gone (sees closed sockets: {notices})"),
                given_up.elapsed(),
            );
        }
        // One who comes later gets it, and one whose time is up doesn't keep it.
        assert!(take_within(&waiting[1].create_lock("x"), ms(50)).await.is_none());
        let waiter = waits(&waiting[0], "x");
        server.until_blocked("x", 1).await;
        let released = Instant::now();
        held.release().await.unwrap();
        let (guard, at) = granted(waiter).await;
        assert!(at - released < SLACK, "{:?}", at - released);
        guard.release().await.unwrap();
        server.until_all_free().await;
    }
}

/// However close the end of a wait is to a grant, the lock is had or free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_ends_as_the_lock_is_released_leaves_nothing_behind() {
    const ROUNDS: u64 = 200;
    if left_out("sqlserver") {
        return;
    }
    for notices in [true, false] {
        let server = SqlServer::options().notices_closed_sockets(notices).start();
        let (holder, waiting) = (with_ttl(server.addr(), MINUTES), with_ttl(server.addr(), MINUTES));
        let history = Arc::new(History::default());
        let (mut got, mut missed) = (0, 0);
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
        server.until_all_free().await;
    }
}

/// The driver breaks off requests that take longer than its `command_timeout`; waits aren't such.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_is_not_cut_by_the_drivers_timeout() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let mut config = config(&server.url());
    config.command_timeout(Some(ms(100)));
    let holder = with_ttl(server.addr(), MINUTES);
    let held = take(&holder, "x").await;
    for locks in [
        SqlServerLocks::new(config.clone()),
        SqlServerLocks::with_configs(move || std::future::ready(Ok(config.clone()))),
    ] {
        let provider = build(locks, LockOptions::new().ttl(MINUTES));
        let waiter = waits(&provider, "x");
        server.until_blocked("x", 1).await;
        let (session, connections) = (server.waiter_of("x"), server.connections());
        tokio::time::sleep(secs(2)).await;
        assert_eq!((server.waiter_of("x"), server.connections()), (session, connections));
        assert_eq!(server.waiters(DATABASE, "x"), 1);
        waiter.abort();
        server.until_blocked("x", 0).await;
    }
    held.release().await.unwrap();
    server.until_all_free().await;
}

/// Those who wait on the server get it in the order in which they came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_are_served_in_the_order_of_their_arrival() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let holder = with_ttl(server.addr(), MINUTES);
    let held = take(&holder, "x").await;
    let mut waiters = Vec::new();
    let (history, order) = (Arc::new(History::default()), Arc::new(AtomicUsize::new(0)));
    for place in 0..12 {
        let (provider, history, order) = (with_ttl(server.addr(), MINUTES), history.clone(), order.clone());
        waiters.push(tokio::spawn(async move {
            let guard = provider.create_lock("x").acquire().await.expect("granted in the end");
            assert_eq!(order.fetch_add(1, Ordering::SeqCst), place, "out of turn");
            history.hold(guard, ms(2)).await.expect("it is held");
        }));
        server.until_blocked("x", place + 1).await;
    }
    history.hold(held, ms(0)).await.unwrap();
    for waiter in waiters {
        within("a waiter's turn", waiter).await.expect("in its turn");
    }
    assert_eq!(history.judge(), 13);
    server.until_all_free().await;
}

// The network.

/// Nothing is lost here but time: a connection that has lost something is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_network_does_for_less_than_the_ttl_is_no_loss() {
    if left_out("sqlserver") {
        return;
    }
    let ttl = secs(3);
    let server = Arc::new(SqlServer::start());
    let mut cases = JoinSet::new();
    let by = ms(400);
    for (fault, name) in [
        (Fault::HoldRequests, "a"),
        (Fault::HoldReplies, "b"),
        (Fault::DelayRequests(by), "c"),
        (Fault::DelayReplies(by), "d"),
    ] {
        let server = server.clone();
        cases.spawn(async move {
            let proxy = Proxy::start(server.addr());
            let provider = with_ttl(proxy.addr(), ttl);
            let held = take(&provider, name).await;
            let session = server.holder_of(name);
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
            assert_eq!(server.holder_of(name), session, "{fault:?}");
            held.release().await.unwrap();
            server.until_gone(name).await;
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

/// The holder learns it on time. Where the end of its connection can't reach the server, the lock is free only when it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_network_does_for_longer_than_the_ttl_is_a_loss_on_time() {
    if left_out("sqlserver") {
        return;
    }
    let ttl = secs(2);
    let server = Arc::new(SqlServer::start());
    let mut cases = JoinSet::new();
    for (fault, name) in [
        (Fault::HoldRequests, "a"),
        (Fault::HoldReplies, "b"),
        (Fault::CutRequests, "c"),
        (Fault::CutReplies, "d"),
        (Fault::DelayRequests(2 * ttl), "e"),
        (Fault::DelayReplies(2 * ttl), "f"),
    ] {
        let server = server.clone();
        cases.spawn(async move {
            let proxy = Proxy::start(server.addr());
            let (provider, other) = (with_ttl(proxy.addr(), ttl), with_ttl(server.addr(), ttl));
            let before = Instant::now();
            let held = Arc::new(take(&provider, name).await);
            fault.begin(&proxy);
            let after = Instant::now();
            let waiter = tokio::spawn({
                let (lock, held) = (other.create_lock(name), held.clone());
                async move {
                    let guard = lock.acquire().await.expect("granted in the end");
                    assert!(held.is_lost(), "two at once");
                    (guard, Instant::now())
                }
            });
            assert_eq!(within("the loss", held.lost()).await, Loss::Expired, "{fault:?}");
            let lost = Instant::now();
            assert!(lost - before >= ttl && lost - after < ttl + SLACK, "{fault:?}: {:?}", lost - after);
            let reaches = matches!(fault, Fault::HoldReplies | Fault::CutReplies | Fault::DelayReplies(_));
            let (guard, at) = if reaches {
                granted(waiter).await
            } else {
                Fault::end(&proxy);
                granted(waiter).await
            };
            assert!(at - lost < 2 * ttl + SLACK, "{fault:?}: {:?}", at - lost);
            report(&format!("the next holder after a {fault:?}"), at - lost);
            assert!(guard.fencing_token() > held.fencing_token());

            // What comes late changes nothing.
            let session = server.holder_of(name);
            Fault::end(&proxy);
            proxy.until(|traffic| traffic.waiting == 0).await;
            tokio::time::sleep(ttl / 2).await;
            assert_eq!(server.holder_of(name), session, "{fault:?}");
            assert!(!guard.is_lost());
            guard.release().await.unwrap();
            take(&provider, name).await.release().await.unwrap();
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
    server.until_all_free().await;
}

/// All connections are reset, or none can be made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_resets_and_refuses_costs_the_locks_at_once_and_nothing_else() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let proxy = Proxy::start(server.addr());
    let (a, b) = (with_ttl(proxy.addr(), MINUTES), with_ttl(server.addr(), MINUTES));
    let blocker = take(&b, "blocked").await;
    let waiter = waits(&a, "blocked");
    server.until_blocked("blocked", 1).await;
    let mut last = take(&a, "x").await;
    for _ in 0..3 {
        proxy.refuse();
        let began = Instant::now();
        proxy.reset_all();
        assert_eq!(within("the loss", last.lost()).await, Loss::SessionEnded);
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        // Free for others, although nobody could tell the server.
        let theirs = take(&b, "x").await;
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        assert!(theirs.fencing_token() > last.fencing_token());
        theirs.release().await.unwrap();
        proxy.accept();
        last = take(&a, "x").await;
        server.until_blocked("blocked", 1).await;
    }
    last.release().await.unwrap();
    blocker.release().await.unwrap();
    granted(waiter).await.0.release().await.unwrap();
    server.until_all_free().await;
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

    fn start(server: &SqlServer) -> Self {
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

    /// Ends them, and judges each name.
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

/// The table is the server's memory, and the clock only where it is ahead of that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_over_restarts_and_when_the_servers_clock_is_moved() {
    const HOUR: i64 = 3_600_000_000;
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let loops = Loops::start(&server);
    for (round, offset) in [0, HOUR, 0, -HOUR, 2 * HOUR, -2 * HOUR, 1, 0].into_iter().enumerate() {
        server.set_clock_offset(offset);
        loops.until_more(50).await;
        if round % 2 == 1 {
            server.restart();
            loops.until_more(20).await;
        }
    }
    println!("{} grants with a clock that was moved", loops.judge().await);
    server.until_all_free().await;
}

/// Where the clock goes on, a table that was dropped is made up for by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_when_the_table_is_dropped_while_many_draw() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let place = Place::of(&server);
    let loops = Loops::start(&server);
    for _ in 0..8 {
        loops.until_more(30).await;
        // More grants than microseconds there can't have been.
        let dropped = place
            .sql(DATABASE, "IF OBJECT_ID('dbo.fencelock_token') IS NOT NULL DROP TABLE dbo.fencelock_token");
        within("it is dropped", dropped).await.unwrap();
    }
    loops.until_more(30).await;
    println!("{} grants with a table that was dropped", loops.judge().await);
    server.until_all_free().await;
}

// Many locks.

/// One for all that is held, and three to wait on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_locks_take_four_connections() {
    const LOCKS: usize = 1000;
    const WAITED_FOR: usize = 20;
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let other = with_ttl(server.addr(), MINUTES);
    let provider = with_ttl(server.addr(), MINUTES);
    let mut others = Vec::new();
    for i in 0..WAITED_FOR {
        others.push(take(&other, &format!("waited-for-{i}")).await);
    }
    assert_eq!(server.open_connections(), 1);
    let mut claims = JoinSet::new();
    let began = Instant::now();
    for i in 0..LOCKS {
        let lock = provider.create_lock(&format!("held {i}"));
        claims.spawn(async move { lock.acquire().await.expect("it is free") });
    }
    let mut held = within("all are held", claims.join_all()).await;
    report("a thousand locks taken", began.elapsed());
    assert_eq!(server.open_connections(), 2);
    let waiters: Vec<_> = (0..WAITED_FOR).map(|i| waits(&provider, &format!("waited-for-{i}"))).collect();
    let waiting = || server.sessions().iter().filter(|session| session.waits_for.is_some()).count();
    server.until("three wait on the server", || waiting() == 3).await;
    assert_eq!(server.open_connections(), 5, "four, and the other provider's");
    let released = Instant::now();
    drop(others);
    for waiter in waiters {
        held.push(granted(waiter).await.0);
    }
    report("twenty waiters served", released.elapsed());
    assert!(released.elapsed() < secs(10), "{:?}", released.elapsed());
    assert!(server.open_connections() <= 5, "{}", server.open_connections());
    assert!(held.iter().all(|guard| !guard.is_lost()));
    let ended = Instant::now();
    drop(held);
    within("the provider is closed", provider.close()).await.unwrap();
    server.until_all_free().await;
    server.until("its connections are closed", || server.open_connections() == 1).await;
    report("all are free", ended.elapsed());
    assert!(ended.elapsed() < secs(10), "{:?}", ended.elapsed());
}

/// There are no more sessions to be had: no lock that is held is lost by that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_sessions_left_is_exhausted() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().max_connections(1).start();
    let (a, b) = (with_ttl(server.addr(), MINUTES), with_ttl(server.addr(), MINUTES));
    let held = take(&a, "x").await;
    let error = fails(&b, "y").await;
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
    // Who has a session needs no other.
    take(&a, "y").await.release().await.unwrap();
    assert!(!held.is_lost());
    held.release().await.unwrap();
    within("closed", a.close()).await.unwrap();
    server.until("its connection is closed", || server.open_connections() == 0).await;
    // What has failed isn't asked for again at once.
    let lock = b.create_lock("y");
    let again = async {
        loop {
            match lock.acquire().await {
                Ok(guard) => return guard,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}"),
            }
            tokio::time::sleep(ms(5)).await;
        }
    };
    within("there is a session", again).await.release().await.unwrap();
}

// Everything at once.

/// Sessions are killed, and providers go on: there is one holder at any time, and tokens rise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_killed_there_is_one_holder_and_tokens_rise() {
    const TIME: Duration = Duration::from_secs(6);
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let loops = Loops::start(&server);
    let (mut random, began, mut kills) = (Random::new(), Instant::now(), 0);
    while began.elapsed() < TIME {
        tokio::time::sleep(ms(random.below(150))).await;
        let sessions: Vec<_> = server.spids().into_iter().collect();
        let place = usize::try_from(random.below(sessions.len().max(1) as u64)).expect("it is small");
        let Some(victim) = sessions.get(place) else { continue };
        kills += 1;
        if kills % 2 == 0 {
            server.kill(*victim)
        } else {
            server.kill_with_error(*victim)
        };
    }
    loops.until_more(20).await;
    let grants = loops.judge().await;
    println!("{grants} grants with {kills} sessions killed");
    assert!(grants > 50);
    server.until_all_free().await;
}

/// Many contend for one name: it is held by one at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_providers_contend_for_one_name() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let history = Arc::new(History::default());
    let mut tasks = JoinSet::new();
    for number in 0..12 {
        let ttl = secs(20);
        let provider =
            if number % 3 == 0 { without_sessions(server.addr(), ttl) } else { with_ttl(server.addr(), ttl) };
        let history = history.clone();
        tasks.spawn(async move {
            for _ in 0..5 {
                history.hold(take(&provider, "x").await, ms(2)).await.expect("it is held");
            }
        });
    }
    within("all have had it", tasks.join_all()).await;
    assert_eq!(history.judge(), 60);
    server.until_all_free().await;
}
