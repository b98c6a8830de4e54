//! [`PlainRedis`]: a lock on one Redis server as one might write it in an afternoon, with one [`Flaw`] or none. It
//! shows that the nemesis finds what it is there to find.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fencelock::backend::{Backend, Claim, Due, Grant, Instant, Outcome, Released, Renewal};
use fencelock::redis::lock_key;
use fencelock::{
    Capabilities, Error, ErrorKind, Expiry, FencingToken, LockOptions, LockProvider, Loss, Provider, Result,
};
use redis::FromRedisValue;
use redis::aio::MultiplexedConnection;
use tokio::sync::Mutex;
use tokio::time::timeout;

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Nothing.
    None,
    /// Releases by `DEL`, whoever has the key.
    DeletesAnybodysKey,
    /// Renews by `PEXPIRE`, whoever has the key.
    RenewsAnybodysKey,
    /// Counts the TTL from when the reply arrives.
    CountsFromTheReply,
    /// Believes to have it for three TTLs.
    BelievesTooLong,
    /// Counts tokens in its own process.
    DrawsTokensItself,
    /// Takes an outcome that it doesn't know for a grant.
    TakesSilenceForYes,
    /// Its locks stay for a day unless they are released.
    NeverExpires,
    /// Takes a server that it can't reach for one that refuses it.
    MistakesOutages,
}

const FLAWS: &[(Flaw, &str)] = &[
    (Flaw::None, "control"),
    (Flaw::DeletesAnybodysKey, "deletes_anybodys_key"),
    (Flaw::RenewsAnybodysKey, "renews_anybodys_key"),
    (Flaw::CountsFromTheReply, "counts_from_the_reply"),
    (Flaw::BelievesTooLong, "believes_too_long"),
    (Flaw::DrawsTokensItself, "draws_tokens_itself"),
    (Flaw::TakesSilenceForYes, "takes_silence_for_yes"),
    (Flaw::NeverExpires, "never_expires"),
    (Flaw::MistakesOutages, "mistakes_outages"),
];

impl Flaw {
    pub(crate) fn name(self) -> &'static str {
        FLAWS.iter().find(|(flaw, _)| *flaw == self).expect("each has a name").1
    }

    pub(crate) fn of_name(name: &str) -> Option<Self> {
        FLAWS.iter().find(|(_, its)| *its == name).map(|(flaw, _)| *flaw)
    }
}

/// What a worker works with: the crate's own backend for this URL, or this one.
pub(crate) async fn connect(url: &str, ttl: Duration, flaw: Option<Flaw>) -> Result<Box<dyn LockProvider>> {
    let Some(flaw) = flaw else { return fencelock::connect(url).await };
    let url = url.split('?').next().unwrap_or_default();
    let client = redis::Client::open(url).expect("a URL of the rig's");
    let backend = PlainRedis { client, connection: Mutex::default(), drawn: AtomicU64::new(0), flaw };
    Ok(Box::new(Provider::builder(backend).options(LockOptions::new().ttl(ttl)).build()?))
}

struct PlainRedis {
    client: redis::Client,
    connection: Mutex<Option<MultiplexedConnection>>,
    drawn: AtomicU64,
    flaw: Flaw,
}

impl fmt::Debug for PlainRedis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainRedis").field("flaw", &self.flaw).finish_non_exhaustive()
    }
}

/// Name and owner.
type Hold = (String, String);

const TAKE: &str = "
    if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
    local time = redis.call('TIME')
    local last = tonumber(redis.call('GET', KEYS[2]) or '0')
    local token = math.max(last + 1, time[1] * 1000000 + time[2])
    redis.call('SET', KEYS[2], string.format('%.0f', token))
    return token";
const RENEW: &str = "
    if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
    return redis.call('PEXPIRE', KEYS[1], ARGV[2])";
const RELEASE: &str = "
    if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
    return redis.call('DEL', KEYS[1])";

