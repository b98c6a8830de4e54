//! One run: servers, workers, the streams of faults, the judge, and the time after the faults in which all must be
//! served.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use super::broken::Flaw;
use super::checker::{Broken, Rules, Violation, judge};
use super::crew::Crew;
use super::faults::{OnNetwork, OnServers, OnWorkers};
use super::history::{Event, Id, Log, Step, What};
use super::report;
use super::resource::Resource;
use super::servers::locks::Random;
use super::servers::rigs::{Kind, Part, Rig};
use super::worker::Orders;

/// How long a restarted server of Redlock has no vote, and a bit: only then the next one may be hit.
const HEALING: Duration = Duration::from_millis(3500);

/// What goes on in a run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: &'static Kind,
    pub(crate) flaw: Option<Flaw>,
    pub(crate) seed: u64,
    /// For how long there are faults.
    pub(crate) time: Duration,
    /// Hundredths of the TTL for which a lock is held at most.
    pub(crate) longest_hold: u32,
    /// How many of twenty grants are held for up to that time; the others, shorter.
    pub(crate) long_holds: u64,
    pub(crate) workers: &'static [OnWorkers],
    /// None: all that can be done to this kind.
    pub(crate) servers: Option<&'static [OnServers]>,
    pub(crate) network: &'static [OnNetwork],
}

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) violations: Vec<Violation>,
    pub(crate) events: Vec<Event>,
    pub(crate) took: Duration,
}

/// What a stream of faults needs.
pub(crate) struct Run<'a> {
    pub(crate) kind: &'static Kind,
    pub(crate) rig: &'a dyn Rig,
    pub(crate) crew: &'a Crew,
    pub(crate) log: &'a Log,
    pub(crate) names: &'a [String],
    pub(crate) random: Random,
    stop: &'a AtomicBool,
}

