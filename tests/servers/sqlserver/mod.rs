//! [`SqlServer`].

mod connection;
mod evaluate;
mod execute;
mod locks;
mod parse;
mod procedures;
#[cfg(feature = "rustls")]
mod tls;
mod tokens;
mod values;
mod world;

use std::collections::{HashSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
#[cfg(feature = "rustls")]
use std::path::Path;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::sleep;

use self::values::SqlError;
use self::world::{Aim, End, Fate, World};
use super::{ATTEMPTS, PATIENCE, POLL, free_port, lock, wait_until};

/// An ordinary login.
pub(crate) const USER: &str = "app";

/// The administrator.
pub(crate) const ADMINISTRATOR: &str = "sa";

/// The password of both.
pub(crate) const PASSWORD: &str = "secret";

/// The database.
pub(crate) const DATABASE: &str = "locks";

/// A stand-in for Microsoft SQL Server: application locks, tables, transactions, and its protocol, TDS, over sockets.
///
/// It runs in a thread of its own, in real time, so it goes on while a test blocks, or has paused its clock. It does
/// what the documentation says of the part of Transact-SQL that it knows; what it doesn't know is a syntax error.
/// What a method does holds for everything after it has returned.
///
/// It has the logins [`USER`] and [`ADMINISTRATOR`], and the database [`DATABASE`].
#[derive(Debug)]
pub(crate) struct SqlServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How a [`SqlServer`] is started.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches of their own")]
pub(crate) struct SqlServerOptions {
    logins: Vec<(String, String)>,
    denials: Vec<(String, &'static str)>,
    databases: Vec<String>,
    token: Option<(String, String)>,
    max_connections: usize,
    read_only: bool,
    tls: Option<(PathBuf, PathBuf)>,
    requires_tls: bool,
    notices_closed_sockets: bool,
    busy_is_999: bool,
}

/// A session, as [`SqlServer::sessions`] shows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SessionState {
    /// Its number, `@@SPID`.
    pub(crate) spid: u16,
    /// Who it is.
    pub(crate) login: String,
    /// Where it is, in lower case.
    pub(crate) database: String,
    /// What it has locked, such as `locks/public/RESOURCE`.
    pub(crate) holds: Vec<String>,
    /// What it waits for.
    pub(crate) waits_for: Option<String>,
}

#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    options: SqlServerOptions,
    busy_is_999: bool,
    commands: Mutex<VecDeque<(Command, mpsc::Sender<()>)>>,
    /// For the thread while it is frozen, and for its runtime while it isn't.
    arrived: Condvar,
    notified: Notify,
    #[cfg(feature = "rustls")]
    tls: Option<Arc<rustls::ServerConfig>>,
}

#[derive(Clone, Copy, Debug)]
enum Command {
    Freeze,
    Thaw,
    Stop,
    Restart,
    Kill(u16, bool),
    End,
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    #[cfg(feature = "rustls")]
    fn tls(&self) -> Option<tls::Tls> {
        self.tls.clone().map(tls::Tls::new)
    }
}

impl Default for SqlServerOptions {
    fn default() -> Self {
        let login = |name: &str| (name.to_owned(), PASSWORD.to_owned());
        Self {
            logins: vec![login(ADMINISTRATOR), login(USER)],
            denials: Vec::new(),
            databases: vec![DATABASE.to_owned()],
            token: None,
            max_connections: 32_767,
            read_only: false,
            tls: None,
            requires_tls: false,
            notices_closed_sockets: true,
            busy_is_999: false,
        }
    }
}

impl SqlServerOptions {
    /// One more login, who is a principal of all databases too.
    pub(crate) fn login(mut self, name: &str, password: &str) -> Self {
        self.logins.push((name.to_owned(), password.to_owned()));
        self
    }

    /// One more database.
    pub(crate) fn database(mut self, name: &str) -> Self {
        self.databases.push(name.to_owned());
        self
    }

    /// A login who may create no tables.
    pub(crate) fn without_create_table(self, login: &str) -> Self {
        self.without(login, "CREATE TABLE")
    }

    /// A login who may update no rows.
    pub(crate) fn without_update(self, login: &str) -> Self {
        self.without(login, "UPDATE")
    }

    /// A login who may insert no rows.
    pub(crate) fn without_insert(self, login: &str) -> Self {
        self.without(login, "INSERT")
    }

    /// A login who may read no rows.
    pub(crate) fn without_select(self, login: &str) -> Self {
        self.without(login, "SELECT")
    }

    fn without(mut self, login: &str, right: &'static str) -> Self {
        self.denials.push((login.to_lowercase(), right));
        self
    }

