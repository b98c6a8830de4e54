//! How grants are kept alive, and when they are lost.

mod common;

use common::faulty::{Fault, Faulty, Op};
use common::{ms, secs};
use fencelock::{ErrorKind, LockOptions, LockProvider, Loss};
use tokio::time::Instant;

fn options() -> LockOptions {
    LockOptions::new().ttl(secs(3))
}

#[tokio::test(start_paused = true)]
async fn a_renewal_is_due_when_less_than_two_thirds_are_left() {
    let server = Faulty::default();
    let guard = server.provider().create_lock_with("x", options()).acquire().await.unwrap();
    tokio::time::sleep(ms(900)).await;
    assert_eq!(server.count(Op::Renew), 0);
    tokio::time::sleep(ms(110)).await;
    assert_eq!(server.count(Op::Renew), 1);
    tokio::time::sleep(secs(30)).await;
    assert!((28..=33).contains(&server.count(Op::Renew)), "{}", server.count(Op::Renew));
    assert!(!guard.is_lost());
}

#[tokio::test(start_paused = true)]
async fn what_is_to_be_confirmed_is_renewed_once_even_without_renewal() {
    let server = Faulty::default().wanting_confirmation();
    let lock = server.provider().create_lock_with("x", options().auto_renew(false));
    let began = Instant::now();
    let guard = lock.acquire().await.unwrap();
    server.once(Op::Renew, Fault::Refuse(ErrorKind::Unavailable)); // the confirmation is tried again
    assert_eq!(guard.lost().await, Loss::Expired);
    assert_eq!(server.count(Op::Renew), 2);
    let held = began.elapsed();
    assert!(
        held >= secs(4) && held < ms(4500),
        "a ttl of 3 s from the confirmation, about 1 s later: {held:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_is_not_a_loss() {
    let server = Faulty::default();
    let guard = server.provider().create_lock_with("x", options()).acquire().await.unwrap();
    for fault in [
        Fault::Refuse(ErrorKind::Unavailable),
        Fault::LoseAnswer,
        Fault::Hang,
        Fault::NeverAnswer,
        Fault::AnswerLate(ms(500)),
    ] {
        server.once(Op::Renew, fault);
        tokio::time::sleep(secs(3)).await;
        assert!(!guard.is_lost(), "{fault:?}");
    }
    guard.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn renewals_that_fail_until_the_deadline_are_a_loss_at_the_deadline() {
    for fault in [Fault::Refuse(ErrorKind::Unavailable), Fault::LoseAnswer, Fault::Hang, Fault::NeverAnswer] {
        let server = Faulty::default();
        let began = Instant::now();
        let guard = server.provider().create_lock_with("x", options()).acquire().await.unwrap();
        server.always(Op::Renew, fault);
        let lost = guard.lost();
        assert_eq!(lost.await, Loss::Expired);
        assert!(began.elapsed() >= secs(3), "{fault:?}: {:?}", began.elapsed());
        assert!(began.elapsed() <= secs(3) + ms(5), "{fault:?}: {:?}", began.elapsed());
        assert!(server.count(Op::Renew) >= 3, "{fault:?}: tried only {} times", server.count(Op::Renew));
        assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::Expired));
    }
}

/// The answer to a renewal that the server carried out was lost: the holder's own deadline is the old one.
#[tokio::test(start_paused = true)]
async fn what_was_not_answered_does_not_move_the_deadline() {
    let server = Faulty::default();
    let guard = server.provider().create_lock_with("x", options()).acquire().await.unwrap();
    server.always(Op::Renew, Fault::NeverAnswer);
    tokio::time::sleep(secs(3)).await;
    assert!(guard.is_lost());
    assert_eq!(guard.lost().await, Loss::Expired);
}

#[tokio::test(start_paused = true)]
async fn loss_is_final() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let stale = lock.acquire().await.unwrap();
    server.always(Op::Renew, Fault::AnswerLate(secs(4))).always(Op::Release, Fault::Hang);
    tokio::time::sleep(secs(3)).await;
    assert!(stale.is_lost());
    tokio::time::sleep(secs(10)).await; // the late answers say that it stands
    assert!(stale.is_lost());
    server.heal();

    let newer = lock.acquire().await.unwrap();
    assert!(newer.fencing_token() > stale.fencing_token());
    assert!(stale.is_lost());
    drop(stale);
    tokio::time::sleep(secs(10)).await;
    assert!(!newer.is_lost(), "the stale holder's release has touched the newer grant");
    newer.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lock_taken_away_is_lost_at_the_next_renewal() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let guard = lock.acquire().await.unwrap();
    assert!(server.memory().revoke("x"));
    let began = Instant::now();
    assert_eq!(guard.lost().await, Loss::Taken);
    assert!(began.elapsed() <= secs(1) + ms(50));
    let next = lock.try_acquire().await.unwrap().expect("free");
    assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::Taken));
    next.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn many_are_renewed_in_few_requests() {
    let server = Faulty::default();
    let provider = server.provider();
    let mut guards = Vec::new();
    for number in 0..10_000 {
        guards.push(provider.create_lock_with(&number.to_string(), options()).acquire().await.unwrap());
    }
    tokio::time::sleep(secs(12)).await;
    assert!(guards.iter().all(|guard| !guard.is_lost()));
    let renewals = server.calls(Op::Renew);
    assert!(renewals.iter().all(|call| call.batch <= 500));
    assert!(renewals.len() <= 40 * 12, "{} requests in 12 s", renewals.len());
    assert!(renewals.iter().map(|call| call.batch).sum::<usize>() >= 10_000 * 11);
}

