//! Moments at which a job, a driver, a waiter or a lease could be lost: runtimes that end or stand still, panics, hangs, and
//! answers that come late. Each of these was a bug once.

mod common;

use std::sync::Arc;

use common::faulty::{Fault, Faulty, Op};
use common::{ms, runtime, secs};
use fencelock::file::FileLocks;
use fencelock::memory::Memory;
use fencelock::{DistributedLock, ErrorKind, LockGuard, LockOptions, LockProvider, Provider, Result};
use tokio::task::JoinHandle;

/// A task that waits for the lock `x`.
fn waiter(provider: &Arc<Provider<Faulty>>, options: LockOptions) -> JoinHandle<Result<LockGuard>> {
    let lock = provider.create_lock_with("x", options);
    tokio::spawn(async move { lock.acquire().await })
}

/// A lock whose guard was dropped, and whose server refuses whatever it is asked from then on.
async fn dropped_while_the_server_is_down() -> Box<dyn DistributedLock> {
    let server = Faulty::default();
    let options = LockOptions::new().ttl(secs(3600)).retry_for(secs(10));
    let lock = server.provider().create_lock_with("x", options);
    let guard = lock.acquire().await.expect("free");
    for op in [Op::Claim, Op::Release, Op::Transfer, Op::Renew, Op::Abandon] {
        server.always(op, Fault::Refuse(ErrorKind::Unavailable));
    }
    drop(guard);
    tokio::time::sleep(ms(1)).await;
    lock
}

#[test]
fn a_job_taken_but_not_yet_polled_survives_its_runtime() {
    let server = Faulty::default();
    let provider = server.provider();
    let name = |n: u32| format!("x{n}");
    runtime().block_on(async {
        let mut guards = Vec::new();
        for n in 0..200 {
            guards.push(provider.create_lock(&name(n)).acquire().await.unwrap());
        }
        drop(guards);
        tokio::task::yield_now().await;
    });
    runtime().block_on(async {
        for n in 0..200 {
            let lock = provider.create_lock(&name(n));
            let guard = tokio::time::timeout(secs(5), lock.acquire()).await;
            assert!(guard.is_ok(), "{} is stuck after {} releases", lock.name(), server.count(Op::Release));
        }
    });
}