    /// Not more sessions than that at once: one more gets error 17809.
    pub(crate) fn max_connections(mut self, most: usize) -> Self {
        self.max_connections = most;
        self
    }

    /// Whatever writes to a database but `master` gets error 3906.
    pub(crate) fn read_only_database(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Speaks TLS too, with these PEM files: for all that follows, for the login alone, or from the first byte, as the
    /// client wants.
    #[cfg(feature = "rustls")]
    pub(crate) fn tls(mut self, certificate: &Path, key: &Path) -> Self {
        self.tls = Some((certificate.into(), key.into()));
        self
    }

    /// With [`tls`](Self::tls), turns away the clients that don't encrypt everything.
    #[cfg(feature = "rustls")]
    pub(crate) fn requires_tls(mut self) -> Self {
        self.requires_tls = true;
        self
    }

    /// A token with which a client is this login.
    pub(crate) fn token(mut self, token: &str, login: &str) -> Self {
        self.token = Some((token.to_owned(), login.to_owned()));
        self
    }

    /// Whether a session ends at once when its socket is closed while its request waits. Otherwise the request goes
    /// on, may get its lock, and the session ends after it.
    pub(crate) fn notices_closed_sockets(mut self, notices: bool) -> Self {
        self.notices_closed_sockets = notices;
        self
    }

    /// `sp_getapplock` without a timeout returns -999, and not -1, if the lock isn't free.
    pub(crate) fn busy_is_999(mut self) -> Self {
        self.busy_is_999 = true;
        self
    }

    fn denied(&self, login: &str) -> Vec<&'static str> {
        let login = login.to_lowercase();
        self.denials.iter().filter(|(name, _)| *name == login).map(|(_, right)| *right).collect()
    }

    /// Starts it. Its port is open when this returns.
    pub(crate) fn start(self) -> SqlServer {
        let (listener, addr) = (0..ATTEMPTS)
            .find_map(|_| {
                let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
                Some((std::net::TcpListener::bind(addr).ok()?, addr))
            })
            .expect("there is a free port");
        listener.set_nonblocking(true).expect("a socket can be nonblocking");
        let principals: HashSet<String> = ["public", "dbo"]
            .into_iter()
            .chain(self.logins.iter().map(|(name, _)| name.as_str()))
            .map(str::to_lowercase)
            .collect();
        let shared = Arc::new(Shared {
            world: Mutex::new(World::new(&self.databases, principals, self.read_only)),
            busy_is_999: self.busy_is_999,
            commands: Mutex::default(),
            arrived: Condvar::new(),
            notified: Notify::new(),
            #[cfg(feature = "rustls")]
            tls: self.tls.as_ref().map(|(certificate, key)| tls::config(certificate, key)),
            options: self,
        });
        let theirs = shared.clone();
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serve(listener, addr, theirs));
        });
        SqlServer { addr, shared, thread: Some(thread) }
    }
}

impl SqlServer {
    /// One with the defaults.
    pub(crate) fn start() -> Self {
        Self::options().start()
    }

    /// For one with other than the defaults.
    pub(crate) fn options() -> SqlServerOptions {
        SqlServerOptions::default()
    }

    /// The port, which stays the same over restarts.
    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `sqlserver://USER:PASSWORD@127.0.0.1:PORT/DATABASE?encrypt=off`.
    pub(crate) fn url(&self) -> String {
        format!("sqlserver://{USER}:{PASSWORD}@{}/{DATABASE}?encrypt=off", self.addr)
    }

    /// All sessions, by their numbers.
    pub(crate) fn sessions(&self) -> Vec<SessionState> {
        let world = self.shared.world();
        let shown = |(spid, session): (&u16, &world::Session)| {
            let (holds, waits_for) = world.locks.of(*spid);
            let mut holds: Vec<String> = holds.into_iter().map(world::described).collect();
            holds.sort();
            SessionState {
                spid: *spid,
                login: session.login.clone(),
                database: session.database.to_string(),
                holds,
                waits_for: waits_for.map(world::described),
            }
        };
        world.sessions.iter().map(shown).collect()
    }

    /// Who has an application lock on a resource, under any principal. The first of them, if there are several.
    pub(crate) fn holder(&self, database: &str, resource: &str) -> Option<u16> {
        self.shared.world().locks.on(&database.to_lowercase(), resource).0.first().copied()
    }

    /// How many wait for an application lock on a resource.
    pub(crate) fn waiters(&self, database: &str, resource: &str) -> usize {
        self.shared.world().locks.on(&database.to_lowercase(), resource).1
    }

    /// How many rows all tables of a database have together.
    pub(crate) fn rows(&self, database: &str) -> usize {
        let world = self.shared.world();
        let database = world.databases.get(database).expect("there is this database");
        database.tables.values().map(|table| table.rows.len()).sum()
    }

