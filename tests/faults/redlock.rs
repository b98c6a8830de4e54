//! What happens to a few of several servers, or to most of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fencelock::{ErrorKind, LockOptions, Loss};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::servers::holder::Holder;
use crate::servers::locks::{Fault, SLACK, granted, take, waits, within};
use crate::stage::{LONG, Network, Stage, impatient, is_taken, ms, secs, sleep_after, stays, waits_after};

/// For how long a server that has restarted has no vote.
const NO_VOTE: Duration = secs(3);

/// How a server can be away.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Away {
    BlackHoled,
    Frozen,
    Killed,
}

impl Away {
    fn begin(self, stage: &Stage, network: &Network, server: usize) {
        match self {
            Self::BlackHoled => {
                network.to(server).cut_requests();
                network.to(server).cut_replies();
            }
            Self::Frozen => stage.rig.freeze(server),
            Self::Killed => stage.rig.kill(server),
        }
    }

    fn end(self, stage: &Stage, network: &Network, server: usize) {
        match self {
            Self::BlackHoled => {
                Fault::end(network.to(server));
                network.to(server).reset_all();
            }
            Self::Frozen => stage.rig.thaw(server),
            Self::Killed => stage.rig.restart(server),
        }
    }
}

/// Locks are kept, granted and waited for as ever.
pub(crate) async fn minority_down(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    for away in [Away::BlackHoled, Away::Frozen, Away::Killed] {
        let network = Network::start(stage);
        let [a, b] = [stage.by(&network, ttl).await, stage.by(&network, ttl).await];
        let name = format!("{away:?}");
        let held = take(&a, &name).await;
        away.begin(stage, &network, 0);
        let gone = Instant::now();
        let mut tokens = Vec::new();
        for round in 0..6 {
            let guard = take(if round % 2 == 0 { &a } else { &b }, "x").await;
            tokens.push(guard.fencing_token());
            guard.release().await.expect("it is held");
        }
        assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
        assert!(gone.elapsed() < 6 * (ttl / 10) + SLACK, "{:?}", gone.elapsed());
        stage.report(&format!("six grants with one {away:?}"), gone.elapsed());
        let waiter = waits(&b, &name);
        sleep_after(gone, ttl + ttl / 3).await;
        assert!(!held.is_lost() && !waiter.is_finished());
        let guard = stage.hand_over(held, waiter, &format!("a waiter with one {away:?}")).await;
        guard.release().await.expect("it is held");
        away.end(stage, &network, 0);
    }
}

/// An acquire fails, quickly, and works again afterwards.
pub(crate) async fn majority_down(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    for away in [Away::BlackHoled, Away::Frozen, Away::Killed] {
        let network = Network::start(stage);
        let a = stage.by(&network, ttl).await;
        take(&a, "x").await.release().await.expect("it is held");
        (0..2).for_each(|server| away.begin(stage, &network, server));
        let began = Instant::now();
        let error = within("an error", impatient(&a, "x").try_acquire()).await.expect_err("no majority");
        assert!(began.elapsed() < ttl / 2 + SLACK, "{away:?}: {:?}", began.elapsed());
        stage.report(&format!("the error with two {away:?}: {:?}", error.kind()), began.elapsed());
        // What was sent over a connection that hangs may have been granted, for all that is known.
        let honest = [ErrorKind::Unavailable, ErrorKind::Unknown];
        assert!(honest.contains(&error.kind()), "{away:?}: {error:?}");
        if away == Away::Killed {
            let error = within("an error", impatient(&a, "x").try_acquire()).await.expect_err("no majority");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        }
        let (began, patience) = (Instant::now(), ms(800));
        let some = a.create_lock_with("x", LockOptions::new().retry_for(patience));
        let error = within("an error", some.acquire()).await.expect_err("no majority");
        assert!(error.is_retryable(), "{away:?}: {error:?}");
        assert!(began.elapsed() < patience + ttl / 2 + SLACK, "{away:?}: {:?}", began.elapsed());
        let waiter = waits(&a, "x");
        (0..2).for_each(|server| away.end(stage, &network, server));
        let back = Instant::now();
        let (guard, at) = granted(waiter).await;
        let took = at.saturating_duration_since(back);
        let vote = if away == Away::Killed { NO_VOTE + secs(1) } else { Duration::ZERO };
        assert!(took < vote + secs(2) + SLACK, "{away:?}: {took:?}");
        stage.report(&format!("a waiter after two {away:?} are back"), took);
        guard.release().await.expect("it is held");
    }
}

/// Of those who try at the same moment one wins, each time.
pub(crate) async fn split_votes(stage: &Stage) {
    const ROUNDS: usize = 40;
    const CONTENDERS: usize = 5;
    let barrier = Arc::new(Barrier::new(CONTENDERS));
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for provider in stage.providers::<CONTENDERS>(LONG).await {
        let (barrier, lock) = (barrier.clone(), provider.create_lock("x"));
        tasks.spawn(async move {
            let mut won = Vec::new();
            for round in 0..ROUNDS {
                barrier.wait().await;
                let guard = lock.try_acquire().await.expect("the servers are there");
                barrier.wait().await;
                if let Some(guard) = guard {
                    won.push((round, guard.fencing_token()));
                    guard.release().await.expect("it is held");
                }
            }
            won
        });
    }
    let mut won = within("all rounds", tasks.join_all()).await.concat();
    won.sort_unstable();
    assert!(won.iter().map(|(round, _)| *round).eq(0..ROUNDS), "exactly one each time: {won:?}");
    assert!(won.is_sorted_by(|a, b| a.1 < b.1), "{won:?}");
    stage.report(&format!("{ROUNDS} times one of {CONTENDERS}"), began.elapsed());
}

