//! Brings grants back: of guards that were dropped or released, of claims that were broken off, of holders that are lost.
//!
//! What is to be done is in a queue that outlives any runtime. Whoever does it may be dropped at any await: then what
//! is left of it goes back into the queue.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::acquire::ROUND_TRIP;
use super::backoff::Backoff;
use super::holding::Holding;
use super::keeper::Keeper;
use super::request::answered;
use super::slot::Next;
use super::worker::Worker;
use super::{Engine, lock};
use crate::backend::{Backend, Claim, Released};
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Loss;
use crate::name::LockName;
use crate::tenure::State;

/// How many releases are under way at once.
const CONCURRENT: usize = 256;
/// A request that isn't answered is given up for another after this part of the TTL.
const PATIENCE: u32 = 4;

/// Something to bring back. The name's slot is `Freeing` until it is done.
pub(crate) enum Job<B: Backend> {
    Release(Arc<Holding<B>>),
    /// A transfer from the holding to the claim whose outcome nobody knows: the one is released, then the other abandoned.
    Split(Arc<Holding<B>>, Claim),
    /// A claim that may have been granted, or queued on the server.
    Abandon(Claim),
    /// A grant that is gone already: only the next waiter has to be served.
    Gone(LockName),
}

pub(crate) struct Releaser<B: Backend> {
    queue: Mutex<Queue<B>>,
    worker: Arc<Worker>,
}

struct Queue<B: Backend> {
    jobs: VecDeque<Job<B>>,
    /// Jobs that the worker has taken.
    running: usize,
    /// Keeps the engine alive while the worker has something to do. Not set while no worker runs, or the queue would
    /// keep its own owner alive for ever.
    anchor: Option<Arc<Engine<B>>>,
}

impl<B: Backend> Releaser<B> {
    pub(crate) fn new() -> Self {
        let queue = Queue { jobs: VecDeque::new(), running: 0, anchor: None };
        Self { queue: Mutex::new(queue), worker: Arc::default() }
    }

    pub(super) fn ensure_running(&self, engine: &Arc<Engine<B>>, runtime: &Handle) {
        if self.worker.is_running() {
            return; // on the way of every acquire
        }
        let (worker, id) = (self.worker.clone(), runtime.id());
        let (weak, ending) = (Arc::downgrade(engine), Arc::downgrade(engine));
        let task = move || async move {
            let mut running = JoinSet::new();
            loop {
                let Some(engine) = weak.upgrade() else { return };
                while running.len() < CONCURRENT {
                    let Some(job) = engine.releaser.take() else { break };
                    running.spawn(carry_out(engine.clone(), job));
                }
                drop(engine);
                tokio::select! {
                    () = worker.woken() => {}
                    Some(_) = running.join_next() => {}
                }
            }
        };
        let on_end = move || {
            // Jobs that were running have put themselves back; somebody who still lives has to start a new worker.
            if let Some(engine) = ending.upgrade() {
                let anchor = {
                    let mut queue = lock(&engine.releaser.queue);
                    // Unless there is a new worker by now, which needs it.
                    if engine.releaser.worker.is_running() { None } else { queue.anchor.take() }
                };
                engine.queues.start_again();
                engine.queues.notify_settled();
                let releaser = &engine.releaser;
                let start = |runtime: &Handle| releaser.ensure_running(&engine, runtime);
                engine.keeper.move_on(&releaser.worker, id, start);
                drop(anchor);
            }
        };
        self.worker.ensure_running(runtime, task, on_end);
    }

    pub(super) fn stop(&self) {
        self.worker.wake();
    }

    /// Queues a job. Never blocks or spawns; works outside a runtime and when there is none any more.
    pub(super) fn push(&self, engine: &Arc<Engine<B>>, job: Job<B>) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if self.worker.is_running() {
            queue.anchor.get_or_insert_with(|| engine.clone());
        }
        drop(queue);
        self.worker.wake();
    }

    /// Does on `runtime` what the worker hasn't come to: its runtime may be alive and yet not be polled. For callers who
    /// would have to wait for it.
    pub(super) fn help(&self, engine: &Arc<Engine<B>>, runtime: &Handle) {
        if lock(&self.queue).jobs.is_empty() {
            return;
        }
        for job in std::iter::from_fn(|| self.take()).take(CONCURRENT) {
            runtime.spawn(carry_out(engine.clone(), job));
        }
    }

    fn take(&self) -> Option<Job<B>> {
        let mut queue = lock(&self.queue);
        let job = queue.jobs.pop_front();
        if job.is_some() {
            queue.running += 1;
        } else {
            queue.anchor = None; // not the last of it: the caller has the engine
        }
        job
    }

    pub(super) fn is_idle(&self) -> bool {
        let queue = lock(&self.queue);
        queue.jobs.is_empty() && queue.running == 0
    }
}

