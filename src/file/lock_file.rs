//! The lock file itself: opening, locking, drawing the next token, and what can go wrong. All of it blocks.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::record::Record;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// An open lock file, locked or not yet.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) identity: Identity,
}

/// A locked file. Dropping it unlocks it.
#[derive(Debug)]
pub(super) struct Locked(pub(super) Opened);

impl Drop for Locked {
    fn drop(&mut self) {
        // Closing would do, but not if the process has forked in between. Closing is what wakes the waiters.
        let _ = self.0.file.unlock();
    }
}

/// Which file it is, wherever it is called what.
#[cfg(unix)]
pub(super) type Identity = (u64, u64);
#[cfg(not(unix))]
pub(super) type Identity = ();

#[cfg(unix)]
fn identity(metadata: &std::fs::Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt as _;
    (metadata.dev(), metadata.ino())
}

/// Stable `std` doesn't tell elsewhere; there a file that is open can't be replaced by another of its name.
#[cfg(not(unix))]
fn identity(_metadata: &std::fs::Metadata) -> Identity {}

/// Whether the file of this path is still that one.
pub(super) fn is_at(path: &Path, known: Identity) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(identity(&metadata) == known),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn open(path: &Path) -> Result<Opened> {
    let options = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = options().or_else(|error| match path.parent() {
        Some(dir) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir)?;
            options()
        }
        _ => Err(error),
    });
    let file = file.map_err(|error| failed("open the lock file", error))?;
    let metadata = file.metadata().map_err(|error| failed("look at the lock file", error))?;
    Ok(Opened { file, identity: identity(&metadata) })
}

/// What one attempt came to.
pub(super) enum Attempted {
    Granted(Locked, FencingToken),
    /// The file stays open for the next attempt: opening and closing it each time would wake every other waiter.
    Busy(Opened, Option<Duration>),
}

/// One attempt, on a file that is open already or on the one of this path.
pub(super) fn attempt(path: &Path, mut opened: Option<Opened>) -> Result<Attempted> {
    loop {
        let file = match opened.take() {
            Some(file) => file,
            None => open(path)?,
        };
        let locked = match file.file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {
                opened = Some(file);
                continue;
            }
            Err(TryLockError::Error(error)) => {
                return Err(Error::new(ErrorKind::Unsupported, "the file system does not lock files")
                    .with_source(error));
            }
        };
        // A file that was removed or replaced is nobody's lock any more.
        let current = is_at(path, file.identity).map_err(|error| failed("look at the lock file", error))?;
        match (current, locked) {
            (false, _) => {}
            (true, false) => return Ok(Attempted::Busy(file, None)),
            (true, true) => return draw_token(Locked(file)),
        }
    }
}

/// Draws the token of a new grant, unless the last one is still in force.
fn draw_token(locked: Locked) -> Result<Attempted> {
    let file = &locked.0.file;
    let record = Record::read(file).map_err(|error| failed("read the lock file", error))?;
    let now = SystemTime::now();
    if let Some(remaining) = record.remaining(now) {
        return Ok(Attempted::Busy(locked.unlock()?, Some(remaining)));
    }
    let token = FencingToken::after(record.token, now)?;
    Record::granted(token.get()).write(file).map_err(|error| failed("write the lock file", error))?;
    Ok(Attempted::Granted(locked, token))
}

impl Locked {
    /// Unlocks without closing.
    fn unlock(self) -> Result<Opened> {
        let file = self.0.file.try_clone().map_err(|error| failed("keep the lock file open", error))?;
        Ok(Opened { file, identity: self.0.identity })
    }
}

pub(super) fn failed(what: &str, error: io::Error) -> Error {
    if is_out_of_descriptors(&error) {
        let message =
            format!("can't {what}: each lock that is held or waited for takes a file descriptor (ulimit -n)");
        return Error::new(ErrorKind::Exhausted, message).with_source(error);
    }
    let kind = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Denied,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            ErrorKind::Exhausted
        }
        io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::AlreadyExists => ErrorKind::Config,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, format!("can't {what}")).with_source(error)
}

#[cfg(unix)]
fn is_out_of_descriptors(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

#[cfg(not(unix))]
fn is_out_of_descriptors(_error: &io::Error) -> bool {
    false
}
