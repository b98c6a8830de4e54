//! Holders that die: their locks are free within the documented bound.

use std::time::Duration;

use tokio::time::Instant;

use crate::Expiry;
use crate::testing::Subject;
use crate::testing::child::{Child, LOCK, Role, token};
use crate::testing::steps::{in_line, joined, ok};

/// A holder that is killed.
pub async fn a_killed_holder_loses_it(subject: Subject) {
    abandoned(&subject, Child::kill).await;
}

/// A holder whose process exits without having released the lock.
pub async fn an_exited_holder_loses_it(subject: Subject) {
    let exit = async |mut child: Child| {
        child.go_on();
        child.ended().await;
    };
    abandoned(&subject, exit).await;
}

async fn abandoned(subject: &Subject, end: impl AsyncFnOnce(Child)) {
    // With a session the TTL is so long that it can't be what frees the lock.
    let (ttl, bound) = match subject.capabilities().expiry {
        Expiry::Ttl => (subject.steady_ttl(), subject.steady_ttl()),
        Expiry::Session | Expiry::SessionOrTtl => {
            (subject.capabilities().max_ttl.min(Duration::from_secs(600)), Duration::from_secs(2))
        }
    };
    let provider = subject.provider().await;
    let mut child = Child::start(subject, Role::Hold { ttl });
    let abandoned = token(&child.says("held").await);
    assert!(ok("a try", provider.create_lock(LOCK).try_acquire()).await.is_none(), "two have it");
    let waiting = in_line(provider.create_lock(LOCK)).await;
    end(child).await;
    let ended = Instant::now();
    let guard = joined("the grant after the holder's death", waiting).await.expect("it is free");
    let late = ended.elapsed();
    assert!(
        late <= bound + subject.slack(),
        "a dead holder kept the lock for {late:?}, the bound is {bound:?}"
    );
    assert!(guard.fencing_token() > abandoned, "the dead holder could not be told from the new one");
}

/// `hold_at_least` outlives the process that released the lock. Ignored where the process has to see to it.
pub async fn hold_at_least_outlives_the_process(subject: Subject) {
    let time = subject.steady_ttl();
    let provider = subject.provider().await;
    let mut child = Child::start(&subject, Role::HoldAtLeast { time });
    child.says("ready").await;
    let began = Instant::now();
    child.go_on();
    let released = token(&child.says("done").await);
    child.ended().await;
    let guard = ok("the next grant", provider.create_lock(LOCK).acquire()).await;
    let kept = began.elapsed();
    assert!(kept + Subject::CLOCK_GRAIN >= time, "a hold_at_least of {time:?} was over after {kept:?}");
    assert!(guard.fencing_token() > released);
}