/// Does one job to its end.
fn carry_out<B: Backend>(engine: Arc<Engine<B>>, job: Job<B>) -> impl Future<Output = ()> + Send {
    // Made here, not at the first poll: the runtime may drop the task before that.
    let mut taken = Taken { engine, job: Some(job) };
    async move {
        let job = taken.job.take().expect("taken once");
        let engine = taken.engine.clone();
        do_job(engine, job).await;
    }
}

/// A job that the worker has taken. Dropped before its first poll, it goes back into the queue.
struct Taken<B: Backend> {
    engine: Arc<Engine<B>>,
    job: Option<Job<B>>,
}

impl<B: Backend> Drop for Taken<B> {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            self.engine.releaser.push(&self.engine, job);
        }
        lock(&self.engine.releaser.queue).running -= 1;
        self.engine.queues.notify_settled();
    }
}

async fn do_job<B: Backend>(engine: Arc<Engine<B>>, job: Job<B>) {
    match job {
        Job::Release(holding) => {
            if let Err(error) = engine.release(holding.clone(), None).await
                && error.kind() != ErrorKind::Lost
            {
                tracing::warn!(
                    lock.name = %holding.display_name().quoted(),
                    error = %holding.describe(error, "release"),
                    "release failed: the ttl frees the lock"
                );
            }
        }
        Job::Split(holding, claim) => engine.split(holding, claim).await,
        Job::Abandon(claim) => engine.abandon(claim).await,
        Job::Gone(name) => engine.serve(engine.queues.end_freeing(&name), &name),
    }
}

/// A job under way in some future. Dropped before it is done, it goes back into the queue.
struct UnderWay<'a, B: Backend> {
    engine: &'a Arc<Engine<B>>,
    job: Option<Job<B>>,
}

impl<'a, B: Backend> UnderWay<'a, B> {
    fn new(engine: &'a Arc<Engine<B>>, job: Job<B>) -> Self {
        Self { engine, job: Some(job) }
    }

    fn done(mut self) {
        self.job = None;
    }
}

impl<B: Backend> Drop for UnderWay<'_, B> {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            self.engine.releaser.push(self.engine, job);
        }
    }
}

impl<B: Backend> Engine<B> {
    /// Releases for a caller who waits. What can't be done within `retry_for` is done in the background.
    pub(super) async fn release_now(self: &Arc<Self>, holding: Arc<Holding<B>>) -> Result<()> {
        let limit = Instant::now() + holding.terms.retry_for;
        match self.release(holding, Some(limit)).await? {
            Released::Yes => Ok(()),
            Released::NotHeld => Err(Error::lost(Loss::Taken)),
        }
    }

    /// Frees a holding whose slot is `Freeing`: hands it to the next local waiter, or has the server free it, now or when
    /// `hold_at_least` is over. With a `limit`, leaves it to the background from then on.
    async fn release(self: &Arc<Self>, holding: Arc<Holding<B>>, limit: Option<Instant>) -> Result<Released> {
        let keep_for = holding.keep_for();
        if !keep_for.is_zero() && !self.capabilities.keeps_after_exit {
            let until = Instant::now() + keep_for;
            Keeper::mark_kept(&holding, until);
            self.queues.keep(&holding); // before the keeper can free it again
            self.keeper.keep(&holding);
            return Ok(Released::Yes);
        }
        self.keeper.remove(&holding);
        if keep_for.is_zero() && holding.tenure.state() == State::Released {
            match self.hand_over(&holding).await {
                HandOver::Done => return Ok(Released::Yes),
                HandOver::Not => {}
                HandOver::Unknown(claim) => return self.take_back(holding, claim, limit).await,
            }
        }
        let under_way = UnderWay::new(self, Job::Release(holding.clone()));
        let released = self.release_on_server(&holding, limit, false).await;
        if limit.is_some() && released.as_ref().is_err_and(Error::is_retryable) && !holding.is_past_ttl() {
            return released; // the rest in the background
        }
        under_way.done();
        self.serve(self.queues.end_freeing(&holding.name), &holding.name);
        released
    }

    /// After a transfer whose outcome nobody knows: the release counts, the rest is done in the background.
    async fn take_back(
        self: &Arc<Self>,
        holding: Arc<Holding<B>>,
        claim: Claim,
        limit: Option<Instant>,
    ) -> Result<Released> {
        let mut under_way = UnderWay::new(self, Job::Split(holding.clone(), claim.clone()));
        let released = self.release_on_server(&holding, limit, true).await;
        if released.is_ok() || holding.is_past_ttl() {
            under_way.job = Some(Job::Abandon(claim));
        }
        released // dropping the job queues it
    }

