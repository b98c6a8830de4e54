//! Grants that live and die with a session: heartbeats, its end, and its deadline.

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use common::{ms, secs};
use fencelock::backend::{Backend, Claim, Due, Grant, Instant, Outcome, OwnerId, Released, Renewal, Session};
use fencelock::{Capabilities, Error, ErrorKind, Expiry, FencingToken, LockName, LockOptions};
use fencelock::{LockProvider, Loss, Provider, Result};

/// One connection that holds every lock.
#[derive(Clone, Debug)]
struct OneSession(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    session: Session,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<LockName, OwnerId>,
    last_token: u64,
    /// How many grants each heartbeat was sent through.
    beats: Vec<usize>,
    /// Heartbeats fail.
    is_deaf: bool,
}

impl OneSession {
    fn new(session: Session) -> Self {
        Self(Arc::new(Connection { session, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no code panics under this lock")
    }
}

impl Backend for OneSession {
    type Hold = LockName;

    fn name(&self) -> &'static str {
        "one-session"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ms(100), secs(300), Expiry::Session)
    }

    async fn try_claim(&self, claim: &Claim, _wait: Duration) -> Result<Outcome<LockName>> {
        let mut state = self.state();
        if state.held.contains_key(&claim.name) {
            return Ok(Outcome::Busy { retry_after: None });
        }
        let token = FencingToken::after(state.last_token, SystemTime::now())?;
        state.last_token = token.get();
        state.held.insert(claim.name.clone(), claim.owner);
        Ok(Outcome::Granted(Grant::on_session(claim.name.clone(), token, &self.0.session)))
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        let mut state = self.state();
        if state.held.get(&claim.name) == Some(&claim.owner) {
            state.held.remove(&claim.name);
        }
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, LockName>]) -> Vec<Renewal> {
        let sent = Instant::now();
        let mut state = self.state();
        state.beats.push(due.len());
        let answer = |due: &Due<'_, LockName>| {
            if state.is_deaf {
                Renewal::Failed(Error::new(ErrorKind::Unavailable, "no answer"))
            } else {
                Renewal::Until(sent + due.ttl)
            }
        };
        due.iter().map(answer).collect()
    }

    async fn release(&self, hold: &LockName, keep_for: Duration) -> Result<Released> {
        assert_eq!(keep_for, Duration::ZERO, "this backend can't keep anything");
        let removed = self.state().held.remove(hold);
        Ok(removed.map_or(Released::NotHeld, |_| Released::Yes))
    }
}

fn options() -> LockOptions {
    LockOptions::new().ttl(secs(3))
}

