//! [`PgConnection`]: a session of PostgreSQL that holds advisory locks.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error as DriverError, Statement};

use super::client::PgClient;
use super::failure;
use super::key::AdvisoryKey;
use super::open::{Identity, Settings, pooled};
use super::sql::{self, Sequence};
use crate::backend::Instant;
use crate::engine::sessions::{Connection, Ended};
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// How often a statement is sent again that a cancel request has hit which was meant for the one before.
const CANCELLED_AT_MOST: usize = 5;

/// How long the server may take to end a session.
const END_WITHIN: Duration = Duration::from_secs(2);

/// How long after one fencing token others are simply the next ones.
const FRESH_FOR: Duration = Duration::from_millis(500);

pub(super) struct PgConnection {
    client: PgClient,
    identity: Identity,
    settings: Settings,
    tokens: Tokens,
    one: Statements,
    two: OnceCell<Statements>,
    beat: Statement,
}

/// How fencing tokens are drawn, and when the last one was.
struct Tokens {
    /// The expression that makes sure of it.
    draw: String,
    /// The one for a session that has just had another.
    next: String,
    draw_alone: Statement,
    next_alone: Statement,
    /// When one was last made sure of, in the nanoseconds of [`Instant`].
    sure_at: AtomicI64,
}

impl Tokens {
    /// Whether the sequence can't have fallen far behind the clock since one was made sure of.
    fn are_fresh(&self) -> bool {
        Instant::from_nanos(self.sure_at.load(Ordering::Relaxed)).elapsed() < FRESH_FOR
    }

    /// One was made sure of by a request that was sent then.
    fn made_sure(&self, sent: Instant) {
        self.sure_at.fetch_max(sent.to_nanos(), Ordering::Relaxed);
    }
}

/// What is said of one lock, prepared for keys of one number or of two.
struct Statements {
    try_lock: Statement,
    /// With the next token instead of one that has been made sure of.
    try_lock_again: Statement,
    lock: Statement,
    unlock: Statement,
    force_unlock: Statement,
}

impl Statements {
    async fn prepare(
        client: &PgClient,
        pid: i32,
        draw: &str,
        next: &str,
        two: bool,
    ) -> Result<Self, DriverError> {
        let key: &[Type] = if two { &[Type::INT4, Type::INT4] } else { &[Type::INT8] };
        let unlock_types = [key, &[Type::INT8, Type::TEXT]].concat();
        let force = if two { "SELECT pg_advisory_unlock($1, $2)" } else { "SELECT pg_advisory_unlock($1)" };
        let (try_lock, again) = (sql::try_lock(pid, draw, two), sql::try_lock(pid, next, two));
        let (lock, unlock) = (sql::lock(pid, draw, two), sql::unlock(two));
        let (try_lock, try_lock_again, lock, unlock, force_unlock) = tokio::try_join!(
            client.prepare(&try_lock, key),
            client.prepare(&again, key),
            client.prepare(&lock, key),
            client.prepare(&unlock, &unlock_types),
            client.prepare(force, key),
        )?;
        Ok(Self { try_lock, try_lock_again, lock, unlock, force_unlock })
    }
}

/// All that is prepared when a session is opened.
pub(super) struct Prepared {
    tokens: Tokens,
    one: Statements,
    beat: Statement,
}

impl Prepared {
    /// `began` is the server's clock of now, in microseconds since 1970.
    pub(super) async fn new(
        client: &PgClient,
        pid: i32,
        sequence: &Sequence,
        began: i64,
    ) -> Result<Self, DriverError> {
        let (draw, next) = (sequence.draw(Some(began)), sequence.next());
        let (draw_statement, next_statement) = (format!("SELECT {draw}"), format!("SELECT {next}"));
        let (one, draw_alone, next_alone, beat) = tokio::try_join!(
            Statements::prepare(client, pid, &draw, &next, false),
            client.prepare(&draw_statement, &[]),
            client.prepare(&next_statement, &[]),
            client.prepare(sql::PID, &[]),
        )?;
        let tokens = Tokens { draw, next, draw_alone, next_alone, sure_at: AtomicI64::new(i64::MIN) };
        Ok(Self { tokens, one, beat })
    }
}

