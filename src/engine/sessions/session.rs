//! [`LockSession`]: a connection, how long it stands, and who uses it.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, OnceCell};

use super::{Connection, ENDED, Ended};
use crate::backend::{Instant, Session};
use crate::engine::lock;
use crate::engine::worker::OnDrop;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Loss;

/// A session on which nothing has been answered for so long gets no new claims.
pub(super) const DOUBT_AFTER: Duration = Duration::from_secs(2);

/// How often the server is asked what it does for a session on which a claim waits, or which is silent.
const LOOK_AT_WAITS: Duration = Duration::from_secs(5);
const LOOK_AT_SILENCE: Duration = Duration::from_secs(1);

/// How long a session without a use is kept open.
const IDLE_FOR: Duration = Duration::from_secs(30);

pub(super) struct LockSession<C> {
    pub(super) connection: C,
    /// Which serves the connection.
    pub(super) runtime: Handle,
    state: Mutex<State>,
    /// Notified when there may be another duty for the warden.
    pub(super) changed: Arc<Notify>,
    cancelled: Notify,
    /// That nothing of it is left on the server, once it has ended here.
    pub(super) terminated: OnceCell<()>,
}

struct State {
    ttl: Duration,
    /// What the grants made now live and die with.
    stands: Session,
    /// While a claim blocks nothing is answered, and nothing can be lost.
    blocked: bool,
    /// Holds, claims and others because of which it must not be closed.
    users: usize,
    idle_since: Instant,
    ended: Option<Ended>,
    /// Requests that are not answered yet.
    unanswered: usize,
    /// Since when there have been some, and no answers.
    silent_since: Instant,
    /// When the server was last asked what it does for it.
    looked_at: Instant,
    /// Requests over other connections to cancel what is done here, which may still arrive.
    cancels: usize,
}

/// What a session's warden has to do next.
pub(super) enum Duty {
    /// Nothing before then, or before the session changes.
    Look(Instant),
    Beat,
    /// It is silent: ask the server over another one.
    Doubt,
    /// Nobody needs it any more.
    Close,
    /// The server has not answered for a TTL.
    BreakOff,
    Over,
}

impl State {
    fn is_silent(&self) -> bool {
        self.unanswered > 0 && !self.blocked && self.silent_since.elapsed() >= DOUBT_AFTER
    }
}

impl<C: Connection> LockSession<C> {
    /// The server was last heard from after a request that was sent at `sent`.
    pub(super) fn new(connection: C, ttl: Duration, sent: Instant) -> Arc<Self> {
        let state = State {
            ttl,
            stands: Session::until(sent + ttl),
            blocked: false,
            users: 0,
            idle_since: Instant::now(),
            ended: None,
            unanswered: 0,
            silent_since: Instant::NEVER,
            looked_at: Instant::now(),
            cancels: 0,
        };
        Arc::new(Self {
            connection,
            runtime: Handle::current(),
            state: Mutex::new(state),
            changed: Arc::default(),
            cancelled: Notify::new(),
            terminated: OnceCell::new(),
        })
    }

    pub(super) fn ttl(&self) -> Duration {
        lock(&self.state).ttl
    }

    /// What grants on it live and die with.
    pub(super) fn stands(&self) -> Session {
        lock(&self.state).stands.clone()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<Ended> {
        lock(&self.state).ended
    }

    /// Uses it, unless it has ended or is in doubt.
    pub(super) fn enter(self: &Arc<Self>) -> Option<User<C>> {
        if let Some(ended) = self.connection.is_over() {
            self.end(ended, ENDED);
        }
        let mut state = lock(&self.state);
        let is_over = !state.blocked && state.stands.deadline().has_passed();
        if state.ended.is_some() || state.is_silent() || is_over {
            return None;
        }
        state.users += 1;
        drop(state);
        Some(User(self.clone()))
    }

    /// Sends a request, of one round trip, and heeds what its answer says about the session.
    pub(super) async fn request<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let sent = Instant::now();
        self.check()?;
        {
            let mut state = lock(&self.state);
            if state.unanswered == 0 {
                state.silent_since = sent;
            }
            state.unanswered += 1;
        }
        let asked = OnDrop(Some(|| lock(&self.state).unanswered -= 1));
        let answer = request.await;
        drop(asked);
        if !self.goes_on(&answer) {
            return answer;
        }
        let mut state = lock(&self.state);
        state.silent_since = Instant::now();
        if !state.blocked {
            let until = sent + state.ttl;
            state.stands.extend(until);
        }
        answer
    }

