//! What this process has, and a number of it that must not grow.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Handle;
use tokio::time::sleep;

/// How long what has ended may take to be gone. Sessions without a use are closed after half a minute.
const PATIENCE: Duration = Duration::from_secs(45);

/// For how long nothing may change of what counts as settled.
const QUIET: Duration = Duration::from_millis(500);

const POLL: Duration = Duration::from_millis(20);

/// How many descriptors are open.
pub(crate) fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("Linux has it").count()
}

/// How many tasks the runtime has, the one that asks apart if it isn't spawned.
pub(crate) fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

/// The memory that the process has, in bytes.
pub(crate) fn memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has that line");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

/// As many descriptors as the process may have. How many that are.
pub(crate) fn raise_descriptor_limit() -> u64 {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("up to the hard limit one may");
    maximum.unwrap_or(u64::MAX)
}

/// A number once it hasn't changed for a while.
pub(crate) async fn settled(what: &str, look: impl Fn() -> usize) -> usize {
    let began = Instant::now();
    let (mut number, mut since) = (look(), Instant::now());
    while since.elapsed() < QUIET {
        assert!(began.elapsed() < PATIENCE, "{what} change all the time");
        sleep(POLL).await;
        let now = look();
        if now != number {
            (number, since) = (now, Instant::now());
        }
    }
    number
}

/// Waits until there are at most so many.
///
/// # Panics
///
/// If that doesn't happen.
pub(crate) async fn at_most(what: &str, limit: usize, look: impl Fn() -> usize) {
    let began = Instant::now();
    loop {
        let number = look();
        if number <= limit {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{number} {what}, where {limit} are allowed");
        sleep(POLL).await;
    }
}
