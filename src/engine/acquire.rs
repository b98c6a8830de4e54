//! Brings grants in: one claim in the caller's own future, then, if the lock is busy, a place in the queue that the
//! [driver](super::driver) serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tracing::{Instrument, field};

use super::Engine;
use super::attempt::Attempt;
use super::backoff::Backoff;
use super::holding::Holding;
use super::queue::{Begin, ClaimEnd};
use super::releaser::Job;
use super::slot::{Delivery, Trouble, Waiter, Watchers};
use super::worker::OnDrop;
use crate::backend::{Backend, Claim, Grant, Mode, Outcome};
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::LockGuard;
use crate::name::LockName;
use crate::options::Terms;

/// How much longer than the caller's time limit an attempt that is under way may take to be answered.
pub(super) const ROUND_TRIP: Duration = Duration::from_millis(200);
/// How long a caller waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// One attempt.
    Try,
    /// Until then; [`Instant::NEVER`] is as long as it takes.
    Until(Instant),
}

/// One call of an acquire method.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// The name on the server.
    pub(super) name: &'a LockName,
    pub(super) display_name: &'a LockName,
    pub(super) terms: &'a Terms,
    pub(super) patience: Patience,
}

impl<B: Backend> Engine<B> {
    pub(super) async fn acquire(self: &Arc<Self>, request: Request<'_>) -> Result<Option<LockGuard>> {
        let span = tracing::debug_span!(
            "acquire",
            lock.name = %request.display_name.quoted(),
            lock.backend = self.backend.name(),
            lock.token = field::Empty,
            lock.mode = "exclusive",
            waited_ms = field::Empty,
            attempts = field::Empty,
        );
        let (began, display_name) = (Instant::now(), request.display_name);
        let attempts = AtomicU32::new(0);
        let result = self.acquire_inner(request, &attempts).instrument(span.clone()).await;
        if !span.is_disabled() {
            span.record("waited_ms", u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
            span.record("attempts", attempts.into_inner());
            if let Ok(Some(guard)) = &result {
                span.record("lock.token", guard.fencing_token().get());
            }
        }
        result.map_err(|error| error.during("acquire", self.backend.name(), Some(display_name)))
    }

    /// `attempts` counts the claims of this call itself; those of a driver are for all who wait.
    async fn acquire_inner(
        self: &Arc<Self>,
        request: Request<'_>,
        attempts: &AtomicU32,
    ) -> Result<Option<LockGuard>> {
        let runtime = self.ensure_workers()?;
        let call = Call { number: self.next_number(), began: Instant::now(), runtime, request, attempts };
        let mut backoff = Backoff::between_retries();
        let mut trouble: Option<Error> = None;
        loop {
            if self.is_closed() {
                return Err(Error::new(ErrorKind::Closed, "the provider has been closed"));
            }
            let begin = match call.request.patience {
                Patience::Try => self.queues.begin_try(call.name()),
                Patience::Until(_) => self.queues.begin_acquire(call.name(), |deliver| call.waiter(deliver)),
            };
            match begin {
                Begin::Claim => match self.claim(&call).await? {
                    Claimed::Granted(guard) => return Ok(Some(guard)),
                    Claimed::Busy => return Ok(None),
                    Claimed::Queued(delivery) => {
                        if let Some(result) = self.wait(&call, delivery).await {
                            return result;
                        }
                    }
                    Claimed::Failed(error) => {
                        let delay = backoff.next();
                        if call.gives_up_at() <= Instant::now() + delay {
                            return Err(error);
                        }
                        trouble = Some(error);
                        tokio::time::sleep(delay).await;
                    }
                },
                Begin::Queued(delivery) => {
                    if let Some(result) = self.wait(&call, delivery).await {
                        return result;
                    }
                }
                Begin::Busy => return Ok(None),
                Begin::Watch(watchers) => {
                    self.releaser.help(self, &call.runtime);
                    if self.watch(&call, &watchers).await? {
                        return Ok(None);
                    }
                    if call.gives_up_at().has_passed()
                        && let Some(error) = trouble.take()
                    {
                        return Err(error);
                    }
                }
                Begin::Expired(holding) => {
                    holding.expire(self);
                    tokio::task::yield_now().await;
                }
            }
            self.ensure_workers()?;
        }
    }

    /// A try waits for what is under way. True: it found the lock busy, and was sent after this call began.
    async fn watch(&self, call: &Call<'_>, watchers: &Watchers) -> Result<bool> {
        match tokio::time::timeout(call.gives_up_at().remaining(), watchers.changed()).await {
            Ok(()) => Ok(watchers.found_busy_after(call.number)),
            Err(_) => Err(Error::new(
                ErrorKind::Unavailable,
                "an earlier request of this process for the same lock has not been answered",
            )),
        }
    }

    /// One claim, in the caller's own future. The slot is `Claiming`, and isn't any more afterwards.
    async fn claim(self: &Arc<Self>, call: &Call<'_>) -> Result<Claimed> {
        let name = call.name();
        let terms = call.request.terms;
        let claim = match Claim::new(name.clone(), Mode::Exclusive, terms.ttl) {
            Ok(claim) => claim,
            Err(error) => {
                self.serve(self.queues.end_claim(name, ClaimEnd::Failed, None, None), name);
                return Err(error);
            }
        };
        self.longest_ttl
            .fetch_max(u64::try_from(terms.ttl.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        let number = self.next_number();
        call.attempts.fetch_add(1, Ordering::Relaxed);
        let attempt = Attempt::new(self, claim);
        let claimed_at = Instant::now();
        let answer = tokio::time::timeout(
            call.answer_limit().remaining(),
            self.backend.try_claim(&attempt.claim, Duration::ZERO),
        )
        .await;
        let error = match answer {
            Ok(Ok(Outcome::Granted(grant))) if !grant.has_expired() && !self.is_closed() => {
                let claim = attempt.disarm();
                let display_name = call.request.display_name.clone();
                let (terms, runtime) = (terms.clone(), call.runtime.clone());
                let holding = Holding::new(self, &claim, claimed_at, grant, display_name, terms, runtime);
                let next = self.queues.end_claim(name, ClaimEnd::Granted(holding.clone()), None, None);
                self.serve(next, name);
                return Ok(Claimed::Granted(holding.into_guard(self)));
            }
            Ok(Ok(Outcome::Granted(_))) => {
                drop(attempt); // to be abandoned
                Error::new(ErrorKind::Unknown, "the grant came too late to be used")
            }
            Ok(Ok(Outcome::Busy { .. })) => {
                let _ = attempt.disarm();
                return Ok(self.after_claim(call, ClaimEnd::Busy(number), None).unwrap_or(Claimed::Busy));
            }
            Ok(Err(error)) if error.kind() == ErrorKind::Unknown => {
                if matches!(call.request.patience, Patience::Until(_)) && !call.gives_up_at().has_passed() {
                    let (waiter, queued) = call.queue();
                    self.queues.wait_for_freeing(name, waiter, Trouble::new(claimed_at, &error));
                    drop(attempt); // to be abandoned
                    return Ok(queued);
                }
                drop(attempt); // to be abandoned
                error
            }
            Ok(Err(error)) => {
                let _ = attempt.disarm();
                let retry = error.is_retryable() && !call.gives_up_at().has_passed();
                let trouble = retry.then(|| Trouble::new(claimed_at, &error));
                return match self.after_claim(call, ClaimEnd::Failed, trouble) {
                    Some(queued) if retry => Ok(queued),
                    _ if retry => Ok(Claimed::Failed(error)),
                    _ => Err(error),
                };
            }
            Err(_) => {
                drop(attempt); // to be abandoned
                return Err(Error::new(ErrorKind::Unknown, "the claim has not been answered in time"));
            }
        };
        // What comes next waits for the abandonment: as a waiter, or as a try that watches it.
        Ok(Claimed::Failed(error))
    }

    /// Ends a claim that was answered. A caller who waits is queued, unless it has failed for good.
    fn after_claim(
        self: &Arc<Self>,
        call: &Call<'_>,
        end: ClaimEnd<B>,
        trouble: Option<Trouble>,
    ) -> Option<Claimed> {
        let for_good = matches!(end, ClaimEnd::Failed) && trouble.is_none();
        let (waiter, queued) = match call.request.patience {
            Patience::Until(_) if !for_good => Some(call.queue()).unzip(),
            _ => (None, None),
        };
        self.serve(self.queues.end_claim(call.name(), end, waiter, trouble), call.name());
        queued
    }

    /// Waits in the queue. `None`: begin again, at the same place.
    async fn wait(
        self: &Arc<Self>,
        call: &Call<'_>,
        mut delivery: oneshot::Receiver<Delivery>,
    ) -> Option<Result<Option<LockGuard>>> {
        let mut trouble = None;
        let leave = OnDrop(Some(|| trouble = self.queues.leave(call.name(), call.number)));
        if self.is_closed() {
            return None; // it may have sent the waiters away before this one came
        }
        self.releaser.help(self, &call.runtime);
        let deadline = match call.request.patience {
            Patience::Until(deadline) => deadline,
            Patience::Try => Instant::now(),
        };
        let delivered = loop {
            // The keeper may stand still with its runtime: who waits notices the end of the holder's time, too.
            let holder = self.queues.holder(call.name());
            if let Some(holder) = holder.as_ref().filter(|holder| holder.is_overdue()) {
                holder.expire(self);
                self.releaser.help(self, &call.runtime);
            }
            let look_at = holder.map_or(Instant::NEVER, |holder| holder.overdue_at()).min(deadline);
            if look_at == Instant::NEVER {
                break (&mut delivery).await.ok();
            }
            let nap = look_at.remaining().max(Duration::from_millis(1)).min(deadline.remaining());
            match tokio::time::timeout(nap, &mut delivery).await {
                Ok(delivered) => break delivered.ok(),
                Err(_) if !deadline.has_passed() => {} // the timer's clock is coarser than ours
                Err(_) => break None,
            }
        };
        drop(leave);
        // What was delivered while we left is not lost.
        match delivered.or_else(|| delivery.try_recv().ok()) {
            Some(Delivery::Granted(guard)) => Some(Ok(Some(guard))),
            Some(Delivery::Failed(error)) => Some(Err(error)),
            Some(Delivery::Again) => None,
            None if !deadline.has_passed() => None,
            None => Some(trouble.map_or(Ok(None), Err)),
        }
    }

    /// Gives a grant to the first local waiter, or back to the server if none is left who can use it.
    pub(super) fn deliver(self: &Arc<Self>, claim: &Claim, claimed_at: Instant, grant: Grant<B::Hold>) {
        if grant.has_expired() {
            self.queues.begin_freeing(&claim.name);
            self.releaser.push(self, Job::Abandon(claim.clone()));
            return;
        }
        let mut grant = Some(grant);
        let delivered = self.queues.deliver(claim, |waiter| {
            let grant = grant.take().expect("asked for once");
            Holding::for_waiter(self, claim, claimed_at, grant, waiter)
        });
        match delivered {
            Some((holding, waiter)) => {
                // If the waiter has left, the guard comes back and is dropped: the next one is served.
                drop(waiter.deliver.send(Delivery::Granted(holding.into_guard(self))));
            }
            None => self.releaser.push(self, Job::Abandon(claim.clone())),
        }
    }
}

enum Claimed {
    Granted(LockGuard),
    Busy,
    /// Busy or failing, and the caller waits.
    Queued(oneshot::Receiver<Delivery>),
    /// It may go better next time.
    Failed(Error),
}

/// A request with its place in the order of calls.
struct Call<'a> {
    number: u64,
    began: Instant,
    runtime: Handle,
    request: Request<'a>,
    attempts: &'a AtomicU32,
}

impl Call<'_> {
    fn name(&self) -> &LockName {
        self.request.name
    }

    /// The caller as a waiter, and what it waits for.
    fn queue(&self) -> (Waiter, Claimed) {
        let (deliver, delivery) = oneshot::channel();
        (self.waiter(deliver), Claimed::Queued(delivery))
    }

    fn waiter(&self, deliver: oneshot::Sender<Delivery>) -> Waiter {
        Waiter {
            number: self.number,
            arrived: self.began,
            display_name: self.request.display_name.clone(),
            terms: self.request.terms.clone(),
            mode: Mode::Exclusive,
            runtime: self.runtime.clone(),
            deliver,
        }
    }

    /// When an outage becomes an error.
    fn gives_up_at(&self) -> Instant {
        let outage = self.began + self.request.terms.retry_for;
        match self.request.patience {
            Patience::Try => outage,
            Patience::Until(deadline) => outage.min(deadline),
        }
    }

    /// When a claim that is under way counts as unanswered.
    fn answer_limit(&self) -> Instant {
        self.gives_up_at().max(Instant::now()) + ROUND_TRIP
    }
}
