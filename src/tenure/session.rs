//! [`Session`]: a connection or a file handle that grants live and die with.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::Tenure;
use crate::clock::Instant;
use crate::guard::Loss;

/// Something on the server that holds grants as long as it lives: a connection, a file handle. Cheap to clone.
///
/// The engine sends a heartbeat through one of its grants every third of the TTL
/// ([`Backend::renew`](crate::backend::Backend::renew)). Whoever notices the session's end calls [`end`](Self::end), and all
/// its guards know.
#[derive(Clone)]
pub struct Session(Arc<Mutex<Inner>>);

struct Inner {
    deadline: Instant,
    ended: Option<Loss>,
    members: Vec<Weak<Tenure>>,
    prune_at: usize,
    next_beat: Instant,
}

impl Session {
    /// A session that has no deadline: it lives until it is [`end`](Self::end)ed, and a frozen holder keeps it.
    #[must_use]
    pub fn new() -> Self {
        Self::until(Instant::NEVER)
    }

    /// A session that the server ends unless it hears from us until then; [`Renewal::Until`](crate::backend::Renewal::Until)
    /// moves the deadline.
    #[must_use]
    pub fn until(deadline: Instant) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            deadline,
            ended: None,
            members: Vec::new(),
            prune_at: 16,
            next_beat: Instant::now(),
        })))
    }

    /// Ends the session, once and for all: every guard on it is lost, for this reason.
    pub fn end(&self, loss: Loss) {
        let (loss, members) = {
            let mut inner = self.lock();
            (*inner.ended.get_or_insert(loss), std::mem::take(&mut inner.members))
        };
        for tenure in members.iter().filter_map(Weak::upgrade) {
            tenure.lose(loss);
        }
    }

    /// Why it has ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Loss> {
        self.lock().ended
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.lock().deadline
    }

    /// An answer to a request sent at the right time says that it lives until then. Never moves the deadline back, and
    /// a deadline that has passed is final.
    pub(crate) fn extend(&self, until: Instant) {
        let mut inner = self.lock();
        if !inner.deadline.has_passed() {
            inner.deadline = inner.deadline.max(until);
        }
    }

    pub(crate) fn join(&self, tenure: &Arc<Tenure>) {
        let ended = {
            let mut inner = self.lock();
            if inner.members.len() >= inner.prune_at {
                inner.members.retain(|member| member.strong_count() > 0);
                inner.prune_at = 2 * inner.members.len() + 16;
            }
            inner.members.push(Arc::downgrade(tenure));
            inner.ended
        };
        if let Some(loss) = ended {
            tenure.lose(loss);
        }
    }

    /// Whether the caller's grant shall send the heartbeat that is due now. If another's does or did, says when the
    /// next one is due.
    pub(crate) fn take_beat(&self, now: Instant, interval: Duration) -> Result<(), Instant> {
        let mut inner = self.lock();
        if !inner.next_beat.has_passed_at(now) {
            return Err(inner.next_beat);
        }
        inner.next_beat = now + interval;
        Ok(())
    }

    /// The heartbeat has failed: the next one is due at that time.
    pub(crate) fn beat_again_at(&self, at: Instant) {
        self.lock().next_beat = at;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("ended", &self.ended()).finish_non_exhaustive()
    }
}
