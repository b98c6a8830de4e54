//! Opens sessions: what they are, how they are set, where their fencing tokens come from, and that no pooler swaps them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::OnceCell;
use tokio_postgres::Error as DriverError;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::client::{Connector, PgClient};
use super::connection::{PgConnection, Prepared};
use super::failure;
use super::key::AdvisoryKey;
use super::sql::{self, Sequence};
use crate::engine::sessions::{Listeners, Role, Server};
use crate::error::{Error, ErrorKind, Result};

/// PostgreSQL 10, which has sequences as these need them.
const OLDEST: i32 = 100_000;

/// How long an application's pool may take to give a second connection, for a look at what it leads to.
const SECOND_CONNECTION_WITHIN: Duration = Duration::from_secs(1);

/// How often it is looked whether sessions are swapped.
const ROUNDS: usize = 8;

/// A database of PostgreSQL.
pub(super) struct Postgres {
    pub(super) connector: Connector,
    pub(super) sequence: Sequence,
    /// Whether sessions without a server-side limit will do.
    pub(super) without_expiry: bool,
    /// That connections are sessions of their own.
    checked: OnceCell<()>,
}

/// Which session it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) pid: i32,
    /// In microseconds since 1970.
    pub(super) began: i64,
}

/// What a session is.
pub(super) struct Identified {
    pub(super) identity: Identity,
    is_standby: bool,
    version: i32,
    expires: bool,
    /// The server's clock, in microseconds since 1970.
    now: i64,
    has_sequence: bool,
}

impl Postgres {
    pub(super) fn new(connector: Connector, sequence: Sequence, without_expiry: bool) -> Self {
        Self { connector, sequence, without_expiry, checked: OnceCell::new() }
    }

    async fn identify(&self, client: &PgClient) -> Result<Identified> {
        let name = self.sequence.quoted();
        let rows = client.rows(&sql::identify(), &[(&name, Type::TEXT)]).await;
        let rows = rows.map_err(|error| failure::of_opening(&error))?;
        let row =
            rows.first().ok_or_else(|| Error::new(ErrorKind::Unavailable, "the session isn't there"))?;
        let read = || {
            Ok::<_, DriverError>(Identified {
                identity: Identity { pid: row.try_get(0)?, began: row.try_get(1)? },
                is_standby: row.try_get(2)?,
                version: row.try_get(3)?,
                expires: row.try_get(4)?,
                now: row.try_get(5)?,
                has_sequence: row.try_get(6)?,
            })
        };
        read().map_err(|error| failure::of_opening(&error))
    }

    /// Refuses connections that lead to another session with each transaction, as behind a pooler.
    ///
    /// While one connection is idle, a transaction of another one would get its session, or it another session afterwards:
    /// perhaps, if others use the pooler, too.
    async fn check_sessions(&self, client: &PgClient, pid: i32) -> Result<()> {
        let second = tokio::time::timeout(SECOND_CONNECTION_WITHIN, (self.connector)(Arc::default())).await;
        let second = match second {
            Ok(Ok(second)) => Some(second),
            Ok(Err(error)) if client.hears() => return Err(error),
            Ok(Err(_)) | Err(_) => None, // a pool may have no more than one
        };
        // A pooler that doesn't even keep a session for a transaction ends the connection.
        let allows_none =
            || second.as_ref().and_then(PgClient::reason) == Some(&SqlState::PROTOCOL_VIOLATION);
        let refused = |error| if allows_none() { pooled() } else { failure::of_opening(&error) };
        // One that is idle gives its session to the next who begins.
        if let Some(second) = &second {
            second.is_used();
            // By itself: what a connection that is being ended hasn't read yet can cost it the reason.
            second.run("BEGIN").await.map_err(refused)?;
            let others = pid_of(second).await.map_err(refused)?;
            // A pooler may have no other session for us now.
            let ours = if others == pid { pid } else { pid_of(client).await.map_err(refused)? };
            second.run("ROLLBACK").await.map_err(refused)?;
            second.is_clean();
            if others == pid || ours != pid {
                return Err(pooled());
            }
        }
        // While others use the pooler, too, it is a matter of chance. Sent without waiting for the answers, so that it
        // takes no longer over a slow network.
        let ours = join_all((0..2 * ROUNDS).map(|_| pid_of(client)));
        let others = async {
            let Some(second) = &second else { return Ok(Vec::new()) };
            let round = || async {
                tokio::try_join!(second.run("BEGIN"), pid_of(second), second.run("ROLLBACK"))
                    .map(|((), pid, ())| pid)
            };
            let pids = join_all((0..ROUNDS).map(|_| round())).await.into_iter().collect();
            second.is_clean();
            pids
        };
        let (ours, others) = tokio::join!(ours, others);
        let others: Vec<i32> = others.map_err(refused)?;
        let ours = ours.into_iter().collect::<Result<Vec<i32>, _>>().map_err(refused)?;
        if let Some(second) = &second {
            second.hand_back();
        }
        if others.contains(&pid) || ours.iter().any(|&now| now != pid) {
            return Err(pooled());
        }
        Ok(())
    }

