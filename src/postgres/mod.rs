//! The `postgres` backend (feature `postgres`): advisory locks of PostgreSQL, [`PostgresLocks`].
//!
//! | URL | |
//! |---|---|
//! | `postgres://USER:PASSWORD@HOST:PORT/DATABASE` | port 5432, and a database called like the user, unless it says otherwise; `postgresql://` is the same |
//! | `postgres://USER@HOST,HOST/DATABASE?target_session_attrs=read-write` | the first of these that takes writes |
//! | `postgres://USER@%2Frun%2Fpostgresql/DATABASE` | over a Unix socket in that directory |
//!
//! Query parameters: those of the driver (`application_name`, `channel_binding`, `connect_timeout`, `host`, `hostaddr`,
//! `keepalives`, `keepalives_idle`, `keepalives_interval`, `keepalives_retries`, `load_balance_hosts`, `options`, `sslnegotiation`,
//! `target_session_attrs`, `tcp_user_timeout`), `sslmode` and `sslrootcert` (see [TLS](#tls)), and for what
//! [`PostgresLocks`] has methods: `waiting_sessions=3`, `token_sequence=public.fencelock_token`, `transaction_scoped=true`. For
//! anything else make the driver's [`Config`] yourself.
//!
//! # How it works
//!
//! A lock is a session-level advisory lock, with the key that [`lock_key`] computes from the name. Many are held on one
//! session: one connection for each TTL in use, however many locks. A claim and a release are one round trip each; a claim that
//! is granted draws its fencing token in the same statement.
//!
//! Waiters block on the server, which wakes them in the order in which they came, also when the holder's process or machine
//! dies. Each needs a session of its own while it waits, and for as long as it holds what it got: at most
//! [`waiting_sessions`](PostgresLocks::waiting_sessions) for a provider, in which all callers who wait for one name count
//! once. Who waits for more names than that looks whenever the lock is released (`NOTIFY`), and twice a second for
//! holders that died, and is the next to get a session.
//!
//! While a statement waits it keeps `VACUUM` from clearing up what has been deleted since it began, as any other does, and
//! whoever alters or drops the sequence of tokens waits for it.
//!
//! The server ends a session that it hasn't heard from for the TTL (`idle_session_timeout`, PostgreSQL 14), and frees its
//! locks; a heartbeat every third of the TTL, one for all locks on a session, keeps it. So the locks of a holder that is
//! frozen, or cut off, are free when the TTL is over, and it knows by its own clock. A session that ends otherwise (an
//! administrator, a restart, a broken connection) takes its locks with it: their guards are told at once
//! ([`Loss::SessionEnded`](crate::Loss::SessionEnded)), and until a job heeds that only the fencing token protects. If only
//! the way to the server is broken, the provider has the server end that session as soon as it can be reached.
//!
//! PostgreSQL counts that time by its wall clock. If the clock is set forward, the server may end a session that is idle
//! up to the TTL too early: its guards are told at once, but for a holder that is cut off at the same time, for which only
//! the fencing token protects until its own deadline. If it is set back, the locks of a holder that is frozen or cut off
//! stay for as much longer, or until its connection ends.
//!
//! Before PostgreSQL 14 the locks of a frozen holder stay until its connection ends, which
//! [`capabilities`](crate::LockProvider::capabilities) of a provider by [`connect`](crate::connect) tell; for one of your own
//! say that this will do, by [`without_server_expiry`](PostgresLocks::without_server_expiry).
//!
//! # Fencing tokens
//!
//! They come from a sequence, `public.fencelock_token` unless it is [named otherwise](PostgresLocks::token_sequence), which
//! must be the same for all programs that share locks. It is made on first use. A user who may not create it needs it to be
//! there, and rights on it:
//!
//! ```sql
//! CREATE SEQUENCE IF NOT EXISTS public.fencelock_token AS bigint MINVALUE 1 MAXVALUE 9007199254740991 CACHE 1 NO CYCLE;
//! GRANT SELECT, USAGE, UPDATE ON SEQUENCE public.fencelock_token TO app;
//! ```
//!
//! Tokens are in microseconds since 1970, at most two seconds behind the server's clock, or ahead of it if that has been set
//! back. Nothing waits for the disk: what the sequence loses in a crash, or in a failover, lies behind the clock by then, to
//! which each new session raises it. So a token can repeat only if the server has lost its last moments *and* its clock has
//! been set back, by more than the outage took.
//!
//! # Other programs
//!
//! `SELECT pg_advisory_lock(KEY)`, with the number that [`lock_key`] computes, excludes us and is excluded. Locks of other
//! programs with keys of their own can be shared by [`PostgresLocks::key`]; and
//! [`lock_in_transaction`] takes a lock for one transaction of your own, the strongest fence of all.
//!
//! # Rights
//!
//! To connect, and those on the sequence. With `pg_terminate_backend` and `pg_cancel_backend` a user ends own sessions
//! only, which everybody may.
//!
//! # Poolers
//!
//! A pooler that swaps sessions between transactions (PgBouncer's `pool_mode = transaction`) would leave locks with
//! somebody else's session. That is looked for when the first session is opened,
//! and refused; if others keep the pooler so busy that it isn't seen then, claims fail as soon as one is sent to another session. Connect to
//! PostgreSQL itself, or have the pooler keep sessions, or use
//! [`transaction_scoped`](PostgresLocks::transaction_scoped), which keeps a transaction open for each lock. An open
//! transaction has a price: it takes a connection of its own, and keeps `VACUUM` from clearing up what has been deleted since.
//!
//! # TLS
//!
//! With the feature `rustls` or `native-tls`. In a URL, `sslmode=require` (the same as `verify-full`) asks for it, and
//! verifies the server by the certificates that the system trusts, or by those in the file `sslrootcert`. Without `sslmode`
//! TLS is used if the server offers it, and its certificate isn't looked at: this protects from listeners, not from
//! impostors. `sslmode=disable` does without. For anything else use [`PostgresLocks::with_tls`].
//!
//! # Limits
//!
//! The server has room for some `max_locks_per_transaction * max_connections` locks (64 * 100), those of tables included; when it
//! is full, claims fail with [`Exhausted`](crate::ErrorKind::Exhausted). TTLs are from 200 ms to 24 days.

