//! Real servers as child processes, and what can happen to them and on the way to them.
//!
//! - [`redis::RedisServer`]: a Redis that can be killed, restarted, frozen, and given another wall clock.
//! - [`postgres::PostgresServer`]: the same for PostgreSQL, and a standby; [`pgbouncer::PgBouncer`] in front of it.
//! - [`azurite::AzuriteServer`]: the same for Azurite, which stands for Azure Blob Storage.
//! - `sqlserver::SqlServer`: a stand-in for SQL Server, in the test's own process.
//! - `azurite_locks`, `postgres_locks`, `redis_locks`, `sqlserver_locks`: what these show of locks.
//! - [`rigs::Rig`]: any of these, with its backend, behind one face.
//! - [`proxy::Proxy`]: a network between client and server that loses, delays, holds back and resets.
//! - [`holder::Holder`]: another process that holds a lock, and can be killed or frozen.
//! - [`locks`]: taking locks, and judging histories; [`connecting`]: coming to a server; [`authority`]: certificates.
//! - [`ChildServer`]: what is common to the servers, whichever they are.
//!
//! Every server listens on a free port of 127.0.0.1, has a temporary directory of its own, and is gone once its value
//! is dropped, or when the test program ends, whichever way. The methods block, but only for as long as the server
//! takes. A program that is missing is a panic that names its Debian package. Only [`left_out`] may skip a test.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod authority;
pub(crate) mod azurite;
#[cfg(feature = "azure")]
pub(crate) mod azurite_locks;
pub(crate) mod connecting;
pub(crate) mod holder;
pub(crate) mod locks;
pub(crate) mod pgbouncer;
pub(crate) mod postgres;
#[cfg(feature = "postgres")]
pub(crate) mod postgres_locks;
pub(crate) mod proxy;
pub(crate) mod redis;
#[cfg(feature = "redis")]
pub(crate) mod redis_locks;
mod resp;
#[cfg(all(
    feature = "azure",
    feature = "postgres",
    feature = "redis",
    feature = "sqlserver",
    feature = "testing"
))]
pub(crate) mod rigs;
#[cfg(feature = "sqlserver")]
pub(crate) mod sqlserver;
#[cfg(feature = "sqlserver")]
pub(crate) mod sqlserver_locks;

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long a server may take for anything that it is asked to do. Only a test that fails waits that long.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a server may take to come up, on a machine on which many others do, too.
const START: Duration = Duration::from_secs(60);

/// The time between two looks at something that can't be awaited.
const POLL: Duration = Duration::from_millis(2);

/// How often a port is picked anew, if somebody else was faster.
const ATTEMPTS: usize = 10;

/// Whether `FENCELOCK_SKIP` names `backend`, which is then said past the capturing of output by the test harness.
pub(crate) fn left_out(backend: &str) -> bool {
    let left_out = is_left_out(backend);
    if left_out {
        let test = thread::current().name().unwrap_or("a test").to_owned();
        writeln!(io::stderr(), "FENCELOCK_SKIP: {backend} is left out, so {test} shows nothing")
            .expect("stderr is open");
    }
    left_out
}

/// [`left_out`], for those who say it themselves.
pub(crate) fn is_left_out(backend: &str) -> bool {
    let skip = std::env::var("FENCELOCK_SKIP").unwrap_or_default();
    skip.split(',').any(|name| name.trim() == backend)
}

/// The path of a program.
///
/// # Panics
///
/// If it isn't in `PATH`.
pub(crate) fn program(name: &str, debian_package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()).unwrap_or_else(|| {
        panic!("{name} is missing: install it (Debian's package is {debian_package}), or run tests/run.sh")
    })
}

/// A port of 127.0.0.1 on which nobody listens right now. Another may be faster to use it.
///
/// It is below the ports that the kernel gives to outgoing connections. Among those, the port of a server that is
/// down for a while could be taken by any client, even by the one that tries to reconnect to it.
pub(crate) fn free_port() -> u16 {
    const LOWEST: u16 = 10_000;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("Linux has it");
    let end: u16 =
        range.split_whitespace().next().and_then(|port| port.parse().ok()).expect("it has two ports");
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    if end <= LOWEST + 1000 {
        let any = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port");
        return any.local_addr().expect("it is bound").port();
    }
    let random =
        || u16::try_from(RandomState::new().hash_one(0) % u64::from(end - LOWEST)).expect("below end");
    std::iter::repeat_with(|| LOWEST + random()).find(is_free).expect("it never ends")
}

/// Looks until `done`, or panics and says `what` didn't happen.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(POLL);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server got no port because another has it.
#[derive(Debug)]
pub(crate) struct PortTaken;

/// A process, its children, and their temporary directory.
#[derive(Debug)]
pub(crate) struct ChildServer {
    name: &'static str,
    child: Mutex<Option<Child>>,
    dir: TempDir,
}

impl ChildServer {
    /// Nothing runs yet.
    pub(crate) fn new(name: &'static str) -> Self {
        let dir = tempfile::Builder::new().prefix(name).tempdir().expect("a directory can be made");
        Self { name, child: Mutex::new(None), dir }
    }

