//! Who gets a vote, and from which token on: what is decided, without any I/O. The model in `tests/redlock_model` drives
//! this very code.

use std::time::Duration;

use super::ballot::quorum;

/// How much later than its own clock a node's tokens begin if too few others can be asked what they have drawn. It
/// stands for the difference of clocks.
const MARGIN: Duration = Duration::from_secs(600);

/// Where a node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// `None`: it has a vote.
    pub(crate) waits: Option<Waits>,
    /// The highest token that it has drawn.
    pub(crate) high: u64,
    /// For how long a lock was ever taken there.
    pub(crate) longest: Duration,
}

/// What is known of a node that waits for its admission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Waits {
    pub(crate) number: String,
    pub(crate) since: Duration,
    /// It has never had a vote, as far as it knows.
    pub(crate) new: bool,
}

/// To which nodes a vote can be given, and from which token on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    pub(crate) nodes: Vec<usize>,
    pub(crate) floor: u64,
    pub(crate) margin: Duration,
    pub(crate) longest: Duration,
}

/// Decides by what the nodes say; `None` is a node that doesn't.
pub(crate) fn admission(standings: &[Option<Standing>], longest_ttl: Duration) -> Admission {
    let known = || standings.iter().flatten();
    let members = known().filter(|standing| standing.waits.is_none()).count();
    let longest = known().map(|standing| standing.longest).max().unwrap_or_default().max(longest_ttl);
    let floor = known().map(|standing| standing.high + 1).max().unwrap_or_default();
    // All there are, and none has ever had a vote: nothing can have been forgotten.
    let new = |waits: &Waits| waits.new;
    let all_new = standings
        .iter()
        .all(|standing| standing.as_ref().and_then(|standing| standing.waits.as_ref()).is_some_and(new));
    // Whatever lock a node has forgotten, it was one of a majority for it. So many others include one of the rest of it.
    let enough = standings.len() - quorum(standings.len()) + 1;
    let margin = if members >= enough || all_new { Duration::ZERO } else { MARGIN };
    // Clocks may run apart by one in a hundred.
    let over = longest + longest / 100 + Duration::from_millis(2);
    let ready =
        |standing: &Standing| standing.waits.as_ref().is_some_and(|waits| all_new || waits.since >= over);
    let nodes = standings
        .iter()
        .enumerate()
        .filter(|(_, standing)| standing.as_ref().is_some_and(ready))
        .map(|(node, _)| node)
        .collect();
    Admission { nodes, floor, margin, longest }
}
