//! Keeps grants alive: one task that renews many in few requests, ends those whose time is up, and decides loss.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::{self, Handle};

use super::backoff::Backoff;
use super::holding::{Holding, Timing};
use super::worker::Worker;
use super::{Engine, lock};
use crate::backend::{Backend, Due, Renewal};
use crate::clock::Instant;
use crate::error::{Error, ErrorKind};
use crate::guard::Loss;
use crate::tenure::State;

/// What is due within this time travels in the same request.
const SLACK: Duration = Duration::from_millis(25);
/// How many renewals one request carries at most.
const BATCH: usize = 500;
/// A renewal is given at least so long to be answered.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);

pub(crate) struct Keeper<B: Backend> {
    schedule: Mutex<Schedule<B>>,
    worker: Arc<Worker>,
    /// Runtimes that were found dead since the task last ran.
    dead: Mutex<Vec<runtime::Id>>,
}

struct Schedule<B: Backend> {
    holdings: BTreeMap<(Instant, u64), Arc<Holding<B>>>,
    /// When the task will look again if nobody wakes it.
    looks_at: Instant,
}

impl<B: Backend> Keeper<B> {
    pub(crate) fn new() -> Self {
        let schedule = Schedule { holdings: BTreeMap::new(), looks_at: Instant::NEVER };
        Self { schedule: Mutex::new(schedule), worker: Arc::default(), dead: Mutex::default() }
    }

    pub(super) fn ensure_running(&self, engine: &Arc<Engine<B>>, runtime: &Handle) {
        if self.worker.is_running() {
            return; // on the way of every acquire
        }
        let (weak, worker) = (Arc::downgrade(engine), self.worker.clone());
        let task = move || async move {
            if let Some(engine) = weak.upgrade() {
                lock(&engine.keeper.dead).clear();
            }
            while let Some(engine) = weak.upgrade() {
                let next = engine.keeper.look(&engine);
                drop(engine);
                if next == Instant::NEVER {
                    worker.woken().await;
                } else {
                    let _ = tokio::time::timeout(next.remaining(), worker.woken()).await; // either will do
                }
            }
        };
        let (ending, id) = (Arc::downgrade(engine), runtime.id());
        let on_end = move || {
            if let Some(engine) = ending.upgrade() {
                let keeper = &engine.keeper;
                keeper.move_on(&keeper.worker, id, |runtime| keeper.ensure_running(&engine, runtime));
            }
        };
        self.worker.ensure_running(runtime, task, on_end);
    }

    /// A worker's runtime is gone: it goes on where somebody still holds something. Elsewhere the next use of the
    /// provider starts it.
    pub(super) fn move_on(&self, worker: &Worker, from: runtime::Id, start: impl Fn(&Handle)) {
        lock(&self.dead).push(from);
        for holding in self.live() {
            if worker.is_running() {
                return;
            }
            // A runtime that is gone, too, drops the task at once, which brings us here again.
            if !lock(&self.dead).contains(&holding.runtime.id()) {
                start(&holding.runtime);
            }
        }
    }

    pub(super) fn stop(&self) {
        self.worker.wake();
    }

    pub(super) fn add(&self, holding: &Arc<Holding<B>>) {
        let mut schedule = lock(&self.schedule);
        let mut timing = lock(&holding.timing);
        self.insert(&mut schedule, holding, &mut timing);
    }

    pub(super) fn remove(&self, holding: &Holding<B>) {
        let removed = {
            let mut schedule = lock(&self.schedule);
            let scheduled = lock(&holding.timing).scheduled.take();
            scheduled.and_then(|at| schedule.holdings.remove(&(at, holding.number)))
        };
        drop(removed);
    }

    /// Everything that is held, or kept for `hold_at_least`.
    pub(super) fn live(&self) -> Vec<Arc<Holding<B>>> {
        lock(&self.schedule).holdings.values().cloned().collect()
    }

    /// Whether a lock is kept for `hold_at_least` after its release.
    pub(super) fn keeps_any(&self) -> bool {
        lock(&self.schedule).holdings.values().any(|holding| lock(&holding.timing).keep_until.is_some())
    }

    /// Notes that a released grant is kept until then. From here on it doesn't count as overdue.
    pub(super) fn mark_kept(holding: &Holding<B>, until: Instant) {
        let deadline = holding.tenure.deadline();
        let mut timing = lock(&holding.timing);
        timing.keep_until = Some(until);
        timing.stands_until = deadline;
    }

    /// Renews a released grant until the time that [`mark_kept`](Self::mark_kept) noted, and only then frees it.
    pub(super) fn keep(&self, holding: &Arc<Holding<B>>) {
        self.remove(holding);
        self.add(holding);
    }

