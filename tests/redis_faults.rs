//! One Redis server, and what goes wrong with it, on the way to it, and with those who hold its locks.
//! `--nocapture` shows how long things took.

mod common;
mod servers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::history::History;
use common::{ms, secs};
use fencelock::redis::driver::Client;
use fencelock::redis::{RedisLocks, lock_key};
use fencelock::{ErrorKind, FencingGate, LockOptions, LockProvider, Loss, Provider};
use servers::holder::{Holder, Step};
use servers::left_out;
use servers::locks::{SLACK, granted, report, take, waits, within};
use servers::proxy::Proxy;
use servers::redis::RedisServer;
use servers::redis_locks::{pttl, renewed, until_free, until_listening, until_queued};
use tokio::task::JoinSet;

type Locks = Provider<RedisLocks>;

/// Part of every claim that doesn't wait, which is the first of an acquire, and of no other request.
const TRY: &[u8] = b"\r\ntry\r\n";

fn provider(addr: SocketAddr, options: LockOptions) -> Locks {
    let client = Client::open(format!("redis://{addr}")).expect("a URL of ours");
    Provider::builder(RedisLocks::new(client)).options(options).build().expect("possible options")
}

fn with_ttl(addr: SocketAddr, ttl: Duration) -> Locks {
    provider(addr, LockOptions::new().ttl(ttl))
}

#[test]
#[ignore = "a process that other tests start"]
fn holder_process() {
    servers::holder::play();
}

// Holders and waiters that die.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_of_a_killed_holder_is_granted_within_its_ttl() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(1);
    let server = RedisServer::start();
    let mut holder = Holder::start(&(server.url() + "?ttl=1s"), "x");
    let dead = holder.holds().await;
    let provider = with_ttl(server.addr(), ttl);
    let waiter = waits(&provider, "x");
    until_queued(&server, "x", 1).await;
    let killed = Instant::now();
    holder.kill();
    let (guard, at) = granted(waiter).await;
    assert!(guard.fencing_token() > dead);
    assert!(at - killed < ttl + SLACK, "{:?}", at - killed);
    report("after the holder was killed (ttl 1 s)", at - killed);
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_waiter_is_passed_over_at_once() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let [holder, next] = [(); 2].map(|()| with_ttl(server.addr(), secs(20)));
    let held = take(&holder, "x").await;
    let mut first = Holder::start(&(server.url() + "?ttl=20s"), "x");
    until_queued(&server, "x", 1).await;
    let waiter = waits(&next, "x");
    until_queued(&server, "x", 2).await;
    first.kill();
    until_listening(&server, 1).await;
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    // A waiter that was alive would have got three seconds to confirm.
    assert!(at - released < ms(1500), "{:?}", at - released);
    report("past a killed waiter", at - released);
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_waiter_is_passed_over_within_its_grace_and_gets_its_turn_later() {
    if left_out("redis") {
        return;
    }
    for (ttl, grace) in [(secs(1), secs(1)), (secs(20), secs(3))] {
        let server = RedisServer::start();
        let [holder, next] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
        let held = take(&holder, "x").await;
        let mut first = Holder::start(&format!("{}?ttl={}s", server.url(), ttl.as_secs()), "x");
        until_queued(&server, "x", 1).await;
        let waiter = waits(&next, "x");
        until_queued(&server, "x", 2).await;
        first.freeze();
        let released = Instant::now();
        held.release().await.unwrap();
        let (guard, at) = granted(waiter).await;
        assert!(at - released < grace + SLACK, "{:?}", at - released);
        report(&format!("past a frozen waiter (grace {grace:?})"), at - released);

        // It was handed the lock, which is over by now: it must not believe that it has it.
        first.thaw();
        until_queued(&server, "x", 1).await;
        assert!(first.is_silent());
        let token = guard.fencing_token();
        guard.release().await.unwrap();
        assert!(first.holds().await > token);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gives_up_waiting_delays_nobody() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let [holder, timed, dropped, next] = [(); 4].map(|()| with_ttl(server.addr(), secs(20)));
    let held = take(&holder, "x").await;
    let gives_up = timed.create_lock("x");
    let gives_up = tokio::spawn(async move { gives_up.try_acquire_for(ms(500)).await });
    until_queued(&server, "x", 1).await;
    let drops = waits(&dropped, "x");
    until_queued(&server, "x", 2).await;
    let waiter = waits(&next, "x");
    until_queued(&server, "x", 3).await;
    assert!(within("the timeout", gives_up).await.unwrap().unwrap().is_none());
    drops.abort();
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < ms(1500), "{:?}", at - released);
    report("past two who gave up", at - released);
    guard.release().await.unwrap();
    until_queued(&server, "x", 0).await;
}

