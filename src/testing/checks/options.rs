//! Options: what can't be is said before any I/O, and what isn't set comes from the provider.

use std::time::Duration;

use crate::testing::Subject;
use crate::testing::steps::{ok, poll_up_to, within};
use crate::{ErrorKind, LockOptions, Loss};

/// Options that can't be are an error of kind `Config` when the first acquire is first polled: no server was asked.
pub async fn what_cannot_be_is_said_at_once(subject: Subject) {
    let (min, max) = (subject.capabilities().min_ttl, subject.capabilities().max_ttl);
    let (instant, new) = (Duration::from_nanos(1), LockOptions::new);
    let mut wrong = vec![
        new().ttl(Duration::ZERO),
        new().ttl(min.saturating_sub(instant)),
        new().ttl(max + instant),
        new().ttl(Duration::MAX),
        new().max_hold(Duration::ZERO),
        new().max_hold(max).hold_at_least(max + instant),
        new().auto_renew(false).ttl(min).hold_at_least(min + instant),
        new().hold_at_least(Duration::MAX),
    ];
    wrong.dedup(); // a minimum of a nanosecond makes the first two the same
    let provider = subject.provider().await;
    for options in wrong {
        let lock = provider.create_lock_with("job", options.clone());
        let mut attempts = [lock.try_acquire(), lock.try_acquire_for(Duration::ZERO), {
            Box::pin(async { lock.acquire().await.map(Some) })
        }];
        for attempt in &mut attempts {
            let outcome = poll_up_to(1, attempt).await;
            let outcome = outcome.unwrap_or_else(|| panic!("{options:?} was not refused before any I/O"));
            let error = outcome.err().unwrap_or_else(|| panic!("{options:?} was not refused"));
            assert_eq!(error.kind(), ErrorKind::Config, "{options:?}: {error}");
            assert_eq!(error.lock_name(), Some("job"), "{error}");
        }
        options.validate(&subject.capabilities()).expect_err("validation says the same");
    }
    for fine in
        [new().ttl(min), new().ttl(max), new().max_hold(Duration::MAX), new().retry_for(Duration::ZERO)]
    {
        let lock = provider.create_lock_with("job", fine);
        ok("the release", ok("the grant", lock.acquire()).await.release()).await;
    }
}

/// What a lock's options leave unset is as its provider's options say.
pub async fn a_lock_inherits_what_it_leaves_unset(subject: Subject) {
    let expiring = LockOptions::new().ttl(subject.short_ttl()).auto_renew(false);
    let provider = subject.provider_with(expiring).await;
    let lasting = provider.create_lock_with("lasting", subject.lasting());
    let lasting = ok("the grant", lasting.acquire()).await;
    let inheriting = provider.create_lock_with("inheriting", LockOptions::new().retry_for(Duration::ZERO));
    let inheriting = ok("the grant", inheriting.acquire()).await;
    assert_eq!(within("the loss", inheriting.lost()).await, Loss::Expired);
    assert!(!lasting.is_lost(), "its own ttl was not heeded");
    ok("the release", lasting.release()).await;
}
