//! The backends that need no server.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fencelock::backend::{Backend, Claim, Due, Grant, Outcome, Released, Renewal};
use fencelock::file::FileLocks;
use fencelock::memory::{Memory, MemoryHold};
use fencelock::testing::{Harness, Target};
use fencelock::{Capabilities, LockOptions, LockProvider, Loss, Result};
use tokio::task::yield_now;

use super::provider;

pub(super) fn targets() -> Vec<Arc<dyn Target>> {
    vec![
        Arc::new(InMemory { name: "memory", connect: |memory, options| provider(memory, options) }),
        Arc::new(InMemory { name: "remote", connect: |memory, options| provider(Remote(memory), options) }),
        Arc::new(Files),
    ]
}

/// Locks of one process, directly or over what `connect` puts before them.
#[derive(Debug)]
struct InMemory {
    name: &'static str,
    connect: fn(Memory, LockOptions) -> Box<dyn LockProvider>,
}

#[async_trait]
impl Target for InMemory {
    fn name(&self) -> &str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        (self.connect)(Memory::new(), LockOptions::new()).capabilities()
    }

    fn takes_away(&self) -> bool {
        true
    }

    fn virtual_time(&self) -> bool {
        true
    }

    async fn start(&self) -> Box<dyn Harness> {
        Box::new(Store { memory: Memory::new(), connect: self.connect })
    }
}

#[derive(Debug)]
struct Store {
    memory: Memory,
    connect: fn(Memory, LockOptions) -> Box<dyn LockProvider>,
}

#[async_trait]
impl Harness for Store {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        (self.connect)(self.memory.clone(), options)
    }

    async fn lose(&self, name: &str) -> Loss {
        assert!(self.memory.revoke(name), "somebody holds it");
        Loss::Taken
    }
}

/// The same as if it were a server: who calls it may go away before the request has arrived, and, which `memory` alone
/// doesn't show, after it was carried out and before the answer has come.
#[derive(Debug)]
struct Remote(Memory);

async fn travel<T>(request: impl Future<Output = T>) -> T {
    yield_now().await;
    let answer = request.await;
    yield_now().await;
    answer
}

impl Backend for Remote {
    type Hold = MemoryHold;

    fn name(&self) -> &'static str {
        "remote"
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities().keeps_after_exit(false) // so that the engine keeps what `memory` would keep itself
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<MemoryHold>> {
        travel(self.0.try_claim(claim, wait)).await
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        travel(self.0.abandon(claim)).await
    }

    async fn renew(&self, due: &[Due<'_, MemoryHold>]) -> Vec<Renewal> {
        travel(self.0.renew(due)).await
    }

    async fn release(&self, hold: &MemoryHold, keep_for: Duration) -> Result<Released> {
        travel(self.0.release(hold, keep_for)).await
    }

    async fn transfer(&self, hold: &MemoryHold, to: &Claim) -> Result<Option<Grant<MemoryHold>>> {
        travel(self.0.transfer(hold, to)).await
    }
}

/// Lock files, a directory for each trial.
#[derive(Debug)]
struct Files;

async fn open(dir: &Path) -> FileLocks {
    FileLocks::open(dir).await.expect("a temporary directory takes lock files")
}

#[async_trait]
impl Target for Files {
    fn name(&self) -> &'static str {
        "file"
    }

    fn capabilities(&self) -> Capabilities {
        FileLocks::new("anywhere").capabilities()
    }

    fn crosses_processes(&self) -> bool {
        true
    }

    fn takes_away(&self) -> bool {
        true
    }

    async fn start(&self) -> Box<dyn Harness> {
        Box::new(Directory(tempfile::tempdir().expect("a temporary directory")))
    }

    async fn attach(&self, address: &str) -> Box<dyn LockProvider> {
        provider(open(Path::new(address)).await, LockOptions::new())
    }
}

#[derive(Debug)]
struct Directory(tempfile::TempDir);

#[async_trait]
impl Harness for Directory {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        provider(open(self.0.path()).await, options)
    }

    fn address(&self) -> String {
        self.0.path().to_str().expect("a path in UTF-8").to_owned()
    }

    async fn lose(&self, name: &str) -> Loss {
        let file = open(self.0.path()).await.lock_file(name);
        std::fs::remove_file(file).expect("the lock file is there");
        Loss::Taken
    }
}
