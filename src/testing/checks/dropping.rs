//! A dropped guard frees its lock, wherever it is dropped, and never panics.

use std::panic::resume_unwind;

use crate::testing::Subject;
use crate::testing::steps::{ok, on_thread, runtime, within};

/// In a task.
pub async fn inside_a_runtime(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    drop(guard);
    drop(ok("the dropped lock", other.create_lock("job").acquire()).await);
}

/// On a thread that knows of no runtime, while the runtime goes on.
pub async fn outside_a_runtime(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    on_thread(move || drop(guard)).await;
    drop(ok("the dropped lock", other.create_lock("job").acquire()).await);
}

/// After the runtime on which it was granted is gone. The provider's next use, on another runtime, frees it.
pub async fn after_its_runtime_is_gone(subject: Subject) {
    on_thread(move || {
        let gone = runtime();
        let (provider, early, late) = gone.block_on(async {
            let provider = subject.provider().await;
            let early = ok("the grant", provider.create_lock("dropped while it shuts down").acquire()).await;
            let late = ok("the grant", provider.create_lock("dropped after it").acquire()).await;
            (provider, early, late)
        });
        drop(early); // nobody polls that runtime any more
        drop(gone);
        drop(late);
        runtime().block_on(async {
            drop(ok("the provider's next use", provider.create_lock("another").acquire()).await);
            let other = subject.provider().await;
            for name in ["dropped while it shuts down", "dropped after it"] {
                drop(ok("the dropped lock", other.create_lock(name).acquire()).await);
            }
            ok("the end of the provider", provider.close()).await;
            ok("the end of the other provider", other.close()).await;
        });
    })
    .await;
}

/// In a task that panics.
pub async fn in_a_panic(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let guard = ok("the grant", provider.create_lock("job").acquire()).await;
    let task = tokio::spawn(async move {
        let _guard = guard;
        // Unwinds as a panic does, but prints nothing.
        resume_unwind(Box::new("the job"));
    });
    let error = within("the end of a panicking task", task).await.expect_err("it panics");
    assert_eq!(error.into_panic().downcast_ref(), Some(&"the job"), "the drop panicked");
    drop(ok("the dropped lock", other.create_lock("job").acquire()).await);
}
