//! [`SqlClient`]: a connection of the driver's in a task of its own, and what is known of its end.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::future::Future;
use std::hash::BuildHasher;
use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tiberius::error::Error as DriverError;
use tiberius::{ColumnData, Config, FromSql, Row, SqlBrowser, ToSql};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio_util::compat::{Compat, TokioAsyncWriteCompatExt};

use super::failure;
use crate::engine::sessions::Ended;
use crate::error::{Error, ErrorKind, Result};

type Driver = tiberius::Client<Compat<TcpStream>>;

/// Makes the configuration of a connection.
pub(super) type Configure =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Config>> + Send>> + Send + Sync>;

/// How to come to a server.
#[derive(Clone)]
pub(super) struct Ways {
    pub(super) configure: Configure,
    /// For one on this machine, with less care: what to do if it hasn't got TLS. It may not send us to another.
    pub(super) here: Option<Here>,
}

#[derive(Clone)]
pub(super) struct Here {
    pub(super) without_tls: Option<Configure>,
}

/// How often the driver looks whether the server's host is there; after three answers that don't come it isn't.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// How often a server may name another one instead of itself.
const ROUTES: usize = 4;

/// How long the server may take to confirm that it has broken off a wait.
const ATTENTION: Duration = Duration::from_secs(1);

/// A parameter of a statement.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Text(Arc<str>),
    Int(i32),
    Long(i64),
}

impl ToSql for Value {
    fn to_sql(&self) -> ColumnData<'_> {
        match self {
            Self::Text(text) => ColumnData::String(Some((&**text).into())),
            Self::Int(number) => ColumnData::I32(Some(*number)),
            Self::Long(number) => ColumnData::I64(Some(*number)),
        }
    }
}

/// What a statement answers: its last row, after the proof, and all rows before.
#[derive(Debug)]
pub(super) struct Answer {
    last: Row,
    before: Vec<Row>,
}

impl Answer {
    /// Takes an answer apart, if it is the one to this proof.
    pub(super) fn check(results: Vec<Vec<Row>>, proof: i64) -> Result<Self> {
        let foreign = || {
            Error::new(ErrorKind::Unknown, "what SQL Server answers isn't the answer to what it was asked")
        };
        let mut rows: Vec<_> = results.into_iter().flatten().collect();
        let last = rows.pop().ok_or_else(foreign)?;
        match last.try_get::<i64, _>(0) {
            Ok(Some(brought_back)) if brought_back == proof => Ok(Self { last, before: rows }),
            _ => Err(foreign()),
        }
    }

    /// A value of the last row; the proof is number 0.
    pub(super) fn get<'a, T: FromSql<'a>>(&'a self, column: usize) -> Result<Option<T>> {
        self.last.try_get(column).map_err(|error| failure::of_request(&error))
    }

    /// A value of the last row that is never null.
    pub(super) fn require<'a, T: FromSql<'a>>(&'a self, column: usize) -> Result<T> {
        self.get(column)?.ok_or_else(|| Error::new(ErrorKind::Unknown, "SQL Server answers null"))
    }

    /// The first value of the only row before the last.
    pub(super) fn drawn(&self) -> Result<Option<i64>> {
        match &*self.before {
            [] => Ok(None),
            [row] => row.try_get(0).map_err(|error| failure::of_request(&error)),
            _ => Err(Error::new(ErrorKind::Unknown, "SQL Server answers more than it was asked for")),
        }
    }
}

/// A request and whom to tell its answer.
struct Request {
    statement: Arc<str>,
    values: Vec<Value>,
    answer: oneshot::Sender<Result<Answer>>,
}

pub(super) struct SqlClient {
    requests: mpsc::UnboundedSender<Request>,
    /// The task that drives it.
    task: AbortHandle,
    socket: Arc<TcpStream>,
    end: Arc<End>,
}

struct End {
    known: OnceLock<Ended>,
    gone: watch::Receiver<()>,
    broken_off: AtomicBool,
    /// What is under way is to be cancelled, and the connection thrown away.
    cancelled: AtomicBool,
    cancels: Notify,
}

