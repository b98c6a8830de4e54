//! Releases that come at the same time as renewals, or too late, and locks that are taken away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fencelock::{ErrorKind, LockOptions, Loss};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::servers::locks::{Fault, SLACK, granted, take, waits, within};
use crate::stage::{Locks, Network, Stage, is_taken, ms, secs, sleep_after, stays, waits_patiently};

/// However close they are, a lock that was released is free, and stays so.
pub(crate) async fn release_races_renewal(stage: &Stage) {
    const NAMES: u64 = 12;
    let ttl = stage.kind.short_ttl;
    let rounds = if ttl > secs(2) { 1 } else { 8 };
    let network = Network::start(stage);
    // So that both are often on their way at once.
    network.begin(Fault::DelayRequests(ms(2)));
    let (a, b) = (Arc::new(stage.by(&network, ttl).await), Arc::new(stage.provider(ttl).await));
    let began = Instant::now();
    let mut races = JoinSet::new();
    for name in 0..NAMES {
        let (a, b) = (a.clone(), b.clone());
        races.spawn(async move {
            let mut slow = 0;
            for round in 0..rounds {
                // A renewal is due after a third of the TTL.
                let time = (ttl / 3).saturating_sub(ms(8)) + ms((round * 7 + name * 3) % 20);
                slow += u64::from(race(&a, &b, &name.to_string(), time).await);
                sleep(ms(round % 5)).await;
            }
            slow
        });
    }
    let slow: u64 = within("all races", races.join_all()).await.into_iter().sum();
    stage.report(&format!("{} races, {slow} lost by being slow", NAMES * rounds), began.elapsed());
    assert!(slow < NAMES * rounds / 4, "hardly anything was shown");
}

/// Holds the lock for so long. Whether that, or a release, took too long, as on a machine that is busy for a TTL.
async fn race(a: &Locks, b: &Locks, name: &str, time: Duration) -> bool {
    let guard = take(a, name).await;
    let token = guard.fencing_token();
    sleep(time).await;
    if is_slow(guard.release().await) {
        return true;
    }
    let next = within("an answer", b.create_lock(name).try_acquire()).await.expect("there is no fault");
    let next = next.expect("it is free");
    assert!(next.fencing_token() > token);
    sleep(ms(5)).await; // a renewal may be on its way still
    if is_slow(next.release().await) {
        return true;
    }
    sleep(ms(3)).await;
    assert!(!is_taken(b, name).await, "it was revived");
    false
}

/// Whether a release has come too late, or wasn't answered in time.
fn is_slow(released: fencelock::Result<()>) -> bool {
    let Err(error) = released else { return false };
    assert!(error.loss() == Some(Loss::Expired) || error.kind() == ErrorKind::Unknown, "{error:?}");
    true
}

/// A guard that is released after somebody else has got the lock says so, and leaves that one alone.
pub(crate) async fn stale_release(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let a = stage.provider(ttl).await;
    let [b, c] = stage.providers(stage.roomy_ttl()).await;
    let before = Instant::now();
    let lock = a.create_lock_with("x", LockOptions::new().auto_renew(false));
    let old = within("the lock", lock.acquire()).await.expect("free");
    let (guard, at) = granted(waits(&b, "x")).await;
    assert!(old.is_lost(), "two at once");
    let took = at - before;
    assert!(took >= ttl.mul_f64(0.98) && took < ttl + stage.look() + SLACK, "{took:?}");
    stage.report(&format!("the next holder after a lock that isn't renewed (ttl {ttl:?})"), took);
    assert!(guard.fencing_token() > old.fencing_token());
    assert_eq!(old.release().await.expect_err("it is lost").loss(), Some(Loss::Expired));
    stays(&guard, &c, ms(200)).await;
    guard.release().await.expect("it is held");
}

/// A release that arrives, or is repeated, when somebody else has the lock leaves that one alone.
pub(crate) async fn late_release(stage: &Stage) {
    tokio::join!(stuck_release(stage), unheard_release(stage));
}

