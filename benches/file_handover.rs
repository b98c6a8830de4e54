//! How soon after a release in one process the lock is acquired in another, on `file`. Beside it, in the same run, a
//! thread that blocks in `flock`, the best that the kernel has to offer; and one that also has a counter reach the disk
//! before it goes on, as a fencing token must.
//!
//! `cargo bench --bench file_handover`

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fencelock::{DistributedLock, LockProvider};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SYNCED: &str = "flock, synced counter";
const ROUNDS: usize = 500;
/// So that the other process waits by the time of the release.
const SETTLE: Duration = Duration::from_millis(10);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.as_slice() {
        [way, dir] => waiter(way, dir),
        _ => compare(),
    }
}

fn compare() -> Result<()> {
    let dir = tempfile::tempdir()?;
    println!("release in one process to acquired in another, {ROUNDS} rounds, in microseconds");
    println!("{:24} {:>8} {:>8} {:>8} {:>8}", "", "25 %", "median", "75 %", "max");
    let raw = measure("flock", dir.path())?;
    let synced = measure(SYNCED, dir.path())?;
    let ours = measure("fencelock", dir.path())?;
    println!("median ratio to flock {:.2}, to flock with a synced counter {:.2}", ours / raw, ours / synced);
    Ok(())
}

/// Runs the rounds one way, prints a row, and returns the median.
fn measure(way: &str, dir: &Path) -> Result<f64> {
    let mut other = Other::start(way, dir)?;
    let mut locker = Locker::new(way, dir)?;
    let mut took = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        locker.acquire()?;
        other.tell("acquire")?;
        std::thread::sleep(SETTLE);
        let released = now();
        locker.release()?;
        took.push(other.hear()?.saturating_sub(released));
        other.tell("release")?;
        other.hear()?;
    }
    took.sort_unstable();
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a fraction of a second")]
    let at = |quantile: usize| took[(took.len() - 1) * quantile / 4] as f64 / 1000.0;
    println!("{way:24} {:8.0} {:8.0} {:8.0} {:8.0}", at(1), at(2), at(3), at(4));
    Ok(at(2))
}

/// The other process: acquires and releases as it is told, and says when it had the lock.
fn waiter(way: &str, dir: &str) -> Result<()> {
    let mut locker = Locker::new(way, Path::new(dir))?;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "acquire" => locker.acquire()?,
            _ => locker.release()?,
        }
        println!("{}", now());
    }
    Ok(())
}

enum Locker {
    Flock {
        file: File,
        /// Also write a counter, and wait until it has reached the disk.
        synced: bool,
    },
    Fencelock {
        runtime: tokio::runtime::Runtime,
        lock: Box<dyn DistributedLock>,
        guard: Option<fencelock::LockGuard>,
    },
}

impl Locker {
    fn new(way: &str, dir: &Path) -> Result<Self> {
        if way.starts_with("flock") {
            let path = dir.join("flock");
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            return Ok(Self::Flock { file, synced: way == SYNCED });
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build()?;
        let provider = runtime.block_on(fencelock::connect(&format!("file:{}", dir.display())))?;
        Ok(Self::Fencelock { runtime, lock: provider.create_lock("x"), guard: None })
    }

    fn acquire(&mut self) -> Result<()> {
        match self {
            Self::Flock { file, synced } => {
                file.lock()?;
                if *synced {
                    file.rewind()?;
                    file.write_all(&now().to_ne_bytes())?;
                    file.sync_data()?;
                }
            }
            Self::Fencelock { runtime, lock, guard } => *guard = Some(runtime.block_on(lock.acquire())?),
        }
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        match self {
            Self::Flock { file, .. } => file.unlock()?,
            Self::Fencelock { runtime, guard, .. } => {
                let guard = guard.take().ok_or("released without having been acquired")?;
                runtime.block_on(guard.release())?;
            }
        }
        Ok(())
    }
}

struct Other {
    child: Child,
    said: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Other {
    fn start(way: &str, dir: &Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(way)
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let said = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        Ok(Self { child, said })
    }

    fn tell(&mut self, what: &str) -> Result<()> {
        Ok(writeln!(self.child.stdin.as_mut().ok_or("no input")?, "{what}")?)
    }

    fn hear(&mut self) -> Result<u64> {
        Ok(self.said.next().ok_or("the other process has ended")??.parse()?)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The wall clock, which both processes share, in nanoseconds.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
