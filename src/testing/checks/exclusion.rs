//! One holder at a time, and a token that tells the holders apart.

use crate::testing::Subject;
use crate::testing::steps::ok;

/// Nobody gets a held lock, neither through the same provider nor through another, and anybody gets a different one; a
/// released lock can be had again.
pub async fn one_holder_per_name(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let lock = provider.create_lock("one");
    for _ in 0..3 {
        let guard = ok("a free lock", lock.try_acquire()).await.expect("nobody has it");
        assert_eq!((guard.name(), guard.is_lost()), ("one", false));
        assert!(ok("a try", lock.try_acquire()).await.is_none(), "the holder got it twice");
        for provider in [&provider, &other] {
            let lock = provider.create_lock("one");
            assert!(ok("a try", lock.try_acquire()).await.is_none(), "two have it");
            let different = ok("another name", provider.create_lock("two").try_acquire()).await;
            ok("the release", different.expect("nobody has the other name").release()).await;
        }
        ok("the release", guard.release()).await;
        let guard = ok("a released lock", other.create_lock("one").try_acquire()).await;
        ok("the release", guard.expect("it has been released").release()).await;
    }
}

/// Each grant has a larger token than those before it, whoever gets it.
pub async fn tokens_increase(subject: Subject) {
    let mut last = None;
    for _ in 0..5 {
        // A provider that comes later, as after a restart of the service, goes on from the same number.
        let provider = subject.provider().await;
        let lock = provider.create_lock("numbered");
        for _ in 0..5 {
            let guard = ok("the grant", lock.acquire()).await;
            let token = Some(guard.fencing_token());
            assert!(token > last, "a token of {token:?} after one of {last:?}");
            last = token;
            ok("the release", guard.release()).await;
        }
        ok("the end of the provider", provider.close()).await;
    }
}
