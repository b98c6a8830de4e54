//! [`RedisServer`].

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::resp::{self, Frame};
use super::{ATTEMPTS, ChildServer, PATIENCE, PortTaken, free_port, program, wait_until};

/// A `redis-server` on 127.0.0.1 that keeps nothing on disk unless it is told to.
#[derive(Debug)]
pub(crate) struct RedisServer {
    server: ChildServer,
    port: u16,
    tls_port: u16,
    options: RedisOptions,
}

/// How a [`RedisServer`] is started.
#[derive(Clone, Debug, Default)]
pub(crate) struct RedisOptions {
    lines: Vec<String>,
    auth: Vec<String>,
    tls: Option<[PathBuf; 3]>,
    mode: Mode,
    unix_socket: bool,
    clock: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mode {
    #[default]
    Server,
    Sentinel,
    Cluster,
}

impl RedisOptions {
    /// A line of the configuration file. `value` is written as it is: quote it if it is one that contains spaces.
    pub(crate) fn config(mut self, key: &str, value: &str) -> Self {
        self.lines.push(format!("{key} {value}"));
        self
    }

    /// Each write is on disk before it is acknowledged, and [`RedisServer::restart`] finds it there.
    pub(crate) fn durable(self) -> Self {
        self.config("appendonly", "yes").config("appendfsync", "always")
    }

    /// Listens on [`RedisServer::socket_path`] too.
    pub(crate) fn unix_socket(mut self) -> Self {
        self.unix_socket = true;
        self
    }

    /// Listens on [`RedisServer::tls_port`] too. Clients need no certificate; `.config("tls-auth-clients", "yes")`.
    pub(crate) fn tls(mut self, certificate: &Path, key: &Path, ca: &Path) -> Self {
        self.tls = Some([certificate.into(), key.into(), ca.into()]);
        self
    }

    /// The password of the default user.
    pub(crate) fn password(self, password: &str) -> Self {
        self.config("requirepass", password).auth(&[password])
    }

    /// A file of users, with which [`RedisServer::command`] logs in as one of them.
    pub(crate) fn acl_file(self, file: &Path, user: &str, password: &str) -> Self {
        self.config("aclfile", &file.display().to_string()).auth(&[user, password])
    }

    fn auth(mut self, arguments: &[&str]) -> Self {
        self.auth = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self
    }

    /// A replica of another. [`RedisServer::until`] `ROLE` says `connected`, it may not have anything yet.
    pub(crate) fn replica_of(self, master: SocketAddr) -> Self {
        self.config("replicaof", &format!("{} {}", master.ip(), master.port()))
    }

    /// A Sentinel that watches `master` under the name `name`, and needs `quorum` of them to fail over. It notices
    /// within half a second; settings come after this: `.config("sentinel failover-timeout NAME", "60000")`.
    pub(crate) fn sentinel(mut self, name: &str, master: SocketAddr, quorum: usize) -> Self {
        self.mode = Mode::Sentinel;
        self.config("sentinel monitor", &format!("{name} {} {} {quorum}", master.ip(), master.port()))
            .config(&format!("sentinel down-after-milliseconds {name}"), "500")
            .config(&format!("sentinel failover-timeout {name}"), "3000")
    }

    /// A Redis Cluster of this one node, which has all the slots.
    pub(crate) fn cluster(mut self) -> Self {
        self.mode = Mode::Cluster;
        self.config("cluster-enabled", "yes")
    }

    /// [`RedisServer::set_clock_offset`] works.
    pub(crate) fn with_clock(mut self) -> Self {
        self.clock = true;
        self
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn start(self) -> RedisServer {
        for _ in 0..ATTEMPTS {
            let (port, tls_port) = (free_port(), free_port());
            let server = ChildServer::new("redis-server");
            let redis = RedisServer { server, port, tls_port, options: self.clone() };
            redis.write_files();
            if redis.run().is_ok() {
                return redis;
            }
        }
        panic!("{ATTEMPTS} ports that were free were taken a moment later");
    }
}

impl RedisServer {
    /// One with the defaults.
    pub(crate) fn start() -> Self {
        Self::options().start()
    }

    /// One whose wall clock can be moved.
    pub(crate) fn start_with_clock() -> Self {
        Self::options().with_clock().start()
    }