    /// Hands a holding over to the next local waiter in one step.
    async fn hand_over(self: &Arc<Self>, holding: &Arc<Holding<B>>) -> HandOver {
        let Some((ttl, mode)) = self.queues.transfer_candidate(&holding.name) else { return HandOver::Not };
        let Ok(claim) = Claim::new(holding.name.clone(), mode, ttl) else { return HandOver::Not };
        let under_way = UnderWay::new(self, Job::Split(holding.clone(), claim.clone()));
        let claimed_at = Instant::now();
        let patience = holding.terms.ttl / PATIENCE;
        match answered(patience, self.backend.transfer(&holding.hold, &claim)).await {
            Ok(Some(grant)) => {
                under_way.done();
                self.deliver(&claim, claimed_at, grant);
                HandOver::Done
            }
            Ok(None) => {
                under_way.done();
                HandOver::Not
            }
            Err(error) => {
                tracing::debug!(%error, "a transfer failed: both sides of it are being released");
                under_way.done();
                HandOver::Unknown(claim)
            }
        }
    }

    /// Asks the server until it has answered, the limit is reached, or the TTL has freed the lock anyway.
    async fn release_on_server(
        &self,
        holding: &Holding<B>,
        limit: Option<Instant>,
        mut ambiguous: bool,
    ) -> Result<Released> {
        let began = Instant::now();
        let mut backoff = Backoff::between_retries();
        // What has run out the server frees by itself: it is told so once.
        let time = if holding.is_past_ttl() { Duration::ZERO } else { holding.terms.ttl };
        let limit = limit.unwrap_or(Instant::NEVER).min(Instant::now() + time);
        loop {
            // Without any retry a request still takes a round trip.
            let patience = limit.remaining().max(ROUND_TRIP).min(holding.terms.ttl / PATIENCE);
            let keep_for = holding.keep_for(); // less of it is left each time
            let error = match answered(patience, self.backend.release(&holding.hold, keep_for)).await {
                Ok(Released::NotHeld) if ambiguous => return Ok(Released::Yes),
                Ok(released) => return Ok(released),
                Err(error) => error,
            };
            if error.is_retryable() {
                self.queues.fail(&holding.name, began, &error); // those who wait behind it
            }
            ambiguous |= error.kind() == ErrorKind::Unknown;
            let delay = backoff.next();
            if !error.is_retryable() || (Instant::now() + delay) >= limit {
                return Err(error);
            }
            tokio::time::sleep(delay).await;
        }
    }

    /// Clears up after a transfer whose outcome nobody knows.
    async fn split(self: &Arc<Self>, holding: Arc<Holding<B>>, claim: Claim) {
        let under_way = UnderWay::new(self, Job::Split(holding.clone(), claim.clone()));
        if let Err(error) = self.release_on_server(&holding, None, true).await {
            tracing::warn!(lock.name = %holding.display_name().quoted(), %error, "release after a failed transfer failed");
        }
        under_way.done();
        self.abandon(claim).await;
    }

    /// Abandons a claim whose slot is `Freeing`, until the server has confirmed it or the TTL has freed the lock anyway.
    async fn abandon(self: &Arc<Self>, claim: Claim) {
        let under_way = UnderWay::new(self, Job::Abandon(claim.clone()));
        let mut backoff = Backoff::between_retries();
        let began = Instant::now();
        let limit = began + claim.ttl;
        loop {
            let patience = limit.remaining().min(claim.ttl / PATIENCE);
            let error = match answered(patience, self.backend.abandon(&claim)).await {
                Ok(()) => break,
                Err(error) => error,
            };
            if error.is_retryable() {
                self.queues.fail(&claim.name, began, &error);
            }
            let delay = backoff.next();
            if (Instant::now() + delay) >= limit {
                tracing::warn!(
                    lock.name = %claim.name.quoted(),
                    lock.backend = self.backend.name(),
                    %error,
                    "a broken-off claim could not be taken back: the ttl frees the lock"
                );
                break;
            }
            tokio::time::sleep(delay).await;
        }
        under_way.done();
        self.serve(self.queues.end_freeing(&claim.name), &claim.name);
    }

    /// What a keeper does when `hold_at_least` is over, or the TTL after `max_hold`.
    pub(super) fn free_kept_or_lost(self: &Arc<Self>, holding: &Arc<Holding<B>>) {
        if holding.tenure.state() == State::Released {
            self.queues.begin_freeing(&holding.name);
            self.releaser.push(self, Job::Release(holding.clone()));
        } else {
            holding.free_in_background(self);
        }
    }

    /// Serves the next waiter if that is what a change of the slot asks for.
    pub(super) fn serve(self: &Arc<Self>, next: Next, name: &LockName) {
        if let Next::Drive(runtime, stop) = next {
            runtime.spawn(super::driver::drive(self.clone(), name.clone(), stop));
        }
    }
}

enum HandOver {
    Done,
    /// It still stands, and has to be released.
    Not,
    Unknown(Claim),
}
