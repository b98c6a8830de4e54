//! A server whose leases are shorter than the TTL asked for, and that keeps a lock after the exit of its holder.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fencelock::backend::{Backend, Claim, Due, Grant, Instant, Outcome, Released, Renewal};
use fencelock::{
    Capabilities, Error, ErrorKind, Expiry, FencingToken, LockOptions, LockProvider, Provider, Result,
};

#[derive(Clone, Debug, Default)]
struct Clamping {
    renewals: Arc<AtomicUsize>,
    /// What releases have asked for.
    kept: Arc<Mutex<Vec<Duration>>>,
    /// So many releases fail, after a second each.
    down: Arc<AtomicUsize>,
}

/// The longest lease that the server gives.
const LEASE: Duration = Duration::from_secs(60);

impl Backend for Clamping {
    type Hold = ();

    fn name(&self) -> &'static str {
        "clamping"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Duration::from_secs(1), Duration::from_secs(3600), Expiry::Ttl)
            .keeps_after_exit(true)
    }

    async fn try_claim(&self, claim: &Claim, _: Duration) -> Result<Outcome<()>> {
        let until = Instant::now() + claim.ttl.min(LEASE);
        Ok(Outcome::Granted(Grant::lease((), FencingToken::after(0, SystemTime::now())?, until)))
    }

    async fn abandon(&self, _: &Claim) -> Result<()> {
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, ()>]) -> Vec<Renewal> {
        let sent = Instant::now();
        self.renewals.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(2)).await; // the round trip
        due.iter().map(|due| Renewal::Until(sent + due.ttl.min(LEASE))).collect()
    }

    async fn release(&self, (): &(), keep_for: Duration) -> Result<Released> {
        if self.down.load(Ordering::SeqCst) > 0 {
            self.down.fetch_sub(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs(1)).await;
            return Err(Error::new(ErrorKind::Unavailable, "down"));
        }
        self.kept.lock().expect("no code panics under this lock").push(keep_for);
        Ok(Released::Yes)
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_shorter_than_the_ttl_is_not_renewed_without_a_pause() {
    let server = Clamping::default();
    let provider = Provider::new(server.clone());
    let options = LockOptions::new().ttl(Duration::from_secs(300));
    let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(!guard.is_lost());
    let renewals = server.renewals.load(Ordering::SeqCst);
    assert!(renewals < 10, "{renewals} renewals in two minutes");
}

#[tokio::test(start_paused = true)]
async fn a_release_that_was_retried_keeps_no_longer_than_asked() {
    let server = Clamping::default();
    let provider = Provider::new(server.clone());
    let options = LockOptions::new().ttl(Duration::from_secs(300)).hold_at_least(Duration::from_secs(8));
    let granted = Instant::now();
    let guard = provider.create_lock_with("x", options).acquire().await.unwrap();
    server.down.store(5, Ordering::SeqCst);
    guard.release().await.unwrap();
    let keep_for = server.kept.lock().unwrap()[0];
    assert!(
        granted.elapsed() + keep_for < Duration::from_secs(9),
        "kept until {:?}",
        granted.elapsed() + keep_for
    );
}
