//! Judges what happens in the server and what the processes believe. It looks at the lock's value and expiry and at what
//! was asked and answered, and at none of the keys that the scripts use for themselves.

use std::collections::{HashMap, HashSet};

use crate::store::{Resp, Script};

/// What must hold. A test that breaks the protocol names which of them it expects to be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Rule {
    /// Never two holders.
    Exclusion,
    /// Tokens rise from grant to grant, and a holder's is the one that was drawn for its grant.
    Tokens,
    /// At once, and in order of arrival, as long as those who wait are heard of and listen; and none loses its place.
    Order,
    /// Nobody gets it by a hand-over who isn't there: not listening, or not heard of for its grace. What was handed over
    /// and isn't confirmed is free after the grace.
    Absent,
    /// Who has left, or had it before, never gets it.
    Zombie,
    /// When all are gone, so are the lock and the queue.
    Leftovers,
    /// Whoever waits gets it, once the faults are over.
    Starvation,
    /// Nobody loses it who renews, or sooner than the TTL.
    Confirmation,
    /// Only its owner frees it, gives it away, or makes it last longer.
    Theft,
    /// What is kept after a release is kept so long, and no longer.
    Kept,
    /// A script fails.
    Script,
}

#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) rule: Rule,
    pub(crate) what: String,
}

/// One that waits in the server's queue, by what the server answered.
struct Queued {
    owner: String,
    channel: String,
    heard: u64,
    grace: u64,
    /// It was silent or deaf at a time when the server may have seen that.
    absent: bool,
}

pub(crate) struct Granted {
    pub(crate) token: i64,
    pub(crate) at: u64,
}

/// A request that the server has carried out. Times are the model's, not the server's.
pub(crate) struct Seen<'a> {
    pub(crate) at: u64,
    pub(crate) script: Script,
    pub(crate) args: &'a [String],
    pub(crate) answer: &'a Resp,
    /// The lock's value and its expiry.
    pub(crate) before: Option<(String, u64)>,
    pub(crate) after: Option<(String, u64)>,
    /// The counter of tokens.
    pub(crate) fence: i64,
    pub(crate) listening: &'a [String],
}

#[derive(Default)]
pub(crate) struct Judge {
    /// Only these are looked for; all if empty.
    only: Vec<Rule>,
    pub(crate) violation: Option<Violation>,
    line: Vec<Queued>,
    pub(crate) granted: HashMap<String, Granted>,
    last_token: i64,
    left: HashSet<String>,
    /// Owners whose lock somebody deleted, and when: they can't know before their next renewal.
    pub(crate) robbed: HashMap<String, u64>,
    /// Released, but kept until then.
    kept: Option<(String, u64)>,
}

fn attempt(owner: &str) -> &str {
    owner.split(['.', ':']).next().unwrap_or(owner)
}

/// The word with which an answer begins, or its number.
pub(crate) fn word(answer: &Resp) -> String {
    match answer {
        Resp::Array(all) => all.first().map_or_else(String::new, word),
        Resp::Bulk(word) => word.clone(),
        Resp::Int(number) => number.to_string(),
        Resp::Nil | Resp::Status(_) => String::new(),
    }
}

fn ms(text: &str) -> u64 {
    text.parse().expect("the model sends times in ms")
}

impl Judge {
    pub(crate) fn new(only: &[Rule]) -> Self {
        Self { only: only.to_vec(), ..Self::default() }
    }

    pub(crate) fn find(&mut self, rule: Rule, what: impl FnOnce() -> String) {
        if self.violation.is_none() && (self.only.is_empty() || self.only.contains(&rule)) {
            self.violation = Some(Violation { rule, what: what() });
        }
    }

    /// Somebody deleted the lock without a word.
    pub(crate) fn deleted(&mut self, value: &str, at: u64) {
        self.robbed.insert(value.to_owned(), at);
        self.kept = None;
    }

    pub(crate) fn see(&mut self, seen: &Seen<'_>) {
        for queued in &mut self.line {
            if seen.at > queued.heard + queued.grace || !seen.listening.contains(&queued.channel) {
                queued.absent = true;
            }
        }
        self.look_at_kept(seen);
        let holder = seen.after.as_ref().map(|(value, _)| value.as_str());
        match &seen.before {
            Some((value, _)) if holder != Some(value) => self.look_at_end(seen, value),
            Some((value, expiry)) => {
                let now = seen.after.as_ref().map_or(0, |(_, expiry)| *expiry);
                let renewed = seen.script == Script::Renew
                    && seen.args[0] == *value
                    && now > *expiry
                    && now <= seen.at + ms(&seen.args[1]);
                if now != *expiry && !renewed {
                    self.find(Rule::Theft, || {
                        format!("{:?} moved the end of {value} from {expiry} to {now}", seen.script)
                    });
                }
            }
            None => {}
        }
        if seen.script == Script::Release
            && *seen.answer == Resp::Int(1)
            && ms(&seen.args[1]) > 0
            && self.kept.is_none()
        {
            self.kept = Some((attempt(&seen.args[0]).to_owned(), seen.at + ms(&seen.args[1])));
        }
        if let Some((owner, expiry)) = &seen.after
            && seen.before.as_ref().is_none_or(|(before, _)| before != owner)
            && !owner.ends_with(":kept")
        {
            self.look_at_grant(seen, owner, *expiry);
        }
        self.note(seen);
    }