impl SqlClient {
    /// Connects, logs in, and says how the session is to be.
    pub(super) async fn connect(ways: &Ways, settings: &str) -> Result<Self> {
        let routes = if ways.here.is_some() { 0 } else { ROUTES };
        let without_tls = ways.here.as_ref().and_then(|here| here.without_tls.as_ref());
        let dialled = match (dial((ways.configure)().await?, routes).await, without_tls) {
            (Err(error), Some(without_tls)) if failure::is_without_tls(&error) => {
                dial(without_tls().await?, routes).await
            }
            (dialled, _) => dialled,
        };
        let (mut driver, socket) = dialled.map_err(|error| failure::of_opening(&error))?;
        let set = async { driver.simple_query(settings).await?.into_results().await };
        set.await.map_err(|error| failure::of_opening(&error))?;
        Ok(Self::drive(driver, Arc::new(socket)))
    }

    fn drive(driver: Driver, socket: Arc<TcpStream>) -> Self {
        let (requests, queue) = mpsc::unbounded_channel();
        let (running, gone) = watch::channel(());
        let end = Arc::new(End {
            known: OnceLock::new(),
            gone,
            broken_off: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            cancels: Notify::new(),
        });
        let task = tokio::spawn({
            let (hang_up, end) = (HangUp(socket.clone()), end.clone());
            async move {
                let _running = running; // dropped at the end, also with the runtime
                drive(driver, hang_up, queue, &end).await;
            }
        });
        Self { requests, task: task.abort_handle(), socket, end }
    }

    /// Sends a statement. It is carried out, and its answer read, whether or not anybody waits for it.
    pub(super) async fn ask(&self, statement: &Arc<str>, values: Vec<Value>) -> Result<Answer> {
        let (answer, answered) = oneshot::channel();
        let request = Request { statement: statement.clone(), values, answer };
        if self.is_over().is_some() || self.requests.send(request).is_err() {
            return Err(not_asked());
        }
        answered.await.unwrap_or_else(|_| {
            let message =
                "the connection to SQL Server was closed under a request, which may have been carried out";
            Err(Error::new(ErrorKind::Unknown, message))
        })
    }

    /// Has the server break off what it is doing for this connection, which is thrown away with that.
    pub(super) fn cancel(&self) {
        self.end.cancelled.store(true, Ordering::Release);
        self.end.cancels.notify_one();
    }

    pub(super) fn is_over(&self) -> Option<Ended> {
        match self.end.known.get() {
            Some(ended) => Some(*ended),
            None if self.end.broken_off.load(Ordering::Acquire) || self.requests.is_closed() => {
                Some(Ended::Somehow)
            }
            None => None,
        }
    }

    /// Resolves once it has ended.
    pub(super) fn closed(&self) -> impl Future<Output = Ended> + Send + 'static {
        let end = self.end.clone();
        async move {
            let _ = end.gone.clone().changed().await; // there are no changes, only an end
            end.known.get().copied().unwrap_or(Ended::Somehow)
        }
    }

    /// Closes it, also where its runtime isn't polled.
    pub(super) fn break_off(&self) {
        self.end.broken_off.store(true, Ordering::Release);
        hang_up(&self.socket);
        self.task.abort();
    }
}

impl fmt::Debug for SqlClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlClient").field("over", &self.is_over()).finish_non_exhaustive()
    }
}

impl Drop for SqlClient {
    fn drop(&mut self) {
        self.break_off();
    }
}

/// Of a request that was not sent.
fn not_asked() -> Error {
    Error::new(ErrorKind::Unavailable, "the session has ended before SQL Server was asked")
}

/// Both directions: others may still have the socket.
fn hang_up(socket: &TcpStream) {
    let _ = SockRef::from(socket).shutdown(Shutdown::Both); // an error says that it is closed
}

/// Closes the socket with the task, also when the runtime drops that.
struct HangUp(Arc<TcpStream>);

impl Drop for HangUp {
    fn drop(&mut self) {
        hang_up(&self.0);
    }
}