// A holder that was frozen.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_was_frozen_for_too_long_sees_it_before_its_next_step() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let mut holder = Holder::start(&(server.url() + "?ttl=1s"), "x");
    let stale = holder.holds().await;
    holder.tell_to_step();
    assert_eq!(holder.stepped().await, Step::Done);
    let provider = with_ttl(server.addr(), secs(1));
    let waiter = waits(&provider, "x");
    until_queued(&server, "x", 1).await;
    holder.freeze();
    let frozen = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at - frozen < secs(1) + SLACK, "{:?}", at - frozen);
    report("after the holder was frozen (ttl 1 s)", at - frozen);

    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).unwrap();
    holder.tell_to_step();
    holder.thaw();
    assert_eq!(holder.stepped().await, Step::SawTheLoss);
    let refused = gate.enter(stale, |()| panic!("a stale write")).unwrap_err();
    assert_eq!((refused.offered, refused.highest), (stale, guard.fencing_token()));
    // Whatever it sent when it woke up, it isn't its lock.
    renewed(&server, "x").await;
    guard.release().await.unwrap();
}

// Servers that restart or stand still.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_with_its_data_changes_nothing() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::options().durable().start();
    let [a, b, c] = [(); 3].map(|()| with_ttl(server.addr(), secs(3)));
    let held = take(&a, "x").await;
    let second = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    let third = waits(&c, "x");
    until_queued(&server, "x", 2).await;
    server.restart();
    let up = Instant::now();
    renewed(&server, "x").await;
    report("a renewal after a restart", up.elapsed());
    until_listening(&server, 2).await;
    report("both waiters listen after a restart", up.elapsed());
    until_queued(&server, "x", 2).await;
    assert!(!held.is_lost());
    let history = History::default();
    let released = Instant::now();
    history.hold(held, ms(0)).await.unwrap();
    let (guard, at) = granted(second).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    report("the first waiter after the release", at - released);
    let released = Instant::now();
    history.hold(guard, ms(0)).await.unwrap();
    let (guard, at) = granted(third).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    history.hold(guard, ms(0)).await.unwrap();
    assert_eq!(history.judge(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_without_its_data_the_holder_learns_it_and_tokens_rise() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(3);
    let server = RedisServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    server.restart_empty();
    let up = Instant::now();
    assert_eq!(within("the loss", held.lost()).await, Loss::Taken);
    // A third of the TTL, and what the reconnection takes.
    assert!(up.elapsed() < ttl / 3 + SLACK, "{:?}", up.elapsed());
    report("the loss after a restart without data (ttl 3 s)", up.elapsed());
    let (guard, at) = granted(waiter).await;
    report("the waiter after a restart without data", at.saturating_duration_since(up));
    assert!(guard.fencing_token() > held.fencing_token());
    assert_eq!(held.release().await.unwrap_err().loss(), Some(Loss::Taken));
    renewed(&server, "x").await;
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_for_a_moment_changes_nothing() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), secs(3)));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    server.freeze();
    tokio::time::sleep(secs(1)).await;
    server.thaw();
    renewed(&server, "x").await;
    assert!(!held.is_lost());
    let history = History::default();
    let released = Instant::now();
    history.hold(held, ms(0)).await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < secs(1) + SLACK, "{:?}", at - released);
    report("the waiter after a server stood still", at - released);
    history.hold(guard, ms(0)).await.unwrap();
    assert_eq!(history.judge(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_for_longer_than_the_ttl_never_has_two_holders() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(1);
    let server = RedisServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    // All is connected, and knows the scripts.
    drop(take(&b, "x").await);
    until_free(&server, "x").await;
    let before = Instant::now();
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    server.freeze();
    let frozen = Instant::now();
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    assert!(before.elapsed() >= ttl && frozen.elapsed() < ttl + SLACK, "{:?}", frozen.elapsed());
    tokio::time::sleep((2 * ttl).saturating_sub(frozen.elapsed())).await;
    let thawed = Instant::now();
    server.thaw();
    let (guard, at) = granted(waiter).await;
    assert!(at >= thawed);
    assert!(guard.fencing_token() > held.fencing_token());
    report("the waiter after a server stood still for 2 s (ttl 1 s)", at - thawed);
    renewed(&server, "x").await;
    guard.release().await.unwrap();
}

/// The claim is carried out after its client has given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_grant_is_taken_back_soon() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(30);
    let server = RedisServer::start();
    let a = provider(server.addr(), LockOptions::new().ttl(ttl).retry_for(Duration::ZERO));
    let b = with_ttl(server.addr(), ttl);
    drop(take(&a, "x").await);
    drop(take(&b, "y").await);
    until_free(&server, "x").await;
    server.freeze();
    let error = within("the error", a.create_lock("x").try_acquire()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    tokio::time::sleep(secs(1)).await;
    server.thaw();
    let thawed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(thawed.elapsed() < secs(5), "{:?}", thawed.elapsed());
    report("free after a late grant (ttl 30 s)", thawed.elapsed());
    guard.release().await.unwrap();
}

// The network.

/// What a network does to a holder.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Nothing arrives until it is over, and then everything does, as TCP sends it again.
    HoldRequests,
    HoldReplies,
    /// Nothing arrives, and nothing is sent again.
    CutRequests,
    CutReplies,
    DelayRequests(Duration),
    DelayReplies(Duration),
}

impl Fault {
    fn begin(self, proxy: &Proxy) {
        match self {
            Self::HoldRequests => proxy.hold_requests(),
            Self::HoldReplies => proxy.hold_replies(),
            Self::CutRequests => proxy.cut_requests(),
            Self::CutReplies => proxy.cut_replies(),
            Self::DelayRequests(by) => proxy.delay_requests(by),
            Self::DelayReplies(by) => proxy.delay_replies(by),
        }
    }

