//! Claims: tries on a shared session, and waits on a session of their own.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{AcquireError, Notify, OwnedSemaphorePermit};

use super::hold::{On, Place, SessionHold, unknown};
use super::pool::{Lease, Listening, Occupied, Pool, Sessions};
use super::session::{DOUBT_AFTER, LockSession, User};
use super::{Connection, Ended, Server};
use crate::backend::{Claim, Instant, Outcome, OwnerId};
use crate::engine::backoff::jitter;
use crate::engine::carried::Carried;
use crate::engine::lock;
use crate::engine::worker::OnDrop;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// How often who waits without a session of its own looks although it has heard nothing: holders that die say nothing.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long a cancelled wait may take to end, at each of several tries.
const CANCEL_PATIENCE: Duration = Duration::from_millis(50);
const CANCEL_TRIES: u32 = 5;
const CANCEL_WITHIN: Duration = Duration::from_secs(2);

/// A claim that may have something on the server.
pub(super) struct Entry<S: Server> {
    stage: Mutex<Stage<S>>,
    changed: Notify,
    /// What keeps the place of one that waits.
    waiting: Mutex<Option<Waiting<S>>>,
    /// Once it is being abandoned: when that is given up at the latest.
    given_up_at: Mutex<Option<Instant>>,
}

enum Stage<S: Server> {
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

type Slot = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// The place of a claim that has no session of its own yet.
struct Waiting<S: Server> {
    /// Its place in the line for one.
    slot: Option<Slot>,
    listening: Listening<S::Key>,
    /// Where releases are heard for it.
    announced: Option<User<S::Connection>>,
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

    /// Whether it was abandoned so long ago that nobody comes for what is left of it.
    pub(super) fn is_given_up(&self) -> bool {
        lock(&self.given_up_at).is_some_and(Instant::has_passed)
    }

