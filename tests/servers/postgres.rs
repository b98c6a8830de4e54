//! [`PostgresServer`].

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use rustix::process::Signal;

use super::{
    ATTEMPTS, ChildServer, PATIENCE, PortTaken, family, free_port, program, signal, state, wait_until,
};

/// An ordinary user, who owns [`DATABASE`].
pub(crate) const USER: &str = "app";

/// The superuser.
pub(crate) const SUPERUSER: &str = "postgres";

/// The password of both.
pub(crate) const PASSWORD: &str = "secret";

/// The database.
pub(crate) const DATABASE: &str = "test";

/// A PostgreSQL server on 127.0.0.1, with one database and two users who need their password.
///
/// Killed, it loses nothing that was committed, as that has reached the kernel. [`PostgresOptions::durable`] is for
/// who wants to know what the way to the disk costs.
///
/// It refuses to run as root. Then it runs as the user `postgres` that Debian's package makes, and owns its directory.
#[derive(Debug)]
pub(crate) struct PostgresServer {
    server: ChildServer,
    port: u16,
    options: PostgresOptions,
}

/// How a [`PostgresServer`] is started.
#[derive(Clone, Debug, Default)]
pub(crate) struct PostgresOptions {
    lines: Vec<String>,
    hba: Vec<String>,
    tls: Option<(PathBuf, PathBuf, Option<PathBuf>)>,
    primary: Option<SocketAddr>,
    clock: bool,
}

impl PostgresOptions {
    /// A setting. `value` may contain anything, and needs no quotes.
    pub(crate) fn config(mut self, key: &str, value: &str) -> Self {
        self.lines.push(setting(key, value));
        self
    }

    /// A line of `pg_hba.conf` before the others, such as `hostnossl all app all reject`.
    pub(crate) fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// Each commit is on disk before it is acknowledged.
    pub(crate) fn durable(self) -> Self {
        self.config("fsync", "on").config("full_page_writes", "on").config("synchronous_commit", "on")
    }

    /// Speaks TLS too, on the same port, with copies of these files. `ca` is for the certificates of clients, which
    /// need none unless [`hba`](Self::hba) says so.
    pub(crate) fn tls(mut self, certificate: &Path, key: &Path, ca: Option<&Path>) -> Self {
        self.tls = Some((certificate.into(), key.into(), ca.map(Into::into)));
        self
    }

    /// A hot standby of another, which takes over all that it has, then follows it.
    pub(crate) fn standby_of(mut self, primary: SocketAddr) -> Self {
        self.primary = Some(primary);
        self
    }

    /// [`PostgresServer::set_clock_offset`] works.
    pub(crate) fn with_clock(mut self) -> Self {
        self.clock = true;
        self
    }

    /// Starts it, and waits until it accepts connections.
    pub(crate) fn start(self) -> PostgresServer {
        for _ in 0..ATTEMPTS {
            let (server, port) = (ChildServer::new("postgres"), free_port());
            let postgres = PostgresServer { server, port, options: self.clone() };
            postgres.write_files();
            if postgres.run().is_ok() {
                return postgres;
            }
        }
        panic!("{ATTEMPTS} ports that were free were taken a moment later");
    }
}

impl PostgresServer {
    /// One with the defaults.
    pub(crate) fn start() -> Self {
        Self::options().start()
    }

    /// One whose wall clock can be moved.
    pub(crate) fn start_with_clock() -> Self {
        Self::options().with_clock().start()
    }

    /// A hot standby of `primary`.
    pub(crate) fn standby_of(primary: &Self) -> Self {
        Self::options().standby_of(primary.addr()).start()
    }

    /// For one with other than the defaults.
    pub(crate) fn options() -> PostgresOptions {
        PostgresOptions::default()
    }

    /// The port, which stays the same over restarts.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The directory with its Unix socket.
    pub(crate) fn socket_dir(&self) -> &Path {
        self.server.dir()
    }

    /// `postgres://USER:PASSWORD@127.0.0.1:PORT/DATABASE`.
    pub(crate) fn url(&self) -> String {
        url(USER, self.port)
    }