    fn end(proxy: &Proxy) {
        proxy.heal();
        proxy.release_requests();
        proxy.release_replies();
        proxy.delay_requests(Duration::ZERO);
        proxy.delay_replies(Duration::ZERO);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_network_does_for_less_than_the_ttl_is_no_loss() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(3);
    let server = Arc::new(RedisServer::start());
    let mut cases = JoinSet::new();
    for fault in [Fault::HoldRequests, Fault::HoldReplies, Fault::CutRequests, Fault::CutReplies] {
        let server = server.clone();
        cases.spawn(async move {
            let proxy = Proxy::start(server.addr());
            let (provider, name) = (with_ttl(proxy.addr(), ttl), format!("{fault:?}"));
            let held = take(&provider, &name).await;
            let taken = Instant::now();
            let commands = proxy.commands();
            fault.begin(&proxy);
            // One renewal is stuck, and its reply doesn't come: the old deadline stands.
            let stuck = async {
                match fault {
                    Fault::HoldRequests => proxy.until(|traffic| traffic.waiting > 0).await,
                    Fault::CutRequests => proxy.until(|traffic| traffic.lost_requests > 0).await,
                    Fault::CutReplies => proxy.until(|traffic| traffic.lost_replies > 0).await,
                    _ => proxy.until(|traffic| traffic.commands > commands).await,
                }
            };
            stuck.await;
            assert!(!held.is_lost());
            Fault::end(&proxy);
            let healed = Instant::now();
            renewed(&server, &name).await;
            report(&format!("renewed after a short {fault:?} (ttl 3 s)"), healed.elapsed());
            tokio::time::sleep((ttl + ttl / 3).saturating_sub(taken.elapsed())).await;
            assert!(!held.is_lost(), "{fault:?}");
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
    if left_out("redis") {
        return;
    }
    let ttl = secs(1);
    let server = Arc::new(RedisServer::start());
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
            // All is connected, and knows the scripts.
            take(&provider, &name).await.release().await.unwrap();
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
            assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
            let lost = Instant::now();
            assert!(lost - before >= ttl && lost - after < ttl + SLACK, "{fault:?}: {:?}", lost - after);
            // In the worst case the last renewal was carried out just before the loss.
            let (guard, at) = granted(waiter).await;
            assert!(at - after < 2 * ttl + SLACK, "{fault:?}: {:?}", at - after);
            report(&format!("the next holder during a {fault:?} (ttl 1 s)"), at - after);
            assert!(guard.fencing_token() > held.fencing_token());

            // What comes late changes nothing.
            let key = lock_key(&name);
            let owner = server.command(&["GET", &key]);
            Fault::end(&proxy);
            proxy.until(|traffic| traffic.waiting == 0).await;
            renewed(&server, &name).await;
            assert_eq!(server.command(&["GET", &key]), owner);
            guard.release().await.unwrap();
            let again = take(&provider, &name).await;
            report(&format!("the old holder again, after a {fault:?}"), lost.elapsed());
            again.release().await.unwrap();
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_whose_reply_is_lost_is_given_back_at_once() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let a = provider(proxy.addr(), LockOptions::new().ttl(secs(30)).retry_for(Duration::ZERO));
    let b = with_ttl(server.addr(), secs(30));
    take(&a, "x").await.release().await.unwrap();

    // Only the reply is lost.
    proxy.drop_reply_to(TRY);
    let error = within("the error", a.create_lock("x").try_acquire()).await.unwrap_err();
    assert_eq!((error.kind(), proxy.is_aiming()), (ErrorKind::Unknown, false));
    let failed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(failed.elapsed() < secs(5), "{:?}", failed.elapsed());
    report("free after the reply to a grant was lost (ttl 30 s)", failed.elapsed());
    guard.release().await.unwrap();
    let guard = within("the lock", a.create_lock("x").acquire()).await.unwrap();
    report("the same client again", failed.elapsed());
    guard.release().await.unwrap();

    // And then everything, so that it can be given back only after healing.
    let lost = proxy.traffic().lost_replies;
    proxy.cut_replies();
    let claim = tokio::spawn({
        let lock = a.create_lock("x");
        async move { lock.try_acquire().await }
    });
    let before = proxy.until(|traffic| traffic.lost_replies > lost).await;
    proxy.cut_requests();
    let error = within("the error", claim).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    proxy.until(|traffic| traffic.lost_requests > before.lost_requests).await;
    assert_eq!(server.command(&["EXISTS", &lock_key("x")]), "1");
    proxy.heal();
    proxy.reset_all();
    let healed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(healed.elapsed() < secs(5), "{:?}", healed.elapsed());
    report("free after a cut had healed (ttl 30 s)", healed.elapsed());
    guard.release().await.unwrap();

    // Who waits gets it after all.
    let patient = with_ttl(proxy.addr(), secs(30));
    take(&patient, "x").await.release().await.unwrap();
    proxy.drop_reply_to(TRY);
    let began = Instant::now();
    let guard = take(&patient, "x").await;
    assert!(!proxy.is_aiming() && began.elapsed() < secs(15), "{:?}", began.elapsed());
    report("the lock for one who waits, although a reply was lost", began.elapsed());
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_reset_in_mid_frame_is_never_used_again() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let provider = with_ttl(proxy.addr(), secs(2));
    let mut last = take(&provider, "x").await;
    for bytes in [0, 1, 9, 20] {
        let token = last.fencing_token();
        last.release().await.unwrap();
        let before = proxy.traffic();
        proxy.reset_in_reply_to(TRY, bytes);
        let began = Instant::now();
        last = take(&provider, "x").await;
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        report(&format!("a grant, reset after {bytes} bytes of the first reply"), began.elapsed());
        assert!(last.fencing_token() > token && !proxy.is_aiming());
        // One for commands; the claim has become one that waits, and listens.
        let now = proxy.traffic();
        assert!(now.open <= 2 && now.connections - before.connections <= 2, "{before:?} {now:?}");
        assert!(now.connections > before.connections);
    }
    for bytes in [0, 3, 6] {
        let before = proxy.traffic();
        proxy.reset_in_reply(bytes);
        renewed(&server, "x").await; // carried out, but nobody knows
        proxy.until(|traffic| traffic.connections > before.connections).await;
        renewed(&server, "x").await;
        assert!(!last.is_lost());
    }
    last.release().await.unwrap();
    until_free(&server, "x").await;
}

/// It is on its way for so long that its client has given it up, and taken it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_comes_late_is_no_grant() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let a = provider(proxy.addr(), LockOptions::new().ttl(secs(30)).retry_for(Duration::ZERO));
    let b = with_ttl(server.addr(), secs(30));
    take(&a, "x").await.release().await.unwrap();
    let scripts = || {
        let stats = server.command(&["INFO", "commandstats"]);
        let calls = |name: &str| {
            let field = stats.lines().find_map(|line| line.strip_prefix(name)?.split(',').next());
            field.map_or(0, |calls| calls.parse::<u64>().expect("a number"))
        };
        calls("cmdstat_evalsha:calls=") + calls("cmdstat_eval:calls=")
    };
    let tombstones = || server.command(&["KEYS", "fencelock:*:dead:*"]).lines().count();

    // One that tries. So old a connection isn't used any more when it is in doubt: nothing else comes over it later.
    tokio::time::sleep(ms(1100)).await;
    proxy.hold_requests_with(TRY);
    let error = within("the error", a.create_lock("x").try_acquire()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    let failed = Instant::now();
    servers::wait_until("it is taken back", || tombstones() == 1);
    report("a claim is taken back that hasn't come to the server", failed.elapsed());
    let before = scripts();
    assert_eq!(proxy.traffic().waiting, 1, "the claim is on its way, alone");
    proxy.release_requests();
    servers::wait_until("it has come", || scripts() > before);
    assert_eq!(server.command(&["EXISTS", &lock_key("x")]), "0");

    // One that joins the queue.
    let held = take(&b, "x").await;
    proxy.hold_requests_with(b"\r\njoin\r\n");
    let waiter = waits(&a, "x");
    until_listening(&server, 1).await; // nothing else comes after that
    proxy.until(|traffic| traffic.waiting > 0).await;
    tokio::time::sleep(ms(1100)).await;
    waiter.abort();
    servers::wait_until("it is taken back", || tombstones() == 2);
    let before = scripts();
    assert_eq!(proxy.traffic().waiting, 1, "the claim is on its way, alone");
    proxy.release_requests();
    servers::wait_until("it has come", || scripts() > before);
    assert_eq!(server.command(&["ZCARD", &(lock_key("x") + ":queue")]), "0");
    held.release().await.unwrap();
    let guard = take(&a, "x").await;
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_that_hears_nothing_gets_the_lock_within_about_a_second() {
    if left_out("redis") {
        return;
    }
    let (server, deaf) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::start(server.addr());
    let a = with_ttl(server.addr(), secs(30));
    let b = with_ttl(proxy.addr(), secs(30));
    take(&b, "x").await.release().await.unwrap();
    let held = take(&a, "x").await;

    // Its subscription is somewhere else: the server finds nobody who listens.
    proxy.set_target(deaf.addr());
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < secs(1) + SLACK, "{:?}", at - released);
    report("a waiter to whom nothing could be said", at - released);
    guard.release().await.unwrap();

    // Its subscription is silently dead: the server thinks that it has been told.
    proxy.set_target(server.addr());
    proxy.reset_all();
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    until_listening(&server, 1).await;
    let before = proxy.traffic();
    // It has just asked, and asks again in a second.
    let before = proxy.until(|traffic| traffic.replies > before.replies).await;
    proxy.cut_replies();
    let released = Instant::now();
    held.release().await.unwrap();
    proxy.until(|traffic| traffic.lost_replies > before.lost_replies).await;
    proxy.heal();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < secs(3) + SLACK, "{:?}", at - released);
    report("a waiter to whom the message was lost", at - released);
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_an_administrator_kills_are_made_again() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), secs(3)));
    let history = History::default();
    let mut held = take(&a, "x").await;
    for (round, kind) in ["pubsub", "normal", "pubsub", "normal"].into_iter().enumerate() {
        let waiter = waits(if round % 2 == 0 { &b } else { &a }, "x");
        until_queued(&server, "x", 1).await; // it listens by then
        server.command(&["CLIENT", "KILL", "TYPE", kind]);
        let released = Instant::now();
        history.hold(held, ms(0)).await.unwrap();
        let at;
        (held, at) = granted(waiter).await;
        assert!(at - released < secs(1) + SLACK, "{kind}: {:?}", at - released);
        report(&format!("the waiter after CLIENT KILL TYPE {kind}"), at - released);
        // The holder's goes as well.
        server.command(&["CLIENT", "KILL", "TYPE", kind]);
        renewed(&server, "x").await;
        assert!(!held.is_lost());
    }
    history.hold(held, ms(0)).await.unwrap();
    assert_eq!(history.judge(), 5);
}

