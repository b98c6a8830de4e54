//! [`Redlock`]: locks on a majority of independent servers.

mod ballot;
mod broadcast;
mod membership;
mod node;
mod round;
mod standing;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use redis::Client;

use self::ballot::quorum;
use self::broadcast::no_majority;
use self::node::Node;
use self::round::{Round, question};
use super::inbox::{Hears, Place, Places, Subscription};
use super::keys::{self, Keys, owner_value};
use super::link::{Link, Source};
use super::reply::read_renewals;
use super::script;
use super::single::{MIN_TTL, Owner, check_mode, millis_up};
use super::waiting::{grace, millis, whole_millis};
use crate::backend::{Backend, Claim, Due, Grant, Instant, Outcome, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::backoff::{Backoff, jitter};
use crate::engine::{current_runtime, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Loss;

/// What a server knows as a node of Redlock.
const NODE_KEY: &str = "fencelock:redlock";
/// The longest TTL unless another is set.
const LONGEST_TTL: Duration = Duration::from_secs(60);
/// How long a waiter that was woken by one node waits for the others to be free, too.
const GATHER: Duration = Duration::from_millis(3);
/// How long somebody else may take to give new nodes their votes.
const ADMISSION: Duration = Duration::from_secs(2);

/// Locks on a majority of several independent Redis servers ("Redlock"), which survive the death of a minority. See the
/// [module](super) for what they promise.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use fencelock::redis::Redlock;
///
/// let urls = ["redis://one.example", "redis://two.example", "redis://three.example"];
/// let clients = urls.into_iter().map(redis::Client::open).collect::<Result<Vec<_>, _>>()?;
/// let provider = fencelock::Provider::new(Redlock::new(clients)?);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Redlock {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    nodes: Vec<Arc<Node>>,
    places: Arc<Places<Knocks>>,
    longest_ttl: Duration,
    /// The highest token that was granted here.
    seen: AtomicU64,
    /// When nodes without a vote were last looked at.
    looked_at: std::sync::Mutex<Option<Instant>>,
}

/// What identifies a grant of [`Redlock`].
#[derive(Debug)]
pub struct RedlockHold {
    keys: Keys,
    owner: Owner,
}

/// What a waiting attempt has heard, and how many rounds it has had.
#[derive(Debug, Default)]
struct Knocks {
    heard: usize,
    rounds: u32,
}

impl Hears for Knocks {
    fn hears(&mut self, _generation: u32, _rest: &str) {
        self.heard += 1;
    }
}

impl Redlock {
    /// Locks on a majority of the servers that these clients connect to. They must know nothing of each other: no
    /// replicas, no cluster. No I/O.
    ///
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) for fewer than three servers, and for the same one twice.
    pub fn new(clients: impl IntoIterator<Item = Client>) -> Result<Self> {
        let clients: Vec<_> = clients.into_iter().collect();
        let addresses: Vec<_> =
            clients.iter().map(|client| client.get_connection_info().addr().to_string()).collect();
        if clients.len() < 3 {
            return Err(Error::new(ErrorKind::Config, "redlock needs at least three servers"));
        }
        if addresses.iter().enumerate().any(|(i, address)| addresses[..i].contains(address)) {
            return Err(Error::new(
                ErrorKind::Config,
                "redlock needs independent servers: one is named twice",
            ));
        }
        let (channel, places) = (super::new_channel(), Arc::new(Places::default()));
        let node = |client| {
            Arc::new(Node {
                link: Arc::new(Link::new(Source::Client(client), &script::OF_NODE)),
                subscription: Subscription::new(channel.clone(), places.clone()),
            })
        };
        let shared = Shared {
            nodes: clients.into_iter().map(node).collect(),
            places,
            longest_ttl: LONGEST_TTL,
            seen: AtomicU64::new(0),
            looked_at: std::sync::Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The longest TTL, and the longest [`hold_at_least`](crate::LockOptions::hold_at_least), that a lock may have here; and
    /// for how long a server that was restarted, or has lost its data, has no vote. Everybody who uses the same servers
    /// should set the same. Default: 60 s.
    #[must_use]
    pub fn longest_ttl(mut self, ttl: Duration) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.longest_ttl = ttl.max(MIN_TTL);
        }
        self
    }

    /// Connects to the servers, and gives a vote to those that are new.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](ErrorKind::Unavailable) if there is no majority of servers that have a vote, or what most of them
    /// say.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves nothing behind but perhaps open connections.
    pub async fn connect(&self) -> Result<()> {
        current_runtime()?;
        let nodes = self.shared.nodes.len();
        let (began, mut backoff) =
            (Instant::now(), Backoff::new(Duration::from_millis(10), Duration::from_millis(200)));
        loop {
            let (members, errors) = self.shared.admit(Duration::from_secs(2)).await;
            if members >= quorum(nodes) {
                return Ok(());
            }
            // Others who connect to new servers at the same moment may be about to give them their votes.
            if errors.len() > nodes - quorum(nodes) || began.elapsed() > ADMISSION {
                return Err(no_majority(errors, nodes));
            }
            tokio::time::sleep(backoff.next()).await;
        }
    }
}

