//! [`Sessions`]: all the sessions of one provider, and what it does with them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::claim::Entry;
use super::hold::SessionHold;
use super::lease::Lease;
use super::listeners::Listeners;
use super::occupied::Occupant;
use super::session::{LockSession, User};
use super::warden::warden;
use super::{Connection, ENDED, Ended, Role, Server};
use crate::backend::{Due, Instant, OwnerId, Renewal};
use crate::engine::carried::Carried;
use crate::engine::flight::Flight;
use crate::engine::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Loss;

/// How long opening a session may take, logging in included.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an orderly end of a session may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The sessions of a provider.
pub(crate) struct Sessions<S: Server>(pub(super) Arc<Pool<S>>);

pub(super) struct Pool<S: Server> {
    pub(super) server: S,
    /// One for each TTL.
    shared: Mutex<HashMap<Duration, Arc<Shared<S>>>>,
    /// Own sessions that nobody uses.
    pub(super) idle: Mutex<Vec<Arc<LockSession<S::Connection>>>>,
    /// How many more may have one.
    pub(super) slots: Arc<Semaphore>,
    all: Mutex<Vec<Weak<LockSession<S::Connection>>>>,
    /// What this provider holds or claims: a session would be given again what it holds.
    pub(super) occupied: Mutex<HashMap<S::Key, Occupant<S>>>,
    /// Claims that may have got something nobody knows of.
    pub(super) claims: Mutex<HashMap<OwnerId, Arc<Entry<S>>>>,
    pub(super) listeners: Arc<Listeners<S::Key>>,
    pub(super) closed: AtomicBool,
}

/// The shared session for one TTL.
struct Shared<S: Server> {
    current: Mutex<Option<Arc<LockSession<S::Connection>>>>,
    opening: Flight,
}

impl<S: Server> Sessions<S> {
    /// At most so many claims at a time have a session of their own.
    pub(crate) fn new(server: S, own_sessions: usize) -> Self {
        Self(Arc::new(Pool {
            server,
            shared: Mutex::default(),
            idle: Mutex::default(),
            slots: Arc::new(Semaphore::new(own_sessions.min(Semaphore::MAX_PERMITS))),
            all: Mutex::default(),
            occupied: Mutex::default(),
            claims: Mutex::default(),
            listeners: Arc::default(),
            closed: AtomicBool::new(false),
        }))
    }

    /// Opens a session for locks of this TTL, and keeps it for the first claims.
    ///
    /// # Errors
    ///
    /// What the server says.
    pub(crate) async fn connect(&self, ttl: Duration) -> Result<()> {
        if self.0.server.shares() {
            self.0.shared(ttl).await.map(drop)
        } else {
            self.0.own(ttl, None).await.map(Lease::give_back)
        }
    }

    /// A heartbeat for each of the sessions that these are on.
    pub(crate) async fn renew(&self, due: &[Due<'_, SessionHold<S>>]) -> Vec<Renewal> {
        let mut sessions: Vec<&Arc<LockSession<S::Connection>>> = Vec::new();
        let mut places = Vec::with_capacity(due.len());
        for Due { hold, .. } in due {
            let session = hold.session();
            let known = sessions.iter().position(|other| Arc::ptr_eq(other, session));
            places.push(known.unwrap_or(sessions.len()));
            if known.is_none() {
                sessions.push(session);
            }
        }
        let beats = join_all(sessions.into_iter().map(beat)).await;
        let renewal = |place: usize| match &beats[place] {
            Ok(until) => Renewal::Until(*until),
            Err(Ok(loss)) => Renewal::Lost(*loss),
            Err(Err(error)) => Renewal::Failed(error.duplicate()),
        };
        places.into_iter().map(renewal).collect()
    }

    /// Closes the sessions that hold nothing, and the others as soon as they don't.
    pub(crate) async fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        let all: Vec<_> = lock(&self.0.all).iter().filter_map(Weak::upgrade).collect();
        for session in all {
            if session.end_if_unused(Loss::Closed) {
                close(&session).await;
                self.0.remove(&session);
            }
        }
    }
}

/// A heartbeat that is heeded whenever it is answered, although nobody may wait for it any more.
pub(super) fn send_beat<C: Connection>(session: &Arc<LockSession<C>>) -> Carried<Result<()>> {
    let beating = session.clone();
    Carried::new(&session.runtime, async move { beating.request(beating.connection.beat()).await })
}

/// Until when the session stands, why it doesn't, or why nobody knows.
async fn beat<C: Connection>(session: &Arc<LockSession<C>>) -> Result<Instant, Result<Loss, Error>> {
    let (sent, ttl) = (Instant::now(), session.ttl());
    // What is to be answered anyway does as well, and another request would only stand behind it.
    match session.silence() {
        Some(silence) if silence < ttl / 6 => return Ok(session.stands().deadline()),
        Some(_) => return Err(Err(unavailable("an earlier request has not been answered"))),
        None => {}
    }
    // One that doesn't answer mustn't make the others late; when it does after all, that counts.
    let answer = tokio::time::timeout(ttl / 6, send_beat(session)).await;
    match answer.unwrap_or_else(|_| Err(unavailable("the heartbeat has not been answered"))) {
        Ok(()) => Ok(sent + ttl),
        Err(_) if session.ended().is_some() => Err(Ok(ENDED)),
        Err(error) => Err(Err(error)),
    }
}

pub(super) async fn close<C: Connection>(session: &LockSession<C>) {
    if tokio::time::timeout(CLOSE_TIMEOUT, session.connection.close()).await.is_err() {
        session.connection.break_off();
    }
}

