//! Locks that end with a transaction of the application's own.

use futures_util::io::{AsyncRead, AsyncWrite};
use tiberius::{Client, ToSql};

use super::client::Answer;
use super::failure;
use super::key::AppLock;
use super::sql;
use crate::error::{Error, ErrorKind, Result};

/// How long one request waits, in milliseconds: less than the driver gives a command unless it is told otherwise.
const WAIT_MILLIS: i32 = 5000;

/// Waits for a lock, and holds it until the transaction ends: by commit, by rollback, or with its session.
///
/// The strongest fence there is: what the transaction has written is there only if it held the lock to its end. So there is
/// no guard and no fencing token, and neither TTL nor heartbeat: a transaction that is left open keeps the lock. It
/// excludes, and is excluded by, whoever has the same lock from a [`SqlServerLocks`](super::SqlServerLocks) on the same
/// database, whose prefix, if it has one, is part of the name: `app:nightly-report`. Nothing but the lock is touched
/// (`@LockOwner = 'Transaction'`).
///
/// `lock` is a name, or an [`AppLock`].
///
/// The server is asked again every five seconds, so that the driver's
/// [`command_timeout`](super::driver::Config::command_timeout), if it is longer than that, doesn't cut the wait short.
///
/// ```no_run
/// # use fencelock::sqlserver::driver;
/// # async fn example<S>(client: &mut driver::Client<S>) -> Result<(), Box<dyn std::error::Error>>
/// # where S: futures_util::io::AsyncRead + futures_util::io::AsyncWrite + Unpin + Send {
/// client.begin_transaction().await?;
/// fencelock::sqlserver::lock_in_transaction(client, "import").await?;
/// client.execute("UPDATE stock SET amount = amount - 1", &[]).await?;
/// client.commit_transaction().await?; // the lock is free
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// [`Config`](ErrorKind::Config) if no transaction is open; [`Unavailable`](ErrorKind::Unavailable) if it was chosen as the
/// victim of a deadlock with what the transaction has locked before; and what else the server says. After an error that
/// isn't `Config` throw the client away, and the transaction with it.
///
/// # Cancel safety
///
/// None: dropped, the server goes on waiting, and the driver may take its answer for another's. Throw the client away.
pub async fn lock_in_transaction<S>(client: &mut Client<S>, lock: impl Into<AppLock> + Send) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let lock = lock.into();
    while !take(client, &lock, WAIT_MILLIS).await? {}
    Ok(())
}

/// Takes a lock until the transaction ends, if it is free. See [`lock_in_transaction`].
///
/// # Errors
///
/// As there.
///
/// # Cancel safety
///
/// None, as there.
pub async fn try_lock_in_transaction<S>(
    client: &mut Client<S>,
    lock: impl Into<AppLock> + Send,
) -> Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    take(client, &lock.into(), 0).await
}

async fn take<S>(client: &mut Client<S>, lock: &AppLock, within: i32) -> Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let proof = super::client::some_proof();
    let (resource, principal) = (lock.resource().to_string(), lock.principal().to_string());
    let parameters: [&dyn ToSql; 4] = [&proof, &resource, &principal, &within];
    let asked = async {
        let results =
            async { client.query(sql::LOCK_IN_TRANSACTION, &parameters).await?.into_results().await };
        let answer = Answer::check(results.await.map_err(|error| failure::of_request(&error))?, proof)?;
        if answer.require::<i32>(4)? == 0 {
            return Err(Error::new(ErrorKind::Config, "no transaction is open on this client"));
        }
        failure::granted(&answer)
    };
    asked.await.map_err(failed)
}

fn failed(error: Error) -> Error {
    // What the transaction did is undone with its session, and the lock goes with it.
    let error = if error.kind() == ErrorKind::Unknown {
        let message =
            "the connection to SQL Server can't be used any more, and the transaction is lost with it";
        Error::new(ErrorKind::Unavailable, message).with_source(error)
    } else {
        error
    };
    error.during("acquire", "sqlserver", None)
}
