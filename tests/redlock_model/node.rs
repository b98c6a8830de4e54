//! A node as its scripts make it: one function for each. `scripts.rs` compares them with the real ones.

use crate::rules::Rules;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Vote {
    Granted(u64),
    Busy(u8),
    Outside,
}

/// What `enlist.lua` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    Member { high: u64 },
    Outside { number: u8, new: bool, high: u64 },
}

/// With one lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Node {
    pub(crate) owner: Option<u8>,
    pub(crate) counter: u64,
    pub(crate) high: u64,
    pub(crate) floor: u64,
    /// The server's run id, and the one of its admission.
    pub(crate) server: u8,
    pub(crate) run: Option<u8>,
    /// Run and number under which it waits.
    pub(crate) waits: Option<(u8, u8)>,
}

impl Node {
    pub(crate) fn is_member(&self, run: u8) -> bool {
        self.run == Some(run)
    }

    fn note_token(&mut self, token: u64) {
        self.counter = token;
        self.high = self.high.max(token);
    }

    pub(crate) fn claim(
        &mut self,
        run: u8,
        owner: u8,
        from: Option<u8>,
        proposal: u64,
        rules: &Rules,
    ) -> Vote {
        if !self.is_member(run) && !rules.outsiders_vote {
            return Vote::Outside;
        }
        match self.owner {
            Some(holder) if from != Some(holder) => Vote::Busy(holder),
            // Taken over from one who hasn't got it: no holder is an empty one.
            None if from.is_some() => Vote::Busy(NOBODY),
            _ => {
                let counter = (self.counter + 1).max(proposal).max(self.floor);
                self.note_token(counter);
                self.owner = Some(owner);
                Vote::Granted(counter)
            }
        }
    }

    pub(crate) fn raise(&mut self, run: u8, owner: u8, token: u64, rules: &Rules) -> bool {
        let ours = self.owner == Some(owner) || rules.raise_without_owner_check;
        if !self.is_member(run) || !ours {
            return false;
        }
        if token > self.counter {
            self.note_token(token);
        }
        true
    }

    pub(crate) fn release(&mut self, owner: u8, rules: &Rules) -> bool {
        let held = self.owner == Some(owner) || (rules.release_without_owner_check && self.owner.is_some());
        if held {
            self.owner = None;
        }
        held
    }

    pub(crate) fn enlist(&mut self, run: u8, number: u8, rules: &Rules) -> Stand {
        let high = if rules.high_without_floor { self.high } else { self.high.max(self.floor) };
        if self.is_member(run) {
            return Stand::Member { high };
        }
        let number = match self.waits {
            Some((waits, number)) if waits == run => number,
            _ => {
                self.waits = Some((run, number));
                number
            }
        };
        Stand::Outside { number, new: self.run.is_none(), high }
    }

    pub(crate) fn admit(&mut self, run: u8, number: u8, floor: u64, rules: &Rules) -> bool {
        if self.is_member(run) {
            return true;
        }
        if self.waits != Some((run, number)) && !rules.admit_without_number {
            return false;
        }
        // Its own clock counts, too; here that is at the beginning of time, the worst that it can be.
        self.floor = self.floor.max(floor).max(self.high + 1);
        self.run = Some(run);
        self.waits = None;
        true
    }
}

/// The holder that a busy node names if there is none.
pub(crate) const NOBODY: u8 = u8::MAX;
