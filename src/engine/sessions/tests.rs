//! The sessions over a server in memory that counts what each session holds and is told when to fail.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

use super::{Connection, Ended, Listeners, Role, Server, SessionHold, Sessions};
use crate::backend::{Backend, Claim, Due, Grant, Mode, Outcome, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::Provider;
use crate::engine::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;
use crate::guard::LockGuard;
use crate::lock::LockProvider;
use crate::name::LockName;
use crate::options::LockOptions;

type Key = String;

const TTL: Duration = Duration::from_secs(3);

/// What a session is asked.
#[derive(Clone, Debug)]
enum Ask {
    TryLock(Key),
    Lock(Key),
    Unlock(Key),
    Token(Key),
    Beat,
    SetTtl(Duration),
    Clear,
    Cancel(u64),
    HasAnswered(u64),
    Terminate(u64),
    Announce(Key),
    Withdraw(Key),
}

#[derive(Clone, Copy, Debug)]
enum Told {
    Token(u64),
    Yes,
    No,
}

type Request = (Ask, oneshot::Sender<Result<Told>>);

/// How often, of a thousand requests, what goes wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Troubles {
    refused: u32,
    /// Carried out, but the connection is lost before the answer.
    unanswered: u32,
    killed: u32,
    not_opened: u32,
    /// A cancelled wait that has been granted all the same.
    granted_and_cancelled: u32,
}

/// The server.
struct Fake(Mutex<State>);

struct State {
    sessions: HashMap<u64, OnServer>,
    locks: HashMap<Key, Row>,
    /// By session and key, how many announcements.
    announced: HashMap<(u64, Key), u32>,
    /// By token, the session that it was drawn on.
    drawn: HashMap<u64, u64>,
    last: u64,
    random: u64,
    troubles: Troubles,
    /// The next request of this kind fails.
    refuse: Option<fn(&Ask) -> bool>,
    /// The next request of this kind is carried out, and its connection lost.
    lose: Option<fn(&Ask) -> bool>,
    asked: Vec<(u64, Ask)>,
    opened: usize,
    wrong: Vec<String>,
    latency: Duration,
    /// How long it takes to open a session at least.
    opening: Duration,
}

struct OnServer {
    ttl: Duration,
    busy: bool,
    waits_for: Option<Key>,
    cancelled: bool,
    /// Whoever was there doesn't show: nobody will hang up.
    lost: bool,
    poke: Arc<Notify>,
    over: Arc<watch::Sender<Option<Ended>>>,
    listeners: Arc<Listeners<Key>>,
}

#[derive(Default)]
struct Row {
    holder: Option<u64>,
    token: u64,
    queue: VecDeque<u64>,
}

impl State {
    fn random(&mut self, below: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        u32::try_from((self.random >> 16) % u64::from(below.max(1))).unwrap_or(0)
    }

    fn happens(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.random(1000) < per_mille
    }

    fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    fn draw(&mut self, session: u64, key: &Key) -> u64 {
        self.last += 1;
        self.drawn.insert(self.last, session);
        self.locks.entry(key.clone()).or_default().token = self.last;
        self.last
    }

    fn free(&mut self, key: &Key) {
        let Some(row) = self.locks.get_mut(key) else { return };
        row.holder = row.queue.pop_front();
        if let Some(next) = row.holder {
            self.sessions[&next].poke.notify_one();
        }
    }

    fn held_by(&self, session: u64) -> Vec<Key> {
        let mut held: Vec<_> = self
            .locks
            .iter()
            .filter(|(_, row)| row.holder == Some(session))
            .map(|(key, _)| key.clone())
            .collect();
        held.sort();
        held
    }

    fn end(&mut self, session: u64, how: Ended) {
        let Some(ended) = self.sessions.remove(&session) else { return };
        for row in self.locks.values_mut() {
            row.queue.retain(|waits| *waits != session);
        }
        for key in self.held_by(session) {
            self.free(&key);
        }
        self.announced.retain(|(whose, _), _| *whose != session);
        if !ended.lost {
            ended.over.send_if_modified(|over| over.is_none() && over.replace(how).is_none());
        }
        ended.poke.notify_one();
    }

    fn wake(&self, key: &Key) {
        for (session, announced) in self.announced.keys() {
            if announced == key && !self.sessions[session].lost {
                self.sessions[session].listeners.wake(key);
            }
        }
    }

