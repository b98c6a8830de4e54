//! Processes that hold a lock, or wait for it, and are killed or stand still.

use std::time::Instant;

use fencelock::FencingGate;
use tokio::time::{sleep, timeout};

use crate::servers::holder::{Holder, Step};
use crate::servers::locks::{SLACK, granted, take, waits, within};
use crate::stage::{LONG, Stage, ms, stays};

/// The next one has the lock when the TTL is over, or when the connection has ended.
pub(crate) async fn holder_killed(stage: &Stage) {
    let ttl = if stage.is_lease() { stage.kind.short_ttl } else { LONG };
    let began = Instant::now();
    let mut holder = Holder::start(&stage.url(ttl), "x");
    let dead = holder.holds().await;
    let provider = stage.provider(ttl).await;
    let waiter = waits(&provider, "x");
    stage.until_waiting("x", 1).await;
    let killed = Instant::now();
    holder.kill();
    let (guard, at) = granted(waiter).await;
    assert!(guard.fencing_token() > dead);
    assert!(at - killed < stage.left_by_the_dead(ttl) + stage.look() + SLACK, "{:?}", at - killed);
    assert!(!stage.is_lease() || at - began >= ttl, "a lease stands for its TTL");
    stage.report(&format!("the next holder (ttl {ttl:?})"), at - killed);
    guard.release().await.expect("it is held");
}

/// Nobody waits for one who was killed while waiting.
pub(crate) async fn waiter_killed(stage: &Stage) {
    let [holder, next] = stage.providers(LONG).await;
    let held = take(&holder, "x").await;
    let mut first = Holder::start(&stage.url(LONG), "x");
    first.is_connected().await;
    stage.until_waiting("x", 1).await;
    let waiter = waits(&next, "x");
    stage.until_waiting("x", 2).await;
    let before = stage.rig.connections();
    first.kill();
    if stage.is_lease() && before > 0 {
        // The server itself picks the next one, of those of whom it knows that they are there.
        let noticed = async {
            while stage.rig.connections() >= before {
                sleep(ms(2)).await;
            }
        };
        within("the server has noticed it", noticed).await;
    }
    let released = Instant::now();
    held.release().await.expect("it is held");
    let (guard, at) = granted(waiter).await;
    // One that was alive would have got up to three seconds to confirm.
    let bound = if next.capabilities().wakes_waiters { ms(1500) } else { stage.look() + SLACK };
    assert!(at - released < bound, "{:?}", at - released);
    stage.report("past a killed waiter", at - released);
    guard.release().await.expect("it is held");
}

/// Another takes over when the TTL is over. The one that was frozen sees the loss before it does one more step, and
/// what it writes all the same is refused.
pub(crate) async fn holder_frozen(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let began = Instant::now();
    let mut holder = Holder::start(&stage.url(ttl), "x");
    let old = holder.holds().await;
    holder.tell_to_step();
    assert_eq!(holder.stepped().await, Step::Done);
    let [next, third] = stage.providers(stage.roomy_ttl()).await;
    let waiter = waits(&next, "x");
    stage.until_waiting("x", 1).await;
    holder.freeze();
    let frozen = Instant::now();
    let (guard, at) = granted(waiter).await;
    assert!(at - began >= ttl, "{:?}", at - began);
    assert!(at - frozen < ttl + stage.look() + SLACK, "{:?}", at - frozen);
    stage.report(&format!("the next holder (ttl {ttl:?})"), at - frozen);

    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).expect("the first");
    holder.tell_to_step();
    holder.thaw();
    assert_eq!(holder.stepped().await, Step::SawTheLoss);
    let refused = gate.enter(old, |()| panic!("a stale write")).expect_err("it is refused");
    assert_eq!((refused.offered, refused.highest), (old, guard.fencing_token()));
    // Whatever it sent when it woke up, it isn't its lock.
    stays(&guard, &third, ttl / 2).await;
    guard.release().await.expect("it is held");
}

/// Nobody ends the grant of one that is only frozen. When it goes on, one whose session may have ended meanwhile sees
/// that it can't be sure, and gives the lock back; a file's lock was its own all the time.
pub(crate) async fn frozen_holder_keeps_it(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let mut holder = Holder::start(&stage.url(ttl), "x");
    let old = holder.holds().await;
    let [next, third] = stage.providers(stage.roomy_ttl()).await;
    let mut waiter = waits(&next, "x");
    stage.until_waiting("x", 1).await;
    holder.freeze();
    assert!(timeout(2 * ttl, &mut waiter).await.is_err(), "the frozen holder has it");
    holder.tell_to_step();
    let mut gone = Instant::now();
    holder.thaw();
    if stage.kind.name == "file" {
        assert_eq!(holder.stepped().await, Step::Done);
        assert!(timeout(ttl, &mut waiter).await.is_err(), "it still has it");
        gone = Instant::now();
        holder.kill();
    } else {
        assert_eq!(holder.stepped().await, Step::SawTheLoss);
    }
    let (guard, at) = granted(waiter).await;
    assert!(at - gone < SLACK, "{:?}", at - gone);
    stage.report(
        &format!("frozen for {:?}, kept on; the next holder after it went on or died", 2 * ttl),
        at - gone,
    );
    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).expect("the first");
    gate.enter(old, |()| panic!("a stale write")).expect_err("it is refused");
    stays(&guard, &third, ttl / 2).await;
    guard.release().await.expect("it is held");
}
