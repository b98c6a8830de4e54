//! Which servers have a vote. One that has lost what it knew (its data, or perhaps only the last second of them, in a
//! restart) could give away a lock that is held, and a token that has been given: it has no vote until every lock that
//! it may have forgotten has run out, and its counters begin above every token.

use std::time::Duration;

use super::Shared;
use super::standing::{Standing, admission};
use crate::error::{Error, Result};
use crate::redis::waiting::millis;

impl Shared {
    /// Asks all nodes where they stand, gives a vote to those that can have one, and says how many have one, and why
    /// others haven't.
    pub(super) async fn admit(&self, patience: Duration) -> (usize, Vec<Error>) {
        let _alone = self.admitting.lock().await;
        let key = [super::NODE_KEY.to_owned()];
        let number = getrandom::u64().unwrap_or_default().to_string();
        let answers: Vec<Result<Standing>> = futures_util::future::join_all(
            self.nodes.iter().map(|node| node.enlist(&key, &number, patience)),
        )
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
}