/// Nor by those who wait: they subscribe while nobody has found the connection for commands broken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_down_is_not_flooded_with_connections() {
    const LOCKS: usize = 50;
    if left_out("redis") {
        return;
    }
    let server = RedisServer::options().durable().start();
    let proxy = Proxy::start(server.addr());
    let ttl = secs(20);
    let (a, b) = (with_ttl(server.addr(), ttl), with_ttl(proxy.addr(), ttl));
    let mut held = Vec::new();
    let mut waiters = Vec::new();
    for i in 0..LOCKS {
        held.push(take(&a, &i.to_string()).await);
        waiters.push(waits(&b, &i.to_string()));
    }
    for i in 0..LOCKS {
        until_queued(&server, &i.to_string(), 1).await;
    }
    server.kill();
    let before = proxy.connections();
    tokio::time::sleep(secs(2)).await;
    let attempts = proxy.connections() - before;
    println!("connections tried within 2 s by a provider with {LOCKS} waiters: {attempts}");
    // With full jitter up to a second there are about eleven.
    assert!((2..=40).contains(&attempts), "{attempts}");
    server.restart();
    let up = Instant::now();
    for (i, guard) in held.into_iter().enumerate() {
        within("the release", guard.release()).await.unwrap_or_else(|error| panic!("{i}: {error}"));
    }
    report("all are released after the restart", up.elapsed());
    for waiter in waiters {
        let (guard, _) = granted(waiter).await;
        guard.release().await.unwrap();
    }
    report("everybody has had the lock after the restart", up.elapsed());
    let all = proxy.connections() - before;
    println!("connections tried until everybody had it: {all}");
    assert!(all <= 60, "{all}");
}

