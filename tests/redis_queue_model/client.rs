//! What a process does: one attempt at a time, then a hold, then its release, as `src/engine` and `src/redis` do it. The
//! waiting itself is the real code.

use std::collections::VecDeque;
use std::ops::Add;
use std::time::Duration;

use crate::judge::Rule;
use crate::store::{Resp, Script};
use crate::waiting::{Granted, Reply, Step, Waiting, grace, millis};
use crate::world::{ANSWER_TIMEOUT, Breakage, DEAD_FOR, Fault, World};

/// A moment of the model, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ms(pub(crate) u64);

impl Add<Duration> for Ms {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(millis(by)))
    }
}

/// Somebody in the process who wants the lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    tries: bool,
    gives_up_at: u64,
    job: u64,
    /// For how long it stays locked after the job.
    keep: u64,
}

#[derive(Debug)]
enum Asking {
    /// Not before this time.
    At(u64),
    Subscribing {
        since: u64,
    },
    Asked {
        request: u64,
        sent: u64,
    },
}

#[derive(Debug)]
pub(crate) struct Attempt {
    hex: String,
    waiting: Waiting<Ms>,
    asking: Asking,
}

impl Attempt {
    fn owner(&self, for_ever: bool) -> String {
        owner_value(&self.hex, if for_ever { 0 } else { self.waiting.generation() })
    }
}

#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) owner: String,
    pub(crate) deadline: u64,
    /// When the question was sent that was answered with it, or the message about it came.
    asked: u64,
    caller: Caller,
    ends_at: u64,
    renew_at: u64,
    renewing: Option<Asked>,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Asked {
    request: u64,
    sent: u64,
    patience_until: u64,
}

#[derive(Debug)]
enum Job {
    Release { owner: String, keep_until: u64 },
    Leave { owner: String, hex: String, dead_for: u64 },
}

/// What has to be brought back, in this order.
#[derive(Debug)]
pub(crate) struct Freeing {
    jobs: VecDeque<Job>,
    asked: Option<Asked>,
    again_at: u64,
    until: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Transfer {
    from: String,
    to_hex: String,
    asked: Asked,
}

/// The lock, as this process sees it.
#[derive(Debug)]
pub(crate) enum Slot {
    Idle,
    Claiming(Attempt),
    Held(Hold),
    Transferring(Transfer),
    Freeing(Freeing),
}

#[derive(Debug)]
pub(crate) struct Process {
    index: usize,
    pub(crate) incarnation: u32,
    pub(crate) lives: bool,
    pub(crate) stopped_until: u64,
    /// It can't reach the server.
    pub(crate) cut_off_until: u64,
    /// Something unusual has happened to it, or is happening.
    pub(crate) disturbed_until: u64,
    pub(crate) ttl: u64,
    auto_renew: bool,
    pub(crate) connection: Option<usize>,
    pub(crate) subscription: Option<u64>,
    pub(crate) subscribing: Option<u64>,
    callers: VecDeque<Caller>,
    pub(crate) slot: Slot,
    /// The next attempt begins then at the earliest.
    again_at: u64,
    pub(crate) wakes_at: u64,
}

impl Process {
    pub(crate) fn new(index: usize, ttl: u64, auto_renew: bool) -> Self {
        Self {
            index,
            incarnation: 0,
            lives: true,
            stopped_until: 0,
            cut_off_until: 0,
            disturbed_until: 0,
            ttl,
            auto_renew,
            connection: None,
            subscription: None,
            subscribing: None,
            callers: VecDeque::new(),
            slot: Slot::Idle,
            again_at: 0,
            wakes_at: u64::MAX,
        }
    }

    /// Everything that it knew is gone. It comes back as somebody else.
    pub(crate) fn crash(&mut self) {
        let incarnation = self.incarnation + 1;
        *self = Self { incarnation, lives: false, ..Self::new(self.index, self.ttl, self.auto_renew) };
    }

    pub(crate) fn channel(&self) -> String {
        format!("wake:{}.{}", self.index, self.incarnation)
    }

