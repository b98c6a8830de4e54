//! [`RedisLocks`]: locks on one server.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::ConnectionLike;
use redis::sentinel::SentinelClient;
use redis::{Client, Value};

use super::inbox::{Hears, Place, Places, Subscription};
use super::keys::{self, Keys, owner_value};
use super::link::{Link, Source};
use super::replicas::{MAX_REPLICA_WAIT, Replicas};
use super::reply::{read_renewals, read_reply};
use super::script;
use super::waiting::{Granted, Reply, Step, Waiting, grace, millis};
use crate::backend::{Backend, Claim, Due, Grant, Instant, Mode, Outcome, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::backoff::jitter;
use crate::engine::{current_runtime, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;
use crate::guard::Loss;

/// The shortest TTL: renewal has to fit in, with a hiccup or two.
pub(super) const MIN_TTL: Duration = Duration::from_millis(100);
pub(super) const MAX_TTL: Duration = Duration::from_secs(365 * 86_400);

/// Locks on one Redis server, or on the master that Sentinels watch. See the [module](super) for what they promise.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fencelock::redis::RedisLocks;
///
/// let client = redis::Client::open("redis://127.0.0.1:6379")?;
/// let provider = fencelock::Provider::new(RedisLocks::new(client));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct RedisLocks {
    link: Arc<Link>,
    /// `None`: over a connection of the user's nobody can be woken.
    subscription: Option<Subscription<Waiter>>,
    places: Arc<Places<Waiter>>,
    replicas: Option<Replicas>,
}

/// What identifies a grant of [`RedisLocks`].
#[derive(Debug)]
pub struct RedisHold {
    keys: Keys,
    owner: Owner,
}

/// The value of a lock. Whoever knows it can release it: it is kept out of `Debug`.
pub(super) struct Owner(pub(super) String);

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Owner(..)")
    }
}

/// An attempt in the server's queue.
#[derive(Debug)]
struct Waiter {
    waiting: Waiting<Instant>,
    handed: Option<Granted<Instant>>,
}

impl Hears for Waiter {
    fn hears(&mut self, generation: u32, token: &str) {
        if let Ok(token) = token.parse()
            && let Some(granted) = self.waiting.handed(generation, token)
        {
            self.handed = Some(granted);
        }
    }
}

impl Place<Waiter> {
    /// What was handed over, and to which generation of its owner.
    fn take_handed(&self, claim: &Claim) -> Option<(String, Granted<Instant>)> {
        let mut waiter = lock(&self.state);
        let granted = waiter.handed.take()?;
        Some((owner_value(claim.owner, waiter.waiting.generation()), granted))
    }

    fn is_handed(&self) -> bool {
        lock(&self.state).handed.is_some()
    }

    fn next_question(&self, claim: &Claim) -> (String, How) {
        let mut waiter = lock(&self.state);
        waiter.waiting.asks(Instant::now());
        let how = if waiter.waiting.has_joined() { How::Stay } else { How::Join };
        (owner_value(claim.owner, waiter.waiting.generation()), how)
    }

    fn answered(&self, sent: Instant, reply: Reply) -> Step<Instant> {
        lock(&self.state).waiting.answered(sent, reply)
    }
}

/// How a claim deals with a lock that is busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Try,
    Join,
    Stay,
}

impl How {
    fn as_str(self) -> &'static str {
        match self {
            Self::Try => "try",
            Self::Join => "join",
            Self::Stay => "stay",
        }
    }
}