    /// Waits until so many wait for an application lock.
    ///
    /// # Panics
    ///
    /// If they don't within 20 seconds.
    pub(crate) async fn until_waiting(&self, database: &str, resource: &str, waiters: usize) {
        let what = format!("{waiters} wait for {resource}");
        self.until(&what, || self.waiters(database, resource) == waiters).await;
    }

    /// Waits until nobody has an application lock on a resource.
    ///
    /// # Panics
    ///
    /// If somebody still has after 20 seconds.
    pub(crate) async fn until_free(&self, database: &str, resource: &str) {
        self.until(&format!("{resource} is free"), || self.holder(database, resource).is_none()).await;
    }

    /// Waits until something holds, which is looked at whenever something has happened to sessions or locks.
    ///
    /// # Panics
    ///
    /// If it doesn't within 20 seconds.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let mut changes = self.shared.world().changes.subscribe();
        // A thread counts the seconds, since the clock of the caller's runtime may be paused.
        let (patience, over) = oneshot::channel::<()>();
        let (_done, not_done) = mpsc::channel::<()>();
        thread::spawn(move || {
            let _ = not_done.recv_timeout(PATIENCE);
            drop(patience);
        });
        tokio::select! {
            biased;
            () = async {
                while !holds() {
                    changes.changed().await.expect("we have the sender");
                }
            } => {}
            _ = over => panic!("not within {PATIENCE:?}: {what}, but {:#?}", self.sessions()),
        }
    }

    /// Ends a session as `KILL` does: its locks are free, its transaction is rolled back, a request under way is broken
    /// off, and the connection is closed when this returns. False if there is no such session. Not while it is frozen.
    pub(crate) fn kill(&self, spid: u16) -> bool {
        self.kill_as(spid, false)
    }

    /// [`kill`](Self::kill), but a request under way is answered with error 596 first.
    pub(crate) fn kill_with_error(&self, spid: u16) -> bool {
        self.kill_as(spid, true)
    }

    fn kill_as(&self, spid: u16, told: bool) -> bool {
        let exists = self.shared.world().sessions.contains_key(&spid);
        self.command(Command::Kill(spid, told));
        wait_until("a killed session's connection is closed", || {
            !self.shared.world().closing.contains(&spid)
        });
        exists
    }

    /// Stops it as SIGSTOP does: nothing is read, carried out or answered. The kernel still accepts connections.
    pub(crate) fn freeze(&self) {
        self.command(Command::Freeze);
    }

    /// Lets it continue after [`freeze`](Self::freeze).
    pub(crate) fn thaw(&self) {
        self.command(Command::Thaw);
    }

    /// Ends it, and all sessions: connections are closed, and new ones are refused. Its tables stay.
    pub(crate) fn stop(&self) {
        self.command(Command::Stop);
    }

    /// Starts it again, on the same port, after a [`stop`](Self::stop) or instead of one.
    pub(crate) fn restart(&self) {
        self.command(Command::Stop);
        self.command(Command::Restart);
    }

    /// The next request that contains this, in its text or a parameter, is carried out, but never answered.
    pub(crate) fn lose_answer_to(&self, part: &str) {
        self.aim(part, Fate::LoseAnswer);
    }

    /// The connection of the next request that contains this is reset after so many bytes of the answer.
    pub(crate) fn reset_in_answer_to(&self, part: &str, bytes: usize) {
        self.aim(part, Fate::ResetAfter(bytes));
    }

    /// Before the answer to the next request that contains this, the last answer on its connection is sent once more.
    /// From then on, a client reads answers to earlier requests than its own.
    pub(crate) fn repeat_answer_before(&self, part: &str) {
        self.aim(part, Fate::RepeatLastAnswer);
    }

    /// The next request that contains this fails: at its first statement whose text contains it, or at its first
    /// statement if only a parameter does. From class 20 on, that is the end of the connection.
    pub(crate) fn fail_next(&self, part: &str, number: u32, class: u8, message: &str) {
        self.aim(part, Fate::Fail(SqlError::new(number, class, message)));
    }

    fn aim(&self, part: &str, fate: Fate) {
        self.shared.world().aims.push(Aim { part: part.to_owned(), fate });
    }

    /// From now on these strike only what this session asks, or again whatever comes.
    pub(crate) fn aim_only_at(&self, session: Option<u16>) {
        self.shared.world().aims_only_at = session;
    }

    /// Whether one of these is still to come.
    pub(crate) fn is_aiming(&self) -> bool {
        !self.shared.world().aims.is_empty()
    }

    /// Each answer takes that much longer.
    pub(crate) fn delay_answers(&self, by: Duration) {
        self.shared.world().delay = by;
    }

    /// Whether new connections have to wait for the answer to their first message, or to their login.
    pub(crate) fn stall_logins(&self, stall: bool) {
        self.shared.world().stalls_logins = stall;
    }

    /// The next `sp_getapplock` returns this, without a lock.
    pub(crate) fn getapplock_returns(&self, code: i32) {
        self.getapplock_of_returns("", code);
    }

    /// The next `sp_getapplock` for a resource that contains this returns `code`, without a lock.
    pub(crate) fn getapplock_of_returns(&self, part: &str, code: i32) {
        self.shared.world().getapplock_returns = Some((part.to_owned(), code));
    }

    /// So many microseconds are between `SYSUTCDATETIME` and the time.
    pub(crate) fn set_clock_offset(&self, micros: i64) {
        self.shared.world().clock_offset = micros;
    }

    /// How many requests there were: batches, calls of procedures, and beginnings and ends of transactions.
    pub(crate) fn requests(&self) -> u64 {
        self.shared.world().requests
    }

    /// How many connections there were.
    pub(crate) fn connections(&self) -> u64 {
        self.shared.world().connections
    }

    /// How many connections there are.
    pub(crate) fn open_connections(&self) -> u64 {
        self.shared.world().open_connections
    }

    fn command(&self, command: Command) {
        let (done, is_done) = mpsc::channel();
        lock(&self.shared.commands).push_back((command, done));
        self.shared.arrived.notify_one();
        self.shared.notified.notify_one();
        // If it has panicked, the sender is gone, and dropping the server says so.
        let _ = is_done.recv_timeout(PATIENCE);
    }
}

