//! What a network does to a holder, and to one who would like to be.

use std::sync::Arc;
use std::time::Instant;

use fencelock::{ErrorKind, Loss};
use tokio::time::sleep;

use crate::servers::locks::{Fault, SLACK, granted, take, within};
use crate::servers::proxy::{Proxy, Traffic};
use crate::stage::{LONG, Network, Stage, impatient, is_taken, ms, secs, sleep_after, stays, waits_after};

/// Nothing gets through to the server, for less than the TTL and for more.
pub(crate) async fn requests_cut(stage: &Stage) {
    tokio::join!(
        shorter(stage, Fault::HoldRequests),
        shorter_if_lease(stage, Fault::CutRequests),
        longer(stage, Fault::HoldRequests),
        longer(stage, Fault::CutRequests),
    );
}

/// No answer gets through.
pub(crate) async fn replies_cut(stage: &Stage) {
    tokio::join!(
        shorter(stage, Fault::HoldReplies),
        shorter_if_lease(stage, Fault::CutReplies),
        longer(stage, Fault::HoldReplies),
        longer(stage, Fault::CutReplies),
    );
}

/// What takes longer than the TTL comes too late.
pub(crate) async fn renewal_slower_than_ttl(stage: &Stage) {
    let by = stage.kind.short_ttl + stage.kind.short_ttl.min(secs(2));
    tokio::join!(longer(stage, Fault::DelayRequests(by)), longer(stage, Fault::DelayReplies(by)));
}

/// A connection on which something has been lost for ever is over, and so is its session: TCP doesn't do that to one.
async fn shorter_if_lease(stage: &Stage, fault: Fault) {
    if stage.is_lease() {
        shorter(stage, fault).await;
    }
}

/// One renewal is stuck or lost, or its answer is. That is no loss.
async fn shorter(stage: &Stage, fault: Fault) {
    let (ttl, name) = (stage.roomy_ttl(), format!("shorter {fault:?}"));
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    let held = take(&a, &name).await;
    let (taken, before) = (Instant::now(), network.mark());
    network.begin(fault);
    match fault {
        Fault::CutRequests => network.until_more(&before, |traffic| traffic.lost_requests).await,
        Fault::CutReplies => network.until_more(&before, |traffic| traffic.lost_replies).await,
        Fault::HoldReplies => network.until_more(&before, |traffic| traffic.commands).await,
        _ => network.until_more(&before, |traffic| traffic.waiting).await,
    }
    assert!(!held.is_lost());
    let (healed, before) = (Instant::now(), network.mark());
    network.end();
    network.until_more(&before, |traffic| traffic.replies).await;
    stage
        .report(&format!("{fault:?} for less than the TTL is no loss; an answer after it"), healed.elapsed());
    sleep_after(taken, ttl + ttl / 3).await;
    stays(&held, &b, ms(200)).await;
    held.release().await.expect("it is held");
    take(&b, &name).await.release().await.expect("it is held");
}

/// The loss comes on time, and nobody else has the lock before. Where the server ends grants by their TTL, others have
/// it then; otherwise when the end of the connection comes through.
async fn longer(stage: &Stage, fault: Fault) {
    let (ttl, name) = (stage.kind.short_ttl, format!("longer {fault:?}"));
    let network = Network::start(stage);
    let a = stage.by(&network, ttl).await;
    let [b, c] = stage.providers(stage.roomy_ttl()).await;
    // All is connected, and known.
    take(&a, &name).await.release().await.expect("it is held");
    let before = Instant::now();
    let held = Arc::new(take(&a, &name).await);
    network.begin(fault);
    let after = Instant::now();
    let waiter = waits_after(&held, &b);
    let why = within("the loss", held.lost()).await;
    // A server that ends the session then may say so a moment before a timer on a busy machine.
    let expected = why == Loss::Expired || (why == Loss::SessionEnded && !stage.is_lease());
    assert!(expected, "{fault:?}: {why:?}");
    let lost = Instant::now();
    // Redlock counts 1 % less, since clocks may differ.
    assert!(
        lost - before >= ttl.mul_f64(0.98) && lost - after < ttl + SLACK,
        "{fault:?}: {:?}",
        lost - after
    );
    if stage.is_session_only()
        && !matches!(fault, Fault::HoldReplies | Fault::CutReplies | Fault::DelayReplies(_))
    {
        network.end();
    }
    // In the worst case a last renewal was carried out just before the loss.
    let (guard, at) = granted(waiter).await;
    assert!(at - lost < ttl + stage.ask() + SLACK, "{fault:?}: {:?}", at - lost);
    stage.report(&format!("{fault:?} for longer (ttl {ttl:?}): the loss"), lost - after);
    stage.report(&format!("{fault:?} for longer (ttl {ttl:?}): the next holder"), at - after);
    assert!(guard.fencing_token() > held.fencing_token());

    // What comes late changes nothing.
    network.end();
    network.until_all_has_come().await;
    stays(&guard, &c, ttl / 2).await;
    let held = Arc::into_inner(held).expect("nobody else has it");
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(why), "{fault:?}");
    guard.release().await.expect("it is held");
    take(&a, &name).await.release().await.expect("it is held");
}