mod client;
mod connection;
mod failure;
mod key;
mod open;
mod scoped;
mod sql;
mod tls;
mod transaction;
mod url;

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The driver, whose types the constructors take. Its major version is part of this crate's.
pub use tokio_postgres as driver;

use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, NoTls, Socket};

pub use self::key::{AdvisoryKey, lock_key};
pub use self::transaction::{lock_in_transaction, try_lock_in_transaction};
pub(crate) use self::url::{DRIVERS_PARAMETERS, locks as locks_of_url};

use self::client::{Connector, PgClient};
use self::open::Postgres;
use self::scoped::ScopedPostgres;
use self::sql::Sequence;
use crate::backend::{Backend, Claim, Due, Grant, Mode, Outcome, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::sessions::{SessionHold, Sessions};
use crate::error::{Error, ErrorKind, Result};
use crate::options::LockOptions;

const MIN_TTL: Duration = Duration::from_millis(200);
/// The server counts milliseconds in 32 bits.
const MAX_TTL: Duration = Duration::from_secs(24 * 86_400);

/// How often the driver looks whether the server's host is there, unless the configuration says.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Locks in a database of PostgreSQL. See the [module](self).
pub struct PostgresLocks {
    connector: Connector,
    sequence: Sequence,
    keys: HashMap<String, AdvisoryKey>,
    waiting_sessions: usize,
    without_expiry: bool,
    transaction_scoped: bool,
    /// Whether messages of the server are heard on its connections.
    hears: bool,
    running: OnceLock<Running>,
}

/// The sessions, once they are needed.
#[derive(Debug)]
enum Running {
    Sessions(Sessions<Postgres>),
    Scoped(Sessions<ScopedPostgres>),
}

/// A lock that is held.
pub struct PostgresHold(Held);

enum Held {
    Session(SessionHold<Postgres>),
    Scoped(SessionHold<ScopedPostgres>),
}

impl PostgresLocks {
    /// The sequence of fencing tokens, unless it is named.
    pub const TOKEN_SEQUENCE: &str = "public.fencelock_token";

    /// Locks on the server of this configuration, without TLS. No I/O.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self::with_tls(config, NoTls)
    }

    /// The same with a TLS connector of the driver's, as from the crates `tokio-postgres-rustls` and `postgres-native-tls`. What
    /// it is used for is up to [`Config::ssl_mode`](driver::Config::ssl_mode).
    #[must_use]
    pub fn with_tls<T>(mut config: Config, tls: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        if config.get_application_name().is_none() {
            config.application_name("fencelock");
        }
        // The driver's default is two hours; who waits would wait for as long for a host that is gone.
        if config.get_keepalives_idle() == Config::new().get_keepalives_idle() {
            config.keepalives_idle(KEEPALIVE).keepalives_interval(KEEPALIVE / 2).keepalives_retries(3);
        }
        // And for as long to hear that what it sends arrives.
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(KEEPALIVE * 3);
        }
        Self::of(
            true,
            Arc::new(move |listeners| {
                let (config, tls) = (config.clone(), tls.clone());
                Box::pin(async move {
                    let (client, connection) =
                        config.connect(tls).await.map_err(|error| failure::of_opening(&error))?;
                    Ok(PgClient::drive(client, connection, listeners))
                })
            }),
        )
    }

    /// Locks on connections of the application's own: boxed clients, or those of a pool.
    ///
    /// Each connection is kept for as long as the provider needs it. It is dropped, which gives it back to a pool, once nothing
    /// is held on it and the settings of its session are what they were; one of which that can't be said is only dropped once
    /// it is closed, which the provider has the server do.
    ///
    /// The application drives the connections, so releases are not heard on them: who waits without a session of its own looks
    /// twice a second. A pool should have more connections than
    /// [`waiting_sessions`](Self::waiting_sessions) and TTLs together. No I/O.
    ///
    /// ```no_run
    /// # use fencelock::postgres::{PostgresLocks, driver};
    /// let locks = PostgresLocks::with_connections(|| async {
    ///     let (client, connection) = driver::connect("host=localhost user=app", driver::NoTls).await?;
    ///     tokio::spawn(connection);
    ///     Ok(Box::new(client))
    /// });
    /// ```
    #[must_use]
    pub fn with_connections<C, F>(make: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        C: Deref<Target = Client> + Send + Sync + 'static,
        F: Future<Output = Result<C, Box<dyn StdError + Send + Sync>>> + Send + 'static,
    {
        Self::of(
            false,
            Arc::new(move |_| {
                let connection = make();
                Box::pin(async move {
                    let connection = connection.await.map_err(|error| match error.downcast_ref() {
                        Some(error) => failure::of_opening(error),
                        None => Error::new(ErrorKind::Unavailable, "no connection to PostgreSQL")
                            .with_source(error),
                    })?;
                    Ok(PgClient::users(Box::new(connection)))
                })
            }),
        )
    }

    fn of(hears: bool, connector: Connector) -> Self {
        Self {
            connector,
            sequence: Sequence::parse(Self::TOKEN_SEQUENCE).expect("a name of ours"),
            keys: HashMap::new(),
            waiting_sessions: 3,
            without_expiry: false,
            transaction_scoped: false,
            hears,
            running: OnceLock::new(),
        }
    }

    /// For how many names at a time claims may have a session of their own: to block on the server, and to hold what they get.
    /// Default: 3. With none, waiters look when the lock is released, and twice a second.
    #[must_use]
    pub fn waiting_sessions(mut self, sessions: usize) -> Self {
        self.waiting_sessions = sessions;
        self
    }

    /// The sequence that fencing tokens come from: `name` or `schema.name`, upper and lower case as they are. It must be the
    /// same one for all who share locks. Default: [`TOKEN_SEQUENCE`](Self::TOKEN_SEQUENCE).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for what can't be a name.
    pub fn token_sequence(mut self, name: &str) -> Result<Self> {
        self.sequence = Sequence::parse(name)?;
        Ok(self)
    }

    /// Gives the lock `name` (with the provider's prefix, if it has one: `app:nightly-report`) a key that another program uses.
    /// Names with the same key are the same lock.
    #[must_use]
    pub fn key(mut self, name: impl Into<String>, key: impl Into<AdvisoryKey>) -> Self {
        self.keys.insert(name.into(), key.into());
        self
    }

    /// Holds each lock by a transaction that stays open, for poolers that swap sessions between transactions. Each takes a
    /// connection of its own, a second one is used to draw tokens, and waiters beyond
    /// [`waiting_sessions`](Self::waiting_sessions) look twice a second. Default: `false`.
    #[must_use]
    pub fn transaction_scoped(mut self, scoped: bool) -> Self {
        self.transaction_scoped = scoped;
        self
    }

    /// The server need not end sessions that it doesn't hear from, for PostgreSQL before 14: a holder that is frozen keeps its
    /// locks until it goes on, or its connection ends.
    #[must_use]
    pub fn without_server_expiry(mut self) -> Self {
        self.without_expiry = true;
        self
    }

    /// Opens a session, so that what is wrong is known now. The first claim would do it otherwise.
    ///
    /// # Errors
    ///
    /// What the server says; [`ErrorKind::Unsupported`] behind a pooler that swaps sessions, and before PostgreSQL 14 unless
    /// [that will do](Self::without_server_expiry).
    pub async fn connect(&self) -> Result<()> {
        self.connect_for(LockOptions::DEFAULT_TTL).await
    }

    /// Opens a session for locks of this TTL.
    async fn connect_for(&self, ttl: Duration) -> Result<()> {
        match self.running() {
            Running::Sessions(sessions) => sessions.connect(ttl).await,
            Running::Scoped(sessions) => sessions.connect(ttl).await,
        }
    }

    /// Opens a session for locks of this TTL. If the server is too old to end those of frozen holders, that will do.
    pub(crate) async fn connect_to_any(mut self, ttl: Duration) -> Result<Self> {
        match self.connect_for(ttl).await {
            Err(error) if open::is_without_expiry(&error) => {
                self.running = OnceLock::new();
                self = self.without_server_expiry();
                self.connect_for(ttl).await?;
            }
            connected => connected?,
        }
        Ok(self)
    }

    fn running(&self) -> &Running {
        self.running.get_or_init(|| {
            let server = Postgres::new(self.connector.clone(), self.sequence.clone(), self.without_expiry);
            if self.transaction_scoped {
                Running::Scoped(Sessions::new(ScopedPostgres(Arc::new(server)), self.waiting_sessions))
            } else {
                Running::Sessions(Sessions::new(server, self.waiting_sessions))
            }
        })
    }

    fn key_of(&self, claim: &Claim) -> Result<AdvisoryKey> {
        if claim.mode != Mode::Exclusive {
            return Err(Error::new(ErrorKind::Unsupported, "postgres locks are exclusive"));
        }
        let name = claim.name.as_str();
        let key = self.keys.get(name).copied().unwrap_or_else(|| AdvisoryKey::from(name));
        if key == AdvisoryKey::One(AdvisoryKey::of_tokens()) {
            return Err(Error::new(
                ErrorKind::Config,
                "this key is held by those who draw fencing tokens: use another",
            ));
        }
        Ok(key)
    }
}