impl Shared {
    /// How long one node is waited for: little against the TTL.
    fn patience(ttl: Duration) -> Duration {
        (ttl / 10).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }

    /// For how long a majority stands: clocks run apart by one in a hundred, and the servers count in milliseconds.
    fn validity(ttl: Duration) -> Duration {
        let ttl = whole_millis(ttl);
        ttl.saturating_sub(ttl / 100 + Duration::from_millis(2))
    }
}

impl Place<Knocks> {
    fn knocks(&self) -> usize {
        lock(&self.state).heard
    }

    /// The number of the next round. What has been heard before it doesn't count any more.
    fn next_round(&self) -> u32 {
        let mut knocks = lock(&self.state);
        knocks.heard = 0;
        knocks.rounds += 1;
        knocks.rounds
    }

    /// Waits for the first node that is free, then a moment for a majority of them. Then a moment more, by chance: others
    /// may have been woken, too.
    async fn knocked(&self, quorum: usize) {
        self.heard().await;
        let gathered = async {
            while self.knocks() < quorum {
                self.heard().await;
            }
        };
        let _ = tokio::time::timeout(GATHER, gathered).await; // some may never come
    }
}

/// The keys of a script on a node.
fn node_keys(keys: &Keys, claim: Option<&Claim>) -> Vec<String> {
    let mut all = match claim {
        Some(claim) => keys.with_tombstone(claim.owner),
        None => [&keys.common()[..], std::slice::from_ref(&keys.lock)].concat(), // nobody looks at the fifth
    };
    all.push(NODE_KEY.to_owned());
    all
}

impl Backend for Redlock {
    type Hold = RedlockHold;

