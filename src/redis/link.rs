//! [`Link`]: the one connection over which a provider's commands to a server travel, opened on first use and again, with
//! back-off, when it is broken.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection, PubSubSink, PubSubStream};
use redis::sentinel::SentinelClient;
use redis::{AsyncConnectionConfig, Client, Cmd, ConnectionAddr, RedisError, Value};
use tokio::task::AbortHandle;

use super::failure;
use super::script::Script;
use crate::clock::Instant;
use crate::engine::flight::Flight;
use crate::engine::lock;
use crate::engine::worker::OnDrop;
use crate::error::{Error, ErrorKind, Result};

/// How long opening a connection may take, finding the master and logging in included.
pub(super) const OPEN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an answer may take before its connection counts as broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Who gives up a request after so long without an answer has reason to doubt the connection, unless others have had
/// answers over it meanwhile.
const DOUBT_AFTER: Duration = Duration::from_millis(50);

/// Where connections come from.
pub(super) enum Source {
    Client(Client),
    Sentinel(tokio::sync::Mutex<SentinelClient>),
    /// The user's own, which sees to itself.
    Connection(Box<dyn UsersConnection>),
}

impl Source {
    /// Which server it is, for messages.
    fn name(&self) -> String {
        match self {
            Self::Client(client) => match client.get_connection_info().addr() {
                // In a URL without its `?` the password is a part of the path.
                ConnectionAddr::Unix(_) => "the Unix socket".to_owned(),
                addr => addr.to_string(),
            },
            Self::Sentinel(_) => "the master behind the Sentinels".to_owned(),
            Self::Connection(_) => "the server of the given connection".to_owned(),
        }
    }
}

/// A connection that can be shared, whichever it is.
pub(super) trait UsersConnection: Send + Sync {
    fn share(&self) -> Box<dyn ConnectionLike + Send>;
}

impl<C: ConnectionLike + Clone + Send + Sync + 'static> UsersConnection for C {
    fn share(&self) -> Box<dyn ConnectionLike + Send> {
        Box::new(self.clone())
    }
}

pub(super) struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<Source>,
    /// What will be run over it.
    scripts: &'static [&'static LazyLock<Script>],
    current: Mutex<Option<Arc<Opened>>>,
    opening: Flight,
    /// How many connections there have been.
    generation: AtomicU64,
    /// Whether the server behind a connection of the user's has been looked at.
    users_is_known: AtomicBool,
}

/// An open connection.
pub(super) struct Opened {
    connection: MultiplexedConnection,
    pub(super) generation: u64,
    /// The server's run id, if it tells: another one after each restart.
    pub(super) run_id: Option<String>,
    broken: Arc<AtomicBool>,
    /// When something was last answered over it, in the nanoseconds of [`Instant`].
    answered_at: AtomicI64,
    /// A request has been answered: this server does what it is asked.
    works: AtomicBool,
    /// Where it is from.
    link: Weak<Shared>,
    /// Lives on the runtime that serves the connection, and says so when that is gone.
    anchor: AbortHandle,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.anchor.abort();
    }
}

impl Opened {
    fn is_usable(&self) -> bool {
        !self.broken.load(Ordering::Acquire)
    }

    fn break_off(&self) {
        self.broken.store(true, Ordering::Release);
    }

    async fn request(&self, command: &Cmd) -> Result<Value, RedisError> {
        let sent = Instant::now();
        let mut unanswered = OnDrop(Some(|| {
            let is_silent = self.answered_at.load(Ordering::Relaxed) < sent.to_nanos();
            if is_silent && sent.elapsed() >= DOUBT_AFTER {
                self.break_off();
            }
        }));
        let answer = self.connection.clone().req_packed_command(command).await.and_then(Value::extract_error);
        unanswered.0 = None;
        self.answered_at.fetch_max(Instant::now().to_nanos(), Ordering::Relaxed);
        match &answer {
            Ok(_) if !self.works.swap(true, Ordering::Relaxed) => {
                if let Some(link) = self.link.upgrade() {
                    link.opening.succeeds();
                }
            }
            Err(error) if failure::spoils_connection(error) => {
                // Another one at once may do no better.
                if let Some(link) = self.link.upgrade().filter(|_| !self.works.load(Ordering::Relaxed)) {
                    link.opening.fails(failure::of_opening(error, &link.source.name()));
                }
                self.break_off();
            }
            _ => {}
        }
        answer
    }
}

/// A connection to send some requests over, in order.
pub(super) enum Connected {
    Ours(Arc<Opened>),
    Users(Box<dyn ConnectionLike + Send>),
}

impl Connected {
    /// Sends a command and awaits its answer.
    ///
    /// # Cancel safety
    ///
    /// Dropped, the command may or may not be carried out.
    pub(super) async fn request(&mut self, command: &Cmd) -> Result<Value, RedisError> {
        match self {
            Self::Ours(opened) => opened.request(command).await,
            Self::Users(connection) => {
                let answer =
                    tokio::time::timeout(ANSWER_TIMEOUT, connection.req_packed_command(command)).await;
                answer.unwrap_or_else(|_| Err(timed_out())).and_then(Value::extract_error)
            }
        }
    }
}

