//! [`Stage`]: a backend with servers of its own, and what it promises. [`Network`]: the way to them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use fencelock::{Capabilities, DistributedLock, Expiry, LockGuard, LockOptions, LockProvider};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::servers::locks::{Fault, SLACK, granted, report, within};
use crate::servers::proxy::{Proxy, Traffic};
use crate::servers::rigs::{Kind, Rig};

pub(crate) type Locks = Box<dyn LockProvider>;

/// Longer than anything is waited for: what is free before is free for another reason than its TTL.
pub(crate) const LONG: Duration = secs(60);

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What a scenario is played on.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) kind: &'static Kind,
    pub(crate) rig: Arc<dyn Rig>,
    trial: &'static str,
    shares: bool,
    promises: Capabilities,
}

impl Stage {
    /// Starts the servers, which have been used once, or shares them with other trials.
    pub(crate) async fn set(kind: &'static Kind, trial: &'static str, shares: bool) -> Self {
        let rig = if shares { shared(kind) } else { (kind.start)() };
        let first = connected(&rig.url(kind.short_ttl)).await;
        let promises = first.capabilities();
        within("the provider is closed", first.close()).await.expect("it is closed");
        Self { kind, rig, trial, shares, promises }
    }

    /// The URL of this trial's locks.
    pub(crate) fn url(&self, ttl: Duration) -> String {
        self.url_by(&self.rig.addrs(), ttl)
    }

    /// The same by way of proxies.
    pub(crate) fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String {
        let url = self.rig.url_by(addrs, ttl);
        if self.shares { format!("{url}&prefix={}", self.trial) } else { url }
    }

    pub(crate) async fn provider(&self, ttl: Duration) -> Locks {
        connected(&self.url(ttl)).await
    }

    /// As many providers, which know nothing of each other.
    pub(crate) async fn providers<const N: usize>(&self, ttl: Duration) -> [Locks; N] {
        let mut providers = Vec::new();
        for _ in 0..N {
            providers.push(self.provider(ttl).await);
        }
        providers.try_into().expect("as many")
    }

    /// One that comes over a network.
    pub(crate) async fn by(&self, network: &Network, ttl: Duration) -> Locks {
        let addrs: Vec<_> = network.0.iter().map(Proxy::addr).collect();
        connected(&self.url_by(&addrs, ttl)).await
    }

