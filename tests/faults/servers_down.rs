//! Servers that restart, forget, stand still, or are down.

use std::sync::Arc;
use std::time::Instant;

use fencelock::{ErrorKind, LockOptions, Loss};
use tokio::time::sleep;

use crate::servers::locks::{SLACK, granted, take, waits, within};
use crate::servers::rigs::Rig;
use crate::stage::{
    LONG, Network, Stage, impatient, is_taken, ms, secs, sleep_after, stays, waits_after, waits_patiently,
};

/// A lease outlives a restart that is shorter than its TTL. A session doesn't, and its holder hears of it at once.
pub(crate) async fn server_restarted(stage: &Stage) {
    let ttl = if stage.is_lease() { stage.roomy_ttl() } else { LONG };
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    let held = take(&a, "x").await;
    let (token, since) = (held.fencing_token(), Instant::now());
    let waiter = waits_patiently(&b, "x");
    stage.until_waiting("x", 1).await;
    stage.each_server(Rig::restart);
    let (up, before) = (Instant::now(), network.mark());
    let mut free = up;
    if stage.is_lease() {
        network.until_more(&before, |traffic| traffic.replies).await;
        stage.report("held on, with an answer from each server", up.elapsed());
        sleep_after(since, ttl + ttl / 3).await;
        assert!(!held.is_lost(), "{:?}", held.lost().await);
        assert!(!waiter.is_finished(), "two at once");
        free = Instant::now();
        held.release().await.expect("it is held");
    } else {
        assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded);
        assert!(up.elapsed() < SLACK, "{:?}", up.elapsed());
        stage.report("the loss", up.elapsed());
    }
    let (next, at) = granted(waiter).await;
    let took = at.saturating_duration_since(free);
    let bound = stage.ask().max(stage.without_vote().saturating_sub(free - up));
    assert!(took < bound + SLACK, "{took:?}");
    stage.report("the waiter has the lock", took);
    assert!(next.fencing_token() > token);
    next.release().await.expect("it is held");
    take(&a, "x").await.release().await.expect("it is held");
}

/// The holder hears of it within a heartbeat, and meanwhile only the token protects.
pub(crate) async fn server_wiped(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let [a, b, c] = stage.providers(ttl).await;
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    stage.until_waiting("x", 1).await;
    stage.each_server(Rig::wipe);
    let wiped = Instant::now();
    let (next, at) = granted(waiter).await;
    stage.report("the next holder", at.saturating_duration_since(wiped));
    assert_eq!(within("the loss", held.lost()).await, Loss::Taken);
    assert!(wiped.elapsed() < ttl / 3 + SLACK, "{:?}", wiped.elapsed());
    stage.report(&format!("the loss (ttl {ttl:?})"), wiped.elapsed());
    assert!(next.fencing_token() > held.fencing_token());
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Taken));
    stays(&next, &c, ms(100)).await;
    next.release().await.expect("it is held");
}

/// What is shorter than the TTL changes nothing.
pub(crate) async fn server_frozen_briefly(stage: &Stage) {
    // A renewal falls into it, and there is a third of the TTL left for the next one.
    let ttl = stage.kind.short_ttl.max(secs(6));
    let standstill = ttl / 3;
    let [a, b] = stage.providers(ttl).await;
    let held = take(&a, "x").await;
    let waiter = waits(&b, "x");
    stage.until_waiting("x", 1).await;
    stage.each_server(Rig::freeze);
    let frozen = Instant::now();
    sleep(standstill).await;
    stage.each_server(Rig::thaw);
    assert!(!held.is_lost());
    sleep_after(frozen, ttl + ttl / 3).await;
    assert!(!held.is_lost(), "{:?}", held.lost().await);
    assert!(!waiter.is_finished(), "two at once");
    let what = format!("no loss by {standstill:?} (ttl {ttl:?}); the waiter after the release");
    let guard = stage.hand_over(held, waiter, &what).await;
    guard.release().await.expect("it is held");
}