    /// [`url`](Self::url) with the superuser.
    pub(crate) fn superuser_url(&self) -> String {
        url(SUPERUSER, self.port)
    }

    /// The process that starts all others: its id, its output.
    pub(crate) fn child(&self) -> &ChildServer {
        &self.server
    }

    /// The id of the process that starts all others.
    ///
    /// # Panics
    ///
    /// If it was killed, or stopped.
    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// What it has logged since its last start.
    pub(crate) fn output(&self) -> String {
        self.server.output()
    }

    /// What the superuser gets for some SQL, over a connection of its own: rows as lines, columns between `|`. Several
    /// statements are one transaction.
    ///
    /// # Panics
    ///
    /// If it fails.
    pub(crate) fn sql(&self, statement: &str) -> String {
        self.try_sql(statement).unwrap_or_else(|error| panic!("{statement} failed: {error}"))
    }

    /// [`sql`](Self::sql), for a server that may refuse, be down or frozen.
    pub(crate) fn try_sql(&self, statement: &str) -> Result<String, String> {
        self.sql_as(SUPERUSER, PASSWORD, DATABASE, statement)
    }

    /// [`try_sql`](Self::try_sql) as somebody else.
    pub(crate) fn sql_as(
        &self,
        user: &str,
        password: &str,
        database: &str,
        statement: &str,
    ) -> Result<String, String> {
        sql(&psql(self.port, user, password, database), statement)
    }

    /// `psql` as the user, who may go on to send statements to it.
    pub(crate) fn psql(&self) -> Command {
        psql(self.port, USER, PASSWORD, DATABASE)
    }

    /// Repeats some SQL until its result is as wanted, which is returned.
    pub(crate) fn until(&self, statement: &str, wanted: impl Fn(&str) -> bool) -> String {
        let mut result = String::new();
        wait_until(&format!("{statement} has the wanted result"), || {
            result = self.sql(statement);
            wanted(&result)
        });
        result
    }

    /// Kills all of its processes with SIGKILL.
    pub(crate) fn kill(&self) {
        self.server.kill();
    }

    /// Kills it unless it is, and starts it on the same port with the same data.
    pub(crate) fn restart(&self) {
        self.kill();
        // Another who looks for a free port may have this one for a moment.
        let up = (0..ATTEMPTS).any(|_| self.run().is_ok());
        assert!(up, "another has port {}", self.port);
    }

    /// Stops it as an administrator does: transactions are rolled back, clients are told. [`restart`](Self::restart)
    /// starts it again.
    pub(crate) fn stop_fast(&self) {
        let pid = self.pid();
        signal(pid, Signal::INT);
        wait_until("the server has stopped", || matches!(state(pid), None | Some('Z')));
        self.kill();
    }

    /// Kills one of its processes with SIGKILL. The server then ends all connections, and has recovered when this
    /// returns.
    pub(crate) fn crash_backend(&self, backend: u32) {
        let all = family(self.pid());
        assert!(all[1..].contains(&backend), "{backend} isn't a process that this server has started");
        let times_ready = || self.output().matches("ready to accept").count();
        let before = times_ready();
        signal(backend, Signal::KILL);
        wait_until("the server has recovered", || times_ready() > before);
    }

    /// Stops all of its processes as SIGSTOP does: connections stay open, nothing is answered.
    pub(crate) fn freeze(&self) {
        self.server.freeze();
    }

    /// Lets it continue.
    pub(crate) fn thaw(&self) {
        self.server.thaw();
    }

    /// Makes a primary of a standby, which is one when this returns.
    pub(crate) fn promote(&self) {
        assert_eq!(self.sql(&format!("select pg_promote(true, {})", PATIENCE.as_secs())), "t");
    }

    /// From now on, its wall clock differs by that much from the machine's. Its monotonic clock doesn't jump.
    pub(crate) fn set_clock_offset(&self, seconds: i64) {
        assert!(self.options.clock, "start it with start_with_clock()");
        // In place: it is mapped into all processes.
        let file = File::options().write(true).open(self.clock_file()).expect("it is ours");
        file.write_all_at(&seconds.to_ne_bytes(), 0).expect("it is ours");
    }

