//! What went on with a lock, and whether that can have been.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fencelock::{FencingToken, LockGuard};

/// All grants of one lock, of whichever provider.
#[derive(Debug, Default)]
pub(crate) struct History {
    grants: Mutex<Vec<Span>>,
}

/// A time in which somebody surely held the lock: they had it by its beginning, and hadn't given it back by its end.
#[derive(Clone, Copy, Debug)]
struct Span {
    token: FencingToken,
    from: Instant,
    to: Instant,
}

impl History {
    pub(crate) fn add(&self, token: FencingToken, from: Instant, to: Instant) {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner).push(Span { token, from, to });
    }

    /// Holds the lock for a while, or until it is lost, and releases it.
    pub(crate) async fn hold(&self, guard: LockGuard, time: Duration) -> fencelock::Result<()> {
        let (token, from) = (guard.fencing_token(), Instant::now());
        let mut to = from;
        loop {
            // In this order, so that it was still held at `now`.
            let now = Instant::now();
            if guard.is_lost() {
                break;
            }
            to = now;
            if from.elapsed() >= time {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1).min(time)).await;
        }
        self.add(token, from, to);
        guard.release().await
    }

    /// How many grants there were.
    ///
    /// # Panics
    ///
    /// If two of them overlap, or a later one has no larger token.
    pub(crate) fn judge(&self) -> usize {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner).clone();
        grants.sort_by_key(|span| span.from);
        for pair in grants.windows(2) {
            assert!(pair[0].to <= pair[1].from, "two at once: {pair:?}");
            assert!(pair[0].token < pair[1].token, "the token doesn't rise: {pair:?}");
        }
        grants.len()
    }
}
