//! A grant as long as it is held: what its guard, the keeper and the releaser share.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;

use super::releaser::Job;
use super::slot::Waiter;
use super::{Engine, current_runtime, lock};
use crate::backend::{Backend, Claim, Grant, Validity};
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::fencing::FencingToken;
use crate::guard::{Held, LockGuard, Loss};
use crate::name::LockName;
use crate::options::Terms;
use crate::tenure::{LossListener, State, Tenure};

pub(crate) struct Holding<B: Backend> {
    pub(super) number: u64,
    engine: Weak<Engine<B>>,
    backend: &'static str,
    /// The name on the server.
    pub(super) name: LockName,
    /// The name that the user gave, without the provider's prefix.
    display_name: LockName,
    token: FencingToken,
    pub(super) hold: B::Hold,
    pub(super) terms: Terms,
    pub(super) tenure: Arc<Tenure>,
    granted_at: Instant,
    /// Where whoever has the guard lived when it was granted.
    pub(super) runtime: Handle,
    /// When the keeper has to do what.
    pub(super) timing: Mutex<Timing>,
}

/// What the keeper does about a holding, and when.
#[derive(Debug)]
pub(super) struct Timing {
    /// The key under which the keeper has it, if it has it.
    pub(super) scheduled: Option<Instant>,
    pub(super) renew_at: Instant,
    /// Renewals that have failed in a row.
    pub(super) failures: u32,
    /// After `max_hold`: when the TTL has run out and the lock is freed.
    pub(super) free_at: Option<Instant>,
    /// After a release before `hold_at_least`, where the server can't keep it by itself: until then it is renewed,
    /// then released.
    pub(super) keep_until: Option<Instant>,
    /// How long the server has promised that it stands, where the tenure doesn't say it any more.
    pub(super) stands_until: Instant,
}

impl Timing {
    pub(super) fn kept_deadline(&self) -> Option<Instant> {
        self.keep_until.map(|_| self.stands_until)
    }
}

impl<B: Backend> Holding<B> {
    pub(super) fn new(
        engine: &Arc<Engine<B>>,
        claim: &Claim,
        claimed_at: Instant,
        grant: Grant<B::Hold>,
        display_name: LockName,
        terms: Terms,
        runtime: Handle,
    ) -> Arc<Self> {
        let now = Instant::now();
        let third = terms.ttl / 3;
        let (deadline, session, renew_at) = match grant.validity {
            // Renewed when less than two thirds of its time are left.
            Validity::Until(until) => {
                let renew_at = if terms.auto_renew || grant.to_be_confirmed {
                    super::keeper::first_renewal(claimed_at, until, terms.ttl)
                } else {
                    Instant::NEVER
                };
                (until, None, renew_at)
            }
            // A session's heartbeat goes on in any case; without renewal this grant ends before its session does.
            Validity::Session(session) => {
                // The claim may have waited on the server for longer than that; the session has a deadline of its own.
                let own = if terms.auto_renew { Instant::NEVER } else { now + terms.ttl };
                (own, Some(session), now + third)
            }
        };
        let max_hold_at = terms.max_hold.map_or(Instant::NEVER, |limit| now + limit);
        let timing = Timing {
            scheduled: None,
            renew_at,
            failures: 0,
            free_at: None,
            keep_until: None,
            stands_until: deadline,
        };
        Arc::new_cyclic(|weak: &Weak<Self>| Self {
            number: engine.next_number(),
            engine: Arc::downgrade(engine),
            backend: engine.backend.name(),
            name: claim.name.clone(),
            display_name,
            token: grant.token,
            hold: grant.hold,
            tenure: Tenure::new(deadline, max_hold_at, session, weak.clone()),
            terms,
            runtime,
            granted_at: now,
            timing: Mutex::new(timing),
        })
    }

    pub(super) fn for_waiter(
        engine: &Arc<Engine<B>>,
        claim: &Claim,
        claimed_at: Instant,
        grant: Grant<B::Hold>,
        waiter: &Waiter,
    ) -> Arc<Self> {
        let (name, terms, runtime) = (&waiter.display_name, &waiter.terms, &waiter.runtime);
        Self::new(engine, claim, claimed_at, grant, name.clone(), terms.clone(), runtime.clone())
    }

    /// Puts it into the keeper's hands and a guard around it.
    pub(super) fn into_guard(self: Arc<Self>, engine: &Arc<Engine<B>>) -> LockGuard {
        // They may have gone with their runtime since the caller began.
        engine.keeper.ensure_running(engine, &self.runtime);
        engine.releaser.ensure_running(engine, &self.runtime);
        engine.keeper.add(&self);
        self.tenure.join_session();
        tracing::debug!(
            lock.name = %self.display_name.quoted(),
            lock.backend = self.backend,
            lock.token = self.token.get(),
            "granted"
        );
        LockGuard::new(self, engine.clone() as Arc<dyn Any + Send + Sync>)
    }