/// It is on its way until the grant is over.
async fn stuck_release(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let network = Network::start(stage);
    let a = stage.by(&network, ttl).await;
    let [b, c] = stage.providers(stage.roomy_ttl()).await;
    let (held, passed) = (take(&a, "stuck").await, network.mark());
    let token = held.fencing_token();
    let waiter = waits_patiently(&b, "stuck");
    network.begin(Fault::HoldRequests);
    let began = Instant::now();
    let release = tokio::spawn(held.release());
    network.until_more(&passed, |traffic| traffic.waiting).await;
    let released = within("the release", release).await.expect("no panic");
    assert_eq!(released.expect_err("nobody has heard of it").kind(), ErrorKind::Unknown);
    stage.report("a release that is stuck is an error", began.elapsed());
    sleep_after(began, ttl).await;
    if stage.is_session_only() {
        assert!(!waiter.is_finished(), "only the end of the session frees it");
        network.end();
    }
    let (guard, at) = granted(waiter).await;
    assert!(at - began < ttl + stage.ask() + SLACK, "{:?}", at - began);
    stage.report(&format!("the next holder after a release that is stuck (ttl {ttl:?})"), at - began);
    assert!(guard.fencing_token() > token);
    network.end();
    network.until_all_has_come().await;
    stays(&guard, &c, ttl / 2).await;
    guard.release().await.expect("it is held");
    take(&a, "stuck").await.release().await.expect("it is held");
}

/// It is carried out, and tried again since its answer is lost.
async fn unheard_release(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let network = Network::start(stage);
    let a = stage.by(&network, ttl).await;
    let [b, c] = stage.providers(ttl).await;
    let held = take(&a, "unheard").await;
    let token = held.fencing_token();
    let waiter = waits(&b, "unheard");
    stage.until_waiting("unheard", 1).await;
    network.begin(Fault::CutReplies);
    let began = Instant::now();
    assert!(!held.is_lost(), "{:?}", held.lost().await);
    let release = tokio::spawn(held.release());
    let (guard, at) = granted(waiter).await;
    // There it takes two requests, and the second one is sent when the first one was answered, or tried again.
    let again = if stage.kind.name == "azure" { 2 * ttl / 3 } else { Duration::ZERO };
    assert!(at - began < again + stage.ask() + SLACK, "{:?}", at - began);
    stage.report("the waiter after a release whose answer is lost", at - began);
    assert!(guard.fencing_token() > token);
    if stage.is_lease() {
        let passed = network.mark();
        network.until_more(&passed, |traffic| traffic.commands).await;
    }
    network.end();
    let released = within("the release", release).await.expect("no panic");
    if let Err(error) = &released {
        assert_eq!(error.kind(), ErrorKind::Unknown, "{error:?}");
    }
    let heard = if released.is_ok() { "is heard of after all" } else { "ends, and isn't known" };
    stage.report(&format!("that release {heard}"), began.elapsed());
    stays(&guard, &c, ms(200)).await;
    guard.release().await.expect("it is held");
    take(&a, "unheard").await.release().await.expect("it is held");
}

/// Somebody deletes the lock, or ends the session that has it. The holder hears of it: at once if a connection ends by
/// that, and otherwise within a heartbeat.
pub(crate) async fn taken_away(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let [a, b, c] = stage.providers(ttl).await;
    let held = take(&a, "x").await;
    stage.rig.take_away("x");
    let done = Instant::now();
    let next = take(&b, "x").await;
    assert!(done.elapsed() < SLACK, "{:?}", done.elapsed());
    stage.report("the next holder", done.elapsed());
    assert!(next.fencing_token() > held.fencing_token());
    let loss = within("the loss", held.lost()).await;
    let (expected, bound) = if ["postgres", "sqlserver"].contains(&stage.kind.name) {
        (Loss::SessionEnded, Duration::ZERO)
    } else {
        (Loss::Taken, ttl / 3)
    };
    assert_eq!(loss, expected);
    assert!(done.elapsed() < bound + SLACK, "{:?}", done.elapsed());
    stage.report(&format!("the loss, {loss:?} (ttl {ttl:?})"), done.elapsed());
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(expected));
    stays(&next, &c, ms(200)).await;
    next.release().await.expect("it is held");
    // A release that comes before the next heartbeat knows it, too.
    let held = take(&a, "x").await;
    stage.rig.take_away("x");
    let loss = held.release().await.expect_err("it is lost").loss();
    assert_eq!(loss, Some(expected));
    assert!(!is_taken(&b, "x").await);
}
