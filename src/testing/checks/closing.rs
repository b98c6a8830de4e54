//! `close()` returns when nothing is left to free, refuses whoever comes or waits, and leaves live guards alone.

use std::time::Duration;

use crate::testing::Subject;
use crate::testing::steps::{in_line, joined, ok, poll_up_to, within};
use crate::{Error, ErrorKind, LockProvider, Loss};

/// When `close` returns, everything that was dropped before is free.
pub async fn dropped_grants_are_free(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let names: Vec<_> = (0..20).map(|number| format!("job {number}")).collect();
    let mut guards = Vec::new();
    for name in &names {
        guards.push(ok("the grant", provider.create_lock(name).acquire()).await);
    }
    drop(guards);
    ok("the end of the provider", provider.close()).await;
    for name in &names {
        let free = ok("a try", other.create_lock(name).try_acquire()).await;
        assert!(free.is_some(), "{name} was dropped, and is still held after the provider's end");
    }
}

/// When `close` returns, nothing is left of attempts that were given up before.
pub async fn abandoned_attempts_are_free(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let third = subject.provider().await;
    for name in ["free", "held"] {
        let lock = provider.create_lock(name);
        let holder = match name {
            "held" => Some(ok("the grant", other.create_lock(name).acquire()).await),
            _ => None,
        };
        let mut attempt = lock.acquire();
        let granted = poll_up_to(1, &mut attempt).await;
        drop((attempt, granted));
        if let Some(holder) = holder {
            ok("the release", holder.release()).await;
        }
    }
    ok("the end of the provider", provider.close()).await;
    for name in ["free", "held"] {
        let free = ok("a try", third.create_lock(name).try_acquire()).await;
        assert!(free.is_some(), "{name:?} is still held after the provider's end");
    }
}

/// Those who wait, and those who come later, get `Closed`.
pub async fn waiters_and_newcomers_are_refused(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let here = ok("the grant", provider.create_lock("held here").acquire()).await;
    let elsewhere = ok("the grant", other.create_lock("held elsewhere").acquire()).await;
    let mut waiters = Vec::new();
    for name in ["held here", "held elsewhere", "held here", "held elsewhere"] {
        waiters.push(in_line(provider.create_lock(name)).await);
    }
    ok("the end of the provider", provider.close()).await;
    for waiter in waiters {
        is_closed(joined("the end of a waiter", waiter).await);
    }
    refuses(&*provider).await;
    assert!(!elsewhere.is_lost());
    ok("the release", elsewhere.release()).await;
    drop(here);
}

/// `close` doesn't wait for guards that the caller still has. They stay good, or hear that they are lost by it.
pub async fn guards_outlive_it_or_hear_of_it(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    ok("the end of the provider", provider.close()).await;
    if guard.is_lost() {
        assert_eq!(within("the loss", guard.lost()).await, Loss::Closed);
        within("the release", guard.release()).await.expect_err("it was lost");
    } else {
        assert!(ok("a try", other.create_lock("job").try_acquire()).await.is_none(), "two have it");
        ok("the release", guard.release()).await;
    }
    drop(ok("the lock after the provider's end", other.create_lock("job").acquire()).await);
}

/// Closing twice, at once or one after the other, is fine.
pub async fn twice_is_fine(subject: Subject) {
    let provider = subject.provider().await;
    drop(ok("the grant", provider.create_lock("job").acquire()).await);
    tokio::join!(
        ok("the end", provider.close()),
        ok("the end, asked for at the same time", provider.close())
    );
    ok("the end, once more", provider.close()).await;
    // One that was never used has nothing to close.
    ok("the end of an unused provider", subject.provider().await.close()).await;
}

/// A `close` that is given up has closed the provider all the same.
pub async fn the_first_poll_closes(subject: Subject) {
    let provider = subject.provider().await;
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let mut closing = provider.close();
    let closed = poll_up_to(1, &mut closing).await;
    drop(closing);
    refuses(&*provider).await;
    drop(guard);
    if closed.is_none() {
        ok("the end of the provider", provider.close()).await;
    }
}

/// Another provider on the same store goes on.
pub async fn other_providers_go_on(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", other.create_lock("job").acquire()).await;
    drop(ok("the grant", provider.create_lock("another job").acquire()).await);
    ok("the end of the provider", provider.close()).await;
    assert!(!guard.is_lost());
    ok("the release", guard.release()).await;
    drop(ok("the grant", other.create_lock("another job").acquire()).await);
}

async fn refuses(provider: &dyn LockProvider) {
    let lock = provider.create_lock("newcomer");
    is_closed(within("the refusal", lock.acquire()).await);
    is_closed(within("the refusal", lock.try_acquire()).await);
    is_closed(within("the refusal", lock.try_acquire_for(Duration::from_secs(1))).await);
}

fn is_closed<T>(outcome: Result<T, Error>) {
    let error = outcome.err().expect("the provider is closed");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
}
