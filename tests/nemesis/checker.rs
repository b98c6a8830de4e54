//! [`judge`]: whether a history keeps what locks promise. It knows nothing but the events, which may be of a run under
//! way.
//!
//! - **Exclusion.** Let A and B be grants of a name, and A's token the lower one, so that it was drawn first. If B was
//!   got before the last moment at which A was believed to be held, B was drawn while A was held. That is a violation,
//!   also if B was held only before A's reply arrived. It is excused by a fault that may have freed A: it began before
//!   B was got, A's process had asked for the name before it ended, and A's belief ended within the TTL. For no renewal
//!   of A's can have succeeded after the fault, nor after B was drawn.
//! - **Tokens** are distinct, whatever happens, and rise where one grant was got before the other was asked for. That
//!   is excused if the other may have been freed, as above, before it was handed to the caller: it may have been drawn
//!   for an earlier call of the process, which has given up since.
//! - **Counter.** Each accepted write adds one to what is there.
//! - **Loss is final.** A guard that was lost isn't held again, and can't be released.
//! - **Errors** are only those that say that the server can't be reached now, or that the lock was lost.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::history::{Effect, Event, Fault, Id, Step, What};

/// What is promised, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) ttl: u64,
    /// How much later than promised a loss may be noticed.
    pub(crate) slack: u64,
    /// Whether a grant ends by the holder's clock. Otherwise the time for which its process is frozen doesn't count.
    pub(crate) deadline: bool,
}

/// Which promise is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Broken {
    Exclusion,
    Tokens,
    Counter,
    Finality,
    Errors,
    Service,
}

#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) broken: Broken,
    pub(crate) says: String,
    /// The calls that it is about, whose events matter.
    pub(crate) of: Vec<Id>,
}

#[derive(Clone, Copy, Debug)]
struct Grant<'a> {
    id: Id,
    name: &'a str,
    /// When its process asked for this name for the first time.
    since: u64,
    asked: u64,
    got: u64,
    token: u64,
    /// When it was believed to be held for the last time.
    last_held: Option<u64>,
}

#[derive(Debug)]
struct Period<'a> {
    fault: &'a Fault,
    begin: u64,
    end: u64,
    effect: Effect,
}

/// All violations that are certain by now.
pub(crate) fn judge(events: &[Event], rules: &Rules) -> Vec<Violation> {
    let grants = grants(events);
    let periods = periods(events);
    let mut found = Vec::new();
    for grants in grants.values() {
        tokens(grants, &periods, rules, &mut found);
        exclusion(grants, &periods, rules, &mut found);
    }
    counter(events, &mut found);
    finality(events, &mut found);
    errors(events, &mut found);
    found
}

/// The grants of each name in the order in which they were got.
fn grants(events: &[Event]) -> BTreeMap<&str, Vec<Grant<'_>>> {
    let (mut asked, mut first) = (HashMap::new(), HashMap::new());
    let mut got: HashMap<Id, Grant<'_>> = HashMap::new();
    for event in events {
        let What::Of(id, step) = &event.what else { continue };
        match step {
            Step::Asked { name, .. } => {
                asked.insert(*id, (name.as_str(), event.at));
                first.entry((id.slot, id.life, name.as_str())).or_insert(event.at);
            }
            Step::Got { token } => {
                // A worker says first that it asks.
                let Some(&(name, asked)) = asked.get(id) else { continue };
                let since = first.get(&(id.slot, id.life, name)).copied().unwrap_or(asked);
                let grant =
                    Grant { id: *id, name, since, asked, got: event.at, token: *token, last_held: None };
                got.insert(*id, grant);
            }
            Step::Held => {
                if let Some(grant) = got.get_mut(id) {
                    grant.last_held = grant.last_held.max(Some(event.at));
                }
            }
            _ => {}
        }
    }
    let mut by_name: BTreeMap<&str, Vec<Grant<'_>>> = BTreeMap::new();
    for grant in got.into_values() {
        by_name.entry(grant.name).or_default().push(grant);
    }
    for grants in by_name.values_mut() {
        grants.sort_by_key(|grant| (grant.got, grant.id));
    }
    by_name
}

/// The faults, of which those without an end last.
fn periods(events: &[Event]) -> Vec<Period<'_>> {
    let mut ends = HashMap::new();
    for event in events {
        if let What::Ended { number, effect } = event.what {
            ends.insert(number, (event.at, effect));
        }
    }
    let mut periods = Vec::new();
    for event in events {
        let What::Began(fault) = &event.what else { continue };
        let (end, effect) = ends.get(&fault.number).copied().unwrap_or((u64::MAX, fault.effect));
        periods.push(Period { fault, begin: event.at, end, effect });
    }
    periods
}

