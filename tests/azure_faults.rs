//! Azure Blob Storage, for which Azurite stands, and what goes wrong with it, on the way to it, and with those who hold
//! its locks. `--nocapture` shows how long things took.
//!
//! Leases last at least 15 seconds, so the scenarios that wait for their end run side by side.

mod common;
mod servers;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::history::History;
use common::{ms, secs};
use fencelock::azure::AzureLocks;
use fencelock::{ErrorKind, FencingGate, LockOptions, LockProvider, Loss, Provider};
use servers::azurite::AzuriteServer;
use servers::azurite_locks::{blob, provider, until_state, url, written_token};
use servers::holder::{Holder, Step};
use servers::left_out;
use servers::locks::{SLACK, granted, report, take, waits, within};
use servers::proxy::Proxy;
use tokio::task::{JoinSet, block_in_place};
use tokio::time::sleep;

type Locks = Provider<AzureLocks>;

/// The shortest that there is.
const TTL: Duration = secs(15);

/// The longest time between two looks of one who waits.
const POLL: Duration = ms(1500);

/// How long a request may take, until it counts as lost.
const REQUEST: Duration = secs(4);

/// Parts of requests by which a [`Proxy`] tells them.
const LEASE: &[u8] = b"comp=lease";
const ACQUIRE: &[u8] = b"x-ms-lease-action: acquire";
const RENEW: &[u8] = b"x-ms-lease-action: renew";
const RELEASE: &[u8] = b"x-ms-lease-action: release";
const CHANGE: &[u8] = b"x-ms-lease-action: change";
const SET_METADATA: &[u8] = b"comp=metadata";

/// One of several providers of a container.
fn direct(server: &AzuriteServer, container: &str) -> Locks {
    provider(server, server.addr(), container, LockOptions::new().ttl(TTL))
}

/// One whose requests go through a proxy.
fn through(proxy: &Proxy, server: &AzuriteServer, container: &str, options: LockOptions) -> Locks {
    provider(server, proxy.addr(), container, options.ttl(TTL))
}

async fn is_taken(provider: &Locks, name: &str) -> bool {
    let answer = within("an answer", provider.create_lock(name).try_acquire()).await;
    answer.expect("the server is there").is_none()
}

#[test]
#[ignore = "a process that other tests start"]
fn holder_process() {
    servers::holder::play();
}

const SHORT_JOB_URL: &str = "FENCELOCK_SHORT_JOB_URL";

/// Takes a lock, gives it back at once, and ends.
#[test]
#[ignore = "a process that other tests start"]
fn short_job_process() {
    let Ok(url) = std::env::var(SHORT_JOB_URL) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let provider = fencelock::connect(&url).await.expect("the server is there");
        let began = Instant::now();
        provider.create_lock("x").acquire().await.expect("free").release().await.expect("released");
        assert!(began.elapsed() < secs(3), "a release doesn't wait for hold_at_least: {:?}", began.elapsed());
        provider.close().await.expect("closed");
        println!("\nshort job: done");
    });
}

// What waits for leases to run out.

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn holders_that_die_or_stand_still_and_leases_that_run_out() {
    if left_out("azure") {
        return;
    }
    let server = Arc::new(block_in_place(AzuriteServer::start));
    let mut scenarios = JoinSet::new();
    scenarios.spawn(a_killed_holder(server.clone()));
    scenarios.spawn(a_frozen_holder(server.clone()));
    scenarios.spawn(a_release_that_comes_too_late(server.clone()));
    scenarios.spawn(a_lease_that_nobody_took(server.clone()));
    scenarios.spawn(a_renewal_that_comes_too_late(server.clone()));
    scenarios.spawn(a_lock_that_outlives_its_process(server.clone(), secs(8)));
    scenarios.spawn(a_lock_that_outlives_its_process(server.clone(), secs(20)));
    scenarios.spawn(many_locks(server.clone()));
    scenarios.join_all().await;
}