    /// Does something to each server.
    pub(crate) fn each_server(&self, deed: impl Fn(&(dyn Rig + 'static), usize)) {
        (0..self.rig.addrs().len()).for_each(|server| deed(&*self.rig, server));
    }

    /// A TTL over which a grant is to be kept while something is wrong.
    pub(crate) fn roomy_ttl(&self) -> Duration {
        self.kind.short_ttl.max(secs(3))
    }

    /// Whether a grant stands for its TTL, whatever happens to connections.
    pub(crate) fn is_lease(&self) -> bool {
        self.promises.expiry == Expiry::Ttl
    }

    /// Whether the end of a connection is all that ends a grant on the server.
    pub(crate) fn is_session_only(&self) -> bool {
        self.promises.expiry == Expiry::Session
    }

    /// How long a dead holder's lock stays.
    pub(crate) fn left_by_the_dead(&self, ttl: Duration) -> Duration {
        if self.is_lease() { ttl } else { Duration::ZERO }
    }

    /// How long a lock may be free, or over, until one who waits for it sees that.
    pub(crate) fn look(&self) -> Duration {
        if self.promises.wakes_waiters { Duration::ZERO } else { ms(1500) }
    }

    /// The same where those who wait may not have been told: then they ask.
    pub(crate) fn ask(&self) -> Duration {
        self.look().max(secs(1))
    }

    /// For how long servers that have all been restarted may grant nothing. Redlock's have no vote for three seconds,
    /// and are looked at and asked twice.
    pub(crate) fn without_vote(&self) -> Duration {
        if self.rig.addrs().len() > 1 { secs(3) + secs(3) } else { Duration::ZERO }
    }

    /// The TTL of a claim whose answer isn't heard, and by when it is taken back once the server can be reached.
    pub(crate) fn taken_back(&self) -> (Duration, Duration) {
        match self.kind.name {
            // Nobody may end the session, which ends itself after a TTL.
            "sqlserver" => (self.kind.short_ttl, 2 * self.kind.short_ttl),
            // If it comes after it was given up it stands until its TTL runs out.
            "azure" => (self.kind.short_ttl, self.kind.short_ttl + self.look()),
            _ => (LONG, secs(3)),
        }
    }

    /// Waits until so many wait for the lock on the server, or must do so by now.
    pub(crate) async fn until_waiting(&self, name: &str, count: usize) {
        if self.rig.waiters(name).is_none() {
            return sleep(ms(300)).await;
        }
        let waiting = async {
            while self.rig.waiters(name).is_some_and(|waiters| waiters < count) {
                sleep(ms(5)).await;
            }
        };
        within("others wait for the lock", waiting).await;
    }

    /// The holder releases the lock, and the waiter has it soon, with a higher token. `what` is what is reported of it.
    pub(crate) async fn hand_over(
        &self,
        held: LockGuard,
        waiter: JoinHandle<(LockGuard, Instant)>,
        what: &str,
    ) -> LockGuard {
        let token = held.fencing_token();
        let released = Instant::now();
        held.release().await.expect("it is held");
        let (guard, at) = granted(waiter).await;
        assert!(at - released < self.ask() + SLACK, "{:?}", at - released);
        self.report(what, at - released);
        assert!(guard.fencing_token() > token);
        guard
    }

    /// Says how long something took.
    pub(crate) fn report(&self, what: &str, took: Duration) {
        report(&format!("{}::{}: {what}", self.kind.name, self.trial), took);
    }
}

/// Servers that a few share, as long as there is one of them.
fn shared(kind: &'static Kind) -> Arc<dyn Rig> {
    const SHARERS: usize = 4;
    static RIGS: Mutex<Vec<(&str, Weak<dyn Rig>)>> = Mutex::new(Vec::new());
    let mut rigs = RIGS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut theirs = rigs.iter().filter(|(name, rig)| *name == kind.name && rig.strong_count() < SHARERS);
    if let Some(rig) = theirs.find_map(|(_, rig)| rig.upgrade()) {
        return rig;
    }
    let rig = (kind.start)();
    rigs.push((kind.name, Arc::downgrade(&rig)));
    rig
}

/// Tries again where a server, on a machine that is busy, hasn't answered in time.
async fn connected(url: &str) -> Locks {
    let tries = async {
        loop {
            match fencelock::connect(url).await {
                Err(error) if error.is_retryable() => sleep(ms(100)).await,
                done => return done.expect("the servers are there"),
            }
        }
    };
    within("a connection", tries).await
}

/// A lock that isn't tried for again when something fails.
pub(crate) fn impatient(provider: &Locks, name: &str) -> Box<dyn DistributedLock> {
    provider.create_lock_with(name, LockOptions::new().retry_for(Duration::ZERO))
}

/// Whether somebody has the lock.
pub(crate) async fn is_taken(provider: &Locks, name: &str) -> bool {
    let answer = within("an answer", provider.create_lock(name).try_acquire()).await;
    answer.expect("the servers are there").is_none()
}

/// Waits for a lock, and rides out whatever there is.
pub(crate) fn waits_patiently(provider: &Locks, name: &str) -> JoinHandle<(LockGuard, Instant)> {
    let lock = provider.create_lock_with(name, LockOptions::new().retry_for(LONG));
    tokio::spawn(async move {
        let guard = lock.acquire().await.expect("granted in the end");
        (guard, Instant::now())
    })
}

/// The same for the lock of a guard, which must be lost by the time that this gets it.
pub(crate) fn waits_after(held: &Arc<LockGuard>, provider: &Locks) -> JoinHandle<(LockGuard, Instant)> {
    let (waiter, held) = (waits_patiently(provider, held.name()), held.clone());
    tokio::spawn(async move {
        let granted = waiter.await.expect("no panic");
        assert!(held.is_lost(), "two at once");
        granted
    })
}

/// For some time, the holder has it, and others haven't.
pub(crate) async fn stays(guard: &LockGuard, other: &Locks, time: Duration) {
    for _ in 0..4 {
        sleep(time / 4).await;
        assert!(!guard.is_lost(), "{:?}", guard.lost().await);
        assert!(is_taken(other, guard.name()).await, "two at once");
    }
}

/// Sleeps until so long after that.
pub(crate) async fn sleep_after(since: Instant, time: Duration) {
    sleep(time.saturating_sub(since.elapsed())).await;
}

/// A network on the way to each server of a rig.
#[derive(Debug)]
pub(crate) struct Network(Vec<Proxy>);

impl Network {
    pub(crate) fn start(stage: &Stage) -> Self {
        Self(stage.rig.addrs().into_iter().map(Proxy::start).collect())
    }

    pub(crate) fn each(&self, deed: impl Fn(&Proxy)) {
        self.0.iter().for_each(deed);
    }

    pub(crate) fn to(&self, server: usize) -> &Proxy {
        &self.0[server]
    }

    pub(crate) fn begin(&self, fault: Fault) {
        self.each(|proxy| fault.begin(proxy));
    }

    pub(crate) fn end(&self) {
        self.each(Fault::end);
    }

    pub(crate) fn is_aiming(&self) -> bool {
        self.0.iter().any(Proxy::is_aiming)
    }

    /// What has passed so far.
    pub(crate) fn mark(&self) -> Vec<Traffic> {
        self.0.iter().map(Proxy::traffic).collect()
    }

    /// Waits until more has passed on each way than then.
    pub(crate) async fn until_more(&self, than: &[Traffic], what: fn(&Traffic) -> u64) {
        for (proxy, before) in self.0.iter().zip(than) {
            proxy.until(|traffic| what(traffic) > what(before)).await;
        }
    }

    /// Waits until nothing is on its way to a server.
    pub(crate) async fn until_all_has_come(&self) {
        for proxy in &self.0 {
            proxy.until(|traffic| traffic.waiting == 0).await;
        }
    }
}
