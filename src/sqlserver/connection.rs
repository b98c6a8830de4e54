//! [`SqlConnection`]: a session of SQL Server that holds application locks.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::client::{Answer, SqlClient, Value};
use super::failure;
use super::key::AppLock;
use super::open::{Identity, Statements, create_table};
use crate::engine::lock;
use crate::engine::sessions::{Connection, Ended};
use crate::engine::worker::OnDrop;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// How long one request waits on the server, in milliseconds; then another one does. What bounds a wait whose end nobody
/// would hear of is not this, but the connection.
const WAIT_MILLIS: i32 = 600_000;

/// The error about a table that isn't there.
const NO_TABLE: i32 = 208;

/// How long the server may take to end a session.
const END_WITHIN: Duration = Duration::from_secs(2);

pub(super) struct SqlConnection {
    client: SqlClient,
    identity: Identity,
    statements: Arc<Statements>,
    /// Whether it waits for a lock.
    is_waiting: AtomicBool,
    /// What it has waited for last.
    waited_for: Mutex<Option<AppLock>>,
}

impl SqlConnection {
    pub(super) fn new(client: SqlClient, identity: Identity, statements: Arc<Statements>) -> Self {
        Self {
            client,
            identity,
            statements,
            is_waiting: AtomicBool::new(false),
            waited_for: Mutex::default(),
        }
    }

    async fn about(&self, statement: &Arc<str>, key: &AppLock, more: &[Value]) -> Result<Answer> {
        let mut values = vec![Value::Text(key.resource().clone()), Value::Text(key.principal())];
        values.extend_from_slice(more);
        self.client.ask(statement, values).await
    }

    /// Where the tokens of a lock are drawn, and how.
    fn row(&self, key: &AppLock) -> [Value; 2] {
        [Value::Int(key.bucket()), Value::Text(self.statements.draw.clone())]
    }

    /// Whether nobody has a lock that shows something about a session.
    async fn is_free(&self, mark: &Arc<str>) -> Result<bool> {
        let values = vec![Value::Text(mark.clone()), Value::Text(self.identity.principal.clone())];
        match self.client.ask(&self.statements.is_free, values).await?.get::<i32>(1)? {
            Some(free) => Ok(free == 1),
            None => Err(Error::new(ErrorKind::Unavailable, "SQL Server doesn't say whether a lock is free")),
        }
    }

    /// The token that a claim has drawn. `None`: it hasn't got the lock in time.
    async fn claimed(&self, answer: &Answer) -> Result<Option<FencingToken>> {
        if answer.get::<i32>(2)? == Some(NO_TABLE) {
            // Somebody has dropped it. Tokens go on by the clock.
            create_table(&self.client, &self.statements).await?;
            let message = "the table of fencing tokens was gone, and has been made anew";
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        if !failure::granted(answer)? {
            return Ok(None);
        }
        // Without one it can't have been granted.
        let drawn = answer.drawn()?;
        let drawn =
            drawn.ok_or_else(|| Error::new(ErrorKind::Unknown, "SQL Server has drawn no fencing token"))?;
        to_token(drawn).map(Some)
    }

    /// Of a claim that may have left a lock: the token that it drew can't be used.
    async fn left(&self, key: &AppLock, error: Error) -> Error {
        if error.kind() != ErrorKind::Exhausted {
            return error;
        }
        match self.unlock(key).await {
            Ok(_) => error,
            Err(_) => Error::new(ErrorKind::Unknown, "a lock may be left from a claim that failed")
                .with_source(error),
        }
    }
}

fn to_token(drawn: i64) -> Result<FencingToken> {
    let token = u64::try_from(drawn).ok().filter(|drawn| *drawn <= FencingToken::MAX_DRAWN);
    token.and_then(FencingToken::new).ok_or_else(|| {
        Error::new(
            ErrorKind::Exhausted,
            "the fencing tokens have come to their end, or their table is no such table",
        )
    })
}

impl Connection for SqlConnection {
    type Key = AppLock;

    async fn try_lock(&self, key: &AppLock) -> Result<Option<FencingToken>> {
        let answer = self.about(&self.statements.try_lock, key, &self.row(key)).await?;
        match self.claimed(&answer).await {
            Err(error) => Err(self.left(key, error).await),
            claimed => claimed,
        }
    }

    async fn lock(&self, key: &AppLock) -> Result<FencingToken> {
        *lock(&self.waited_for) = Some(key.clone());
        self.is_waiting.store(true, Ordering::Release);
        let _ended = OnDrop(Some(|| self.is_waiting.store(false, Ordering::Release)));
        let at_work = [
            Value::Int(WAIT_MILLIS),
            Value::Text(self.identity.at_work.clone()),
            Value::Text(self.identity.principal.clone()),
        ];
        let more: Vec<_> = self.row(key).into_iter().chain(at_work).collect();
        loop {
            let answer = self.about(&self.statements.lock, key, &more).await?;
            if let Some(token) = self.claimed(&answer).await? {
                return Ok(token);
            }
        }
    }

    async fn unlock(&self, key: &AppLock) -> Result<bool> {
        let answer = self.about(&self.statements.unlock, key, &[]).await?;
        Ok(answer.require::<i32>(1)? >= 0)
    }

    async fn token(&self, key: &AppLock) -> Result<FencingToken> {
        let answer = self.about(&self.statements.token, key, &self.row(key)).await?;
        let token = self.claimed(&answer).await?;
        token.ok_or_else(|| Error::new(ErrorKind::Unavailable, "SQL Server has drawn no fencing token"))
    }

    async fn beat(&self) -> Result<()> {
        let answer = self.client.ask(&self.statements.beat, Vec::new()).await?;
        if answer.require::<i32>(1)? == self.identity.spid {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unknown,
            "this connection leads to another session of SQL Server than before",
        ))
    }

    /// The server ends no session by itself.
    async fn set_ttl(&self, _: Duration) -> Result<()> {
        Ok(())
    }

    async fn clear(&self) -> Result<()> {
        let waited_for = lock(&self.waited_for).take();
        if let Some(key) = waited_for {
            self.unlock(&key).await?;
        }
        Ok(())
    }

    /// By the connection that waits: nothing else has a right to. It is thrown away with that.
    async fn cancel(&self, waiting: &Self) -> Result<()> {
        waiting.client.cancel();
        Ok(())
    }

    /// While it works at a wait it holds a lock that shows it. Of other requests nothing is known.
    async fn has_answered(&self, other: &Self) -> Result<bool> {
        Ok(other.is_waiting.load(Ordering::Acquire) && self.is_free(&other.identity.at_work).await?)
    }

    /// Only administrators may end a session. Closed here, it ends there as soon as the server notices.
    async fn terminate(&self, other: &Self) -> Result<()> {
        other.client.break_off();
        let ended = async {
            let mut pause = Duration::from_millis(2);
            while !self.is_free(&other.identity.alive).await? {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            Ok(())
        };
        tokio::time::timeout(END_WITHIN, ended).await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Unavailable, "SQL Server has not noticed yet that a session has ended"))
        })
    }

    fn is_over(&self) -> Option<Ended> {
        self.client.is_over()
    }

    fn closed(&self) -> impl Future<Output = Ended> + Send + 'static {
        self.client.closed()
    }

    fn break_off(&self) {
        self.client.break_off();
    }

    async fn close(&self) {
        self.client.break_off();
    }
}

impl fmt::Debug for SqlConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlConnection").field("spid", &self.identity.spid).finish_non_exhaustive()
    }
}