impl<S: Server> Pool<S> {
    /// The shared session for this TTL.
    pub(super) async fn shared(self: &Arc<Self>, ttl: Duration) -> Result<User<S::Connection>> {
        let shared = {
            let mut all = lock(&self.shared);
            if all.len() > 16 && !all.contains_key(&ttl) {
                all.retain(|_, shared| {
                    lock(&shared.current).as_ref().is_some_and(|session| session.ended().is_none())
                });
            }
            let new = || Shared { current: Mutex::default(), opening: Flight::new(OPEN_TIMEOUT) };
            all.entry(ttl).or_insert_with(|| Arc::new(new())).clone()
        };
        if let Some(user) = shared.user() {
            return Ok(user);
        }
        let open = || {
            let (pool, shared) = (self.clone(), shared.clone());
            async move {
                let session = pool.open(Role::Shared, ttl).await?;
                *lock(&shared.current) = Some(session);
                Ok(())
            }
        };
        shared.opening.join(|| shared.user().is_some(), open).await?;
        let user = shared.user().ok_or_else(|| unavailable("the session ended at once"))?;
        shared.opening.succeeds();
        Ok(user)
    }

    /// A session for one claim, in the slot that it was allowed, if there are slots for it.
    pub(super) async fn own(
        self: &Arc<Self>,
        ttl: Duration,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Result<Lease<S>> {
        loop {
            let idle = {
                let mut idle = lock(&self.idle);
                // One that needs no request first is best.
                let fits = idle.iter().rposition(|session| session.ttl() == ttl);
                fits.map(|place| idle.remove(place)).or_else(|| idle.pop())
            };
            let Some(session) = idle else { break };
            if let Some(user) = session.enter() {
                return Ok(Lease::new(user, self.clone(), slot));
            }
        }
        // In a task, with the slot: whoever gives up waiting leaves a session to the next one, and not another one to open.
        let (opened, taken) = oneshot::channel();
        let pool = self.clone();
        tokio::spawn(async move {
            let open = tokio::time::timeout(OPEN_TIMEOUT, pool.open(Role::Own, ttl)).await;
            let session = open.unwrap_or_else(|_| Err(unavailable("the server doesn't answer")));
            let lease = session.and_then(|session| {
                let user = session.enter().ok_or_else(|| unavailable("the session ended at once"))?;
                Ok(Lease::new(user, pool, slot))
            });
            drop(opened.send(lease)); // one that isn't taken is free for others
        });
        taken.await.unwrap_or_else(|_| Err(unavailable("the runtime is shutting down")))
    }

    async fn open(self: &Arc<Self>, role: Role, ttl: Duration) -> Result<Arc<LockSession<S::Connection>>> {
        // The last requests of opening are later than this: the server's time begins later, too.
        let sent = Instant::now();
        let connection = self.server.open(role, ttl, &self.listeners).await?;
        // Where that has taken a good part of the TTL, another request tells how long it stands.
        let sent = if sent.elapsed() > ttl / 3 {
            let sent = Instant::now();
            connection.beat().await?;
            sent
        } else {
            sent
        };
        let session = LockSession::new(connection, ttl, sent);
        {
            let mut all = lock(&self.all);
            all.retain(|session| session.strong_count() > 0);
            all.push(Arc::downgrade(&session));
        }
        tokio::spawn(warden(self, &session));
        Ok(session)
    }

    /// A session has ended: nobody gets it any more, and who hears releases over it has to look.
    pub(super) fn remove(&self, session: &Arc<LockSession<S::Connection>>) {
        let is_it = |other: &Arc<_>| Arc::ptr_eq(other, session);
        for shared in lock(&self.shared).values() {
            lock(&shared.current).take_if(|current| is_it(current));
        }
        lock(&self.idle).retain(|idle| !is_it(idle));
        self.listeners.wake_all();
    }

    /// Sees to it that nothing is left on the server of a session that has ended here.
    pub(super) async fn terminate(self: &Arc<Self>, session: &LockSession<S::Connection>) -> Result<()> {
        if session.ended() == Some(Ended::ByServer) {
            return Ok(());
        }
        let terminate = async || {
            let helper = self.helper(session.ttl()).await?;
            let other = helper.user();
            other.errand(other.connection.terminate(&session.connection)).await?;
            Ok(())
        };
        session.terminated.get_or_try_init(terminate).await.map(drop)
    }

    /// A session that can be asked something besides.
    pub(super) async fn helper(self: &Arc<Self>, ttl: Duration) -> Result<Helper<S>> {
        if self.server.shares() {
            Ok(Helper::Shared(self.shared(ttl).await?))
        } else {
            Ok(Helper::Own(self.own(ttl, None).await?))
        }
    }
}

/// A session that can be asked something besides.
pub(super) enum Helper<S: Server> {
    Shared(User<S::Connection>),
    Own(Lease<S>),
}

impl<S: Server> Helper<S> {
    pub(super) fn user(&self) -> &User<S::Connection> {
        match self {
            Self::Shared(user) => user,
            Self::Own(lease) => lease.user(),
        }
    }
}

impl<S: Server> Shared<S> {
    fn user(&self) -> Option<User<S::Connection>> {
        lock(&self.current).as_ref().and_then(LockSession::enter)
    }
}

impl<S: Server> Drop for Pool<S> {
    /// Nobody holds anything on them any more, since a hold keeps this.
    fn drop(&mut self) {
        for session in lock(&self.all).iter().filter_map(Weak::upgrade) {
            session.wake_warden(); // which closes it
        }
    }
}

fn unavailable(message: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, message)
}

impl<S: Server> fmt::Debug for Sessions<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").field("server", &self.0.server).finish_non_exhaustive()
    }
}