impl RedisLocks {
    /// Locks on the server that this client connects to. No I/O.
    ///
    /// Two connections are opened on first use: one for commands, and one for messages once a caller waits.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self::over(Source::Client(client))
    }

    /// Locks on the master that these Sentinels name. It is asked for anew for each connection. No I/O.
    #[must_use]
    pub fn with_sentinel(sentinels: SentinelClient) -> Self {
        Self::over(Source::Sentinel(tokio::sync::Mutex::new(sentinels)))
    }

    /// Locks over a connection of your own, such as a [`ConnectionManager`](https://docs.rs/redis) or a
    /// [`MultiplexedConnection`](redis::aio::MultiplexedConnection), which has to re-establish itself. It can't be
    /// subscribed over, so callers who wait poll, in no order.
    #[must_use]
    pub fn with_connection<C>(connection: C) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        Self::over(Source::Connection(Box::new(connection)))
    }

    fn over(source: Source) -> Self {
        let link = Arc::new(Link::new(source, &script::OF_SERVER));
        let places = Arc::new(Places::default());
        let subscription =
            link.can_open_more().then(|| Subscription::new(super::new_channel(), places.clone()));
        Self { link, subscription, places, replicas: None }
    }

    /// Has each grant wait until `count` replicas have it, for at most `timeout` (1 ms to 1 s): a failover then finds it
    /// on the replica that takes over, if that is one of them. A grant that too few have is taken back, and fails with
    /// [`Unknown`](ErrorKind::Unknown), which is retried within [`retry_for`](crate::LockOptions::retry_for).
    ///
    /// It costs each grant two round trips more, over a connection of their own, on which one grant waits behind another.
    /// Default: none.
    ///
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) for a count of zero, a timeout out of range, and locks over a
    /// [connection](Self::with_connection) of your own.
    pub fn wait_for_replicas(mut self, count: u32, timeout: Duration) -> Result<Self> {
        if count == 0 || timeout < Duration::from_millis(1) || timeout > MAX_REPLICA_WAIT {
            return Err(Error::new(
                ErrorKind::Config,
                "waiting for replicas needs a count of at least 1 and a timeout from 1 ms to 1 s",
            ));
        }
        if !self.link.can_open_more() {
            return Err(Error::new(
                ErrorKind::Config,
                "waiting for replicas takes a connection of its own: make the locks of a client",
            ));
        }
        self.replicas = Some(Replicas { count, timeout, link: self.link.another() });
        Ok(self)
    }

    /// Opens the connection unless it is open.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](ErrorKind::Unavailable) if the server can't be reached, [`Denied`](ErrorKind::Denied) if it
    /// doesn't let us in, [`Unsupported`](ErrorKind::Unsupported) if it is part of a cluster.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves nothing behind but perhaps an open connection.
    pub async fn connect(&self) -> Result<()> {
        current_runtime()?;
        self.link.connected().await.map(drop)
    }

    /// Sends the claim script, and reads its answer.
    async fn ask(&self, claim: &Claim, keys: &Keys, owner: &str, how: How) -> Result<Reply> {
        let all = keys.with_tombstone(claim.owner);
        let (ttl, grace) = (millis(claim.ttl).to_string(), millis(grace(claim.ttl)).to_string());
        let channel = self.subscription.as_ref().map_or("", |subscription| subscription.channel());
        let args: &[&str] = match how {
            How::Try => &[owner, &ttl, how.as_str()],
            How::Join | How::Stay => &[owner, &ttl, how.as_str(), &grace, channel],
        };
        let answer = script::CLAIM.run(&self.link, &all, args).await?;
        self.read(answer, owner)
    }

    fn read(&self, answer: Value, owner: &str) -> Result<Reply> {
        read_reply(answer, owner)?.ok_or_else(|| {
            self.link.break_off();
            Error::new(
                ErrorKind::Unknown,
                "the answer doesn't fit the request: the connection is out of step",
            )
        })
    }

    /// One attempt, without a place in the queue.
    async fn try_once(&self, claim: &Claim, keys: Keys) -> Result<Outcome<RedisHold>> {
        let (mut waiting, owner, sent) =
            (Waiting::new(claim.ttl), owner_value(claim.owner, 0), Instant::now());
        waiting.asks(sent);
        match self.ask(claim, &keys, &owner, How::Try).await? {
            Reply::Busy { left } => Ok(Outcome::Busy { retry_after: left }),
            reply => match waiting.answered(sent, reply) {
                Step::Granted(granted) => self.grant(claim, keys, owner, granted).await,
                Step::Wait(_) | Step::StartOver => {
                    Err(Error::new(ErrorKind::Unknown, "a try was answered as if it had waited"))
                }
            },
        }
    }

    /// Waits in the queue.
    async fn wait(
        &self,
        claim: &Claim,
        keys: &Keys,
        place: &Place<Waiter>,
        subscription: &Subscription<Waiter>,
        until: Instant,
    ) -> Result<Outcome<RedisHold>> {
        loop {
            if let Some((owner, granted)) = place.take_handed(claim) {
                return self.grant(claim, keys.clone(), owner, granted).await;
            }
            let (owner, how) = place.next_question(claim);
            let question = async {
                // Whoever asks before it listens may miss the answer.
                subscription.ensure(&self.link).await?;
                let sent = Instant::now();
                self.ask(claim, keys, &owner, how).await.map(|reply| (sent, reply))
            };
            tokio::pin!(question);
            // A question is asked to the end, since it may not be repeated, unless it turns out to be answered.
            let mut look_again = false;
            let answer = loop {
                tokio::select! {
                    biased;
                    () = place.heard() => {
                        look_again = true;
                        if place.is_handed() {
                            break None;
                        }
                    }
                    answer = &mut question => break Some(answer),
                }
            };
            let nap = match answer {
                None => continue,
                Some(Ok((sent, reply))) => match place.answered(sent, reply) {
                    Step::Granted(granted) => {
                        if matches!(reply, Reply::Mine { .. }) {
                            subscription.doubt(); // it should have been in a message
                        }
                        return self.grant(claim, keys.clone(), owner.clone(), granted).await;
                    }
                    Step::StartOver => {
                        subscription.doubt(); // perhaps it was dropped because nobody seemed to listen
                        continue;
                    }
                    Step::Wait(time) => time,
                },
                Some(Err(error)) => self.ride_out(claim, place, error).await?,
            };
            if look_again {
                continue;
            }
            let heard = tokio::time::timeout(nap.min(until.remaining()), place.heard()).await.is_ok();
            if !heard && until.has_passed() && !place.is_handed() {
                return Ok(Outcome::Busy { retry_after: Some(Duration::ZERO) });
            }
        }
    }

    /// A question has failed. Who is in the queue stays there for as long as the server takes it for alive: when to ask
    /// again.
    async fn ride_out(&self, claim: &Claim, place: &Place<Waiter>, error: Error) -> Result<Duration> {
        let (alive_until, interval) = {
            let waiter = lock(&place.state);
            (waiter.waiting.alive_until(), waiter.waiting.interval())
        };
        let Some(alive_until) = alive_until else {
            if error.kind() != ErrorKind::Unknown {
                self.places.leave(claim.owner); // it has never come to the server
            }
            return Err(error);
        };
        if error.is_retryable() && !alive_until.has_passed() {
            return Ok(interval / 4 + jitter(interval / 4));
        }
        // One of the questions may have been carried out. Unless that is cleared up here, it has to be abandoned.
        if !error.is_retryable() && self.abandon(claim).await.is_ok() {
            return Err(error);
        }
        Err(Error::new(ErrorKind::Unknown, "a waiting claim has failed").with_source(error))
    }

    async fn grant(
        &self,
        claim: &Claim,
        keys: Keys,
        owner: String,
        mut granted: Granted<Instant>,
    ) -> Result<Outcome<RedisHold>> {
        if let Some(replicas) = &self.replicas {
            granted.until = replicas.wait(&keys, &owner, claim.ttl).await?;
            granted.to_be_confirmed = false;
        }
        let token = FencingToken::new(granted.token)
            .ok_or_else(|| Error::new(ErrorKind::Unknown, "the server's fencing token is no token"))?;
        self.places.leave(claim.owner);
        let grant = Grant::lease(RedisHold { keys, owner: Owner(owner) }, token, granted.until);
        Ok(Outcome::Granted(if granted.to_be_confirmed { grant.to_be_confirmed() } else { grant }))
    }
}

