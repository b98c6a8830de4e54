//! How long a caller waits: not at all, until its timeout, or until a release.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::LockProvider;
use crate::testing::Subject;
use crate::testing::steps::{PATIENCE, in_line, joined, ok};

/// A timeout of zero gets a free lock, and gives a held one up at once.
pub async fn a_timeout_of_zero_is_one_attempt(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let at_once = Duration::ZERO;
    let guard = ok("a free lock", provider.create_lock("job").try_acquire_for(at_once)).await;
    let guard = guard.expect("one attempt is enough for a free lock");
    for provider in [&provider, &other] {
        let began = Instant::now();
        let busy = ok("a held lock", provider.create_lock("job").try_acquire_for(at_once)).await;
        assert!(busy.is_none(), "two have it");
        assert!(began.elapsed() <= subject.slack(), "it has waited for {:?}", began.elapsed());
    }
    ok("the release", guard.release()).await;
}

/// A held lock is waited for until the timeout, not less, and not much longer.
pub async fn a_timeout_is_kept(subject: Subject) {
    // An attempt that is under way when the time is up is given so much more.
    const LAST_ATTEMPT: Duration = Duration::from_millis(200);
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    for provider in [&provider, &other] {
        for timeout in [Duration::from_millis(1), Duration::from_millis(300)] {
            let began = Instant::now();
            let busy = ok("the timeout", provider.create_lock("job").try_acquire_for(timeout)).await;
            let waited = began.elapsed();
            assert!(busy.is_none(), "two have it");
            assert!(waited >= timeout, "it gave up after {waited:?}, not {timeout:?}");
            let most = timeout + LAST_ATTEMPT + subject.slack();
            assert!(waited <= most, "it gave up after {waited:?}, not {timeout:?}");
        }
    }
    assert!(!guard.is_lost());
    ok("the release", guard.release()).await;
}

/// A lock that is released in time is got before the timeout.
pub async fn a_release_ends_the_wait(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    for waiter in [&provider, &other] {
        let guard = ok("the grant", provider.create_lock("job").acquire()).await;
        let lock = waiter.create_lock("job");
        let waiting = tokio::spawn(async move { lock.try_acquire_for(PATIENCE / 2).await });
        ok("the release", guard.release()).await;
        let next = ok("the next grant", async { waiting.await.expect("no panic") }).await;
        ok("the release", next.expect("it was released in time").release()).await;
    }
}

/// A release wakes the next waiter of the same provider.
pub async fn waiters_of_one_provider_are_woken(subject: Subject) {
    let provider = subject.provider().await;
    waiters_are_woken(&subject, &*provider, &*provider).await;
}

/// A release wakes the next waiter of another provider. Ignored where waiters poll.
pub async fn waiters_of_another_provider_are_woken(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    waiters_are_woken(&subject, &*provider, &*other).await;
}

async fn waiters_are_woken(subject: &Subject, holder: &dyn LockProvider, waiter: &dyn LockProvider) {
    // Long enough for a poller to have backed off to its longest interval.
    const HELD: Duration = Duration::from_millis(500);
    const ROUNDS: usize = 5;
    let mut delays = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let guard = ok("the grant", holder.create_lock("job").acquire()).await;
        let waiting = in_line(waiter.create_lock("job")).await;
        sleep(HELD).await;
        let released = Instant::now();
        let (waiting, ()) =
            tokio::join!(joined("the next grant", waiting), ok("the release", guard.release()));
        delays.push(released.elapsed());
        ok("the release", waiting.expect("it is free").release()).await;
    }
    delays.sort();
    // A busy machine delays some; a poller is late in most rounds.
    let most = subject.slack().min(Duration::from_millis(100));
    assert!(delays[ROUNDS / 2] <= most, "from the release to the next grant: {delays:?}");
}