    pub(super) fn display_name(&self) -> &LockName {
        &self.display_name
    }

    /// Whether its time is up although nobody may have noticed.
    pub(super) fn is_overdue(&self) -> bool {
        self.overdue_at().has_passed()
    }

    /// When its time is up, as far as anybody but the keeper can tell: while it is kept for `hold_at_least`, never.
    pub(super) fn overdue_at(&self) -> Instant {
        let kept = lock(&self.timing).keep_until.is_some();
        if kept { Instant::NEVER } else { self.tenure.deadline() }
    }

    /// Whether the server has freed it by itself, if it frees anything.
    pub(super) fn is_past_ttl(&self) -> bool {
        self.tenure.deadline().has_passed()
    }

    /// Notices that its time is up, and frees it on the server.
    pub(super) fn expire(self: &Arc<Self>, engine: &Arc<Engine<B>>) {
        self.tenure.state();
        self.free_in_background(engine);
    }

    /// It is gone on the server: nothing is left to free, only the next waiter to serve.
    pub(super) fn leave(&self, engine: &Arc<Engine<B>>) {
        engine.keeper.remove(self);
        engine.queues.begin_freeing(&self.name);
        engine.releaser.push(engine, Job::Gone(self.name.clone()));
    }

    /// Frees it in the background unless somebody does or did.
    pub(super) fn free_in_background(self: &Arc<Self>, engine: &Arc<Engine<B>>) {
        if self.tenure.claim_cleanup() {
            engine.queues.begin_freeing(&self.name);
            engine.releaser.push(engine, Job::Release(self.clone()));
        }
    }

    /// How much of `hold_at_least` is left.
    pub(super) fn keep_for(&self) -> Duration {
        match self.tenure.state() {
            State::Released => self.terms.hold_at_least.saturating_sub(self.granted_at.elapsed()),
            State::Held | State::Lost(_) => Duration::ZERO,
        }
    }

    pub(super) fn describe(&self, error: Error, operation: &'static str) -> Error {
        error.during(operation, self.backend, Some(&self.display_name))
    }
}

impl<B: Backend> LossListener for Holding<B> {
    fn on_loss(self: Arc<Self>, loss: Loss) {
        tracing::warn!(
            lock.name = %self.display_name.quoted(),
            lock.backend = self.backend,
            lock.token = self.token.get(),
            loss = ?loss,
            "lock lost"
        );
        let Some(engine) = self.engine.upgrade() else { return };
        match loss {
            // The job may still be running: the keeper frees the lock when its TTL has run out.
            Loss::MaxHold => engine.keeper.after_max_hold(&self),
            // Ours is over, but the server may not know.
            Loss::Expired => self.free_in_background(&engine),
            // Nothing is left to free.
            Loss::Taken | Loss::SessionEnded | Loss::Closed => {
                if self.tenure.claim_cleanup() {
                    self.leave(&engine);
                }
            }
        }
    }
}

#[async_trait]
impl<B: Backend> Held for Holding<B> {
    fn name(&self) -> &str {
        self.display_name.as_str()
    }

    fn backend(&self) -> &'static str {
        self.backend
    }

    fn token(&self) -> FencingToken {
        self.token
    }

    fn tenure(&self) -> &Arc<Tenure> {
        &self.tenure
    }

    fn dropped(self: Arc<Self>) {
        self.tenure.release();
        // The guard keeps the engine alive until after this.
        if let Some(engine) = self.engine.upgrade() {
            self.free_in_background(&engine);
        }
    }

    async fn release(self: Arc<Self>) -> Result<()> {
        let state = self.tenure.release();
        let Some(engine) = self.engine.upgrade() else { return Ok(()) };
        if let State::Lost(loss) = state {
            self.free_in_background(&engine);
            return Err(self.describe(Error::lost(loss), "release"));
        }
        if let Err(error) = current_runtime() {
            self.free_in_background(&engine);
            return Err(self.describe(error, "release"));
        }
        if !self.tenure.claim_cleanup() {
            return Ok(());
        }
        engine.queues.begin_freeing(&self.name);
        engine.release_now(self.clone()).await.map_err(|error| self.describe(error, "release"))
    }
}

impl<B: Backend> fmt::Debug for Holding<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holding")
            .field("name", &self.name)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}