/// Everything at once, and never two holders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contention_over_a_network_that_fails_all_the_time() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let proxies: Vec<_> = (0..4).map(|_| Proxy::start(server.addr())).collect();
    let history = Arc::new(History::default());
    let end = Instant::now() + secs(5);
    let mut tasks = JoinSet::new();
    for proxy in &proxies {
        let lock = with_ttl(proxy.addr(), ms(600)).create_lock("x");
        let history = history.clone();
        tasks.spawn(async move {
            while Instant::now() < end {
                match lock.try_acquire_for(secs(3)).await {
                    Ok(Some(guard)) => drop(history.hold(guard, ms(5)).await), // it may have been lost
                    Ok(None) => {}
                    Err(error) => assert!(error.is_retryable(), "{error}"),
                }
            }
        });
    }
    let mut round = 0;
    while Instant::now() < end {
        tokio::time::sleep(ms(20)).await;
        let proxy = &proxies[round % proxies.len()];
        match round % 7 {
            0 => proxy.reset_all(),
            1 => proxy.drop_reply(1),
            2 => proxy.reset_in_reply(5),
            3 => proxy.hold_requests(),
            4 => proxies.iter().for_each(Proxy::release_requests),
            5 => drop(server.command(&["SCRIPT", "FLUSH"])),
            _ => drop(server.command(&["CLIENT", "KILL", "TYPE", "pubsub"])),
        }
        round += 1;
    }
    proxies.iter().for_each(Proxy::release_requests);
    while let Some(task) = within("the contenders", tasks.join_next()).await {
        task.unwrap();
    }
    let grants = history.judge();
    println!("grants within 5 s of a failing network: {grants}");
    assert!(grants >= 10, "{grants}");
}

// Releases and renewals at the same time.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_that_races_the_release_never_revives_the_key() {
    if left_out("redis") {
        return;
    }
    let server = Arc::new(RedisServer::start());
    let proxy = Proxy::start(server.addr());
    proxy.delay_requests(ms(2)); // so that both are often on their way at once
    let provider = Arc::new(with_ttl(proxy.addr(), ms(200)));
    let mut tasks = JoinSet::new();
    for task in 0..20_u64 {
        let (server, provider) = (server.clone(), provider.clone());
        tasks.spawn(async move {
            let name = task.to_string();
            let lock = provider.create_lock(&name);
            let mut last = None;
            for round in 0..25_u64 {
                let guard = within("the lock", lock.acquire()).await.unwrap();
                assert!(Some(guard.fencing_token()) > last);
                last = Some(guard.fencing_token());
                // The renewal is due after 67 ms.
                tokio::time::sleep(ms(55 + (round * 7 + task * 3) % 25)).await;
                let released = guard.release().await;
                // A machine that is busy for 200 ms loses it.
                assert!(released.as_ref().err().is_none_or(|error| error.loss().is_some()), "{released:?}");
                assert_eq!(server.command(&["EXISTS", &lock_key(&name)]), "0");
                tokio::time::sleep(ms(round % 8)).await;
                assert_eq!(server.command(&["EXISTS", &lock_key(&name)]), "0");
            }
        });
    }
    while let Some(task) = within("all rounds", tasks.join_next()).await {
        task.unwrap();
    }
}