#[tokio::test(start_paused = true)]
async fn one_grant_beats_for_all_of_its_session() {
    let backend = OneSession::new(Session::new());
    let provider = Provider::new(backend.clone());
    let mut guards = Vec::new();
    for number in 0..200 {
        guards.push(provider.create_lock_with(&number.to_string(), options()).acquire().await.unwrap());
    }
    tokio::time::sleep(secs(30)).await;
    let beats = backend.state().beats.clone();
    assert!(beats.iter().all(|&grants| grants == 1), "{beats:?}");
    assert!((25..=35).contains(&beats.len()), "{} heartbeats in 30 s, one is due each second", beats.len());
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_session_reaches_every_guard_at_once() {
    let backend = OneSession::new(Session::new());
    let provider = Provider::new(backend.clone());
    let (a, b) = (provider.create_lock("a"), provider.create_lock("b"));
    let (a, b) = (a.acquire().await.unwrap(), b.acquire().await.unwrap());
    let (lost_a, lost_b) = (tokio::spawn(a.lost()), tokio::spawn(b.lost()));
    tokio::task::yield_now().await;
    backend.0.session.end(Loss::SessionEnded);
    assert!(a.is_lost() && b.is_lost());
    assert_eq!((lost_a.await.unwrap(), lost_b.await.unwrap()), (Loss::SessionEnded, Loss::SessionEnded));
    assert_eq!(a.release().await.unwrap_err().loss(), Some(Loss::SessionEnded));

    // Too late for this one: its session has ended already.
    backend.state().held.clear();
    let late = provider.create_lock_with("late", options().retry_for(Duration::ZERO)).try_acquire().await;
    assert_eq!(late.unwrap_err().kind(), ErrorKind::Unknown);
}

#[tokio::test(start_paused = true)]
async fn a_session_without_a_deadline_outlives_failing_heartbeats() {
    let backend = OneSession::new(Session::new());
    let guard = Provider::new(backend.clone()).create_lock_with("x", options()).acquire().await.unwrap();
    backend.state().is_deaf = true;
    tokio::time::sleep(secs(60)).await;
    assert!(!guard.is_lost());
    guard.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_session_with_a_deadline_is_lost_when_nothing_is_heard() {
    let backend = OneSession::new(Session::until(Instant::now() + secs(3)));
    let provider = Provider::new(backend.clone());
    let (a, b) = (provider.create_lock_with("a", options()), provider.create_lock_with("b", options()));
    let (a, b) = (a.acquire().await.unwrap(), b.acquire().await.unwrap());
    tokio::time::sleep(secs(30)).await;
    assert!(!a.is_lost() && !b.is_lost());
    backend.state().is_deaf = true;
    let began = tokio::time::Instant::now();
    assert_eq!((a.lost().await, b.lost().await), (Loss::Expired, Loss::Expired));
    assert!((secs(2)..=secs(3)).contains(&began.elapsed()), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_grant_without_renewal_ends_before_its_session() {
    let backend = OneSession::new(Session::new());
    let lock = Provider::new(backend.clone()).create_lock_with("x", options().auto_renew(false));
    let began = tokio::time::Instant::now();
    let guard = lock.acquire().await.unwrap();
    assert_eq!(guard.lost().await, Loss::Expired);
    assert!((secs(3)..=secs(3) + ms(5)).contains(&began.elapsed()));
    assert!(lock.try_acquire().await.unwrap().is_some(), "freed on the server, too");
}

#[tokio::test(start_paused = true)]
async fn max_hold_and_hold_at_least_work_without_the_servers_help() {
    let backend = OneSession::new(Session::new());
    let provider = Provider::new(backend.clone());
    let began = tokio::time::Instant::now();
    let limited = provider.create_lock_with("limited", options().max_hold(secs(5)));
    let guard = limited.acquire().await.unwrap();
    assert_eq!(guard.lost().await, Loss::MaxHold);
    drop(limited.acquire().await.unwrap());
    assert!(
        (secs(8)..secs(10)).contains(&began.elapsed()),
        "after max_hold and a ttl: {:?}",
        began.elapsed()
    );

    let began = tokio::time::Instant::now();
    let kept = provider.create_lock_with("kept", options().hold_at_least(secs(7)));
    kept.acquire().await.unwrap().release().await.unwrap();
    drop(kept.acquire().await.unwrap());
    assert!((secs(7)..secs(7) + ms(600)).contains(&began.elapsed()), "{:?}", began.elapsed());
}

/// The lock would be free as soon as the process is gone: close waits for it, but not for longer than the TTL.
#[tokio::test(start_paused = true)]
async fn close_waits_for_what_only_this_process_keeps() {
    for (keep, ttl, waits) in [(secs(5), secs(30), secs(5)), (secs(100), secs(30), secs(30))] {
        let backend = OneSession::new(Session::new());
        let provider = Provider::new(backend.clone());
        let options = LockOptions::new().ttl(ttl).hold_at_least(keep);
        provider.create_lock_with("x", options).acquire().await.unwrap().release().await.unwrap();
        let began = tokio::time::Instant::now();
        provider.close().await.unwrap();
        assert!((waits..waits + ms(50)).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert_eq!(backend.state().held.is_empty(), keep < ttl);
    }
}
