//! Taking locks, of whatever server.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use fencelock::{DistributedLock, ErrorKind, FencingToken, LockGuard, LockProvider};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::proxy::Proxy;

/// How much longer than promised a busy machine may take.
pub(crate) const SLACK: Duration = Duration::from_secs(2);

/// Far longer than anything takes, on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Awaits what has to happen.
pub(crate) async fn within<F: Future>(event: &str, future: F) -> F::Output {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {event}"))
}

/// Shows with `--nocapture` how long something took.
pub(crate) fn report(what: &str, took: Duration) {
    println!("{what}: {:.1} ms", took.as_secs_f64() * 1e3);
}

/// Waits for a lock in a task, which says when it got it.
pub(crate) fn waits(provider: &impl LockProvider, name: &str) -> JoinHandle<(LockGuard, Instant)> {
    let lock = provider.create_lock(name);
    tokio::spawn(async move {
        let guard = lock.acquire().await.expect("granted in the end");
        (guard, Instant::now())
    })
}

pub(crate) async fn granted(waiter: JoinHandle<(LockGuard, Instant)>) -> (LockGuard, Instant) {
    within("a waiter has the lock", waiter).await.expect("it doesn't panic")
}

pub(crate) async fn take(provider: &impl LockProvider, name: &str) -> LockGuard {
    within("the lock is taken", provider.create_lock(name).acquire()).await.expect("the server is there")
}

/// Takes the lock if it can be had within a time that is short against what a busy machine may need: only then may a
/// claim be unanswered, after the 200 ms more that it is given.
pub(crate) async fn take_within(lock: &dyn DistributedLock, limit: Duration) -> Option<LockGuard> {
    let began = Instant::now();
    match within("the timeout", lock.try_acquire_for(limit)).await {
        Ok(taken) => taken,
        Err(error) => {
            let late = began.elapsed() >= limit + Duration::from_millis(200);
            assert!(error.kind() == ErrorKind::Unknown && late, "after {:?}: {error}", began.elapsed());
            report("a claim was unanswered", began.elapsed());
            None
        }
    }
}

/// What a network does to a holder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// Nothing arrives until it is over, and then everything does, as TCP sends it again.
    HoldRequests,
    HoldReplies,
    /// Nothing arrives, and nothing is sent again.
    CutRequests,
    CutReplies,
    DelayRequests(Duration),
    DelayReplies(Duration),
}

impl Fault {
    pub(crate) fn begin(self, proxy: &Proxy) {
        match self {
            Self::HoldRequests => proxy.hold_requests(),
            Self::HoldReplies => proxy.hold_replies(),
            Self::CutRequests => proxy.cut_requests(),
            Self::CutReplies => proxy.cut_replies(),
            Self::DelayRequests(by) => proxy.delay_requests(by),
            Self::DelayReplies(by) => proxy.delay_replies(by),
        }
    }

    pub(crate) fn end(proxy: &Proxy) {
        proxy.heal();
        proxy.release_requests();
        proxy.release_replies();
        proxy.delay_requests(Duration::ZERO);
        proxy.delay_replies(Duration::ZERO);
    }
}

/// A random number below `end`, from a seed that is printed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn new() -> Self {
        let seed = RandomState::new().hash_one(0) | 1;
        println!("seed: {seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// One of these.
    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let place = self.below(of.len() as u64);
        &of[usize::try_from(place).expect("it is below a length")]
    }
}

/// A grant that was asked for, and got, at these times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    pub(crate) token: FencingToken,
    pub(crate) asked: Instant,
    pub(crate) got: Instant,
}

/// How many grants of a name there were. Tokens must be distinct, and rise where it is certain which was drawn first.
///
/// # Panics
///
/// If they don't.
pub(crate) fn judge(drawn: &[Drawn]) -> usize {
    let tokens: HashSet<_> = drawn.iter().map(|drawn| drawn.token).collect();
    assert_eq!(tokens.len(), drawn.len(), "a token was drawn twice");
    let (mut by_got, mut by_asked) = (drawn.to_vec(), drawn.to_vec());
    by_got.sort_by_key(|drawn| drawn.got);
    by_asked.sort_by_key(|drawn| drawn.asked);
    let (mut earlier, mut highest) = (by_got.into_iter().peekable(), None::<Drawn>);
    for later in by_asked {
        while let Some(before) = earlier.next_if(|before| before.got <= later.asked) {
            if highest.is_none_or(|highest| highest.token < before.token) {
                highest = Some(before);
            }
        }
        if let Some(highest) = highest {
            assert!(highest.token < later.token, "{highest:?} was before {later:?}");
        }
    }
    drawn.len()
}