/// The renewal and the first try of the release arrive when somebody else has the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_and_a_release_that_come_late_leave_the_next_holder_alone() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let (a, b) = (with_ttl(proxy.addr(), ms(3100)), with_ttl(server.addr(), secs(2)));
    take(&a, "x").await.release().await.unwrap();
    let held = take(&a, "x").await;
    // In every renewal, and in no release, which gets behind it on its connection.
    proxy.hold_requests_with(b"\r\n3100\r\n");
    proxy.until(|traffic| traffic.waiting > 0).await;
    let began = Instant::now();
    within("the release", held.release()).await.unwrap();
    report("a release behind a stuck renewal (ttl 3.1 s)", began.elapsed());
    until_free(&server, "x").await;
    assert!(proxy.traffic().waiting >= 2, "the renewal and the first try are still on their way");
    let next = take(&b, "x").await;
    let key = lock_key("x");
    let owner = server.command(&["GET", &key]);
    proxy.release_requests();
    proxy.until(|traffic| traffic.waiting == 0).await;
    for _ in 0..20 {
        assert!(pttl(&server, "x") <= 2000, "renewed by who doesn't hold it");
        tokio::time::sleep(ms(5)).await;
    }
    renewed(&server, "x").await;
    assert_eq!(server.command(&["GET", &key]), owner);
    assert!(!next.is_lost());
    next.release().await.unwrap();
    until_free(&server, "x").await;
}

// The server's clock.

/// Keys expire by the server's wall clock: a step forward ends the TTL early. Fencing is what protects then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_steps_forward_frees_the_lock_early_and_the_stale_holder_is_fenced() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(6);
    let server = RedisServer::start_with_clock();
    let [a, b, c] = [(); 3].map(|()| with_ttl(server.addr(), ttl));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    server.set_clock_offset(3600);
    let stepped = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at - stepped < secs(1) + SLACK, "{:?}", at - stepped);
    report("the waiter after the clock stepped forward (ttl 6 s)", at - stepped);
    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).unwrap();
    assert!(gate.enter(held.fencing_token(), |()| panic!("a stale write")).is_err());
    assert_eq!(within("the loss", held.lost()).await, Loss::Taken);
    assert!(stepped.elapsed() < ttl / 3 + SLACK, "{:?}", stepped.elapsed());
    report("the loss after the clock stepped forward", stepped.elapsed());

    // And back: the counter keeps the tokens rising.
    server.set_clock_offset(0);
    let token = guard.fencing_token();
    let waiter = waits(&c, "x");
    until_queued(&server, "x", 1).await;
    guard.release().await.unwrap();
    let (guard, _) = granted(waiter).await;
    assert!(guard.fencing_token() > token);
    let token = guard.fencing_token();
    guard.release().await.unwrap();
    let guard = take(&a, "x").await;
    assert!(guard.fencing_token() > token);
    guard.release().await.unwrap();
}

/// A key that was made or renewed before a step back stays for as much longer as the clock stepped. A holder that lives
/// doesn't feel that: its renewals go on, and its release frees. What is promised of one that *dies* is that its lock
/// is free after TTL + step, or its TTL after the clock was put right. Renewals never shorten what is left, so it is the
/// same if the holder has renewed since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_steps_back_delays_only_what_a_dead_holder_has_left() {
    if left_out("redis") {
        return;
    }
    let ttl = secs(2);
    let server = RedisServer::start_with_clock();
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ttl));
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    server.set_clock_offset(-3600);
    tokio::time::sleep(ttl + ttl / 2).await; // renewals go on
    assert!(!held.is_lost());
    let token = held.fencing_token();
    let released = Instant::now();
    held.release().await.unwrap();
    let (guard, at) = granted(waiter).await;
    assert!(at - released < SLACK, "{:?}", at - released);
    report("the waiter after the clock stepped back", at - released);
    assert!(guard.fencing_token() > token, "the counter goes on where the clock was");
    guard.release().await.unwrap();

    // A holder that dies after the step costs its TTL.
    let mut dies = Holder::start(&(server.url() + "?ttl=2s"), "x");
    let mut token = dies.holds().await;
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    let killed = Instant::now();
    dies.kill();
    let (guard, at) = granted(waiter).await;
    assert!(at - killed < ttl + SLACK, "{:?}", at - killed);
    assert!(guard.fencing_token() > token);
    guard.release().await.unwrap();

    // One that dies with a key from before the step costs up to the step more.
    let mut dies = Holder::start(&(server.url() + "?ttl=2s"), "x");
    token = dies.holds().await;
    dies.freeze();
    server.set_clock_offset(-7200);
    dies.kill();
    let waiter = waits(&b, "x");
    until_queued(&server, "x", 1).await;
    let left = pttl(&server, "x");
    assert!((3_590_000..=3_602_000).contains(&left), "{left}");
    println!("left by a holder that died before a step back of one hour (ttl 2 s): {left} ms");
    // Until the clock is put right.
    server.set_clock_offset(-3600 + 10);
    let right = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at.saturating_duration_since(right) < SLACK);
    assert!(guard.fencing_token() > token);
    guard.release().await.unwrap();
}