/// A claim was carried out, and its client doesn't hear of it. An error says so, and nothing stays locked; who tries
/// again gets the lock.
pub(crate) async fn reply_to_grant_lost(stage: &Stage) {
    let (ttl, taken_back) = stage.taken_back();
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    let first = take(&a, "x").await;
    let mut token = first.fencing_token();
    first.release().await.expect("it is held");
    let claim = stage.rig.claim_part("x", ttl);

    network.each(|proxy| proxy.drop_reply_to(&claim));
    let began = Instant::now();
    let error = within("the error", impatient(&a, "x").try_acquire()).await.expect_err("nobody knows");
    assert_eq!((error.kind(), network.is_aiming()), (ErrorKind::Unknown, false), "{error:?}");
    stage.report("the error", began.elapsed());
    let failed = Instant::now();
    let guard = take(&b, "x").await;
    assert!(failed.elapsed() < taken_back + SLACK, "{:?}", failed.elapsed());
    stage.report(&format!("the next holder after the error (ttl {ttl:?})"), failed.elapsed());
    assert!(guard.fencing_token() > token);
    token = guard.fencing_token();
    guard.release().await.expect("it is held");
    take(&a, "x").await.release().await.expect("it is held");

    network.each(|proxy| proxy.drop_reply_to(&claim));
    let began = Instant::now();
    let guard = take(&a, "x").await;
    assert!(!network.is_aiming() && began.elapsed() < taken_back + secs(10), "{:?}", began.elapsed());
    stage.report("the lock for one who tries again", began.elapsed());
    assert!(guard.fencing_token() > token && is_taken(&b, "x").await);
    guard.release().await.expect("it is held");
}

/// What the holder hasn't heard doesn't count for it: the old deadline stands. If the next renewal comes through in
/// time, nothing is lost.
pub(crate) async fn reply_to_renewal_lost(stage: &Stage) {
    tokio::join!(one_answer_lost(stage), all_answers_lost(stage));
}

async fn one_answer_lost(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    let held = take(&a, "one").await;
    let (taken, before) = (Instant::now(), network.mark());
    if stage.is_lease() {
        network.each(|proxy| proxy.drop_reply(1));
        network.until_more(&before, |traffic| traffic.lost_replies).await;
    } else {
        // A session on which an answer has got lost for ever is over; it may be late.
        network.begin(Fault::HoldReplies);
        network.until_more(&before, |traffic| traffic.commands).await;
        sleep(ttl / 6).await;
        network.end();
    }
    assert!(!network.is_aiming() && !held.is_lost());
    sleep_after(taken, ttl + ttl / 3).await;
    stays(&held, &b, ms(200)).await;
    held.release().await.expect("it is held");
    take(&b, "one").await.release().await.expect("it is held");
}