    /// For one with other than the defaults.
    pub(crate) fn options() -> RedisOptions {
        RedisOptions::default()
    }

    /// The port, which stays the same over restarts.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The port for TLS, if [`RedisOptions::tls`].
    pub(crate) fn tls_port(&self) -> u16 {
        self.tls_port
    }

    /// The Unix socket, if [`RedisOptions::unix_socket`].
    pub(crate) fn socket_path(&self) -> PathBuf {
        self.server.dir().join("socket")
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// `redis://127.0.0.1:PORT`, without a password.
    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.addr())
    }

    /// The process: its id, its output.
    pub(crate) fn child(&self) -> &ChildServer {
        &self.server
    }

    /// The reply to a command, over a connection of its own: a value as it is, an error with its `-`, nothing as
    /// `(nil)`, a list as lines. What belongs to a connection (`WAIT`, `MULTI`, `SELECT`) needs a [`RawConnection`].
    ///
    /// # Panics
    ///
    /// If there is no reply.
    pub(crate) fn command(&self, arguments: &[&str]) -> String {
        self.try_command(arguments).unwrap_or_else(|error| panic!("{arguments:?} has no reply: {error}"))
    }

    /// [`command`](Self::command), for a server that may be down or frozen.
    pub(crate) fn try_command(&self, arguments: &[&str]) -> io::Result<String> {
        let mut connection = RawConnection::open(self.addr())?;
        if !self.options.auth.is_empty() {
            let mut auth = vec!["AUTH"];
            auth.extend(self.options.auth.iter().map(String::as_str));
            let said = connection.command(&auth)?;
            if said != "OK" {
                return Err(io::Error::other(said));
            }
        }
        connection.command(arguments)
    }