impl PgConnection {
    pub(super) fn new(client: PgClient, identity: Identity, settings: Settings, prepared: Prepared) -> Self {
        let Prepared { tokens, one, beat } = prepared;
        Self { client, identity, settings, tokens, one, two: OnceCell::new(), beat }
    }

    async fn statements(&self, key: &AdvisoryKey) -> Result<&Statements> {
        match key {
            AdvisoryKey::One(_) => Ok(&self.one),
            AdvisoryKey::Two(..) => {
                let Tokens { draw, next, .. } = &self.tokens;
                let prepare = || Statements::prepare(&self.client, self.identity.pid, draw, next, true);
                self.two.get_or_try_init(prepare).await.map_err(|error| self.client.failed(&error))
            }
        }
    }

    async fn value<T: for<'a> tokio_postgres::types::FromSql<'a>>(
        &self,
        statement: &Statement,
        key: Option<&AdvisoryKey>,
        more: &[&(dyn ToSql + Sync)],
    ) -> Result<T> {
        let row = match key {
            None => self.client.row(statement, more).await,
            Some(AdvisoryKey::One(one)) => self.client.row(statement, &[&[one as _], more].concat()).await,
            Some(AdvisoryKey::Two(first, second)) => {
                self.client.row(statement, &[&[first as _, second as _], more].concat()).await
            }
        };
        // An answer that doesn't fit is somebody else's.
        row.and_then(|row| row.try_get(0)).map_err(|error| self.client.failed(&error))
    }

    /// After a statement that may have locked before it failed.
    async fn force_unlock(&self, key: &AdvisoryKey, error: Error) -> Error {
        if error.kind() == ErrorKind::Unknown || self.client.is_over().is_some() {
            return error;
        }
        let unlock = async {
            let statement = &self.statements(key).await?.force_unlock;
            self.value::<bool>(statement, Some(key), &[]).await
        };
        match unlock.await {
            Ok(_) => error,
            Err(_) => Error::new(ErrorKind::Unknown, "a lock may be left from a claim that failed")
                .with_source(error),
        }
    }

    /// A pooler has put us on another session. Ours may be somebody else's by now, and is left alone.
    fn swapped(&self) -> Error {
        self.client.disown();
        pooled()
    }

    async fn about(&self, statement: &str, other: &Self) -> Result<bool> {
        let Identity { pid, began, .. } = &other.identity;
        let rows = self.client.rows(statement, &[(pid, Type::INT4), (began, Type::INT8)]).await;
        let rows = rows.map_err(|error| self.client.failed(&error))?;
        rows.first().map_or(Ok(false), |row| row.try_get(0)).map_err(|error| self.client.failed(&error))
    }
}

pub(super) fn to_token(drawn: i64) -> Result<FencingToken> {
    u64::try_from(drawn).ok().and_then(FencingToken::new).ok_or_else(|| {
        Error::new(
            ErrorKind::Exhausted,
            "the sequence of fencing tokens has come to its end, or is no such sequence",
        )
    })
}

/// Waits until the server has ended a session.
pub(super) async fn until<F>(has_ended: impl Fn() -> F + Send + Sync) -> Result<()>
where
    F: Future<Output = Result<bool>> + Send,
{
    let ended = async {
        while !has_ended().await? {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    };
    tokio::time::timeout(END_WITHIN, ended)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "PostgreSQL doesn't end a session")))
}

impl Connection for PgConnection {
    type Key = AdvisoryKey;

    async fn try_lock(&self, key: &AdvisoryKey) -> Result<Option<FencingToken>> {
        let statements = self.statements(key).await?;
        let (sent, fresh) = (Instant::now(), self.tokens.are_fresh());
        let statement = if fresh { &statements.try_lock_again } else { &statements.try_lock };
        let drawn = match self.value::<Option<i64>>(statement, Some(key), &[]).await {
            Ok(None) => return Ok(None),
            Ok(Some(sql::SWAPPED)) => return Err(self.swapped()),
            Ok(Some(drawn)) => to_token(drawn),
            Err(error) => Err(error),
        };
        if !fresh && drawn.is_ok() {
            self.tokens.made_sure(sent);
        }
        match drawn {
            Ok(token) => Ok(Some(token)),
            Err(error) => Err(self.force_unlock(key, error).await),
        }
    }