/// The lock of a killed holder is granted when its TTL has run out, and not before.
async fn a_killed_holder(server: Arc<AzuriteServer>) {
    let began = Instant::now();
    let mut holder = Holder::start(&url(&server, "killed", "ttl=15s"), "x");
    let dead = holder.holds().await;
    let waiter = waits(&direct(&server, "killed"), "x");
    let killed = Instant::now();
    block_in_place(|| holder.kill());
    let (guard, at) = granted(waiter).await;
    assert!(at - began >= TTL, "{:?}", at - began);
    assert!(at - killed < TTL + POLL + SLACK, "{:?}", at - killed);
    report("after the holder was killed (ttl 15 s)", at - killed);
    assert!(guard.fencing_token() > dead);
    guard.release().await.expect("it is held");
}

/// A holder that was stopped for longer than its TTL sees that before its next step, and doesn't disturb its successor.
async fn a_frozen_holder(server: Arc<AzuriteServer>) {
    let began = Instant::now();
    let mut holder = Holder::start(&url(&server, "frozen", "ttl=15s"), "x");
    let stale = holder.holds().await;
    holder.tell_to_step();
    assert_eq!(holder.stepped().await, Step::Done);
    let [next, third] = [(); 2].map(|()| direct(&server, "frozen"));
    let waiter = waits(&next, "x");
    block_in_place(|| holder.freeze());
    let frozen = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at - began >= TTL, "{:?}", at - began);
    assert!(at - frozen < TTL + POLL + SLACK, "{:?}", at - frozen);
    report("after the holder was frozen (ttl 15 s)", at - frozen);

    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).expect("the first");
    holder.tell_to_step();
    holder.thaw();
    assert_eq!(holder.stepped().await, Step::SawTheLoss);
    let refused = gate.enter(stale, |()| panic!("a stale write")).expect_err("it is refused");
    assert_eq!((refused.offered, refused.highest), (stale, guard.fencing_token()));
    // For longer than a renewal takes to come.
    for _ in 0..3 {
        sleep(TTL / 6).await;
        assert!(is_taken(&third, "x").await && !guard.is_lost());
    }
    guard.release().await.expect("it is held");
}

/// A guard that is released after its successor has got the lock says so, and leaves the successor's lease alone.
async fn a_release_that_comes_too_late(server: Arc<AzuriteServer>) {
    let [a, b, c] = [(); 3].map(|()| direct(&server, "late-release"));
    let lock = a.create_lock_with("x", LockOptions::new().auto_renew(false));
    let stale = lock.acquire().await.expect("free");
    let (guard, _) = granted(waits(&b, "x")).await;
    assert!(stale.is_lost());
    assert!(guard.fencing_token() > stale.fencing_token());
    assert_eq!(stale.release().await.expect_err("it is too late").loss(), Some(Loss::Expired));
    assert_eq!(block_in_place(|| server.lease_state("late-release", &blob("x"))), "leased");
    assert!(is_taken(&c, "x").await);
    guard.release().await.expect("it is held");
}

/// A lease that isn't renewed is lost when it runs out by the holder's clock, whether or not somebody wants it, and then
/// anybody can have it.
async fn a_lease_that_nobody_took(server: Arc<AzuriteServer>) {
    let [a, b] = [(); 2].map(|()| direct(&server, "nobody"));
    let lock = a.create_lock_with("x", LockOptions::new().auto_renew(false));
    let before = Instant::now();
    let held = lock.acquire().await.expect("free");
    let after = Instant::now();
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    assert!(before.elapsed() >= TTL && after.elapsed() < TTL + SLACK, "{:?}", after.elapsed());
    let lost = Instant::now();
    let guard = take(&b, "x").await;
    assert!(lost.elapsed() < POLL + SLACK, "{:?}", lost.elapsed());
    assert!(guard.fencing_token() > held.fencing_token());
    assert_eq!(held.release().await.expect_err("it is too late").loss(), Some(Loss::Expired));
    assert!(is_taken(&a, "x").await);
    guard.release().await.expect("it is held");
}