    /// Makes the sequence if it is missing and this user may, and says what is wrong with it.
    pub(super) async fn prepare_sequence(&self, client: &PgClient, found: &Identified) -> Result<()> {
        let name = self.sequence.quoted();
        if !found.has_sequence {
            // Also where the user's transactions are read-only unless they say otherwise.
            let made = client.run(&format!("BEGIN READ WRITE; {}; COMMIT", self.sequence.ddl())).await;
            if made.is_err() {
                let _ = client.run("ROLLBACK").await; // without a connection the next request fails
            }
            match made {
                Ok(()) => {}
                // Somebody else was faster.
                Err(error) if is_made_already(&error) => {}
                Err(error) if error.code() == Some(&SqlState::INVALID_SCHEMA_NAME) => {
                    let message = format!("there is no schema for the sequence of fencing tokens, {name}");
                    return Err(Error::new(ErrorKind::Config, message));
                }
                Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                    let ddl = self.sequence.ddl();
                    let message = format!(
                        "the sequence of fencing tokens is missing, and this user can't make it. Let somebody run, once: \
                         {ddl}; GRANT SELECT, USAGE, UPDATE ON SEQUENCE {name} TO the user"
                    );
                    return Err(Error::new(ErrorKind::Denied, message));
                }
                Err(error) => return Err(failure::of_opening(&error)),
            }
        }
        let rows = client.rows(sql::CHECK_SEQUENCE, &[(&name, Type::TEXT)]).await;
        let rows = rows.map_err(|error| failure::of_opening(&error))?;
        let read = |place| rows.first().and_then(|row| row.try_get::<_, bool>(place).ok());
        match (read(0), read(1)) {
            (Some(true), Some(true)) => Ok(()),
            (Some(true), _) => Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "this user may not draw fencing tokens. Let its owner run: \
                     GRANT SELECT, USAGE, UPDATE ON SEQUENCE {name} TO the user"
                ),
            )),
            _ => Err(Error::new(
                ErrorKind::Config,
                format!("{name} is no sequence, or one with a cache, an increment other than 1, or a cycle"),
            )),
        }
    }

    /// What a session is and finds, if it is one to lock on.
    pub(super) async fn introduce(&self, client: &PgClient) -> Result<Identified> {
        let identified = self.identify(client).await?;
        if identified.version < OLDEST {
            return Err(Error::new(ErrorKind::Unsupported, "this server is older than PostgreSQL 10"));
        }
        if identified.is_standby {
            return Err(Error::new(ErrorKind::Unavailable, failure::READ_ONLY));
        }
        Ok(identified)
    }
}

async fn pid_of(client: &PgClient) -> Result<i32, DriverError> {
    let rows = client.rows(sql::PID, &[]).await?;
    rows.first().map_or(Ok(0), |row| row.try_get(0))
}

fn is_made_already(error: &DriverError) -> bool {
    matches!(
        error.code(),
        Some(&SqlState::UNIQUE_VIOLATION | &SqlState::DUPLICATE_TABLE | &SqlState::DUPLICATE_OBJECT)
    )
}

pub(super) fn pooled() -> Error {
    Error::new(ErrorKind::Unsupported, failure::POOLED)
}

const NO_EXPIRY: &str = "before version 14 PostgreSQL doesn't end the session of a holder that is frozen: say that this \
                         will do, by without_server_expiry()";

/// Whether it is only that the server is too old to end the sessions of frozen holders.
pub(super) fn is_without_expiry(error: &Error) -> bool {
    error.message() == NO_EXPIRY
}

impl Server for Postgres {
    type Key = AdvisoryKey;
    type Connection = PgConnection;