impl Link {
    pub(super) fn new(source: Source, scripts: &'static [&'static LazyLock<Script>]) -> Self {
        Self::of(Arc::new(source), scripts)
    }

    fn of(source: Arc<Source>, scripts: &'static [&'static LazyLock<Script>]) -> Self {
        let shared = Shared {
            source,
            scripts,
            current: Mutex::default(),
            opening: Flight::new(OPEN_TIMEOUT),
            generation: AtomicU64::new(0),
            users_is_known: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Another connection to the same server.
    pub(super) fn another(&self) -> Self {
        Self::of(self.shared.source.clone(), self.shared.scripts)
    }

    /// Whether there can be other connections, such as to subscribe over: not where all there is is one of the user's.
    pub(super) fn can_open_more(&self) -> bool {
        !matches!(*self.shared.source, Source::Connection(_))
    }

    /// The connection that requests travel over at present.
    pub(super) async fn connected(&self) -> Result<Connected> {
        match &*self.shared.source {
            Source::Connection(users) => {
                let mut connection = Connected::Users(users.share());
                if !self.shared.users_is_known.load(Ordering::Acquire) {
                    identify(&mut connection, &self.shared.source.name()).await?;
                    self.shared.users_is_known.store(true, Ordering::Release);
                }
                Ok(connection)
            }
            Source::Client(_) | Source::Sentinel(_) => Ok(Connected::Ours(self.opened().await?)),
        }
    }

    /// The answers don't fit the questions: the connection is out of step.
    pub(super) fn break_off(&self) {
        if let Some(opened) = &*lock(&self.shared.current) {
            opened.break_off();
        }
    }

    /// The connection, opened if need be.
    pub(super) async fn opened(&self) -> Result<Arc<Opened>> {
        if let Some(opened) = self.shared.usable() {
            return Ok(opened);
        }
        let shared = &self.shared;
        shared.opening.join(|| shared.usable().is_some(), || shared.clone().open()).await?;
        shared.usable().ok_or_else(|| Error::new(ErrorKind::Unavailable, "the connection broke at once"))
    }

    /// Another connection, which is subscribed to a channel.
    pub(super) async fn subscribe(&self, channel: &str) -> Result<(PubSubSink, PubSubStream)> {
        let subscribe = async {
            let client = self.shared.client().await?;
            let (mut sink, messages) = client.get_async_pubsub().await?.split();
            sink.subscribe(channel).await?;
            Ok((sink, messages))
        };
        subscribe.await.map_err(|error| failure::of_opening(&error, &self.shared.source.name()))
    }

    /// Which connection is the present one.
    pub(super) fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }
}

impl Shared {
    fn usable(&self) -> Option<Arc<Opened>> {
        lock(&self.current).clone().filter(|opened| opened.is_usable())
    }

    async fn client(&self) -> Result<Client, RedisError> {
        install_cryptography();
        match &*self.source {
            Source::Client(client) => Ok(client.clone()),
            Source::Sentinel(sentinels) => sentinels.lock().await.async_get_client().await,
            Source::Connection(_) => {
                Err((redis::ErrorKind::InvalidClientConfig, "a connection can't make others").into())
            }
        }
    }

    async fn open(self: Arc<Self>) -> Result<()> {
        let refused = |error| failure::of_opening(&error, &self.source.name());
        let client = self.client().await.map_err(refused)?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None) // ours covers all of it
            .set_response_timeout(Some(ANSWER_TIMEOUT));
        let connection =
            client.get_multiplexed_async_connection_with_config(&config).await.map_err(refused)?;
        let run_id =
            identify(&mut Connected::Users(Box::new(connection.clone())), &self.source.name()).await?;
        // So that a request is one message: one that is sent again in full comes after what was sent meanwhile, such as its
        // own release. Without the right to load scripts that is how it is, once for each.
        let mut load = redis::pipe();
        for script in self.scripts {
            load.cmd("SCRIPT").arg("LOAD").arg(script.source()).ignore();
        }
        let _ = load.query_async::<()>(&mut connection.clone()).await;
        let broken = Arc::new(AtomicBool::new(false));
        let gone = OnDrop(Some({
            let broken = broken.clone();
            move || broken.store(true, Ordering::Release)
        }));
        let anchor = tokio::spawn(async move {
            let _gone = gone;
            std::future::pending::<()>().await;
        });
        let generation = self.generation.fetch_add(1, Ordering::AcqRel) + 1;
        let anchor = anchor.abort_handle();
        let (works, link) = (AtomicBool::new(false), Arc::downgrade(&self));
        let answered_at = AtomicI64::new(Instant::now().to_nanos());
        let opened = Opened { connection, generation, run_id, broken, answered_at, works, link, anchor };
        *lock(&self.current) = Some(Arc::new(opened));
        Ok(())
    }
}

/// rustls doesn't choose by itself where features of others bring it several providers. The application's own stays.
fn install_cryptography() {
    #[cfg(feature = "rustls")]
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        let _ = rustls::crypto::ring::default_provider().install_default(); // another was faster
    }
}

/// Asks the server what it is. Its run id, if the user may know.
async fn identify(connection: &mut Connected, server: &str) -> Result<Option<String>> {
    let mut info = redis::cmd("INFO");
    let info = match connection.request(info.arg("server")).await {
        Ok(info) => info,
        Err(error) if error.kind() == redis::ErrorKind::Server(redis::ServerErrorKind::NoPerm) => {
            return Ok(None);
        }
        Err(error) => return Err(failure::of_opening(&error, server)),
    };
    // A connection to a whole cluster has as many answers as nodes.
    let Ok(info) = redis::from_redis_value::<String>(info) else { return Err(failure::cluster()) };
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::to_owned)
    };
    match field("redis_mode").as_deref() {
        Some("cluster") => Err(failure::cluster()),
        Some("sentinel") => Err(Error::new(
            ErrorKind::Config,
            "this server is a Sentinel: name the master that it watches, by `sentinel=NAME` in the URL",
        )),
        _ => Ok(field("run_id")),
    }
}

fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("to", &self.shared.source.name())
            .field("generation", &self.generation())
            .finish()
    }
}