    fn set(&self, stage: Stage<S>) {
        let before = std::mem::replace(&mut *lock(&self.stage), stage);
        drop(before); // with the stage unlocked
        self.changed.notify_waiters();
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

fn stopped() -> Error {
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

    /// [`Backend::abandon`](crate::backend::Backend::abandon).
    pub(crate) async fn abandon(&self, claim: &Claim) -> Result<()> {
        let pool = &self.0;
        let Some(entry) = lock(&pool.claims).get(&claim.owner).cloned() else { return Ok(()) };
        lock(&entry.given_up_at).get_or_insert_with(|| Instant::now() + claim.ttl * 2);
        self.clear_up(claim, &entry).await?;
        let waiting = lock(&entry.waiting).take();
        withdraw(waiting).await;
        lock(&pool.claims).remove(&claim.owner);
        Ok(())
    }

    /// Leaves nothing of the claim's requests on the server.
    async fn clear_up(&self, claim: &Claim, entry: &Arc<Entry<S>>) -> Result<()> {
        enum Step<S: Server> {
            Await(Arc<LockSession<S::Connection>>),
            Cancel(Arc<LockSession<S::Connection>>, Instant),
            Release(SessionHold<S>),
            Terminate(Arc<LockSession<S::Connection>>),
        }
        loop {
            let mut changed = std::pin::pin!(entry.changed.notified());
            changed.as_mut().enable();
            let step = match &mut *lock(&entry.stage) {
                Stage::Nothing | Stage::Failed(_) => return Ok(()),
                Stage::Asking(session) => Step::Await(session.clone()),
                Stage::Blocked { session, cancelled_at } => {
                    let since = *cancelled_at.get_or_insert_with(Instant::now);
                    Step::Cancel(session.clone(), since)
                }
                Stage::Granted(hold, _) => Step::Release(hold.clone()),
                Stage::Broken(session, _) => Step::Terminate(session.clone()),
            };
            match step {
                Step::Await(session) => {
                    let in_time = tokio::time::timeout(DOUBT_AFTER, changed).await;
                    // Nobody drives it, so that it can't be waited for; nor can its guards be kept.
                    if in_time.is_err() && session.is_silent() {
                        session.break_off();
                        entry.set(Stage::Broken(session, stopped()));
                    }
                }
                Step::Cancel(session, since) => self.cancel(claim.ttl, &session, since, entry).await,
                Step::Release(hold) => {
                    match hold.release(self).await {
                        // It was lost, and is free.
                        Err(error) if error.kind() != ErrorKind::Lost => return Err(error),
                        Ok(_) | Err(_) => entry.set(Stage::Nothing),
                    }
                }
                Step::Terminate(session) => {
                    self.0.terminate(&session).await?;
                    entry.set(Stage::Nothing);
                }
            }
        }
    }

    /// Breaks off the wait of a claim. It has come to something when this returns.
    async fn cancel(
        &self,
        ttl: Duration,
        session: &Arc<LockSession<S::Connection>>,
        since: Instant,
        entry: &Entry<S>,
    ) {
        for tries in 0..CANCEL_TRIES {
            // Each call may be dropped and be followed by another.
            if since.elapsed() > CANCEL_WITHIN {
                break;
            }
            let mut changed = std::pin::pin!(entry.changed.notified());
            changed.as_mut().enable();
            if !matches!(&*lock(&entry.stage), Stage::Blocked { .. }) {
                return;
            }
            let patience = CANCEL_PATIENCE * 2u32.pow(tries);
            let cancel = async {
                let helper = self.0.helper(ttl).await?;
                let (runtime, waiting) = (helper.user().runtime.clone(), session.clone());
                waiting.cancel_begins();
                let ends = OnDrop(Some({
                    let waiting = waiting.clone();
                    move || waiting.cancel_ends()
                }));
                Carried::new(&runtime, async move {
                    let other = helper.user();
                    let cancelled = other.request(other.connection.cancel(&waiting.connection)).await;
                    if cancelled.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unknown) {
                        waiting.break_off(); // it may arrive at any time
                    }
                    drop(ends);
                    cancelled
                })
                .await
            };
            // Sent before the wait had reached the server, it has done nothing: then it is sent again.
            match tokio::time::timeout(patience, cancel).await {
                Ok(Err(error)) if !error.is_retryable() => break, // such as a right that is missing
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => continue,
            }
            if tokio::time::timeout(patience, changed).await.is_ok() {
                return;
            }
        }
        session.break_off();
        let mut changed = std::pin::pin!(entry.changed.notified());
        changed.as_mut().enable();
        if matches!(&*lock(&entry.stage), Stage::Blocked { .. }) {
            changed.await;
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

fn busy<H>(retry_after: Option<Duration>) -> Outcome<H> {
    Outcome::Busy { retry_after }
}

type Got<S> = Option<(SessionHold<S>, FencingToken)>;

impl<S: Server> Pool<S> {
    fn note(&self, owner: OwnerId, entry: &Arc<Entry<S>>) {
        lock(&self.claims).entry(owner).or_insert_with(|| entry.clone());
    }

    /// Forgets claims that nobody will abandon any more. What they hold is unlocked with that.
    pub(super) fn sweep(&self) {
        let given_up: Vec<_> = lock(&self.claims).extract_if(|_, entry| entry.is_given_up()).collect();
        drop(given_up); // with the map unlocked
    }

    fn forget(&self, owner: OwnerId) {
        lock(&self.claims).remove(&owner);
    }

    /// One attempt. Unless the claim waits besides, nothing is known of it afterwards but what is to be abandoned.
    async fn try_once(
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
        let ask = {
            async move {
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
            }
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
                let nap = until.remaining().min(LOOK_EVERY / 2 + jitter(LOOK_EVERY / 2));
                tokio::time::sleep(nap).await;
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
    async fn fails(&self, claim: &Claim, entry: &Entry<S>, error: Error) -> Error {
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

    /// Waits without a session: for one, or for a release that gives a try a chance.
    async fn wait_in_line(
        self: &Arc<Self>,
        claim: &Claim,
        occupied: Occupied<S>,
        entry: &Arc<Entry<S>>,
        until: Instant,
    ) -> Result<Lined<S>> {
        let key = occupied.key().clone();
        if let Err(error) = self.announce(claim, &key, entry).await {
            return Err(self.fails(claim, entry, error).await);
        }
        match self.try_once(claim, occupied, entry, false).await {
            Ok(Some((hold, token))) => return Ok(Lined::Granted(hold, token)),
            Ok(None) => {}
            Err(error) => return Err(self.fails(claim, entry, error).await),
        }
        // If this is dropped while it waits, its place in line is lost, and nothing else.
        let Some((mut slot, heard)) = lock(&entry.waiting).as_mut().map(|waiting| {
            let slot = waiting.slot.take();
            let slot = slot.unwrap_or_else(|| Box::pin(self.slots.clone().acquire_owned()));
            (slot, waiting.listening.heard())
        }) else {
            return Ok(Lined::Again);
        };
        let nap = until.remaining().min(LOOK_EVERY / 2 + jitter(LOOK_EVERY / 2));
        let granted = tokio::select! {
            biased;
            slot = &mut slot => slot.ok(),
            () = heard.notified() => None,
            () = tokio::time::sleep(nap) => None,
        };
        if let Some(granted) = granted {
            // Its own session blocks, which a try of the same claim must not disturb.
            return Ok(match self.occupy(&key, claim.owner) {
                Some(occupied) => Lined::Slot(occupied, granted),
                None => Lined::Again,
            });
        }
        if let Some(waiting) = lock(&entry.waiting).as_mut() {
            waiting.slot = Some(slot);
        }
        Ok(if until.has_passed() { Lined::TimeIsUp } else { Lined::Again })
    }

    /// Sees to it that releases of the lock are heard for this claim.
    async fn announce(self: &Arc<Self>, claim: &Claim, key: &S::Key, entry: &Arc<Entry<S>>) -> Result<()> {
        let is_heard =
            |waiting: &Waiting<S>| waiting.announced.as_ref().is_some_and(|user| user.ended().is_none());
        if !self.server.shares() || lock(&entry.waiting).as_ref().is_some_and(is_heard) {
            lock(&entry.waiting).get_or_insert_with(|| Waiting {
                slot: None,
                listening: self.listeners.listen(key),
                announced: None,
            });
            return Ok(());
        }
        let user = self.shared(claim.ttl).await?;
        let runtime = user.runtime.clone();
        // Noted before it is sent, so that an announcement of which nobody has heard is withdrawn, too.
        let slot = lock(&entry.waiting).take().and_then(|waiting| waiting.slot);
        *lock(&entry.waiting) =
            Some(Waiting { slot, listening: self.listeners.listen(key), announced: Some(user.clone()) });
        let key = key.clone();
        let announce = async move { user.request(user.connection.announce(&key)).await };
        if let Err(error) = Carried::new(&runtime, announce).await {
            tracing::debug!(%error, "a release may not be heard: the lock is looked at instead"); // twice a second
        }
        Ok(())
    }
}

/// What waiting in line came to.
enum Lined<S: Server> {
    Granted(SessionHold<S>, FencingToken),
    Slot(Occupied<S>, OwnedSemaphorePermit),
    Again,
    TimeIsUp,
}

/// Lets the server tell nobody of releases that nobody waits for any more.
async fn withdraw<S: Server>(waiting: Option<Waiting<S>>) {
    if let Some(withdraw) = withdrawal(waiting) {
        withdraw.await;
    }
}

fn withdraw_in_background<S: Server>(waiting: Option<Waiting<S>>) {
    drop(withdrawal(waiting)); // it is carried to its end
}

fn withdrawal<S: Server>(waiting: Option<Waiting<S>>) -> Option<Carried<()>> {
    let Waiting { announced, listening, .. } = waiting?;
    let (user, key) = (announced?, listening.key().clone());
    let runtime = user.runtime.clone();
    Some(Carried::new(&runtime, async move {
        if let Err(error) = user.request(user.connection.withdraw(&key)).await {
            tracing::debug!(%error, "a waiter's announcement stays until its session ends");
        }
    }))
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
    let cancelled = || matches!(&*lock(&entry.stage), Stage::Blocked { cancelled_at: Some(_), .. });
    user.block();
    let sent = Instant::now();
    let mut answer = user.request(user.connection.lock(occupied.key())).await;
    if answer.is_ok() && !cancelled() {
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
        Ok(token) if !cancelled() => {
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
                        Err(error) if !cancelled() => Stage::Failed(error),
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
