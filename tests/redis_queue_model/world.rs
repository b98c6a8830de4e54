//! Time, the network and what goes wrong: a server, a few processes, and a program that isn't ours.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::client::{Process, Slot};
use crate::judge::{Judge, Rule, Seen, Violation, word};
use crate::store::{Resp, Script, Server};

pub(crate) const LOCK: &str = "fencelock:{job}";
/// For how long a broken-off claim is refused.
pub(crate) const DEAD_FOR: u64 = 60_000;
const NEVER: u64 = u64::MAX;
/// The wall clock when a run begins.
const EPOCH: u64 = 1_750_000_000_000;
/// An answer may take so long, or its connection counts as broken.
pub(crate) const ANSWER_TIMEOUT: u64 = 2000;
/// When the faults are over everybody who waits is served within this time: the longest TTL of somebody who crashed,
/// then each of at most six callers with the longest job, keep and grace.
const SERVED_WITHIN: u64 = 9000 + 6 * (14_000 + 4000 + 3000);
/// After that, the latest request of a connection that was cut has come, and what it can still do has run out.
const ALL_FREE_AFTER: u64 = 70_000;
/// After that, so have the tombstones.
const ALL_GONE_AFTER: u64 = 70_000 + DEAD_FOR;

/// A small generator of random numbers (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `from` up to `to`, without it.
    pub(crate) fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let index = self.range(0, u64::try_from(from.len()).expect("few"));
        from[usize::try_from(index).expect("few")]
    }

    /// Mostly short, seldom long: where the races are is not known beforehand.
    pub(crate) fn skewed(&mut self, longest: u64) -> u64 {
        match self.range(0, 20) {
            0..14 => self.range(1, 10.min(longest) + 1),
            14..18 => self.range(1, longest / 10 + 2),
            _ => self.range(1, longest + 1),
        }
    }
}

/// What the clients leave out or do wrong, to see whether the judge finds out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Breakage {
    /// The deadline of a hand-over counts from the arrival of the message.
    CountsFromArrival,
    /// It counts from the last question, answered or not.
    CountsFromLastQuestion,
    /// Without automatic renewal a hand-over isn't confirmed.
    NeverConfirms,
    /// The time of a lock that turns out to be ours counts from the question.
    MineIsWhole,
    /// After a transfer that nobody answered the next owner is taken back first.
    LeavesBeforeRelease,
    LeavesWithoutTombstone,
    /// Who has lost its place in the queue joins again under the same owner id.
    JoinsAgain,
}

/// What goes wrong in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Anything may take seconds on the wire.
    Slow,
    Cut,
    /// The server can't be reached for a while.
    Outage,
    /// A subscription breaks.
    Deaf,
    LostMessage,
    /// Messages arrive when what they say may be over.
    LateMessage,
    Pause,
    Crash,
    /// In the end they all crash.
    DiesOut,
    /// Callers give up.
    Cancel,
    /// Another program takes the lock by `SET NX PX`.
    Foreign,
    /// It deletes it, whosever it is.
    Delete,
}

/// How often each is possible in a run, in percent: with everything at once nothing gets far.
const FAULTS: [(Fault, u64); 12] = [
    (Fault::Slow, 60),
    (Fault::Cut, 50),
    (Fault::Outage, 30),
    (Fault::Deaf, 40),
    (Fault::LostMessage, 40),
    (Fault::LateMessage, 40),
    (Fault::Pause, 50),
    (Fault::Crash, 30),
    (Fault::DiesOut, 10),
    (Fault::Cancel, 50),
    (Fault::Foreign, 40),
    (Fault::Delete, 20),
];

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: u64,
    script: Script,
    keys: Vec<String>,
    args: Vec<String>,
}

