//! How a service holds its provider: in a box, an `Arc` or a reference, in a static, on one runtime or many.

use std::sync::Arc;

use crate::testing::Subject;
use crate::testing::steps::{joined, ok, on_thread, runtime, within};
use crate::{DistributedLock, Expiry, LockOptions, LockProvider, Loss};

/// All of it works through `Box<dyn>`, `Arc<dyn>` and `&dyn`, and every future can move to another thread.
pub async fn boxes_arcs_and_references(subject: Subject) {
    let boxed = subject.provider().await;
    use_once("through a reference", &*boxed).await;
    use_once("through a reference to the box", &boxed).await;
    let shared: Arc<dyn LockProvider> = boxed.into();
    // Spawned: it compiles only if the futures are `Send`.
    joined("the use by a task", tokio::spawn(use_once("through an Arc", shared.clone()))).await;
    joined("the use by a task", tokio::spawn(use_once("through a box", subject.provider().await))).await;
    ok("the end of the provider", shared.close()).await;
}

async fn use_once(name: &'static str, provider: impl LockProvider) {
    use_lock(name, provider.create_lock(name), &provider).await;
    use_lock(name, Arc::<dyn DistributedLock>::from(provider.create_lock(name)), &provider).await;
    use_lock(name, &*provider.create_lock_with(name, LockOptions::new().auto_renew(false)), &provider).await;
}

async fn use_lock(name: &str, lock: impl DistributedLock, provider: &impl LockProvider) {
    assert_eq!(lock.name(), name);
    let guard = ok("the grant", lock.acquire()).await;
    let same = provider.create_lock(name);
    assert!(ok("a try", same.try_acquire()).await.is_none(), "{name}: two have it");
    assert_eq!(ok("a job", guard.run(async { 3 })).await, 3);
    ok("the release", guard.release()).await;
}

/// `drop(guard)` and then `try_acquire()` in the same task succeeds: a try waits for a release of its own process.
pub async fn a_try_sees_the_drop_before_it(subject: Subject) {
    let provider = subject.provider().await;
    let (lock, same) = (provider.create_lock("job"), provider.create_lock("job"));
    for round in 0..50 {
        for lock in [&lock, &same] {
            let guard = ok("a try", lock.try_acquire()).await;
            drop(guard.unwrap_or_else(|| panic!("busy in round {round}, although the guard was dropped")));
        }
    }
}

/// A provider in a static works on several runtimes, one after the other: what one runtime has left behind, the next
/// takes over.
pub async fn one_provider_serves_many_runtimes(subject: Subject) {
    on_thread(move || {
        let first = runtime();
        let provider: &'static dyn LockProvider = Box::leak(first.block_on(subject.provider()));
        let kept = provider.create_lock_with("kept", LockOptions::new().ttl(subject.steady_ttl()));
        let kept = first.block_on(ok("the grant", kept.acquire()));
        drop(first);
        for _ in 0..3 {
            runtime().block_on(async {
                let lock = provider.create_lock("job");
                let free = ok("a lock that was dropped on the runtime before", lock.try_acquire()).await;
                let guard = free.expect("it was dropped");
                assert!(ok("a try", lock.try_acquire()).await.is_none(), "two have it");
                drop(guard); // as the last thing before the runtime's end
            });
        }
        runtime().block_on(async {
            drop(ok("the grant", provider.create_lock("job").acquire()).await);
            let other = subject.provider().await;
            let loss = tokio::time::timeout(subject.steady_ttl() * 3 / 2, kept.lost()).await.ok();
            if loss == Some(Loss::SessionEnded) && subject.capabilities().expiry != Expiry::Ttl {
                // The connection has ended with the runtime that served it.
                let error = within("the release", kept.release()).await.expect_err("it was lost");
                assert_eq!(error.loss(), loss);
            } else {
                assert_eq!(loss, None, "a lock of an earlier runtime is not renewed on this one");
                assert!(ok("a try", other.create_lock("kept").try_acquire()).await.is_none(), "two have it");
                ok("the release", kept.release()).await;
            }
            drop(ok("the grant", other.create_lock("kept").acquire()).await);
            ok("the end of the provider", provider.close()).await;
            ok("the end of the other provider", other.close()).await;
        });
    })
    .await;
}