/// The service renews a lease that has run out, if nobody has taken it. For its holder it is lost all the same, and it
/// doesn't keep others out for longer than one more TTL.
async fn a_renewal_that_comes_too_late(server: Arc<AzuriteServer>) {
    let proxy = Proxy::start(server.addr());
    let a = through(&proxy, &server, "late-renewal", LockOptions::new());
    let b = direct(&server, "late-renewal");
    let held = take(&a, "x").await;
    let taken = Instant::now();
    // Renewals, and the release that may follow the loss.
    proxy.hold_requests_with(LEASE);
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    assert!(taken.elapsed() < TTL + SLACK, "{:?}", taken.elapsed());
    until_state(&server, "late-renewal", "x", "expired").await;
    proxy.release_requests();
    let late = Instant::now();
    let stale = held.fencing_token();
    assert!(held.is_lost());
    assert_eq!(held.release().await.expect_err("it is too late").loss(), Some(Loss::Expired));
    let (guard, at) = granted(waits(&b, "x")).await;
    assert!(at - late < TTL + POLL + SLACK, "{:?}", at - late);
    report("the next grant after a late renewal (ttl 15 s)", at - late);
    assert!(guard.fencing_token() > stale);
    guard.release().await.expect("it is held");
}

/// A lock that is held at least for some time is so after its release, and after the end of the process, and not for
/// longer; whether that time is a break period, or a lease of its own.
async fn a_lock_that_outlives_its_process(server: Arc<AzuriteServer>, time: Duration) {
    let container = format!("short-job-{}", time.as_secs());
    let [other, waiting] = [(); 2].map(|()| direct(&server, &container));
    let url = url(&server, &container, &format!("ttl=15s&hold_at_least={}s", time.as_secs()));
    let began = Instant::now();
    let mut job = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", "short_job_process", "--ignored", "--nocapture"])
        .env(SHORT_JOB_URL, url)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be started");
    let output = job.stdout.take().expect("it is piped");
    let (done, status) = block_in_place(|| {
        // To the end: the harness of the test has more to say.
        let said: Vec<_> = BufReader::new(output).lines().map_while(Result::ok).collect();
        (said.iter().any(|line| line == "short job: done"), job.wait().expect("it is our child"))
    });
    let ended = Instant::now();
    assert!(done && status.success(), "{status}");
    assert!(is_taken(&other, "x").await, "it is free after {:?}", began.elapsed());
    let (guard, at) = granted(waits(&waiting, "x")).await;
    assert!(at - began >= time, "{:?}", at - began);
    // A break period, which is in whole seconds, is rounded up.
    assert!(at - ended < time + secs(1) + POLL + SLACK, "{:?}", at - ended);
    report(&format!("free after a process with hold_at_least={time:?} has ended"), at - ended);
    guard.release().await.expect("it is held");
}

/// All of many locks of one process are renewed in time.
async fn many_locks(server: Arc<AzuriteServer>) {
    const LOCKS: usize = 200;
    let provider = direct(&server, "many");
    let mut claims = JoinSet::new();
    for i in 0..LOCKS {
        let lock = provider.create_lock(&i.to_string());
        claims.spawn(async move { lock.acquire().await.expect("free") });
    }
    let guards = within("all are taken", claims.join_all()).await;
    sleep(TTL + TTL / 5).await;
    for guard in guards {
        assert!(!guard.is_lost(), "{}", guard.name());
        guard.release().await.expect("it is held");
    }
}

// What an administrator does.

type Deed = fn(&AzuriteServer);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_an_administrator_does_is_heard_with_the_next_renewal() {
    if left_out("azure") {
        return;
    }
    let server = Arc::new(block_in_place(AzuriteServer::start));
    let mut scenarios = JoinSet::new();
    let deeds: [(&str, Deed); 3] = [
        ("broken", |server| server.break_lease("broken", &blob("x"))),
        ("no-blob", |server| server.delete_blob("no-blob", &blob("x"))),
        ("no-container", |server| server.delete_container("no-container")),
    ];
    for (container, deed) in deeds {
        scenarios.spawn(a_lock_that_is_taken_away(server.clone(), container, deed));
    }
    scenarios.join_all().await;
}