pub(super) fn check_mode(claim: &Claim) -> Result<()> {
    match claim.mode {
        Mode::Exclusive => Ok(()),
        _ => Err(Error::new(ErrorKind::Unsupported, "redis locks are exclusive")),
    }
}

/// Whole milliseconds that are not less.
pub(super) fn millis_up(duration: Duration) -> u64 {
    millis(duration.saturating_add(Duration::from_nanos(999_999)))
}

impl Backend for RedisLocks {
    type Hold = RedisHold;

    fn name(&self) -> &'static str {
        "redis"
    }

    fn capabilities(&self) -> Capabilities {
        let wakes = self.subscription.is_some();
        Capabilities::new(MIN_TTL, MAX_TTL, Expiry::Ttl)
            .keeps_after_exit(true)
            .wakes_waiters(wakes)
            .fairness(if wakes { Fairness::Fifo } else { Fairness::None })
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<RedisHold>> {
        check_mode(claim)?;
        let keys = Keys::new(&claim.name);
        match &self.subscription {
            Some(subscription) if !wait.is_zero() => {
                let until = Instant::now() + wait;
                let place =
                    self.places.enter(claim, || Waiter { waiting: Waiting::new(claim.ttl), handed: None });
                self.wait(claim, &keys, &place, subscription, until).await
            }
            _ => self.try_once(claim, keys).await,
        }
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        let keys = Keys::new(&claim.name);
        let (generation, joined) = match self.places.get(claim.owner) {
            Some(place) => {
                place.is_abandoned(claim.ttl);
                let waiter = lock(&place.state);
                (waiter.waiting.generation(), waiter.waiting.has_joined())
            }
            None => (0, false),
        };
        // Once it is in the queue nothing is on its way that could put it there again.
        let dead_for = if joined { 0 } else { millis_up(keys::dead_for(claim.ttl)) };
        let all = keys.with_tombstone(claim.owner);
        let args = [&*owner_value(claim.owner, generation), &dead_for.to_string()];
        script::LEAVE.run(&self.link, &all, &args).await?;
        self.places.leave(claim.owner);
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, RedisHold>]) -> Vec<Renewal> {
        let keys: Vec<_> = due.iter().map(|due| due.hold.keys.lock.clone()).collect();
        let ttls: Vec<_> = due.iter().map(|due| millis(due.ttl).to_string()).collect();
        let args: Vec<&str> =
            due.iter().zip(&ttls).flat_map(|(due, ttl)| [due.hold.owner.0.as_str(), ttl]).collect();
        let sent = Instant::now();
        let answers = match script::RENEW.run(&self.link, &keys, &args).await {
            Ok(answers) => read_renewals(answers).filter(|answers| answers.len() == due.len()),
            Err(error) => return due.iter().map(|_| Renewal::Failed(error.duplicate())).collect(),
        };
        let Some(answers) = answers else {
            self.link.break_off();
            let error = || Error::new(ErrorKind::Unknown, "the answer doesn't fit the renewal");
            return due.iter().map(|_| Renewal::Failed(error())).collect();
        };
        due.iter()
            .zip(answers)
            .map(|(due, answer)| match answer {
                1 => Renewal::Until(sent + super::waiting::whole_millis(due.ttl)),
                // Not by expiry: that our own clock tells.
                _ => Renewal::Lost(Loss::Taken),
            })
            .collect()
    }

    async fn release(&self, hold: &RedisHold, keep_for: Duration) -> Result<Released> {
        let args = [&*hold.owner.0, &millis_up(keep_for).to_string()];
        match script::RELEASE.run(&self.link, &hold.keys.common(), &args).await? {
            Value::Int(1) => Ok(Released::Yes),
            Value::Int(0) => Ok(Released::NotHeld),
            _ => {
                self.link.break_off();
                Err(Error::new(ErrorKind::Unknown, "the answer doesn't fit the release"))
            }
        }
    }

    async fn transfer(&self, hold: &RedisHold, to: &Claim) -> Result<Option<Grant<RedisHold>>> {
        if self.replicas.is_some() {
            return Ok(None); // each grant has to wait for them
        }
        let owner = owner_value(to.owner, 0);
        let all = hold.keys.with_tombstone(to.owner);
        let args = [&*hold.owner.0, &owner, &millis(to.ttl).to_string()];
        let sent = Instant::now();
        let answer = script::TRANSFER.run(&self.link, &all, &args).await?;
        match Waiting::new(to.ttl).answered(sent, self.read(answer, &owner)?) {
            Step::Granted(granted) => match self.grant(to, hold.keys.clone(), owner, granted).await? {
                Outcome::Granted(grant) => Ok(Some(grant)),
                Outcome::Busy { .. } => Ok(None),
            },
            Step::Wait(_) | Step::StartOver => Ok(None),
        }
    }
}
