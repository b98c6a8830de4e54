//! Which servers have a vote. One that has lost what it knew (its data, or perhaps only the last second of them, in a
//! restart) could give away a lock that is held, and a token that has been given: it has no vote until every lock that
//! it may have forgotten has run out, and its counters begin above every token.

use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::standing::{Standing, admission};
use crate::clock::Instant;
use crate::engine::lock;
use crate::error::Error;
use crate::redis::waiting::millis;

/// What the nodes say of themselves.
struct Census {
    /// `None` is a node that doesn't answer.
    standings: Vec<Option<Standing>>,
    errors: Vec<Error>,
}

/// How often nodes without a vote are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Shared {
    /// Some node has no vote: sees to it, in the background unless nothing goes without it.
    pub(super) async fn look_after_outsiders(self: &Arc<Self>, patience: Duration, needed: bool) {
        {
            let mut looked_at = lock(&self.looked_at);
            if looked_at.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
                return;
            }
            *looked_at = Some(Instant::now());
        }
        let shared = self.clone();
        let task = tokio::spawn(async move { shared.admit(patience).await });
        if needed {
            let _ = task.await; // the next round shows what has come of it
        }
    }

    /// Asks all nodes where they stand, gives a vote to those that can have one, and says how many have one, and why
    /// others haven't.
    pub(super) async fn admit(&self, patience: Duration) -> (usize, Vec<Error>) {
        let key = [super::NODE_KEY.to_owned()];
        let mut census = self.take_census(&key, patience).await;
        if !admission(&census.standings, self.longest_ttl).nodes.is_empty() {
            // Once more: what the others have drawn counts only if they say it after the time of waiting is over.
            census = self.take_census(&key, patience).await;
        }
        let Census { standings, mut errors } = census;
        let mut members = standings.iter().flatten().filter(|standing| standing.waits.is_none()).count();
        let admission = admission(&standings, self.longest_ttl);
        let (floor, margin) = (admission.floor.to_string(), admission.margin.as_micros().to_string());
        let longest = millis(admission.longest).to_string();
        for node in admission.nodes {
            let Some(Standing { waits: Some(waits), .. }) = &standings[node] else { continue };
            let bounds = [&*floor, &margin, &longest];
            match self.nodes[node].admit(&key, &waits.number, bounds, patience).await {
                Ok(true) => {
                    tracing::info!(node, "a redis server has a vote now");
                    members += 1;
                }
                Ok(false) => {} // it has changed in the meantime
                Err(error) => errors.push(error),
            }
        }
        (members, errors)
    }

    async fn take_census(&self, key: &[String], patience: Duration) -> Census {
        let number = getrandom::u64().unwrap_or_default().to_string();
        let enlist = self.nodes.iter().map(|node| node.enlist(key, &number, patience));
        let mut errors = Vec::new();
        let standings = futures_util::future::join_all(enlist)
            .await
            .into_iter()
            .map(|standing| standing.map_err(|error| errors.push(error)).ok())
            .collect();
        Census { standings, errors }
    }
}
