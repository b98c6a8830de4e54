//! The `sqlserver` backend (feature `sqlserver`): application locks of Microsoft SQL Server and Azure SQL, [`SqlServerLocks`].
//!
//! | URL | |
//! |---|---|
//! | `sqlserver://USER:PASSWORD@HOST:PORT/DATABASE` | port 1433, and the login's default database, unless it says otherwise |
//! | `sqlserver://USER:PASSWORD@HOST/DATABASE?instance=NAME` | a named instance, whose port SQL Server Browser tells |
//! | `jdbc:sqlserver://HOST:PORT;database=NAME;user=NAME;password={PASSWORD}` | a connection string of JDBC |
//! | `Server=tcp:HOST,PORT;Database=NAME;User ID=NAME;Password='PASSWORD'` | a connection string of ADO.NET |
//!
//! Query parameters of the URL: `encrypt`, `trust_server_certificate`, `trust_server_certificate_ca`,
//! `host_name_in_certificate` (see [TLS](#tls)), `application_name`, `instance`, `database`, `multi_subnet_failover`, and for what
//! [`SqlServerLocks`] has methods: `waiting_sessions=3`, `token_table=dbo.fencelock_token`, `db_principal=public`. Connection
//! strings have what the driver reads, and no parameters of ours; for both, and anything else, make the driver's
//! [`Config`] yourself.
//!
//! # How it works
//!
//! A lock is an application lock (`sp_getapplock`), owned by a session, with the resource that [`lock_resource`] makes of
//! the name. Many are held on one session: one connection for each TTL in use, however many locks. A claim and a release are
//! one round trip each; a claim that is granted draws its fencing token in the same one.
//!
//! Waiters block on the server, which wakes them in the order in which they came, also when the holder's process or machine
//! dies. Each needs a session of its own while it waits, and for as long as it holds what it got: at most
//! [`waiting_sessions`](SqlServerLocks::waiting_sessions) for a provider, in which all callers who wait for one name count
//! once. Who waits for more names than that looks twice a second, and is the next to get a session.
//!
//! The server ends no session because it hasn't heard from it, and lets nobody but administrators end one. So the locks of a
//! holder that is *frozen* stay with it until it goes on or its connection ends, which
//! [`capabilities`](crate::LockProvider::capabilities) tell ([`Expiry::Session`]); those of one that dies are free when its
//! connection ends: at once if its machine lives, otherwise when the server's keep-alive gives up, after half a minute or
//! so. A heartbeat every third of the TTL, one for all locks on a session, tells the holder that its session lives: when it
//! hasn't been answered for a TTL, its guards are lost ([`Loss::Expired`](crate::Loss::Expired)), by its own clock. A session that
//! ends (`KILL`, a restart, a failover, a broken connection) takes its locks with it: their guards are told at once
//! ([`Loss::SessionEnded`](crate::Loss::SessionEnded)), and until a job heeds that only the fencing token protects.
//!
//! No answer is taken for another's: each brings back a number that was sent with its request, and a connection on which anything
//! fails, is cancelled, or answers something else is thrown away. Another session then makes sure that its locks are
//! free, by a lock that each session holds for as long as it lives.
//!
//! # Fencing tokens
//!
//! They come from a table, `dbo.fencelock_token` unless it is [named otherwise](SqlServerLocks::token_table), which must be
//! the same for all programs that share locks. It is made on first use. A user who may not create it needs it to be there, and
//! rights on it:
//!
//! ```sql
//! CREATE TABLE dbo.fencelock_token (bucket int NOT NULL PRIMARY KEY, token bigint NOT NULL);
//! GRANT SELECT, INSERT, UPDATE ON dbo.fencelock_token TO app;
//! ```
//!
//! It has 16 rows at most. A token is the last one of the row plus one, or the server's clock in microseconds since 1970 (read in
//! milliseconds), whichever is larger. It is on the server's disk before the grant is answered, unless the database
//! delays that (`DELAYED_DURABILITY`); what a crash, or a failover to a replica that lags behind, loses lies behind the clock.
//!
//! # Other programs
//!
//! `EXEC sp_getapplock @Resource = '…', @LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = -1`, with what
//! [`lock_resource`] returns, excludes us and is excluded. Locks of other programs with resources of their own can be shared by
//! [`SqlServerLocks::lock`]; and [`lock_in_transaction`] takes a lock for one transaction of your own, the strongest fence of
//! all. Application locks belong to a database *and* a principal of it: `public`, unless
//! [`db_principal`](SqlServerLocks::db_principal) names another.
//!
//! # Rights
//!
//! To connect, to belong to the principal (everybody belongs to `public`), and those on the table. Nothing in a catalogue is
//! read that would need more.
//!
//! # TLS
//!
//! With the feature `rustls`. In a URL, or where a connection string doesn't say:
//!
//! | `encrypt=` | |
//! |---|---|
//! | `on`, and by default | everything is encrypted, and the server's certificate verified by those that the system trusts, or that in the file `trust_server_certificate_ca`; `trust_server_certificate=true` takes any, which protects from listeners, not from impostors |
//! | `strict` | the same by TDS 8.0 (SQL Server 2022) |
//! | `login` | only the login is encrypted |
//! | `off` | nothing is |
//!
//! To an address of the machine itself (`localhost`, `127.0.0.1`), where `encrypt` isn't said, it is encrypted if both sides can,
//! whatever the certificate.
//!
//! The driver can be built with one TLS only, so the feature `native-tls` adds none to it. To use that one, turn on `native-tls` of
//! the crate `tiberius` in your own manifest, and not the feature `rustls` here. In the same way `integrated-auth-gssapi` (Kerberos)
//! and `sspi-rs` (NTLM) there add Windows logins on Unix; on Windows they work as it is. Tokens of Microsoft Entra are for
//! [`SqlServerLocks::with_configs`], since they expire.
//!
//! # Limits
//!
//! TTLs are from 200 ms to 24 days. The server's memory is the limit for locks. It releases a session's locks only when it notices
//! that the session has ended; a claim right after that may still find them taken.