// What a server says.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_may_be_forgotten_between_any_two_steps() {
    if left_out("redis") {
        return;
    }
    let server = Arc::new(RedisServer::start());
    let flush = || assert_eq!(server.command(&["SCRIPT", "FLUSH"]), "OK");
    let [a, b] = [(); 2].map(|()| with_ttl(server.addr(), ms(900)));
    for name in ["x", "y"] {
        flush();
        let held = take(&a, name).await;
        flush();
        assert!(b.create_lock(name).try_acquire().await.unwrap().is_none());
        flush();
        renewed(&server, name).await;
        flush();
        let elsewhere = waits(&b, name);
        until_queued(&server, name, 1).await;
        flush();
        let token = held.fencing_token();
        held.release().await.unwrap();
        let (guard, _) = granted(elsewhere).await;
        assert!(guard.fencing_token() > token);
        flush();
        // From hand to hand in one process.
        let here = waits(&b, name);
        tokio::time::sleep(ms(20)).await;
        flush();
        drop(guard);
        let (guard, _) = granted(here).await;
        flush();
        guard.release().await.unwrap();
        flush();
        let timeout = take(&a, name).await;
        assert!(b.create_lock(name).try_acquire_for(ms(100)).await.unwrap().is_none());
        timeout.release().await.unwrap();
    }

    // All the time.
    let history = Arc::new(History::default());
    let end = Instant::now() + secs(1);
    let mut tasks = JoinSet::new();
    for _ in 0..4 {
        let lock = with_ttl(server.addr(), secs(2)).create_lock("x");
        let history = history.clone();
        tasks.spawn(async move {
            while Instant::now() < end {
                let guard = within("the lock", lock.acquire()).await.unwrap();
                history.hold(guard, ms(1)).await.unwrap();
            }
        });
    }
    while Instant::now() < end {
        flush();
        tokio::time::sleep(ms(1)).await;
    }
    while let Some(task) = within("the contenders", tasks.join_next()).await {
        task.unwrap();
    }
    assert!(history.judge() > 10);
}

/// A reason why a server takes no writes for a while.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    MisConf,
    NoReplicas,
    ReadOnly,
    OutOfMemory,
}

impl Refusal {
    fn begin(self, server: &RedisServer) {
        let set = |key: &str, value: &str| assert_eq!(server.command(&["CONFIG", "SET", key, value]), "OK");
        match self {
            Self::MisConf => {
                let reply = server.command(&["CONFIG", "GET", "dir"]);
                let dir = reply.lines().nth(1).expect("a path");
                std::fs::remove_dir_all(dir).expect("it is the test's");
                set("save", "3600 1");
                server.command(&["BGSAVE"]);
                server.until(&["SET", "unrelated", "1"], |reply| reply.starts_with("-MISCONF"));
            }
            Self::NoReplicas => set("min-replicas-to-write", "1"),
            Self::ReadOnly => assert_eq!(server.command(&["REPLICAOF", "127.0.0.1", "1"]), "OK"),
            Self::OutOfMemory => set("maxmemory", "1"),
        }
    }