/// Connects and logs in, there or where the server sends us, so many times. The socket is the driver's, too: it is there to be
/// looked at and closed.
async fn dial(mut config: Config, mut routes: usize) -> Result<(Driver, TcpStream), DriverError> {
    // It would break off any wait that is longer, and leave the server waiting.
    config.command_timeout(None);
    loop {
        let socket = TcpStream::connect_named(&config).await?;
        let settings = SockRef::from(&socket);
        settings.set_tcp_nodelay(true)?;
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 2).with_retries(3);
        settings.set_tcp_keepalive(&keepalive)?;
        // The system's default is a quarter of an hour.
        #[cfg(target_os = "linux")]
        settings.set_tcp_user_timeout(Some(KEEPALIVE * 3))?;
        let socket = socket.into_std()?;
        let looked_at = TcpStream::from_std(socket.try_clone()?)?;
        let socket = TcpStream::from_std(socket)?;
        let connected = Box::pin(tiberius::Client::connect(config.clone(), socket.compat_write())); // a large one
        match connected.await {
            Err(DriverError::Routing { host, port }) if routes > 0 => {
                config.host(host);
                config.port(port);
                routes -= 1;
            }
            connected => return Ok((connected?, looked_at)),
        }
    }
}

/// Drives a connection until it isn't needed any more, or until anything goes wrong on it: then nothing that comes over it
/// could be trusted.
async fn drive(
    mut driver: Driver,
    socket: HangUp,
    mut requests: mpsc::UnboundedReceiver<Request>,
    end: &End,
) {
    let mut proof = some_proof();
    while !end.cancelled.load(Ordering::Acquire) {
        let request = tokio::select! {
            biased;
            () = speaks(&socket.0) => break,
            request = requests.recv() => request,
        };
        let Some(Request { statement, values, answer }) = request else { break };
        proof = proof.wrapping_add(1);
        let asked = tokio::select! {
            biased;
            // The runtime may not have heard of it yet.
            () = std::future::ready(()), if has_spoken(&socket.0) => Some(Err(not_asked())),
            asked = ask(&mut driver, &statement, values, proof, end) => Some(asked),
            () = cancelled(end) => None,
        };
        let error = match asked {
            Some(Ok(answered)) => {
                let _ = answer.send(Ok(answered)); // nobody may wait for it any more
                continue;
            }
            Some(Err(error)) => error,
            None => {
                // The answer to a request that was given up may come before the confirmation, or instead of it. A server that
                // doesn't look at closed connections while it waits looks at this.
                let _ = tokio::time::timeout(ATTENTION, driver.cancel_query()).await;
                Error::new(ErrorKind::Unknown, "the wait was cancelled")
            }
        };
        drop((driver, socket)); // before anybody hears of it
        requests.close();
        let _ = answer.send(Err(error));
        break;
    }
    requests.close();
    while let Ok(request) = requests.try_recv() {
        let _ = request.answer.send(Err(not_asked()));
    }
}

/// A number that hardly anybody has used before.
pub(super) fn some_proof() -> i64 {
    RandomState::new().hash_one(0).cast_signed()
}

async fn cancelled(end: &End) {
    while !end.cancelled.load(Ordering::Acquire) {
        end.cancels.notified().await;
    }
}

/// Resolves when the server says something unasked, which is nothing but the end: nobody waits for an answer.
async fn speaks(socket: &TcpStream) {
    let _ = socket.peek(&mut [0]).await;
}

/// The same, of what has arrived.
fn has_spoken(socket: &TcpStream) -> bool {
    let looked = SockRef::from(socket).peek(&mut [MaybeUninit::uninit()]);
    !looked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Asks, and reads all that is answered.
async fn ask(
    driver: &mut Driver,
    statement: &str,
    values: Vec<Value>,
    proof: i64,
    end: &End,
) -> Result<Answer> {
    let proof_value = Value::Long(proof);
    let mut parameters: Vec<&dyn ToSql> = vec![&proof_value];
    parameters.extend(values.iter().map(|value| value as &dyn ToSql));
    let results = async { driver.query(statement, &parameters).await?.into_results().await };
    let results = results.await.map_err(|error| {
        if failure::is_fatal(&error) {
            let _ = end.known.set(Ended::ByServer);
        }
        failure::of_request(&error)
    })?;
    Answer::check(results, proof)
}