    /// Does something over it that may take several round trips, or none: that says nothing about how long it stands.
    pub(super) async fn errand<T>(&self, errand: impl Future<Output = Result<T>>) -> Result<T> {
        self.check()?;
        let answer = errand.await;
        self.goes_on(&answer);
        answer
    }

    /// That it hasn't ended.
    fn check(&self) -> Result<()> {
        if let Some(ended) = self.connection.is_over() {
            self.end(ended, ENDED);
        }
        match self.ended() {
            Some(_) => Err(Error::new(ErrorKind::Unavailable, "the session has ended")),
            None => Ok(()),
        }
    }

    /// Whether it does after this answer.
    fn goes_on<T>(&self, answer: &Result<T>) -> bool {
        if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unknown) {
            self.break_off();
            return false;
        }
        if let Some(ended) = self.connection.is_over().filter(|_| answer.is_err()) {
            self.end(ended, ENDED);
            return false;
        }
        true
    }

    /// For how long nothing has been answered, if something is to be.
    pub(super) fn silence(&self) -> Option<Duration> {
        let state = lock(&self.state);
        (state.unanswered > 0).then(|| state.silent_since.elapsed())
    }

    /// Whether it hasn't answered for so long that it may be served by a runtime which isn't polled.
    pub(super) fn is_silent(&self) -> bool {
        lock(&self.state).is_silent()
    }

    /// Somebody is about to send a request to cancel what is done here. It can't arrive any more once what is returned is
    /// dropped.
    pub(super) fn cancel_begins(self: &Arc<Self>) -> OnDrop<impl FnOnce() + use<C>> {
        lock(&self.state).cancels += 1;
        let session = self.clone();
        OnDrop(Some(move || {
            lock(&session.state).cancels -= 1;
            session.cancelled.notify_waiters();
        }))
    }

    /// Resolves once no such request can arrive any more.
    pub(super) async fn cancels_over(&self) {
        loop {
            let mut cancelled = std::pin::pin!(self.cancelled.notified());
            cancelled.as_mut().enable();
            if lock(&self.state).cancels == 0 {
                return;
            }
            cancelled.await;
        }
    }

    /// It is given another TTL, while nothing is held.
    pub(super) async fn set_ttl(&self, ttl: Duration) -> Result<()> {
        if self.ttl() == ttl {
            return Ok(());
        }
        let sent = Instant::now();
        self.request(self.connection.set_ttl(ttl)).await?;
        self.stand_anew(sent, ttl);
        Ok(())
    }

    /// A claim blocks from now on, until [`stand_anew`](Self::stand_anew).
    pub(super) fn block(&self) {
        let mut state = lock(&self.state);
        (state.blocked, state.looked_at) = (true, Instant::now());
    }

    /// What is granted from now on stands as long as the server promised in its answer to a request sent then.
    pub(super) fn stand_anew(&self, sent: Instant, ttl: Duration) {
        let mut state = lock(&self.state);
        state.ttl = ttl;
        state.blocked = false;
        if state.ended.is_none() {
            state.stands = Session::until(sent + ttl);
        }
    }

    /// It can't be used any more: all guards on it are lost, and the connection is closed.
    pub(super) fn break_off(&self) {
        self.end(Ended::Somehow, ENDED);
        self.connection.break_off();
    }

    /// It has ended. What is known first counts.
    pub(super) fn end(&self, ended: Ended, loss: Loss) {
        let stands = {
            let mut state = lock(&self.state);
            if state.ended == Some(Ended::ByServer) || (state.ended.is_some() && ended == Ended::Somehow) {
                return;
            }
            state.ended = Some(ended);
            state.stands.clone()
        };
        stands.end(loss);
        self.changed.notify_one();
    }

    /// Closes it if nobody uses it.
    pub(super) fn end_if_unused(&self, loss: Loss) -> bool {
        let mut state = lock(&self.state);
        if state.users > 0 || state.ended.is_some() {
            return false;
        }
        state.ended = Some(Ended::ByServer); // or at once will have been
        let stands = state.stands.clone();
        drop(state);
        stands.end(loss);
        self.changed.notify_one();
        true
    }

    pub(super) fn duty(&self) -> Duty {
        let state = lock(&self.state);
        let (deadline, now) = (state.stands.deadline(), Instant::now());
        if state.ended.is_some() {
            return Duty::Over;
        }
        // Uses come and go without a word to the warden, which would cost each of them a change of thread.
        let soon = now + LOOK_AT_SILENCE.min(state.ttl / 4);
        if state.blocked {
            let look_at = state.looked_at + LOOK_AT_WAITS;
            return if look_at.has_passed_at(now) { Duty::Doubt } else { Duty::Look(look_at.min(soon)) };
        }
        if deadline.has_passed_at(now) {
            return Duty::BreakOff;
        }
        if state.is_silent() && (state.looked_at + LOOK_AT_SILENCE).has_passed_at(now) {
            return Duty::Doubt;
        }
        if state.users == 0 && (state.idle_since + IDLE_FOR).has_passed_at(now) {
            return Duty::Close;
        }
        // The keeper sends the heartbeats of a session that holds something; others send them by themselves.
        let beat_at = deadline.before(state.ttl / 12 * 7);
        if beat_at.has_passed_at(now) && (state.users == 0 || state.unanswered == 0) {
            return Duty::Beat;
        }
        Duty::Look(soon.min(deadline))
    }

    /// The server is asked now what it does for it. Whether there is still reason to when that has been answered is to
    /// be seen by [`still_waits`](Self::still_waits).
    pub(super) fn looks(&self) -> Instant {
        let mut state = lock(&self.state);
        state.looked_at = Instant::now();
        state.silent_since
    }

    /// Whether nothing has been answered since [`looks`](Self::looks) said so.
    pub(super) fn still_waits(&self, silent_since: Instant) -> bool {
        let state = lock(&self.state);
        state.ended.is_none() && state.unanswered > 0 && state.silent_since == silent_since
    }

    /// Lets the warden look again.
    pub(super) fn wake_warden(&self) {
        self.changed.notify_one();
    }
}

impl<C: Connection> fmt::Debug for LockSession<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("LockSession")
            .field("connection", &self.connection)
            .field("ttl", &state.ttl)
            .field("users", &state.users)
            .field("ended", &state.ended)
            .finish_non_exhaustive()
    }
}

/// A use of a session, which keeps it open.
pub(super) struct User<C: Connection>(Arc<LockSession<C>>);

impl<C: Connection> User<C> {
    /// The session, for those who don't keep it open.
    pub(super) fn session(&self) -> &Arc<LockSession<C>> {
        &self.0
    }
}

impl<C: Connection> Clone for User<C> {
    fn clone(&self) -> Self {
        lock(&self.0.state).users += 1;
        Self(self.0.clone())
    }
}

impl<C: Connection> Deref for User<C> {
    type Target = LockSession<C>;

    fn deref(&self) -> &LockSession<C> {
        &self.0
    }
}

impl<C: Connection> Drop for User<C> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.users -= 1;
        if state.users == 0 {
            state.idle_since = Instant::now();
        }
    }
}

impl<C: Connection> fmt::Debug for User<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
