//! [`PgBouncer`].

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::postgres::{DATABASE, PASSWORD, SUPERUSER, USER, give, psql, sql, unprivileged, url};
use super::{ATTEMPTS, ChildServer, PortTaken, free_port, program};

/// A `PgBouncer` on 127.0.0.1 that shares connections to a [`PostgresServer`](super::postgres::PostgresServer) among
/// clients. Its users are the server's.
#[derive(Debug)]
pub(crate) struct PgBouncer {
    server: ChildServer,
    port: u16,
    options: PgBouncerOptions,
}

/// How a [`PgBouncer`] is started.
#[derive(Clone, Debug)]
pub(crate) struct PgBouncerOptions {
    target: SocketAddr,
    lines: Vec<String>,
}

impl PgBouncerOptions {
    /// A line of the configuration file.
    pub(crate) fn config(mut self, key: &str, value: &str) -> Self {
        self.lines.push(format!("{key} = {value}"));
        self
    }

    /// For how long a client has a connection: a `session`, its default, a `transaction` or a `statement`.
    pub(crate) fn pool_mode(self, mode: &str) -> Self {
        self.config("pool_mode", mode)
    }

    /// How many connections there are for each user, at most. Its default is 20.
    pub(crate) fn pool_size(self, connections: usize) -> Self {
        self.config("default_pool_size", &connections.to_string())
    }

    /// Takes the connection that hasn't been used for longest; by default the one that was used last.
    pub(crate) fn round_robin(self) -> Self {
        self.config("server_round_robin", "1")
    }

    /// Starts it, and waits until it accepts connections. It doesn't need its target before a client does.
    pub(crate) fn start(self) -> PgBouncer {
        for _ in 0..ATTEMPTS {
            let (server, port) = (ChildServer::new("pgbouncer"), free_port());
            let bouncer = PgBouncer { server, port, options: self.clone() };
            bouncer.write_files();
            if bouncer.run().is_ok() {
                return bouncer;
            }
        }
        panic!("{ATTEMPTS} ports that were free were taken a moment later");
    }
}

impl PgBouncer {
    /// One with the defaults, to a server at `target`.
    pub(crate) fn start(target: SocketAddr) -> Self {
        Self::options(target).start()
    }

    /// For one with other than the defaults.
    pub(crate) fn options(target: SocketAddr) -> PgBouncerOptions {
        PgBouncerOptions { target, lines: Vec::new() }
    }

    /// The port, which stays the same over restarts.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// `postgres://USER:PASSWORD@127.0.0.1:PORT/DATABASE`.
    pub(crate) fn url(&self) -> String {
        url(USER, self.port)
    }

    /// [`url`](Self::url) with the superuser.
    pub(crate) fn superuser_url(&self) -> String {
        url(SUPERUSER, self.port)
    }

    /// The process: its id, its output.
    pub(crate) fn child(&self) -> &ChildServer {
        &self.server
    }

    /// The process id.
    ///
    /// # Panics
    ///
    /// If it was killed.
    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// What it has logged since its last start.
    pub(crate) fn output(&self) -> String {
        self.server.output()
    }

    /// What the user gets for some SQL, or the error.
    pub(crate) fn try_sql(&self, statement: &str) -> Result<String, String> {
        sql(&self.psql(), statement)
    }

    /// What `PgBouncer` itself says to a command, such as `SHOW POOLS` or `PAUSE`.
    ///
    /// # Panics
    ///
    /// If it fails.
    pub(crate) fn command(&self, command: &str) -> String {
        sql(&psql(self.port, SUPERUSER, PASSWORD, "pgbouncer"), command)
            .unwrap_or_else(|error| panic!("{command} failed: {error}"))
    }

    /// `psql` as the user, who may go on to send statements to it.
    pub(crate) fn psql(&self) -> Command {
        psql(self.port, USER, PASSWORD, DATABASE)
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(&self) {
        self.server.kill();
    }

    /// Kills it unless it is, and starts it on the same port.
    pub(crate) fn restart(&self) {
        self.kill();
        // Another who looks for a free port may have this one for a moment.
        let up = (0..ATTEMPTS).any(|_| self.run().is_ok());
        assert!(up, "another has port {}", self.port);
    }

    /// Stops it as SIGSTOP does: connections stay open, nothing moves.
    pub(crate) fn freeze(&self) {
        self.server.freeze();
    }

    /// Lets it continue.
    pub(crate) fn thaw(&self) {
        self.server.thaw();
    }

    fn config_file(&self) -> PathBuf {
        self.server.dir().join("pgbouncer.ini")
    }

    fn write_files(&self) {
        give(self.server.dir());
        let users = self.server.dir().join("users");
        let target = self.options.target;
        let mut lines = vec![
            "[databases]".to_owned(),
            format!("* = host={} port={}", target.ip(), target.port()),
            "[pgbouncer]".to_owned(),
            "listen_addr = 127.0.0.1".to_owned(),
            format!("listen_port = {}", self.port),
            // Without, it would run on if another had the port.
            "unix_socket_dir =".to_owned(),
            "auth_type = scram-sha-256".to_owned(),
            format!("auth_file = {}", users.display()),
            format!("admin_users = {SUPERUSER}"),
        ];
        lines.extend(self.options.lines.iter().cloned());
        lines.push(String::new());
        fs::write(self.config_file(), lines.join("\n")).expect("it is ours");
        give(&self.config_file());
        // With the passwords themselves, it can log in to the server.
        fs::write(&users, [USER, SUPERUSER].map(|user| format!("\"{user}\" \"{PASSWORD}\"\n")).concat())
            .expect("it is ours");
        give(&users);
    }

    fn run(&self) -> Result<(), PortTaken> {
        let mut command = unprivileged(&pgbouncer());
        command.arg(self.config_file());
        let listens = format!("listening on {}", self.addr());
        self.server.start(&command, self.port, || self.output().contains(&listens))
    }
}

/// Debian has it where only root looks.
fn pgbouncer() -> PathBuf {
    let file = Path::new("/usr/sbin/pgbouncer");
    if file.is_file() { file.into() } else { program("pgbouncer", "pgbouncer") }
}
