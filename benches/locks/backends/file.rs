//! Lock files: beside `file:` the kernel's `flock`, and a number written to the file: as it is, and with `fdatasync`,
//! as a fencing token that outlives a power cut must be.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use crate::backends::{Limit, Site};
use crate::locker::{Locker, Result};
use crate::workload::{Targets, Workload};

pub(crate) struct Directory(TempDir);

impl Directory {
    pub(crate) fn make() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }
}

impl Site for Directory {
    fn url(&self) -> String {
        format!("file:{}", self.0.path().display())
    }
}

pub(crate) fn limits(workload: Workload) -> Vec<Limit> {
    match workload {
        Workload::W5 | Workload::W6(_) => vec![],
        _ => vec![
            Limit { way: "synced", says: "flock, write, fdatasync", targets: Targets::NONE },
            Limit { way: "flock", says: "flock, write", targets: Targets::NONE },
        ],
    }
}

#[derive(Clone)]
pub(crate) struct Flock {
    dir: Arc<PathBuf>,
    synced: bool,
}

impl Flock {
    pub(crate) fn new(way: &str, url: &str) -> Self {
        let dir = PathBuf::from(url.strip_prefix("file:").unwrap_or(url));
        Self { dir: Arc::new(dir), synced: way == "synced" }
    }

    fn open(&self, name: &str) -> Result<File> {
        let path = self.dir.join(name.to_owned() + ".flock");
        Ok(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?)
    }

    fn write_next(&self, file: &File) -> Result<()> {
        let mut number = [0; 8];
        let _ = file.read_at(&mut number, 0)?; // it may be new
        file.write_all_at(&(u64::from_ne_bytes(number) + 1).to_ne_bytes(), 0)?;
        if self.synced {
            file.sync_data()?;
        }
        Ok(())
    }
}

impl Locker for Flock {
    type Guard = File;

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<File> {
        let (this, name) = (self.clone(), name.to_owned());
        let take = move || {
            let file = this.open(&name)?;
            file.try_lock()?;
            this.write_next(&file)?;
            Ok(file)
        };
        // A few system calls may be done here; to wait for the disk may not.
        if self.synced { tokio::task::spawn_blocking(take).await? } else { take() }
    }

    async fn lock(&self, name: &str) -> Result<File> {
        let (this, name) = (self.clone(), name.to_owned());
        let take = move || {
            let file = this.open(&name)?;
            file.lock()?;
            this.write_next(&file)?;
            Ok(file)
        };
        tokio::task::spawn_blocking(take).await?
    }

    async fn unlock(&self, file: File) -> Result<()> {
        Ok(file.unlock()?)
    }
}