    async fn open(
        &self,
        role: Role,
        ttl: Duration,
        listeners: &Arc<Listeners<AdvisoryKey>>,
    ) -> Result<PgConnection> {
        let client = (self.connector)(listeners.clone()).await?;
        let identified = self.introduce(&client).await?;
        let Identified { identity, expires, now, .. } = identified;
        if !expires && !self.without_expiry {
            return Err(Error::new(ErrorKind::Unsupported, NO_EXPIRY));
        }
        self.checked.get_or_try_init(|| self.check_sessions(&client, identity.pid)).await?;
        self.prepare_sequence(&client, &identified).await?;
        let before = as_found(&client).await.map_err(|error| failure::of_opening(&error))?;
        let settings = Settings { role, expires: !self.without_expiry, before };
        client.is_used();
        let set = async {
            settings.apply(&client, ttl).await?;
            settings.apply_where_possible(&client, ttl).await;
            Prepared::new(&client, identity.pid, &self.sequence, now).await
        };
        match set.await {
            Ok(prepared) => Ok(PgConnection::new(client, identity, settings, prepared)),
            Err(error) => {
                settings.hand_back(&client).await;
                Err(failure::of_opening(&error))
            }
        }
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// How a session is set. What a version of PostgreSQL hasn't got is left out.
#[derive(Debug)]
pub(super) struct Settings {
    role: Role,
    expires: bool,
    /// How a connection of the application's was set.
    before: Vec<(String, String)>,
}

impl Settings {
    /// What a session can't do without.
    pub(super) async fn apply(&self, client: &PgClient, ttl: Duration) -> Result<(), DriverError> {
        let idle = if self.expires { ttl.as_millis() } else { 0 };
        let statement = match self.role {
            // No heartbeat has to stand behind a statement for longer.
            Role::Shared => (ttl / 3).as_millis().max(100),
            Role::Own => 0,
        };
        let (idle, statement) = (idle.to_string(), statement.to_string());
        set(
            client,
            &[
                ("idle_session_timeout", &idle),
                ("statement_timeout", &statement),
                // A grant can come in the moment in which this fires.
                ("lock_timeout", "0"),
                ("transaction_timeout", "0"),
                // Nothing but tokens is written, and those follow the clock after a crash.
                ("synchronous_commit", "off"),
                ("default_transaction_isolation", "read committed"),
                ("default_transaction_read_only", "off"),
                // The warning of an unlock that may be one too many.
                ("client_min_messages", "error"),
            ],
        )
        .await
    }

    /// What lets the server notice sooner that a host has vanished, or a client that waits. Some systems haven't got it.
    async fn apply_where_possible(&self, client: &PgClient, ttl: Duration) {
        let seconds = (ttl / 3).as_secs().max(1).to_string();
        let millis = ttl.as_millis().max(1000).to_string();
        let keepalives = [
            ("tcp_keepalives_idle", seconds.as_str()),
            ("tcp_keepalives_interval", &seconds),
            ("tcp_keepalives_count", "2"),
            ("tcp_user_timeout", &millis),
        ];
        let _ = tokio::join!(
            set(client, &keepalives),
            set(client, &[("client_connection_check_interval", "1s")])
        );
    }

    /// Lets the application have its connection back, with nothing of ours on it, or closes one that is ours.
    pub(super) async fn hand_back(&self, client: &PgClient) {
        if client.hears() || self.undo(client).await.is_ok() {
            client.hand_back();
        } else {
            client.break_off();
        }
    }

    /// Undoes all that a session of ours changes.
    async fn undo(&self, client: &PgClient) -> Result<(), DriverError> {
        client.run("SELECT pg_advisory_unlock_all()").await?;
        let before: Vec<_> =
            self.before.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        set(client, &before).await
    }
}

/// The settings that [`Settings`] changes.
const CHANGED: [&str; 13] = [
    "idle_session_timeout",
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
    "synchronous_commit",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "client_min_messages",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_keepalives_count",
    "tcp_user_timeout",
    "client_connection_check_interval",
];

/// How they are now on a connection of the application's.
async fn as_found(client: &PgClient) -> Result<Vec<(String, String)>, DriverError> {
    if client.hears() {
        return Ok(Vec::new()); // it is ours, and won't be used for anything else
    }
    let rows = client.rows(sql::AS_FOUND, &[(&CHANGED.as_slice(), Type::TEXT_ARRAY)]).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

async fn set(client: &PgClient, settings: &[(&str, &str)]) -> Result<(), DriverError> {
    let (names, values): (Vec<_>, Vec<_>) = settings.iter().copied().unzip();
    client.rows(sql::SET, &[(&names, Type::TEXT_ARRAY), (&values, Type::TEXT_ARRAY)]).await.map(drop)
}