    /// Repeats a command until its reply is as wanted, which is returned.
    pub(crate) fn until(&self, arguments: &[&str], wanted: impl Fn(&str) -> bool) -> String {
        let mut reply = String::new();
        wait_until(&format!("{arguments:?} has the wanted reply"), || {
            reply = self.command(arguments);
            wanted(&reply)
        });
        reply
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(&self) {
        self.server.kill();
    }

    /// Kills it unless it is, and starts it on the same port with the same directory.
    pub(crate) fn restart(&self) {
        self.kill();
        // Another who looks for a free port may have this one for a moment.
        let up = (0..ATTEMPTS).any(|_| self.run().is_ok());
        assert!(up, "another has port {}", self.port);
    }

    /// Kills it unless it is, and starts it on the same port with nothing.
    pub(crate) fn restart_empty(&self) {
        self.kill();
        fs::remove_dir_all(self.data_dir()).expect("it is ours");
        self.write_files();
        self.restart();
    }

    /// Stops it as SIGSTOP does: connections stay open, nothing is answered.
    pub(crate) fn freeze(&self) {
        self.server.freeze();
    }

    /// Lets it continue.
    pub(crate) fn thaw(&self) {
        self.server.thaw();
    }

    /// From now on, its wall clock differs by that much from the machine's. Its monotonic clock doesn't jump.
    pub(crate) fn set_clock_offset(&self, seconds: i64) {
        assert!(self.options.clock, "start it with start_with_clock()");
        // Never half written: it is read at every look at the clock.
        let new = self.server.dir().join("clock.new");
        fs::write(&new, format!("{seconds:+}s\n")).expect("it is ours");
        fs::rename(new, self.clock_file()).expect("it is ours");
    }

    fn data_dir(&self) -> PathBuf {
        self.server.dir().join("data")
    }

    fn config_file(&self) -> PathBuf {
        self.server.dir().join("redis.conf")
    }

    fn clock_file(&self) -> PathBuf {
        self.server.dir().join("clock")
    }

    /// Not at each start, as the server writes its configuration file too: a Sentinel always, others if asked to.
    fn write_files(&self) {
        fs::create_dir(self.data_dir()).expect("it isn't there");
        let mut text = format!("bind 127.0.0.1\nport {}\ndir {}\n", self.port, self.data_dir().display());
        let mut line = |line: String| writeln!(text, "{line}").expect("a string takes all");
        if self.options.mode != Mode::Sentinel {
            line("save \"\"".into());
            line("enable-debug-command local".into());
            line("repl-diskless-sync-delay 0".into());
        }
        if self.options.unix_socket {
            line(format!("unixsocket {}", self.socket_path().display()));
        }
        if let Some([certificate, key, ca]) = &self.options.tls {
            line(format!("tls-port {}", self.tls_port));
            line(format!("tls-cert-file {}", certificate.display()));
            line(format!("tls-key-file {}", key.display()));
            line(format!("tls-ca-cert-file {}", ca.display()));
            line("tls-auth-clients no".into());
        }
        if self.options.mode == Mode::Cluster {
            // By default 10000 above the other, which may be taken.
            line(format!("cluster-port {}", free_port()));
        }
        for own in &self.options.lines {
            line(own.clone());
        }
        fs::write(self.config_file(), text).expect("it is ours");
        if self.options.clock {
            self.set_clock_offset(0);
        }
    }

    fn run(&self) -> Result<(), PortTaken> {
        let mut command = Command::new(program("redis-server", "redis-server"));
        command.arg(self.config_file());
        if self.options.mode == Mode::Sentinel {
            command.arg("--sentinel");
        }
        if self.options.clock {
            // With jemalloc, for which the time is a part of its start, libfaketime waits for itself: it allocates
            // memory at the first look at the clock. Preloaded, the C library's `malloc` comes before jemalloc's.
            command
                .env("LD_PRELOAD", format!("{} libc.so.6", faketime().display()))
                .env("FAKETIME_TIMESTAMP_FILE", self.clock_file())
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        self.server.start(&command, self.port, || {
            self.try_command(&["PING"]).is_ok_and(|reply| reply == "PONG" || reply.starts_with("-NO"))
        })?;
        if self.options.clock {
            // What libfaketime shares with nobody here, and would leave there when it is killed.
            let pid = self.server.pid();
            for name in [format!("faketime_shm_{pid}"), format!("sem.faketime_sem_{pid}")] {
                let _ = fs::remove_file(Path::new("/dev/shm").join(name));
            }
        }
        if self.options.mode == Mode::Cluster {
            self.command(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
            self.until(&["CLUSTER", "INFO"], |info| info.contains("cluster_state:ok"));
        }
        Ok(())
    }
}

/// One connection, on which bytes can be sent without waiting for what comes back.
#[derive(Debug)]
pub(crate) struct RawConnection {
    stream: TcpStream,
    received: Vec<u8>,
}

impl RawConnection {
    /// Connects, and waits for replies for up to 20 seconds.
    pub(crate) fn open(addr: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// Sends a command.
    pub(crate) fn send(&mut self, arguments: &[&str]) -> io::Result<()> {
        self.stream.write_all(&resp::encode(arguments))
    }

    /// The next reply.
    pub(crate) fn receive(&mut self) -> io::Result<String> {
        loop {
            match resp::frame(&self.received) {
                Frame::Whole(length) => {
                    let reply: Vec<_> = self.received.drain(..length).collect();
                    return Ok(resp::render(&reply));
                }
                Frame::Foreign => return Err(io::ErrorKind::InvalidData.into()),
                Frame::Partial => self.receive_more()?,
            }
        }
    }

    fn receive_more(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => {
                self.received.extend_from_slice(&buffer[..length]);
                Ok(())
            }
        }
    }

    /// What has come that isn't a whole reply yet.
    pub(crate) fn received(&self) -> &[u8] {
        &self.received
    }

    /// Whether nothing comes for that long. Nothing else tells a lost reply from a late one.
    pub(crate) fn is_silent_for(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).expect("more than zero");
        let silent = self.receive_more().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        self.stream.set_read_timeout(Some(PATIENCE)).expect("more than zero");
        silent
    }

    /// Sends a command and receives a reply.
    pub(crate) fn command(&mut self, arguments: &[&str]) -> io::Result<String> {
        self.send(arguments)?;
        self.receive()
    }
}

/// The library that fakes the clock, in the directory of the machine's architecture.
fn faketime() -> PathBuf {
    let dirs = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    dirs.map(|dir| dir.path().join("faketime/libfaketimeMT.so.1")).find(|file| file.is_file()).unwrap_or_else(
        || panic!("libfaketime is missing: install it (Debian's package is faketime), or run tests/run.sh"),
    )
}
