//! [`PgClient`]: a connection of the driver's, and what is known of its end.

use std::fmt;
use std::future::poll_fn;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, Connection, Error as DriverError, Row, Statement};

use super::failure;
use super::key::{AdvisoryKey, Asks};
use super::sql::CHANNEL;
use crate::engine::sessions::{Ended, Listeners};
use crate::error::{Error, ErrorKind, Result};

/// A client, the application's own or one that was made here.
pub(super) type Handle = Box<dyn Deref<Target = Client> + Send + Sync>;

/// Makes connections. What they hear of releases goes to the listeners.
pub(super) type Connector = Arc<
    dyn Fn(Arc<Listeners<AdvisoryKey>>) -> Pin<Box<dyn Future<Output = Result<PgClient>> + Send>>
        + Send
        + Sync,
>;

/// How often a connection that somebody else drives is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(super) struct PgClient {
    handle: Arc<Handle>,
    /// The task that drives it, unless somebody else does.
    task: Option<AbortHandle>,
    end: Arc<End>,
}

struct End {
    known: OnceLock<Ended>,
    /// Why the server has ended it.
    reason: OnceLock<SqlState>,
    gone: watch::Receiver<()>,
    broken_off: AtomicBool,
    disowned: AtomicBool,
    /// Nothing is held or changed on it any more.
    clean: AtomicBool,
}

impl End {
    fn new(gone: watch::Receiver<()>) -> Arc<Self> {
        Arc::new(Self {
            known: OnceLock::new(),
            reason: OnceLock::new(),
            gone,
            broken_off: AtomicBool::new(false),
            disowned: AtomicBool::new(false),
            clean: AtomicBool::new(true),
        })
    }

    /// The server has said that it ends the session. The connection and a request may both hear of it.
    fn by_server(&self, reason: &DriverError) {
        let _ = self.reason.set(reason.code().cloned().unwrap_or(SqlState::INTERNAL_ERROR));
        let _ = self.known.set(Ended::ByServer);
    }
}

impl PgClient {
    /// A connection that is driven here.
    pub(super) fn drive<S, T>(
        client: Client,
        connection: Connection<S, T>,
        listeners: Arc<Listeners<AdvisoryKey>>,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (running, gone) = watch::channel(());
        let end = End::new(gone);
        let task = tokio::spawn({
            let end = end.clone();
            async move {
                let _running = running; // dropped at the end, also with the runtime
                if let Err(error) = drive(connection, &listeners).await
                    && failure::is_fatal(&error)
                {
                    end.by_server(&error);
                }
            }
        });
        Self { handle: Arc::new(Box::new(Box::new(client))), task: Some(task.abort_handle()), end }
    }

    /// A client of the application's, which somebody else drives.
    pub(super) fn users(handle: Handle) -> Self {
        let (_, gone) = watch::channel(());
        let end = End::new(gone);
        Self { handle: Arc::new(handle), task: None, end }
    }

    /// Whether messages are heard on it.
    pub(super) fn hears(&self) -> bool {
        self.task.is_some()
    }

    pub(super) async fn prepare(&self, statement: &str, types: &[Type]) -> Result<Statement, DriverError> {
        self.heed(self.handle.prepare_typed(statement, types).await).await
    }