#[derive(Clone, Debug)]
enum Event {
    Execute {
        connection: usize,
        request: Request,
        late: bool,
    },
    Answer {
        connection: usize,
        request: u64,
        answer: Resp,
    },
    /// A request can't even be sent.
    Refused {
        process: usize,
        incarnation: u32,
        request: u64,
    },
    /// The client notices that its connection is gone.
    Broken {
        connection: usize,
    },
    Subscribe {
        process: usize,
        incarnation: u32,
        id: u64,
    },
    Subscribed {
        process: usize,
        incarnation: u32,
        id: u64,
        heard: bool,
    },
    Deaf {
        process: usize,
        incarnation: u32,
        id: u64,
    },
    Unsubscribed {
        id: u64,
    },
    Message {
        process: usize,
        incarnation: u32,
        id: u64,
        message: String,
    },
    Wake {
        process: usize,
        incarnation: u32,
    },
    Arrive {
        process: usize,
        incarnation: u32,
    },
    Restart {
        process: usize,
    },
    Fault,
    Foreign(Foreign),
}

#[derive(Clone, Debug)]
enum Foreign {
    Act,
    Set { sent: u64, px: u64 },
    Done { value: String },
    DeleteOwn { value: String },
    DeleteAny,
}

struct Connection {
    process: usize,
    incarnation: u32,
    /// It is cut. What is on its way comes so much later, or (`NEVER`) never.
    cut: Option<u64>,
    last_executed: u64,
    last_answered: u64,
}

struct Subscriber {
    id: u64,
    process: usize,
    incarnation: u32,
    channel: String,
    /// Nothing comes through any more, whatever the server believes.
    cut: bool,
    last_message: u64,
}

/// How often what has happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) steps: u64,
    pub(crate) scripts: u64,
    pub(crate) seen: BTreeMap<String, u64>,
}

impl Figures {
    pub(crate) fn count(&mut self, what: &str) {
        match self.seen.get_mut(what) {
            Some(times) => *times += 1,
            None => drop(self.seen.insert(what.to_owned(), 1)),
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.scripts += other.scripts;
        for (what, times) in &other.seen {
            *self.seen.entry(what.clone()).or_default() += times;
        }
    }
}

pub(crate) struct World<'a> {
    pub(crate) now: u64,
    /// The server's clock, less `now`.
    offset: u64,
    order: u64,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    /// The events themselves: they have no order.
    pending: Vec<Option<Event>>,
    free: Vec<usize>,
    pub(crate) random: Random,
    server: &'a Server,
    pub(crate) processes: Vec<Process>,
    callers: usize,
    connections: Vec<Connection>,
    subscribers: Vec<Subscriber>,
    pub(crate) judge: Judge,
    pub(crate) breakage: Option<Breakage>,
    faults: Vec<Fault>,
    faults_until: u64,
    /// When the clock of the server steps back by an hour.
    steps_back_at: Option<u64>,
    last_id: u64,
    /// What the foreign program believes: its value, and until when it has the lock.
    foreign: Option<(String, u64)>,
    pub(crate) figures: Figures,
    pub(crate) trace: Option<Vec<String>>,
}

/// What a run is about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan<'a> {
    pub(crate) seed: u64,
    pub(crate) only: &'a [Rule],
    pub(crate) breakage: Option<Breakage>,
    pub(crate) clock_steps_back: bool,
    /// With much that can go wrong while a lock passes from one caller to another of its process.
    pub(crate) transfers: bool,
    pub(crate) trace: bool,
}

impl<'a> World<'a> {
    pub(crate) fn new(server: &'a Server, plan: Plan<'_>) -> Self {
        let mut random = Random::new(plan.seed);
        let (processes, callers) = if plan.transfers { (2, 2) } else { random.pick(&[(2, 2), (3, 1)]) };
        let calm = random.chance(5);
        let mut faults: Vec<_> =
            FAULTS.iter().filter(|(_, percent)| random.chance(*percent) && !calm).collect();
        if plan.transfers {
            faults.extend(&FAULTS[..2]);
        }
        let faults: Vec<_> = faults.into_iter().map(|(fault, _)| *fault).collect();
        let faults_until = random.range(10_000, 40_000);
        let steps_back_at = plan.clock_steps_back.then(|| random.range(2000, faults_until));
        server.reset(EPOCH);
        let mut world = Self {
            now: 0,
            offset: EPOCH,
            order: 0,
            events: BinaryHeap::new(),
            pending: Vec::new(),
            free: Vec::new(),
            random,
            server,
            processes: Vec::new(),
            callers,
            connections: Vec::new(),
            subscribers: Vec::new(),
            judge: Judge::new(plan.only),
            breakage: plan.breakage,
            faults,
            faults_until,
            steps_back_at,
            last_id: 0,
            foreign: None,
            figures: Figures::default(),
            trace: plan.trace.then(Vec::new),
        };
        for process in 0..processes {
            let ttl = world.random.pick(&[1500, 2500, 6000, 9000]);
            let auto_renew = world.random.chance(60);
            world.processes.push(Process::new(process, ttl, auto_renew));
            world.begin_process(process);
        }
        world.note(|world| {
            format!("{:?} until {faults_until}, {processes} processes x {callers} callers", world.faults)
        });
        world.at(200, Event::Fault);
        if world.has(Fault::Foreign) || world.has(Fault::Delete) {
            world.at(300, Event::Foreign(Foreign::Act));
        }
        world
    }

