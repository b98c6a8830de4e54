//! How grants come back: releases that fail or are broken off, dropped guards, and close.

mod common;

use std::pin::pin;
use std::task::{Context, Waker};

use common::faulty::{Fault, Faulty, Op};
use common::{ms, secs};
use fencelock::{DistributedLock, ErrorKind, LockOptions, LockProvider, Loss};
use tokio::time::Instant;

fn options() -> LockOptions {
    LockOptions::new().ttl(secs(30)).retry_for(secs(1))
}

/// Whether another provider gets the lock within this many milliseconds.
async fn is_free_within(server: &Faulty, millis: u64) -> bool {
    let elsewhere = server.provider();
    elsewhere.create_lock("x").try_acquire_for(ms(millis)).await.is_ok_and(|guard| guard.is_some())
}

#[tokio::test(start_paused = true)]
async fn a_release_rides_out_a_hiccup() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let refuse = Fault::Refuse(ErrorKind::Unavailable);
    server.once(Op::Release, refuse).once(Op::Release, refuse);
    lock.acquire().await.unwrap().release().await.unwrap();
    assert_eq!(server.count(Op::Release), 3);
}

/// The first try freed it and its answer was lost; the second finds nothing to free. That is success.
#[tokio::test(start_paused = true)]
async fn not_held_after_a_lost_answer_is_success() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    server.once(Op::Release, Fault::LoseAnswer);
    lock.acquire().await.unwrap().release().await.unwrap();
    assert_eq!(server.count(Op::Release), 2);
}