#[tokio::test(start_paused = true)]
async fn without_renewal_it_ends_with_its_ttl() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options().auto_renew(false));
    let (began, guard) = (Instant::now(), lock.acquire().await.unwrap());
    assert_eq!(guard.lost().await, Loss::Expired);
    assert!((secs(3)..secs(3) + ms(5)).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(server.count(Op::Renew), 0);
}

#[tokio::test(start_paused = true)]
async fn max_hold_ends_it_and_the_ttl_frees_it() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options().max_hold(secs(10)));
    let (began, guard) = (Instant::now(), lock.acquire().await.unwrap());
    assert_eq!(guard.lost().await, Loss::MaxHold);
    assert!((secs(10)..secs(10) + ms(5)).contains(&began.elapsed()), "{:?}", began.elapsed());
    let renewals = server.count(Op::Renew);

    // The job may still be running: the lock is not given away before the TTL is over.
    assert!(lock.try_acquire().await.unwrap().is_none());
    let next = lock.acquire().await.unwrap();
    assert!(began.elapsed() >= secs(12), "freed after {:?}", began.elapsed());
    assert!(began.elapsed() <= secs(13) + ms(50), "freed after {:?}", began.elapsed());
    assert_eq!(server.count(Op::Renew), renewals, "renewed after max_hold");
    assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::MaxHold));
    next.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ends_after_max_hold_frees_it_at_once() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options().max_hold(secs(10)));
    let guard = lock.acquire().await.unwrap();
    guard.lost().await;
    drop(guard);
    assert!(lock.try_acquire().await.unwrap().is_some());
}

/// This backend can't keep a lock by itself: the engine renews it until the time is over.
#[tokio::test(start_paused = true)]
async fn hold_at_least_outlives_the_release_and_the_ttl() {
    for dropped in [true, false] {
        let server = Faulty::default();
        let lock = server.provider().create_lock_with("x", options().hold_at_least(secs(20)));
        let (began, guard) = (Instant::now(), lock.acquire().await.unwrap());
        let lost = guard.lost();
        if dropped {
            drop(guard);
        } else {
            guard.release().await.unwrap();
        }
        assert!(lock.try_acquire().await.unwrap().is_none());
        let elsewhere = server.provider();
        tokio::time::sleep(secs(19)).await;
        assert!(elsewhere.create_lock("x").try_acquire().await.unwrap().is_none());
        lock.acquire().await.unwrap().release().await.unwrap();
        assert!((secs(20)..secs(20) + ms(50)).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert!(tokio::time::timeout(secs(60), lost).await.is_err(), "a normal release is no loss");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_and_taken_away_is_not_waited_for() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options().hold_at_least(secs(60)));
    let (began, guard) = (Instant::now(), lock.acquire().await.unwrap());
    guard.release().await.unwrap();
    assert!(server.memory().revoke("x"));
    drop(lock.acquire().await.unwrap());
    assert!(
        began.elapsed() <= secs(1) + ms(50),
        "noticed at the next renewal, not after {:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn run_ends_with_the_lock() {
    let server = Faulty::default();
    let lock = server.provider().create_lock_with("x", options());
    let guard = lock.acquire().await.unwrap();
    assert_eq!(guard.run(async { 7 }).await.unwrap(), 7);

    server.always(Op::Renew, Fault::Hang);
    let (began, dropped) = (Instant::now(), std::sync::Arc::new(()));
    let alive = std::sync::Arc::downgrade(&dropped);
    let job = guard.run(async move {
        std::future::pending::<()>().await;
        drop(dropped);
    });
    let mut job = std::pin::pin!(job);
    let error = job.as_mut().await.unwrap_err();
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, Some(Loss::Expired)));
    assert!(began.elapsed() <= secs(3) + ms(5));
    assert!(alive.upgrade().is_none(), "the job's future is dropped at once");
    assert_eq!(guard.run(async {}).await.unwrap_err().loss(), Some(Loss::Expired), "not one more step");
}

#[tokio::test(start_paused = true)]
async fn run_ends_with_the_release() {
    let lock = Faulty::default().provider().create_lock("x");
    let guard = lock.acquire().await.unwrap();
    let job = guard.run(std::future::pending::<()>());
    let job = tokio::spawn(job);
    tokio::task::yield_now().await;
    guard.release().await.unwrap();
    let error = job.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, None));
}
