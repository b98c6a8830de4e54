//! Nodes, attempts, and what is under way between them. A request that is under way may arrive at any time or never,
//! and so may an answer: that covers the late and the lost ones.

use std::time::Duration;

use crate::ballot::{Agreement, Ballot, Verdict};
use crate::node::{NOBODY, Node, Stand, Vote};
use crate::rules::Rules;
use crate::standing::{Standing, Waits, admission};

const LONGEST_TTL: Duration = Duration::from_secs(60);

/// One attempt's talk with one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Talk {
    /// The claim is under way.
    asked: bool,
    /// Its answer is under way.
    answer: Option<Vote>,
    counted: Option<Counted>,
    raise: Raise,
    release: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Raise {
    #[default]
    None,
    /// Under way.
    Sent,
    /// A yes is under way.
    Raised,
    Counted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Counted {
    Vote(Vote),
    Failure,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Column<const A: usize> {
    node: Node,
    talks: [Talk; A],
    /// The attempts that were going on when it last lost what it knew.
    forgot: u8,
    /// Number and floor of an admission that is under way.
    admission: Option<(u8, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Ahead,
    Voting,
    Raising,
    Held,
    /// Given up, released or past its validity: neither is it granted any more, nor does it hold. Locks of an attempt
    /// last longer on the nodes than its validity, so that none runs out before this.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// The attempt begins, with this proposal.
    Start(u8, u64),
    /// The attempt's claim arrives at the node.
    Claim(u8, u8),
    /// The node's answer arrives.
    Count(u8, u8),
    /// The node isn't waited for any more.
    Fail(u8, u8),
    /// The attempt ends: it gives up, or releases, or its validity does.
    End(u8),
    Raise(u8, u8),
    CountRaise(u8, u8),
    Release(u8, u8),
    /// The lock on the node runs out.
    Expire(u8),
    /// The node is restarted, and has lost its locks only.
    Restart(u8),
    /// The node loses all it knows.
    Wipe(u8),
    /// All nodes of this mask say where they stand, at a time when whatever this node forgot has run out; nobody's need
    /// have, if it is `NOBODY`.
    Look(u8, u8),
    Admit(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    TwoHolders,
    TokenRepeated,
    TokenNotHigher,
    /// All have answered, and no verdict; or one that the answers don't bear out.
    Undecided,
    /// Nothing is under way, and still nobody could get it.
    Stuck,
}

/// How much happens.
#[allow(clippy::struct_excessive_bools, reason = "switches, each on its own")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Attempts of each client, one after the other.
    pub(crate) rounds: u8,
    pub(crate) proposals: &'static [u64],
    /// Refusals are heard, nodes may be given up one by one, and releases are requests like others. It isn't needed to
    /// find what can go wrong: refusals and failures only end an attempt, which it may do at any time anyway, and a
    /// release does what the end of a TTL does, which may come at any time after an attempt's end.
    pub(crate) thorough: bool,
    pub(crate) wipes: u8,
    pub(crate) restarts: bool,
    /// Nothing is lost while a node has no vote.
    pub(crate) only_when_settled: bool,
    /// Looks may miss nodes.
    pub(crate) deaf_looks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World<const N: usize, const A: usize> {
    columns: [Column<A>; N],
    attempts: [Attempt; A],
    /// The highest token granted.
    last: u64,
    wiped: u8,
    /// Servers' clocks may jump: a lock may run out while its owner still relies on it. Two may hold then, and what is
    /// left is that no token repeats, and that one whose first vote came after a grant has a higher one.
    clocks_jump: bool,
    /// Where clocks jump: a bit for each token granted.
    tokens: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Attempt {
    phase: Phase,
    /// Of its claims, and of its raises: zero once none is under way any more.
    proposal: u64,
    token: u64,
    /// Where clocks jump: the highest token that had been granted before its first vote.
    above: Option<u64>,
}

fn narrow(number: usize) -> u8 {
    u8::try_from(number).expect("few nodes and attempts")
}

impl<const N: usize, const A: usize> World<N, A> {
    /// All nodes have a vote and nothing has happened yet.
    pub(crate) fn new() -> Self {
        let node = Node { run: Some(0), ..Node::default() };
        let column = Column { node, talks: [Talk::default(); A], forgot: 0, admission: None };
        Self {
            columns: [column; N],
            attempts: [Attempt { phase: Phase::Ahead, proposal: 0, token: 0, above: None }; A],
            last: 0,
            wiped: 0,
            clocks_jump: false,
            tokens: 0,
        }
    }

    /// No node has ever had a vote.
    pub(crate) fn bare() -> Self {
        let mut world = Self::new();
        for column in &mut world.columns {
            column.node.run = None;
        }
        world
    }

    /// Votes that came to nothing have left the counters apart.
    pub(crate) fn drifted() -> Self {
        let mut world = Self::new();
        for (n, column) in world.columns.iter_mut().enumerate() {
            (column.node.counter, column.node.high) = (2 * n as u64, 2 * n as u64);
        }
        world
    }

    pub(crate) fn with_clocks_that_jump(self) -> Self {
        Self { clocks_jump: true, ..self }
    }

    /// The same whichever node is which.
    pub(crate) fn sorted(&self) -> Self {
        let mut sorted = *self;
        sorted.columns.sort_unstable();
        sorted
    }

    pub(crate) fn holders(&self) -> usize {
        self.attempts.iter().filter(|attempt| attempt.phase == Phase::Held).count()
    }

    /// The highest token granted.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    pub(crate) fn actions(&self, bounds: &Bounds, rules: &Rules, out: &mut Vec<Action>) {
        for (a, attempt) in self.attempts.iter().enumerate() {
            let id = narrow(a);
            match attempt.phase {
                Phase::Ahead => {
                    let first = id.is_multiple_of(bounds.rounds);
                    if first || self.attempts[a - 1].phase == Phase::Over {
                        // Its claims may be late anyway: whether it comes before what else may happen makes a
                        // difference only if that is a loss.
                        if bounds.wipes == 0 && !bounds.thorough {
                            out.clear();
                        }
                        out.extend(bounds.proposals.iter().map(|&proposal| Action::Start(id, proposal)));
                        if bounds.wipes == 0 && !bounds.thorough {
                            return;
                        }
                    }
                }
                Phase::Over => {}
                _ => out.push(Action::End(id)),
            }
        }
        for (n, column) in self.columns.iter().enumerate() {
            self.node_actions(narrow(n), column, bounds, rules, out);
        }
    }

    fn node_actions(&self, n: u8, column: &Column<A>, bounds: &Bounds, rules: &Rules, out: &mut Vec<Action>) {
        let node = &column.node;
        let votes = node.is_member(node.server) || rules.outsiders_vote;
        for (a, talk) in column.talks.iter().enumerate() {
            let (id, phase) = (narrow(a), self.attempts[a].phase);
            if talk.asked && ((votes && node.owner.is_none()) || (bounds.thorough && phase == Phase::Voting))
            {
                out.push(Action::Claim(id, n));
            }
            if talk.answer.is_some() && (phase == Phase::Voting || self.counts_late(a, rules)) {
                out.push(Action::Count(id, n));
            }
            if bounds.thorough && phase == Phase::Voting && talk.counted.is_none() {
                out.push(Action::Fail(id, n));
            }
            if talk.raise == Raise::Sent {
                out.push(Action::Raise(id, n));
            }
            if talk.raise == Raise::Raised && phase == Phase::Raising {
                out.push(Action::CountRaise(id, n));
            }
            let held = node.owner == Some(id) && bounds.thorough;
            let taken = node.owner.is_some() && rules.release_without_owner_check;
            if talk.release && (held || taken) {
                out.push(Action::Release(id, n));
            }
        }
        if node.owner.is_some() {
            out.push(Action::Expire(n));
        }
        let settled = || self.columns.iter().all(|column| column.node.is_member(column.node.server));
        if self.wiped < bounds.wipes && (!bounds.only_when_settled || settled()) {
            out.push(Action::Wipe(n));
            if bounds.restarts {
                out.push(Action::Restart(n));
            }
        }
        if column.admission.is_some() && !node.is_member(node.server) {
            out.push(Action::Admit(n));
        }
        if !node.is_member(node.server) {
            let all = u8::MAX >> (8 - N);
            out.extend([Action::Look(n, all), Action::Look(NOBODY, all)]);
            if bounds.deaf_looks {
                out.extend(
                    (0..N)
                        .filter(|&other| other != usize::from(n))
                        .map(|other| Action::Look(n, all & !(1 << other))),
                );
            }
        }
    }

    fn counts_late(&self, a: usize, rules: &Rules) -> bool {
        rules.late_votes_count
            && self.attempts[a].phase == Phase::Over
            && self.attempts.get(a + 1).is_some_and(|next| next.phase == Phase::Voting)
    }

    pub(crate) fn apply(&mut self, action: Action, rules: &Rules) -> Result<(), Violation> {
        match action {
            Action::Start(a, proposal) => {
                self.attempts[usize::from(a)] =
                    Attempt { phase: Phase::Voting, proposal, token: 0, above: None };
                for column in &mut self.columns {
                    column.talks[usize::from(a)].asked = true;
                }
            }
            Action::Claim(a, n) => {
                let (proposal, column) =
                    (self.attempts[usize::from(a)].proposal, &mut self.columns[usize::from(n)]);
                let talk = &mut column.talks[usize::from(a)];
                talk.asked = false;
                let vote = column.node.claim(column.node.server, a, None, proposal, rules);
                talk.answer = Some(vote);
                if self.clocks_jump && matches!(vote, Vote::Granted(_)) {
                    self.attempts[usize::from(a)].above.get_or_insert(self.last);
                }
            }
            Action::Count(a, n) => {
                let talk = &mut self.columns[usize::from(n)].talks[usize::from(a)];
                let vote = talk.answer.take().expect("an answer is under way");
                let mut to = usize::from(a);
                if self.attempts[to].phase == Phase::Over {
                    to += 1; // only where late votes count
                    if !matches!(vote, Vote::Granted(_)) {
                        return Ok(());
                    }
                }
                self.columns[usize::from(n)].talks[to].counted = Some(Counted::Vote(vote));
                self.decide(to, rules)?;
            }
            Action::Fail(a, n) => {
                self.columns[usize::from(n)].talks[usize::from(a)].counted = Some(Counted::Failure);
                self.decide(usize::from(a), rules)?;
            }
            Action::End(a) => self.end(usize::from(a)),
            Action::Raise(a, n) => {
                let token = self.attempts[usize::from(a)].token;
                let column = &mut self.columns[usize::from(n)];
                let talk = &mut column.talks[usize::from(a)];
                let raised = column.node.raise(column.node.server, a, token, rules);
                talk.raise = if raised { Raise::Raised } else { Raise::None };
            }
            Action::CountRaise(a, n) => {
                self.columns[usize::from(n)].talks[usize::from(a)].raise = Raise::Counted;
                self.agree(usize::from(a), rules)?;
            }
            Action::Release(a, n) => {
                let column = &mut self.columns[usize::from(n)];
                column.talks[usize::from(a)].release = false;
                column.node.release(a, rules);
            }
            Action::Expire(n) => {
                let owner = self.columns[usize::from(n)].node.owner.take().expect("it is held");
                if !self.clocks_jump {
                    self.end(usize::from(owner));
                }
            }
            Action::Restart(n) | Action::Wipe(n) => self.lose(n, matches!(action, Action::Wipe(_))),
            Action::Look(n, heard) => self.look(n, heard, rules),
            Action::Admit(n) => {
                if rules.stale_highs {
                    self.run_out(n);
                }
                let column = &mut self.columns[usize::from(n)];
                // It stays: somebody else may have come to the same.
                let (number, floor) = column.admission.expect("an admission is under way");
                column.node.admit(column.node.server, number, floor, rules);
            }
        }
        self.tidy(rules);
        Ok(())
    }

    /// What the client makes of the answers so far.
    fn decide(&mut self, a: usize, rules: &Rules) -> Result<(), Violation> {
        let answers = || self.columns.iter().map(|column| column.talks[a].counted);
        let mut ballot = Ballot::new(N);
        for (n, counted) in answers().enumerate() {
            match counted {
                Some(Counted::Vote(Vote::Granted(counter))) => ballot.grants(n, counter),
                Some(Counted::Vote(Vote::Busy(holder))) => ballot.refuses(n, holder),
                Some(Counted::Vote(Vote::Outside) | Counted::Failure) => ballot.fails(),
                None => {}
            }
        }
        let granted = ballot.granted();
        let verdict =
            if rules.quorum_too_small && granted >= N / 2 { Some(Verdict::Won) } else { ballot.verdict() };
        match verdict {
            Some(Verdict::Won) => self.agree(a, rules),
            None if answers().all(|counted| counted.is_some()) => Err(Violation::Undecided),
            None => Ok(()),
            Some(lost) => {
                let most = (0..A)
                    .map(|holder| Some(Counted::Vote(Vote::Busy(narrow(holder)))))
                    .map(|busy| answers().filter(|&counted| counted == busy).count())
                    .max();
                if (lost == Verdict::Busy) != most.is_some_and(|most| 2 * most > N) {
                    return Err(Violation::Undecided);
                }
                self.end(a);
                Ok(())
            }
        }
    }

    /// A majority has granted it: is there a token by now?
    fn agree(&mut self, a: usize, rules: &Rules) -> Result<(), Violation> {
        let mut ballot: Ballot<u8> = Ballot::new(N);
        let (mut highest, token) = (0, self.attempts[a].token);
        for (n, column) in self.columns.iter().enumerate() {
            let talk = &column.talks[a];
            if let Some(Counted::Vote(Vote::Granted(counter))) = talk.counted {
                ballot.grants(n, counter);
                highest = highest.max(counter);
            } else if talk.raise == Raise::Counted && rules.raise_everywhere {
                ballot.grants(n, token);
            }
        }
        for (n, column) in self.columns.iter().enumerate() {
            if column.talks[a].raise == Raise::Counted {
                ballot.raises(n, token);
            }
        }
        let agreement = ballot.agreement();
        let phase = self.attempts[a].phase;
        match agreement {
            _ if rules.one_phase || rules.quorum_too_small => self.grant(a, highest),
            Agreement::Token(token) => self.grant(a, token),
            Agreement::Raise { token, nodes } => {
                if phase == Phase::Voting {
                    self.attempts[a].phase = Phase::Raising;
                    self.attempts[a].token = token;
                    let all = rules.raise_everywhere;
                    for (n, column) in self.columns.iter_mut().enumerate() {
                        if all || nodes.contains(&n) {
                            column.talks[a].raise = Raise::Sent;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn grant(&mut self, a: usize, token: u64) -> Result<(), Violation> {
        self.attempts[a].phase = Phase::Held;
        if self.clocks_jump {
            if self.tokens >> token & 1 == 1 {
                return Err(Violation::TokenRepeated);
            }
            self.tokens |= 1 << token;
            self.last = self.last.max(token);
            let above = self.attempts[a].above.unwrap_or(0);
            return if token > above { Ok(()) } else { Err(Violation::TokenNotHigher) };
        }
        if self.holders() > 1 {
            return Err(Violation::TwoHolders);
        }
        if token == self.last {
            return Err(Violation::TokenRepeated);
        }
        if token < self.last {
            return Err(Violation::TokenNotHigher);
        }
        self.last = token;
        Ok(())
    }

    /// Everything is taken back, on all nodes.
    fn end(&mut self, a: usize) {
        if self.attempts[a].phase != Phase::Over {
            self.attempts[a].phase = Phase::Over;
            for column in &mut self.columns {
                column.talks[a].release = true;
            }
        }
    }

    fn lose(&mut self, n: u8, all: bool) {
        self.wiped += 1;
        let going_on = self.going_on();
        let column = &mut self.columns[usize::from(n)];
        column.forgot |= going_on;
        let node = &mut column.node;
        if all {
            *node = Node { server: node.server, ..Node::default() };
        } else {
            node.owner = None;
            node.server += 1;
        }
    }

    fn going_on(&self) -> u8 {
        let mut mask = 0;
        for (a, attempt) in self.attempts.iter().enumerate() {
            if !matches!(attempt.phase, Phase::Ahead | Phase::Over) {
                mask |= 1 << a;
            }
        }
        mask
    }

    /// The quarantine of the node is over: every attempt from before is past its validity.
    fn run_out(&mut self, n: u8) {
        let forgot = self.columns[usize::from(n)].forgot;
        for a in 0..A {
            if forgot >> a & 1 == 1 {
                self.end(a);
            }
        }
        self.columns[usize::from(n)].forgot = 0;
    }

    /// As `membership.rs` does it, with the real decision.
    fn look(&mut self, n: u8, heard: u8, rules: &Rules) {
        if n != NOBODY && !rules.no_quarantine && !rules.stale_highs {
            self.run_out(n);
        }
        let number = self.wiped + 1; // nobody else has used it, unless it was in the same wait
        let seen = self.columns.iter().map(|column| column.node.high.max(column.node.floor)).max();
        let beyond = seen.unwrap_or(0).max(self.last) + 1;
        let going_on = self.going_on();
        let mut standings = Vec::with_capacity(N);
        for (other, column) in self.columns.iter_mut().enumerate() {
            if heard >> other & 1 == 0 {
                standings.push(None);
                continue;
            }
            let over = other == usize::from(n) || column.forgot & going_on == 0;
            let (waits, high) = match column.node.enlist(column.node.server, number, rules) {
                Stand::Member { high } => (None, high),
                Stand::Outside { number, new, high } => {
                    let since = if over { 2 * LONGEST_TTL } else { Duration::ZERO };
                    (Some(Waits { number: number.to_string(), since, new }), high)
                }
            };
            standings.push(Some(Standing { waits, high, longest: LONGEST_TTL }));
        }
        let admission = admission(&standings, LONGEST_TTL);
        // By assumption the margin is larger than what clocks differ.
        let floor = if admission.margin.is_zero() { admission.floor } else { beyond };
        for other in admission.nodes {
            let Some(Some(Standing { waits: Some(waits), .. })) = standings.get(other) else { continue };
            let number = waits.number.parse().expect("it was a number");
            self.columns[other].admission = Some((number, if rules.no_floor { 0 } else { floor }));
        }
    }

    /// Drops what can't matter any more, so that states that differ in nothing else are one.
    fn tidy(&mut self, rules: &Rules) {
        let going_on = self.going_on();
        for column in &mut self.columns {
            column.forgot &= going_on;
            let waits = column.admission.map(|(number, _)| (column.node.server, number));
            if column.node.waits != waits && !rules.admit_without_number {
                column.admission = None; // it would be refused
            }
        }
        for a in 0..A {
            let phase = self.attempts[a].phase;
            if phase == Phase::Ahead || phase == Phase::Voting {
                continue;
            }
            let keep_answers = rules.late_votes_count;
            for column in &mut self.columns {
                let owned = column.node.owner == Some(narrow(a));
                let talk = &mut column.talks[a];
                if !keep_answers {
                    talk.answer = None;
                }
                if phase != Phase::Raising {
                    talk.counted = None;
                    let can_own = owned || talk.asked;
                    let strict = !rules.raise_without_owner_check;
                    if talk.raise != Raise::Sent || (strict && !can_own) {
                        talk.raise = Raise::None;
                    }
                    talk.release &= can_own || rules.release_without_owner_check;
                }
            }
            let talks = || self.columns.iter().map(|column| &column.talks[a]);
            if !talks().any(|talk| talk.asked) {
                self.attempts[a].proposal = 0;
            }
            if matches!(phase, Phase::Held | Phase::Over) {
                self.attempts[a].above = None;
            }
            if phase != Phase::Raising && !talks().any(|talk| talk.raise == Raise::Sent) {
                self.attempts[a].token = 0;
            }
        }
    }

    /// Once all attempts are over, and what was under way is lost: can somebody get it when the locks that were left
    /// behind have run out?
    pub(crate) fn check_rest(&self, rules: &Rules) -> Result<(), Violation> {
        if self.going_on() != 0 {
            return Ok(());
        }
        let mut world = *self;
        for n in 0..narrow(N) {
            let node = world.columns[usize::from(n)].node;
            if !node.is_member(node.server) {
                world.look(n, u8::MAX, rules);
            }
        }
        let mut ballot: Ballot<u8> = Ballot::new(N);
        for (n, column) in world.columns.iter_mut().enumerate() {
            let node = &mut column.node;
            if let Some((number, floor)) = column.admission {
                node.admit(node.server, number, floor, rules);
            }
            node.owner = None;
            match node.claim(node.server, NOBODY, None, 0, rules) {
                Vote::Granted(counter) => ballot.grants(n, counter),
                Vote::Busy(_) | Vote::Outside => ballot.fails(),
            }
        }
        if ballot.granted() < N || ballot.verdict() != Some(Verdict::Won) {
            return Err(Violation::Stuck);
        }
        if let Agreement::Raise { token, nodes } = ballot.agreement() {
            for n in nodes {
                let node = &mut world.columns[n].node;
                if node.raise(node.server, NOBODY, token, rules) {
                    ballot.raises(n, token);
                }
            }
        }
        match ballot.agreement() {
            Agreement::Token(token) if token > self.last => Ok(()),
            Agreement::Token(_) => Err(Violation::TokenNotHigher),
            Agreement::Raise { .. } => Err(Violation::Stuck),
        }
    }
}