fn tokens(by_got: &[Grant<'_>], periods: &[Period<'_>], rules: &Rules, found: &mut Vec<Violation>) {
    let mut seen: HashMap<u64, Id> = HashMap::new();
    for grant in by_got {
        if let Some(other) = seen.insert(grant.token, grant.id) {
            let says = format!("{} and {} of {} have the same token", other, grant.id, grant.name);
            found.push(Violation { broken: Broken::Tokens, says, of: vec![other, grant.id] });
        }
    }
    let mut by_asked = by_got.to_vec();
    by_asked.sort_by_key(|grant| grant.asked);
    let (mut earlier, mut highest) = (0, 0);
    for later in &by_asked {
        while let Some(before) = by_got.get(earlier).filter(|before| before.got < later.asked) {
            highest = before.token.max(highest);
            earlier += 1;
        }
        if highest <= later.token {
            continue;
        }
        let until = later.last_held.unwrap_or(later.got);
        let higher = by_got[..earlier].iter().filter(|before| before.token > later.token);
        let mut not_excused = higher.filter(|before| !is_excused(later, until, before, periods, rules));
        if let Some(before) = not_excused.next() {
            let says = format!(
                "{} of {} was got before {} was asked for, which has a lower token",
                before.id, later.name, later.id
            );
            found.push(Violation { broken: Broken::Tokens, says, of: vec![before.id, later.id] });
        }
    }
}

fn exclusion(by_got: &[Grant<'_>], periods: &[Period<'_>], rules: &Rules, found: &mut Vec<Violation>) {
    for held in by_got {
        let Some(last_held) = held.last_held else { continue };
        // What was got before it was asked for is the rule of tokens' affair.
        let from = by_got.partition_point(|other| other.got < held.asked);
        for other in by_got[from..].iter().take_while(|other| other.got <= last_held) {
            if other.token <= held.token {
                continue;
            }
            if !is_excused(held, last_held, other, periods, rules) {
                let says = format!(
                    "{} of {} was still held {} us after {} had been got, which has a higher token",
                    held.id,
                    held.name,
                    last_held - other.got,
                    other.id
                );
                found.push(Violation { broken: Broken::Exclusion, says, of: vec![held.id, other.id] });
            }
        }
    }
}

/// Whether a fault may have freed the lock that `held` had, so that `other` could get it.
fn is_excused(
    held: &Grant<'_>,
    last_held: u64,
    other: &Grant<'_>,
    periods: &[Period<'_>],
    rules: &Rules,
) -> bool {
    periods.iter().any(|period| {
        let concerns = period.effect == Effect::Frees
            && period.fault.slot.is_none_or(|slot| slot == held.id.slot)
            && period.fault.name.as_ref().is_none_or(|name| name == held.name);
        if !concerns || period.begin > other.got || period.end < held.since {
            return false;
        }
        let frozen = if rules.deadline { 0 } else { frozen(periods, held.id.slot, period.begin, last_held) };
        let freed_by = period.end.min(other.got);
        last_held <= freed_by + rules.ttl + rules.slack + frozen
    })
}

/// For how long a worker stood still in this time.
fn frozen(all: &[Period<'_>], slot: u32, from: u64, to: u64) -> u64 {
    let freezes = all.iter().filter(|it| it.effect == Effect::Freezes && it.fault.slot == Some(slot));
    freezes.map(|it| it.end.min(to).saturating_sub(it.begin.max(from))).sum()
}

fn counter(events: &[Event], found: &mut Vec<Violation>) {
    let (mut names, mut accepted_writes) = (HashMap::new(), HashMap::<&str, (u64, Id)>::new());
    for event in events {
        match &event.what {
            What::Of(id, Step::Asked { name, .. }) => drop(names.insert(*id, name.as_str())),
            What::Of(id, Step::Wrote { value, current, accepted: true }) => {
                let name = names.get(id).copied().unwrap_or_default();
                let last = accepted_writes.entry(name).or_insert((0, *id));
                let writer = std::mem::replace(&mut last.1, *id);
                last.0 += 1;
                if *value != current + 1 {
                    let says =
                        format!("{id} wrote {value} over the {current} of {writer}: an update is lost");
                    found.push(Violation { broken: Broken::Counter, says, of: vec![writer, *id] });
                }
            }
            What::Counter { name, value } => {
                let (writes, last) =
                    accepted_writes.get(name.as_str()).map_or((0, None), |&(writes, id)| (writes, Some(id)));
                if writes != *value {
                    let says = format!("{name} is {value} in the end, after {writes} writes");
                    found.push(Violation { broken: Broken::Counter, says, of: last.into_iter().collect() });
                }
            }
            _ => {}
        }
    }
}

fn finality(events: &[Event], found: &mut Vec<Violation>) {
    let mut lost = HashSet::new();
    for event in events {
        let What::Of(id, step) = &event.what else { continue };
        match step {
            Step::Lost => drop(lost.insert(*id)),
            Step::Failed { kind, .. } if kind == "Lost" => drop(lost.insert(*id)),
            Step::Held | Step::Released if lost.contains(id) => {
                let says = format!("{id} was lost, and {step} after that");
                found.push(Violation { broken: Broken::Finality, says, of: vec![*id] });
            }
            _ => {}
        }
    }
}

fn errors(events: &[Event], found: &mut Vec<Violation>) {
    for event in events {
        let (says, of) = match &event.what {
            What::Trouble(says) => (says.clone(), Vec::new()),
            What::Of(id, Step::Failed { call, kind, says }) => {
                let retryable = matches!(kind.as_str(), "Unavailable" | "Unknown");
                let lost = kind == "Lost" && matches!(call.as_str(), "run" | "release");
                if retryable && call != "run" || lost {
                    continue;
                }
                (format!("{id}, {call}: {kind}: {says}"), vec![*id])
            }
            _ => continue,
        };
        found.push(Violation { broken: Broken::Errors, says, of });
    }
}