    /// Carries out what doesn't wait.
    fn carry_out(&mut self, session: u64, ask: &Ask) -> Told {
        match ask {
            Ask::TryLock(key) => {
                let row = self.locks.entry(key.clone()).or_default();
                if row.holder == Some(session) {
                    self.wrong(format!("{key} was granted twice on session {session}"));
                    return Told::No;
                }
                if row.holder.is_some() {
                    return Told::No;
                }
                row.holder = Some(session);
                Told::Token(self.draw(session, key))
            }
            Ask::Unlock(key) => {
                if self.locks.get(key).and_then(|row| row.holder) != Some(session) {
                    self.wrong(format!("session {session} unlocked {key}, which it didn't hold"));
                    return Told::No;
                }
                self.free(key);
                self.wake(key);
                Told::Yes
            }
            Ask::Token(key) => {
                if self.locks.get(key).and_then(|row| row.holder) != Some(session) {
                    self.wrong(format!("session {session} drew a token for {key}, which it didn't hold"));
                }
                Told::Token(self.draw(session, key))
            }
            Ask::SetTtl(ttl) => {
                if !self.held_by(session).is_empty() {
                    self.wrong(format!("session {session} got another TTL while it held something"));
                }
                if let Some(on_server) = self.sessions.get_mut(&session) {
                    on_server.ttl = *ttl;
                }
                Told::Yes
            }
            Ask::Clear => {
                for key in self.held_by(session) {
                    self.free(&key);
                    self.wake(&key);
                }
                Told::Yes
            }
            Ask::Cancel(other) => {
                if let Some(other) = self.sessions.get_mut(other)
                    && (other.busy || other.waits_for.is_some())
                {
                    other.cancelled = true;
                    other.poke.notify_one();
                }
                Told::Yes
            }
            Ask::HasAnswered(other) => {
                let works = |session: &OnServer| session.busy || session.waits_for.is_some();
                if self.sessions.get(other).is_some_and(works) { Told::No } else { Told::Yes }
            }
            Ask::Terminate(other) => {
                self.end(*other, Ended::ByServer);
                Told::Yes
            }
            Ask::Announce(key) => {
                *self.announced.entry((session, key.clone())).or_default() += 1;
                Told::Yes
            }
            Ask::Withdraw(key) => {
                let count = self.announced.entry((session, key.clone())).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.announced.remove(&(session, key.clone()));
                }
                Told::Yes
            }
            Ask::Beat | Ask::Lock(_) => Told::Yes,
        }
    }
}

fn refused(message: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, message)
}

impl Fake {
    fn new(seed: u64, troubles: Troubles) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            sessions: HashMap::new(),
            locks: HashMap::new(),
            announced: HashMap::new(),
            drawn: HashMap::new(),
            last: 0,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            troubles,
            refuse: None,
            lose: None,
            asked: Vec::new(),
            opened: 0,
            wrong: Vec::new(),
            latency: Duration::from_millis(1),
            opening: Duration::ZERO,
        })))
    }

    fn reliable() -> Arc<Self> {
        Self::new(1, Troubles::default())
    }

    fn state<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut lock(&self.0))
    }

    fn random(&self, below: u32) -> u32 {
        self.state(|state| state.random(below))
    }

    fn asked(&self, which: impl Fn(&Ask) -> bool) -> usize {
        self.state(|state| state.asked.iter().filter(|(_, ask)| which(ask)).count())
    }

    fn is_held(&self, key: &str) -> bool {
        self.state(|state| state.locks.get(key).is_some_and(|row| row.holder.is_some()))
    }

    fn waits(&self, key: &str) -> usize {
        self.state(|state| state.locks.get(key).map_or(0, |row| row.queue.len()))
    }

    fn sessions(&self) -> usize {
        self.state(|state| state.sessions.len())
    }

    /// The session that this token was drawn on.
    fn session_of(&self, guard: &LockGuard) -> u64 {
        self.state(|state| state.drawn[&guard.fencing_token().get()])
    }

    /// A guard that isn't lost has its lock, unless its session has just ended before its deadline.
    fn check(&self, guard: &LockGuard) {
        let token = guard.fencing_token().get();
        if guard.is_lost() {
            return;
        }
        self.state(|state| {
            let session = state.drawn[&token];
            let row = &state.locks[guard.name()];
            if state.sessions.contains_key(&session) && (row.holder != Some(session) || row.token != token) {
                let what = format!("a guard of {} whose lock somebody else has", guard.name());
                state.wrong(what);
            }
        });
    }

    /// One session's part of the server.
    async fn serve(
        self: Arc<Self>,
        session: u64,
        mut requests: mpsc::UnboundedReceiver<Request>,
        poke: Arc<Notify>,
    ) {
        loop {
            let Some(ttl) = self.state(|state| state.sessions.get(&session).map(|session| session.ttl))
            else {
                return;
            };
            let request = tokio::select! {
                biased;
                () = poke.notified() => continue,
                request = timeout(ttl, requests.recv()) => request,
            };
            let Ok(request) = request else {
                return self.state(|state| state.end(session, Ended::ByServer)); // idle for too long
            };
            let Some((ask, answer)) = request else {
                if self.state(|state| state.sessions.get(&session).is_some_and(|session| session.lost)) {
                    sleep(ttl).await; // nobody hangs up on a connection that is lost
                }
                return self.state(|state| state.end(session, Ended::Somehow));
            };
            let told = self.carry_out(session, &ask, &poke).await;
            let lost = self.state(|state| {
                let unanswered = state.troubles.unanswered;
                let wanted = state.lose.is_some_and(|lose| lose(&ask)) && state.lose.take().is_some();
                let happens = wanted || state.happens(unanswered);
                match state.sessions.get_mut(&session) {
                    None => true,
                    Some(on_server) if happens || on_server.lost => {
                        on_server.lost = true;
                        on_server.over.send_if_modified(|over| {
                            over.is_none() && over.replace(Ended::Somehow).is_none()
                        });
                        true
                    }
                    Some(on_server) => {
                        on_server.busy = false;
                        false
                    }
                }
            });
            if !lost {
                drop(answer.send(told));
            }
        }
    }

    async fn carry_out(&self, session: u64, ask: &Ask, poke: &Notify) -> Result<Told> {
        let latency = self.state(|state| {
            if let Some(on_server) = state.sessions.get_mut(&session) {
                (on_server.busy, on_server.cancelled) = (true, false);
            }
            state.asked.push((session, ask.clone()));
            state.latency * state.random(4)
        });
        sleep(latency).await;
        let gone = || refused("the session is gone");
        let waits = self.state(|state| {
            let Troubles { refused: refuse, killed, .. } = state.troubles;
            let cancelled = state.sessions.get(&session).ok_or_else(gone)?.cancelled;
            if state.happens(killed) {
                state.end(session, Ended::ByServer);
                return Err(gone());
            }
            let wanted = state.refuse.is_some_and(|refuse| refuse(ask)) && state.refuse.take().is_some();
            if wanted || cancelled || (!matches!(ask, Ask::Withdraw(_)) && state.happens(refuse)) {
                return Err(refused("refused or cancelled"));
            }
            let Ask::Lock(key) = ask else { return Ok(None) };
            let row = state.locks.entry(key.clone()).or_default();
            if row.holder == Some(session) {
                state.wrong(format!("{key} was awaited on session {session}, which held it"));
            } else if row.holder.is_some() {
                row.queue.push_back(session);
            } else {
                row.holder = Some(session);
            }
            if let Some(on_server) = state.sessions.get_mut(&session) {
                on_server.waits_for = Some(key.clone());
            }
            Ok(Some(key.clone()))
        })?;
        let Some(key) = waits else {
            return Ok(self.state(|state| state.carry_out(session, ask)));
        };
        loop {
            let come_to = self.state(|state| {
                let on_server = state.sessions.get(&session)?;
                let (cancelled, holds) = (on_server.cancelled, state.locks[&key].holder == Some(session));
                let late = state.troubles.granted_and_cancelled;
                if holds && !(cancelled && state.happens(late)) {
                    return Some(Some(Ok(Told::Token(state.draw(session, &key)))));
                }
                if cancelled {
                    state.locks.get_mut(&key)?.queue.retain(|waits| *waits != session);
                    return Some(Some(Err(refused("the wait was cancelled"))));
                }
                Some(None)
            });
            match come_to {
                None => return Err(gone()),
                Some(None) => poke.notified().await,
                Some(Some(told)) => {
                    self.state(|state| {
                        if let Some(on_server) = state.sessions.get_mut(&session) {
                            on_server.waits_for = None;
                        }
                    });
                    return told;
                }
            }
        }
    }
}