    fn data_dir(&self) -> PathBuf {
        self.server.dir().join("data")
    }

    fn clock_file(&self) -> PathBuf {
        self.server.dir().join("clock")
    }

    fn clock_library(&self) -> PathBuf {
        self.server.dir().join("clock.so")
    }

    fn write_files(&self) {
        let dir = self.server.dir();
        give(dir);
        if let Some(primary) = self.options.primary {
            copy_primary(primary, &self.data_dir());
        } else {
            copy_template(dir);
        }
        let mut lines = vec![
            setting("listen_addresses", "127.0.0.1"),
            setting("port", &self.port.to_string()),
            setting("unix_socket_directories", &dir.display().to_string()),
            setting("fsync", "off"),
            setting("shared_buffers", "16MB"),
            setting("jit", "off"),
            // In its directory, not in /dev/shm, where it would stay when it is killed.
            setting("dynamic_shared_memory_type", "mmap"),
            // A standby looks for its primary that often, not every five seconds.
            setting("wal_retrieve_retry_interval", "100ms"),
        ];
        if let Some((certificate, key, ca)) = &self.options.tls {
            let mut add = |key: &str, from: &Path| {
                let copy = dir.join(key);
                fs::copy(from, &copy).expect("it is there");
                // More is refused for a key.
                fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).expect("it is ours");
                give(&copy);
                lines.push(setting(key, &copy.display().to_string()));
            };
            add("ssl_cert_file", certificate);
            add("ssl_key_file", key);
            if let Some(ca) = ca {
                add("ssl_ca_file", ca);
            }
            lines.push(setting("ssl", "on"));
        }
        lines.extend(self.options.lines.iter().cloned());
        self.write_file("postgresql.conf", &lines);

        let mut lines = self.options.hba.clone();
        lines.push("local all all scram-sha-256".into());
        lines.push("host all all 127.0.0.1/32 scram-sha-256".into());
        lines.push("host replication all 127.0.0.1/32 scram-sha-256".into());
        self.write_file("pg_hba.conf", &lines);

        if self.options.clock {
            for (file, bytes) in [(self.clock_file(), &[0; 8][..]), (self.clock_library(), &**CLOCK)] {
                fs::write(&file, bytes).expect("it is ours");
                give(&file);
            }
        }
    }

    fn write_file(&self, name: &str, lines: &[String]) {
        let file = self.data_dir().join(name);
        fs::write(&file, lines.join("\n") + "\n").expect("it is ours");
        give(&file);
    }

    fn run(&self) -> Result<(), PortTaken> {
        let mut command = unprivileged(&server_program("postgres", "postgresql"));
        command.arg("-D").arg(self.data_dir());
        if self.options.clock {
            command.env("LD_PRELOAD", self.clock_library()).env("CLOCK_OFFSET_FILE", self.clock_file());
        }
        self.server.start(&command, self.port, || self.is_ready())
    }

    /// A line of `postmaster.pid`, which it keeps up to date.
    fn status(&self, line: usize) -> Option<String> {
        let status = fs::read_to_string(self.data_dir().join("postmaster.pid")).ok()?;
        Some(status.lines().nth(line)?.trim().to_owned())
    }

    /// Whether it says so, and not one that was killed.
    fn is_ready(&self) -> bool {
        self.status(0) == Some(self.pid().to_string()) && self.status(7).as_deref() == Some("ready")
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.kill();
        // The kernel keeps its shared memory of 56 bytes, and 4096 of these at most.
        if let Some(id) = self.status(6).as_deref().and_then(|memory| memory.split_whitespace().nth(1)) {
            let mut ipcrm = unprivileged(&program("ipcrm", "util-linux"));
            let _ = run(ipcrm.args(["-m", id]));
        }
    }
}