/// The holder hears of it with its next renewal. Meanwhile another can have the lock, with a higher token, which the
/// release of the first one leaves alone; what is missing is made again.
async fn a_lock_that_is_taken_away(server: Arc<AzuriteServer>, container: &str, deed: Deed) {
    // The container is missing when the first one comes.
    let [a, b, c] = [(); 3].map(|()| direct(&server, container));
    let held = take(&a, "x").await;
    block_in_place(|| deed(&server));
    let done = Instant::now();
    let guard = take(&b, "x").await;
    assert!(done.elapsed() < SLACK, "{container}: {:?}", done.elapsed());
    assert!(guard.fencing_token() > held.fencing_token(), "{container}");
    assert_eq!(written_token(&server, container, "x"), guard.fencing_token().get());
    assert_eq!(within("the loss", held.lost()).await, Loss::Taken, "{container}");
    assert!(done.elapsed() < TTL / 3 + SLACK, "{container}: {:?}", done.elapsed());
    report(&format!("the loss: {container} (ttl 15 s)"), done.elapsed());
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Taken));
    assert!(is_taken(&c, "x").await && !guard.is_lost());
    guard.release().await.expect("it is held");
    // A release that comes before the next renewal knows it, too.
    let held = take(&a, "x").await;
    block_in_place(|| deed(&server));
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Taken), "{container}");
    take(&b, "x").await.release().await.expect("it is held");
}

// Services that are down, stand still, or are slow.

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn services_that_are_down_or_stand_still_or_are_slow() {
    if left_out("azure") {
        return;
    }
    let mut scenarios = JoinSet::new();
    scenarios.spawn(a_short_restart());
    scenarios.spawn(a_long_outage());
    scenarios.spawn(a_short_standstill());
    scenarios.spawn(a_long_standstill());
    scenarios.spawn(a_slow_service());
    scenarios.join_all().await;
}

/// An outage that is shorter than the TTL is no loss.
async fn a_short_restart() {
    let server = block_in_place(|| AzuriteServer::options().durable().start());
    let [a, b] = [(); 2].map(|()| direct(&server, "locks"));
    let held = take(&a, "x").await;
    let taken = Instant::now();
    block_in_place(|| server.stop());
    sleep(secs(6)).await; // a renewal fails
    assert!(!held.is_lost());
    block_in_place(|| server.restart());
    // Azurite forgets when leases end as it restarts: it is a renewal that is seen.
    until_state(&server, "locks", "x", "leased").await;
    report("a renewal after a restart (ttl 15 s)", taken.elapsed());
    sleep((TTL + secs(2)).saturating_sub(taken.elapsed())).await;
    assert!(!held.is_lost());
    assert!(is_taken(&b, "x").await);
    let last = held.fencing_token();
    held.release().await.expect("it is held");
    let guard = take(&b, "x").await;
    assert!(guard.fencing_token() > last);
    guard.release().await.expect("it is held");
}

/// An outage that is longer than the TTL is a loss on time, and an error for who wants a lock; after it all goes on, with
/// rising tokens although all data is gone.
async fn a_long_outage() {
    let server = block_in_place(AzuriteServer::start);
    let [a, b] = [(); 2].map(|()| direct(&server, "locks"));
    let held = take(&a, "x").await;
    block_in_place(|| server.kill());
    let killed = Instant::now();
    let lock = b.create_lock_with("x", LockOptions::new().retry_for(secs(2)));
    let error = within("the error", lock.acquire()).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable());
    assert!(killed.elapsed() >= secs(1) && killed.elapsed() < secs(2) + SLACK, "{:?}", killed.elapsed());
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    assert!(killed.elapsed() < TTL + SLACK, "{:?}", killed.elapsed());
    report("the loss after a service was killed (ttl 15 s)", killed.elapsed());
    let waiter = waits(&b, "x");
    block_in_place(|| server.restart());
    let up = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at.saturating_duration_since(up) < POLL + SLACK);
    assert!(guard.fencing_token() > held.fencing_token());
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Expired));
    guard.release().await.expect("it is held");
}