/// The loss comes on time, by the holder's own clock, and nobody else has the lock before. What the server does late,
/// for one who has given up, is undone.
pub(crate) async fn server_frozen_past_ttl(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let (a, b) = (stage.provider(ttl).await, stage.provider(stage.roomy_ttl()).await);
    let (late_ttl, taken_back) = stage.taken_back();
    let [gives_up, other] = stage.providers(late_ttl).await;
    let before = Instant::now();
    let held = Arc::new(take(&a, "x").await);
    let waiter = waits_after(&held, &b);
    stage.until_waiting("x", 1).await;
    stage.each_server(Rig::freeze);
    let frozen = Instant::now();
    let late = impatient(&gives_up, "late");
    let late = tokio::spawn(async move { late.try_acquire().await });
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    let lost = Instant::now();
    // Redlock counts 1 % less, since clocks may differ.
    assert!(lost - before >= ttl.mul_f64(0.98), "{:?}", lost - before);
    assert!(lost - frozen < ttl + SLACK, "{:?}", lost - frozen);
    stage.report(&format!("the loss (ttl {ttl:?})"), lost - frozen);
    let error = within("the error", late).await.expect("no panic").expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error:?}");
    sleep_after(frozen, ttl + (ttl / 2).min(secs(2))).await;
    assert!(!waiter.is_finished());
    let thawed = Instant::now();
    stage.each_server(Rig::thaw);
    let late = take(&other, "late").await;
    assert!(thawed.elapsed() < taken_back + SLACK, "{:?}", thawed.elapsed());
    stage.report(&format!("a late grant is free again (ttl {late_ttl:?})"), thawed.elapsed());
    late.release().await.expect("it is held");
    let (guard, at) = granted(waiter).await;
    // Late requests may have renewed it once more, for nobody.
    assert!(at >= thawed && at - thawed < ttl + secs(4) + stage.ask() + SLACK, "{:?}", at - thawed);
    stage.report("the waiter after it goes on", at - thawed);
    assert!(guard.fencing_token() > held.fencing_token());
    let held = Arc::into_inner(held).expect("nobody else has it");
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Expired));
    assert!(is_taken(&other, "x").await && !guard.is_lost());
    guard.release().await.expect("it is held");
}

/// An outage is an error when it lasts longer than `retry_for`, and over when it is over.
pub(crate) async fn server_down(stage: &Stage) {
    let (ttl, patience) = (stage.kind.short_ttl, ms(800));
    let [a, b] = stage.providers(ttl).await;
    let held = take(&a, "x").await;
    take(&b, "y").await.release().await.expect("it is held");
    stage.each_server(Rig::kill);
    let killed = Instant::now();
    let some = b.create_lock_with("y", LockOptions::new().retry_for(patience));
    let error = within("an error", some.acquire()).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(
        killed.elapsed() >= patience / 2 && killed.elapsed() < patience + SLACK,
        "{:?}",
        killed.elapsed()
    );
    stage.report(&format!("the error (retry_for {patience:?})"), killed.elapsed());
    let began = Instant::now();
    let error = within("an error", impatient(&b, "y").try_acquire()).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    let error = within("an error", fencelock::connect(&stage.url(ttl))).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    let loss = within("the loss", held.lost()).await;
    assert_eq!(loss, if stage.is_lease() { Loss::Expired } else { Loss::SessionEnded });
    assert!(
        killed.elapsed() < stage.left_by_the_dead(ttl).max(3 * patience) + SLACK,
        "{:?}",
        killed.elapsed()
    );
    let waiter = waits_patiently(&b, "x");
    sleep(ms(300)).await;
    stage.each_server(Rig::restart);
    let up = Instant::now();
    let (guard, at) = granted(waiter).await;
    let took = at.saturating_duration_since(up);
    assert!(took < ttl + stage.without_vote() + secs(2) + SLACK, "{took:?}");
    stage.report("the lock again", took);
    assert!(guard.fencing_token() > held.fencing_token());
    guard.release().await.expect("it is held");
}

/// A lease doesn't notice that its connections are ended. A session is over at once; those who wait go on waiting.
pub(crate) async fn connections_ended(stage: &Stage) {
    let ttl = if stage.is_lease() { stage.roomy_ttl() } else { LONG };
    let network = Network::start(stage);
    let [a, b] = [stage.by(&network, ttl).await, stage.by(&network, ttl).await];
    let c = stage.provider(ttl).await;
    for _ in 0..2 {
        let held = take(&a, "x").await;
        let token = held.fencing_token();
        let waiter = waits(&b, "x");
        stage.until_waiting("x", 1).await;
        let before = network.mark();
        stage.rig.end_connections();
        let ended = Instant::now();
        let connects = network.until_more(&before, |traffic| traffic.connections);
        // Who has got it meanwhile, over a connection that was ended next, needs no other.
        let has_it = async {
            while !waiter.is_finished() {
                sleep(ms(5)).await;
            }
        };
        tokio::select! {
            () = connects => {}
            () = has_it, if !stage.is_lease() => {}
        }
        let mut free = ended;
        if stage.is_lease() {
            sleep(ttl + ttl / 3).await;
            assert!(!held.is_lost(), "{:?}", held.lost().await);
            assert!(!waiter.is_finished(), "two at once");
            free = Instant::now();
            held.release().await.expect("it is held");
        } else {
            assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded);
            assert!(ended.elapsed() < SLACK, "{:?}", ended.elapsed());
            stage.report("the loss", ended.elapsed());
        }
        let (mut guard, at) = granted(waiter).await;
        let took = at.saturating_duration_since(free);
        assert!(took < stage.ask() + SLACK, "{took:?}");
        stage.report("the waiter has the lock", took);
        assert!(guard.fencing_token() > token);
        sleep(ms(100)).await;
        if guard.is_lost() && !stage.is_lease() {
            // Its connection was one of those that were still to be ended when it got the lock.
            guard = take(&b, "x").await;
        }
        stays(&guard, &c, ms(100)).await;
        guard.release().await.expect("it is held");
    }
}
