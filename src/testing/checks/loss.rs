//! A loss is pushed with its reason, is final, and leaves the new holder alone.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::testing::Subject;
use crate::testing::steps::{in_line, joined, ok, poll_up_to, within};
use crate::{ErrorKind, LockGuard, LockOptions, Loss};

/// A lock that isn't renewed is lost when its TTL has run out: everybody who awaits the loss hears of it.
pub async fn expiry_is_pushed(subject: Subject) {
    let ttl = subject.short_ttl();
    let provider = subject.provider_with(LockOptions::new().ttl(ttl).auto_renew(false)).await;
    let began = Instant::now();
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    assert!(began.elapsed() >= ttl || !guard.is_lost(), "it was lost when it was granted");
    let listeners = [tokio::spawn(guard.lost()), tokio::spawn(guard.lost())];
    for listener in listeners {
        assert_eq!(joined("the loss", listener).await, Loss::Expired);
    }
    let held = began.elapsed();
    assert!(guard.is_lost());
    // A backend may give up a little earlier than its server, for clocks that drift.
    assert!(held >= ttl.mul_f64(0.9), "a ttl of {ttl:?} was over after {held:?}");
    assert!(held <= ttl + subject.slack(), "a ttl of {ttl:?} was over after {held:?}");
    is_final(guard, Loss::Expired).await;
}

/// A lock that is taken away is lost within a heartbeat, a third of the TTL. Ignored where nobody can do that.
pub async fn taking_away_is_pushed(subject: Subject) {
    let ttl = subject.heartbeat_ttl();
    let provider = subject.provider_with(LockOptions::new().ttl(ttl)).await;
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let untouched = ok("another grant", provider.create_lock("another job").acquire()).await;
    let listener = tokio::spawn(guard.lost());
    let taken = Instant::now();
    let expected = subject.lose("job").await;
    assert_eq!(joined("the loss", listener).await, expected);
    let late = taken.elapsed();
    assert!(late <= ttl / 3 + subject.slack(), "the loss was noticed after {late:?}; the ttl is {ttl:?}");
    is_final(guard, expected).await;
    if expected != Loss::SessionEnded {
        assert!(!untouched.is_lost(), "another lock was lost with it");
        ok("the release", untouched.release()).await;
    }
}

/// Whoever awaits the loss of a lock that is released waits for ever, also when others have the lock after it.
pub async fn a_release_is_no_loss(subject: Subject) {
    let ttl = subject.short_ttl();
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let lock = provider.create_lock_with("job", LockOptions::new().ttl(ttl));
    let released = ok("the grant", lock.acquire()).await;
    let dropped = ok("another grant", provider.create_lock("dropped").acquire()).await;
    let (mut never, mut nor_this) = (Box::pin(released.lost()), Box::pin(dropped.lost()));
    assert!(poll_up_to(1, &mut never).await.is_none());
    ok("the release", released.release()).await;
    drop(dropped);
    let next = ok("the next grant", other.create_lock("job").acquire()).await;
    let both = async { tokio::select!(loss = &mut never => loss, loss = &mut nor_this => loss) };
    // Nothing is to happen here, so there is no event to await; a TTL is when something would.
    let loss = timeout(2 * ttl, both).await.ok();
    assert_eq!(loss, None, "a released lock was lost");
    assert!(!next.is_lost());
    ok("the release", next.release()).await;
}

/// A holder that releases a lock after its TTL has run out is told so, and the next holder keeps it.
pub async fn a_stale_release_spares_the_new_holder(subject: Subject) {
    let (stale, next) = expired_and_taken_over(&subject).await;
    is_final(stale, Loss::Expired).await;
    still_holds(&subject, next).await;
}

/// A guard that is dropped after its TTL has run out leaves the lock to the next holder.
pub async fn a_stale_drop_spares_the_new_holder(subject: Subject) {
    let (stale, next) = expired_and_taken_over(&subject).await;
    drop(stale);
    still_holds(&subject, next).await;
}

/// A holder that releases a lock after it was taken away is told so, and the next holder keeps it. Ignored where nobody
/// can take it away.
pub async fn releasing_what_was_taken_spares_the_new_holder(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let lock = provider.create_lock_with("job", LockOptions::new().ttl(subject.heartbeat_ttl()));
    let stale = ok("the grant", lock.acquire()).await;
    let next = in_line(other.create_lock("job")).await;
    let expected = subject.lose("job").await;
    let next = joined("the next grant", next).await.expect("it was taken away");
    assert!(
        next.fencing_token() > stale.fencing_token(),
        "the stale holder could not be told from the new one"
    );
    assert_eq!(within("the loss", stale.lost()).await, expected);
    is_final(stale, expected).await;
    still_holds(&subject, next).await;
}

/// A release of what was taken away, before anything else has noticed, says so.
pub async fn a_release_says_that_it_was_taken(subject: Subject) {
    let provider = subject.provider().await;
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let expected = subject.lose("job").await;
    let error = within("the release", guard.release()).await.expect_err("it was taken away");
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, Some(expected)));
}

async fn expired_and_taken_over(subject: &Subject) -> (LockGuard, LockGuard) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let unrenewed = LockOptions::new().ttl(subject.short_ttl()).auto_renew(false);
    let stale = ok("the grant", provider.create_lock_with("job", unrenewed).acquire()).await;
    let next = ok("the next grant", other.create_lock("job").acquire()).await;
    assert!(stale.is_lost(), "two have it");
    assert!(
        next.fencing_token() > stale.fencing_token(),
        "the stale holder could not be told from the new one"
    );
    (stale, next)
}

/// A lost guard stays lost, for the same reason, and says so when it is released.
async fn is_final(guard: LockGuard, loss: Loss) {
    assert_eq!(within("the loss, once more", guard.lost()).await, loss);
    assert!(guard.is_lost());
    let error = within("the release", guard.release()).await.expect_err("it was lost");
    assert_eq!((error.kind(), error.loss()), (ErrorKind::Lost, Some(loss)));
}

async fn still_holds(subject: &Subject, guard: LockGuard) {
    sleep(Duration::from_millis(50)).await; // what a drop does in the background has no event to await
    let third = subject.provider().await;
    let busy = ok("a try", third.create_lock(guard.name()).try_acquire()).await;
    assert!(busy.is_none(), "the new holder's lock was freed by the stale one");
    assert!(!guard.is_lost());
    ok("the release", guard.release()).await;
}