impl Drop for SqlServer {
    fn drop(&mut self) {
        self.command(Command::End);
        let ended = self.thread.take().is_none_or(|thread| thread.join().is_ok());
        assert!(ended || thread::panicking(), "the server has panicked");
    }
}

/// What is left to be done after a command.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Nothing,
    Freeze,
    Thaw,
    Stop,
    Restart,
    End,
}

impl Shared {
    fn next_command(&self) -> Option<(Command, mpsc::Sender<()>)> {
        lock(&self.commands).pop_front()
    }

    fn obey(&self, command: Command) -> Then {
        let mut world = self.world();
        match command {
            Command::Freeze => Then::Freeze,
            Command::Thaw => Then::Thaw,
            Command::Stop | Command::End => {
                for spid in world.sessions.keys().copied().collect::<Vec<_>>() {
                    world.end_session(spid, End::Over);
                }
                if matches!(command, Command::End) { Then::End } else { Then::Stop }
            }
            Command::Restart => Then::Restart,
            Command::Kill(spid, told) => {
                world.end_session(spid, End::Killed(told));
                Then::Nothing
            }
        }
    }

    /// Keeps the thread, and all that runs in it, until it is thawed or stopped.
    fn stay_frozen(&self) -> (Then, mpsc::Sender<()>) {
        let mut commands = lock(&self.commands);
        loop {
            if let Some((command, done)) = commands.pop_front() {
                drop(commands);
                match self.obey(command) {
                    then @ (Then::Thaw | Then::Stop | Then::End) => return (then, done),
                    Then::Nothing | Then::Freeze | Then::Restart => {
                        let _ = done.send(());
                    }
                }
                commands = lock(&self.commands);
            } else {
                commands = self.arrived.wait(commands).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

async fn serve(first: std::net::TcpListener, addr: SocketAddr, shared: Arc<Shared>) {
    let mut listener = Some(TcpListener::from_std(first).expect("a nonblocking listener"));
    let mut connections = JoinSet::new();
    loop {
        while let Some((command, mut done)) = shared.next_command() {
            let mut then = shared.obey(command);
            if then == Then::Freeze {
                let _ = done.send(());
                (then, done) = shared.stay_frozen();
            }
            match then {
                Then::End => {
                    connections.shutdown().await;
                    let _ = done.send(());
                    return;
                }
                Then::Stop => {
                    listener = None;
                    connections.shutdown().await;
                }
                Then::Restart => {
                    while listener.is_none() {
                        // Another who looks for a free port may have it for a moment.
                        listener = TcpListener::bind(addr).await.ok();
                        if listener.is_none() {
                            sleep(POLL).await;
                        }
                    }
                }
                Then::Nothing | Then::Freeze | Then::Thaw => {}
            }
            let _ = done.send(());
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = shared.notified.notified() => {}
            Some(result) = connections.join_next() => result.expect("a connection doesn't panic"),
            stream = accepted => {
                let (stream, _) = stream.expect("a connection");
                connections.spawn(connection::serve(stream, shared.clone()));
            }
        }
    }
}