    fn end(self, server: &RedisServer) {
        let set = |key: &str, value: &str| assert_eq!(server.command(&["CONFIG", "SET", key, value]), "OK");
        match self {
            Self::MisConf => set("save", ""),
            Self::NoReplicas => set("min-replicas-to-write", "0"),
            Self::ReadOnly => assert_eq!(server.command(&["REPLICAOF", "NO", "ONE"]), "OK"),
            Self::OutOfMemory => set("maxmemory", "0"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_no_writes_is_unavailable_and_never_busy() {
    if left_out("redis") {
        return;
    }
    let mut cases = JoinSet::new();
    for refusal in [Refusal::MisConf, Refusal::NoReplicas, Refusal::ReadOnly, Refusal::OutOfMemory] {
        cases.spawn(async move {
            let server = RedisServer::start();
            let ttl = secs(12);
            let impatient = provider(server.addr(), LockOptions::new().ttl(ttl).retry_for(Duration::ZERO));
            let some = provider(server.addr(), LockOptions::new().ttl(ttl).retry_for(ms(500)));
            let patient = with_ttl(server.addr(), ttl);
            let held = take(&patient, "held").await;
            let freed = take(&some, "freed").await;
            refusal.begin(&server);

            let error = within("an error", impatient.create_lock("x").try_acquire()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{refusal:?}: {error}");
            let error = within("an error", impatient.create_lock("x").acquire()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{refusal:?}: {error}");
            let began = Instant::now();
            let error = within("an error", some.create_lock("x").acquire()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{refusal:?}: {error}");
            assert!(began.elapsed() < ms(500) + SLACK, "{refusal:?}: {:?}", began.elapsed());
            report(&format!("the error for {refusal:?} (retry_for 500 ms)"), began.elapsed());

            let waiter = waits(&patient, "x");
            // Only the one for memory lets a release through.
            let release = within("the release", freed.release()).await;
            assert!(release.is_ok() || !matches!(refusal, Refusal::OutOfMemory), "{release:?}");
            tokio::time::sleep(ms(200)).await;
            assert!(!waiter.is_finished() && !held.is_lost());

            refusal.end(&server);
            let ended = Instant::now();
            let (guard, at) = granted(waiter).await;
            let took = at.saturating_duration_since(ended);
            assert!(took < secs(1) + SLACK, "{refusal:?}: {took:?}");
            report(&format!("the waiter after {refusal:?}"), took);
            until_free(&server, "freed").await;
            assert!(ended.elapsed() < ttl, "not only by its ttl");
            renewed(&server, "held").await;
            assert!(!held.is_lost());
            guard.release().await.unwrap();
            held.release().await.unwrap();
        });
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hiccup_is_ridden_out_and_an_outage_is_an_error() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    proxy.refuse();
    let some = provider(proxy.addr(), LockOptions::new().retry_for(ms(500)));
    for kind in ["try", "acquire"] {
        let began = Instant::now();
        let lock = some.create_lock("x");
        let error = match kind {
            "try" => within("an error", lock.try_acquire()).await.unwrap_err(),
            _ => within("an error", lock.acquire()).await.unwrap_err(),
        };
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{kind}");
        assert!(began.elapsed() < ms(500) + SLACK, "{kind}: {:?}", began.elapsed());
        report(&format!("the error of {kind} (retry_for 500 ms)"), began.elapsed());
    }
    let waiter = waits(&provider(proxy.addr(), LockOptions::new()), "x");
    tokio::time::sleep(ms(500)).await;
    proxy.accept();
    let up = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at.saturating_duration_since(up) < secs(2) + SLACK);
    report("the waiter after half a second without a server", at.saturating_duration_since(up));
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_denied() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::options().password("right").start();
    for login in ["", ":wrong@", "nobody:right@"] {
        let url = format!("redis://{login}{}", server.addr());
        let error = within("an error", fencelock::connect(&url)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{login}: {error}");
        let provider = Provider::new(RedisLocks::new(Client::open(url).unwrap()));
        let began = Instant::now();
        let lock = provider.create_lock("x");
        for error in [
            within("an error", lock.try_acquire()).await.unwrap_err(),
            within("an error", lock.acquire()).await.unwrap_err(),
            within("an error", lock.try_acquire_for(secs(5))).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Denied, "{login}: {error}");
            assert!(!format!("{error:?}").contains("right"));
        }
        assert!(began.elapsed() < SLACK, "waiting doesn't mend it: {:?}", began.elapsed());
    }
    let provider = fencelock::connect(&format!("redis://:right@{}", server.addr())).await.unwrap();
    assert!(provider.create_lock("x").try_acquire().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_used_for_something_else_is_a_wrong_configuration() {
    if left_out("redis") {
        return;
    }
    let server = RedisServer::start();
    let provider = with_ttl(server.addr(), secs(2));
    for suffix in ["", ":fence"] {
        let key = lock_key("x") + suffix;
        server.command(&["RPUSH", &key, "not ours"]);
        let lock = provider.create_lock("x");
        let began = Instant::now();
        let tried = within("an error", lock.try_acquire()).await.unwrap_err();
        let acquired = within("an error", lock.acquire()).await.unwrap_err();
        assert_eq!((tried.kind(), acquired.kind()), (ErrorKind::Config, ErrorKind::Config), "{key}");
        assert!(began.elapsed() < SLACK, "waiting doesn't mend it: {:?}", began.elapsed());
        assert_eq!(server.command(&["LRANGE", &key, "0", "-1"]), "not ours");
        server.command(&["DEL", &key]);
    }

    // While it is held: as if it had been taken away.
    let held = take(&provider, "x").await;
    server.command(&["DEL", &lock_key("x")]);
    server.command(&["RPUSH", &lock_key("x"), "not ours"]);
    assert_eq!(within("the loss", held.lost()).await, Loss::Taken);
    let error = within("the release", held.release()).await.unwrap_err();
    assert_eq!(error.loss(), Some(Loss::Taken));
    assert_eq!(server.command(&["LRANGE", &lock_key("x"), "0", "-1"]), "not ours");
    server.command(&["DEL", &lock_key("x")]);

    // A string is somebody who locks as others do.
    server.command(&["SET", &lock_key("x"), "another", "NX", "PX", "300"]);
    assert!(provider.create_lock("x").try_acquire().await.unwrap().is_none());
    let began = Instant::now();
    let guard = take(&provider, "x").await;
    assert!(began.elapsed() < ms(300) + SLACK, "{:?}", began.elapsed());
    guard.release().await.unwrap();
}