/// A service that doesn't answer for less than the TTL loses nothing.
async fn a_short_standstill() {
    let server = block_in_place(AzuriteServer::start);
    let [a, b] = [(); 2].map(|()| direct(&server, "locks"));
    let held = take(&a, "x").await;
    let taken = Instant::now();
    block_in_place(|| server.freeze());
    sleep(secs(7)).await; // a renewal is stuck
    server.thaw();
    sleep((TTL + secs(2)).saturating_sub(taken.elapsed())).await;
    assert!(!held.is_lost());
    assert!(is_taken(&b, "x").await);
    held.release().await.expect("it is held");
    take(&b, "x").await.release().await.expect("it is held");
}

/// A service that doesn't answer for longer than the TTL loses the lock on time, and never has two holders: what was sent
/// to it meanwhile, and is done when it goes on, gives the lock to nobody.
async fn a_long_standstill() {
    let server = block_in_place(AzuriteServer::start);
    let a = direct(&server, "locks");
    let patient = LockOptions::new().ttl(TTL).retry_for(secs(60));
    let b = provider(&server, server.addr(), "locks", patient);
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    block_in_place(|| server.freeze());
    let frozen = Instant::now();
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    assert!(frozen.elapsed() < TTL + SLACK, "{:?}", frozen.elapsed());
    sleep((TTL + secs(2)).saturating_sub(frozen.elapsed())).await;
    assert!(!waiter.is_finished());
    server.thaw();
    let thawed = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at >= thawed);
    // Late requests may have taken it once more, for nobody.
    assert!(at - thawed < TTL + REQUEST + POLL + SLACK, "{:?}", at - thawed);
    report("the waiter after a service stood still for 17 s (ttl 15 s)", at - thawed);
    assert!(guard.fencing_token() > held.fencing_token());
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Expired));
    assert!(is_taken(&a, "x").await && !guard.is_lost());
    guard.release().await.expect("it is held");
}

/// A service that answers late, but within the time of a request, is good enough.
async fn a_slow_service() {
    let server = block_in_place(AzuriteServer::start);
    let proxy = Proxy::start(server.addr());
    proxy.delay_requests(ms(500));
    proxy.delay_replies(ms(500));
    let a = through(&proxy, &server, "locks", LockOptions::new());
    let b = direct(&server, "locks");
    let held = take(&a, "x").await;
    sleep(TTL + secs(2)).await;
    assert!(!held.is_lost());
    assert!(is_taken(&b, "x").await);
    held.release().await.expect("it is held");
    take(&b, "x").await.release().await.expect("it is held");
}

// The network.

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replies_that_are_lost() {
    if left_out("azure") {
        return;
    }
    let server = Arc::new(block_in_place(AzuriteServer::start));
    let mut scenarios = JoinSet::new();
    scenarios.spawn(lost_replies_to_claims(server.clone(), "acquire", ACQUIRE));
    scenarios.spawn(lost_replies_to_claims(server.clone(), "metadata", SET_METADATA));
    scenarios.spawn(a_lost_reply_to_a_renewal(server.clone()));
    scenarios.spawn(lost_replies_to_releases(server.clone(), "renew", RENEW));
    scenarios.spawn(lost_replies_to_releases(server.clone(), "release", RELEASE));
    scenarios.spawn(lost_replies_to_a_transfer(server.clone(), "change", CHANGE));
    scenarios.spawn(lost_replies_to_a_transfer(server.clone(), "change-metadata", SET_METADATA));
    scenarios.spawn(resets_in_replies(server.clone()));
    scenarios.spawn(contention_over_a_network_that_fails(server.clone()));
    scenarios.join_all().await;
}