    pub(crate) fn note(&mut self, what: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:>6} {}", self.now, what(self));
            self.trace.iter_mut().for_each(|trace| trace.push(line.clone()));
        }
    }

    pub(crate) fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn at(&mut self, time: u64, event: Event) {
        self.order += 1;
        self.push(time, self.order, event);
    }

    fn push(&mut self, time: u64, order: u64, event: Event) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        self.pending[index] = Some(event);
        self.events.push(Reverse((time, order, index)));
    }

    pub(crate) fn faulty(&self) -> bool {
        self.now < self.faults_until
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    pub(crate) fn breaks(&self, breakage: Breakage) -> bool {
        self.breakage == Some(breakage)
    }

    /// How long something takes on the wire.
    fn delay(&mut self) -> u64 {
        let longest = if self.has(Fault::Slow) && self.faulty() { 6000 } else { 10 };
        self.random.skewed(longest)
    }

    /// Until then, what this process experiences isn't normal.
    fn disturb(&mut self, process: usize, until: u64) {
        let disturbed = &mut self.processes[process].disturbed_until;
        *disturbed = until.max(*disturbed);
    }

    fn disturb_if_slow(&mut self, process: usize, until: u64) {
        if until > self.now + 100 {
            self.disturb(process, until);
        }
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(mut self) -> Self {
        let mut all_served_at = None;
        let served_by = self.faults_until + SERVED_WITHIN;
        while let Some(Reverse((time, order, index))) = self.events.pop() {
            let event = self.pending[index].take().expect("each event happens once");
            self.free.push(index);
            self.now = time;
            self.figures.steps += 1;
            if self.steps_back_at.is_some_and(|at| at <= time) {
                self.steps_back_at = None;
                self.offset -= 3_600_000;
                self.note(|_| "the server's clock steps back by an hour".to_owned());
            }
            self.happen(order, event);
            self.look_for_two_holders();
            if !self.faulty() && all_served_at.is_none() {
                if self.processes.iter().all(Process::is_quiet) {
                    all_served_at = Some(time);
                } else if time > served_by {
                    self.judge.find(Rule::Starvation, || format!("somebody still waits at {time}"));
                    return self; // whether it is looked for or not: this may go on for ever
                }
            }
            if self.judge.violation.is_some() {
                return self;
            }
        }
        let end = all_served_at.unwrap_or(self.now).max(self.faults_until);
        for (after, allowed) in [(ALL_FREE_AFTER, &[":fence", ":dead:"][..]), (ALL_GONE_AFTER, &[":fence"])] {
            self.now = end + after;
            let is_allowed = |name: &String| allowed.iter().any(|part| name.contains(part));
            if let Some(name) = self.store_now().names().into_iter().find(|name| !is_allowed(name)) {
                self.judge.find(Rule::Leftovers, || format!("{name} is left {after} ms after the end"));
            }
        }
        self
    }

    pub(crate) fn violation(&self) -> Option<&Violation> {
        self.judge.violation.as_ref()
    }

    fn store_now(&mut self) -> std::cell::RefMut<'a, crate::store::Store> {
        let micros = self.random.range(0, 1000);
        let mut store = self.server.store.borrow_mut();
        store.clock = self.now + self.offset;
        store.micros = micros;
        store.listening.clear();
        store.listening.extend(self.subscribers.iter().map(|subscriber| subscriber.channel.clone()));
        store
    }

    fn look_for_two_holders(&mut self) {
        let now = self.now;
        let mut holders: Vec<String> = Vec::new();
        for process in &self.processes {
            if let Slot::Held(hold) = &process.slot
                && hold.deadline > now
                && !self.judge.robbed.contains_key(&hold.owner)
            {
                holders.push(hold.owner.clone());
            }
        }
        if let Some((value, until)) = &self.foreign
            && *until > now
            && !self.judge.robbed.contains_key(value)
        {
            holders.push(value.clone());
        }
        if holders.len() > 1 {
            self.judge.find(Rule::Exclusion, || format!("they all have it: {holders:?}"));
        }
    }

    /// Whom an event reaches, unless it is gone; it waits while that process is stopped.
    fn reaches(&self, event: &Event) -> Option<(usize, u32)> {
        match *event {
            Event::Answer { connection, .. } | Event::Broken { connection } => {
                let connection = &self.connections[connection];
                Some((connection.process, connection.incarnation))
            }
            Event::Refused { process, incarnation, .. }
            | Event::Subscribed { process, incarnation, .. }
            | Event::Deaf { process, incarnation, .. }
            | Event::Message { process, incarnation, .. }
            | Event::Wake { process, incarnation }
            | Event::Arrive { process, incarnation } => Some((process, incarnation)),
            Event::Execute { .. }
            | Event::Subscribe { .. }
            | Event::Unsubscribed { .. }
            | Event::Restart { .. }
            | Event::Fault
            | Event::Foreign(_) => None,
        }
    }

    fn happen(&mut self, order: u64, event: Event) {
        if let Some((process, incarnation)) = self.reaches(&event) {
            let process = &self.processes[process];
            if process.incarnation != incarnation || !process.lives {
                return;
            }
            if process.stopped_until > self.now {
                let until = process.stopped_until;
                self.push(until, order, event);
                return;
            }
        }
        match event {
            Event::Execute { connection, request, late } => self.execute(order, connection, request, late),
            Event::Answer { connection, request, answer } => {
                if self.connections[connection].cut.is_none() {
                    let process = self.connections[connection].process;
                    self.answered(process, request, Some(&answer));
                    self.tick(process);
                }
            }
            Event::Refused { process, request, .. } => {
                self.answered(process, request, None);
                self.tick(process);
            }
            Event::Broken { connection } => {
                let process = self.connections[connection].process;
                if self.processes[process].connection == Some(connection) {
                    self.processes[process].connection = None;
                    self.note(|_| format!("p{process}: the connection is broken"));
                    self.unanswered(process);
                    self.tick(process);
                }
            }
            Event::Subscribe { process, incarnation, id } => self.subscribe(process, incarnation, id),
            Event::Subscribed { process, id, heard, .. } => {
                self.subscribed(process, id, heard);
                self.tick(process);
            }
            Event::Deaf { process, id, .. } => {
                if self.processes[process].subscription == Some(id) {
                    self.processes[process].subscription = None;
                    self.note(|_| format!("p{process}: the subscription has ended"));
                    self.wake_all(process);
                    self.tick(process);
                }
            }
            Event::Unsubscribed { id } => self.subscribers.retain(|subscriber| subscriber.id != id),
            Event::Message { process, id, message, .. } => {
                if self.processes[process].subscription == Some(id) {
                    self.note(|_| format!("p{process}: hears {message:?}"));
                    self.heard(process, &message);
                    self.tick(process);
                }
            }
            Event::Wake { process, .. } => {
                // Earlier plans to wake up may be overtaken.
                if self.processes[process].wakes_at <= self.now {
                    self.processes[process].wakes_at = u64::MAX;
                    self.tick(process);
                }
            }
            Event::Arrive { process, .. } => {
                if self.faulty() {
                    self.arrive(process);
                    self.tick(process);
                }
            }
            Event::Restart { process } => {
                self.processes[process].lives = true;
                self.begin_process(process);
            }
            Event::Fault => self.fault(),
            Event::Foreign(what) => self.act_foreign(what),
        }
    }

    // What processes do.

    fn begin_process(&mut self, process: usize) {
        let incarnation = self.processes[process].incarnation;
        for _ in 0..self.callers {
            let at = self.now + self.random.range(0, 3000);
            self.at(at, Event::Arrive { process, incarnation });
        }
    }

    pub(crate) fn wake_at(&mut self, process: usize, at: u64) {
        let at = at.max(self.now + 1);
        if at < self.processes[process].wakes_at {
            self.processes[process].wakes_at = at;
            let incarnation = self.processes[process].incarnation;
            self.at(at, Event::Wake { process, incarnation });
        }
    }

    /// A caller has been served or has given up, and comes back later.
    pub(crate) fn caller_done(&mut self, process: usize) {
        let at = self.now + self.random.skewed(4000);
        let incarnation = self.processes[process].incarnation;
        self.at(at, Event::Arrive { process, incarnation });
    }

    pub(crate) fn send(
        &mut self,
        process: usize,
        script: Script,
        dead: Option<&str>,
        args: Vec<String>,
    ) -> u64 {
        let id = self.id();
        self.note(|_| format!("p{process}: sends #{id} {script:?} {args:?}"));
        let incarnation = self.processes[process].incarnation;
        if self.processes[process].cut_off_until > self.now {
            let at = self.now + self.random.range(1, 20);
            self.at(at, Event::Refused { process, incarnation, request: id });
            return id;
        }
        let mut keys = vec![LOCK.to_owned()];
        if script != Script::Renew {
            keys.extend([":fence", ":queue", ":waiters"].map(|suffix| [LOCK, suffix].concat()));
            keys.extend(dead.map(|hex| [LOCK, ":dead:", hex].concat()));
        }
        let connection = self.processes[process].connection.unwrap_or_else(|| {
            let (last_executed, last_answered) = (self.now, self.now);
            self.connections.push(Connection {
                process,
                incarnation,
                cut: None,
                last_executed,
                last_answered,
            });
            self.connections.len() - 1
        });
        self.processes[process].connection = Some(connection);
        let at = (self.now + self.delay()).max(self.connections[connection].last_executed);
        self.connections[connection].last_executed = at;
        self.disturb_if_slow(process, at);
        let request = Request { id, script, keys, args };
        self.at(at, Event::Execute { connection, request, late: false });
        id
    }

    /// Breaks the connection on the client's side.
    pub(crate) fn drop_connection(&mut self, process: usize) {
        if let Some(connection) = self.processes[process].connection.take() {
            self.cut(connection);
            self.unanswered(process);
        }
    }

    pub(crate) fn start_subscribing(&mut self, process: usize) {
        let (id, incarnation) = (self.id(), self.processes[process].incarnation);
        self.processes[process].subscribing = Some(id);
        if self.processes[process].cut_off_until > self.now {
            let at = self.now + self.random.range(1, 20);
            self.at(at, Event::Subscribed { process, incarnation, id, heard: false });
            return;
        }
        let at = self.now + self.delay();
        self.disturb_if_slow(process, at);
        self.at(at, Event::Subscribe { process, incarnation, id });
    }

    /// The client closes its subscription. The server notices later.
    pub(crate) fn stop_subscription(&mut self, process: usize) {
        if let Some(id) = self.processes[process].subscription.take() {
            self.cut_subscription(id);
        }
    }

    // The network.

    fn cut(&mut self, connection: usize) {
        if self.connections[connection].cut.is_none() {
            // A server may carry out what it has read from a connection that is gone, much later than all that comes after.
            let late = match self.random.range(0, 6) {
                0..3 => NEVER,
                3 => self.random.range(0, 500),
                4 => self.random.range(0, 12_000),
                _ => self.random.range(0, 45_000),
            };
            self.connections[connection].cut = Some(late);
            self.note(|_| format!("connection {connection} is cut; what is on its way comes {late} later"));
        }
    }

    fn cut_subscription(&mut self, id: u64) {
        let half_open = if self.random.chance(50) { 0 } else { self.random.range(1, 5000) };
        for subscriber in &mut self.subscribers {
            if subscriber.id == id {
                subscriber.cut = true;
            }
        }
        self.note(|_| format!("subscription {id} is cut; the server notices after {half_open}"));
        self.at(self.now + half_open, Event::Unsubscribed { id });
    }

    fn subscribe(&mut self, process: usize, incarnation: u32, id: u64) {
        if self.processes[process].incarnation != incarnation {
            return;
        }
        let channel = self.processes[process].channel();
        let last_message = self.now;
        self.subscribers.push(Subscriber { id, process, incarnation, channel, cut: false, last_message });
        let at = self.now + self.delay();
        self.disturb_if_slow(process, at);
        self.at(at, Event::Subscribed { process, incarnation, id, heard: true });
    }

    fn execute(&mut self, order: u64, connection: usize, request: Request, late: bool) {
        if let Some(later) = self.connections[connection].cut
            && !late
        {
            if later != NEVER {
                self.push(self.now + later, order, Event::Execute { connection, request, late: true });
            }
            return;
        }
        let before = self.locked();
        let listening = self.store_now().listening.clone();
        let answer = match self.server.eval(request.script, &request.keys, &request.args) {
            Ok(answer) => answer,
            Err(error) => {
                self.judge.find(Rule::Script, || error);
                Resp::Nil
            }
        };
        self.figures.scripts += 1;
        let after = self.locked();
        let id = request.id;
        self.note(|_| {
            let late = if late { " late" } else { "" };
            format!("server: #{id}{late} {:?} -> {answer:?}; the lock: {after:?}", request.script)
        });
        let fence = self.server.store.borrow_mut().text(&format!("{LOCK}:fence"));
        let fence = fence.map_or(0, |(token, _)| token.parse().expect("a token"));
        self.judge.see(&Seen {
            at: self.now,
            script: request.script,
            args: &request.args,
            answer: &answer,
            before,
            after,
            fence,
            listening: &listening,
        });
        self.figures.count(&format!("{:?} {}", request.script, word(&answer)));
        if late {
            self.figures.count("executed late");
        }
        let published = std::mem::take(&mut self.server.store.borrow_mut().published);
        for (channel, message) in published {
            self.publish(&channel, &message);
        }
        if !late {
            let at = (self.now + self.delay()).max(self.connections[connection].last_answered);
            self.connections[connection].last_answered = at;
            self.disturb_if_slow(self.connections[connection].process, at);
            self.at(at, Event::Answer { connection, request: id, answer });
        }
    }

    /// The lock's value and when it expires, in the model's time.
    fn locked(&mut self) -> Option<(String, u64)> {
        let (value, expiry) = self.store_now().text(LOCK)?;
        // Without a TTL it is for ever, and found as left over.
        Some((value, expiry.map_or(u64::MAX, |expiry| expiry - self.offset)))
    }

    fn publish(&mut self, channel: &str, message: &str) {
        self.figures.count("handed over");
        for index in 0..self.subscribers.len() {
            if self.subscribers[index].channel != channel {
                continue;
            }
            let lost = self.has(Fault::LostMessage) && self.faulty() && self.random.chance(15);
            let late = self.has(Fault::LateMessage) && self.faulty() && self.random.chance(30);
            let delay = if late { self.random.range(0, 8000) } else { self.delay() };
            let at = (self.now + delay).max(self.subscribers[index].last_message);
            let (process, incarnation) =
                (self.subscribers[index].process, self.subscribers[index].incarnation);
            if lost || self.subscribers[index].cut {
                self.disturb(process, self.now + 10_000);
                continue;
            }
            self.subscribers[index].last_message = at;
            self.disturb_if_slow(process, at);
            let id = self.subscribers[index].id;
            self.at(at, Event::Message { process, incarnation, id, message: message.to_owned() });
        }
    }

    // What goes wrong.

    fn fault(&mut self) {
        if !self.faulty() {
            for process in 0..self.processes.len() {
                self.processes[process].cut_off_until = self.now;
                if self.has(Fault::DiesOut) {
                    self.crash(process);
                }
            }
            return;
        }
        let next = self.now + self.random.range(50, 3000);
        self.at(next.min(self.faults_until), Event::Fault);
        let process = usize::try_from(self.random.range(0, 3)).expect("few") % self.processes.len();
        if !self.processes[process].lives {
            return;
        }
        match self.random.range(0, 5) {
            0 if self.has(Fault::Cut) => self.break_connection(process),
            1 if self.has(Fault::Outage) => {
                let until = self.now + self.random.skewed(12_000);
                self.processes[process].cut_off_until = until;
                self.disturb(process, until);
                self.note(|_| format!("p{process} doesn't reach the server until {until}"));
                self.break_connection(process);
            }
            2 if self.has(Fault::Deaf) => {
                if let Some(id) = self.processes[process].subscription {
                    self.cut_subscription(id);
                    let at = self.now + self.random.skewed(4000);
                    let incarnation = self.processes[process].incarnation;
                    self.disturb(process, at);
                    self.at(at, Event::Deaf { process, incarnation, id });
                }
            }
            3 if self.has(Fault::Pause) => {
                let until = self.now + self.random.range(10, self.processes[process].ttl * 2);
                self.processes[process].stopped_until = until;
                self.disturb(process, until);
                self.note(|_| format!("p{process} is stopped until {until}"));
            }
            4 if self.has(Fault::Crash) && self.random.chance(40) => self.crash(process),
            _ => {}
        }
    }

    fn break_connection(&mut self, process: usize) {
        if let Some(connection) = self.processes[process].connection {
            self.cut(connection);
            let at = self.now + self.random.skewed(800);
            self.disturb(process, at + 1000);
            self.at(at, Event::Broken { connection });
        }
    }

    fn crash(&mut self, process: usize) {
        self.note(|_| format!("p{process} crashes"));
        for connection in 0..self.connections.len() {
            if self.connections[connection].process == process {
                self.cut(connection);
            }
        }
        let theirs = self.subscribers.iter().filter(|subscriber| subscriber.process == process);
        for id in theirs.map(|subscriber| subscriber.id).collect::<Vec<_>>() {
            self.cut_subscription(id);
        }
        self.processes[process].crash();
        let at = self.now + self.random.range(100, 8000);
        self.at(at, Event::Restart { process });
    }

    // The program that isn't ours.

    fn act_foreign(&mut self, what: Foreign) {
        match what {
            Foreign::Act if !self.faulty() => {}
            Foreign::Act => {
                let (next, at) = (self.now + self.random.range(100, 4000), self.now + self.delay());
                self.at(next, Event::Foreign(Foreign::Act));
                if self.has(Fault::Delete) && self.random.chance(15) {
                    self.at(at, Event::Foreign(Foreign::DeleteAny));
                } else if self.has(Fault::Foreign) && self.foreign.is_none() {
                    let px = self.random.range(100, 5000);
                    self.at(at, Event::Foreign(Foreign::Set { sent: self.now, px }));
                }
            }
            Foreign::Set { sent, px } => {
                let value = format!("foreign-{}", self.id());
                let set = ["SET", LOCK, &value, "NX", "PX", &px.to_string()].map(str::to_owned);
                let answer = self.store_now().command(&set).expect("a command");
                if answer == Resp::Status("OK") && self.foreign.is_none() {
                    self.note(|_| format!("{value} has the lock for {px}"));
                    self.figures.count("foreign program");
                    self.foreign = Some((value.clone(), sent + px));
                    let done = self.now + self.random.range(0, px);
                    self.at(done, Event::Foreign(Foreign::Done { value }));
                }
            }
            Foreign::Done { value } => {
                self.foreign = None;
                let at = self.now + self.delay();
                self.at(at, Event::Foreign(Foreign::DeleteOwn { value }));
            }
            Foreign::DeleteOwn { value } => {
                if self.locked().is_some_and(|(now, _)| now == value) {
                    self.note(|_| format!("{value} deletes its lock"));
                    self.store_now().delete(LOCK);
                }
            }
            Foreign::DeleteAny => {
                if let Some((value, _)) = self.locked() {
                    self.note(|_| format!("{value}'s lock is deleted"));
                    self.figures.count("deleted");
                    self.judge.deleted(&value, self.now);
                    self.store_now().delete(LOCK);
                }
            }
        }
    }
}
