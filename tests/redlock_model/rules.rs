//! What can be broken.

/// All off: the scheme as it is.
#[allow(clippy::struct_excessive_bools, reason = "switches, each on its own")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) raise_without_owner_check: bool,
    /// All are asked to raise, and those that say yes are counted.
    pub(crate) raise_everywhere: bool,
    /// The highest number of the first phase is the token.
    pub(crate) one_phase: bool,
    pub(crate) quorum_too_small: bool,
    pub(crate) outsiders_vote: bool,
    pub(crate) no_floor: bool,
    /// What a node was admitted above doesn't count as a number that it has seen.
    pub(crate) high_without_floor: bool,
    pub(crate) no_quarantine: bool,
    /// The others' numbers are read before the quarantine is over.
    pub(crate) stale_highs: bool,
    pub(crate) release_without_owner_check: bool,
    /// A vote of a round that was given up is counted in the client's next one.
    pub(crate) late_votes_count: bool,
    pub(crate) admit_without_number: bool,
}

impl Rules {
    pub(crate) const NONE: Self = Self {
        raise_without_owner_check: false,
        raise_everywhere: false,
        one_phase: false,
        quorum_too_small: false,
        outsiders_vote: false,
        no_floor: false,
        high_without_floor: false,
        no_quarantine: false,
        stale_highs: false,
        release_without_owner_check: false,
        late_votes_count: false,
        admit_without_number: false,
    };
}