impl Backend for PostgresLocks {
    type Hold = PostgresHold;

    fn name(&self) -> &'static str {
        "postgres"
    }

    fn capabilities(&self) -> Capabilities {
        // A transaction can be ended since PostgreSQL 9.6.
        let expiry = if self.without_expiry && !self.transaction_scoped {
            Expiry::Session
        } else {
            Expiry::SessionOrTtl
        };
        let blocks = self.waiting_sessions > 0;
        Capabilities::new(MIN_TTL, MAX_TTL, expiry)
            .wakes_waiters(blocks || (self.hears && !self.transaction_scoped))
            .fairness(if blocks { Fairness::Fifo } else { Fairness::None })
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<PostgresHold>> {
        let key = self.key_of(claim)?;
        Ok(match self.running() {
            Running::Sessions(sessions) => {
                sessions.try_claim(claim, &key, wait).await?.map(PostgresHold::session)
            }
            Running::Scoped(sessions) => {
                sessions.try_claim(claim, &key, wait).await?.map(PostgresHold::scoped)
            }
        })
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        match self.running() {
            Running::Sessions(sessions) => sessions.abandon(claim).await,
            Running::Scoped(sessions) => sessions.abandon(claim).await,
        }
    }

    async fn renew(&self, due: &[Due<'_, PostgresHold>]) -> Vec<Renewal> {
        // All holds of a provider are of one kind.
        match self.running() {
            Running::Sessions(sessions) => {
                let holds = due.iter().filter_map(|due| match &due.hold.0 {
                    Held::Session(hold) => Some(Due { hold, ttl: due.ttl }),
                    Held::Scoped(_) => None,
                });
                sessions.renew(&holds.collect::<Vec<_>>()).await
            }
            Running::Scoped(sessions) => {
                let holds = due.iter().filter_map(|due| match &due.hold.0 {
                    Held::Scoped(hold) => Some(Due { hold, ttl: due.ttl }),
                    Held::Session(_) => None,
                });
                sessions.renew(&holds.collect::<Vec<_>>()).await
            }
        }
    }

    /// The engine keeps a lock until `keep_for` is over, since here it would end with the process.
    async fn release(&self, hold: &PostgresHold, _: Duration) -> Result<Released> {
        match (self.running(), &hold.0) {
            (Running::Sessions(sessions), Held::Session(hold)) => sessions.release(hold).await,
            (Running::Scoped(sessions), Held::Scoped(hold)) => sessions.release(hold).await,
            _ => Ok(Released::NotHeld), // of another provider
        }
    }

    async fn transfer(&self, hold: &PostgresHold, to: &Claim) -> Result<Option<Grant<PostgresHold>>> {
        Ok(match (self.running(), &hold.0) {
            (Running::Sessions(sessions), Held::Session(hold)) => {
                sessions.transfer(hold, to).await?.map(|grant| grant.map(PostgresHold::session))
            }
            (Running::Scoped(sessions), Held::Scoped(hold)) => {
                sessions.transfer(hold, to).await?.map(|grant| grant.map(PostgresHold::scoped))
            }
            _ => None,
        })
    }

    async fn close(&self) -> Result<()> {
        match self.running() {
            Running::Sessions(sessions) => sessions.close().await,
            Running::Scoped(sessions) => sessions.close().await,
        }
        Ok(())
    }
}

impl PostgresHold {
    fn session(hold: SessionHold<Postgres>) -> Self {
        Self(Held::Session(hold))
    }

    fn scoped(hold: SessionHold<ScopedPostgres>) -> Self {
        Self(Held::Scoped(hold))
    }
}

impl fmt::Debug for PostgresLocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresLocks")
            .field("sequence", &self.sequence)
            .field("waiting_sessions", &self.waiting_sessions)
            .field("transaction_scoped", &self.transaction_scoped)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PostgresHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Held::Session(hold) => fmt::Debug::fmt(hold, f),
            Held::Scoped(hold) => fmt::Debug::fmt(hold, f),
        }
    }
}