    /// The one row that a prepared statement answers.
    pub(super) async fn row(
        &self,
        statement: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, DriverError> {
        self.heed(self.handle.query_one(statement, parameters).await).await
    }

    /// The rows of a statement that isn't prepared, in one round trip, too.
    pub(super) async fn rows(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, DriverError> {
        self.heed(self.handle.query_typed(statement, parameters).await).await
    }

    /// What the failure of a request means here.
    pub(super) fn failed(&self, error: &DriverError) -> Error {
        // What the server says when it ends a session is the answer to the request that it has; without one, others
        // have not come to it.
        // Where the application drives the connection it doesn't say why it ended: then it is taken for that.
        let untold = self.task.is_none() && error.is_closed();
        if error.as_db_error().is_none() && (untold || self.is_over() == Some(Ended::ByServer)) {
            let message = "PostgreSQL has ended the session before it was asked";
            return Error::new(ErrorKind::Unavailable, message).with_source(error.to_string());
        }
        failure::of_request(error)
    }

    /// Statements without an answer.
    pub(super) async fn run(&self, statements: &str) -> Result<(), DriverError> {
        self.heed(self.handle.batch_execute(statements).await).await
    }

    async fn heed<T>(&self, answer: Result<T, DriverError>) -> Result<T, DriverError> {
        let refused = answer.as_ref().err().and_then(DriverError::as_db_error);
        if refused.is_some_and(failure::is_swapped) {
            self.disown();
        } else if let Some(error) = answer.as_ref().err().filter(|error| failure::is_fatal(error)) {
            self.end.by_server(error);
        } else if self.task.is_some() && answer.as_ref().is_err_and(DriverError::is_closed) {
            let _ = self.end.gone.clone().changed().await; // then it is known how it ended
        }
        answer
    }

    /// Why the server has ended it, if it has.
    pub(super) fn reason(&self) -> Option<&SqlState> {
        self.end.reason.get()
    }

    pub(super) fn is_over(&self) -> Option<Ended> {
        match self.end.known.get() {
            Some(ended) => Some(*ended),
            None if self.end.broken_off.load(Ordering::Acquire) || self.handle.is_closed() => {
                Some(Ended::Somehow)
            }
            None => None,
        }
    }

    /// Resolves once it has ended.
    pub(super) fn closed(&self) -> impl Future<Output = Ended> + Send + 'static {
        let (end, looked_at) = (self.end.clone(), self.task.is_none().then(|| Arc::downgrade(&self.handle)));
        async move {
            if let Some(handle) = looked_at {
                while handle.upgrade().is_some_and(|handle| !handle.is_closed()) {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            } else {
                let _ = end.gone.clone().changed().await; // there are no changes, only an end
            }
            end.known.get().copied().unwrap_or(Ended::Somehow)
        }
    }

    /// From now on something may be held or changed on it.
    pub(super) fn is_used(&self) {
        self.end.clean.store(false, Ordering::Release);
    }

    /// Nothing is held or changed on it any more.
    pub(super) fn is_clean(&self) {
        self.end.clean.store(true, Ordering::Release);
    }

    /// Closes it, or lets the application have it back, with nothing of ours on it.
    pub(super) fn hand_back(&self) {
        self.is_clean();
        self.break_off();
    }

    /// Closes it: a pooler has put us on another session, and ours may serve somebody else by now.
    pub(super) fn disown(&self) {
        self.end.disowned.store(true, Ordering::Release);
        self.break_off();
    }

    /// Whether its session may serve somebody else.
    pub(super) fn is_disowned(&self) -> bool {
        self.end.disowned.load(Ordering::Acquire)
    }

    pub(super) fn break_off(&self) {
        self.end.broken_off.store(true, Ordering::Release);
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Asks for PgClient {
    async fn ask(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, DriverError> {
        self.rows(statement, parameters).await
    }
}

/// Drives a connection to its end.
async fn drive<S, T>(
    mut connection: Connection<S, T>,
    listeners: &Listeners<AdvisoryKey>,
) -> Result<(), DriverError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
        match message? {
            AsyncMessage::Notification(told) if told.channel() == CHANNEL => {
                if let Some(key) = AdvisoryKey::parse(told.payload()) {
                    listeners.wake(&key);
                }
            }
            AsyncMessage::Notice(notice) => {
                tracing::debug!(
                    severity = notice.severity(),
                    message = notice.message(),
                    "notice of PostgreSQL"
                );
            }
            _ => {}
        }
    }
    Ok(())
}

impl Drop for PgClient {
    /// A connection of the application's goes back to where it is from only without locks on it, or closed.
    fn drop(&mut self) {
        if self.task.is_some() || self.end.clean.load(Ordering::Acquire) || self.handle.is_closed() {
            return;
        }
        let handle = self.handle.clone();
        let keep = Keep(Some(handle));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let mut keep = keep;
                // The server ends it when its TTL is over, if not before.
                while keep.0.as_ref().is_some_and(|handle| !handle.is_closed()) {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                keep.0 = None;
            });
        }
    }
}

/// Doesn't let go of what may have locks on it.
struct Keep(Option<Arc<Handle>>);

impl Drop for Keep {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            tracing::warn!("a connection that may have locks on it is not handed back");
            std::mem::forget(handle);
        }
    }
}

impl fmt::Debug for PgClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgClient").field("over", &self.is_over()).finish_non_exhaustive()
    }
}
