//! The worker: this test program again, a process whose tasks contend for locks and tell what they do.
//!
//! It prints `event TIME ID STEP`, `ask ID QUESTION` of the resource, `connected`, `served` once for each task, and
//! `closed`. It reads `answer TASK NUMBER TEXT`, `serve` (stop playing, get each lock once) and `quit`.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use fencelock::{Error, LockGuard, LockProvider};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::broken::{self, Flaw};
use super::history::{Id, Step, now};
use super::servers::locks::Random;

pub(crate) const ORDERS: &str = "FENCELOCK_NEMESIS_WORKER";
pub(crate) const URL: &str = "FENCELOCK_NEMESIS_URL";

/// What a worker is told when it is started.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    pub(crate) slot: u32,
    pub(crate) life: u32,
    pub(crate) tasks: u32,
    pub(crate) names: Vec<String>,
    pub(crate) ttl: Duration,
    pub(crate) longest_hold: Duration,
    /// How many of twenty grants are held for up to that time; the others, shorter.
    pub(crate) long_holds: u64,
    pub(crate) seed: u64,
    pub(crate) flaw: Option<Flaw>,
}

impl Orders {
    pub(crate) fn to_line(&self) -> String {
        let Self { slot, life, tasks, names, ttl, longest_hold, long_holds, seed, flaw } = self;
        let (names, ttl, longest) = (names.join(","), ttl.as_millis(), longest_hold.as_millis());
        let flaw = flaw.map_or("-", Flaw::name);
        format!("{slot} {life} {tasks} {names} {ttl} {longest} {long_holds} {seed} {flaw}")
    }

    fn from_line(text: &str) -> Option<Self> {
        let words: Vec<_> = text.split(' ').collect();
        let [slot, life, tasks, names, ttl, longest, long_holds, seed, flaw] = words[..] else { return None };
        Some(Self {
            slot: slot.parse().ok()?,
            life: life.parse().ok()?,
            tasks: tasks.parse().ok()?,
            names: names.split(',').map(str::to_owned).collect(),
            ttl: Duration::from_millis(ttl.parse().ok()?),
            longest_hold: Duration::from_millis(longest.parse().ok()?),
            long_holds: long_holds.parse().ok()?,
            seed: seed.parse().ok()?,
            flaw: Flaw::of_name(flaw),
        })
    }
}

/// Whether this process is a worker, which has then done its work.
pub(crate) fn main() -> Option<ExitCode> {
    let orders = std::env::var(ORDERS).ok()?;
    let orders = Orders::from_line(&orders).expect("these are orders");
    let url = std::env::var(URL).expect("it comes with the orders");
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("panic {}", panic.to_string().replace('\n', " ")));
        std::process::exit(101);
    }));
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(work(orders, &url));
    // Not the end of the runtime, which would wait for the thread that reads.
    std::process::exit(0);
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    let said = out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush());
    if said.is_err() {
        std::process::exit(1); // nobody listens any more
    }
}

fn failed(call: &str, error: &Error) -> Step {
    let says = error.to_string().replace('\n', " ");
    Step::Failed { call: call.to_owned(), kind: format!("{:?}", error.kind()), says }
}

async fn work(orders: Orders, url: &str) {
    let orders = Arc::new(orders);
    let (serve, serving) = watch::channel(false);
    let (quit, mut quitting) = watch::channel(false);
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..orders.tasks).map(|_| mpsc::unbounded_channel::<(u32, String)>()).unzip();
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            let words: Vec<_> = line.splitn(4, ' ').collect();
            match words[..] {
                ["answer", task, number, text] => {
                    let task: usize = task.parse().expect("a number");
                    // The task may be done.
                    let _ = senders[task].send((number.parse().expect("a number"), text.to_owned()));
                }
                ["serve"] => drop(serve.send_replace(true)),
                ["quit"] => drop(quit.send_replace(true)),
                _ => panic!("the coordinator says {line}"),
            }
        }
        std::process::exit(1); // the coordinator is gone
    });
    let mut retries = 0;
    let provider: Arc<dyn LockProvider> = loop {
        match broken::connect(url, orders.ttl, orders.flaw).await {
            Ok(provider) => break provider.into(),
            Err(error) => {
                let id = Id { slot: orders.slot, life: orders.life, task: u32::MAX, number: retries };
                say(&format!("event {} {id} {}", now(), failed("connect", &error)));
            }
        }
        retries += 1;
        sleep(Duration::from_millis(50)).await;
    };
    say("connected");
    let tasks: Vec<_> = receivers
        .into_iter()
        .zip(0..)
        .map(|(answers, number)| {
            let seed =
                orders.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(u64::from(number) + 1) | 1;
            let id = Id { slot: orders.slot, life: orders.life, task: number, number: 0 };
            let (provider, orders, random) = (provider.clone(), orders.clone(), Random(seed));
            tokio::spawn(Task { provider, orders, id, random, answers }.play(serving.clone()))
        })
        .collect();
    for task in tasks {
        task.await.expect("a panic ends the process");
        say("served");
    }
    let _ = quitting.wait_for(|quit| *quit).await;
    if let Err(error) = provider.close().await {
        say(&format!("event {} {}.{}.0.0 {}", now(), orders.slot, orders.life, failed("close", &error)));
    }
    say("closed");
}

struct Task {
    provider: Arc<dyn LockProvider>,
    orders: Arc<Orders>,
    id: Id,
    random: Random,
    answers: mpsc::UnboundedReceiver<(u32, String)>,
}

