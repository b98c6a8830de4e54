//! What the engine makes of claims that fail, hang, come too late or are broken off.

mod common;

use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

use common::faulty::{Fault, Faulty, Op};
use common::{ms, secs};
use fencelock::{ErrorKind, LockOptions, LockProvider};
use tokio::time::Instant;

const ROUND_TRIP: Duration = ms(200);

fn options() -> LockOptions {
    LockOptions::new().ttl(secs(3)).retry_for(secs(1))
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_abandoned_and_tried_again_under_a_new_owner() {
    let server = Faulty::default();
    let provider = server.provider();
    server.once(Op::Claim, Fault::LoseAnswer);
    let first = provider.create_lock("a").try_acquire().await.unwrap().expect("free once it is abandoned");
    assert_eq!((server.count(Op::Claim), server.count(Op::Abandon)), (2, 1));

    server.once(Op::Claim, Fault::LoseAnswer);
    let second = provider.create_lock("b").acquire().await.unwrap();
    assert_eq!((server.count(Op::Claim), server.count(Op::Abandon)), (4, 2));
    assert!(second.fencing_token() > first.fencing_token());
}

#[tokio::test(start_paused = true)]
async fn ambiguity_that_lasts_is_unknown_and_not_busy() {
    let server = Faulty::default();
    server.always(Op::Claim, Fault::LoseAnswer);
    let lock = server.provider().create_lock_with("x", options());
    for error in [
        lock.try_acquire().await.unwrap_err(),
        lock.acquire().await.unwrap_err(),
        lock.try_acquire_for(ms(300)).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
        assert_eq!((error.operation(), error.lock_name()), (Some("acquire"), Some("x")));
    }
    server.heal();
    assert!(lock.try_acquire().await.unwrap().is_some(), "nothing stays locked");
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_ridden_out_within_retry_for() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let refuse = Fault::Refuse(ErrorKind::Unavailable);
    server.once(Op::Claim, refuse).once(Op::Claim, refuse).once(Op::Claim, refuse);
    drop(lock.try_acquire().await.unwrap().expect("back after three failures"));
    server.once(Op::Claim, refuse).once(Op::Claim, refuse).once(Op::Claim, refuse);
    drop(lock.acquire().await.unwrap());
    assert_eq!(server.count(Op::Abandon), 0, "what was refused needs no clearing up");
}

#[tokio::test(start_paused = true)]
async fn an_outage_that_lasts_is_an_error_in_time() {
    let server = Faulty::default();
    server.always(Op::Claim, Fault::Refuse(ErrorKind::Unavailable));
    let lock = server.provider().create_lock_with("x", options());

    let began = Instant::now();
    assert_eq!(lock.try_acquire().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(began.elapsed() <= secs(1));

    let began = Instant::now();
    assert_eq!(lock.acquire().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(began.elapsed() >= secs(1), "it gave up before retry_for was over");
    assert!(began.elapsed() <= secs(3));

    let began = Instant::now();
    assert_eq!(lock.try_acquire_for(ms(300)).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(began.elapsed() <= ms(300) + ROUND_TRIP);
}

#[tokio::test(start_paused = true)]
async fn without_retry_for_the_first_failure_is_an_error() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options().retry_for(Duration::ZERO));
    server.once(Op::Claim, Fault::Refuse(ErrorKind::Unavailable));
    assert!(lock.try_acquire().await.is_err());
    server.once(Op::Claim, Fault::Refuse(ErrorKind::Unavailable));
    assert!(lock.acquire().await.is_err());
    assert_eq!(server.count(Op::Claim), 2);
}

#[tokio::test(start_paused = true)]
async fn what_retrying_cannot_mend_is_not_retried() {
    let server = Faulty::default();
    let provider = server.provider();
    for kind in [ErrorKind::Denied, ErrorKind::Config, ErrorKind::Exhausted, ErrorKind::Unsupported] {
        for name in ["a", "b"] {
            server.once(Op::Claim, Fault::Refuse(kind));
            let lock = provider.create_lock(name);
            let error = if name == "a" { lock.try_acquire().await.err() } else { lock.acquire().await.err() };
            assert_eq!(error.expect("refused").kind(), kind);
        }
    }
    assert_eq!(server.count(Op::Claim), 8);
}

#[tokio::test(start_paused = true)]
async fn a_frozen_server_holds_up_nobody_for_longer_than_a_round_trip() {
    for fault in [Fault::Hang, Fault::NeverAnswer] {
        let server = Faulty::default();
        server.always(Op::Claim, fault);
        let lock = server.provider().create_lock_with("x", options());

        let began = Instant::now();
        assert_eq!(lock.try_acquire_for(ms(300)).await.unwrap_err().kind(), ErrorKind::Unknown);
        assert!(began.elapsed() <= ms(301) + ROUND_TRIP);

        let began = Instant::now();
        assert_eq!(lock.try_acquire().await.unwrap_err().kind(), ErrorKind::Unknown);
        assert!(began.elapsed() <= secs(1) + ms(1) + ROUND_TRIP);

        server.heal();
        assert!(lock.acquire().await.is_ok(), "abandoned, and free");
    }
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_comes_after_its_own_end_is_not_handed_out() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options().ttl(ms(100)));
    server.once(Op::Claim, Fault::AnswerLate(ms(150)));
    let guard = lock.acquire().await.unwrap();
    assert!(!guard.is_lost());
    assert_eq!(server.count(Op::Abandon), 1);
}

#[tokio::test(start_paused = true)]
async fn abandoning_is_tried_until_it_succeeds() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let refuse = Fault::Refuse(ErrorKind::Unavailable);
    server.once(Op::Claim, Fault::LoseAnswer);
    server.once(Op::Abandon, refuse).once(Op::Abandon, refuse).once(Op::Abandon, Fault::LoseAnswer);
    assert!(lock.try_acquire().await.unwrap().is_some());
    assert_eq!(server.count(Op::Abandon), 4);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_backend_leaves_the_name_usable() {
    let server = Faulty::default();
    let provider = server.provider();
    server.once(Op::Claim, Fault::Panic);
    let lock = provider.create_lock("x");
    assert!(tokio::spawn(async move { lock.try_acquire().await }).await.unwrap_err().is_panic());
    let held = provider.create_lock("x").acquire().await.unwrap();

    // The same in the driver of somebody who waits.
    let elsewhere = server.provider();
    let waiter = tokio::spawn(async move { elsewhere.create_lock("x").acquire().await });
    while server.calls(Op::Claim).last().is_none_or(|call| !call.waits) {
        tokio::task::yield_now().await;
    }
    drop(held);
    assert!(waiter.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_panics_is_replaced() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let elsewhere = server.provider();
    let lock = elsewhere.create_lock("x");
    let waiter = tokio::spawn(async move { lock.acquire().await });
    server.once(Op::Claim, Fault::AnswerLate(Duration::ZERO)).once(Op::Claim, Fault::Panic);
    while server.count(Op::Abandon) == 0 {
        tokio::time::sleep(ms(1)).await;
    }
    held.release().await.unwrap();
    assert!(waiter.await.unwrap().is_ok());
}

#[test]
fn without_a_runtime_it_is_an_error_and_no_panic() {
    let provider = Faulty::default().provider();
    let lock = provider.create_lock("x");
    let mut cx = Context::from_waker(Waker::noop());
    let std::task::Poll::Ready(Err(error)) = pin!(lock.acquire()).poll(&mut cx) else { panic!("no error") };
    assert_eq!(error.kind(), ErrorKind::Config);
    let guard = common::runtime().block_on(async { lock.acquire().await.unwrap() });
    let std::task::Poll::Ready(Err(error)) = pin!(guard.release()).poll(&mut cx) else { panic!("no error") };
    assert_eq!(error.kind(), ErrorKind::Config);
    common::runtime()
        .block_on(async { assert!(lock.try_acquire().await.unwrap().is_some(), "released all the same") });
    let std::task::Poll::Ready(Err(error)) = pin!(fencelock::connect("file:never")).poll(&mut cx) else {
        panic!("no error")
    };
    assert_eq!(error.kind(), ErrorKind::Config);
    let std::task::Poll::Ready(Err(error)) = pin!(provider.close()).poll(&mut cx) else { panic!("no error") };
    assert_eq!(error.kind(), ErrorKind::Config);
}