impl PlainRedis {
    async fn ask<T: FromRedisValue>(&self, command: &redis::Cmd) -> Result<T> {
        // Longer than the TTL, so that a reply may be worthless when it comes.
        const PATIENCE: Duration = Duration::from_secs(3);
        let kind = match self.flaw {
            Flaw::MistakesOutages => ErrorKind::Denied,
            _ => ErrorKind::Unavailable,
        };
        let unavailable = || Error::new(kind, "no connection");
        let mut connection = {
            let mut known = self.connection.lock().await;
            if known.is_none() {
                let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
                let open = self.client.get_multiplexed_async_connection_with_config(&config);
                let opened = timeout(PATIENCE, open).await.map_err(|_| unavailable())?;
                *known = Some(opened.map_err(|_| unavailable())?);
            }
            known.clone().expect("opened above")
        };
        if let Ok(Ok(answer)) = timeout(PATIENCE, command.query_async(&mut connection)).await {
            return Ok(answer);
        }
        *self.connection.lock().await = None;
        Err(Error::new(ErrorKind::Unknown, "no answer"))
    }

    async fn script(&self, script: &str, (name, owner): &Hold, ttl: Duration) -> Result<u64> {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let ttl = if self.flaw == Flaw::NeverExpires { DAY } else { ttl };
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(2).arg(lock_key(name)).arg(lock_key(name) + ":fence");
        command.arg(owner).arg(u64::try_from(ttl.as_millis()).expect("a short time"));
        self.ask(&command).await
    }

    async fn plain(&self, command: &str, (name, _): &Hold, ttl: Option<Duration>) -> Result<u64> {
        let mut command = redis::cmd(command);
        command.arg(lock_key(name));
        if let Some(ttl) = ttl {
            command.arg(u64::try_from(ttl.as_millis()).expect("a short time"));
        }
        self.ask(&command).await
    }

    async fn free(&self, hold: &Hold) -> Result<u64> {
        match self.flaw {
            Flaw::DeletesAnybodysKey => self.plain("DEL", hold, None).await,
            _ => self.script(RELEASE, hold, Duration::ZERO).await,
        }
    }

    fn until(&self, sent: Instant, ttl: Duration) -> Instant {
        match self.flaw {
            Flaw::CountsFromTheReply => Instant::now() + ttl,
            Flaw::BelievesTooLong => sent + 3 * ttl,
            _ => sent + ttl,
        }
    }

    fn token(&self, drawn: u64) -> Result<FencingToken> {
        let token = match self.flaw {
            Flaw::DrawsTokensItself => self.drawn.fetch_add(1, Ordering::Relaxed) + 1,
            _ => drawn,
        };
        FencingToken::new(token).ok_or_else(|| Error::new(ErrorKind::Exhausted, "no token"))
    }
}

fn hold(claim: &Claim) -> Hold {
    (claim.name.as_str().to_owned(), claim.owner.to_hex())
}

impl Backend for PlainRedis {
    type Hold = Hold;

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Duration::from_millis(100), Duration::from_secs(3600), Expiry::Ttl)
    }

    async fn try_claim(&self, claim: &Claim, _: Duration) -> Result<Outcome<Hold>> {
        let (hold, sent) = (hold(claim), Instant::now());
        let drawn = match self.script(TAKE, &hold, claim.ttl).await {
            Ok(0) => return Ok(Outcome::Busy { retry_after: None }),
            Err(error) if error.kind() == ErrorKind::Unknown && self.flaw == Flaw::TakesSilenceForYes => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later");
                let token = self.token(u64::try_from(since.as_micros()).expect("it fits"))?;
                return Ok(Outcome::Granted(Grant::lease(hold, token, Instant::now() + claim.ttl)));
            }
            drawn => drawn?,
        };
        let token = self.token(drawn)?;
        Ok(Outcome::Granted(Grant::lease(hold, token, self.until(sent, claim.ttl))))
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        self.free(&hold(claim)).await.map(drop)
    }

    async fn renew(&self, due: &[Due<'_, Hold>]) -> Vec<Renewal> {
        let mut renewals = Vec::new();
        for due in due {
            let sent = Instant::now();
            let renewed = match self.flaw {
                Flaw::RenewsAnybodysKey => self.plain("PEXPIRE", due.hold, Some(due.ttl)).await,
                _ => self.script(RENEW, due.hold, due.ttl).await,
            };
            renewals.push(match renewed {
                Ok(0) => Renewal::Lost(Loss::Taken),
                Ok(_) => Renewal::Until(self.until(sent, due.ttl)),
                Err(error) => Renewal::Failed(error),
            });
        }
        renewals
    }

    async fn release(&self, hold: &Hold, _: Duration) -> Result<Released> {
        Ok(if self.free(hold).await? == 0 { Released::NotHeld } else { Released::Yes })
    }
}