    fn look_at_kept(&mut self, seen: &Seen<'_>) {
        let Some((hex, until)) = self.kept.clone() else { return };
        let after = seen.after.as_ref().filter(|(value, _)| attempt(value) == hex);
        if after.is_none() && seen.at <= until {
            self.find(Rule::Kept, || format!("{hex} was to be kept until {until}"));
        }
        if after.is_some_and(|(_, expiry)| *expiry > until) {
            self.find(Rule::Kept, || format!("{hex} was to be kept until {until} only"));
        }
        if after.is_none() {
            self.kept = None;
        }
    }

    /// The lock had this value, which hadn't run out, and hasn't any more.
    fn look_at_end(&mut self, seen: &Seen<'_>, value: &str) {
        let owner = &seen.args[0];
        let may = match seen.script {
            Script::Release | Script::Transfer => owner == value,
            Script::Leave => attempt(owner) == attempt(value) && !value.ends_with(":kept"),
            Script::Claim | Script::Renew => false,
        };
        if !may {
            self.find(Rule::Theft, || format!("{:?} of {owner} took it from {value}", seen.script));
        }
        if seen.after.is_none()
            && let Some(waits) = self.line.iter().find(|queued| !queued.absent && queued.owner != *owner)
        {
            let waits = waits.owner.clone();
            self.find(Rule::Order, || format!("{value} has freed it, and {waits} isn't told"));
        }
    }

    fn look_at_grant(&mut self, seen: &Seen<'_>, owner: &str, expiry: u64) {
        let last = std::mem::replace(&mut self.last_token, seen.fence);
        if seen.fence <= last {
            self.find(Rule::Tokens, || format!("{owner} has token {}, the one before {last}", seen.fence));
        }
        if self.left.contains(attempt(owner)) {
            self.find(Rule::Zombie, || format!("{owner} had left"));
        }
        let granted = Granted { token: seen.fence, at: seen.at };
        if self.granted.insert(owner.to_owned(), granted).is_some() {
            self.find(Rule::Zombie, || format!("{owner} has it for the second time"));
        }
        if seen.script == Script::Transfer {
            return; // to one who stands in no queue: how often that may be is up to the engine
        }
        let place = self.line.iter().position(|queued| queued.owner == owner).unwrap_or(self.line.len());
        if let Some(passed_over) = self.line[..place].iter().find(|queued| !queued.absent) {
            let passed_over = passed_over.owner.clone();
            self.find(Rule::Order, || format!("{owner} has it, and {passed_over} came before"));
        }
        if seen.args[0] == owner {
            return; // it asked itself
        }
        let Some(queued) = self.line.get(place) else {
            self.find(Rule::Absent, || format!("{owner} was handed it and isn't in the queue"));
            return;
        };
        let (heard, grace) = (queued.heard, queued.grace);
        if seen.at > heard + grace || !seen.listening.contains(&queued.channel) {
            self.find(Rule::Absent, || format!("{owner} was handed it, last heard of at {heard}, or deaf"));
        }
        if expiry > seen.at + grace {
            self.find(Rule::Absent, || {
                format!("{owner} was handed it until {expiry}, for more than its grace")
            });
        }
    }

    /// What the server said about who waits.
    fn note(&mut self, seen: &Seen<'_>) {
        let owner = &seen.args[0];
        let place = self.line.iter().position(|queued| queued.owner == *owner);
        match (seen.script, &*word(seen.answer)) {
            (Script::Claim, "busy") if seen.args[2] != "try" => match place {
                Some(place) => self.line[place].heard = seen.at,
                None => self.line.push(Queued {
                    owner: owner.clone(),
                    channel: seen.args[4].clone(),
                    heard: seen.at,
                    grace: ms(&seen.args[3]),
                    absent: false,
                }),
            },
            (Script::Claim, "gone") => {
                if let Some(place) = place
                    && !self.line.remove(place).absent
                {
                    self.find(Rule::Order, || format!("{owner} has lost its place"));
                }
            }
            (Script::Leave, _) => {
                if seen
                    .after
                    .as_ref()
                    .is_some_and(|(value, _)| attempt(value) == attempt(owner) && !value.ends_with(":kept"))
                {
                    self.find(Rule::Zombie, || format!("{owner} has left, and has it still"));
                }
                self.left.insert(attempt(owner).to_owned());
                self.line.retain(|queued| queued.owner != *owner);
            }
            _ => {}
        }
        if let Some((holder, _)) = &seen.after {
            self.line.retain(|queued| queued.owner != *holder);
        }
    }
}