/// A claim that was carried out, which its client can't know, ends in a grant after all, or in an error: then nothing
/// stays locked.
async fn lost_replies_to_claims(server: Arc<AzuriteServer>, what: &str, part: &[u8]) {
    let container = format!("lost-{what}");
    let proxy = Proxy::start(server.addr());
    let a = through(&proxy, &server, &container, LockOptions::new());
    let b = direct(&server, &container);
    let first = take(&b, "x").await;
    let mut last = first.fencing_token();
    first.release().await.expect("it is held");
    // Once with retries.
    proxy.drop_reply_to(part);
    let began = Instant::now();
    let guard = take(&a, "x").await;
    assert!(!proxy.is_aiming() && proxy.traffic().lost_replies > 0);
    assert!(began.elapsed() < REQUEST + POLL + SLACK, "{what}: {:?}", began.elapsed());
    report(&format!("a grant after a lost reply to {what}"), began.elapsed());
    assert!(guard.fencing_token() > last);
    assert_eq!(written_token(&server, &container, "x"), guard.fencing_token().get());
    assert!(is_taken(&b, "x").await);
    last = guard.fencing_token();
    guard.release().await.expect("it is held");
    // And without.
    proxy.drop_reply_to(part);
    let lock = a.create_lock_with("x", LockOptions::new().retry_for(Duration::ZERO));
    let error = within("the error", lock.try_acquire()).await.expect_err("nobody knows");
    let failed = Instant::now();
    assert!(error.is_retryable(), "{error:?}");
    let (guard, at) = granted(waits(&b, "x")).await;
    assert!(at - failed < POLL + SLACK, "{what}: {:?}", at - failed);
    report(&format!("free after a claim that failed by a lost reply to {what}"), at - failed);
    assert!(guard.fencing_token() > last);
    guard.release().await.expect("it is held");
}

/// A renewal is tried again.
async fn a_lost_reply_to_a_renewal(server: Arc<AzuriteServer>) {
    let proxy = Proxy::start(server.addr());
    let a = through(&proxy, &server, "lost-renewal", LockOptions::new());
    let b = direct(&server, "lost-renewal");
    let held = take(&a, "x").await;
    proxy.drop_reply_to(RENEW);
    sleep(TTL + secs(2)).await;
    assert!(!proxy.is_aiming() && proxy.traffic().lost_replies > 0);
    assert!(!held.is_lost());
    assert!(is_taken(&b, "x").await);
    held.release().await.expect("it is held");
    take(&b, "x").await.release().await.expect("it is held");
}

/// A release that was carried out, which its client can't know, is a success, and so is its repetition.
async fn lost_replies_to_releases(server: Arc<AzuriteServer>, what: &str, part: &[u8]) {
    let container = format!("lost-at-release-{what}");
    let proxy = Proxy::start(server.addr());
    let a = through(&proxy, &server, &container, LockOptions::new());
    let b = direct(&server, &container);
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    proxy.drop_reply_to(part);
    let began = Instant::now();
    held.release().await.expect("it is released in the end");
    assert!(!proxy.is_aiming() && proxy.traffic().lost_replies > 0);
    assert!(began.elapsed() < REQUEST + SLACK, "{what}: {:?}", began.elapsed());
    report(&format!("a release with a lost reply to its {what}"), began.elapsed());
    let (guard, at) = granted(waiter).await;
    assert!(at - began < REQUEST + POLL + SLACK, "{what}: {:?}", at - began);
    // Nothing that is repeated touches it.
    sleep(secs(1)).await;
    assert!(is_taken(&a, "x").await && !guard.is_lost());
    guard.release().await.expect("it is held");
}

/// A hand-over within a process that fails in the middle leaves the lock with nobody, and soon with the next one.
async fn lost_replies_to_a_transfer(server: Arc<AzuriteServer>, what: &str, part: &[u8]) {
    let container = format!("lost-at-{what}");
    let proxy = Proxy::start(server.addr());
    let a = through(&proxy, &server, &container, LockOptions::new());
    let b = direct(&server, &container);
    let held = take(&a, "x").await;
    let last = held.fencing_token();
    let waiter = waits(&a, "x");
    // It waits in the process, and looks at the server, too.
    let before = proxy.commands();
    proxy.until(|traffic| traffic.commands > before).await;
    proxy.drop_reply_to(part);
    let began = Instant::now();
    held.release().await.expect("it is released in the end");
    let (guard, at) = granted(waiter).await;
    assert!(!proxy.is_aiming(), "{what}: there was no transfer");
    assert!(at - began < 2 * REQUEST + POLL + SLACK, "{what}: {:?}", at - began);
    report(&format!("the next grant after a transfer with a lost reply to its {what}"), at - began);
    assert!(guard.fencing_token() > last);
    assert_eq!(written_token(&server, &container, "x"), guard.fencing_token().get());
    sleep(secs(1)).await;
    assert!(is_taken(&b, "x").await && !guard.is_lost());
    guard.release().await.expect("it is held");
    take(&b, "x").await.release().await.expect("it is held");
}

