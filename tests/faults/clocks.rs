//! Servers whose wall clock is moved by an hour.

use std::time::{Duration, Instant};

use fencelock::{FencingGate, Loss};
use tokio::time::{sleep, timeout};

use crate::servers::holder::Holder;
use crate::servers::locks::{SLACK, granted, take, waits, within};
use crate::stage::{Stage, secs};

const HOUR: i64 = 3600;

/// Where leases expire by that clock, it ends them early: then the token protects, until the holder hears of it with
/// its next renewal. Elsewhere nothing happens, unless the server takes a session for one that is silent for an hour.
pub(crate) async fn clock_forward(stage: &Stage) {
    let ttl = 2 * stage.roomy_ttl();
    let [a, b] = stage.providers(ttl).await;
    let held = take(&a, "x").await;
    let mut waiter = waits(&b, "x");
    stage.until_waiting("x", 1).await;
    stage.each_server(|rig, server| rig.set_clock_offset(server, HOUR));
    let stepped = Instant::now();
    let old = held.fencing_token();
    let early = timeout(ttl / 2 + SLACK, &mut waiter).await;
    let guard = if let Ok(early) = early {
        let (guard, at) = early.expect("no panic");
        stage.report(&format!("the next holder (ttl {ttl:?})"), at - stepped);
        let loss = within("the loss", held.lost()).await;
        let (expected, bound) =
            if stage.is_lease() { (Loss::Taken, ttl / 3) } else { (Loss::SessionEnded, Duration::ZERO) };
        assert_eq!(loss, expected);
        assert!(at.elapsed() < bound + SLACK, "{:?}", at.elapsed());
        stage.report(&format!("the loss, {loss:?}, after that"), at.elapsed());
        guard
    } else {
        assert!(!stage.is_lease(), "leases are over by that clock");
        assert!(!held.is_lost(), "{:?}", held.lost().await);
        let released = Instant::now();
        held.release().await.expect("it is held");
        let (guard, at) = granted(waiter).await;
        assert!(at - released < SLACK, "{:?}", at - released);
        stage.report("nothing happens; the waiter after the release", at - released);
        guard
    };
    let gate = FencingGate::new(());
    gate.enter(guard.fencing_token(), |()| ()).expect("the first");
    gate.enter(old, |()| panic!("a stale write")).expect_err("it is refused");

    // And back, which doesn't turn tokens back.
    stage.each_server(|rig, server| rig.set_clock_offset(server, 0));
    let mut last = guard.fencing_token();
    guard.release().await.expect("it is held");
    for provider in [&a, &b, &a] {
        let guard = take(provider, "x").await;
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
        guard.release().await.expect("it is held");
    }
}

/// A holder that lives goes on, tokens rise, and one that dies after it leaves its lock for no longer than ever.
pub(crate) async fn clock_back(stage: &Stage) {
    let ttl = stage.kind.short_ttl.max(secs(2));
    let [a, b] = stage.providers(ttl).await;
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    stage.until_waiting("x", 1).await;
    stage.each_server(|rig, server| rig.set_clock_offset(server, -HOUR));
    sleep(ttl + ttl / 2).await;
    assert!(!held.is_lost(), "{:?}", held.lost().await);
    assert!(!waiter.is_finished(), "two at once");
    let guard = stage.hand_over(held, waiter, "the waiter after the release").await;
    guard.release().await.expect("it is held");

    let mut dies = Holder::start(&stage.url(ttl), "x");
    let token = dies.holds().await;
    let waiter = waits(&b, "x");
    stage.until_waiting("x", 1).await;
    let killed = Instant::now();
    dies.kill();
    let (guard, at) = granted(waiter).await;
    assert!(at - killed < stage.left_by_the_dead(ttl) + stage.look() + SLACK, "{:?}", at - killed);
    stage.report(&format!("the next holder after one died (ttl {ttl:?})"), at - killed);
    assert!(guard.fencing_token() > token);
    guard.release().await.expect("it is held");
}