    /// Nobody waits, nothing is held or under way.
    pub(crate) fn is_quiet(&self) -> bool {
        matches!(self.slot, Slot::Idle) && self.callers.is_empty()
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl)
    }

    /// How long a request of the releaser may take.
    fn patience(&self) -> u64 {
        self.ttl / 4
    }
}

/// What the claim and transfer scripts answer. `Err`: nothing that the client could go by.
fn read_reply(answer: &Resp, owner: &str) -> Result<Reply, ()> {
    let Resp::Array(all) = answer else { return Err(()) };
    let unsigned = |number: &i64| u64::try_from(*number).map_err(|_| ());
    match all.as_slice() {
        [Resp::Bulk(word), Resp::Int(token), Resp::Bulk(whose)] if word == "granted" && whose == owner => {
            Ok(Reply::Granted { token: unsigned(token)? })
        }
        [Resp::Bulk(word), Resp::Int(token), Resp::Bulk(whose), Resp::Int(left)]
            if word == "mine" && whose == owner =>
        {
            let left = Duration::from_millis(u64::try_from(*left).unwrap_or_default());
            Ok(Reply::Mine { token: unsigned(token)?, left })
        }
        [Resp::Bulk(word), Resp::Int(left)] if word == "busy" => {
            Ok(Reply::Busy { left: u64::try_from(*left).ok().map(Duration::from_millis) })
        }
        [Resp::Bulk(word)] if word == "gone" => Ok(Reply::Gone),
        _ => Err(()),
    }
}

/// When less than two thirds of what the server gave are left.
fn first_renewal(sent: u64, until: u64, ttl: u64) -> u64 {
    until - until.saturating_sub(sent).min(ttl) / 3 * 2
}

