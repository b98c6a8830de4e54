//! Which servers have a vote. One that has lost what it knew (its data, or perhaps only the last second of them, in a
//! restart) could give away a lock that is held, and a token that has been given: it has no vote until every lock that
//! it may have forgotten has run out, and its counters begin above every token.

use std::time::Duration;

use super::Shared;
use super::ballot::quorum;
use super::node::{Standing, Waits};
use crate::error::{Error, Result};
use crate::redis::script;
use crate::redis::waiting::millis;

/// How much later than its own clock a node's tokens begin if too few others can be asked what they have drawn. It
/// stands for the difference of clocks.
const MARGIN: Duration = Duration::from_secs(600);

/// To which nodes a vote can be given, and from which token on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Admission {
    pub(super) nodes: Vec<usize>,
    pub(super) floor: u64,
    pub(super) margin: Duration,
    pub(super) longest: Duration,
}

/// Decides by what the nodes say; `None` is a node that doesn't.
pub(super) fn admission(standings: &[Option<Standing>], longest_ttl: Duration) -> Admission {
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
    let ready = |standing: &Standing| {
        standing.waits.as_ref().is_some_and(|waits| all_new || waits.since >= over)
    };
    let nodes = standings
        .iter()
        .enumerate()
        .filter(|(_, standing)| standing.as_ref().is_some_and(ready))
        .map(|(node, _)| node)
        .collect();
    Admission { nodes, floor, margin, longest }
}

impl Shared {
    /// Asks all nodes where they stand, gives a vote to those that can have one, and says how many have one, and why
    /// others haven't.
    pub(super) async fn admit(&self, patience: Duration) -> (usize, Vec<Error>) {
        let _alone = self.admitting.lock().await;
        let key = [super::NODE_KEY.to_owned()];
        let number = getrandom::u64().unwrap_or_default().to_string();
        let answers: Vec<Result<Standing>> =
            futures_util::future::join_all(self.nodes.iter().map(|node| node.enlist(&key, &number, patience)))
                .await;
        let (mut members, mut errors, mut standings) = (0, Vec::new(), Vec::new());
        for answer in answers {
            match answer {
                Ok(standing) => {
                    members += usize::from(standing.waits.is_none());
                    standings.push(Some(standing));
                }
                Err(error) => {
                    errors.push(error);
                    standings.push(None);
                }
            }
        }
        let admission = admission(&standings, self.longest_ttl);
        let (floor, margin) = (admission.floor.to_string(), admission.margin.as_micros().to_string());
        let longest = millis(admission.longest).to_string();
        for node in admission.nodes {
            let Some(Standing { run_id, waits: Some(waits), .. }) = &standings[node] else { continue };
            let args = [&**run_id, &waits.number, &floor, &margin, &longest];
            match self.nodes[node].run(&script::ADMIT, &key, &args, patience).await {
                Ok(redis::Value::Int(1)) => {
                    tracing::info!(node, "a redis server has a vote now");
                    members += 1;
                }
                Ok(_) => {} // it has changed in the meantime
                Err(error) => errors.push(error),
            }
        }
        (members, errors)
    }
}
