//! Claims: tries on a shared session, and waits on a session of their own.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::hold::{On, Place, SessionHold};
use super::lease::Lease;
use super::line::{Lined, Waiting, nap, withdraw, withdraw_in_background};
use super::occupied::Occupied;
use super::pool::{Pool, Sessions};
use super::session::LockSession;
use super::{Connection, Ended, Server};
use crate::backend::{Claim, Instant, Outcome, OwnerId};
use crate::engine::carried::Carried;
use crate::engine::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// A claim that may have something on the server.
pub(super) struct Entry<S: Server> {
    pub(super) stage: Mutex<Stage<S>>,
    pub(super) changed: Notify,
    /// What keeps the place of one that waits.
    pub(super) waiting: Mutex<Option<Waiting<S>>>,
    /// Once it is being abandoned: when that is given up at the latest.
    pub(super) given_up_at: Mutex<Option<Instant>>,
}

pub(super) enum Stage<S: Server> {
    /// Nothing, but perhaps an announcement.
    Nothing,
    /// A try is under way.
    Asking(Arc<LockSession<S::Connection>>),
    /// It waits on the server.
    Blocked {
        session: Arc<LockSession<S::Connection>>,
        /// Since when it is no longer wanted.
        cancelled_at: Option<Instant>,
    },
    Granted(SessionHold<S>, FencingToken),
    /// Nothing, because of this.
    Failed(Error),
    /// The session has ended under it.
    Broken(Arc<LockSession<S::Connection>>, Error),
}

impl<S: Server> Entry<S> {
    fn new() -> Arc<Self> {
        let stage = Mutex::new(Stage::Nothing);
        Arc::new(Self {
            stage,
            changed: Notify::new(),
            waiting: Mutex::default(),
            given_up_at: Mutex::default(),
        })
    }

    pub(super) fn set(&self, stage: Stage<S>) {
        let before = std::mem::replace(&mut *lock(&self.stage), stage);
        drop(before); // with the stage unlocked
        self.changed.notify_waiters();
    }

    /// The wait on the server is over, and from here on nobody cancels it. Whether somebody has.
    fn blocks_no_more(&self, session: &Arc<LockSession<S::Connection>>) -> bool {
        let mut stage = lock(&self.stage);
        let cancelled = matches!(&*stage, Stage::Blocked { cancelled_at: Some(_), .. });
        *stage = Stage::Asking(session.clone());
        drop(stage);
        self.changed.notify_waiters();
        cancelled
    }

    /// Somebody cancels what this session does for the claim, until what is returned is dropped. `None`: it doesn't block
    /// any more.
    pub(super) fn cancel_begins(
        &self,
        session: &Arc<LockSession<S::Connection>>,
    ) -> Option<impl Drop + Send + use<S>> {
        let stage = lock(&self.stage); // so that it doesn't end before this is counted
        matches!(&*stage, Stage::Blocked { .. }).then(|| session.cancel_begins())
    }

    /// What a request came to: takes it, for whoever called.
    fn take(&self) -> Option<Result<Taken<S>>> {
        let mut stage = lock(&self.stage);
        match &*stage {
            Stage::Asking(_) | Stage::Blocked { .. } => None,
            Stage::Broken(_, error) => Some(Err(unknown(error.duplicate()))), // to be abandoned
            Stage::Nothing | Stage::Granted(..) | Stage::Failed(_) => {
                match std::mem::replace(&mut *stage, Stage::Nothing) {
                    Stage::Granted(hold, token) => Some(Ok(Taken::Granted(hold, token))),
                    Stage::Failed(error) => Some(Err(error)),
                    _ => Some(Ok(Taken::Nothing)),
                }
            }
        }
    }
}

/// A request under way for a claim. Dropped before it has come to something, as with its runtime, it has broken the claim.
struct UnderWay<S: Server> {
    entry: Arc<Entry<S>>,
    session: Option<Arc<LockSession<S::Connection>>>,
}

impl<S: Server> UnderWay<S> {
    fn new(entry: &Arc<Entry<S>>, session: &Arc<LockSession<S::Connection>>) -> Self {
        Self { entry: entry.clone(), session: Some(session.clone()) }
    }

    fn comes_to(mut self, stage: Stage<S>) {
        self.session = None;
        self.entry.set(stage);
    }
}

impl<S: Server> Drop for UnderWay<S> {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            session.break_off();
            self.entry.set(Stage::Broken(session, stopped()));
        }
    }
}

pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::Unknown, "the runtime that serves the session has ended, or stands still")
}

enum Taken<S: Server> {
    Nothing,
    Granted(SessionHold<S>, FencingToken),
}