/// A connection that is reset in the middle of a reply is made again, and what was asked for is asked for again.
async fn resets_in_replies(server: Arc<AzuriteServer>) {
    let proxy = Proxy::start(server.addr());
    let a = through(&proxy, &server, "resets", LockOptions::new());
    let b = direct(&server, "resets");
    let mut tokens = Vec::new();
    for (part, bytes) in
        [(ACQUIRE, 0), (ACQUIRE, 20), (SET_METADATA, 0), (SET_METADATA, 20), (RENEW, 20), (RELEASE, 20)]
    {
        proxy.reset_in_reply_to(part, bytes);
        let began = Instant::now();
        let guard = take(&a, "x").await;
        tokens.push(guard.fencing_token());
        guard.release().await.expect("it is held");
        assert!(!proxy.is_aiming());
        assert!(began.elapsed() < POLL + SLACK, "{:?}", began.elapsed());
        let guard = take(&b, "x").await;
        tokens.push(guard.fencing_token());
        guard.release().await.expect("it is held");
    }
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
}

/// Everything at once, and never two holders.
async fn contention_over_a_network_that_fails(server: Arc<AzuriteServer>) {
    let proxies: Vec<_> = (0..3).map(|_| Proxy::start(server.addr())).collect();
    let history = Arc::new(History::default());
    let end = Instant::now() + secs(15);
    let mut tasks = JoinSet::new();
    for proxy in &proxies {
        let locks = servers::azurite_locks::locks(&server, proxy.addr(), "contention").poll_every(ms(100));
        let options = LockOptions::new().ttl(TTL);
        let provider = Provider::builder(locks).options(options).build().expect("possible options");
        let lock = provider.create_lock("x");
        let history = history.clone();
        tasks.spawn(async move {
            while Instant::now() < end {
                match lock.try_acquire_for(secs(3)).await {
                    Ok(Some(guard)) => drop(history.hold(guard, ms(5)).await), // its release may fail
                    Ok(None) => {}
                    Err(error) => assert!(error.is_retryable(), "{error}"),
                }
            }
        });
    }
    let mut round = 0;
    while Instant::now() < end {
        sleep(ms(150)).await;
        let proxy = &proxies[round % proxies.len()];
        match round % 5 {
            0 => proxy.reset_all(),
            1 => proxy.reset_in_reply(20),
            2 => proxy.hold_requests(),
            3 => proxies.iter().for_each(Proxy::release_requests),
            _ if round % 20 == 4 => proxy.drop_reply(1),
            _ => {}
        }
        round += 1;
    }
    proxies.iter().for_each(Proxy::release_requests);
    within("all have ended", tasks.join_all()).await;
    let grants = history.judge();
    println!("grants over a network that fails all the time: {grants}");
    assert!(grants >= 5, "{grants}");
}

// Tokens and metadata.

/// The tokens of one lock rise strictly over many grants of several providers, with what is remembered of the blob and
/// without; other metadata of the blob stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_and_other_metadata_stays() {
    if left_out("azure") {
        return;
    }
    let server = block_in_place(AzuriteServer::start);
    let providers = [(); 3].map(|()| direct(&server, "locks"));
    let guard = take(&providers[0], "x").await;
    let mut tokens = vec![guard.fencing_token()];
    guard.release().await.expect("it is held");
    let token = tokens[0].to_string();
    block_in_place(|| {
        let metadata = [("owner", "the shop"), ("Fencelock_Token", &*token)];
        server.set_metadata("locks", &blob("x"), &metadata, None);
    });
    for round in 0..30 {
        let guard = take(&providers[(round / 2) % 3], "x").await;
        tokens.push(guard.fencing_token());
        guard.release().await.expect("it is held");
    }
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    let last = tokens.last().expect("there are some").get();
    let metadata = block_in_place(|| server.metadata("locks", &blob("x")));
    let names: BTreeSet<_> = metadata.keys().map(String::as_str).collect();
    assert_eq!(names, BTreeSet::from(["fencelock_token", "owner"]));
    assert_eq!(metadata["owner"], "the shop");
    assert_eq!(metadata["fencelock_token"], last.to_string());

    // One that is ahead of the clock is exceeded all the same.
    let ahead = (last + 1_000_000_000_000).to_string();
    block_in_place(|| {
        let metadata = [("owner", "another"), ("fencelock_token", &*ahead)];
        server.set_metadata("locks", &blob("x"), &metadata, None);
    });
    for (i, provider) in (1..).zip(&providers) {
        let guard = take(provider, "x").await;
        assert_eq!(guard.fencing_token().get(), last + 1_000_000_000_000 + i);
        guard.release().await.expect("it is held");
    }
    assert_eq!(block_in_place(|| server.metadata("locks", &blob("x")))["owner"], "another");
}