mod client;
mod connection;
mod failure;
mod key;
mod open;
mod sql;
mod transaction;
mod url;

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The driver, whose types the constructors take. Its major version is part of this crate's.
pub use tiberius as driver;

use tiberius::Config;

pub use self::key::{AppLock, lock_resource};
pub use self::transaction::{lock_in_transaction, try_lock_in_transaction};
pub(crate) use self::url::{locks as locks_of_url, parameters as parameters_of_url};

use self::client::{Configure, Here, Ways};
use self::key::Principal;
use self::open::SqlServer;
use self::sql::TokenTable;
use crate::backend::{Backend, Claim, Due, Grant, Mode, Outcome, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::sessions::{SessionHold, Sessions};
use crate::error::{Error, ErrorKind, Result};
use crate::options::LockOptions;

const MIN_TTL: Duration = Duration::from_millis(200);
const MAX_TTL: Duration = Duration::from_secs(24 * 86_400);

/// Locks in a database of SQL Server. See the [module](self).
pub struct SqlServerLocks {
    ways: Ways,
    table: TokenTable,
    principal: Principal,
    locks: HashMap<String, AppLock>,
    waiting_sessions: usize,
    sessions: OnceLock<Sessions<SqlServer>>,
}

/// A lock that is held.
pub struct SqlServerHold(SessionHold<SqlServer>);

impl SqlServerLocks {
    /// The table of fencing tokens, unless it is named.
    pub const TOKEN_TABLE: &str = "dbo.fencelock_token";

    /// Locks on the server of this configuration. Its `command_timeout` isn't used: a wait takes as long as it takes. No I/O.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self::with_configs(move || std::future::ready(Ok(config.clone())))
    }

    /// The same with a configuration that is made anew for each connection, as with a token of Microsoft Entra
    /// ([`AuthMethod::aad_token`](driver::AuthMethod::aad_token)), which expires. An error of it is
    /// [`Unavailable`](ErrorKind::Unavailable), and its text, in the error's source, must not contain anything secret. No I/O.
    ///
    /// ```no_run
    /// # async fn fresh_token() -> Result<String, std::io::Error> { unimplemented!() }
    /// use fencelock::sqlserver::SqlServerLocks;
    /// use fencelock::sqlserver::driver::{AuthMethod, Config};
    ///
    /// let locks = SqlServerLocks::with_configs(|| async {
    ///     let mut config = Config::new();
    ///     config.host("example.database.windows.net");
    ///     config.database("jobs");
    ///     config.authentication(AuthMethod::aad_token(fresh_token().await?));
    ///     Ok(config)
    /// });
    /// ```
    #[must_use]
    pub fn with_configs<F>(make: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Config, Box<dyn StdError + Send + Sync>>> + Send + 'static,
    {
        let configure: Configure = Arc::new(move || {
            let config = make();
            Box::pin(async move {
                config.await.map_err(|error| {
                    Error::new(ErrorKind::Unavailable, "no configuration for a connection to SQL Server")
                        .with_source(error)
                })
            })
        });
        Self {
            ways: Ways { configure, here: None },
            table: TokenTable::default(),
            principal: Principal::default(),
            locks: HashMap::new(),
            waiting_sessions: 3,
            sessions: OnceLock::new(),
        }
    }

    /// Locks on the server of an ADO.NET connection string. Unless it has `Encrypt`, TLS is as for a [URL](self#tls). No I/O.
    ///
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) for a string that can't be read; [`Unsupported`](ErrorKind::Unsupported) for TLS in a build
    /// without.
    pub fn from_ado_string(string: &str) -> Result<Self> {
        url::ado(string)
    }

    /// The same of a JDBC connection string, which begins with `jdbc:sqlserver:`.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn from_jdbc_string(string: &str) -> Result<Self> {
        url::jdbc(string)
    }

    /// For a server on this machine, with another configuration if it hasn't got TLS.
    fn here(mut self, without_tls: Option<Config>) -> Self {
        let without_tls = without_tls.map(|config| Self::new(config).ways.configure);
        self.ways.here = Some(Here { without_tls });
        self
    }

    /// For how many names at a time claims may have a session of their own: to block on the server, and to hold what they get.
    /// Default: 3. With none, waiters look twice a second.
    #[must_use]
    pub fn waiting_sessions(mut self, sessions: usize) -> Self {
        self.waiting_sessions = sessions;
        self
    }

    /// The table that fencing tokens come from: `name` or `schema.name`, which are quoted. It must be the same one for all
    /// who share locks. Default: [`TOKEN_TABLE`](Self::TOKEN_TABLE).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for what can't be a name.
    pub fn token_table(mut self, name: &str) -> Result<Self> {
        self.table = TokenTable::parse(name)?;
        Ok(self)
    }

    /// Whose the locks are (`@DbPrincipal`): a user or a role of the database, to which the login must belong. Those of two
    /// principals are two locks. Default: `public`, everybody.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for what can't be a name.
    pub fn db_principal(mut self, principal: &str) -> Result<Self> {
        self.principal = Principal::parse(principal)?;
        Ok(self)
    }

    /// Gives the lock `name` (with the provider's prefix, if it has one: `app:nightly-report`) the application lock that
    /// another program uses. Names with the same one are the same lock.
    ///
    /// ```
    /// # use fencelock::sqlserver::{AppLock, SqlServerLocks, driver::Config};
    /// let locks = SqlServerLocks::new(Config::new()).lock("import", AppLock::of_resource("Import of Orders")?);
    /// # Ok::<(), fencelock::Error>(())
    /// ```
    #[must_use]
    pub fn lock(mut self, name: impl Into<String>, lock: AppLock) -> Self {
        self.locks.insert(name.into(), lock);
        self
    }

    /// Opens a session, so that what is wrong is known now. The first claim would do it otherwise.
    ///
    /// # Errors
    ///
    /// What the server says.
    pub async fn connect(&self) -> Result<()> {
        self.connect_for(LockOptions::DEFAULT_TTL).await
    }

    /// Opens a session for locks of this TTL.
    pub(crate) async fn connect_for(&self, ttl: Duration) -> Result<()> {
        self.sessions().connect(ttl).await
    }

    fn sessions(&self) -> &Sessions<SqlServer> {
        self.sessions.get_or_init(|| {
            let (table, principal) = (self.table.clone(), self.principal.name().clone());
            let server = SqlServer::new(self.ways.clone(), table, principal);
            Sessions::new(server, self.waiting_sessions)
        })
    }

    fn lock_of(&self, claim: &Claim) -> Result<AppLock> {
        if claim.mode != Mode::Exclusive {
            return Err(Error::new(ErrorKind::Unsupported, "sqlserver locks are exclusive"));
        }
        let name = claim.name.as_str();
        let lock = self.locks.get(name).cloned().unwrap_or_else(|| AppLock::from(name));
        Ok(lock.or_principal(&self.principal))
    }
}