/// The server as one provider reaches it.
struct Reached {
    fake: Arc<Fake>,
    shares: bool,
}

struct FakeConnection {
    fake: Arc<Fake>,
    session: u64,
    requests: Mutex<Option<mpsc::UnboundedSender<Request>>>,
    over: Arc<watch::Sender<Option<Ended>>>,
}

impl Server for Reached {
    type Key = Key;
    type Connection = FakeConnection;

    fn shares(&self) -> bool {
        self.shares
    }

    async fn open(&self, _: Role, ttl: Duration, listeners: &Arc<Listeners<Key>>) -> Result<FakeConnection> {
        let opening = self.fake.state(|state| state.opening);
        sleep(opening + Duration::from_millis(u64::from(self.fake.random(5)))).await;
        let fake = self.fake.clone();
        let (requests, received) = mpsc::unbounded_channel();
        let (over, poke) = (Arc::new(watch::channel(None).0), Arc::new(Notify::new()));
        let opened = fake.state(|state| {
            if state.happens(state.troubles.not_opened) {
                return Err(refused("no connection today"));
            }
            state.opened += 1;
            let session = u64::try_from(state.opened).expect("few");
            let on_server = OnServer {
                ttl,
                busy: false,
                waits_for: None,
                cancelled: false,
                lost: false,
                poke: poke.clone(),
                over: over.clone(),
                listeners: listeners.clone(),
            };
            state.sessions.insert(session, on_server);
            Ok(session)
        });
        let session = opened?;
        tokio::spawn(fake.clone().serve(session, received, poke));
        Ok(FakeConnection { fake, session, requests: Mutex::new(Some(requests)), over })
    }
}

impl FakeConnection {
    async fn ask(&self, ask: Ask) -> Result<Told> {
        let (answer, answered) = oneshot::channel();
        let sent = lock(&self.requests).as_ref().is_some_and(|requests| requests.send((ask, answer)).is_ok());
        let mut over = self.over.subscribe();
        if sent {
            tokio::select! {
                biased;
                Ok(told) = answered => return told,
                _ = over.wait_for(Option::is_some) => {}
            }
        }
        Err(match *self.over.borrow() {
            Some(Ended::ByServer) => refused("the server has ended the session"),
            _ => Error::new(ErrorKind::Unknown, "the connection is lost"),
        })
    }

    async fn token_of(&self, ask: Ask) -> Result<Option<FencingToken>> {
        Ok(match self.ask(ask).await? {
            Told::Token(token) => FencingToken::new(token),
            Told::Yes | Told::No => None,
        })
    }
}