impl<S: Server> Sessions<S> {
    /// [`Backend::try_claim`](crate::backend::Backend::try_claim) for the lock of this key.
    pub(crate) async fn try_claim(
        &self,
        claim: &Claim,
        key: &S::Key,
        wait: Duration,
    ) -> Result<Outcome<SessionHold<S>>> {
        let pool = &self.0;
        let outcome = if wait.is_zero() {
            let Some(occupied) = pool.occupy(key, claim.owner) else { return Ok(busy(None)) };
            let entry = Entry::new();
            pool.try_once(claim, occupied, &entry, true).await
        } else {
            pool.wait(claim, key, Instant::now() + wait).await
        };
        match outcome {
            Ok(Some((hold, token))) => Ok(Outcome::Granted(hold.grant(token))),
            Ok(None) if wait.is_zero() => Ok(busy(None)),
            Ok(None) => Ok(busy(Some(Duration::ZERO))),
            Err(error) => Err(error),
        }
    }
}

/// Of a claim whose session wasn't ready for it.
fn not_asked(error: Error) -> Error {
    if error.kind() != ErrorKind::Unknown {
        return error;
    }
    Error::new(ErrorKind::Unavailable, "the session could not be prepared").with_source(error)
}

/// What a broken session leaves to say.
fn unknown(error: Error) -> Error {
    if error.kind() == ErrorKind::Unknown {
        return error;
    }
    Error::new(ErrorKind::Unknown, "the session ended under the claim").with_source(error)
}

fn busy<H>(retry_after: Option<Duration>) -> Outcome<H> {
    Outcome::Busy { retry_after }
}

type Got<S> = Option<(SessionHold<S>, FencingToken)>;

impl<S: Server> Pool<S> {
    fn note(&self, owner: OwnerId, entry: &Arc<Entry<S>>) {
        lock(&self.claims).entry(owner).or_insert_with(|| entry.clone());
    }

    fn forget(&self, owner: OwnerId) {
        lock(&self.claims).remove(&owner);
    }

    /// One attempt. Unless the claim waits besides, nothing is known of it afterwards but what is to be abandoned.
    pub(super) async fn try_once(
        self: &Arc<Self>,
        claim: &Claim,
        occupied: Occupied<S>,
        entry: &Arc<Entry<S>>,
        only: bool,
    ) -> Result<Got<S>> {
        let on = if self.server.shares() {
            On::Shared(self.shared(claim.ttl).await?)
        } else {
            On::Own(self.own(claim.ttl, None).await?.in_use())
        };
        let session = on.user().session().clone();
        entry.set(Stage::Asking(session.clone()));
        self.note(claim.owner, entry);
        let (runtime, ttl) = (session.runtime.clone(), claim.ttl);
        let under_way = UnderWay::new(entry, &session);
        let ask = async move {
            let user = on.user();
            if let On::Own(_) = &on
                && let Err(error) = user.set_ttl(ttl).await
            {
                // Nobody knows how long it would stand. Nothing is held on it.
                user.break_off();
                return under_way.comes_to(Stage::Failed(not_asked(error)));
            }
            let answer = user.request(user.connection.try_lock(occupied.key())).await;
            under_way.comes_to(match answer {
                Ok(Some(token)) => Stage::Granted(SessionHold::new(Place { occupied, on }), token),
                Ok(None) => {
                    on.give_back();
                    Stage::Nothing
                }
                Err(error) if error.kind() == ErrorKind::Unknown => Stage::Broken(session, error),
                Err(error) => {
                    on.give_back();
                    Stage::Failed(error)
                }
            });
        };
        Carried::new(&runtime, ask).await;
        let answer = entry.take().expect("it has come to something");
        if only && !matches!(&answer, Err(error) if error.kind() == ErrorKind::Unknown) {
            self.forget(claim.owner);
        }
        Ok(match answer? {
            Taken::Granted(hold, token) => Some((hold, token)),
            Taken::Nothing => None,
        })
    }