/// A majority that comes when its time is over is no grant, and is given back.
pub(crate) async fn late_quorum(stage: &Stage) {
    let ttl = stage.kind.short_ttl;
    let network = Network::start(stage);
    let (late, other) = (stage.by(&network, ttl).await, stage.provider(stage.roomy_ttl()).await);
    take(&late, "x").await.release().await.expect("it is held");
    network.begin(Fault::DelayReplies(ttl + ttl / 2));
    for _ in 0..2 {
        let error = within("an error", impatient(&late, "x").try_acquire()).await.expect_err("too late");
        assert!(error.is_retryable(), "{error:?}");
    }
    let began = Instant::now();
    let guard = take(&other, "x").await;
    assert!(began.elapsed() < ttl + SLACK, "{:?}", began.elapsed());
    stage.report(&format!("the next holder after answers that come too late (ttl {ttl:?})"), began.elapsed());
    stays(&guard, &stage.provider(ttl).await, ttl).await;
    network.end();
    let mut token = guard.fencing_token();
    guard.release().await.expect("it is held");
    let guard = take(&late, "x").await;
    assert!(guard.fencing_token() > token);
    token = guard.fencing_token();
    guard.release().await.expect("it is held");

    // The majority is there in time, but the client isn't.
    let claim = stage.rig.claim_part("y", ttl);
    network.each(|proxy| proxy.hold_requests_with(&claim));
    let addrs: Vec<_> = (0..3).map(|server| network.to(server).addr()).collect();
    let mut client = Holder::start(&stage.url_by(&addrs, ttl), "y");
    client.is_connected().await;
    for server in 0..3 {
        network.to(server).until(|traffic| traffic.waiting > 0).await;
    }
    client.freeze();
    let voted = Instant::now();
    network.end();
    let guard = take(&other, "y").await;
    assert!(voted.elapsed() < ttl + SLACK, "{:?}", voted.elapsed());
    stage.report("the next holder after a client that stood still since it claimed", voted.elapsed());
    client.thaw();
    stage.until_waiting("y", 1).await;
    assert!(client.is_silent() && !guard.is_lost(), "two at once");
    let last = guard.fencing_token();
    guard.release().await.expect("it is held");
    assert!(client.holds().await > last && last > token);
}

/// One server of the two that have a lock loses its data, while a third one, which was away, comes back. Neither gives
/// the lock away, and no token is repeated.
pub(crate) async fn wiped_minority(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let network = Network::start(stage);
    let (a, b) = (stage.by(&network, ttl).await, stage.provider(ttl).await);
    stage.rig.kill(2);
    let held = Arc::new(take(&a, "x").await);
    let restarted = Instant::now();
    stage.rig.restart(2);
    let waiter = waits_after(&held, &b);
    // Until the third one has a vote, which nobody can see but by the time.
    sleep_after(restarted, NO_VOTE + secs(1)).await;
    assert!(!held.is_lost(), "{:?}", held.lost().await);

    // It can't hear of it, and relies on its deadline.
    network.begin(Fault::CutRequests);
    let cut = Instant::now();
    stage.rig.wipe(1);
    let (guard, at) = granted(waiter).await;
    assert!(at - cut < ttl + stage.ask() + SLACK, "{:?}", at - cut);
    stage.report(
        &format!("the next holder after one was wiped and the holder cut off (ttl {ttl:?})"),
        at - cut,
    );
    assert!(guard.fencing_token() > held.fencing_token());
    network.end();
    let held = Arc::into_inner(held).expect("nobody else has it");
    assert_eq!(held.release().await.expect_err("it is lost").loss(), Some(Loss::Expired));

    // With a vote again, and without the one that knew.
    sleep_after(cut, NO_VOTE + secs(1)).await;
    let again = waits(&stage.provider(ttl).await, "x");
    sleep(ms(700)).await;
    stage.rig.kill(0);
    let token = guard.fencing_token();
    assert!(!guard.is_lost());
    guard.release().await.expect("it is held");
    let (guard, _) = granted(again).await;
    assert!(guard.fencing_token() > token, "a token was repeated");
    guard.release().await.expect("it is held");
}

/// It counts for nothing: the loss comes when the last one by a majority is over, and nobody else has the lock before.
pub(crate) async fn renewal_on_a_minority(stage: &Stage) {
    let ttl = stage.roomy_ttl();
    let network = Network::start(stage);
    let a = stage.by(&network, ttl).await;
    let [b, c] = stage.providers(ttl).await;
    take(&b, "to connect").await.release().await.expect("it is held");
    let before = Instant::now();
    let held = Arc::new(take(&a, "x").await);
    for server in [1, 2] {
        network.to(server).cut_requests();
    }
    let (after, passed) = (Instant::now(), network.to(0).commands());
    let waiter = waits_after(&held, &b);
    network.to(0).until(|traffic| traffic.commands > passed).await;
    assert!(!held.is_lost(), "one renewal has failed");
    assert_eq!(within("the loss", held.lost()).await, Loss::Expired);
    let lost = Instant::now();
    assert!(lost - before >= ttl.mul_f64(0.98) && lost - after < ttl + SLACK, "{:?}", lost - after);
    stage.report(&format!("the loss (ttl {ttl:?})"), lost - after);
    let (guard, at) = granted(waiter).await;
    assert!(at - lost < ttl + stage.ask() + SLACK, "{:?}", at - lost);
    stage.report("the next holder", at - after);
    assert!(guard.fencing_token() > held.fencing_token());
    network.end();
    stays(&guard, &c, ttl / 2).await;
    drop(held);
    assert!(is_taken(&c, "x").await && !guard.is_lost());
    guard.release().await.expect("it is held");
}
