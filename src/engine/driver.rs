//! Serves those who wait: one task per name that claims on behalf of all local waiters and waits on the server for them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::Engine;
use super::attempt::Attempt;
use super::backoff::{Backoff, jitter};
use super::queue::Head;
use super::request::answered;
use super::worker::OnDrop;
use crate::backend::{Backend, Claim, Outcome};
use crate::capabilities::Fairness;
use crate::clock::Instant;
use crate::error::{ErrorKind, Result};
use crate::name::LockName;

/// How long the driver asks the backend to wait on the server at a time.
const WAIT: Duration = Duration::from_secs(10);
/// How long other processes get to take a lock that has passed from hand to hand here, where the server keeps no order.
const YIELD: Duration = Duration::from_millis(3);

/// Serves the waiters of one name: claims for the first, waits on the server, and hands what it gets to whoever is
/// first then. A waiter who leaves doesn't cost the others the place on the server. Ends with the first grant, since
/// from then on the holder's release serves the next, or when nobody waits.
pub(super) fn drive<B: Backend>(
    engine: Arc<Engine<B>>,
    name: LockName,
    stop: Arc<Notify>,
) -> impl Future<Output = ()> + Send {
    // Dropped with its runtime, perhaps before it was polled: the waiters of other runtimes see to it themselves.
    let died = OnDrop(Some({
        let (engine, name, stop) = (engine.clone(), name.clone(), stop.clone());
        move || engine.queues.driver_died(&name, &stop)
    }));
    async move {
        let mut died = died;
        drive_to_the_end(&engine, &name, &stop).await;
        died.0 = None;
    }
}

async fn drive_to_the_end<B: Backend>(engine: &Arc<Engine<B>>, name: &LockName, stop: &Arc<Notify>) {
    loop {
        let Head::Claim { ttl, mode, failures, yields } = engine.queues.head(name, stop) else { return };
        if failures > 0 {
            let delay = Backoff::between_retries().after(failures - 1).next();
            if tokio::time::timeout(delay, stop.notified()).await.is_ok() {
                continue;
            }
        }
        if yields && engine.capabilities.fairness == Fairness::None {
            tokio::time::sleep(YIELD / 2 + jitter(YIELD / 2)).await;
        }
        let mut failed = Failed { since: Instant::now(), abandoned: false };
        let error = match Claim::new(name.clone(), mode, ttl) {
            Ok(claim) => {
                match claim_for_waiters(engine, Attempt::new(engine, claim), stop, &mut failed).await {
                    Ok(()) => return,
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        engine.queues.fail(name, failed.since, &error);
        if failed.abandoned {
            return; // it is being abandoned, and then there is a new driver
        }
    }
}

/// Of a driver's claim that failed: since when, and whether it is being abandoned.
struct Failed {
    since: Instant,
    abandoned: bool,
}

/// One claim, asked again until it is granted or nobody needs it. An error has been cleared up after, if `failed` says so
/// by abandoning the claim in the background.
async fn claim_for_waiters<B: Backend>(
    engine: &Arc<Engine<B>>,
    attempt: Attempt<'_, B>,
    stop: &Notify,
    failed: &mut Failed,
) -> Result<()> {
    let mut queued = false;
    let mut poll = Backoff::between_polls();
    loop {
        let claimed_at = Instant::now();
        failed.since = claimed_at;
        let answer = {
            let answer = answered(WAIT + WAIT / 2, engine.backend.try_claim(&attempt.claim, WAIT));
            tokio::pin!(answer);
            loop {
                tokio::select! {
                    answer = &mut answer => break answer,
                    () = stop.notified() => {
                        if engine.queues.give_up(&attempt.claim) {
                            return Ok(()); // dropping both abandons it
                        }
                    }
                }
            }
        };
        let retry_after = match answer {
            Ok(Outcome::Granted(grant)) => {
                engine.deliver(&attempt.disarm(), claimed_at, grant);
                return Ok(());
            }
            Ok(Outcome::Busy { retry_after }) => retry_after,
            Err(error) => {
                // What was busy before may still be queued on the server.
                failed.abandoned = queued || error.kind() == ErrorKind::Unknown;
                if !failed.abandoned {
                    let _ = attempt.disarm();
                }
                return Err(error);
            }
        };
        queued = true;
        engine.queues.clear_trouble(&attempt.claim.name);
        if engine.queues.give_up(&attempt.claim) {
            return Ok(());
        }
        let waited = claimed_at.elapsed();
        if waited >= WAIT / 2 || (retry_after == Some(Duration::ZERO) && !waited.is_zero()) {
            poll.reset(); // the backend has waited: no reason to wait once more
            continue;
        }
        let delay = poll.next().min(retry_after.unwrap_or(Duration::MAX));
        let _ = tokio::time::timeout(delay, stop.notified()).await; // either will do
    }
}
