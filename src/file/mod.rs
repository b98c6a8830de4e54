//! The `file` backend: locks between the processes of one machine, held by the kernel, without a server.
//!
//! A lock is a file in a directory that the processes share, locked with [`std::fs::File::try_lock`] (`flock` on Unix,
//! `LockFileEx` on Windows). The kernel frees it when its holder ends, however it ends. The file is never removed, since
//! whoever had opened it before would then lock something that nobody else looks at; the fencing token of the last
//! grant stands in it. Waiters sleep until the holder closes the file.
//!
//! A network file system is not the place for it: closing is not reported across machines, and locking there is what the
//! server and the mount options make of it.

mod lock_file;
mod record;
mod wake;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

use self::lock_file::{Attempted, Identity, Locked, attempt, failed, is_at};
use self::record::Record;
use self::wake::Watch;
use crate::backend::{Backend, Claim, Due, Grant, Instant, Outcome, OwnerId, Released, Renewal, Session};
use crate::capabilities::{Capabilities, Expiry};
use crate::engine::{current_runtime, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;
use crate::guard::Loss;
use crate::name::LockName;

/// What file systems allow a name to have, less the extension.
const LONGEST_STEM: usize = 255 - EXTENSION.len();
const EXTENSION: &str = ".lock";

/// How often a waiter looks again although it was not woken, where it can be woken: in case something was missed.
const SAFETY_POLL: Duration = Duration::from_millis(500);
/// How often it looks where it can't be woken.
const POLL: Duration = Duration::from_millis(30);
/// The kernel reports that a killed holder's file is closed just before it unlocks it: look again so soon, then later.
const RECHECKS: [Duration; 4] =
    [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(5), Duration::from_millis(20)];

/// Locks in a directory. Clones share their book-keeping; any number of these, in any number of processes, may use one
/// directory.
#[derive(Clone, Debug)]
pub struct FileLocks {
    dir: Arc<Path>,
    in_flight: InFlight,
}

/// A file that is held.
#[derive(Debug)]
pub struct FileHold {
    path: Arc<Path>,
    token: FencingToken,
    identity: Identity,
    /// Gone once it is released or transferred.
    locked: Arc<Mutex<Option<Locked>>>,
}

impl FileLocks {
    /// Locks in `dir`, from the current directory of this moment if it is relative. No I/O: the directory is created
    /// when it is needed.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        // A service that changes its directory later must not get other locks by that.
        let dir = std::path::absolute(&dir).unwrap_or(dir);
        Self { dir: dir.into(), in_flight: InFlight::default() }
    }

    /// Locks in `dir`, which is created now if it is missing.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub async fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let locks = Self::new(dir);
        locks.prepare().await?;
        Ok(locks)
    }

    /// Creates the directory if it is missing.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub async fn prepare(&self) -> Result<()> {
        let dir = self.dir.clone();
        blocking(move || {
            std::fs::create_dir_all(&*dir).map_err(|error| failed("create the directory", error))
        })
        .await
    }

    /// The file that stands for this lock. The name is the one on the server: with the provider's prefix, if it has one.
    #[must_use]
    pub fn lock_file(&self, name: &str) -> PathBuf {
        self.path(&LockName::new(name))
    }

    fn path(&self, name: &LockName) -> PathBuf {
        let mut stem = name.encode(LONGEST_STEM);
        // Windows takes `con.lock` for the console. Small letters are never encoded otherwise: it stays injective.
        let device = stem.split('.').next().unwrap_or_default();
        let numbered = device.strip_prefix("com").or(device.strip_prefix("lpt"));
        if matches!(device, "con" | "prn" | "aux" | "nul") || numbered.is_some_and(|n| n.len() == 1) {
            // Two bytes longer, for which a name that is cut is cut earlier.
            stem = name.encode(LONGEST_STEM - 2);
            stem = format!("%{:02X}{}", stem.as_bytes()[0], &stem[1..]);
        }
        self.dir.join(stem + EXTENSION)
    }
}

/// Runs file operations where they block nobody. Once begun they run to their end, even if nobody waits for it.
async fn blocking<T: Send + 'static>(operation: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    current_runtime()?.spawn_blocking(operation).await.unwrap_or_else(|error| {
        Err(if error.is_panic() {
            Error::new(ErrorKind::Unknown, "a file operation panicked")
        } else {
            Error::new(ErrorKind::Unavailable, "the runtime is shutting down")
        })
    })
}

/// Attempts whose file operation is under way, so that an abandoned one can be waited for.
#[derive(Clone, Debug, Default)]
struct InFlight(Arc<Mutex<HashMap<OwnerId, Arc<Notify>>>>);

impl InFlight {
    /// Travels with the operation and its result: what that holds is free once this is gone.
    fn begin(&self, owner: OwnerId) -> Flight {
        lock(&self.0).insert(owner, Arc::default());
        Flight { all: self.clone(), owner }
    }

    async fn landed(&self, owner: OwnerId) {
        loop {
            let landed = match lock(&self.0).get(&owner) {
                None => return,
                Some(landed) => landed.clone().notified_owned(),
            };
            landed.await;
        }
    }
}

#[derive(Debug)]
struct Flight {
    all: InFlight,
    owner: OwnerId,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(landed) = lock(&self.all.0).remove(&self.owner) {
            landed.notify_waiters();
        }
    }
}