impl Connection for FakeConnection {
    type Key = Key;

    async fn try_lock(&self, key: &Key) -> Result<Option<FencingToken>> {
        self.token_of(Ask::TryLock(key.clone())).await
    }

    async fn lock(&self, key: &Key) -> Result<FencingToken> {
        Ok(self.token_of(Ask::Lock(key.clone())).await?.expect("a token"))
    }

    async fn unlock(&self, key: &Key) -> Result<bool> {
        Ok(matches!(self.ask(Ask::Unlock(key.clone())).await?, Told::Yes))
    }

    async fn token(&self, key: &Key) -> Result<FencingToken> {
        Ok(self.token_of(Ask::Token(key.clone())).await?.expect("a token"))
    }

    async fn beat(&self) -> Result<()> {
        self.ask(Ask::Beat).await.map(drop)
    }

    async fn set_ttl(&self, ttl: Duration) -> Result<()> {
        self.ask(Ask::SetTtl(ttl)).await.map(drop)
    }

    async fn clear(&self) -> Result<()> {
        self.ask(Ask::Clear).await.map(drop)
    }

    async fn cancel(&self, waiting: &Self) -> Result<()> {
        self.ask(Ask::Cancel(waiting.session)).await.map(drop)
    }

    async fn has_answered(&self, other: &Self) -> Result<bool> {
        Ok(matches!(self.ask(Ask::HasAnswered(other.session)).await?, Told::Yes))
    }

    async fn terminate(&self, other: &Self) -> Result<()> {
        self.ask(Ask::Terminate(other.session)).await.map(drop)
    }

    async fn announce(&self, key: &Key) -> Result<()> {
        self.ask(Ask::Announce(key.clone())).await.map(drop)
    }

    async fn withdraw(&self, key: &Key) -> Result<()> {
        self.ask(Ask::Withdraw(key.clone())).await.map(drop)
    }

    fn is_over(&self) -> Option<Ended> {
        *self.over.borrow()
    }

    fn closed(&self) -> impl Future<Output = Ended> + Send + 'static {
        let mut over = self.over.subscribe();
        async move {
            let ended = over.wait_for(Option::is_some).await;
            ended.ok().and_then(|ended| *ended).unwrap_or(Ended::Somehow)
        }
    }

    fn break_off(&self) {
        self.over.send_if_modified(|over| over.is_none() && over.replace(Ended::Somehow).is_none());
        drop(lock(&self.requests).take());
        // A server that waits notices a client that has hung up, too.
        self.fake.state(|state| {
            let waits = |session: &OnServer| session.waits_for.is_some() && !session.lost;
            if state.sessions.get(&self.session).is_some_and(waits) {
                state.end(self.session, Ended::Somehow);
            }
        });
    }

    async fn close(&self) {
        self.fake.state(|state| {
            let held = state.held_by(self.session);
            if !held.is_empty() {
                state.wrong(format!("session {} was closed although it held {held:?}", self.session));
            }
        });
        self.break_off();
    }
}

/// A backend made of sessions only.
struct Locks {
    sessions: Sessions<Reached>,
    own: usize,
}

#[derive(Debug)]
struct Hold(SessionHold<Reached>);

impl Backend for Locks {
    type Hold = Hold;

    fn capabilities(&self) -> Capabilities {
        let fairness = if self.own > 0 { Fairness::Fifo } else { Fairness::None };
        Capabilities::new(Duration::from_millis(200), Duration::from_secs(3600), Expiry::SessionOrTtl)
            .wakes_waiters(true)
            .fairness(fairness)
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<Hold>> {
        Ok(self.sessions.try_claim(claim, &claim.name.as_str().to_owned(), wait).await?.map(Hold))
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        self.sessions.abandon(claim).await
    }

    async fn renew(&self, due: &[Due<'_, Hold>]) -> Vec<Renewal> {
        let due: Vec<_> = due.iter().map(|due| Due { hold: &due.hold.0, ttl: due.ttl }).collect();
        self.sessions.renew(&due).await
    }

    async fn release(&self, hold: &Hold, _: Duration) -> Result<Released> {
        self.sessions.release(&hold.0).await
    }

    async fn transfer(&self, hold: &Hold, to: &Claim) -> Result<Option<Grant<Hold>>> {
        Ok(self.sessions.transfer(&hold.0, to).await?.map(|grant| grant.map(Hold)))
    }

    async fn close(&self) -> Result<()> {
        self.sessions.close().await;
        Ok(())
    }
}

impl fmt::Debug for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reached")
    }
}

impl fmt::Debug for FakeConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakeConnection({})", self.session)
    }
}

impl fmt::Debug for Locks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.sessions, f)
    }
}

fn sessions(fake: &Arc<Fake>, own: usize, shares: bool) -> Sessions<Reached> {
    Sessions::new(Reached { fake: fake.clone(), shares }, own)
}

fn provider_of(fake: &Arc<Fake>, own: usize, shares: bool, ttl: Duration) -> Provider<Locks> {
    let options = LockOptions::new().ttl(ttl);
    let locks = Locks { sessions: sessions(fake, own, shares), own };
    Provider::builder(locks).options(options).build().expect("options that can be")
}