    /// The job has taken too long: renewal stops, and the lock is freed when its TTL has run out.
    pub(super) fn after_max_hold(&self, holding: &Holding<B>) {
        let deadline = holding.tenure.deadline();
        self.change(holding, |timing| {
            timing.renew_at = Instant::NEVER;
            timing.free_at = Some(deadline.min(Instant::now() + holding.terms.ttl));
        });
    }

    /// Changes when what is due for a holding that the keeper has, and lets it look again if it has become earlier.
    fn change(&self, holding: &Holding<B>, change: impl FnOnce(&mut Timing)) {
        let mut schedule = lock(&self.schedule);
        let mut timing = lock(&holding.timing);
        change(&mut timing);
        if let Some(at) = timing.scheduled
            && let Some(holding) = schedule.holdings.remove(&(at, holding.number))
        {
            self.insert(&mut schedule, &holding, &mut timing);
        }
    }

    fn insert(&self, schedule: &mut Schedule<B>, holding: &Arc<Holding<B>>, timing: &mut Timing) {
        let ends = timing.keep_until.or(timing.free_at).unwrap_or_else(|| holding.tenure.ends_at());
        let at = timing.renew_at.min(ends);
        timing.scheduled = Some(at);
        schedule.holdings.insert((at, holding.number), holding.clone());
        if at < schedule.looks_at {
            schedule.looks_at = at;
            self.worker.wake();
        }
    }

    /// Does what is due; says when to look again.
    fn look(&self, engine: &Arc<Engine<B>>) -> Instant {
        let now = Instant::now();
        let due = {
            let mut schedule = lock(&self.schedule);
            let later = schedule.holdings.split_off(&(now + SLACK, 0));
            std::mem::replace(&mut schedule.holdings, later)
        };
        let mut renewals = Vec::new();
        for holding in due.into_values() {
            if self.tend(engine, &holding, now) {
                renewals.push(holding);
            }
        }
        // Requests of very different length would share the fate of the shortest.
        let mut renewals: Vec<_> = renewals.into_iter().map(|holding| (timeout(&holding), holding)).collect();
        renewals.sort_by_key(|&(timeout, _)| timeout);
        for batch in renewals.chunk_by(|a, b| b.0 <= a.0 * 2).flat_map(|like| like.chunks(BATCH)) {
            let batch = batch.iter().map(|(_, holding)| holding.clone()).collect();
            tokio::spawn(renew(engine.clone(), batch));
        }
        let mut schedule = lock(&self.schedule);
        // It looks as early as it meant to, also if what was to come then has been released: or each of many short
        // holds would wake it.
        let meant_to = Some(schedule.looks_at).filter(|at| !at.has_passed_at(now));
        let first = schedule.holdings.keys().next().map(|&(at, _)| at);
        schedule.looks_at = first.into_iter().chain(meant_to).min().unwrap_or(Instant::NEVER);
        schedule.looks_at
    }

    /// Does what is due for one holding that has been taken out of the schedule, and puts it back where it has to be
    /// looked at again. True: renew it.
    fn tend(&self, engine: &Arc<Engine<B>>, holding: &Arc<Holding<B>>, now: Instant) -> bool {
        // Noticing an end here tells everybody; taking the holding out again is harmless.
        let state = holding.tenure.state();
        let (renew, over) = {
            let mut schedule = lock(&self.schedule);
            let mut timing = lock(&holding.timing);
            if timing.scheduled.take().is_none() {
                return false; // removed in the meantime
            }
            let over = match (state, timing.keep_until) {
                (State::Released, Some(until)) => until.has_passed_at(now),
                (State::Lost(Loss::MaxHold), _) => timing.free_at.is_some_and(|at| at.has_passed_at(now)),
                (State::Held, _) => false,
                (State::Released | State::Lost(_), _) => return false,
            };
            let mut renew = !over && timing.renew_at.has_passed_at(now + slack(holding));
            if renew {
                (renew, timing.renew_at) = next_renewal(holding, now, timing.kept_deadline());
            }
            if !over {
                self.insert(&mut schedule, holding, &mut timing);
            }
            (renew, over)
        };
        if over {
            lock(&holding.timing).keep_until = None;
            // A kept grant's cleanup belongs to its release, which left it to the keeper.
            engine.free_kept_or_lost(holding);
        }
        renew
    }

