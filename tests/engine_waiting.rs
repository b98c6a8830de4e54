//! How the waiters of one process queue, and what one of them costs the others and the server.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::faulty::{Fault, Faulty, Op};
use common::{ms, secs};
use fencelock::{ErrorKind, LockGuard, LockOptions, LockProvider, Provider};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A task that waits for the lock and sends its guard, under its number.
fn waiter(
    provider: &Arc<Provider<Faulty>>,
    number: usize,
    granted: &mpsc::UnboundedSender<(usize, LockGuard)>,
) -> JoinHandle<()> {
    let (provider, granted) = (provider.clone(), granted.clone());
    tokio::spawn(async move {
        let guard = provider.create_lock("x").acquire().await.expect("granted in the end");
        granted.send((number, guard)).expect("somebody listens");
    })
}

async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(ms(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn first_come_first_served_with_and_without_transfers() {
    for server in [Faulty::default(), Faulty::default().without_transfer(), Faulty::default().polling()] {
        let provider = Arc::new(server.provider());
        let held = provider.create_lock("x").acquire().await.unwrap();
        let (granted, mut grants) = mpsc::unbounded_channel();
        for number in 0..100 {
            waiter(&provider, number, &granted);
            tokio::task::yield_now().await;
        }
        let mut last = held.fencing_token();
        drop(held);
        for expected in 0..100 {
            let (number, guard) = grants.recv().await.unwrap();
            assert_eq!(number, expected);
            assert!(guard.fencing_token() > last, "tokens rise");
            last = guard.fencing_token();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_came_first_is_first_although_his_own_claim_took_longer() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = Arc::new(server.provider());
    let (granted, mut grants) = mpsc::unbounded_channel();
    server.once(Op::Claim, Fault::AnswerLate(ms(50)));
    waiter(&provider, 1, &granted);
    tokio::time::sleep(ms(10)).await;
    waiter(&provider, 2, &granted); // queues while the first one's claim is under way
    tokio::time::sleep(ms(100)).await;
    held.release().await.unwrap();
    assert_eq!(grants.recv().await.unwrap().0, 1);
    assert_eq!(grants.recv().await.unwrap().0, 2);
}

#[tokio::test(start_paused = true)]
async fn a_release_here_is_handed_over_in_one_request_but_not_for_ever() {
    let server = Faulty::default();
    let provider = Arc::new(server.provider());
    let held = provider.create_lock("x").acquire().await.unwrap();
    let (granted, mut grants) = mpsc::unbounded_channel();
    for number in 0..170 {
        waiter(&provider, number, &granted);
    }
    tokio::task::yield_now().await;
    drop(held);
    for _ in 0..170 {
        drop(grants.recv().await.unwrap());
    }
    let (transfers, claims) = (server.count(Op::Transfer), server.count(Op::Claim));
    assert_eq!(transfers + claims, 171, "one request for each grant");
    assert!(
        (10..=15).contains(&claims),
        "{claims} claims: every 17th grant or so is open to other processes"
    );
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_waiter_does_not_cost_the_others_the_place_on_the_server() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let (here, there) = (Arc::new(server.provider()), Arc::new(server.provider()));
    let (granted, mut grants) = mpsc::unbounded_channel();
    let first = waiter(&here, 1, &granted);
    until(|| server.calls(Op::Claim).last().is_some_and(|call| call.waits)).await;
    waiter(&here, 2, &granted);
    waiter(&there, 3, &granted);
    until(|| server.calls(Op::Claim).iter().filter(|call| call.waits).count() == 2).await;
    let claims = server.count(Op::Claim);

    first.abort();
    tokio::time::sleep(ms(50)).await;
    assert_eq!(server.count(Op::Claim), claims, "nobody has queued again");
    held.release().await.unwrap();
    let (number, guard) = grants.recv().await.unwrap();
    assert_eq!(number, 2, "the place of the one who left is his neighbour's");
    drop(guard);
    assert_eq!(grants.recv().await.unwrap().0, 3);
}

#[tokio::test(start_paused = true)]
async fn the_last_waiter_to_leave_leaves_the_server_too() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = server.provider();
    let lock = provider.create_lock("x");
    let began = Instant::now();
    assert!(lock.try_acquire_for(secs(2)).await.unwrap().is_none());
    assert!((secs(2)..secs(2) + ms(5)).contains(&began.elapsed()));
    until(|| server.count(Op::Abandon) == 1).await;
    held.release().await.unwrap();
    assert!(server.provider().create_lock("x").try_acquire().await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_with_another_ttl_gets_a_claim_of_its_own() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = server.provider();
    let lock = |ttl| provider.create_lock_with("x", LockOptions::new().ttl(secs(ttl)));
    let (first, second) = (lock(5), lock(7));
    let first = tokio::spawn(async move { first.acquire().await });
    until(|| server.calls(Op::Claim).last().is_some_and(|call| call.waits && call.ttl == secs(5))).await;
    let second = tokio::spawn(async move { second.acquire().await });
    tokio::task::yield_now().await;
    first.abort();
    // It may be that the second is served only when the first's claim comes to nothing.
    tokio::time::sleep(ms(50)).await;
    held.release().await.unwrap();
    let guard = second.await.unwrap().unwrap();
    let last = server.calls(Op::Claim).pop().unwrap();
    assert_eq!(last.ttl, secs(7));
    guard.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn tries_that_come_together_share_one_busy_answer() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = Arc::new(server.provider());
    server.always(Op::Claim, Fault::AnswerLate(ms(10)));
    let before = server.count(Op::Claim);
    let tries: Vec<_> = (0..50)
        .map(|_| {
            let provider = provider.clone();
            tokio::spawn(async move { provider.create_lock("x").try_acquire().await.unwrap().is_none() })
        })
        .collect();
    for busy in tries {
        assert!(busy.await.unwrap());
    }
    let claims = server.count(Op::Claim) - before;
    assert!(claims <= 2, "{claims} claims for 50 tries");
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_try_waits_for_a_release_of_its_own_process_and_for_nothing_else() {
    let server = Faulty::default();
    let provider = server.provider();
    let lock = provider.create_lock("x");
    let guard = lock.acquire().await.unwrap();
    assert!(lock.try_acquire().await.unwrap().is_none());
    assert_eq!(server.count(Op::Claim), 1, "what this process holds is busy without asking");
    server.once(Op::Release, Fault::AnswerLate(ms(300)));
    drop(guard);
    let began = Instant::now();
    assert!(lock.try_acquire().await.unwrap().is_some());
    assert_eq!(began.elapsed(), ms(300));
}

#[tokio::test(start_paused = true)]
async fn a_polled_backend_is_asked_with_backoff() {
    let server = Faulty::default().polling();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let lock = server.provider().create_lock("x");
    let waiter = tokio::spawn(async move { lock.acquire().await });
    tokio::time::sleep(secs(60)).await;
    let polls = server.count(Op::Claim);
    assert!((120..=600).contains(&polls), "{polls} polls in a minute");
    drop(held);
    assert!(waiter.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_failed_transfer_is_cleared_up_and_the_waiter_served() {
    for fault in [Fault::LoseAnswer, Fault::Refuse(ErrorKind::Unavailable), Fault::Refuse(ErrorKind::Unknown)]
    {
        let server = Faulty::default();
        let provider = Arc::new(server.provider());
        let held = provider.create_lock("x").acquire().await.unwrap();
        let (granted, mut grants) = mpsc::unbounded_channel();
        waiter(&provider, 1, &granted);
        tokio::task::yield_now().await;
        server.once(Op::Transfer, fault);
        let before = held.fencing_token();
        held.release().await.unwrap();
        let (_, guard) = grants.recv().await.unwrap();
        assert!(guard.fencing_token() > before);
        assert_eq!((server.count(Op::Release), server.count(Op::Abandon)), (1, 1), "{fault:?}");
        drop(guard);
        drop(server.provider().create_lock("x").acquire().await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_outlast_an_outage_shorter_than_retry_for() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = server.provider();
    let lock = |patience| provider.create_lock_with("x", LockOptions::new().retry_for(secs(patience)));
    let (short, long) = (lock(1), lock(60));
    let short = tokio::spawn(async move { short.acquire().await.map(drop) });
    let long = tokio::spawn(async move { long.acquire().await.map(drop) });
    tokio::time::sleep(secs(1)).await;
    server.always(Op::Claim, Fault::Refuse(ErrorKind::Unavailable));
    held.release().await.unwrap();
    // What was waiting on the server got its grant; the next one meets the outage.
    short.await.unwrap().expect("granted where it waited");
    tokio::time::sleep(secs(5)).await;
    server.heal();
    long.await.unwrap().expect("back in time");
}

#[tokio::test(start_paused = true)]
async fn tasks_in_one_another_s_way_lose_no_update() {
    let server = Faulty::default();
    let inside = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..3)
        .map(|_| Arc::new(server.provider()))
        .flat_map(|provider| (0..50).map(move |number| (provider.clone(), number)))
        .map(|(provider, number)| {
            let inside = inside.clone();
            tokio::spawn(async move {
                let lock = provider.create_lock_with("x", LockOptions::new().ttl(secs(1 + number % 2)));
                for _ in 0..3 {
                    let guard = lock.acquire().await.unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two inside");
                    tokio::time::sleep(ms(number)).await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    if number % 3 == 0 { guard.release().await.unwrap() } else { drop(guard) }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// The only waiter has left and its driver doesn't know yet: a try waits for what comes of that. When somebody joins the
/// driver instead, it is busy.
#[tokio::test(start_paused = true)]
async fn a_try_does_not_wait_for_those_who_came_after_it() {
    let server = Faulty::default();
    let held = server.provider().create_lock("x").acquire().await.unwrap();
    let provider = server.provider();
    let lock = provider.create_lock("x");
    assert!(lock.try_acquire_for(ms(50)).await.unwrap().is_none());
    // Nothing else has run since: the driver is still there.
    let (mut tried, acquired) = (lock.try_acquire(), lock.acquire());
    tokio::pin!(acquired);
    let busy = tokio::time::timeout(secs(1), async {
        tokio::select! {
            biased;
            tried = &mut tried => tried,
            _ = &mut acquired => panic!("it is held"),
        }
    });
    assert!(busy.await.expect("at once").unwrap().is_none());
    held.release().await.unwrap();
    drop(acquired.await.unwrap());
}