impl World<'_> {
    pub(crate) fn arrive(&mut self, process: usize) {
        let ttl = self.processes[process].ttl;
        let tries = self.random.chance(15);
        let gives_up_at = if self.has(Fault::Cancel) && self.random.chance(30) {
            self.now + self.random.skewed(8000)
        } else {
            u64::MAX
        };
        let job = if self.random.chance(85) {
            self.random.range(0, 1500)
        } else {
            self.random.range(0, ttl * 3 / 2)
        };
        let keep = if self.random.chance(20) { self.random.range(1, 4000) } else { 0 };
        self.processes[process].callers.push_back(Caller { tries, gives_up_at, job, keep });
    }

    /// Does what is due, and notes when to look again.
    pub(crate) fn tick(&mut self, process: usize) {
        // Each round changes the slot or sends something.
        for _ in 0..20 {
            if !self.step(process) {
                break;
            }
        }
        if let Some(at) = self.next_due(process) {
            self.wake_at(process, at);
        }
    }

    fn next_due(&self, process: usize) -> Option<u64> {
        let process = &self.processes[process];
        let gives_up = process.callers.iter().map(|caller| caller.gives_up_at).min().unwrap_or(u64::MAX);
        let due = match &process.slot {
            Slot::Idle if process.callers.is_empty() => u64::MAX,
            Slot::Idle => process.again_at,
            Slot::Claiming(attempt) => match attempt.asking {
                Asking::At(at) => at,
                Asking::Subscribing { .. } => u64::MAX,
                Asking::Asked { sent, .. } => sent + ANSWER_TIMEOUT,
            },
            Slot::Held(hold) => {
                let renewal = hold.renewing.map_or(hold.renew_at, |asked| asked.patience_until);
                hold.deadline.min(hold.ends_at).min(renewal)
            }
            Slot::Transferring(transfer) => transfer.asked.patience_until,
            Slot::Freeing(freeing) => freeing.asked.map_or(freeing.again_at, |asked| asked.patience_until),
        };
        Some(due.min(gives_up)).filter(|&due| due < u64::MAX)
    }

    /// One thing that is due. False: nothing is.
    fn step(&mut self, process: usize) -> bool {
        let now = self.now;
        if self.give_up(process) {
            return true;
        }
        match &mut self.processes[process].slot {
            Slot::Idle => {
                let Process { callers, again_at, .. } = &self.processes[process];
                if callers.is_empty() || *again_at > now {
                    return false;
                }
                self.begin_attempt(process);
                true
            }
            Slot::Claiming(attempt) => match attempt.asking {
                Asking::At(at) if at <= now => {
                    self.ask(process);
                    true
                }
                Asking::Asked { sent, .. } if sent + ANSWER_TIMEOUT <= now => {
                    self.drop_connection(process); // which also says that the question failed
                    true
                }
                _ => false,
            },
            Slot::Held(_) => self.tend_hold(process),
            Slot::Transferring(transfer) => {
                let over = transfer.asked.patience_until <= now;
                if over {
                    self.transfer_failed(process);
                }
                over
            }
            Slot::Freeing(_) => self.free(process),
        }
    }

    /// Callers whose time is up. The attempt belongs to the first.
    fn give_up(&mut self, process: usize) -> bool {
        let now = self.now;
        let callers = &self.processes[process].callers;
        let Some(place) = callers.iter().position(|caller| caller.gives_up_at <= now) else { return false };
        if place == 0 && matches!(self.processes[process].slot, Slot::Transferring(_)) {
            // It is about to get the lock, and will give it back.
            self.processes[process].callers[0].gives_up_at = u64::MAX;
            self.processes[process].callers[0].job = 0;
            return true;
        }
        self.processes[process].callers.remove(place);
        self.caller_done(process);
        if place == 0 && matches!(self.processes[process].slot, Slot::Claiming(_)) {
            self.note(|_| format!("p{process}: the caller gives up"));
            self.abandon(process);
        }
        true
    }

    fn hex(&mut self) -> String {
        format!("{:032x}", self.id())
    }

    fn begin_attempt(&mut self, process: usize) {
        let hex = self.hex();
        let waiting = Waiting::new(self.processes[process].ttl());
        self.processes[process].slot = Slot::Claiming(Attempt { hex, waiting, asking: Asking::At(self.now) });
    }

    fn attempt(&mut self, process: usize) -> Option<&mut Attempt> {
        match &mut self.processes[process].slot {
            Slot::Claiming(attempt) => Some(attempt),
            _ => None,
        }
    }

    fn ask(&mut self, process: usize) {
        let now = self.now;
        let tries = self.processes[process].callers[0].tries;
        let listens = self.processes[process].subscription.is_some();
        let Some(attempt) = self.attempt(process) else { return };
        attempt.waiting.asks(Ms(now));
        if tries || listens {
            self.ask_since(process, now);
            return;
        }
        // Whoever asks before it listens may miss the answer.
        attempt.asking = Asking::Subscribing { since: now };
        if self.processes[process].subscribing.is_none() {
            self.start_subscribing(process);
        }
    }

    fn ask_since(&mut self, process: usize, since: u64) {
        let (ttl, channel) = (self.processes[process].ttl(), self.processes[process].channel());
        let tries = self.processes[process].callers[0].tries;
        let again = self.breaks(Breakage::JoinsAgain);
        let Some(attempt) = self.attempt(process) else { return };
        let (owner, hex) = (attempt.owner(again), attempt.hex.clone());
        let how = match (tries, attempt.waiting.has_joined()) {
            (true, _) => "try",
            (false, false) => "join",
            (false, true) => "stay",
        };
        let mut args = vec![owner, millis(ttl).to_string(), how.to_owned()];
        if !tries {
            args.extend([millis(grace(ttl)).to_string(), channel]);
        }
        let request = self.send(process, Script::Claim, Some(&hex), args);
        if let Some(attempt) = self.attempt(process) {
            attempt.asking = Asking::Asked { request, sent: since };
        }
    }

    pub(crate) fn subscribed(&mut self, process: usize, id: u64, heard: bool) {
        if self.processes[process].subscribing != Some(id) {
            return;
        }
        self.processes[process].subscribing = None;
        if heard {
            self.processes[process].subscription = Some(id);
        }
        if let Some(Attempt { asking: Asking::Subscribing { since }, .. }) = self.attempt(process) {
            let since = *since;
            if heard {
                self.ask_since(process, since);
            } else {
                self.ride_out(process);
            }
        }
    }

    /// Messages may have been lost.
    pub(crate) fn wake_all(&mut self, process: usize) {
        let now = self.now;
        if let Some(Attempt { asking: Asking::At(at), .. }) = self.attempt(process) {
            *at = (*at).min(now);
        }
    }

    /// Everything under way on the connection has failed.
    pub(crate) fn unanswered(&mut self, process: usize) {
        let request = match &self.processes[process].slot {
            Slot::Claiming(Attempt { asking: Asking::Asked { request, .. }, .. }) => Some(*request),
            Slot::Idle | Slot::Claiming(_) => None,
            Slot::Held(hold) => hold.renewing.map(|asked| asked.request),
            Slot::Transferring(transfer) => Some(transfer.asked.request),
            Slot::Freeing(freeing) => freeing.asked.map(|asked| asked.request),
        };
        if let Some(request) = request {
            self.answered(process, request, None);
        }
    }

    /// An answer, or the news that there will be none. To a question that nobody asks any more it means nothing.
    pub(crate) fn answered(&mut self, process: usize, id: u64, answer: Option<&Resp>) {
        let said = if answer.is_some() { "answered" } else { "not answered" };
        self.note(|_| format!("p{process}: #{id} is {said}"));
        match &mut self.processes[process].slot {
            Slot::Claiming(Attempt { asking: Asking::Asked { request, sent }, .. }) if *request == id => {
                let sent = *sent;
                self.claim_answered(process, sent, answer);
            }
            Slot::Held(hold) if hold.renewing.is_some_and(|asked| asked.request == id) => {
                let sent = hold.renewing.take().map_or(0, |asked| asked.sent);
                self.renewal_answered(process, sent, answer);
            }
            Slot::Transferring(transfer) if transfer.asked.request == id => {
                self.transfer_answered(process, answer);
            }
            Slot::Freeing(freeing) if freeing.asked.is_some_and(|asked| asked.request == id) => {
                freeing.asked = None;
                if answer.is_some() {
                    freeing.jobs.pop_front();
                    freeing.until = None;
                    freeing.again_at = self.now;
                } else {
                    freeing.again_at = self.now + self.random.range(1, 200);
                }
            }
            _ => {}
        }
    }

    fn claim_answered(&mut self, process: usize, sent: u64, answer: Option<&Resp>) {
        let (now, tries) = (self.now, self.processes[process].callers[0].tries);
        let whole = self.breaks(Breakage::MineIsWhole);
        let again = self.breaks(Breakage::JoinsAgain);
        let Some(attempt) = self.attempt(process) else { return };
        let owner = attempt.owner(again);
        let Some(answer) = answer else {
            self.ride_out(process);
            return;
        };
        let Ok(reply) = read_reply(answer, &owner) else {
            self.abandon(process);
            return;
        };
        if tries && matches!(reply, Reply::Busy { .. }) {
            self.processes[process].callers.pop_front();
            self.processes[process].slot = Slot::Idle;
            self.caller_done(process);
            return;
        }
        match attempt.waiting.answered(Ms(sent), reply) {
            Step::Granted(mut granted) => {
                if matches!(reply, Reply::Mine { .. }) {
                    if whole {
                        granted.until = Ms(sent + self.processes[process].ttl);
                    }
                    self.stop_subscription(process); // it should have been in a message
                }
                self.take(process, owner, granted, sent);
            }
            Step::Wait(time) => attempt.asking = Asking::At(now + millis(time)),
            Step::StartOver => attempt.asking = Asking::At(now),
        }
    }

    /// A question has failed. Who is in the queue stays there for as long as the server takes it for alive.
    fn ride_out(&mut self, process: usize) {
        let now = self.now;
        let Some(attempt) = self.attempt(process) else { return };
        let pause = millis(attempt.waiting.interval()) / 4;
        if attempt.waiting.alive_until().is_some_and(|until| until > Ms(now)) {
            attempt.asking = Asking::At(now + pause);
        } else {
            self.abandon(process);
        }
    }

    /// Takes the attempt back. A caller who still waits gets another one then.
    fn abandon(&mut self, process: usize) {
        let (dead_for, again) = (self.dead_for(process), self.breaks(Breakage::JoinsAgain));
        let Some(attempt) = self.attempt(process) else { return };
        let dead_for = if attempt.waiting.has_joined() { 0 } else { dead_for };
        let (owner, hex) = (attempt.owner(again), attempt.hex.clone());
        self.begin_freeing(process, vec![Job::Leave { owner, hex, dead_for }]);
    }

    /// Takes back a grant that came too late, of whose waiting nothing is known any more.
    fn leave_blindly(&mut self, process: usize, hex: String) {
        let dead_for = self.dead_for(process);
        self.begin_freeing(process, vec![Job::Leave { owner: owner_value(&hex, 0), hex, dead_for }]);
    }

    fn dead_for(&self, process: usize) -> u64 {
        if self.breaks(Breakage::LeavesWithoutTombstone) {
            0
        } else {
            self.processes[process].ttl.max(DEAD_FOR)
        }
    }

    pub(crate) fn heard(&mut self, process: usize, message: &str) {
        let Some((owner, token)) = message.split_once(' ') else { return };
        let Some((hex, generation)) = owner.split_once('.') else { return };
        let token = token.parse().expect("a token");
        let generation = generation.parse().expect("a generation");
        let (now, breakage) = (self.now, self.breakage);
        let ttl = self.processes[process].ttl();
        let Some(attempt) = self.attempt(process) else { return };
        if attempt.hex != hex {
            return; // it is being abandoned, which gives back what it got
        }
        let again = breakage == Some(Breakage::JoinsAgain);
        let generation = if again { attempt.waiting.generation() } else { generation };
        let Some(mut granted) = attempt.waiting.handed(generation, token) else { return };
        granted.until = match (breakage, &attempt.asking) {
            (Some(Breakage::CountsFromArrival), _) => Ms(now) + grace(ttl),
            (Some(Breakage::CountsFromLastQuestion), Asking::Asked { sent, .. }) => Ms(*sent) + grace(ttl),
            _ => granted.until,
        };
        self.take(process, owner.to_owned(), granted, now);
    }

    /// The lock is ours, unless it is too late.
    fn take(&mut self, process: usize, owner: String, granted: Granted<Ms>, asked: u64) {
        let now = self.now;
        let Granted { token, until: Ms(until), to_be_confirmed } = granted;
        if until <= now {
            self.note(|_| format!("p{process}: too late, it ran out at {until}"));
            self.figures.count("too late");
            let hex = owner.split('.').next().unwrap_or_default().to_owned();
            self.leave_blindly(process, hex);
            return;
        }
        let drawn = self.judge.granted.get(&owner).map(|granted| granted.token);
        if drawn != i64::try_from(token).ok() {
            self.judge.find(Rule::Tokens, || format!("{owner} has token {token}; it was granted {drawn:?}"));
        }
        let (ttl, auto_renew) = (self.processes[process].ttl, self.processes[process].auto_renew);
        let Some(caller) = self.processes[process].callers.pop_front() else { return };
        let confirms = to_be_confirmed && !self.breaks(Breakage::NeverConfirms);
        let renew_at =
            if auto_renew || confirms { first_renewal(asked.min(now), until, ttl) } else { u64::MAX };
        self.note(|_| format!("p{process}: holds it until {until}, token {token}"));
        let ends_at = now + caller.job;
        let hold = Hold { owner, deadline: until, asked, caller, ends_at, renew_at, renewing: None };
        self.processes[process].slot = Slot::Held(hold);
    }

    fn tend_hold(&mut self, process: usize) -> bool {
        let now = self.now;
        let Process { ttl, .. } = self.processes[process];
        let Slot::Held(hold) = &mut self.processes[process].slot else { return false };
        if hold.deadline <= now {
            let owner = hold.owner.clone();
            self.lost(process);
            self.begin_freeing(process, vec![Job::Release { owner, keep_until: 0 }]);
            return true;
        }
        if hold.ends_at <= now {
            self.end_hold(process);
            return true;
        }
        if hold.renewing.is_some_and(|asked| asked.patience_until <= now) {
            let retry = self.random.range(ttl / 50, ttl / 8);
            if let Slot::Held(hold) = &mut self.processes[process].slot {
                hold.renewing = None;
                hold.renew_at = now + retry;
            }
            if self.random.chance(30) {
                self.drop_connection(process);
            }
            return true;
        }
        if hold.renewing.is_none() && hold.renew_at <= now {
            let args = vec![hold.owner.clone(), ttl.to_string()];
            let patience_until = now + ((hold.deadline - now).min(ttl) / 2).max(10);
            let request = self.send(process, Script::Renew, None, args);
            if let Slot::Held(hold) = &mut self.processes[process].slot {
                hold.renewing = Some(Asked { request, sent: now, patience_until });
            }
            return true;
        }
        false
    }

    fn renewal_answered(&mut self, process: usize, sent: u64, answer: Option<&Resp>) {
        let now = self.now;
        let Process { ttl, auto_renew, .. } = self.processes[process];
        let retry = self.random.range(ttl / 50, ttl / 8);
        let Slot::Held(hold) = &mut self.processes[process].slot else { return };
        match answer {
            None => hold.renew_at = now + retry,
            Some(Resp::Array(all)) if *all == [Resp::Int(1)] => {
                if self.judge.robbed.get(&hold.owner).is_some_and(|&at| at <= sent) {
                    self.judge.robbed.remove(&hold.owner); // it was told that it still has it
                }
                if hold.deadline > now {
                    hold.deadline = hold.deadline.max(sent + ttl);
                    hold.renew_at = if auto_renew { first_renewal(sent, sent + ttl, ttl) } else { u64::MAX };
                    let deadline = hold.deadline;
                    self.note(|_| format!("p{process}: renewed until {deadline}"));
                }
            }
            Some(_) => {
                self.lost(process);
                self.processes[process].slot = Slot::Idle;
            }
        }
    }

    /// Judges a loss, and lets the caller go.
    fn lost(&mut self, process: usize) {
        let now = self.now;
        let Process { ttl, auto_renew, disturbed_until, .. } = self.processes[process];
        let Slot::Held(hold) = &self.processes[process].slot else { return };
        let (owner, asked) = (hold.owner.clone(), hold.asked);
        self.note(|_| format!("p{process}: has lost it"));
        self.figures.count("lost");
        let granted_at = self.judge.granted.get(&owner).map_or(0, |granted| granted.at);
        // What is handed over counts from a question that was answered before.
        let undisturbed =
            disturbed_until + 3500 < granted_at.min(asked) && !self.judge.robbed.contains_key(&owner);
        // A few undisturbed trips.
        if undisturbed && (auto_renew || now + 400 < granted_at + ttl) {
            self.judge.find(Rule::Confirmation, || format!("{owner} has lost it, granted at {granted_at}"));
        }
        self.caller_done(process);
    }

    /// The job is done.
    fn end_hold(&mut self, process: usize) {
        let now = self.now;
        let Slot::Held(hold) = &self.processes[process].slot else { return };
        let (owner, keep) = (hold.owner.clone(), hold.caller.keep);
        self.note(|_| format!("p{process}: is done, keeps it for {keep}"));
        self.caller_done(process);
        let next_waits = self.processes[process].callers.front().is_some_and(|next| !next.tries);
        if keep > 0 || !next_waits || self.random.chance(30) {
            let keep_until = if keep > 0 { now + keep } else { 0 };
            self.begin_freeing(process, vec![Job::Release { owner, keep_until }]);
            return;
        }
        let (ttl, patience) = (self.processes[process].ttl, self.processes[process].patience());
        let to_hex = self.hex();
        let args = vec![owner.clone(), owner_value(&to_hex, 0), ttl.to_string()];
        let request = self.send(process, Script::Transfer, Some(&to_hex), args);
        let asked = Asked { request, sent: now, patience_until: now + patience };
        self.processes[process].slot = Slot::Transferring(Transfer { from: owner, to_hex, asked });
    }

    fn transfer_answered(&mut self, process: usize, answer: Option<&Resp>) {
        let ttl = self.processes[process].ttl();
        let Slot::Transferring(Transfer { from, to_hex, asked }) = &self.processes[process].slot else {
            return;
        };
        let (from, owner, sent) = (from.clone(), owner_value(to_hex, 0), asked.sent);
        let reply = answer.map(|answer| read_reply(answer, &owner));
        match reply {
            Some(Ok(reply @ Reply::Granted { .. })) => {
                let step = Waiting::new(ttl).answered(Ms(sent), reply);
                let Step::Granted(granted) = step else { unreachable!("{step:?} after a grant") };
                self.take(process, owner, granted, sent);
            }
            Some(Ok(_)) => self.begin_freeing(process, vec![Job::Release { owner: from, keep_until: 0 }]),
            Some(Err(())) | None => self.transfer_failed(process),
        }
    }

    /// Nobody knows which of the two has it.
    fn transfer_failed(&mut self, process: usize) {
        let Slot::Transferring(transfer) = &self.processes[process].slot else { return };
        let (hex, dead_for) = (transfer.to_hex.clone(), self.dead_for(process));
        let mut jobs = vec![
            Job::Release { owner: transfer.from.clone(), keep_until: 0 },
            Job::Leave { owner: owner_value(&hex, 0), hex, dead_for },
        ];
        if self.breaks(Breakage::LeavesBeforeRelease) {
            jobs.reverse();
        }
        self.begin_freeing(process, jobs);
        if self.random.chance(30) {
            self.drop_connection(process);
        }
    }

    fn begin_freeing(&mut self, process: usize, jobs: Vec<Job>) {
        let freeing = Freeing { jobs: jobs.into(), asked: None, again_at: self.now, until: None };
        self.processes[process].slot = Slot::Freeing(freeing);
    }

    /// Goes on bringing back.
    fn free(&mut self, process: usize) -> bool {
        let now = self.now;
        let (ttl, patience) = (self.processes[process].ttl, self.processes[process].patience());
        let pause = self.random.range(0, 100);
        let Slot::Freeing(freeing) = &mut self.processes[process].slot else { return false };
        if let Some(asked) = freeing.asked {
            if asked.patience_until > now {
                return false;
            }
            freeing.asked = None;
            freeing.again_at = now + pause;
            if self.random.chance(30) {
                self.drop_connection(process);
            }
            return true;
        }
        let Some(job) = freeing.jobs.front() else {
            self.processes[process].again_at = now + if self.random.chance(50) { 0 } else { pause };
            self.processes[process].slot = Slot::Idle;
            return true;
        };
        if freeing.until.is_some_and(|until| until <= now) {
            // By now the TTL has freed it.
            freeing.jobs.pop_front();
            freeing.until = None;
            freeing.again_at = now;
            return true;
        }
        if freeing.again_at > now {
            return false;
        }
        freeing.until.get_or_insert(now + ttl);
        let (script, dead, args) = match job {
            Job::Release { owner, keep_until } => {
                let keep = keep_until.saturating_sub(now);
                (Script::Release, None, vec![owner.clone(), keep.to_string()])
            }
            Job::Leave { owner, hex, dead_for } => {
                (Script::Leave, Some(hex.clone()), vec![owner.clone(), dead_for.to_string()])
            }
        };
        let request = self.send(process, script, dead.as_deref(), args);
        if let Slot::Freeing(freeing) = &mut self.processes[process].slot {
            freeing.asked = Some(Asked { request, sent: now, patience_until: now + patience });
        }
        true
    }
}

fn owner_value(hex: &str, generation: u32) -> String {
    format!("{hex}.{generation}")
}
