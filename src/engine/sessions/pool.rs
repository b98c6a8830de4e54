//! [`Sessions`]: all the sessions of one provider, and what it does with them.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::claim::Entry;
use super::session::{DOUBT_AFTER, Duty, LockSession, User};
use super::{Connection, ENDED, Ended, Role, Server};
use crate::backend::{Due, Instant, OwnerId, Renewal};
use crate::engine::backoff::Backoff;
use crate::engine::flight::Flight;
use crate::engine::lock;
use crate::engine::worker::OnDrop;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Loss;

use super::hold::SessionHold;

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
    idle: Mutex<Vec<Arc<LockSession<S::Connection>>>>,
    /// How many more may have one.
    pub(super) slots: Arc<Semaphore>,
    all: Mutex<Vec<Weak<LockSession<S::Connection>>>>,
    /// What this provider holds or claims: a session would be given again what it holds.
    occupied: Mutex<HashMap<S::Key, Occupant<S>>>,
    /// Claims that may have got something nobody knows of.
    pub(super) claims: Mutex<HashMap<OwnerId, Arc<Entry<S>>>>,
    pub(super) listeners: Arc<Listeners<S::Key>>,
    closed: AtomicBool,
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
        let beats = join_all(sessions.into_iter().map(|session| beat(session))).await;
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

/// Until when the session stands, why it doesn't, or why nobody knows.
async fn beat<C: Connection>(session: &LockSession<C>) -> Result<Instant, Result<Loss, Error>> {
    let (sent, ttl) = (Instant::now(), session.ttl());
    let request = session.request(session.connection.beat());
    // One that doesn't answer mustn't make the others late.
    let answer = tokio::time::timeout(ttl / 6, request).await;
    match answer.unwrap_or_else(|_| Err(unavailable("the heartbeat has not been answered"))) {
        Ok(()) => Ok(sent + ttl),
        Err(_) if session.ended().is_some() => Err(Ok(ENDED)),
        Err(error) => Err(Err(error)),
    }
}

