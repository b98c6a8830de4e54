//! In one process: first come, first served, and who gives up holds nobody up.

use std::sync::{Arc, Mutex};

use crate::testing::Subject;
use crate::testing::steps::{in_line, joined, ok, poll_up_to};

const WAITERS: usize = 10;

/// Waiters get the lock in the order in which they came.
pub async fn first_come_first_served(subject: Subject) {
    let provider = subject.provider().await;
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for number in 0..WAITERS {
        let (waiting, served) = (in_line(provider.create_lock("job")).await, served.clone());
        tasks.push(tokio::spawn(async move {
            let guard = joined("the grant", waiting).await.expect("everybody gets it");
            served.lock().expect("nobody panics here").push(number); // under the lock: in the order of the grants
            // Both ways of freeing it wake the next.
            match number % 2 {
                0 => ok("the release", guard.release()).await,
                _ => drop(guard),
            }
        }));
    }
    ok("the release", guard.release()).await;
    for task in tasks {
        joined("the end of a waiter", task).await;
    }
    let served = served.lock().expect("nobody panics here");
    assert_eq!(*served, (0..WAITERS).collect::<Vec<_>>(), "not in the order in which they came");
}

/// Waiters that give up, the first of the line too, are passed over, and those behind them keep their order.
pub async fn a_cancelled_waiter_is_passed_over(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    for holder in [&provider, &other] {
        let guard = ok("the grant", holder.create_lock("job").acquire()).await;
        let (early, late) = (provider.create_lock("job"), provider.create_lock("job"));
        let (mut first, mut third) = (early.acquire(), late.acquire());
        assert!(poll_up_to(1, &mut first).await.is_none(), "two have it");
        let second = in_line(provider.create_lock("job")).await;
        assert!(poll_up_to(1, &mut third).await.is_none(), "two have it");
        let fourth = in_line(provider.create_lock("job")).await;
        drop((first, third));
        ok("the release", guard.release()).await;

        let guard = joined("the grant of the second", second).await.expect("it is free");
        assert!(!fourth.is_finished(), "the fourth came before the second");
        ok("the release", guard.release()).await;
        let guard = joined("the grant of the fourth", fourth).await.expect("it is free");
        ok("the release", guard.release()).await;
    }
}