impl Backend for SqlServerLocks {
    type Hold = SqlServerHold;

    fn name(&self) -> &'static str {
        "sqlserver"
    }

    fn capabilities(&self) -> Capabilities {
        let blocks = self.waiting_sessions > 0;
        Capabilities::new(MIN_TTL, MAX_TTL, Expiry::Session).wakes_waiters(blocks).fairness(if blocks {
            Fairness::Fifo
        } else {
            Fairness::None
        })
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<SqlServerHold>> {
        let lock = self.lock_of(claim)?;
        Ok(self.sessions().try_claim(claim, &lock, wait).await?.map(SqlServerHold))
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        self.sessions().abandon(claim).await
    }

    async fn renew(&self, due: &[Due<'_, SqlServerHold>]) -> Vec<Renewal> {
        let due: Vec<_> = due.iter().map(|due| Due { hold: &due.hold.0, ttl: due.ttl }).collect();
        self.sessions().renew(&due).await
    }

    /// The engine keeps a lock until `keep_for` is over, since here it would end with the process.
    async fn release(&self, hold: &SqlServerHold, _: Duration) -> Result<Released> {
        self.sessions().release(&hold.0).await
    }

    async fn transfer(&self, hold: &SqlServerHold, to: &Claim) -> Result<Option<Grant<SqlServerHold>>> {
        Ok(self.sessions().transfer(&hold.0, to).await?.map(|grant| grant.map(SqlServerHold)))
    }

    async fn close(&self) -> Result<()> {
        self.sessions().close().await;
        Ok(())
    }
}

impl fmt::Debug for SqlServerLocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlServerLocks")
            .field("table", &self.table)
            .field("principal", &self.principal)
            .field("waiting_sessions", &self.waiting_sessions)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SqlServerHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