    /// Waits, in the order of arrival if there is a session for it. The place is kept until the claim is abandoned.
    async fn wait(self: &Arc<Self>, claim: &Claim, key: &S::Key, until: Instant) -> Result<Got<S>> {
        let known = lock(&self.claims).get(&claim.owner).cloned();
        let entry = known.unwrap_or_else(|| {
            let entry = Entry::new();
            self.note(claim.owner, &entry);
            entry
        });
        loop {
            // It waits already, and has only come back.
            let mut changed = std::pin::pin!(entry.changed.notified());
            changed.as_mut().enable();
            match entry.take() {
                None => {
                    if tokio::time::timeout(until.remaining(), changed).await.is_err() {
                        return Ok(None);
                    }
                    continue;
                }
                Some(Ok(Taken::Granted(hold, token))) => {
                    self.forget(claim.owner);
                    return Ok(Some((hold, token)));
                }
                Some(Ok(Taken::Nothing)) => {}
                Some(Err(error)) => return Err(self.fails(claim, &entry, error).await),
            }
            let Some(occupied) = self.occupy(key, claim.owner) else {
                // Another name has the same key, or what this one had is being freed.
                tokio::time::sleep(nap(until)).await;
                if until.has_passed() {
                    return Ok(None);
                }
                continue;
            };
            let has_line = lock(&entry.waiting).is_some();
            if !has_line && let Ok(slot) = self.slots.clone().try_acquire_owned() {
                self.block(claim, occupied, slot, &entry, until).await?;
                continue;
            }
            match self.wait_in_line(claim, occupied, &entry, until).await? {
                Lined::Granted(hold, token) => {
                    let waiting = lock(&entry.waiting).take();
                    self.forget(claim.owner);
                    withdraw_in_background(waiting);
                    return Ok(Some((hold, token)));
                }
                Lined::Slot(occupied, slot) => {
                    let waiting = lock(&entry.waiting).take();
                    withdraw_in_background(waiting);
                    self.block(claim, occupied, slot, &entry, until).await?;
                }
                Lined::Again => {}
                Lined::TimeIsUp => return Ok(None),
            }
        }
    }

    /// An error ends the claim: unless nobody knows what it has left behind, it leaves nothing.
    pub(super) async fn fails(&self, claim: &Claim, entry: &Entry<S>, error: Error) -> Error {
        if error.kind() != ErrorKind::Unknown {
            let waiting = lock(&entry.waiting).take();
            self.forget(claim.owner);
            withdraw(waiting).await;
        }
        error
    }

    /// Blocks on the server, for as long as it takes; whoever calls waits until then at most.
    async fn block(
        self: &Arc<Self>,
        claim: &Claim,
        occupied: Occupied<S>,
        slot: OwnedSemaphorePermit,
        entry: &Arc<Entry<S>>,
        until: Instant,
    ) -> Result<()> {
        let lease = match self.own(claim.ttl, Some(slot)).await {
            Ok(lease) => lease.in_use(),
            Err(error) => return Err(self.fails(claim, entry, error).await),
        };
        let session = lease.user().session().clone();
        entry.set(Stage::Blocked { session: session.clone(), cancelled_at: None });
        let wait = wait_for_grant(lease, occupied, claim.ttl, entry.clone());
        let carried = Carried::new(&session.runtime, wait);
        // In time or not: what it has come to is in the entry.
        let _ = tokio::time::timeout(until.remaining(), carried).await;
        Ok(())
    }
}

/// Waits on the server until it is granted, cancelled or fails, and notes that down.
async fn wait_for_grant<S: Server>(
    lease: Lease<S>,
    occupied: Occupied<S>,
    ttl: Duration,
    entry: Arc<Entry<S>>,
) {
    let user = lease.user().clone();
    let session = user.session().clone();
    let under_way = UnderWay::new(&entry, &session);
    if let Err(error) = user.set_ttl(ttl).await {
        // Nobody knows how long it would stand. Nothing is held on it, and the lease throws it away.
        return under_way.comes_to(Stage::Failed(not_asked(error)));
    }
    user.block();
    let sent = Instant::now();
    let mut answer = user.request(user.connection.lock(occupied.key())).await;
    let cancelled = entry.blocks_no_more(&session);
    if answer.is_ok() && !cancelled {
        // The server counts from the grant, we from the request. If that is long ago, another one tells how long it stands.
        if sent.elapsed() > ttl / 3 {
            let sent = Instant::now();
            user.stand_anew(sent, ttl);
            answer = user.request(user.connection.beat()).await.and(answer);
        } else {
            user.stand_anew(sent, ttl);
        }
    }
    let stage = match answer {
        Ok(token) if !cancelled => {
            Stage::Granted(SessionHold::new(Place { occupied, on: On::Own(lease) }), token)
        }
        Err(error) if user.ended() == Some(Ended::ByServer) => Stage::Failed(not_asked(error)),
        Err(error) if error.kind() == ErrorKind::Unknown || user.ended().is_some() => {
            Stage::Broken(session, error)
        }
        answer => {
            // A cancel that is still on its way must not hit what is done here next.
            user.cancels_over().await;
            user.stand_anew(Instant::now(), ttl);
            // It may be held all the same.
            match user.request(user.connection.clear()).await {
                Ok(()) => {
                    lease.give_back();
                    drop(occupied);
                    match answer {
                        Err(error) if !cancelled => Stage::Failed(error),
                        Ok(_) | Err(_) => Stage::Nothing,
                    }
                }
                Err(error) => {
                    user.break_off();
                    Stage::Broken(session, error)
                }
            }
        }
    };
    under_way.comes_to(stage);
}
