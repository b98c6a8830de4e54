//! Claims that are given up: nothing of them stays on the server.

use std::sync::Arc;
use std::time::Duration;

use super::claim::{Entry, Stage, stopped};
use super::hold::SessionHold;
use super::line::withdraw;
use super::pool::{Pool, Sessions};
use super::session::{DOUBT_AFTER, LockSession};
use super::{Connection, Server};
use crate::backend::{Claim, Instant};
use crate::engine::carried::Carried;
use crate::engine::lock;
use crate::error::{ErrorKind, Result};

/// How long a cancelled wait may take to end, at each of several tries.
const CANCEL_PATIENCE: Duration = Duration::from_millis(50);
const CANCEL_TRIES: u32 = 5;
const CANCEL_WITHIN: Duration = Duration::from_secs(2);

impl<S: Server> Entry<S> {
    /// Whether it was abandoned so long ago that nobody comes for what is left of it.
    pub(super) fn is_given_up(&self) -> bool {
        lock(&self.given_up_at).is_some_and(Instant::has_passed)
    }
}

impl<S: Server> Sessions<S> {
    /// [`Backend::abandon`](crate::backend::Backend::abandon).
    pub(crate) async fn abandon(&self, claim: &Claim) -> Result<()> {
        let pool = &self.0;
        let Some(entry) = lock(&pool.claims).get(&claim.owner).cloned() else { return Ok(()) };
        lock(&entry.given_up_at).get_or_insert_with(|| Instant::now() + claim.ttl * 2);
        self.clear_up(claim, &entry).await?;
        let waiting = lock(&entry.waiting).take();
        withdraw(waiting).await;
        lock(&pool.claims).remove(&claim.owner);
        Ok(())
    }

    /// Leaves nothing of the claim's requests on the server.
    async fn clear_up(&self, claim: &Claim, entry: &Arc<Entry<S>>) -> Result<()> {
        enum Step<S: Server> {
            Await(Arc<LockSession<S::Connection>>),
            Cancel(Arc<LockSession<S::Connection>>, Instant),
            Release(SessionHold<S>),
            Terminate(Arc<LockSession<S::Connection>>),
        }
        loop {
            let mut changed = std::pin::pin!(entry.changed.notified());
            changed.as_mut().enable();
            let step = match &mut *lock(&entry.stage) {
                Stage::Nothing | Stage::Failed(_) => return Ok(()),
                Stage::Asking(session) => Step::Await(session.clone()),
                Stage::Blocked { session, cancelled_at } => {
                    let since = *cancelled_at.get_or_insert_with(Instant::now);
                    Step::Cancel(session.clone(), since)
                }
                Stage::Granted(hold, _) => Step::Release(hold.clone()),
                Stage::Broken(session, _) => Step::Terminate(session.clone()),
            };
            match step {
                Step::Await(session) => {
                    let in_time = tokio::time::timeout(DOUBT_AFTER, changed).await;
                    // Nobody drives it, so that it can't be waited for; nor can its guards be kept.
                    if in_time.is_err() && session.is_silent() {
                        session.break_off();
                        entry.set(Stage::Broken(session, stopped()));
                    }
                }
                Step::Cancel(session, since) => self.cancel(claim.ttl, &session, since, entry).await,
                Step::Release(hold) => {
                    match hold.release(self).await {
                        // It was lost, and is free.
                        Err(error) if error.kind() != ErrorKind::Lost => return Err(error),
                        Ok(_) | Err(_) => entry.set(Stage::Nothing),
                    }
                }
                Step::Terminate(session) => {
                    self.0.terminate(&session).await?;
                    entry.set(Stage::Nothing);
                }
            }
        }
    }

    /// Breaks off the wait of a claim. It has come to something when this returns.
    async fn cancel(
        &self,
        ttl: Duration,
        session: &Arc<LockSession<S::Connection>>,
        since: Instant,
        entry: &Entry<S>,
    ) {
        for tries in 0..CANCEL_TRIES {
            // Each call may be dropped and be followed by another.
            if since.elapsed() > CANCEL_WITHIN {
                break;
            }
            let mut changed = std::pin::pin!(entry.changed.notified());
            changed.as_mut().enable();
            let Some(sending) = entry.cancel_begins(session) else { return };
            let patience = CANCEL_PATIENCE * 2u32.pow(tries);
            let cancel = async {
                let helper = self.0.helper(ttl).await?;
                let (runtime, waiting) = (helper.user().runtime.clone(), session.clone());
                Carried::new(&runtime, async move {
                    let other = helper.user();
                    let cancelled = other.errand(other.connection.cancel(&waiting.connection)).await;
                    if cancelled.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unknown) {
                        waiting.break_off(); // it may arrive at any time
                    }
                    drop(sending);
                    cancelled
                })
                .await
            };
            // Sent before the wait had reached the server, it has done nothing: then it is sent again.
            match tokio::time::timeout(patience, cancel).await {
                Ok(Err(error)) if !error.is_retryable() => break, // such as a right that is missing
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => continue,
            }
            if tokio::time::timeout(patience, changed).await.is_ok() {
                return;
            }
        }
        session.break_off();
        let mut changed = std::pin::pin!(entry.changed.notified());
        changed.as_mut().enable();
        if matches!(&*lock(&entry.stage), Stage::Blocked { .. }) {
            changed.await;
        }
    }
}

impl<S: Server> Pool<S> {
    /// Forgets claims that nobody will abandon any more. What they hold is unlocked with that.
    pub(super) fn sweep(&self) {
        let given_up: Vec<_> = lock(&self.claims).extract_if(|_, entry| entry.is_given_up()).collect();
        drop(given_up); // with the map unlocked
    }
}