async fn all_answers_lost(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let network = Network::start(stage);
    let a = stage.by(&network, ttl).await;
    let before = Instant::now();
    let held = take(&a, "all").await;
    let (taken, passed) = (Instant::now(), network.mark());
    network.begin(Fault::CutReplies);
    network.until_more(&passed, |traffic| traffic.lost_replies).await;
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    assert!(before.elapsed() >= ttl.mul_f64(0.98), "{:?}", before.elapsed());
    // Counted from a renewal, it would be a third later at least.
    assert!(taken.elapsed() < ttl + ttl / 4, "{:?}", taken.elapsed());
    stage.report(&format!("the loss at the old deadline (ttl {ttl:?})"), taken.elapsed());
}

/// A connection that is reset in the middle of an answer is never used again, and what was asked for is asked for
/// again. A session has lost its locks by that.
pub(crate) async fn reset_in_mid_frame(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    take(&a, "x").await.release().await.expect("it is held");
    let claim = stage.rig.claim_part("x", ttl);
    // Whoever keeps several connections may have used another one by now.
    let over = |traffic: &Traffic| traffic.connections - traffic.open;
    let mut token = None;
    for bytes in [0, 1, 9, 20] {
        let before = network.mark();
        network.each(|proxy| proxy.reset_in_reply_to(&claim, bytes));
        let began = Instant::now();
        let guard = take(&a, "x").await;
        assert!(!network.is_aiming());
        assert!(began.elapsed() < stage.ask() + SLACK, "{:?}", began.elapsed());
        stage.report(&format!("a grant, reset after {bytes} bytes of the first answer"), began.elapsed());
        network.until_more(&before, over).await;
        assert!(Some(guard.fencing_token()) > token);
        token = Some(guard.fencing_token());
        assert!(is_taken(&b, "x").await && !guard.is_lost());
        guard.release().await.expect("it is held");
    }

    let (held, began) = (take(&a, "x").await, Instant::now());
    if stage.is_lease() {
        let before = network.mark();
        network.each(|proxy| proxy.reset_in_reply(3));
        network.until_more(&before, over).await;
        sleep_after(began, ttl + ttl / 3).await;
        stays(&held, &b, ms(200)).await;
        held.release().await.expect("it is held");
        return;
    }
    // The next answer may be to a heartbeat of another session, which holds nothing.
    let loss = async {
        loop {
            network.each(|proxy| proxy.reset_in_reply(3));
            if let Ok(loss) = tokio::time::timeout(ttl, held.lost()).await {
                return loss;
            }
        }
    };
    assert_eq!(within("the loss", loss).await, Loss::SessionEnded);
    let next = take(&a, "x").await;
    assert!(next.fencing_token() > held.fencing_token());
    next.release().await.expect("it is held");
}

/// All connections are reset, and none can be made for a moment. A lease isn't lost by that; a session is, at once, and
/// the lock is free for others although nobody could tell the server.
pub(crate) async fn network_resets(stage: &Stage) {
    let ttl = if stage.is_lease() { stage.roomy_ttl() } else { LONG };
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    let mut held = take(&a, "x").await;
    let mut since = Instant::now();
    for _ in 0..3 {
        let token = held.fencing_token();
        network.each(Proxy::refuse);
        let reset = Instant::now();
        network.each(Proxy::reset_all);
        if stage.is_lease() {
            sleep(ms(300)).await;
            network.each(Proxy::accept);
            let before = network.mark();
            network.until_more(&before, |traffic| traffic.replies).await;
            assert!(!held.is_lost(), "{:?}", held.lost().await);
            continue;
        }
        assert_eq!(within("the loss", held.lost()).await, Loss::SessionEnded);
        stage.report("the loss", reset.elapsed());
        let theirs = take(&b, "x").await;
        assert!(reset.elapsed() < SLACK, "{:?}", reset.elapsed());
        stage.report("the next holder", reset.elapsed());
        assert!(theirs.fencing_token() > token);
        theirs.release().await.expect("it is held");
        network.each(Proxy::accept);
        held = take(&a, "x").await;
        since = Instant::now();
    }
    if stage.is_lease() {
        sleep_after(since, ttl + ttl / 3).await;
        stage.report("three resets are no loss", since.elapsed());
    }
    stays(&held, &b, ms(200)).await;
    held.release().await.expect("it is held");
    take(&b, "x").await.release().await.expect("it is held");
}
