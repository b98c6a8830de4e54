//! Rounds of votes: from a claim to a grant, or to nothing at all.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::ballot::{Agreement, Ballot, Verdict, quorum};
use super::broadcast::no_majority;
use super::node::{Question, Vote};
use super::{RedlockHold, Shared, node_keys};
use crate::backend::{Claim, Grant, Instant, Outcome};
use crate::engine::backoff::Backoff;
use crate::error::{ErrorKind, Result};
use crate::fencing::FencingToken;
use crate::redis::keys::{Keys, owner_value};
use crate::redis::single::Owner;
use crate::redis::waiting::{grace, millis};

/// How long one that found the votes split tries again before it counts the lock as busy.
const SPLIT_FOR: Duration = Duration::from_millis(500);

/// What a round came to.
pub(super) enum Round {
    Granted(Grant<RedlockHold>),
    Busy(Option<Duration>),
    Split,
}

impl Shared {
    /// The clock, or above every token that has been granted here.
    fn proposal(&self) -> u64 {
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
        u64::try_from(micros).unwrap_or(0).max(self.seen.load(Ordering::Acquire) + 1)
    }

    /// One round: both phases, and if it doesn't come to a grant, everything taken back.
    pub(super) async fn round(
        self: &Arc<Self>,
        claim: &Claim,
        keys: &Keys,
        question: Question,
    ) -> Result<Round> {
        let patience = Self::patience(claim.ttl);
        let (sent, proposal) = (Instant::now(), self.proposal());
        let question = Arc::new(question);
        let mut ballot = Ballot::new(self.nodes.len());
        let (mut times, mut errors, mut outside) = (Vec::new(), Vec::new(), false);
        // Those that have, or may have, granted it; the slow ones see to it themselves once this round has failed.
        let (mut granted, failed) = (Vec::new(), Arc::new(AtomicBool::new(false)));
        self.ask_all(
            |node| {
                let (question, failed) = (question.clone(), failed.clone());
                async move {
                    let vote = node.vote(&question, proposal, patience).await;
                    if failed.load(Ordering::Acquire) && may_be_granted(&vote) {
                        node.take_back(&question, patience).await;
                    }
                    vote
                }
            },
            |number, vote| {
                if may_be_granted(&vote) {
                    granted.push(number);
                }
                match vote {
                    Ok(Vote::Granted(counter)) => ballot.grants(number, counter),
                    Ok(Vote::Busy { holder, left }) => {
                        ballot.refuses(number, holder);
                        times.push(left.unwrap_or(Duration::MAX));
                    }
                    Ok(Vote::Outside) => {
                        outside = true;
                        ballot.fails();
                    }
                    Err(error) => {
                        errors.push(error);
                        ballot.fails();
                    }
                }
                match ballot.verdict() {
                    None => ControlFlow::Continue(()),
                    Some(verdict) => {
                        failed.store(verdict != Verdict::Won, Ordering::Release);
                        ControlFlow::Break(())
                    }
                }
            },
        )
        .await;
        let verdict = ballot.verdict().unwrap_or(Verdict::Unreachable); // there is one after the last vote
        if outside {
            self.look_after_outsiders(patience, verdict == Verdict::Unreachable).await;
        }
        if verdict == Verdict::Won
            && let Some(token) = self.agree(&mut ballot, &question, patience).await
            && let Some(token) = FencingToken::new(token)
        {
            self.seen.fetch_max(token.get(), Ordering::AcqRel);
            let until = sent + Self::validity(claim.ttl);
            if !until.has_passed() {
                let hold = RedlockHold { keys: keys.clone(), owner: Owner(question.owner.clone()) };
                return Ok(Round::Granted(Grant::lease(hold, token, until)));
            }
        }
        // What did not answer in time is told, too: on one connection it is done after the claim. What a broken connection
        // leaves behind on a minority runs out.
        if verdict == Verdict::Won {
            granted = (0..self.nodes.len()).collect(); // the slow ones didn't know
        }
        let nodes = granted.into_iter().map(|number| self.nodes[number].take_back(&question, patience));
        futures_util::future::join_all(nodes).await;
        match verdict {
            Verdict::Busy => {
                // When a majority of them will be free, if nobody renews.
                times.resize(times.len() + ballot.granted(), Duration::ZERO);
                times.sort_unstable();
                Ok(Round::Busy(times.get(quorum(self.nodes.len()) - 1).copied()))
            }
            Verdict::Split | Verdict::Won => Ok(Round::Split),
            Verdict::Unreachable => Err(no_majority(errors, self.nodes.len())),
        }
    }

    /// Brings a majority to count up to one number. `None`: there is none any more.
    async fn agree(
        &self,
        ballot: &mut Ballot<Vec<u8>>,
        question: &Question,
        patience: Duration,
    ) -> Option<u64> {
        let (token, behind) = match ballot.agreement() {
            Agreement::Token(token) => return Some(token),
            Agreement::Raise { token, nodes } => (token, nodes),
        };
        let mut raises: FuturesUnordered<_> = behind
            .into_iter()
            .map(|number| async move { (number, self.nodes[number].raise(question, token, patience).await) })
            .collect();
        while let Some((number, raised)) = raises.next().await {
            if let Ok(true) = raised {
                ballot.raises(number, token);
            }
            if let Agreement::Token(token) = ballot.agreement() {
                return Some(token);
            }
        }
        None
    }

    /// Rounds until one isn't split any more.
    pub(super) async fn rounds(
        self: &Arc<Self>,
        claim: &Claim,
        keys: &Keys,
        mut next: impl FnMut() -> Question,
    ) -> Result<Outcome<RedlockHold>> {
        let (began, mut backoff) =
            (Instant::now(), Backoff::new(Duration::from_millis(2), Duration::from_millis(50)));
        loop {
            match self.round(claim, keys, next()).await? {
                Round::Granted(grant) => return Ok(Outcome::Granted(grant)),
                Round::Busy(retry_after) => return Ok(Outcome::Busy { retry_after }),
                Round::Split if began.elapsed() >= SPLIT_FOR => {
                    return Ok(Outcome::Busy { retry_after: None });
                }
                Round::Split => tokio::time::sleep(backoff.next()).await,
            }
        }
    }
}

/// What a node is asked.
pub(super) fn question(
    claim: &Claim,
    keys: &Keys,
    from: &str,
    round: u32,
    channel: Option<&str>,
) -> Question {
    let waiter = channel.map(|channel| {
        let grace = millis(grace(claim.ttl)).to_string();
        [owner_value(claim.owner, 0), grace, channel.to_owned()]
    });
    Question {
        keys: node_keys(keys, Some(claim)),
        owner: owner_value(claim.owner, round),
        from: from.to_owned(),
        ttl: millis(claim.ttl).to_string(),
        waiter,
    }
}

fn may_be_granted(vote: &Result<Vote>) -> bool {
    match vote {
        Ok(vote) => matches!(vote, Vote::Granted(_)),
        Err(error) => error.kind() == ErrorKind::Unknown,
    }
}
