//! [`Holder`].

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;

use fencelock::FencingToken;
use rustix::process::Signal;
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{PATIENCE, freeze, program, signal, spawn_from_lasting_thread};

const URL: &str = "FENCELOCK_HOLDER_URL";
const LOCK: &str = "FENCELOCK_HOLDER_LOCK";

/// What it says begins with this; the test harness says other things on the same line before.
const MARK: &str = "holder: ";
const CONNECTED: &str = "connected";

/// Another process that wants a lock and holds it, until it is killed.
///
/// It is this test program again. So each that uses it has the test to be run there:
///
/// ```ignore
/// #[test]
/// #[ignore = "a process that other tests start"]
/// fn holder_process() {
///     servers::holder::play();
/// }
/// ```
#[derive(Debug)]
pub(crate) struct Holder {
    child: Child,
    input: ChildStdin,
    said: mpsc::UnboundedReceiver<String>,
}

/// What a holder did when it was told to do a step of its work unless its lock is lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Step {
    Done,
    SawTheLoss,
}

impl Holder {
    /// Starts one that connects to `url` and wants `lock`.
    pub(crate) fn start(url: &str, lock: &str) -> Self {
        Self::start_under(&[], url, lock)
    }

    /// [`start`](Self::start) by way of another program, whose last arguments are a program and its arguments.
    pub(crate) fn start_under(wrapper: &[&str], url: &str, lock: &str) -> Self {
        // Ends with us, frozen or not.
        let mut command = Command::new(program("setpriv", "util-linux"));
        command
            .args(["--pdeathsig", "KILL", "--"])
            .args(wrapper)
            .arg(std::env::current_exe().expect("this program has a path"))
            .args(["--exact", "holder_process", "--ignored", "--nocapture"])
            .env(URL, url)
            .env(LOCK, lock)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = spawn_from_lasting_thread(command).expect("setpriv can be started");
        let input = child.stdin.take().expect("it is piped");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (says, said) = mpsc::unbounded_channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, line)) = line.split_once(MARK) {
                    let _ = says.send(line.to_owned()); // the test may be over
                }
            }
        });
        Self { child, input, said }
    }

    async fn says(&mut self) -> String {
        loop {
            let line = timeout(PATIENCE, self.said.recv()).await.expect("it says something in time");
            match line.expect("it lives") {
                line if line == CONNECTED => {}
                line => return line,
            }
        }
    }

    /// Waits until it is connected; from then on it tries to get the lock.
    pub(crate) async fn is_connected(&mut self) {
        let line = timeout(PATIENCE, self.said.recv()).await.expect("it says something in time");
        assert_eq!(line.as_deref(), Some(CONNECTED));
    }

    /// Waits until it has the lock.
    pub(crate) async fn holds(&mut self) -> FencingToken {
        let line = self.says().await;
        let token = line.strip_prefix("holds ").and_then(|token| FencingToken::new(token.parse().ok()?));
        token.unwrap_or_else(|| panic!("it should hold the lock, and says: {line}"))
    }

    /// Waits for the error that it gets instead of the lock, as it is displayed. It ends after that.
    pub(crate) async fn fails(&mut self) -> String {
        let line = self.says().await;
        assert!(!line.starts_with("holds "), "it shouldn't get the lock");
        line
    }

    /// Whether it has said nothing but that it is connected since it was last listened to.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.said.try_recv().map_or(true, |line| line == CONNECTED && self.said.is_empty())
    }

    /// Tells it to do a step, which it may be too frozen to do now.
    pub(crate) fn tell_to_step(&mut self) {
        self.input.write_all(b"step\n").expect("it lives");
    }

    /// Waits until it has done or refused the step.
    pub(crate) async fn stepped(&mut self) -> Step {
        match &*self.says().await {
            "step" => Step::Done,
            "lost" => Step::SawTheLoss,
            other => panic!("it was told to do a step, and says: {other}"),
        }
    }

    /// Stops it as SIGSTOP does. It has stopped when this returns.
    pub(crate) fn freeze(&self) {
        freeze(self.child.id());
    }

    /// Lets it continue.
    pub(crate) fn thaw(&self) {
        signal(self.child.id(), Signal::CONT);
    }

    /// Kills it with SIGKILL. It is gone, and its sockets are closed, when this returns.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether this process is one, for programs without a test harness.
pub(crate) fn is_played() -> bool {
    std::env::var_os(URL).is_some()
}

/// What the process does.
pub(crate) fn play() {
    let (Ok(url), Ok(name)) = (std::env::var(URL), std::env::var(LOCK)) else { return };
    let say = |line: &str| {
        let mut out = io::stdout().lock();
        writeln!(out, "{MARK}{line}").and_then(|()| out.flush()).expect("the parent listens");
    };
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let provider = fencelock::connect(&url).await.expect("the server is there");
        say(CONNECTED);
        let guard = match provider.create_lock(&name).acquire().await {
            Ok(guard) => guard,
            Err(error) => return say(&error.to_string()),
        };
        say(&format!("holds {}", guard.fencing_token()));
        // Blocks this thread, and not the one that renews. Ends with the parent.
        for _ in io::stdin().lines().map_while(Result::ok) {
            say(if guard.is_lost() { "lost" } else { "step" });
        }
    });
}