async fn close<C: Connection>(session: &LockSession<C>) {
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
        shared.opening.join(open).await?;
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
                return Ok(Lease { user, pool: self.clone(), slot, is_free: true });
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
                Ok(Lease { user, pool, slot, is_free: true })
            });
            drop(opened.send(lease)); // one that isn't taken is free for others
        });
        taken.await.unwrap_or_else(|_| Err(unavailable("the runtime is shutting down")))
    }

    async fn open(self: &Arc<Self>, role: Role, ttl: Duration) -> Result<Arc<LockSession<S::Connection>>> {
        // The last requests of opening are later than this: the server's time begins later, too.
        let sent = Instant::now();
        let connection = self.server.open(role, ttl, &self.listeners).await?;
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
    fn remove(&self, session: &Arc<LockSession<S::Connection>>) {
        let is_it = |other: &Arc<_>| Arc::ptr_eq(other, session);
        for shared in lock(&self.shared).values() {
            lock(&shared.current).take_if(|current| is_it(current));
        }
        lock(&self.idle).retain(|idle| !is_it(idle));
        self.listeners.wake_all();
    }

    /// Takes a key for a claim, unless another name or claim of this provider has it.
    pub(super) fn occupy(self: &Arc<Self>, key: &S::Key, owner: OwnerId) -> Option<Occupied<S>> {
        let mut occupied = lock(&self.occupied);
        // On a session that has ended it isn't in anybody's way, although its guard may still be there.
        if occupied.get(key).is_some_and(|occupant| !occupant.is_gone()) {
            return None;
        }
        occupied.insert(key.clone(), Occupant { owner, session: None });
        Some(Occupied { pool: self.clone(), key: key.clone(), owner })
    }

    /// Sees to it that nothing is left on the server of a session that has ended here.
    pub(super) async fn terminate(self: &Arc<Self>, session: &LockSession<S::Connection>) -> Result<()> {
        if session.ended() == Some(Ended::ByServer) {
            return Ok(());
        }
        let terminate = async || {
            let helper = self.helper(session.ttl()).await?;
            let other = helper.user();
            other.request(other.connection.terminate(&session.connection)).await?;
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

/// Whether the server has nothing to do for a session that waits for an answer. Asked twice, so that the answer isn't just
/// on its way; when the server can't be asked either, it may be only slow, and nothing is lost yet.
async fn answer_is_lost<S: Server>(pool: &Arc<Pool<S>>, session: &LockSession<S::Connection>) -> bool {
    for _ in 0..2 {
        let ask = async {
            let helper = pool.helper(session.ttl()).await?;
            let other = helper.user();
            let answered = other.request(other.connection.has_answered(&session.connection)).await?;
            Ok::<_, Error>(answered)
        };
        if !matches!(tokio::time::timeout(DOUBT_AFTER, ask).await, Ok(Ok(true))) {
            return false;
        }
        tokio::time::sleep(DOUBT_AFTER / 4).await;
    }
    true
}

/// Boxed, since it may open a session itself, with a warden of its own.
fn warden<S: Server>(
    pool: &Arc<Pool<S>>,
    session: &Arc<LockSession<S::Connection>>,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(watch_over(Arc::downgrade(pool), Arc::downgrade(session), session.connection.closed()))
}

/// The warden of a session: keeps it alive while nothing is held on it, closes it when nobody has needed it for a while, and
/// notices its end.
async fn watch_over<S: Server>(
    pool: Weak<Pool<S>>,
    watched: Weak<LockSession<S::Connection>>,
    closed: impl Future<Output = Ended>,
) {
    tokio::pin!(closed);
    // The runtime may end, and the connection with it.
    let _gone = OnDrop(Some({
        let (pool, watched) = (pool.clone(), watched.clone());
        move || {
            if let Some(session) = watched.upgrade() {
                session.end(Ended::Somehow, ENDED);
                if let Some(pool) = pool.upgrade() {
                    pool.remove(&session);
                }
            }
        }
    }));
    loop {
        let Some(session) = watched.upgrade() else { return };
        let pool_is_closed = pool.upgrade().is_none_or(|pool| {
            pool.sweep();
            pool.closed.load(Ordering::Acquire)
        });
        if pool_is_closed && session.end_if_unused(Loss::Closed) {
            return close(&session).await;
        }
        let look_at = match session.duty() {
            Duty::Over => break,
            Duty::Look(at) => at,
            Duty::Close => {
                if session.end_if_unused(ENDED) {
                    return close(&session).await;
                }
                continue;
            }
            Duty::Beat => {
                let heard =
                    tokio::time::timeout(session.ttl() / 3, session.request(session.connection.beat()));
                tokio::select! {
                    ended = &mut closed => {
                        session.end(ended, ENDED);
                        break;
                    }
                    // One that fails is repeated, until the deadline has passed.
                    answer = heard => if !matches!(answer, Ok(Ok(()))) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                continue;
            }
            Duty::Doubt => {
                let Some(pool) = pool.upgrade() else { continue };
                let silent_since = session.looks();
                tokio::select! {
                    ended = &mut closed => {
                        session.end(ended, ENDED);
                        break;
                    }
                    lost = answer_is_lost(&pool, &session) => if lost && session.still_waits(silent_since) {
                        session.break_off();
                        break;
                    }
                }
                continue;
            }
            Duty::BreakOff => {
                session.end(Ended::Somehow, Loss::Expired);
                session.connection.break_off();
                break;
            }
        };
        // Not kept from going meanwhile.
        let changed = session.changed.clone();
        drop(session);
        tokio::select! {
            ended = &mut closed => {
                if let Some(session) = watched.upgrade() {
                    session.end(ended, ENDED);
                }
                break;
            }
            () = changed.notified() => {}
            () = sleep_until(look_at) => {}
        }
    }
    let (Some(pool), Some(session)) = (pool.upgrade(), watched.upgrade()) else { return };
    pool.remove(&session);
    // Where only the way to the server is broken, what was held there would be in the way of others for a TTL.
    let (give_up_at, mut backoff) = (Instant::now() + session.ttl(), Backoff::between_retries());
    while pool.terminate(&session).await.is_err() && !give_up_at.has_passed() {
        tokio::time::sleep(backoff.next()).await;
    }
}

async fn sleep_until(at: Instant) {
    match at {
        Instant::NEVER => std::future::pending().await,
        at => tokio::time::sleep(at.remaining()).await,
    }
}

impl<S: Server> fmt::Debug for Sessions<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").field("server", &self.0.server).finish_non_exhaustive()
    }
}

/// A session that one claim has for itself. Once it is in use, it is thrown away unless it is given back.
pub(super) struct Lease<S: Server> {
    user: User<S::Connection>,
    pool: Arc<Pool<S>>,
    slot: Option<OwnedSemaphorePermit>,
    /// Nothing is held on it.
    is_free: bool,
}

impl<S: Server> Lease<S> {
    pub(super) fn user(&self) -> &User<S::Connection> {
        &self.user
    }

    /// From now on something may be held on it.
    pub(super) fn in_use(mut self) -> Self {
        self.is_free = false;
        self
    }

    /// Nothing is held on it any more.
    pub(super) fn give_back(mut self) {
        self.is_free = true;
    }
}

impl<S: Server> Drop for Lease<S> {
    fn drop(&mut self) {
        if self.is_free && self.user.ended().is_none() {
            lock(&self.pool.idle).push(self.user.session().clone());
        } else {
            self.user.break_off();
        }
        drop(self.slot.take()); // last: the next one finds the session idle
    }
}

/// Who has a key, and on which session once that is known.
struct Occupant<S: Server> {
    owner: OwnerId,
    session: Option<Weak<LockSession<S::Connection>>>,
}

impl<S: Server> Occupant<S> {
    fn is_gone(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.upgrade().is_none_or(|session| session.ended().is_some()))
    }
}

/// A key that a claim or a hold of this provider has.
pub(super) struct Occupied<S: Server> {
    pool: Arc<Pool<S>>,
    key: S::Key,
    owner: OwnerId,
}

impl<S: Server> Occupied<S> {
    pub(super) fn key(&self) -> &S::Key {
        &self.key
    }

    /// It is occupied on this session, and only as long as that lives.
    pub(super) fn is_on(&self, session: &Arc<LockSession<S::Connection>>) {
        if let Some(occupant) =
            lock(&self.pool.occupied).get_mut(&self.key).filter(|it| it.owner == self.owner)
        {
            occupant.session = Some(Arc::downgrade(session));
        }
    }
}

impl<S: Server> Drop for Occupied<S> {
    fn drop(&mut self) {
        let mut occupied = lock(&self.pool.occupied);
        if occupied.get(&self.key).is_some_and(|occupant| occupant.owner == self.owner) {
            occupied.remove(&self.key);
        }
    }
}

/// Claims that wait to hear of a release, by key. Names with the same key hear of the same.
#[derive(Debug)]
pub(crate) struct Listeners<K>(Mutex<HashMap<K, Vec<Arc<Notify>>>>);

impl<K> Default for Listeners<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> Listeners<K> {
    /// The lock of this key has been released.
    pub(crate) fn wake(&self, key: &K) {
        if let Some(listeners) = lock(&self.0).get(key) {
            for listener in listeners {
                listener.notify_one();
            }
        }
    }

    /// Some releases may not have been heard.
    pub(crate) fn wake_all(&self) {
        for listener in lock(&self.0).values().flatten() {
            listener.notify_one();
        }
    }

    pub(super) fn listen(self: &Arc<Self>, key: &K) -> Listening<K> {
        let heard = Arc::<Notify>::default();
        lock(&self.0).entry(key.clone()).or_default().push(heard.clone());
        Listening { all: self.clone(), key: key.clone(), heard }
    }
}

/// As long as it lives, releases are heard.
pub(super) struct Listening<K: Eq + Hash> {
    all: Arc<Listeners<K>>,
    key: K,
    heard: Arc<Notify>,
}

impl<K: Eq + Hash> Listening<K> {
    pub(super) fn key(&self) -> &K {
        &self.key
    }

    /// Is notified of each release that is heard.
    pub(super) fn heard(&self) -> Arc<Notify> {
        self.heard.clone()
    }
}

impl<K: Eq + Hash> Drop for Listening<K> {
    fn drop(&mut self) {
        let mut all = lock(&self.all.0);
        if let Some(listeners) = all.get_mut(&self.key) {
            listeners.retain(|listener| !Arc::ptr_eq(listener, &self.heard));
            if listeners.is_empty() {
                all.remove(&self.key);
            }
        }
    }
}