    fn name(&self) -> &'static str {
        "redlock"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(MIN_TTL, self.shared.longest_ttl, Expiry::Ttl)
            .keeps_after_exit(true)
            .max_hold_at_least(self.shared.longest_ttl)
            .wakes_waiters(true)
            .fairness(Fairness::None)
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<RedlockHold>> {
        check_mode(claim)?;
        let (shared, keys) = (&self.shared, Keys::new(&claim.name));
        if wait.is_zero() {
            let mut round = 0;
            let next = || {
                round += 1;
                question(claim, &keys, "", round, None)
            };
            return shared.rounds(claim, &keys, next).await;
        }
        let until = Instant::now() + wait;
        let quorum = quorum(shared.nodes.len());
        let place = shared.places.enter(claim, Knocks::default);
        loop {
            shared.listen(Shared::patience(claim.ttl)).await;
            let channel = shared.nodes[0].subscription.channel();
            let next = || question(claim, &keys, "", place.next_round(), Some(channel));
            let left = match shared.rounds(claim, &keys, next).await {
                Ok(Outcome::Busy { retry_after }) => retry_after,
                Ok(granted) => {
                    shared.places.leave(claim.owner);
                    return Ok(granted);
                }
                // It may have left itself in the queues, and in a minority of the nodes: then it is to be abandoned.
                Err(error) if error.is_retryable() => {
                    return Err(Error::new(ErrorKind::Unknown, "the claim has failed").with_source(error));
                }
                Err(error) => {
                    let _ = self.abandon(claim).await; // nothing better to be done
                    return Err(error);
                }
            };
            let nap = left
                .unwrap_or(Duration::MAX)
                .saturating_add(Duration::from_millis(1))
                .min(grace(claim.ttl) / 3);
            let nap = nap.min(until.remaining());
            let knocked = tokio::time::timeout(nap, place.knocked(quorum)).await.is_ok();
            if until.has_passed() && !knocked {
                return Ok(Outcome::Busy { retry_after: Some(Duration::ZERO) });
            }
            tokio::time::sleep(jitter(Duration::from_millis(1))).await;
        }
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        let keys = Keys::new(&claim.name);
        if let Some(place) = self.shared.places.get(claim.owner) {
            place.is_abandoned(claim.ttl);
        }
        let dead_for = millis_up(keys::dead_for(claim.ttl)).to_string();
        let args = vec![owner_value(claim.owner, 0), dead_for];
        let patience = Shared::patience(claim.ttl);
        self.shared.tell_all(&script::NODE_LEAVE, node_keys(&keys, Some(claim)), args, patience).await?;
        self.shared.places.leave(claim.owner);
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, RedlockHold>]) -> Vec<Renewal> {
        let keys: Vec<_> = due.iter().map(|due| due.hold.keys.lock.clone()).collect();
        let args: Vec<_> =
            due.iter().flat_map(|due| [due.hold.owner.0.clone(), millis(due.ttl).to_string()]).collect();
        let shortest = due.iter().map(|due| due.ttl).min().unwrap_or_default();
        let (patience, quorum) = (Shared::patience(shortest), quorum(self.shared.nodes.len()));
        let asked = Arc::new((keys, args));
        let sent = Instant::now();
        let (mut yes, mut no) = (vec![0; due.len()], vec![0; due.len()]);
        let mut errors = Vec::new();
        let ask = |node: Arc<Node>| {
            let asked = asked.clone();
            async move {
                let (keys, args) = &*asked;
                let args: Vec<_> = args.iter().map(String::as_str).collect();
                let answer = node.run(&script::RENEW, keys, &args, patience).await?;
                read_renewals(answer)
                    .filter(|answers| answers.len() == keys.len())
                    .ok_or_else(|| node.out_of_step())
            }
        };
        let take = |_, answers: Result<Vec<i64>>| {
            match answers {
                Ok(answers) => {
                    for (i, answer) in answers.into_iter().enumerate() {
                        *if answer == 1 { &mut yes[i] } else { &mut no[i] } += 1;
                    }
                }
                Err(error) => errors.push(error),
            }
            let decided = (0..due.len()).all(|i| yes[i] >= quorum || no[i] >= quorum);
            if decided { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        self.shared.ask_all(ask, take).await;
        let failed = no_majority(errors, self.shared.nodes.len());
        due.iter()
            .enumerate()
            .map(|(i, due)| {
                if yes[i] >= quorum {
                    Renewal::Until(sent + Shared::validity(due.ttl))
                } else if no[i] >= quorum {
                    Renewal::Lost(Loss::Taken)
                } else {
                    Renewal::Failed(failed.duplicate()) // the old deadline stands
                }
            })
            .collect()
    }

    async fn release(&self, hold: &RedlockHold, keep_for: Duration) -> Result<Released> {
        let args = vec![hold.owner.0.clone(), millis_up(keep_for).to_string()];
        let patience = Duration::from_secs(1); // the engine sets the limit
        let keys = node_keys(&hold.keys, None);
        let released = self.shared.tell_all(&script::NODE_RELEASE, keys, args, patience).await;
        match released {
            Ok(true) => Ok(Released::Yes),
            Ok(false) => Ok(Released::NotHeld),
            Err(error) if !error.is_retryable() => Err(error),
            Err(error) => Err(Error::new(ErrorKind::Unknown, "the release has failed").with_source(error)),
        }
    }

    async fn transfer(&self, hold: &RedlockHold, to: &Claim) -> Result<Option<Grant<RedlockHold>>> {
        let question = question(to, &hold.keys, &hold.owner.0, 1, None);
        match self.shared.round(to, &hold.keys, question).await {
            Ok(Round::Granted(grant)) => Ok(Some(grant)),
            // Some nodes may have gone over: both sides are to be freed.
            Ok(Round::Busy(_) | Round::Split) => {
                Err(Error::new(ErrorKind::Unknown, "the lock went over in part only"))
            }
            Err(error) => Err(Error::new(ErrorKind::Unknown, "the transfer has failed").with_source(error)),
        }
    }
}