#[test]
fn a_driver_that_was_never_polled_is_replaced() {
    let server = Faulty::default().without_transfer();
    let provider = Arc::new(server.provider());
    let (holders, waiters) = (runtime(), runtime());
    let guard = holders.block_on(async { provider.create_lock("x").acquire().await.unwrap() });
    waiters.block_on(async {
        let provider = provider.clone();
        tokio::spawn(async move { provider.create_lock("x").acquire().await });
        tokio::time::sleep(ms(20)).await;
    });
    holders.block_on(async { guard.release().await.unwrap() }); // the driver goes to `waiters`
    drop(waiters);
    let got = holders
        .block_on(async { tokio::time::timeout(secs(3), provider.create_lock("x").acquire()).await.is_ok() });
    assert!(got);
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_is_not_answered_holds_up_nobody_for_ever() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    server.once(Op::Transfer, Fault::Hang);
    let guard = provider.create_lock("x").acquire().await.unwrap();
    let waiter = waiter(&provider, LockOptions::new());
    tokio::time::sleep(ms(10)).await;
    drop(guard);
    drop(tokio::time::timeout(secs(3600), waiter).await.expect("served within an hour").unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn release_returns_although_the_transfer_is_not_answered() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    server.once(Op::Transfer, Fault::Hang);
    let guard = provider.create_lock("x").acquire().await.unwrap();
    let waiter = waiter(&provider, LockOptions::new());
    tokio::time::sleep(ms(10)).await;
    assert!(tokio::time::timeout(secs(3600), guard.release()).await.is_ok(), "release hangs");
    drop(waiter);
}

#[test]
fn a_release_that_panics_is_not_tried_in_a_hot_loop() {
    let server = Faulty::default();
    let provider = server.provider();
    server.always(Op::Release, Fault::Panic);
    runtime().block_on(async {
        let options = LockOptions::new().ttl(ms(200));
        drop(provider.create_lock_with("x", options).acquire().await.unwrap());
        tokio::time::sleep(ms(600)).await;
    });
    assert!(server.count(Op::Release) < 100, "{} releases", server.count(Op::Release));
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_queued_on_the_server_is_abandoned_when_a_later_try_of_it_fails() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let other = server.provider();
    let guard = other.create_lock("x").acquire().await.unwrap();
    let waiter = waiter(&provider, LockOptions::new().retry_for(secs(60)));
    tokio::time::sleep(secs(5)).await; // its driver waits on the server: it has queued there
    server.once(Op::Claim, Fault::Refuse(ErrorKind::Unavailable));
    tokio::time::sleep(secs(8)).await; // asked again after 10 s, refused, then under a new owner
    let calls = server.calls(Op::Claim);
    assert!(calls[2].waits && calls[3].waits && calls[4].waits, "{calls:?}");
    assert_eq!(server.count(Op::Abandon), 1, "of the first owner");
    drop(guard);
    drop(waiter.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn one_hiccup_after_a_long_wait_is_not_an_outage() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let other = server.provider();
    let guard = other.create_lock("x").acquire().await.unwrap();
    let waiter = waiter(&provider, LockOptions::new());
    tokio::time::sleep(secs(5)).await; // its driver waits on the server: it has queued there
    server.once(Op::Claim, Fault::Refuse(ErrorKind::Unavailable));
    tokio::time::sleep(secs(8)).await; // asked again after 10 s, refused, then under a new owner
    drop(guard);
    drop(waiter.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_kept_lock_is_renewed_over_a_network_that_takes_20_ms() {
    let server = Faulty::default();
    server.always(Op::Renew, Fault::Slow(ms(20)));
    let provider = server.provider();
    let options = LockOptions::new().ttl(secs(3)).hold_at_least(secs(30));
    let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
    guard.release().await.unwrap();
    let other = server.provider();
    for second in 0..29 {
        tokio::time::sleep(secs(1)).await;
        assert!(other.create_lock("x").try_acquire().await.unwrap().is_none(), "free after {second} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_kept_lock_that_was_taken_away_is_not_renewed_for_ever() {
    let server = Faulty::default();
    let provider = server.provider();
    let options = LockOptions::new().ttl(secs(3)).hold_at_least(secs(30));
    let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
    guard.release().await.unwrap();
    assert!(server.memory().revoke("x"));
    tokio::time::sleep(secs(20)).await;
    assert!(server.count(Op::Renew) < 10, "{} renewals", server.count(Op::Renew));
}

#[tokio::test(start_paused = true)]
async fn a_try_after_the_last_waiter_has_left_does_not_say_busy() {
    let server = Faulty::default().without_transfer();
    let provider = Arc::new(server.provider());
    let lock = provider.create_lock("x");
    let guard = lock.acquire().await.unwrap();
    {
        let waiting = lock.acquire();
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(ms(1), &mut waiting).await.is_err());
        guard.release().await.unwrap();
    } // nobody has it, nobody waits
    assert!(lock.try_acquire().await.unwrap().is_some());
}

#[test]
fn a_grant_that_comes_after_the_keepers_runtime_has_gone_is_renewed() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let first = runtime();
    first.block_on(async { drop(provider.create_lock("a").acquire().await.unwrap()) });
    server.once(Op::Claim, Fault::AnswerLate(ms(300)));
    let second = std::thread::spawn({
        let provider = provider.clone();
        move || {
            runtime().block_on(async {
                let lock = provider.create_lock_with("x", LockOptions::new().ttl(secs(1)));
                let guard = lock.acquire().await.unwrap();
                tokio::time::sleep(secs(2)).await;
                guard.is_lost()
            })
        }
    });
    std::thread::sleep(ms(150));
    drop(first);
    assert!(!second.join().unwrap(), "it was not renewed");
}

#[test]
fn a_file_guard_dropped_after_the_releasers_runtime_has_gone_is_released() {
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::new(FileLocks::new(dir.path()));
    let other = Provider::new(FileLocks::new(dir.path()));
    let first = runtime();
    first.block_on(async { drop(provider.create_lock("a").acquire().await.unwrap()) });
    runtime().block_on(async {
        let options = LockOptions::new().ttl(secs(1));
        let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
        std::thread::spawn(move || drop(first)).join().unwrap();
        drop(guard);
        let got = other.create_lock("x").try_acquire_for(secs(4)).await.unwrap();
        assert!(got.is_some(), "still locked");
    });
}

#[tokio::test(start_paused = true)]
async fn memory_is_first_come_first_served_when_a_lease_runs_out() {
    let memory = Memory::new();
    let providers: Vec<_> = (0..3).map(|_| Arc::new(Provider::new(memory.clone()))).collect();
    let options = LockOptions::new().ttl(secs(3));
    let held = providers[0].create_lock_with("x", options.clone().auto_renew(false)).acquire().await.unwrap();
    std::mem::forget(held);
    let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
    for number in [1, 2] {
        let (provider, options, sender) = (providers[number].clone(), options.clone(), sender.clone());
        tokio::spawn(async move {
            let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
            sender.send(number).unwrap();
            tokio::time::sleep(ms(10)).await;
            drop(guard);
        });
        tokio::time::sleep(ms(100)).await;
    }
    assert_eq!((order.recv().await, order.recv().await), (Some(1), Some(2)));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_behind_a_failing_release_rides_out_retry_for_and_no_more() {
    let lock = dropped_while_the_server_is_down().await;
    let answer = tokio::time::timeout(secs(60), lock.acquire()).await;
    assert_eq!(answer.expect("an answer within a minute").unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_behind_a_failing_release_is_no_plain_none() {
    let lock = dropped_while_the_server_is_down().await;
    assert!(lock.try_acquire_for(secs(5)).await.is_err(), "None although the server is down");
}

#[tokio::test(start_paused = true)]
async fn release_is_not_ok_when_nothing_was_confirmed() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let guard = provider.create_lock("x").acquire().await.unwrap();
    let waiter = waiter(&provider, LockOptions::new());
    tokio::time::sleep(ms(10)).await;
    server.always(Op::Transfer, Fault::Refuse(ErrorKind::Unavailable));
    server.always(Op::Release, Fault::Refuse(ErrorKind::Unavailable));
    assert!(guard.release().await.is_err(), "Ok, and the server has confirmed nothing");
    drop(waiter);
}

#[test]
fn lost_moves_between_runtimes() {
    let provider = Arc::new(Provider::new(Memory::new()));
    let home = runtime();
    let guard = home.block_on(async {
        let options = LockOptions::new().ttl(ms(500)).auto_renew(false);
        provider.create_lock_with("x", options).acquire().await.unwrap()
    });
    let mut lost = Box::pin(guard.lost());
    runtime().block_on(async { tokio::time::timeout(ms(10), &mut lost).await.unwrap_err() });
    assert_eq!(home.block_on(lost), fencelock::Loss::Expired);
}

#[test]
fn a_waiter_behind_an_expired_guard_is_served_although_the_keeper_stands_still() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let idle = runtime();
    idle.block_on(async { drop(provider.create_lock("a").acquire().await.unwrap()) });
    runtime().block_on(async {
        let options = LockOptions::new().ttl(secs(1));
        let lock = provider.create_lock_with("x", options);
        let _guard = lock.acquire().await.unwrap();
        let got = lock.try_acquire_for(secs(4)).await.unwrap();
        assert!(got.is_some(), "the lease ran out 3 s ago and nobody here noticed");
    });
}

#[test]
fn close_does_what_a_runtime_that_stands_still_has_not_come_to() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let idle = runtime();
    let guard = idle.block_on(async { provider.create_lock("x").acquire().await.unwrap() });
    drop(guard);
    runtime().block_on(async {
        let began = std::time::Instant::now();
        assert!(tokio::time::timeout(secs(5), provider.close()).await.is_ok(), "{:?}", began.elapsed());
    });
    assert_eq!(server.count(Op::Release), 1);
}

#[test]
fn close_goes_on_when_the_releasers_runtime_ends_meanwhile() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let first = runtime();
    server.once(Op::Release, Fault::Hang);
    first.block_on(async {
        drop(provider.create_lock("x").acquire().await.unwrap());
        while server.count(Op::Release) == 0 {
            tokio::task::yield_now().await;
        }
    });
    let closing = std::thread::spawn({
        let provider = provider.clone();
        move || runtime().block_on(async { tokio::time::timeout(secs(5), provider.close()).await.is_ok() })
    });
    std::thread::sleep(ms(200));
    drop(first);
    assert!(closing.join().unwrap());
}

#[test]
fn a_short_ttl_is_not_renewed_without_a_pause() {
    let server = Faulty::default();
    let provider = server.provider();
    runtime().block_on(async {
        let options = LockOptions::new().ttl(ms(60));
        let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
        tokio::time::sleep(ms(600)).await;
        assert!(!guard.is_lost());
    });
    assert!(server.count(Op::Renew) < 100, "{} renewals in 10 TTLs", server.count(Op::Renew));
}

#[tokio::test(start_paused = true)]
async fn kept_locks_do_not_cost_the_held_ones_their_renewal() {
    let server = Faulty::default();
    server.always(Op::Renew, Fault::Slow(ms(20)));
    let provider = server.provider();
    let options = LockOptions::new().ttl(secs(3));
    for kept in 0..30 {
        let lock = provider.create_lock_with(&format!("k{kept}"), options.clone().hold_at_least(secs(60)));
        lock.acquire().await.unwrap().release().await.unwrap();
    }
    let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
    for second in 0..50 {
        tokio::time::sleep(secs(1)).await;
        assert!(!guard.is_lost(), "lost after {second} s on a healthy server");
    }
}

#[tokio::test]
async fn a_waiter_is_woken_also_after_the_file_was_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let providers: Vec<_> = (0..3).map(|_| Arc::new(Provider::new(FileLocks::new(dir.path())))).collect();
    let first = providers[0].create_lock("x").acquire().await.unwrap();
    let waiter = tokio::spawn({
        let provider = providers[2].clone();
        async move { provider.create_lock("x").acquire().await.map(|guard| (guard, std::time::Instant::now())) }
    });
    tokio::time::sleep(ms(100)).await;
    std::fs::remove_file(providers[0].backend().lock_file("x")).unwrap();
    let second = providers[1].create_lock("x").acquire().await.unwrap();
    drop(first);
    tokio::time::sleep(ms(700)).await; // it has found the new file
    let began = std::time::Instant::now();
    second.release().await.unwrap();
    let (_guard, at) = waiter.await.unwrap().unwrap();
    // A poll would come 300 ms later.
    assert!(at - began < ms(150), "woken after {:?}", at - began);
}

#[test]
fn a_panicking_abandon_is_no_hot_loop() {
    let server = Faulty::default();
    let provider = server.provider();
    server.once(Op::Claim, Fault::LoseAnswer);
    server.always(Op::Abandon, Fault::Panic);
    runtime().block_on(async {
        let options = LockOptions::new().ttl(ms(200)).retry_for(ms(0));
        let _ = provider.create_lock_with("x", options).try_acquire().await;
        tokio::time::sleep(ms(600)).await;
    });
    assert!(server.count(Op::Abandon) < 100, "{} abandons", server.count(Op::Abandon));
}

#[test]
fn max_hold_is_noticed_after_a_freeze_without_the_keeper() {
    let provider = Provider::new(Memory::new());
    runtime().block_on(async {
        let options = LockOptions::new().max_hold(ms(200));
        let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
        std::thread::sleep(ms(500)); // frozen
        assert!(guard.is_lost(), "held for longer than max_hold");
    });
}

#[tokio::test(start_paused = true)]
async fn who_lost_an_answer_keeps_its_place() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let mut overtaken = 0;
    for round in 0..50 {
        let name = format!("x{round}");
        server.once(Op::Claim, Fault::LoseAnswer);
        let first = tokio::spawn({
            let (provider, name) = (provider.clone(), name.clone());
            async move { provider.create_lock(&name).acquire().await.unwrap().fencing_token() }
        });
        tokio::time::sleep(ms(2)).await;
        let second = provider.create_lock(&name).acquire().await.unwrap().fencing_token();
        overtaken += u32::from(second < first.await.unwrap());
    }
    assert_eq!(overtaken, 0, "of 50 were overtaken by a later caller");
}

#[test]
fn a_driver_that_always_panics_is_no_hot_loop() {
    let server = Faulty::default().polling();
    let provider = Arc::new(server.provider());
    let other = server.provider();
    let told = runtime().block_on(async {
        let guard = other.create_lock("x").acquire().await.unwrap();
        let waiter = waiter(&provider, LockOptions::new().retry_for(ms(300)));
        tokio::time::sleep(ms(50)).await;
        server.always(Op::Claim, Fault::Panic);
        tokio::time::sleep(ms(900)).await;
        drop(guard);
        waiter.is_finished()
    });
    assert!(told, "the waiter has waited for three times its retry_for");
    assert!(server.count(Op::Claim) < 100, "{} claims", server.count(Op::Claim));
}