impl Run<'_> {
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.random.below(end as u64)).expect("below a usize")
    }

    pub(crate) fn slot(&mut self) -> u32 {
        u32::try_from(self.below(self.crew.slots.len())).expect("few")
    }

    pub(crate) fn server(&mut self) -> usize {
        self.below(self.rig.addrs().len().max(1))
    }

    pub(crate) fn name(&mut self) -> String {
        let index = self.below(self.names.len());
        self.names[index].clone()
    }

    /// So many hundredths of the TTL; at most some seconds, if it needn't be longer than the TTL.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> Duration {
        let ttl = u64::try_from(self.kind.short_ttl.as_micros()).expect("it is short");
        let time = Duration::from_micros((low * ttl + self.random.below((high - low) * ttl)) / 100);
        if low < 100 { time.min(Duration::from_secs(3)) } else { time }
    }

    /// Whether locks are those of a connection, and end with it.
    pub(crate) fn on_sessions(&self) -> bool {
        matches!(self.kind.name, "postgres" | "sqlserver")
    }

    pub(crate) fn wait(&self, time: Duration) {
        self.wait_until(time, || false);
    }

    /// Until it is done, the time is over, or the run is.
    pub(crate) fn wait_until(&self, time: Duration, done: impl Fn() -> bool) {
        let end = Instant::now() + time;
        while !done() && !self.stop.load(Ordering::SeqCst) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Deals all cards in random order before any comes again.
struct Deck<T> {
    all: Vec<T>,
    left: Vec<T>,
    dealt: usize,
}

impl<T: Copy> Deck<T> {
    fn new(all: &[T]) -> Self {
        Self { all: all.to_vec(), left: Vec::new(), dealt: 0 }
    }

    fn deal(&mut self, random: &mut Random) -> T {
        if self.left.is_empty() {
            self.left.clone_from(&self.all);
        }
        self.dealt += 1;
        let index = usize::try_from(random.below(self.left.len() as u64)).expect("below a usize");
        self.left.swap_remove(index)
    }

    fn is_through(&self) -> bool {
        self.dealt >= self.all.len()
    }
}

/// Runs it, until the time is up or a promise is broken.
pub(crate) fn run(plan: &Plan) -> Outcome {
    const NAMES: u32 = 3;
    let began = Instant::now();
    let rig = (plan.kind.start)();
    let names: Vec<String> = (0..NAMES).map(|number| format!("name-{number}")).collect();
    let log = Arc::new(Log::default());
    let resource = Arc::new(Resource::new(&names));
    let ttl = plan.kind.short_ttl;
    let orders = |slot: u32| Orders {
        slot,
        life: 0,
        tasks: 3,
        names: names.clone(),
        ttl,
        longest_hold: ttl * plan.longest_hold / 100,
        long_holds: plan.long_holds,
        seed: plan.seed.wrapping_mul(31).wrapping_add(u64::from(slot) + 1),
        flaw: plan.flaw,
    };
    let crew = Crew::start(&*rig, (0..3).map(orders).collect(), &log, &resource);
    let rules = rules(plan.kind);
    let stop = AtomicBool::new(false);
    let violations = with_faults(plan, &*rig, &crew, &log, &names, &rules, &stop);
    let violations = if violations.is_empty() {
        after_faults(plan.kind, &crew, &log, &resource, &rules)
    } else {
        violations
    };
    drop(crew); // the readers note the last words
    let events = std::mem::take(&mut *log.events());
    Outcome { violations, events, took: began.elapsed() }
}

fn rules(kind: &Kind) -> Rules {
    let micros = |time: Duration| u64::try_from(time.as_micros()).expect("a short time");
    // That a lock file was removed is noticed by looking at it, each third of the TTL. Elsewhere there is the deadline.
    let deadline = kind.name != "file";
    let slack = Duration::from_millis(if deadline { 20 } else { 300 });
    Rules { ttl: micros(kind.short_ttl), slack: micros(slack), deadline }
}

fn with_faults(
    plan: &Plan,
    rig: &dyn Rig,
    crew: &Crew,
    log: &Log,
    names: &[String],
    rules: &Rules,
    stop: &AtomicBool,
) -> Vec<Violation> {
    let is_granted = || log.events().iter().any(|event| matches!(event.what, What::Of(_, Step::Got { .. })));
    super::servers::wait_until("a worker has a lock", is_granted);
    let end = Instant::now() + plan.time;
    let half = Instant::now() + plan.time / 2;
    let run = |stream: u64| {
        let seed = plan.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(stream) | 1;
        let mut random = Random(seed);
        random.below(2); // neighbours begin alike
        Run { kind: plan.kind, rig, crew, log, names, random, stop }
    };
    // Streams that aren't through with what they have to do at least once; only long runs come to that.
    let whole = plan.time >= Duration::from_secs(20);
    let busy = AtomicUsize::new(0);
    let network = Mutex::new(Deck::new(plan.network));
    let on_workers = |mut run: Run<'_>| {
        let mut deck = Deck::new(plan.workers);
        while !run.is_over() && (Instant::now() < end || whole && !deck.is_through()) {
            deck.deal(&mut run.random).strike(&mut run);
            let pause = run.between(20, 80);
            run.wait(pause);
        }
    };
    let on_servers = |mut run: Run<'_>, cards: Vec<OnServers>, end: Instant| {
        let mut deck = Deck::new(&cards);
        while !cards.is_empty() && !run.is_over() && (Instant::now() < end || whole && !deck.is_through()) {
            let fault = deck.deal(&mut run.random);
            fault.strike(&mut run);
            let pause = run.between(30, 90);
            let heal = fault.needs_healing() && run.kind.obstacle(&[Part::Minority]).is_none();
            run.wait(if heal { HEALING } else { pause });
        }
    };
    let on_network = |mut run: Run<'_>, slot: u32| {
        let deck = || network.lock().unwrap_or_else(PoisonError::into_inner);
        while !run.is_over() && (Instant::now() < end || whole && !deck().is_through()) {
            let fault = deck().deal(&mut run.random);
            fault.strike(&mut run, slot);
            let pause = run.between(10, 150);
            run.wait(pause);
        }
    };
    thread::scope(|scope| {
        if !plan.workers.is_empty() {
            spawn(scope, &busy, stop, || on_workers(run(1)));
        }
        spawn(scope, &busy, stop, || {
            let [first, second] =
                plan.servers.map_or_else(|| OnServers::halves(&run(2)), |cards| [cards.to_vec(), Vec::new()]);
            let turn = if second.is_empty() { end } else { half };
            on_servers(run(2), first, turn);
            on_servers(run(3), second, end);
        });
        if !rig.addrs().is_empty() && !plan.network.is_empty() {
            for slot in 0..u32::try_from(crew.slots.len()).expect("few") {
                let (run, on_network) = (&run, &on_network);
                spawn(scope, &busy, stop, move || on_network(run(4 + u64::from(slot)), slot));
            }
        }
        let mut every = Duration::from_millis(500);
        loop {
            let next = Instant::now() + every;
            while Instant::now() < next && busy.load(Ordering::SeqCst) > 0 {
                thread::sleep(Duration::from_millis(20));
            }
            let judging = Instant::now();
            let events = log.events().clone();
            let violations = judge(&events, rules);
            // Of a long run, the history is long.
            every = every.max(judging.elapsed() * 20);
            if !violations.is_empty() || busy.load(Ordering::SeqCst) == 0 {
                stop.store(true, Ordering::SeqCst);
                return violations;
            }
        }
    })
}