fn setting(key: &str, value: &str) -> String {
    format!("{key} = '{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

/// The URL for a server, or for what is between it and the client.
pub(super) fn url(user: &str, port: u16) -> String {
    format!("postgres://{user}:{PASSWORD}@127.0.0.1:{port}/{DATABASE}")
}

/// A program of the newest PostgreSQL that is installed, which Debian doesn't have in `PATH`.
fn server_program(name: &str, debian_package: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions
        .filter_map(|version| Some((version.file_name().to_str()?.parse::<u32>().ok()?, version.path())))
        .map(|(version, dir)| (version, dir.join("bin").join(name)))
        .filter(|(_, file)| file.is_file())
        .max();
    newest.map_or_else(|| program(name, debian_package), |(_, file)| file)
}

/// The user and group for what refuses to run as root, if we are root.
fn service_user() -> Option<(u32, u32)> {
    static IDS: LazyLock<(u32, u32)> = LazyLock::new(|| {
        let id = |which| {
            let said = run(Command::new(program("id", "coreutils")).args([which, SUPERUSER]));
            said.ok().and_then(|id| id.parse().ok()).unwrap_or_else(|| {
                panic!(
                    "PostgreSQL doesn't run as root, and there is no user {SUPERUSER}: \
                     install it (Debian's package is postgresql), or run tests/run.sh"
                )
            })
        };
        (id("-u"), id("-g"))
    });
    rustix::process::geteuid().is_root().then(|| *IDS)
}

/// A program that refuses to run as root; arguments can follow.
pub(super) fn unprivileged(program: &Path) -> Command {
    let Some((user, group)) = service_user() else { return Command::new(program) };
    let mut command = Command::new(super::program("setpriv", "util-linux"));
    // With another user, the death signal that was set before is forgotten.
    command.args(["--reuid", &user.to_string(), "--regid", &group.to_string(), "--clear-groups"]);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Makes a file or directory belong to who runs an [`unprivileged`] program.
pub(super) fn give(path: &Path) {
    if let Some((user, group)) = service_user() {
        chown(path, Some(user), Some(group)).expect("root can do that");
    }
}

/// What a program says, or what it says about its failure.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().expect("it can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{} ({})", text(&output.stderr), output.status))
    }
}

/// `psql` that prints nothing but results, and ends with the first error.
pub(super) fn psql(port: u16, user: &str, password: &str, database: &str) -> Command {
    let mut psql = Command::new(server_program("psql", "postgresql-client"));
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"PG") {
            psql.env_remove(name);
        }
    }
    // Nor what is in the home directory: certificates, settings.
    psql.env("PGPASSWORD", password).env("HOME", "/nonexistent");
    psql.args(["-AtXq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", &port.to_string()]);
    psql.args(["-U", user, "-d", database]);
    psql
}

/// What `psql` says to some SQL, or that it takes too long.
pub(super) fn sql(psql: &Command, statement: &str) -> Result<String, String> {
    let mut command = Command::new(program("timeout", "coreutils"));
    command.arg(PATIENCE.as_secs().to_string()).arg(psql.get_program()).args(psql.get_args());
    for (name, value) in psql.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    run(command.args(["-c", statement]).stdin(Stdio::null()))
}