/// A token that can't be read, or can't be exceeded, is an error at once, and leaves no lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_for_a_token_is_an_error_that_leaves_no_lease() {
    if left_out("azure") {
        return;
    }
    let server = block_in_place(AzuriteServer::start);
    let provider = direct(&server, "locks");
    let guard = take(&provider, "x").await;
    let token = guard.fencing_token();
    guard.release().await.expect("it is held");
    for garbage in ["garbage", "-1", "1.5", "99999999999999999999999"] {
        block_in_place(|| {
            server.set_metadata("locks", &blob("x"), &[("fencelock_token", garbage)], None);
        });
        let began = Instant::now();
        let error = within("the error", provider.create_lock("x").acquire()).await.expect_err(garbage);
        assert_eq!(error.kind(), ErrorKind::Config, "{garbage}: {error:?}");
        assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
        assert_eq!(block_in_place(|| server.lease_state("locks", &blob("x"))), "available", "{garbage}");
    }
    block_in_place(|| {
        server.set_metadata("locks", &blob("x"), &[("fencelock_token", &token.to_string())], None);
    });
    let guard = take(&provider, "x").await;
    assert!(guard.fencing_token() > token);
    guard.release().await.expect("it is held");
}

// Waiting.

/// However many wait in a process, one of them asks, about once a second; in the process the lock goes on at once, with
/// rising tokens, and to no one else before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_asks_for_all_who_wait_in_a_process() {
    const WAITERS: usize = 50;
    if left_out("azure") {
        return;
    }
    let server = block_in_place(AzuriteServer::start);
    let proxy = Proxy::start(server.addr());
    let holder = direct(&server, "locks");
    let provider = through(&proxy, &server, "locks", LockOptions::new());
    let held = take(&holder, "x").await;
    let mut waiters = JoinSet::new();
    for _ in 0..WAITERS {
        let lock = provider.create_lock("x");
        waiters.spawn(async move {
            let guard = lock.acquire().await.expect("granted in the end");
            let grant = (guard.fencing_token(), Instant::now());
            guard.release().await.expect("it is held");
            grant
        });
    }
    proxy.until(|traffic| traffic.commands > 0).await;
    sleep(secs(1)).await;
    let before = proxy.commands();
    sleep(secs(5)).await;
    let asked = proxy.commands() - before;
    println!("requests of {WAITERS} waiters within 5 s: {asked}");
    assert!((3..=11).contains(&asked), "{asked}");

    let last = held.fencing_token();
    held.release().await.expect("it is held");
    let released = Instant::now();
    let mut grants = within("all have had it", waiters.join_all()).await;
    grants.sort_by_key(|(_, at)| *at);
    assert!(grants[0].0 > last && grants.is_sorted_by(|(a, _), (b, _)| a < b), "{grants:?}");
    let [first, last] = [grants[0].1, grants[WAITERS - 1].1];
    assert!(first.saturating_duration_since(released) < POLL + SLACK);
    report("the first of the waiters after the release", first.saturating_duration_since(released));
    // If each had to look, it would be a second each.
    assert!(last - first < secs(15), "{:?}", last - first);
    report(&format!("{WAITERS} grants in one process"), last - first);
    until_state(&server, "locks", "x", "available").await;
}