    async fn lock(&self, key: &AdvisoryKey) -> Result<FencingToken> {
        let statement = &self.statements(key).await?.lock;
        match self.value(statement, Some(key), &[]).await? {
            sql::SWAPPED => Err(self.swapped()),
            drawn => to_token(drawn),
        }
    }

    async fn unlock(&self, key: &AdvisoryKey) -> Result<bool> {
        let statement = &self.statements(key).await?.unlock;
        let unlocked = self.value(statement, Some(key), &[&key.of_waiters(), &key.to_string()]).await;
        match unlocked {
            // Such as the room for notifications. That the lock is unlocked isn't undone by an error; nobody else has it here.
            Err(error) if error.kind() != ErrorKind::Unknown && self.client.is_over().is_none() => {
                match self.force_unlock(key, error).await {
                    error if error.kind() == ErrorKind::Unknown => Err(error),
                    _ => Ok(true),
                }
            }
            answer => answer,
        }
    }

    async fn token(&self, _: &AdvisoryKey) -> Result<FencingToken> {
        let (sent, fresh) = (Instant::now(), self.tokens.are_fresh());
        let statement = if fresh { &self.tokens.next_alone } else { &self.tokens.draw_alone };
        let token = self.value::<i64>(statement, None, &[]).await.and_then(to_token)?;
        if !fresh {
            self.tokens.made_sure(sent);
        }
        Ok(token)
    }

    async fn beat(&self) -> Result<()> {
        let pid: i32 = self.value(&self.beat, None, &[]).await?;
        if pid == self.identity.pid {
            return Ok(());
        }
        Err(self.swapped())
    }

    async fn set_ttl(&self, ttl: Duration) -> Result<()> {
        self.settings.apply(&self.client, ttl).await.map_err(|error| self.client.failed(&error))
    }

    async fn clear(&self) -> Result<()> {
        let mut cancelled = 0;
        loop {
            match self.client.rows("SELECT pg_advisory_unlock_all()", &[]).await {
                Ok(_) => return Ok(()),
                Err(error) if failure::is_cancelled(&error) && cancelled < CANCELLED_AT_MOST => {
                    cancelled += 1;
                }
                Err(error) => return Err(self.client.failed(&error)),
            }
        }
    }

    async fn cancel(&self, waiting: &Self) -> Result<()> {
        self.about(sql::CANCEL, waiting).await.map(drop)
    }

    async fn has_answered(&self, other: &Self) -> Result<bool> {
        self.about(sql::HAS_ANSWERED, other).await
    }

    async fn terminate(&self, other: &Self) -> Result<()> {
        if other.client.is_disowned() {
            // What we had locked there must not stay; but it may be working for somebody else. The pooler will bring us there
            // again, sooner or later.
            return until(|| async {
                let pid = other.identity.pid;
                let rows = self.client.rows(sql::UNLOCK_THERE, &[(&pid, Type::INT4)]).await;
                let rows = rows.map_err(|error| self.client.failed(&error))?;
                let was_there = rows.first().map_or(Ok(false), |row| row.try_get(0));
                Ok(was_there.map_err(|error| self.client.failed(&error))?
                    || !self.about(sql::IS_THERE, other).await?)
            })
            .await;
        }
        self.about(sql::TERMINATE, other).await?;
        until(|| async { self.about(sql::IS_THERE, other).await.map(|is_there| !is_there) }).await
    }

    async fn announce(&self, key: &AdvisoryKey) -> Result<()> {
        if !self.client.hears() {
            return Ok(()); // somebody else hears it
        }
        // In one message, so that a withdrawal can't overtake the half of it.
        let announce =
            format!("LISTEN {}; SELECT pg_advisory_lock_shared({})", sql::CHANNEL, key.of_waiters());
        self.client.run(&announce).await.map_err(|error| self.client.failed(&error))
    }

    async fn withdraw(&self, key: &AdvisoryKey) -> Result<()> {
        if !self.client.hears() {
            return Ok(());
        }
        let statement = "SELECT pg_advisory_unlock_shared($1)";
        let answer = self.client.rows(statement, &[(&key.of_waiters(), Type::INT8)]).await;
        answer.map(drop).map_err(|error| self.client.failed(&error))
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
        self.settings.hand_back(&self.client).await;
    }
}

impl fmt::Debug for PgConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgConnection").field("pid", &self.identity.pid).finish_non_exhaustive()
    }
}