    /// What a renewal came to.
    fn heed(&self, engine: &Arc<Engine<B>>, holding: &Arc<Holding<B>>, sent: Instant, renewal: Renewal) {
        let tenure = &holding.tenure;
        let third = holding.terms.ttl / 3;
        match renewal {
            Renewal::Until(until) => {
                let renew_at = if let Some(session) = tenure.session() {
                    session.extend(until);
                    sent + third
                } else {
                    tenure.extend(until);
                    first_renewal(sent, until, holding.terms.ttl)
                };
                // Without renewal it was the confirmation of a grant that had been handed over, and the last one.
                self.change(holding, |timing| {
                    let once = !holding.terms.auto_renew && tenure.session().is_none();
                    timing.failures = 0;
                    timing.stands_until = timing.stands_until.max(until);
                    if once {
                        timing.renew_at = Instant::NEVER;
                    } else if timing.renew_at != Instant::NEVER {
                        timing.renew_at = renew_at;
                    }
                });
            }
            Renewal::Lost(loss) => {
                if let Some(session) = tenure.session().filter(|_| loss == Loss::SessionEnded) {
                    session.end(loss);
                }
                tenure.lose(loss);
                if lock(&holding.timing).keep_until.take().is_some() {
                    // Released, and nothing is left to keep.
                    holding.leave(engine);
                }
            }
            Renewal::Failed(error) => {
                let what = holding.display_name().quoted();
                let (token, backend) = (crate::guard::Held::token(&**holding).get(), engine.backend.name());
                // The first one is news.
                if lock(&holding.timing).failures == 0 {
                    tracing::warn!(lock.name = %what, lock.backend = backend, lock.token = token, %error,
                        "renewal failed: the old deadline stands");
                } else {
                    tracing::debug!(lock.name = %what, lock.backend = backend, lock.token = token, %error,
                        "renewal failed again");
                }
                let delay = retry_delay(holding);
                let at = Instant::now() + delay;
                if let Some(session) = tenure.session() {
                    session.beat_again_at(at);
                }
                self.change(holding, |timing| {
                    timing.failures = timing.failures.saturating_add(1);
                    if timing.renew_at != Instant::NEVER {
                        timing.renew_at = at;
                    }
                });
            }
        }
    }
}

/// Whether to renew this one now, and when its renewal is due next. While a request is under way that is when the
/// request will have failed.
fn next_renewal<B: Backend>(holding: &Holding<B>, now: Instant, kept: Option<Instant>) -> (bool, Instant) {
    let retry_at = now + timeout_of(holding, kept) + SHORTEST_TIMEOUT;
    let beat_by = now + slack(holding);
    match holding.tenure.session().map(|session| session.take_beat(beat_by, holding.terms.ttl / 3)) {
        Some(Err(another_beats_at)) => (false, another_beats_at),
        Some(Ok(())) | None => (true, retry_at),
    }
}

/// How long a renewal may take: so that at least one more fits in before the deadline.
fn timeout<B: Backend>(holding: &Holding<B>) -> Duration {
    let kept = lock(&holding.timing).kept_deadline();
    timeout_of(holding, kept)
}

fn timeout_of<B: Backend>(holding: &Holding<B>, kept: Option<Instant>) -> Duration {
    // A released tenure's own deadline doesn't move any more.
    let left = kept.unwrap_or_else(|| holding.tenure.deadline()).remaining().min(holding.terms.ttl);
    (left / 2).max(SHORTEST_TIMEOUT)
}

/// What is due within this time travels in the same request: little against the time between two renewals.
fn slack<B: Backend>(holding: &Holding<B>) -> Duration {
    SLACK.min(holding.terms.ttl / 12)
}

/// When less than two thirds of what the server gave are left; that may be less than the TTL.
pub(super) fn first_renewal(sent: Instant, until: Instant, ttl: Duration) -> Instant {
    until.before(until.since(sent).min(ttl) / 3 * 2)
}

/// How long to wait after a failed renewal: several more tries must fit in before the deadline.
fn retry_delay<B: Backend>(holding: &Holding<B>) -> Duration {
    let failures = lock(&holding.timing).failures;
    Backoff::new(holding.terms.ttl / 50, holding.terms.ttl / 8).after(failures.min(8)).next()
}

/// Renews a batch of grants in one request, which counts as failed when it isn't answered in time.
async fn renew<B: Backend>(engine: Arc<Engine<B>>, batch: Vec<Arc<Holding<B>>>) {
    let limit = batch.iter().map(|holding| timeout(holding)).min().unwrap_or(SHORTEST_TIMEOUT);
    let sent = Instant::now();
    let mut renewals = {
        let due: Vec<_> =
            batch.iter().map(|holding| Due { hold: &holding.hold, ttl: holding.terms.ttl }).collect();
        tokio::time::timeout(limit, engine.backend.renew(&due)).await.unwrap_or_default().into_iter()
    };
    for holding in batch {
        let renewal = renewals.next().unwrap_or_else(|| {
            let error = Error::new(ErrorKind::Unavailable, "the renewal has not been answered");
            Renewal::Failed(holding.describe(error, "renew"))
        });
        engine.keeper.heed(&engine, &holding, sent, renewal);
    }
}