impl Task {
    async fn play(mut self, serving: watch::Receiver<bool>) {
        while !*serving.borrow() {
            let names = self.orders.names.len() as u64;
            let name = self.orders.names[index(self.random.below(names))].clone();
            self.round(&name).await;
            sleep(Duration::from_millis(self.random.below(20))).await;
        }
        for name in self.orders.names.clone() {
            while !self.serve(&name).await {
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    fn note_at(&self, at: u64, step: &Step) {
        say(&format!("event {at} {} {step}", self.id));
    }

    fn note(&self, step: &Step) {
        self.note_at(now(), step);
    }

    fn asks(&mut self, name: &str, how: &str) {
        self.id.number += 1;
        self.note(&Step::Asked { name: name.to_owned(), how: how.to_owned() });
    }

    /// Up to a part of the TTL.
    fn moment(&mut self, hundredths: u64) -> Duration {
        let micros = u64::try_from(self.orders.ttl.as_micros()).expect("a short time");
        Duration::from_micros(self.random.below(micros * hundredths / 100))
    }

    async fn round(&mut self, name: &str) {
        let lock = self.provider.create_lock(name);
        let mut in_run = false;
        let result = match self.random.below(10) {
            0..2 => {
                self.asks(name, "acquire");
                lock.acquire().await.map(Some)
            }
            2..4 => {
                self.asks(name, "acquire-and-run");
                in_run = true;
                lock.acquire().await.map(Some)
            }
            4..6 => {
                self.asks(name, "try_acquire");
                lock.try_acquire().await
            }
            6..8 => {
                let time = self.moment(100);
                self.asks(name, "try_acquire_for");
                lock.try_acquire_for(time).await
            }
            _ => {
                let time = self.moment(40);
                self.asks(name, "acquire-or-cancel");
                match timeout(time, lock.acquire()).await {
                    Ok(result) => result.map(Some),
                    Err(_) => return self.note(&Step::Cancelled),
                }
            }
        };
        match result {
            Ok(Some(guard)) => self.hold(name, guard, in_run).await,
            Ok(None) => self.note(&Step::None),
            Err(error) => self.note(&failed("acquire", &error)),
        }
    }

    async fn hold(&mut self, name: &str, guard: LockGuard, in_run: bool) {
        self.note(&Step::Got { token: guard.fencing_token().get() });
        let longest = u64::try_from(self.orders.longest_hold.as_micros()).expect("a short time");
        let time = match self.random.below(20) {
            rare if rare < self.orders.long_holds => Duration::from_micros(self.random.below(longest)),
            17.. => self.moment(60).min(Duration::from_secs(1)),
            _ => Duration::from_millis(self.random.below(30)),
        };
        let ends_by = self.random.below(4);
        if in_run {
            // What it was told is noted by the steps themselves.
            if let Err(error) = guard.run(self.steps(name, &guard, time)).await {
                self.note(&failed("run", &error));
            }
        } else {
            self.steps(name, &guard, time).await;
        }
        match ends_by {
            0 | 1 => match guard.release().await {
                Ok(()) => self.note(&Step::Released),
                Err(error) => self.note(&failed("release", &error)),
            },
            2 => {
                drop(guard);
                self.note(&Step::Dropped);
            }
            _ => match timeout(Duration::from_micros(self.random.below(2000)), guard.release()).await {
                Ok(Ok(())) => self.note(&Step::Released),
                Ok(Err(error)) => self.note(&failed("release", &error)),
                Err(_) => self.note(&Step::Dropped),
            },
        }
    }

    /// Does something with the resource, step by step, as long as the lock is held.
    async fn steps(&mut self, name: &str, guard: &LockGuard, time: Duration) {
        let end = now() + u64::try_from(time.as_micros()).expect("a short time");
        let mut steps_to_access = self.random.below(3);
        loop {
            let at = now();
            // In this order: what was held a moment later was held then, too.
            if guard.is_lost() {
                self.note_at(at, &Step::Lost);
                sleep(self.moment(30).min(Duration::from_secs(1))).await;
                let at = now();
                if !guard.is_lost() {
                    self.note_at(at, &Step::Held);
                }
                return;
            }
            self.note_at(at, &Step::Held);
            if steps_to_access == 0 {
                self.access(name, guard.fencing_token().get()).await;
            }
            steps_to_access = steps_to_access.wrapping_sub(1);
            if at >= end {
                return;
            }
            sleep(Duration::from_millis(5 + self.random.below(25))).await;
        }
    }

    /// Adds one to the counter, in two steps.
    async fn access(&mut self, name: &str, token: u64) {
        let Ok(value) = self.ask(&format!("read {name} {token}")).await.parse::<u64>() else { return };
        sleep(Duration::from_millis(self.random.below(10))).await;
        self.ask(&format!("write {name} {token} {}", value + 1)).await;
    }

    async fn ask(&mut self, question: &str) -> String {
        say(&format!("ask {} {question}", self.id));
        loop {
            let (number, text) = self.answers.recv().await.expect("the thread that reads lives");
            // One that was asked in a `run` which ended may be answered late.
            if number == self.id.number {
                return text;
            }
        }
    }

    /// Gets the lock once, whatever it takes; false: not yet.
    async fn serve(&mut self, name: &str) -> bool {
        let lock = self.provider.create_lock(name);
        self.asks(name, "serve");
        let guard = match lock.acquire().await {
            Ok(guard) => guard,
            Err(error) => {
                self.note(&failed("acquire", &error));
                return false;
            }
        };
        self.note(&Step::Got { token: guard.fencing_token().get() });
        self.steps(name, &guard, Duration::ZERO).await;
        match guard.release().await {
            Ok(()) => self.note(&Step::Released),
            Err(error) => self.note(&failed("release", &error)),
        }
        true
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a small number")
}
