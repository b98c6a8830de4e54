//! [`ScopedConnection`]: a lock that lasts as long as a transaction, for poolers that swap sessions between transactions.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Error as DriverError, Row};

use super::client::PgClient;
use super::connection::{to_token, until};
use super::failure;
use super::key::AdvisoryKey;
use super::open::Postgres;
use super::sql;
use crate::engine::lock;
use crate::engine::sessions::{Connection, Ended, Listeners, Role, Server};
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// A database of PostgreSQL behind a pooler.
#[derive(Debug)]
pub(super) struct ScopedPostgres(pub(super) Arc<Postgres>);

impl Server for ScopedPostgres {
    type Key = AdvisoryKey;
    type Connection = ScopedConnection;

    fn shares(&self) -> bool {
        false // one could not end without the others
    }

    async fn open(
        &self,
        _: Role,
        ttl: Duration,
        listeners: &Arc<Listeners<AdvisoryKey>>,
    ) -> Result<ScopedConnection> {
        let client = (self.0.connector)(listeners.clone()).await?;
        let found = self.0.introduce(&client).await?;
        self.0.prepare_sequence(&client, &found).await?;
        let drawer = (self.0.connector)(Arc::default()).await?;
        // A server that has crashed behind the pooler doesn't show here: each token is made sure of.
        let draw = format!("SELECT {}", self.0.sequence.draw(None));
        let state = Mutex::new(State { ttl, transaction: None });
        Ok(ScopedConnection { client, drawer, draw, state })
    }
}

/// A connection that holds one lock at a time.
pub(super) struct ScopedConnection {
    client: PgClient,
    /// Where tokens are drawn: within the lock's transaction one would keep others from drawing until it ends.
    drawer: PgClient,
    draw: String,
    state: Mutex<State>,
}

struct State {
    ttl: Duration,
    /// The server process of the transaction and what it is for, while there is one.
    transaction: Option<(i32, AdvisoryKey)>,
}

impl ScopedConnection {
    /// Begins a transaction, and asks for the lock in it once its process is known.
    async fn begin_and(&self, key: &AdvisoryKey, function: &str) -> Result<bool> {
        let ttl = lock(&self.state).ttl.as_millis();
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL idle_in_transaction_session_timeout = {ttl}; \
             SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"
        );
        let ((), rows) =
            tokio::try_join!(self.client.run(&begin), self.client.rows(sql::PID, &[])).map_err(failed)?;
        lock(&self.state).transaction = Some((first(&rows)?, *key));
        first(&key.ask(&self.client, function).await.map_err(failed)?)
    }

    async fn rollback(&self) -> Result<()> {
        self.client.run("ROLLBACK").await.map_err(failed)?;
        lock(&self.state).transaction = None;
        Ok(())
    }

    async fn draw(&self) -> Result<FencingToken> {
        let rows = self.drawer.rows(&self.draw, &[]).await.map_err(failed)?;
        to_token(first(&rows)?)
    }

    /// Its token. Without one the transaction ends, and the lock with it.
    async fn with_token(&self) -> Result<FencingToken> {
        match self.draw().await {
            Ok(token) => Ok(token),
            Err(error) => {
                self.rollback().await?;
                // Nothing is unknown about the lock.
                let kind =
                    if error.kind() == ErrorKind::Unknown { ErrorKind::Unavailable } else { error.kind() };
                Err(Error::new(kind, "no fencing token could be drawn").with_source(error))
            }
        }
    }
}

fn first<T: for<'a> FromSql<'a>>(rows: &[Row]) -> Result<T> {
    match rows.first().map(|row| row.try_get(0)) {
        Some(read) => read.map_err(failed),
        None => Err(Error::new(ErrorKind::Unknown, "an answer without a row")),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it stands where a function is mapped")]
fn failed(error: DriverError) -> Error {
    failure::of_request(&error)
}

impl Connection for ScopedConnection {
    type Key = AdvisoryKey;

    async fn try_lock(&self, key: &AdvisoryKey) -> Result<Option<FencingToken>> {
        match self.begin_and(key, "SELECT pg_try_advisory_xact_lock(KEY)").await {
            Ok(true) => self.with_token().await.map(Some),
            Ok(false) => self.rollback().await.map(|()| None),
            Err(error) if error.kind() == ErrorKind::Unknown || self.is_over().is_some() => Err(error),
            Err(error) => self.rollback().await.and(Err(error)),
        }
    }

    async fn lock(&self, key: &AdvisoryKey) -> Result<FencingToken> {
        self.begin_and(key, "SELECT pg_advisory_xact_lock(KEY) IS NOT NULL").await?;
        self.draw().await
    }

    async fn unlock(&self, _: &AdvisoryKey) -> Result<bool> {
        self.rollback().await?; // nothing else was done in it
        Ok(true)
    }

    async fn token(&self, _: &AdvisoryKey) -> Result<FencingToken> {
        self.draw().await
    }

    async fn beat(&self) -> Result<()> {
        let transaction = lock(&self.state).transaction;
        let pid: i32 = first(&self.client.rows(sql::PID, &[]).await.map_err(failed)?)?;
        if transaction.is_some_and(|(known, _)| known != pid) {
            return Err(Error::new(ErrorKind::Unknown, "the transaction has been swapped for another"));
        }
        Ok(())
    }

    async fn set_ttl(&self, ttl: Duration) -> Result<()> {
        lock(&self.state).ttl = ttl;
        Ok(())
    }

    async fn clear(&self) -> Result<()> {
        self.rollback().await
    }

    async fn cancel(&self, _: &Self) -> Result<()> {
        // By the time it arrives the server's process may serve somebody else.
        Err(Error::new(ErrorKind::Unsupported, "waits behind a pooler are ended with their connection"))
    }

    async fn has_answered(&self, other: &Self) -> Result<bool> {
        let Some((pid, _)) = lock(&other.state).transaction else { return Ok(false) };
        let rows = self
            .drawer
            .rows(sql::HAS_ANSWERED_IN_TRANSACTION, &[(&pid, Type::INT4)])
            .await
            .map_err(failed)?;
        // Without the process the transaction is over.
        rows.first().map_or(Ok(true), |row| row.try_get(0)).map_err(failed)
    }

    /// Waits until the pooler has done it: nobody else can tell for whom that process works.
    async fn terminate(&self, other: &Self) -> Result<()> {
        let Some((pid, key)) = lock(&other.state).transaction else { return Ok(()) };
        let (classid, objid, objsubid) = key.in_pg_locks();
        until(|| async {
            let parameters: [(&(dyn ToSql + Sync), Type); 4] =
                [(&pid, Type::INT4), (&classid, Type::OID), (&objid, Type::OID), (&objsubid, Type::INT2)];
            let held: bool = first(&self.drawer.rows(sql::IS_HELD, &parameters).await.map_err(failed)?)?;
            Ok(!held)
        })
        .await
    }

    fn is_over(&self) -> Option<Ended> {
        self.client.is_over()
    }

    fn closed(&self) -> impl Future<Output = Ended> + Send + 'static {
        self.client.closed()
    }

    fn break_off(&self) {
        self.client.break_off();
        self.drawer.hand_back();
    }

    async fn close(&self) {
        self.client.hand_back();
        self.drawer.hand_back();
    }
}

impl fmt::Debug for ScopedConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScopedConnection").finish_non_exhaustive()
    }
}
