//! Child processes: this very executable, started again to be another holder of locks, or one that dies.
//!
//! A child says what it has done in lines on its standard output. The parent says one thing only, by closing the
//! child's standard input: go on. A parent that dies says it, too, so that no child outlives it for long.

use std::future::poll_fn;
use std::io::Read;
use std::path::Path;
use std::pin::Pin;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::task::spawn_blocking;

use super::checks::contention::contend;
use super::steps::{ok, runtime, within};
use super::{Subject, Target};
use crate::{FencingToken, LockOptions};

const TARGET: &str = "FENCELOCK_CHILD_TARGET";
const ADDRESS: &str = "FENCELOCK_CHILD_ADDRESS";
const ROLE: &str = "FENCELOCK_CHILD_ROLE";
const ARGUMENT: &str = "FENCELOCK_CHILD_ARGUMENT";

/// The lock that children are about.
pub(super) const LOCK: &str = "shared with a child";

/// What a child does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role<'a> {
    /// Says `ready`; told to go on, contends for the lock with two providers, and says `done`.
    Contend { ledger: &'a Path },
    /// Takes the lock and says `held TOKEN`; told to go on, exits without having released it.
    Hold { ttl: Duration },
    /// Says `ready`; told to go on, takes the lock for at least so long, releases it, says `done TOKEN` and exits.
    HoldAtLeast { time: Duration },
}

impl Role<'_> {
    fn to_words(self) -> (&'static str, String) {
        let millis = |time: Duration| time.as_millis().to_string();
        match self {
            Self::Contend { ledger } => ("contend", ledger.to_str().expect("a path in UTF-8").to_owned()),
            Self::Hold { ttl } => ("hold", millis(ttl)),
            Self::HoldAtLeast { time } => ("hold_at_least", millis(time)),
        }
    }
}

/// A running child, as its parent sees it. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Child {
    process: tokio::process::Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    unread: Vec<u8>,
}

impl Child {
    pub(super) fn start(subject: &Subject, role: Role<'_>) -> Self {
        let (word, argument) = role.to_words();
        let mut process = Command::new(std::env::current_exe().expect("this executable has a path"))
            .env(TARGET, subject.target().name())
            .env(ADDRESS, subject.harness().address())
            .env(ROLE, word)
            .env(ARGUMENT, argument)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("this executable can be started again");
        let input = process.stdin.take();
        let output = process.stdout.take().expect("its output is piped");
        Self { process, input, output, unread: Vec::new() }
    }

    /// Awaits a line that begins with this word, and returns the rest.
    pub(super) async fn says(&mut self, word: &str) -> String {
        let line = within("a line from a child process", self.line()).await;
        match line.strip_prefix(word) {
            Some(rest) => rest.trim().to_owned(),
            None => panic!("the child process should say {word:?}, and says {line:?}"),
        }
    }

    /// Tells it to go on.
    pub(super) fn go_on(&mut self) {
        self.input = None;
    }

    /// Kills it so that it can't do anything any more (on Unix: SIGKILL), and awaits its end.
    pub(super) async fn kill(mut self) {
        within("the end of a killed child process", self.process.kill()).await.expect("it can be killed");
    }

    /// Awaits its end, by itself and in good order.
    pub(super) async fn ended(mut self) {
        let status = within("the end of a child process", self.process.wait()).await;
        let status = status.expect("a child process can be waited for");
        assert!(status.success(), "the child process ended with {status}");
    }

    /// The next line; what is left at the end of the output, if it has ended.
    async fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line = self.unread.drain(..=end).collect();
                return String::from_utf8(line).expect("a child speaks UTF-8");
            }
            let mut chunk = [0; 256];
            let mut chunk = ReadBuf::new(&mut chunk);
            let read = poll_fn(|cx| Pin::new(&mut self.output).poll_read(cx, &mut chunk)).await;
            read.expect("the pipe can be read");
            if chunk.filled().is_empty() {
                return String::from_utf8_lossy(&self.unread).into_owned();
            }
            self.unread.extend_from_slice(chunk.filled());
        }
    }
}

/// Plays the child's part, if this process has been started as one.
pub(super) fn main(targets: &[Arc<dyn Target>]) -> Option<ExitCode> {
    let variable = |name| std::env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let name = std::env::var(TARGET).ok()?;
    let target =
        targets.iter().find(|target| target.name() == name).expect("the parent has the same targets");
    let (address, role, argument) = (variable(ADDRESS), variable(ROLE), variable(ARGUMENT));
    let millis = || Duration::from_millis(argument.parse().expect("a number of milliseconds"));
    runtime().block_on(async {
        match &*role {
            "contend" => {
                let providers = [target.attach(&address).await, target.attach(&address).await];
                println!("ready");
                told_to_go_on().await;
                contend(providers, Path::new(&argument)).await;
                println!("done");
            }
            "hold" => {
                let provider = target.attach(&address).await;
                let lock = provider.create_lock_with(LOCK, LockOptions::new().ttl(millis()));
                let guard = ok("the grant", lock.acquire()).await;
                println!("held {}", guard.fencing_token());
                told_to_go_on().await;
                std::process::exit(0); // no destructor runs
            }
            "hold_at_least" => {
                let provider = target.attach(&address).await;
                let lock = provider.create_lock_with(LOCK, LockOptions::new().hold_at_least(millis()));
                println!("ready");
                told_to_go_on().await;
                let guard = ok("the grant", lock.acquire()).await;
                let token = guard.fencing_token();
                ok("the release", guard.release()).await;
                println!("done {token}");
                std::process::exit(0);
            }
            other => panic!("{ROLE}: there is no role {other:?}"),
        }
    });
    Some(ExitCode::SUCCESS)
}

/// The token in what a child has said.
pub(super) fn token(said: &str) -> FencingToken {
    said.parse().ok().and_then(FencingToken::new).expect("a fencing token")
}

async fn told_to_go_on() {
    let end_of_input = spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    end_of_input.await.expect("reading doesn't panic").expect("the standard input can be read");
}