    /// The temporary directory, which stays until this is dropped.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts `command` and waits until it listens on `port` and `answers`.
    ///
    /// Of a `command`, the program, arguments, environment and working directory are used.
    ///
    /// # Panics
    ///
    /// If it ends, or doesn't come up in time; its output is in the message.
    pub(crate) fn start(
        &self,
        command: &Command,
        port: u16,
        mut answers: impl FnMut() -> bool,
    ) -> Result<(), PortTaken> {
        self.spawn(command);
        let began = Instant::now();
        loop {
            // In this order: another server may answer on that port.
            if self.listens(port) && answers() {
                return Ok(());
            }
            let ended = lock(&self.child).as_mut().expect("spawned").try_wait().expect("it is our child");
            if let Some(status) = ended {
                self.kill();
                if self.output().to_lowercase().contains("address already in use") {
                    return Err(PortTaken);
                }
                panic!("{} ended with {status}, having said:\n{}", self.name, self.output());
            }
            assert!(
                began.elapsed() < START,
                "{} wasn't up within {START:?}, having said:\n{}",
                self.name,
                self.output(),
            );
            thread::sleep(POLL);
        }
    }

    fn spawn(&self, command: &Command) {
        self.kill();
        let output = File::create(self.output_file()).expect("it can be written to");
        // Otherwise a test that is killed would leave the server behind: nobody drops anything then.
        let mut wrapped = Command::new(program("setpriv", "util-linux"));
        wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        wrapped.current_dir(command.get_current_dir().unwrap_or(self.dir()));
        wrapped.stdin(Stdio::null()).stdout(output.try_clone().expect("duplicated")).stderr(output);
        *lock(&self.child) = Some(spawn_from_lasting_thread(wrapped).expect("setpriv can be started"));
    }

    fn output_file(&self) -> PathBuf {
        self.dir().join("output")
    }

    /// What it has written to stdout and stderr since its last start.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.output_file()).unwrap_or_default()).into_owned()
    }

    /// The process id.
    ///
    /// # Panics
    ///
    /// If it was killed.
    pub(crate) fn pid(&self) -> u32 {
        lock(&self.child).as_ref().expect("it runs").id()
    }

    /// What it, and what it has started, has in memory, in bytes. What several share is counted once.
    pub(crate) fn memory(&self) -> u64 {
        let share = |pid: u32| -> Option<u64> {
            // A process may have ended just now.
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.trim().trim_end_matches(" kB").parse().ok()
        };
        family(self.pid()).into_iter().filter_map(share).sum::<u64>() * 1024
    }

    /// Whether a process of this server, and not of another, listens on `port`.
    fn listens(&self, port: u16) -> bool {
        let table = fs::read_to_string("/proc/net/tcp").expect("Linux has it");
        let address = format!(":{port:04X}");
        let sockets: Vec<_> = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|line| line.len() > 9 && line[1].ends_with(&address) && line[3] == "0A")
            .map(|line| format!("socket:[{}]", line[9]))
            .collect();
        let is_ours = |pid: u32| {
            let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            files.map(|file| fs::read_link(file.path())).any(|link| match link {
                Ok(link) => sockets.iter().any(|socket| link == Path::new(socket)),
                // Root in a container may lack the right to look into another user's process: `answers` must tell.
                Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
            })
        };
        !sockets.is_empty() && family(self.pid()).into_iter().any(is_ours)
    }

    /// Stops it, and what it has started, as SIGSTOP does: connections stay open, and nothing moves. All of it has
    /// stopped when this returns.
    pub(crate) fn freeze(&self) {
        freeze(self.pid());
    }

    /// Lets it continue after [`freeze`](Self::freeze).
    pub(crate) fn thaw(&self) {
        for pid in family(self.pid()) {
            signal(pid, Signal::CONT);
        }
    }

    /// Kills it, and what it has started, with SIGKILL. It is gone when this returns. Does nothing if it is already.
    pub(crate) fn kill(&self) {
        let Some(mut child) = lock(&self.child).take() else { return };
        // Frozen first, so that none can start another that would be missed.
        let family = freeze(child.id());
        for pid in &family {
            signal(*pid, Signal::KILL);
        }
        child.wait().expect("it is our child");
        wait_until("its children are gone", || {
            family.iter().all(|pid| matches!(state(*pid), None | Some('Z')))
        });
    }
}

impl Drop for ChildServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The death signal comes with the end of the *thread* that started the process, and each test has one of its own.
/// A server that several tests share must outlive the one which happened to start it.
pub(crate) fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static JOBS: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, result) in queue {
                // Nobody waits for it any more if the test was cancelled; then the child ends with us.
                let _ = result.send(command.spawn());
            }
        });
        jobs
    });
    let (result, spawned) = mpsc::channel();
    JOBS.send((command, result)).expect("the thread never ends");
    spawned.recv().expect("the thread never ends")
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("the kernel's ids fit");
    // It may have ended by itself.
    let _ = kill_process(pid, signal);
}

/// Stops a process and its descendants, parents first since those start others. Returns all of them.
pub(crate) fn freeze(pid: u32) -> Vec<u32> {
    signal(pid, Signal::STOP);
    wait_until("the process is stopped", || matches!(state(pid), None | Some('T' | 't' | 'Z' | 'X')));
    let mut all = vec![pid];
    all.extend(children(pid).into_iter().flat_map(freeze));
    all
}

/// A process and its descendants.
fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    all.extend(children(pid).into_iter().flat_map(family));
    all
}

fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("Linux has it").flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| stat(*pid).is_some_and(|(_, its_parent)| its_parent == parent))
        .collect()
}

fn state(pid: u32) -> Option<char> {
    Some(stat(pid)?.0)
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