#[tokio::test(start_paused = true)]
async fn not_held_at_the_first_try_is_a_loss() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let guard = lock.acquire().await.unwrap();
    assert!(server.memory().revoke("x"));
    let newer = server.provider().create_lock("x").acquire().await.unwrap();
    let error = guard.release().await.unwrap_err();
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, Some(Loss::Taken)));
    assert!(!is_free_within(&server, 50).await, "the newer grant stands");
    newer.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_release_that_fails_for_long_is_an_error_and_goes_on_in_the_background() {
    for fault in [Fault::Refuse(ErrorKind::Unavailable), Fault::Hang] {
        let server = Faulty::default();
        let lock = server.provider().create_lock_with("x", options());
        let guard = lock.acquire().await.unwrap();
        server.always(Op::Release, fault);
        let began = Instant::now();
        assert!(guard.release().await.unwrap_err().is_retryable());
        assert!(began.elapsed() <= secs(1) + ms(5), "{:?}", began.elapsed());
        tokio::time::sleep(secs(2)).await;
        server.heal();
        assert!(is_free_within(&server, 8_000).await, "well before its ttl");
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_is_broken_off_at_any_point_is_finished_in_the_background() {
    // A call that hangs is given a quarter of the TTL.
    let options = options().ttl(secs(4));
    for fault in [None, Some(Fault::AnswerLate(ms(5))), Some(Fault::Hang), Some(Fault::NeverAnswer)] {
        for polls in 0..4 {
            let server = Faulty::default();
            let lock = server.provider().create_lock_with("x", options.clone());
            let guard = lock.acquire().await.unwrap();
            if let Some(fault) = fault {
                server.once(Op::Release, fault);
            }
            {
                let mut release = pin!(guard.release());
                for _ in 0..polls {
                    if release.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            }
            assert!(is_free_within(&server, 1200).await, "{fault:?} after {polls} polls");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_acquire_that_is_broken_off_at_any_point_leaves_nothing_locked() {
    for fault in [None, Some(Fault::AnswerLate(ms(5))), Some(Fault::NeverAnswer), Some(Fault::LoseAnswer)] {
        for held in [false, true] {
            for polls in 0..6 {
                let server = Faulty::default();
                let mut holder = None;
                if held {
                    holder = server.provider().create_lock_with("x", options()).try_acquire().await.unwrap();
                }
                let provider = server.provider();
                let lock = provider.create_lock_with("x", options());
                if let Some(fault) = fault {
                    server.once(Op::Claim, fault);
                }
                {
                    let mut acquire = pin!(lock.acquire());
                    for _ in 0..polls {
                        if acquire.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                            break;
                        }
                        tokio::time::sleep(ms(2)).await;
                    }
                }
                server.heal(); // what has not met the fault by now shall not
                if let Some(holder) = holder {
                    holder.release().await.unwrap();
                }
                assert!(is_free_within(&server, 100).await, "{fault:?}, held: {held}, after {polls} polls");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn close_waits_for_what_was_dropped() {
    let server = Faulty::default();
    let provider = server.provider();
    server.always(Op::Release, Fault::AnswerLate(ms(700)));
    for name in ["a", "b", "c"] {
        drop(provider.create_lock(name).acquire().await.unwrap());
    }
    let began = Instant::now();
    provider.close().await.unwrap();
    assert_eq!(began.elapsed(), ms(700));
    assert_eq!(server.count(Op::Release), 3);
    provider.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn close_does_not_wait_for_a_backend_that_never_ends() {
    let server = Faulty::default();
    let provider = server.provider();
    server.once(Op::Close, Fault::Hang);
    let began = Instant::now();
    assert_eq!(provider.close().await.unwrap_err().kind(), ErrorKind::Unknown);
    assert!(began.elapsed() <= secs(11), "{:?}", began.elapsed());
    provider.close().await.unwrap(); // what failed is tried again
    provider.close().await.unwrap();
    assert_eq!(server.count(Op::Close), 2);
}

#[tokio::test(start_paused = true)]
async fn close_waits_no_longer_than_the_ttl() {
    let server = Faulty::default();
    let provider = server.provider();
    server.always(Op::Release, Fault::Hang).always(Op::Abandon, Fault::Hang);
    drop(provider.create_lock_with("x", options()).acquire().await.unwrap());
    let began = Instant::now();
    provider.close().await.unwrap();
    assert!(began.elapsed() <= secs(30) + ms(5), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn close_sends_waiters_away_and_refuses_callers_but_leaves_guards_alone() {
    let server = Faulty::default();
    let provider = std::sync::Arc::new(server.provider());
    let guard = provider.create_lock_with("mine", options()).acquire().await.unwrap();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let waiters: Vec<_> = ["x", "x", "mine"]
        .into_iter()
        .map(|name| {
            let provider = provider.clone();
            tokio::spawn(async move { provider.create_lock(name).acquire().await.map(drop) })
        })
        .collect();
    tokio::time::sleep(secs(1)).await;
    provider.close().await.unwrap();
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    }
    for name in ["x", "new"] {
        let lock = provider.create_lock(name);
        assert_eq!(lock.try_acquire().await.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(lock.acquire().await.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(lock.try_acquire_for(secs(1)).await.unwrap_err().kind(), ErrorKind::Closed);
    }
    tokio::time::sleep(secs(100)).await;
    assert!(!guard.is_lost(), "renewed after close, too");
    guard.release().await.unwrap();
    held.release().await.unwrap();
    assert!(server.provider().create_lock("mine").try_acquire().await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_claim_under_way_while_the_provider_closes_grants_nothing() {
    let server = Faulty::default();
    let provider = server.provider();
    let lock = provider.create_lock("x");
    server.once(Op::Claim, Fault::AnswerLate(ms(100)));
    let (acquired, closed) = tokio::join!(lock.try_acquire(), async {
        tokio::time::sleep(ms(50)).await;
        provider.close().await
    });
    closed.unwrap();
    assert_eq!(acquired.unwrap_err().kind(), ErrorKind::Closed);
    assert!(is_free_within(&server, 10).await);
}

/// The caller comes into the queue only after the waiters have been sent away.
#[tokio::test(start_paused = true)]
async fn a_claim_that_is_answered_busy_while_the_provider_closes_does_not_hold_it_up() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = server.provider();
    let lock = provider.create_lock("x");
    server.once(Op::Claim, Fault::AnswerLate(ms(100)));
    let began = Instant::now();
    let (acquired, closed) = tokio::join!(lock.acquire(), async {
        tokio::time::sleep(ms(50)).await;
        provider.close().await
    });
    closed.unwrap();
    assert_eq!(acquired.unwrap_err().kind(), ErrorKind::Closed);
    assert!(began.elapsed() <= ms(110), "{:?}", began.elapsed());
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn hold_at_least_counts_after_close_too() {
    let server = Faulty::default();
    let provider = server.provider();
    let guard = provider.create_lock_with("x", options().hold_at_least(secs(60))).acquire().await.unwrap();
    provider.close().await.unwrap();
    guard.release().await.unwrap();
    tokio::time::sleep(secs(59)).await;
    assert!(!is_free_within(&server, 10).await);
    assert!(is_free_within(&server, 1100).await);
}

/// What was dropped last is released although nothing of the provider is left.
#[tokio::test(start_paused = true)]
async fn a_provider_that_is_gone_still_releases_what_was_dropped() {
    let server = Faulty::default();
    let provider = server.provider();
    let lock: Box<dyn DistributedLock> = provider.create_lock("x");
    let guard = lock.acquire().await.unwrap();
    drop(lock);
    drop(provider);
    tokio::time::sleep(secs(100)).await;
    assert!(!guard.is_lost(), "a guard keeps its engine alive");
    drop(guard);
    assert!(is_free_within(&server, 10).await);
}

/// The server frees it by itself; who shuts down with the server gone must not wait for another TTL.
#[tokio::test(start_paused = true)]
async fn what_has_run_out_holds_up_no_close() {
    let server = Faulty::default();
    let provider = server.provider();
    let guard = provider.create_lock_with("x", LockOptions::new().ttl(secs(30))).acquire().await.unwrap();
    let down = Fault::Refuse(ErrorKind::Unavailable);
    server.always(Op::Renew, down).always(Op::Release, down);
    guard.lost().await;
    let lost = Instant::now();
    guard.release().await.unwrap_err();
    provider.close().await.unwrap();
    assert!(lost.elapsed() < secs(1), "{:?}", lost.elapsed());
    assert_eq!(server.count(Op::Release), 1);
}
