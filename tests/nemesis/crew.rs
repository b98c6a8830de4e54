//! [`Crew`]: the worker processes, each behind proxies of its own, as the coordinator sees them.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::process::Signal;

use super::history::{Log, What};
use super::resource::Resource;
use super::servers::proxy::Proxy;
use super::servers::rigs::Rig;
use super::servers::{freeze, program, signal, spawn_from_lasting_thread};
use super::worker::{ORDERS, Orders, URL};

#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) slots: Vec<Slot>,
    log: Arc<Log>,
    resource: Arc<Resource>,
}

/// A place for a worker.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) proxies: Vec<Proxy>,
    url: String,
    worker: Mutex<Worker>,
}

#[derive(Debug)]
struct Worker {
    orders: Orders,
    child: Child,
    input: Arc<Mutex<ChildStdin>>,
    status: Arc<Status>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Status {
    /// It may end.
    dismissed: AtomicBool,
    served: AtomicU32,
    closed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Crew {
    /// Starts one worker for each of these orders.
    pub(crate) fn start(rig: &dyn Rig, all: Vec<Orders>, log: &Arc<Log>, resource: &Arc<Resource>) -> Self {
        let slot = |orders: Orders| {
            let proxies: Vec<_> = rig.addrs().into_iter().map(Proxy::start).collect();
            let addrs: Vec<SocketAddr> = proxies.iter().map(Proxy::addr).collect();
            let url = rig.url_by(&addrs, orders.ttl);
            let worker = Mutex::new(Worker::start(orders, &url, log, resource));
            Slot { proxies, url, worker }
        };
        Self { slots: all.into_iter().map(slot).collect(), log: log.clone(), resource: resource.clone() }
    }

    fn worker(&self, slot: u32) -> MutexGuard<'_, Worker> {
        lock(&self.slots[slot as usize].worker)
    }

    /// Kills a worker, and starts another in its place.
    pub(crate) fn replace(&self, slot: u32) {
        let mut worker = self.worker(slot);
        worker.kill();
        let mut orders = worker.orders.clone();
        orders.life += 1;
        orders.seed =
            orders.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *worker = Worker::start(orders, &self.slots[slot as usize].url, &self.log, &self.resource);
    }

    pub(crate) fn freeze(&self, slot: u32) {
        freeze(self.worker(slot).child.id());
    }

    pub(crate) fn thaw(&self, slot: u32) {
        signal(self.worker(slot).child.id(), Signal::CONT);
    }

    /// Tells all to stop playing, and to get each lock once more.
    pub(crate) fn serve(&self) {
        for slot in 0.. {
            if slot as usize >= self.slots.len() {
                return;
            }
            self.worker(slot).tell("serve");
        }
    }

    /// Which workers have tasks that aren't through with it.
    pub(crate) fn unserved(&self) -> Vec<String> {
        let workers = self.slots.iter().map(|slot| lock(&slot.worker));
        let missing = |worker: MutexGuard<'_, Worker>| {
            let (served, tasks) = (worker.status.served.load(Ordering::SeqCst), worker.orders.tasks);
            let Orders { slot, life, .. } = worker.orders;
            (served < tasks).then(|| format!("of worker {slot}.{life} only {served} of {tasks} tasks"))
        };
        workers.filter_map(missing).collect()
    }

    /// Tells all to close their providers and to end.
    pub(crate) fn quit(&self) {
        for slot in &self.slots {
            let worker = lock(&slot.worker);
            worker.status.dismissed.store(true, Ordering::SeqCst);
            worker.tell("quit");
        }
    }

    /// Which workers haven't ended.
    pub(crate) fn unclosed(&self) -> Vec<String> {
        let workers = self.slots.iter().map(|slot| lock(&slot.worker));
        let open = |worker: MutexGuard<'_, Worker>| {
            let Orders { slot, life, .. } = worker.orders;
            let closed = worker.status.closed.load(Ordering::SeqCst);
            (!closed).then(|| format!("worker {slot}.{life}"))
        };
        workers.filter_map(open).collect()
    }
}

impl Worker {
    fn start(orders: Orders, url: &str, log: &Arc<Log>, resource: &Arc<Resource>) -> Self {
        // Ends with us, frozen or not.
        let mut command = Command::new(program("setpriv", "util-linux"));
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(std::env::current_exe().expect("this program has a path"))
            .env(ORDERS, orders.to_line())
            .env(URL, url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = spawn_from_lasting_thread(command).expect("setpriv can be started");
        let input = Arc::new(Mutex::new(child.stdin.take().expect("it is piped")));
        let output = child.stdout.take().expect("it is piped");
        let status = Arc::new(Status::default());
        let (log, resource, says_to) = (log.clone(), resource.clone(), input.clone());
        let (of, its) = (format!("{}.{}", orders.slot, orders.life), status.clone());
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                hear(&line, &of, &its, &says_to, &log, &resource);
            }
            if !its.dismissed.load(Ordering::SeqCst) {
                log.trouble(format!("worker {of} has ended by itself"));
            }
        });
        Self { orders, child, input, status, reader: Some(reader) }
    }

    fn tell(&self, line: &str) {
        // It may have died, which is noted by the reader.
        let _ = lock(&self.input).write_all(format!("{line}\n").as_bytes());
    }

    /// It is gone when this returns, and all that it said is noted.
    fn kill(&mut self) {
        self.status.dismissed.store(true, Ordering::SeqCst);
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
        if let Some(reader) = self.reader.take() {
            // A panic of the reader is told by its own message.
            let _ = reader.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

fn hear(line: &str, of: &str, status: &Status, input: &Mutex<ChildStdin>, log: &Log, resource: &Resource) {
    let words: Vec<_> = line.splitn(4, ' ').collect();
    let whole = match words[..] {
        ["event", at, id, step] => at
            .parse()
            .ok()
            .zip(id.parse().ok())
            .zip(step.parse().ok())
            .map(|((at, id), step)| log.note(at, What::Of(id, step))),
        ["ask", id, ..] => id.parse().ok().map(|id: super::history::Id| {
            let question = line.splitn(3, ' ').nth(2).unwrap_or_default();
            let answer = resource.answer(id, question, log);
            // It may have been killed meanwhile.
            let _ = lock(input).write_all(format!("answer {} {} {answer}\n", id.task, id.number).as_bytes());
        }),
        ["connected"] => Some(()),
        ["served"] => {
            status.served.fetch_add(1, Ordering::SeqCst);
            Some(())
        }
        ["closed"] => {
            status.closed.store(true, Ordering::SeqCst);
            Some(())
        }
        _ => None,
    };
    // One that is killed may say half a line.
    if whole.is_none() && !status.dismissed.load(Ordering::SeqCst) {
        log.trouble(format!("worker {of} says: {line}"));
    }
}