fn provider(fake: &Arc<Fake>, own: usize) -> Provider<Locks> {
    provider_of(fake, own, true, TTL)
}

fn claim_of(name: &str) -> Claim {
    Claim::new(LockName::new(name), Mode::Exclusive, TTL).expect("random numbers")
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waited = timeout(Duration::from_secs(60), async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "not within a minute: {what}");
}

/// Everything that these have taken is given back.
async fn comes_to_rest(fake: &Arc<Fake>, providers: &[Provider<Locks>], names: &[&str]) {
    for provider in providers {
        let Locks { sessions, own } = provider.backend();
        eventually("no claim is left", || lock(&sessions.0.claims).is_empty()).await;
        eventually("all slots are back", || sessions.0.slots.available_permits() == *own).await;
        for name in names {
            let owner = claim_of(name).owner;
            eventually("no key is occupied", || sessions.0.occupy(&(*name).to_owned(), owner).is_some())
                .await;
        }
    }
    for name in names {
        eventually("nothing is held", || !fake.is_held(name) && fake.waits(name) == 0).await;
    }
    eventually("nothing is announced", || fake.state(|state| state.announced.is_empty())).await;
    assert_eq!(fake.state(|state| std::mem::take(&mut state.wrong)), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn locks_of_a_ttl_share_a_session_and_those_of_another_do_not() {
    let fake = Fake::reliable();
    let provider = provider(&fake, 1);
    let mut guards = Vec::new();
    for name in ["a", "b", "c"] {
        guards.push(provider.create_lock(name).acquire().await.unwrap());
    }
    let other = LockOptions::new().ttl(TTL * 2);
    guards.push(provider.create_lock_with("d", other).acquire().await.unwrap());
    assert_eq!(fake.sessions(), 2);
    sleep(TTL * 4).await;
    assert!(guards.iter().all(|guard| !guard.is_lost()), "heartbeats keep both");
    for guard in guards {
        guard.release().await.unwrap();
    }
    comes_to_rest(&fake, &[provider], &["a", "b", "c", "d"]).await;
    sleep(Duration::from_secs(40)).await;
    assert_eq!(fake.sessions(), 0, "nobody has needed them for a while, or ever will");
}

#[tokio::test(start_paused = true)]
async fn who_waits_blocks_on_a_session_of_its_own_for_as_long_as_it_takes() {
    let fake = Fake::reliable();
    let (holder, waiter) = (provider(&fake, 1), provider(&fake, 1));
    let guard = holder.create_lock("a").acquire().await.unwrap();
    let lock = waiter.create_lock("a");
    let waits = tokio::spawn(async move { lock.acquire().await });
    sleep(TTL * 20).await;
    assert_eq!(fake.asked(|ask| matches!(ask, Ask::Lock(_))), 1);
    guard.release().await.unwrap();
    let guard = waits.await.unwrap().unwrap();
    fake.check(&guard);
    sleep(TTL * 2).await;
    assert!(!guard.is_lost());
    guard.release().await.unwrap();
    comes_to_rest(&fake, &[holder, waiter], &["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn whoever_finds_no_session_of_its_own_hears_of_the_release() {
    let fake = Fake::reliable();
    let (holder, waiter) = (provider(&fake, 0), provider(&fake, 0));
    let guard = holder.create_lock("a").acquire().await.unwrap();
    let lock = waiter.create_lock("a");
    let waits = tokio::spawn(async move { lock.acquire().await });
    eventually("it is announced", || fake.state(|state| state.announced.len() == 1)).await;
    sleep(Duration::from_millis(5)).await;
    let released = tokio::time::Instant::now();
    guard.release().await.unwrap();
    let guard = waits.await.unwrap().unwrap();
    assert!(released.elapsed() < Duration::from_millis(100), "not only by looking: {:?}", released.elapsed());
    guard.release().await.unwrap();
    comes_to_rest(&fake, &[holder, waiter], &["a"]).await;
}

/// Two wait for one session of their own, in the order in which they came.
#[tokio::test(start_paused = true)]
async fn sessions_are_given_to_those_who_came_first() {
    let fake = Fake::reliable();
    let (holder, waiter) = (provider(&fake, 0), provider(&fake, 1));
    let names = ["a", "b", "c"];
    let mut guards = Vec::new();
    for name in names {
        guards.push(holder.create_lock(name).acquire().await.unwrap());
    }
    let mut waiting = Vec::new();
    for name in names {
        let lock = waiter.create_lock(name);
        waiting.push(tokio::spawn(async move { lock.acquire().await }));
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(names.map(|name| fake.waits(name)), [1, 0, 0]);
    waiting.remove(0).abort();
    eventually("the next one waits", || names.map(|name| fake.waits(name)) == [0, 1, 0]).await;
    for guard in guards {
        guard.release().await.unwrap();
    }
    for waits in waiting {
        waits.await.unwrap().unwrap().release().await.unwrap();
    }
    comes_to_rest(&fake, &[holder, waiter], &names).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_locks_share_nothing_has_own_sessions_only() {
    let fake = Fake::reliable();
    let providers = [provider_of(&fake, 1, false, TTL), provider_of(&fake, 1, false, TTL)];
    let [a, b] = ["a", "b"].map(|name| providers[0].create_lock(name));
    let (a, b) = (a.acquire().await.unwrap(), b.acquire().await.unwrap());
    assert_ne!(fake.session_of(&a), fake.session_of(&b));
    let lock = providers[1].create_lock("a");
    let waits = tokio::spawn(async move { lock.acquire().await });
    sleep(TTL * 2).await;
    a.release().await.unwrap();
    waits.await.unwrap().unwrap().release().await.unwrap();
    b.release().await.unwrap();
    comes_to_rest(&fake, &providers, &["a", "b"]).await;
}

/// A try and an unlock that nobody waits for any more go on, and nothing is left of them.
#[tokio::test(start_paused = true)]
async fn what_is_dropped_at_any_time_leaves_nothing() {
    for after in 0..40 {
        let fake = Fake::reliable();
        fake.state(|state| state.latency = Duration::from_millis(3));
        let providers = [provider(&fake, 1), provider(&fake, 0), provider(&fake, 1)];
        let held = providers[2].create_lock("a").acquire().await.unwrap();
        for provider in &providers[..2] {
            let lock = provider.create_lock("a");
            drop(timeout(Duration::from_millis(after), lock.acquire()).await);
        }
        drop(timeout(Duration::from_millis(after % 10), held.release()).await);
        comes_to_rest(&fake, &providers, &["a"]).await;
        let lock = providers[1].create_lock("a");
        drop(timeout(Duration::from_millis(after), lock.try_acquire()).await);
        comes_to_rest(&fake, &providers, &["a"]).await;
        let granted = fake.state(|state| usize::try_from(state.last).expect("few"));
        assert!(fake.asked(|ask| matches!(ask, Ask::Unlock(_) | Ask::Clear)) <= granted + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unlock_that_is_not_answered_costs_the_session_and_is_not_repeated() {
    let fake = Fake::reliable();
    let provider = provider(&fake, 1);
    let (a, b) = (
        provider.create_lock("a").acquire().await.unwrap(),
        provider.create_lock("b").acquire().await.unwrap(),
    );
    fake.state(|state| state.lose = Some(|ask| matches!(ask, Ask::Unlock(_))));
    a.release().await.unwrap();
    assert!(b.is_lost());
    assert_eq!(fake.asked(|ask| matches!(ask, Ask::Unlock(_))), 1);
    assert_eq!(fake.asked(|ask| matches!(ask, Ask::Terminate(_))), 1);
    assert!(!fake.is_held("b"), "its session has been ended on the server");
    drop(b);
    comes_to_rest(&fake, &[provider], &["a", "b"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_try_that_is_not_answered_is_taken_back_with_its_session() {
    let fake = Fake::reliable();
    let provider = provider(&fake, 1);
    fake.state(|state| state.lose = Some(|ask| matches!(ask, Ask::TryLock(_))));
    let guard = provider.create_lock("a").acquire().await.unwrap();
    fake.check(&guard);
    assert_eq!(fake.asked(|ask| matches!(ask, Ask::Terminate(_))), 1);
    guard.release().await.unwrap();
    comes_to_rest(&fake, &[provider], &["a"]).await;
}

/// One whose waiter has left just then costs nobody else their lock.
#[tokio::test(start_paused = true)]
async fn a_grant_that_nobody_takes_is_unlocked_and_nothing_else() {
    let fake = Fake::reliable();
    let sessions = sessions(&fake, 1, true);
    let granted = async |name: &str| {
        let claim = claim_of(name);
        match sessions.try_claim(&claim, &name.to_owned(), Duration::ZERO).await {
            Ok(Outcome::Granted(grant)) => grant,
            other => panic!("{other:?}"),
        }
    };
    let (a, b) = (granted("a").await, granted("b").await);
    drop(b);
    eventually("it is free", || !fake.is_held("b")).await;
    assert!(!a.has_expired() && fake.is_held("a"));
    assert_eq!(sessions.release(&a.hold).await.unwrap(), Released::Yes);
}

/// A session is only taken for one of another TTL once the server has said so.
#[tokio::test(start_paused = true)]
async fn a_ttl_that_was_refused_is_not_believed() {
    let fake = Fake::reliable();
    let (holder, waiter) = (provider(&fake, 1), provider(&fake, 1));
    let wait = async |ttl: Duration| {
        let guard = holder.create_lock("a").acquire().await.unwrap();
        let lock = waiter.create_lock_with("a", LockOptions::new().ttl(ttl));
        let waits = tokio::spawn(async move { lock.acquire().await });
        sleep(Duration::from_secs(1)).await;
        guard.release().await.unwrap();
        waits.await.unwrap().unwrap()
    };
    wait(TTL).await.release().await.unwrap();
    fake.state(|state| state.refuse = Some(|ask| matches!(ask, Ask::SetTtl(_))));
    wait(TTL * 20).await.release().await.unwrap();
    let guard = wait(TTL * 20).await;
    let ttl = fake.state(|state| state.sessions[&state.drawn[&guard.fencing_token().get()]].ttl);
    assert_eq!(ttl, TTL * 20);
    guard.release().await.unwrap();
    comes_to_rest(&fake, &[holder, waiter], &["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_lock_without_renewal_stands_for_its_ttl_however_long_the_wait_was() {
    let fake = Fake::reliable();
    let (holder, waiter) = (provider(&fake, 1), provider(&fake, 1));
    let guard = holder.create_lock("a").acquire().await.unwrap();
    let lock = waiter.create_lock_with("a", LockOptions::new().ttl(TTL).auto_renew(false));
    let waits = tokio::spawn(async move { lock.acquire().await });
    sleep(TTL * 2).await;
    guard.release().await.unwrap();
    let guard = waits.await.unwrap().unwrap();
    sleep(TTL / 2).await;
    assert!(!guard.is_lost());
    sleep(TTL).await;
    assert!(guard.is_lost());
    drop(guard);
    comes_to_rest(&fake, &[holder, waiter], &["a"]).await;
}

/// The end of a session is known at once, and its locks are free for others.
#[tokio::test(start_paused = true)]
async fn the_end_of_a_session_is_the_loss_of_its_locks() {
    let fake = Fake::reliable();
    let provider = provider(&fake, 1);
    let guard = provider.create_lock("a").acquire().await.unwrap();
    let session = fake.session_of(&guard);
    fake.state(|state| state.end(session, Ended::ByServer));
    timeout(Duration::from_millis(50), guard.lost()).await.unwrap();
    let next = provider.create_lock("a").acquire().await.unwrap();
    assert!(next.fencing_token() > guard.fencing_token());
    drop((guard, next));
    comes_to_rest(&fake, &[provider], &["a"]).await;
}

/// A wait that was cancelled too late has been granted, and is given back.
#[tokio::test(start_paused = true)]
async fn a_cancelled_wait_leaves_nothing_however_it_ended() {
    for late in [0, 1000] {
        let troubles = Troubles { granted_and_cancelled: late, ..Troubles::default() };
        for hold_for in 0..30 {
            let fake = Fake::new(hold_for, troubles);
            let (holder, waiter) = (provider(&fake, 1), provider(&fake, 1));
            let guard = holder.create_lock("a").acquire().await.unwrap();
            let lock = waiter.create_lock("a");
            let waits = timeout(Duration::from_millis(100), lock.acquire());
            let frees = async {
                sleep(Duration::from_millis(90 + hold_for)).await;
                guard.release().await
            };
            let (got, released) = tokio::join!(waits, frees);
            released.unwrap();
            drop(got);
            comes_to_rest(&fake, &[holder, waiter], &["a"]).await;
        }
    }
}

/// A cancel takes its time. Where the wait ends before it is sent, it isn't for what the session does next.
#[tokio::test(start_paused = true)]
async fn a_cancel_does_not_hit_the_next_wait_on_its_session() {
    for seed in 0..30 {
        let fake = Fake::new(seed, Troubles::default());
        let (holder, waiter) = (provider(&fake, 1), provider_of(&fake, 1, false, TTL));
        let held = holder.create_lock("a").acquire().await.unwrap();
        let next = holder.create_lock("b").acquire().await.unwrap();
        let lock = waiter.create_lock("a");
        let waits = timeout(Duration::from_millis(100), lock.acquire());
        let frees = async {
            sleep(Duration::from_millis(80)).await;
            // There is no session left by which to cancel, and a new one takes its time.
            let other = waiter.create_lock("c").acquire().await.unwrap();
            fake.state(|state| state.opening = Duration::from_millis(30));
            sleep(Duration::from_millis(25)).await; // given up, but not yet cancelled
            held.release().await.unwrap();
            other
        };
        let waits_for_next = async {
            sleep(Duration::from_millis(50)).await; // in line for the session on which the other waits
            waiter.create_lock("b").acquire().await
        };
        let frees_next = async {
            sleep(Duration::from_millis(300)).await;
            next.release().await
        };
        let (got, other, next, next_released) = tokio::join!(waits, frees, waits_for_next, frees_next);
        next_released.unwrap();
        assert_eq!(fake.asked(|ask| matches!(ask, Ask::Lock(key) if key == "b")), 1, "it was cancelled");
        drop((got, other, next.unwrap()));
        comes_to_rest(&fake, &[holder, waiter], &["a", "b", "c"]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn closing_ends_what_holds_nothing_and_the_rest_once_it_is_released() {
    let fake = Fake::reliable();
    let provider = provider(&fake, 1);
    let guard = provider.create_lock("a").acquire().await.unwrap();
    let other = LockOptions::new().ttl(TTL * 2);
    provider.create_lock_with("b", other).acquire().await.unwrap().release().await.unwrap();
    provider.close().await.unwrap();
    eventually("one is left", || fake.sessions() == 1).await;
    assert!(fake.is_held("a"));
    guard.release().await.unwrap();
    eventually("none is left", || fake.sessions() == 0).await;
    assert_eq!(fake.state(|state| std::mem::take(&mut state.wrong)), Vec::<String>::new());
}

#[test]
fn a_runtime_that_ends_takes_its_session_along_and_no_claim() {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let fake = Fake::reliable();
    let sessions = sessions(&fake, 1, true);
    let (claim, key) = (claim_of("a"), "a".to_owned());
    fake.state(|state| state.latency = Duration::from_millis(50));
    let first = runtime();
    first.block_on(async {
        // Broken off while it is under way: it goes on here, and not for long.
        let mut asks = Box::pin(sessions.try_claim(&claim, &key, Duration::ZERO));
        while fake.asked(|ask| matches!(ask, Ask::TryLock(_))) == 0 {
            drop(timeout(Duration::from_millis(1), &mut asks).await);
        }
    });
    drop(first);
    runtime().block_on(async {
        timeout(TTL, sessions.abandon(&claim)).await.expect("not waiting for what is gone").unwrap();
        assert!(lock(&sessions.0.claims).is_empty());
    });
}

/// What many do who don't know of each other, while much goes wrong.
async fn many_at_once(seed: u64) {
    let each = u32::try_from(seed % 4).unwrap_or(0) * 6;
    let troubles = Troubles {
        refused: each,
        unanswered: each,
        killed: each / 2,
        not_opened: each * 2,
        granted_and_cancelled: 300,
    };
    let fake = Fake::new(seed, troubles);
    let names = ["a", "b", "c"];
    let shares = !seed.is_multiple_of(5);
    let providers: Vec<_> = (0..3).map(|own| provider_of(&fake, own, shares, TTL)).collect();
    let mut tasks = Vec::new();
    for provider in &providers {
        for number in 0..3 {
            let ttl = if number == 0 { TTL / 2 } else { TTL };
            let options = LockOptions::new().ttl(ttl).auto_renew(number < 2);
            let locks = names.map(|name| provider.create_lock_with(name, options.clone()));
            let fake = fake.clone();
            tasks.push(tokio::spawn(async move {
                for _ in 0..8 {
                    let lock = &locks[fake.random(3) as usize];
                    let patience = Duration::from_millis(u64::from(fake.random(1500)));
                    let got = match fake.random(4) {
                        0 => lock.try_acquire().await,
                        1 => timeout(patience, lock.acquire()).await.map_or(Ok(None), |got| got.map(Some)),
                        2 => timeout(patience / 100, lock.try_acquire()).await.unwrap_or(Ok(None)),
                        _ => lock.try_acquire_for(patience).await,
                    };
                    let Ok(Some(guard)) = got else { continue };
                    fake.check(&guard);
                    sleep(Duration::from_millis(u64::from(fake.random(300)))).await;
                    fake.check(&guard);
                    match fake.random(3) {
                        0 => drop(guard),
                        1 => drop(timeout(patience / 200, guard.release()).await),
                        _ => drop(guard.release().await),
                    }
                }
                locks
            }));
        }
    }
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.expect("it doesn't panic"));
    }
    fake.state(|state| state.troubles = Troubles::default());
    let last: Vec<_> = all
        .into_iter()
        .map(|locks| {
            let fake = fake.clone();
            tokio::spawn(async move {
                for lock in locks {
                    let guard = lock.try_acquire_for(Duration::from_secs(60)).await;
                    let guard = guard.expect("nothing fails any more").expect("everybody comes in");
                    fake.check(&guard);
                    sleep(Duration::from_millis(20)).await;
                    drop(guard.release().await);
                }
            })
        })
        .collect();
    for task in last {
        task.await.expect("it doesn't panic");
    }
    comes_to_rest(&fake, &providers, &names).await;
    drop(providers);
    eventually("no session is left", || fake.sessions() == 0).await;
}

#[test]
fn many_at_once_while_much_goes_wrong() {
    let (first, runs) = match std::env::var("FENCELOCK_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => (seed, 1),
        None => (0, std::env::var("FENCELOCK_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(200)),
    };
    for seed in first..first + runs {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let run = std::panic::AssertUnwindSafe(|| runtime.block_on(many_at_once(seed)));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("it was FENCELOCK_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// With its session the grant of a claim that was broken off is gone.
#[tokio::test(start_paused = true)]
async fn a_grant_whose_session_has_ended_is_soon_abandoned() {
    let fake = Fake::reliable();
    fake.state(|state| state.latency = Duration::from_millis(50));
    let sessions = sessions(&fake, 1, true);
    let (claim, key) = (claim_of("a"), "a".to_owned());
    drop(timeout(Duration::from_millis(10), sessions.try_claim(&claim, &key, Duration::ZERO)).await);
    eventually("it is granted", || fake.is_held("a")).await;
    sleep(Duration::from_millis(5)).await;
    fake.state(|state| state.end(1, Ended::ByServer));
    sleep(Duration::from_millis(5)).await;
    timeout(TTL, sessions.abandon(&claim)).await.expect("at once").unwrap();
    assert!(lock(&sessions.0.claims).is_empty());
}

/// An answer that comes after its heartbeat was given up for another one counts all the same.
#[tokio::test(start_paused = true)]
async fn a_network_that_is_slow_against_the_ttl_loses_nothing() {
    let fake = Fake::reliable();
    let provider = provider(&fake, 1);
    let guard = provider.create_lock("a").acquire().await.unwrap();
    fake.state(|state| state.latency = TTL / 5);
    sleep(TTL * 4).await;
    assert!(!guard.is_lost());
    fake.state(|state| state.latency = Duration::from_millis(1));
    drop(guard);
    comes_to_rest(&fake, &[provider], &["a"]).await;
}
