//! The terms of a grant: renewal, expiry, `max_hold` and `hold_at_least`.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::testing::Subject;
use crate::testing::steps::{in_line, joined, ok, within};
use crate::{LockGuard, LockOptions, Loss};

/// A renewed lock is held past several TTLs.
pub async fn renewal_keeps_it(subject: Subject) {
    let ttl = subject.steady_ttl();
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard =
        ok("the grant", provider.create_lock_with("job", LockOptions::new().ttl(ttl)).acquire()).await;
    let waiting = in_line(other.create_lock("job")).await;
    let loss = timeout(ttl * 7 / 2, guard.lost()).await.ok();
    assert_eq!(loss, None, "it was lost although it is renewed");
    assert!(!waiting.is_finished(), "two have it");
    ok("the release", guard.release()).await;
    drop(joined("the next grant", waiting).await.expect("it is free"));
}

/// A lock that isn't renewed is somebody else's once its TTL has run out, not before, and its holder knows by then.
pub async fn without_renewal_it_expires(subject: Subject) {
    let ttl = subject.short_ttl();
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let unrenewed = provider.create_lock_with("job", LockOptions::new().ttl(ttl).auto_renew(false));
    let began = Instant::now();
    let guard = ok("the grant", unrenewed.acquire()).await;
    let next = ok("the next grant", other.create_lock("job").acquire()).await;
    let held = began.elapsed();
    assert!(guard.is_lost(), "two have it");
    assert!(held + Subject::CLOCK_GRAIN >= ttl, "a ttl of {ttl:?} was over after {held:?}");
    assert!(next.fencing_token() > guard.fencing_token());
}

/// After `max_hold` the holder is told, and the lock isn't freed before its TTL has run out.
pub async fn max_hold_ends_it(subject: Subject) {
    let ttl = subject.steady_ttl();
    let limit = ttl / 4; // before the first renewal, so that the TTL counts from the grant
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let limited = provider.create_lock_with("job", LockOptions::new().ttl(ttl).max_hold(limit));
    let began = Instant::now();
    let guard = ok("the grant", limited.acquire()).await;
    let waiting = in_line(other.create_lock("job")).await;
    assert_eq!(within("the loss", guard.lost()).await, Loss::MaxHold);
    let held = began.elapsed();
    assert!(held >= limit, "a max_hold of {limit:?} was over after {held:?}");
    assert!(held <= limit + subject.slack(), "a max_hold of {limit:?} was over after {held:?}");
    let next = joined("the next grant, when the ttl has run out", waiting).await.expect("it is free then");
    let kept = began.elapsed();
    // A backend may promise a little less than the TTL, for clocks that run apart.
    let drift = ttl / 100 + Duration::from_millis(2);
    assert!(
        kept + Subject::CLOCK_GRAIN + drift >= ttl,
        "the lock was freed after {kept:?}; its ttl is {ttl:?}"
    );
    let error = within("the release", guard.release()).await.expect_err("it was lost");
    assert_eq!(error.loss(), Some(Loss::MaxHold));
    assert!(!next.is_lost(), "the stale release freed the new holder's lock");
}

/// A lock that is released before `hold_at_least` is free only then, also where that is after its TTL.
pub async fn hold_at_least_keeps_it_after_a_release(subject: Subject) {
    kept(&subject, async |guard| ok("the release", guard.release()).await).await;
}

/// A guard that is dropped before `hold_at_least` frees the lock only then, also where that is after its TTL.
pub async fn hold_at_least_keeps_it_after_a_drop(subject: Subject) {
    kept(&subject, async |guard| drop(guard)).await;
}

async fn kept(subject: &Subject, free: impl AsyncFnOnce(LockGuard)) {
    let ttl = subject.steady_ttl();
    let least = ttl * 3 / 2;
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let keeping = provider.create_lock_with("job", LockOptions::new().ttl(ttl).hold_at_least(least));
    let began = Instant::now();
    let guard = ok("the grant", keeping.acquire()).await;
    let waiting = in_line(other.create_lock("job")).await;
    free(guard).await;
    let next = joined("the next grant", waiting).await;
    let held = began.elapsed();
    assert!(held + Subject::CLOCK_GRAIN >= least, "a hold_at_least of {least:?} was over after {held:?}");
    // A waiter that polls looks twice a second.
    let most = least
        + subject.slack()
        + if subject.capabilities().wakes_waiters { Duration::ZERO } else { Duration::from_millis(500) };
    assert!(held <= most, "a hold_at_least of {least:?} was over only after {held:?}");
    ok("the release", next.expect("it is free in the end").release()).await;
}

/// A lock that has been held for `hold_at_least` is free as soon as it is released.
pub async fn hold_at_least_ends(subject: Subject) {
    let least = Duration::from_millis(200);
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let keeping = provider.create_lock_with("job", LockOptions::new().hold_at_least(least));
    let guard = ok("the grant", keeping.acquire()).await;
    let loss = timeout(least, guard.lost()).await.ok();
    assert_eq!(loss, None);
    ok("the release", guard.release()).await;
    let next = ok("a try", other.create_lock("job").try_acquire()).await;
    assert!(next.is_some(), "it is still held after hold_at_least and a release");
}