/// Starts a stream of faults.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    busy: &'scope AtomicUsize,
    stop: &'scope AtomicBool,
    stream: impl FnOnce() + Send + 'scope,
) {
    busy.fetch_add(1, Ordering::SeqCst);
    scope.spawn(move || {
        let _done = Done { busy, stop };
        stream();
    });
}

/// Counts a stream of faults as over. If it panics, so are the others.
struct Done<'a> {
    busy: &'a AtomicUsize,
    stop: &'a AtomicBool,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.stop.store(true, Ordering::SeqCst);
        }
        self.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How long it may take until each task has had each lock once more, when the faults are over: the locks of the dead
/// run out, outages are ridden out (10 s), a server gets its vote back, and those who poll come to it.
fn bound(kind: &Kind) -> Duration {
    Duration::from_secs(20) + 3 * kind.short_ttl
}

fn after_faults(kind: &Kind, crew: &Crew, log: &Log, resource: &Resource, rules: &Rules) -> Vec<Violation> {
    let service =
        |says: String| vec![Violation { broken: Broken::Service, says, of: waiting(&log.events()) }];
    let within = |bound: Duration, missing: &dyn Fn() -> Vec<String>| {
        let began = Instant::now();
        while !missing().is_empty() && began.elapsed() < bound {
            thread::sleep(Duration::from_millis(10));
        }
        missing()
    };
    crew.serve();
    let unserved = within(bound(kind), &|| crew.unserved());
    if !unserved.is_empty() {
        let mut found = judge(&log.events(), rules);
        let says = format!("not served within {:?} after the faults: {}", bound(kind), unserved.join(", "));
        found.extend(service(says));
        return found;
    }
    crew.quit();
    let closing = kind.short_ttl + Duration::from_secs(12);
    let unclosed = within(closing, &|| crew.unclosed());
    if !unclosed.is_empty() {
        return service(format!("not closed within {closing:?}: {}", unclosed.join(", ")));
    }
    resource.note(log);
    judge(&log.events(), rules)
}

/// The calls of workers that live which have come to nothing yet.
fn waiting(events: &[Event]) -> Vec<Id> {
    let (mut lives, mut calls) = (BTreeMap::new(), BTreeSet::new());
    for event in events {
        let What::Of(id, step) = &event.what else { continue };
        lives.insert(id.slot, id.life);
        if matches!(step, Step::Asked { .. }) {
            calls.insert(*id);
        } else {
            calls.remove(id);
        }
    }
    calls.into_iter().filter(|call| lives.get(&call.slot) == Some(&call.life)).collect()
}

impl Outcome {
    /// How many faults there were of each kind.
    pub(crate) fn faults(&self) -> BTreeMap<&str, usize> {
        let mut faults = BTreeMap::new();
        for event in &self.events {
            if let What::Began(fault) = &event.what {
                *faults.entry(fault.kind.as_str()).or_default() += 1;
            }
        }
        faults
    }

    pub(crate) fn count(&self, wanted: impl Fn(&Step) -> bool) -> usize {
        self.events.iter().filter(|event| matches!(&event.what, What::Of(_, step) if wanted(step))).count()
    }

    pub(crate) fn grants(&self) -> usize {
        self.count(|step| matches!(step, Step::Got { .. }))
    }
}

impl fmt::Display for Outcome {
    /// One line of figures, or what was found.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(violation) = self.violations.first() {
            let more = self.violations.len() - 1;
            return write!(f, "{}and {more} more", report::explain(violation, &self.events));
        }
        let stale = self.count(|step| matches!(step, Step::Wrote { accepted: false, .. }));
        let lost = self.count(|step| matches!(step, Step::Lost))
            + self.count(|step| matches!(step, Step::Failed { kind, .. } if kind == "Lost"));
        let errors = self.count(|step| matches!(step, Step::Failed { kind, .. } if kind != "Lost"));
        let faults: Vec<_> =
            self.faults().into_iter().map(|(kind, number)| format!("{number} {kind}")).collect();
        write!(
            f,
            "{} grants, {stale} stale writes refused, {lost} losses, {errors} errors, in {:.0} s; faults: {}",
            self.grants(),
            self.took.as_secs_f64(),
            faults.join(", ")
        )
    }
}
