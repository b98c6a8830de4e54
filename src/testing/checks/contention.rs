//! Many contend for one lock: never two inside, every one gets in, and each with a larger token.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;

use crate::testing::Subject;
use crate::testing::child::{Child, LOCK, Role};
use crate::testing::steps::{PATIENCE, ok};
use crate::{FencingToken, LockProvider};

const PROVIDERS: usize = 2;
const TASKS: usize = 100;

/// 100 tasks on each of two providers contend.
pub async fn tasks(subject: Subject) {
    let ledger = Ledger::create();
    contend([subject.provider().await, subject.provider().await], ledger.path()).await;
    ledger.audit(PROVIDERS * TASKS);
}

/// 100 tasks on each of two providers in each of two processes contend.
pub async fn processes(subject: Subject) {
    let ledger = Ledger::create();
    let mut child = Child::start(&subject, Role::Contend { ledger: ledger.path() });
    child.says("ready").await;
    let providers = [subject.provider().await, subject.provider().await];
    child.go_on();
    contend(providers, ledger.path()).await;
    child.says("done").await;
    child.ended().await;
    ledger.audit(2 * PROVIDERS * TASKS);
}

/// Lets many tasks on these providers make one entry each in the ledger, under the lock.
pub(in crate::testing) async fn contend(providers: [Box<dyn LockProvider>; PROVIDERS], ledger: &Path) {
    let ledger: Arc<Path> = ledger.into();
    let mut tasks = JoinSet::new();
    for provider in &providers {
        for _ in 0..TASKS {
            let (lock, ledger) = (provider.create_lock(LOCK), ledger.clone());
            tasks.spawn(async move {
                let guard = lock.acquire().await.expect("everybody gets in");
                enter(&ledger, guard.fencing_token()).await;
                guard.release().await.expect("it was not lost");
            });
        }
    }
    // Awaited one by one: as long as somebody gets in, the others may take their time.
    while let Some(task) = timeout(PATIENCE, tasks.join_next()).await.expect("somebody gets in") {
        task.expect("no task panics");
    }
    for provider in providers {
        ok("the end of the provider", provider.close()).await;
    }
}

/// The critical section. It does what a second one at the same time would spoil.
async fn enter(ledger: &Path, token: FencingToken) {
    let inside = ledger.join("inside");
    drop(File::create_new(&inside).expect("nobody else is inside"));
    let counter = ledger.join("counter");
    let count: usize = fs::read_to_string(&counter).expect("a counter").parse().expect("a number");
    yield_now().await;
    fs::write(counter, (count + 1).to_string()).expect("the counter can be written");
    let mut tokens = OpenOptions::new().append(true).open(ledger.join("tokens")).expect("a list of tokens");
    writeln!(tokens, "{token}").expect("the list can be written");
    fs::remove_file(inside).expect("it is there until its writer leaves");
}

/// What the lock protects: files that all contenders write.
struct Ledger(tempfile::TempDir);

impl Ledger {
    fn create() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (file, content) in [("counter", "0"), ("tokens", "")] {
            fs::write(dir.path().join(file), content).expect("the ledger can be written");
        }
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn read(&self, file: &str) -> String {
        let path: PathBuf = self.path().join(file);
        fs::read_to_string(path).expect("the ledger can be read")
    }

    /// No update was lost, and the tokens stand in rising order.
    fn audit(&self, entries: usize) {
        assert_eq!(self.read("counter"), entries.to_string(), "updates were lost");
        let tokens: Vec<u64> =
            self.read("tokens").lines().map(|line| line.parse().expect("a token")).collect();
        assert_eq!(tokens.len(), entries);
        let risen = |pair: &[u64]| pair[0] < pair[1];
        assert!(tokens.windows(2).all(risen), "the tokens do not rise with every grant: {tokens:?}");
    }
}
