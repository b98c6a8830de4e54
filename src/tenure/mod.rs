//! The state of one grant, shared by its guard, by those who await its loss, and by the engine that keeps it.

pub(crate) mod lifecycle;
pub(crate) mod session;

/// The atomics of [`lifecycle`], which its loom test replaces.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};
}

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use pin_project_lite::pin_project;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tokio::time::Sleep;

use self::lifecycle::Lifecycle;
pub(crate) use self::lifecycle::State;
use self::session::Session;
use crate::clock::Instant;
use crate::guard::Loss;

/// Who has to know when a grant is lost: the engine, to serve the next waiter. Called from any thread, also outside a
/// runtime, so it may neither block nor spawn.
pub(crate) trait LossListener: Send + Sync {
    fn on_loss(self: Arc<Self>, loss: Loss);
}

/// One grant's life.
pub(crate) struct Tenure {
    lifecycle: Lifecycle,
    /// When `max_hold` is over.
    limit: Instant,
    session: Option<Session>,
    ended: Arc<Notify>,
    listener: Weak<dyn LossListener>,
}

impl Tenure {
    /// A tenure that stands until `deadline`, which may be [`Instant::NEVER`], and as long as its session.
    pub(crate) fn new(
        deadline: Instant,
        limit: Instant,
        session: Option<Session>,
        listener: Weak<dyn LossListener>,
    ) -> Arc<Self> {
        Arc::new(Self {
            limit,
            lifecycle: Lifecycle::new(deadline.to_nanos()),
            session,
            ended: Arc::new(Notify::new()),
            listener,
        })
    }

    /// The session, so that the end of it reaches this tenure. Called once the listener can be reached.
    pub(crate) fn join_session(self: &Arc<Self>) {
        if let Some(session) = &self.session {
            session.join(self);
        }
    }

    pub(crate) fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// When it ends unless something is heard from the server until then.
    pub(crate) fn deadline(&self) -> Instant {
        let own = Instant::from_nanos(self.lifecycle.deadline());
        self.session.as_ref().map_or(own, |session| own.min(session.deadline()))
    }

    /// When it ends, by its deadline or by `max_hold`, unless something is heard from the server until then.
    pub(crate) fn ends_at(&self) -> Instant {
        self.deadline().min(self.limit)
    }

    /// Its state now, by the clock.
    pub(crate) fn state(&self) -> State {
        let now = Instant::now();
        if self.limit.has_passed_at(now) && self.limit < self.deadline() {
            self.lose(Loss::MaxHold);
        }
        if self.session.as_ref().is_some_and(|session| session.deadline().has_passed_at(now)) {
            self.lose(Loss::Expired);
        }
        self.heed(self.lifecycle.state(now.to_nanos()))
    }

    /// The server has promised that it stands until then. Says what state that found it in.
    pub(crate) fn extend(&self, until: Instant) -> State {
        self.heed(self.lifecycle.extend(until.to_nanos(), Instant::now().to_nanos()))
    }

    pub(crate) fn lose(&self, loss: Loss) -> State {
        self.heed(self.lifecycle.lose(loss))
    }

    /// Ends it by a release: [`State::Released`] if that was this call's doing or an earlier one's.
    pub(crate) fn release(&self) -> State {
        match self.state() {
            State::Held => self.heed(self.lifecycle.release(Instant::now().to_nanos())),
            ended => ended,
        }
    }

    /// True for exactly one caller: who frees the grant on the server.
    pub(crate) fn claim_cleanup(&self) -> bool {
        self.lifecycle.claim_cleanup()
    }

    /// Tells everybody of an end that has just come.
    fn heed(&self, (state, just_ended): (State, bool)) -> State {
        if just_ended {
            self.ended.notify_waiters();
            if let (State::Lost(loss), Some(listener)) = (state, self.listener.upgrade()) {
                listener.on_loss(loss);
            }
        }
        state
    }
}

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenure").field("lifecycle", &self.lifecycle).finish_non_exhaustive()
    }
}

pin_project! {
    /// Awaits the end of a tenure, by release or loss. It watches the deadline in the runtime that polls it, so that it
    /// doesn't depend on the keeper's runtime being alive; outside a runtime it only hears what it is told.
    pub(crate) struct Watch {
        tenure: Arc<Tenure>,
        #[pin]
        ended: OwnedNotified,
        #[pin]
        timer: Option<Timer>,
    }
}

pin_project! {
    struct Timer {
        at: Instant,
        runtime: tokio::runtime::Id,
        #[pin]
        sleep: Sleep,
    }
}

impl Watch {
    pub(crate) fn new(tenure: &Arc<Tenure>) -> Self {
        Self { tenure: tenure.clone(), ended: tenure.ended.clone().notified_owned(), timer: None }
    }
}

impl Future for Watch {
    type Output = State;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<State> {
        let mut this = self.project();
        loop {
            let state = this.tenure.state();
            if state != State::Held {
                return Poll::Ready(state);
            }
            if this.ended.as_mut().poll(cx).is_ready() {
                continue; // it ended after the look at its state
            }
            let deadline = this.tenure.ends_at();
            let Ok(runtime) = Handle::try_current() else { return Poll::Pending };
            if deadline == Instant::NEVER {
                return Poll::Pending;
            }
            // A timer dies with its runtime.
            let runtime = runtime.id();
            let fits = |timer: Pin<&mut Timer>| timer.at == deadline && timer.runtime == runtime;
            if !this.timer.as_mut().as_pin_mut().is_some_and(fits) {
                let sleep = tokio::time::sleep(deadline.remaining());
                this.timer.set(Some(Timer { at: deadline, runtime, sleep }));
            }
            let timer = this.timer.as_mut().as_pin_mut().expect("set above").project();
            if timer.sleep.poll(cx).is_pending() {
                return Poll::Pending;
            }
            this.timer.set(None);
        }
    }
}