/// The data directory of a server with the database and the users, packed. It has no name, and so is gone with us.
///
/// Made once, since `initdb` takes a second.
static TEMPLATE: LazyLock<File> = LazyLock::new(|| {
    let dir =
        tempfile::Builder::new().prefix("postgres-template").tempdir().expect("a directory can be made");
    give(dir.path());
    let (data, password) = (dir.path().join("data"), dir.path().join("password"));
    fs::write(&password, PASSWORD).expect("it is ours");
    give(&password);
    let mut initdb = unprivileged(&server_program("initdb", "postgresql"));
    initdb.args(["-N", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--wal-segsize=1"]);
    initdb.args(["-U", SUPERUSER, "--pwfile"]).arg(password).arg("-D").arg(&data);
    run(initdb.current_dir(dir.path())).unwrap_or_else(|error| panic!("initdb: {error}"));

    // Each database is 300 files, whose copies take most of a start. New ones are made from template1.
    let script = format!(
        "CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}';
        CREATE DATABASE {DATABASE} OWNER {USER};
        UPDATE pg_database SET datistemplate = false WHERE datname = 'template0';
        DROP DATABASE template0;
        DROP DATABASE postgres;
        "
    );
    let mut statements = tempfile::tempfile().expect("a file can be made");
    statements.write_all(script.as_bytes()).expect("it is ours");
    statements.rewind().expect("it is a file");
    let mut single = unprivileged(&server_program("postgres", "postgresql"));
    single.args(["--single", "-c", "fsync=off", "-c", "exit_on_error=on", "-D"]).arg(&data).arg("template1");
    run(single.stdin(statements)).unwrap_or_else(|error| panic!("postgres --single: {error}"));

    let packed = tempfile::tempfile().expect("a file can be made");
    let mut tar = Command::new(program("tar", "tar"));
    let into = packed.try_clone().expect("duplicated");
    let packing = tar.arg("-C").arg(dir.path()).args(["-c", "data"]).stdout(into).status();
    assert!(packing.expect("tar can be started").success(), "tar can't pack {}", data.display());
    packed
});

/// Makes a `data` in `dir`.
fn copy_template(dir: &Path) {
    // Opened anew, so that it is read from its beginning, by several at once.
    let packed = File::open(format!("/proc/self/fd/{}", TEMPLATE.as_raw_fd())).expect("it is ours");
    let mut tar = unprivileged(&program("tar", "tar"));
    run(tar.arg("-C").arg(dir).arg("-x").stdin(packed)).unwrap_or_else(|error| panic!("tar: {error}"));
}

/// Makes `data` a copy of what a server has, which will follow it.
fn copy_primary(primary: SocketAddr, data: &Path) {
    let mut copy = unprivileged(&server_program("pg_basebackup", "postgresql-client"));
    copy.args(["-h", &primary.ip().to_string(), "-p", &primary.port().to_string(), "-U", SUPERUSER, "-D"]);
    copy.arg(data).args(["-N", "-R", "-X", "stream", "-c", "fast"]).env("PGPASSWORD", PASSWORD);
    run(&mut copy).unwrap_or_else(|error| panic!("pg_basebackup: {error}"));
}

/// The library that moves the wall clock, and no other, by what is in a file.
///
/// It isn't libfaketime, with which no `lock_timeout` or `statement_timeout` ends a wait while the clock is ahead: it
/// shows the machine's clock to a signal handler that interrupts `epoll_wait`, and the server's handler then finds
/// that it was called too early. This is also safe in a signal handler, as it opens no file there.
static CLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    const SOURCE: &str = r#"
        #include <fcntl.h>
        #include <stdlib.h>
        #include <sys/mman.h>
        #include <sys/syscall.h>
        #include <sys/time.h>
        #include <time.h>
        #include <unistd.h>

        static volatile const long long *seconds;

        __attribute__((constructor)) static void map_file(void) {
            int file = open(getenv("CLOCK_OFFSET_FILE"), O_RDONLY);
            void *memory = mmap(NULL, sizeof *seconds, PROT_READ, MAP_SHARED, file, 0);
            if (memory == MAP_FAILED) abort();
            close(file);
            seconds = memory;
        }

        int clock_gettime(clockid_t clock, struct timespec *now) {
            int result = syscall(SYS_clock_gettime, clock, now);
            int is_wall = clock == CLOCK_REALTIME || clock == 5; /* CLOCK_REALTIME_COARSE */
            if (result == 0 && is_wall && seconds) now->tv_sec += *seconds;
            return result;
        }

        int gettimeofday(struct timeval *restrict now, void *restrict zone) {
            struct timespec exact;
            (void) zone;
            clock_gettime(CLOCK_REALTIME, &exact);
            now->tv_sec = exact.tv_sec;
            now->tv_usec = exact.tv_nsec / 1000;
            return 0;
        }

        time_t time(time_t *also) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            if (also) *also = now.tv_sec;
            return now.tv_sec;
        }
    "#;
    let dir = tempfile::tempdir().expect("a directory can be made");
    let [source, library] = ["clock.c", "clock.so"].map(|name| dir.path().join(name));
    fs::write(&source, SOURCE).expect("it is ours");
    let mut cc = Command::new(program("cc", "gcc"));
    run(cc.args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]))
        .unwrap_or_else(|error| panic!("cc: {error}"));
    fs::read(library).expect("it was made")
});
