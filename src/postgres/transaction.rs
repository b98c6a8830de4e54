//! Locks that end with a transaction of the application's own.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error as DriverError, Row, Transaction};

use super::failure;
use super::key::{AdvisoryKey, Asks};
use crate::error::{Error, ErrorKind, Result};

/// Waits for a lock, and holds it until the transaction ends: by commit, by rollback, or with its session.
///
/// The strongest fence there is: what the transaction has written is there only if it held the lock to its end. So there is
/// no guard and no fencing token, and neither TTL nor heartbeat: a transaction that is left open keeps the lock, unless
/// `idle_in_transaction_session_timeout` is set. It excludes, and is excluded by, whoever has the same lock from a
/// [`PostgresLocks`](super::PostgresLocks) on the same database, whose prefix, if it has one, is part of the name:
/// `app:nightly-report`. Nothing but the lock is touched, so that isolation level and durability stay what they are. Use
/// `READ COMMITTED`: above it the transaction sees the database as it was when it began to wait, without what the last holder has
/// committed.
///
/// `lock` is a name, or a key: `i64`, `(i32, i32)`.
///
/// ```no_run
/// # async fn example(client: &mut fencelock::postgres::driver::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let transaction = client.transaction().await?;
/// fencelock::postgres::lock_in_transaction(&transaction, "import").await?;
/// transaction.execute("UPDATE stock SET amount = amount - 1", &[]).await?;
/// transaction.commit().await?; // the lock is free
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// What the server says; afterwards the transaction can only be rolled back. That includes a `lock_timeout` or
/// `statement_timeout` of the session, and a deadlock with what the transaction has locked before: kind
/// [`Unavailable`](ErrorKind::Unavailable).
///
/// # Cancel safety
///
/// Dropped, the server goes on waiting, and the transaction with it, until the lock is granted: drop the client, too.
pub async fn lock_in_transaction(
    transaction: &Transaction<'_>,
    lock: impl Into<AdvisoryKey> + Send,
) -> Result<()> {
    let locked = lock.into().ask(transaction, "SELECT pg_advisory_xact_lock(KEY)").await;
    locked.map(drop).map_err(|error| failed(&error))
}

/// Takes a lock until the transaction ends, if it is free. See [`lock_in_transaction`].
///
/// # Errors
///
/// What the server says; afterwards the transaction can only be rolled back.
///
/// # Cancel safety
///
/// Dropped, the transaction may or may not hold the lock until it ends.
pub async fn try_lock_in_transaction(
    transaction: &Transaction<'_>,
    lock: impl Into<AdvisoryKey> + Send,
) -> Result<bool> {
    let rows = lock.into().ask(transaction, "SELECT pg_try_advisory_xact_lock(KEY)").await;
    let rows = rows.map_err(|error| failed(&error))?;
    rows.first().map_or(Ok(false), |row| row.try_get(0)).map_err(|error| failed(&error))
}

impl Asks for Transaction<'_> {
    async fn ask(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, DriverError> {
        self.query_typed(statement, parameters).await
    }
}

fn failed(error: &DriverError) -> Error {
    let error = failure::of_request(error);
    // What the transaction did is undone with its session, and the lock goes with it.
    let error = if error.kind() == ErrorKind::Unknown {
        Error::new(ErrorKind::Unavailable, "the connection to PostgreSQL broke, and the transaction with it")
            .with_source(error)
    } else {
        error
    };
    error.during("acquire", "postgres", None)
}