impl FileLocks {
    /// Runs an operation that may end with the lock held on behalf of `owner`. If the caller goes away, its result is
    /// dropped, and with that the lock is free.
    async fn in_flight<T: Send + 'static>(
        &self,
        owner: OwnerId,
        operation: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let flight = self.in_flight.begin(owner);
        // Dropped in this order: first what may hold the lock, then the flight.
        blocking(move || Ok((operation(), flight))).await?.0
    }

    fn hold(path: Arc<Path>, locked: Locked, token: FencingToken) -> Grant<FileHold> {
        let identity = locked.0.identity;
        let locked = Arc::new(Mutex::new(Some(locked)));
        // The kernel keeps the lock as long as the file is open, a frozen holder's too: no deadline.
        Grant::on_session(FileHold { path, token, identity, locked }, token, &Session::new())
    }
}

impl Backend for FileLocks {
    type Hold = FileHold;

    fn name(&self) -> &'static str {
        "file"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(Duration::from_millis(10), Duration::from_secs(365 * 86_400), Expiry::Session)
            .keeps_after_exit(true)
            .wakes_waiters(cfg!(target_os = "linux"))
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<FileHold>> {
        let path: Arc<Path> = self.path(&claim.name).into();
        let give_up_at = Instant::now() + wait;
        let (mut opened, mut watch, mut watched) = (None, None, None);
        let mut rechecks = RECHECKS.iter();
        loop {
            let closed = watch.as_ref().map(|watch: &Watch| watch.closed.clone().notified_owned());
            let attempt = {
                let path = path.clone();
                self.in_flight(claim.owner, move || attempt(&path, opened)).await?
            };
            let (file, remaining) = match attempt {
                Attempted::Granted(locked, token) => {
                    return Ok(Outcome::Granted(Self::hold(path, locked, token)));
                }
                Attempted::Busy(file, remaining) => (file, remaining),
            };
            if give_up_at.has_passed() {
                return Ok(Outcome::Busy { retry_after: remaining });
            }
            let identity = file.identity;
            opened = Some(file);
            if watch.is_none() || watched != Some(identity) {
                watch = Watch::new(&path);
                watched = Some(identity);
                if watch.is_some() {
                    continue; // it may have been closed before it was watched
                }
            }
            let nap = match (&closed, rechecks.next()) {
                (Some(_), Some(&recheck)) => recheck,
                (Some(_), None) => SAFETY_POLL,
                (None, _) => POLL,
            };
            let nap = nap.min(remaining.unwrap_or(nap)).min(give_up_at.remaining());
            // A wait for the end of `hold_at_least` can't be cut short: nothing of that file is open any more.
            match closed {
                Some(closed) => {
                    if tokio::time::timeout(nap, closed).await.is_ok() {
                        rechecks = RECHECKS.iter();
                    }
                }
                None => tokio::time::sleep(nap).await,
            }
        }
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        self.in_flight.landed(claim.owner).await;
        Ok(())
    }

    async fn renew(&self, due: &[Due<'_, FileHold>]) -> Vec<Renewal> {
        let now = Instant::now();
        let files: Vec<_> =
            due.iter().map(|Due { hold, ttl }| (hold.path.clone(), hold.identity, now + *ttl)).collect();
        let look = move || {
            let renewals = files.into_iter().map(|(path, identity, until)| match is_at(&path, identity) {
                Ok(true) => Renewal::Until(until),
                Ok(false) => Renewal::Lost(Loss::Taken),
                Err(error) => Renewal::Failed(failed("look at the lock file", error)),
            });
            Ok(renewals.collect())
        };
        blocking(look).await.unwrap_or_default() // too short an answer: failed
    }

    async fn release(&self, hold: &FileHold, keep_for: Duration) -> Result<Released> {
        let (path, token, identity, locked) =
            (hold.path.clone(), hold.token, hold.identity, hold.locked.clone());
        blocking(move || {
            let mut locked = lock(&locked);
            let Some(file) = &*locked else { return Ok(Released::NotHeld) };
            let current = is_at(&path, identity).map_err(|error| failed("look at the lock file", error))?;
            if current && !keep_for.is_zero() {
                Record::kept(token.get(), SystemTime::now(), keep_for)
                    .write(&file.0.file)
                    .map_err(|error| failed("write the lock file", error))?;
            }
            *locked = None;
            Ok(if current { Released::Yes } else { Released::NotHeld })
        })
        .await
    }

    async fn transfer(&self, hold: &FileHold, to: &Claim) -> Result<Option<Grant<FileHold>>> {
        let (path, last, from) = (hold.path.clone(), hold.token, hold.locked.clone());
        self.in_flight(to.owner, move || {
            let mut from = lock(&from);
            let Some(locked) = &*from else { return Ok(None) };
            let current =
                is_at(&path, locked.0.identity).map_err(|error| failed("look at the lock file", error))?;
            if !current {
                return Ok(None);
            }
            let token = FencingToken::after(last.get(), SystemTime::now())?;
            Record::granted(token.get())
                .write(&locked.0.file)
                .map_err(|error| failed("write the lock file", error))?;
            Ok(from.take().map(|locked| Self::hold(path, locked, token)))
        })
        .await
    }
}
