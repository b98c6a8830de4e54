//! One of the servers.

use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::Knocks;
use crate::error::{Error, ErrorKind, Result};
use crate::redis::inbox::Subscription;
use crate::redis::link::Link;
use crate::redis::script::{self, Script};

#[derive(Debug)]
pub(super) struct Node {
    pub(super) link: Arc<Link>,
    pub(super) subscription: Subscription<Knocks>,
}

/// A node's vote on a claim.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Vote {
    Granted(u64),
    /// Held by this owner, for so long unless they renew.
    Busy { holder: Vec<u8>, left: Option<Duration> },
    /// The node has no vote: it is new, was restarted, or has lost its data.
    Outside,
}

/// Where a node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) run_id: String,
    /// `None`: it has a vote.
    pub(super) waits: Option<Waits>,
    /// The highest token that it has drawn.
    pub(super) high: u64,
    /// For how long a lock was ever taken there.
    pub(super) longest: Duration,
}

/// What is known of a node that waits for its admission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Waits {
    pub(super) number: String,
    pub(super) since: Duration,
    /// It has never had a vote, as far as it knows.
    pub(super) new: bool,
}

/// A claim as a node is asked.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) keys: Vec<String>,
    pub(super) owner: String,
    /// The owner that it is taken over from.
    pub(super) from: String,
    pub(super) ttl: String,
    /// Waiter, grace and channel, if it is to be woken.
    pub(super) waiter: Option<[String; 3]>,
}

impl Node {
    /// Runs a script, and gives up after a time.
    pub(super) async fn run(
        &self,
        script: &Script,
        keys: &[String],
        args: &[&str],
        patience: Duration,
    ) -> Result<Value> {
        in_time(patience, script.run(&self.link, keys, args)).await
    }

    pub(super) async fn vote(&self, question: &Question, proposal: u64, patience: Duration) -> Result<Vote> {
        let run_id = in_time(patience, self.run_id()).await?;
        let proposal = proposal.to_string();
        let mut args = vec![&*run_id, &question.owner, &question.from, &question.ttl, &proposal];
        args.extend(question.waiter.iter().flatten().map(String::as_str));
        let answer = self.run(&script::VOTE, &question.keys, &args, patience).await?;
        self.read_vote(answer)
    }

    fn read_vote(&self, answer: Value) -> Result<Vote> {
        let Value::Array(answer) = answer else { return Err(self.out_of_step()) };
        let left = |left: i64| u64::try_from(left).ok().map(Duration::from_millis);
        Ok(match &*answer {
            [Value::BulkString(word), Value::Int(counter)] if word == b"granted" => {
                Vote::Granted(counter.cast_unsigned())
            }
            [Value::BulkString(word), Value::BulkString(holder), Value::Int(ms)] if word == b"busy" => {
                Vote::Busy { holder: holder.clone(), left: left(*ms) }
            }
            [Value::BulkString(word)] if word == b"outside" => Vote::Outside,
            [Value::BulkString(word)] if word == b"exhausted" => return Err(script::exhausted()),
            [Value::BulkString(word)] if word == b"dead" => {
                return Err(Error::new(ErrorKind::Unavailable, "the claim had been broken off before it arrived"));
            }
            _ => return Err(self.out_of_step()),
        })
    }

    /// Whether the counter is at least `token` now, under this owner's lock.
    pub(super) async fn raise(&self, question: &Question, token: u64, patience: Duration) -> Result<bool> {
        let run_id = in_time(patience, self.run_id()).await?;
        let args = [&*run_id, &question.owner, &token.to_string()];
        match self.run(&script::RAISE, &question.keys, &args, patience).await? {
            Value::Int(raised) => Ok(raised == 1),
            _ => Err(self.out_of_step()),
        }
    }

    pub(super) async fn enlist(&self, key: &[String], number: &str, patience: Duration) -> Result<Standing> {
        let run_id = in_time(patience, self.run_id()).await?;
        let answer = self.run(&script::ENLIST, key, &[&run_id, number], patience).await?;
        let Value::Array(answer) = answer else { return Err(self.out_of_step()) };
        let millis = |ms: i64| Duration::from_millis(ms.try_into().unwrap_or_default());
        match &*answer {
            [Value::BulkString(_), Value::Int(high), Value::Int(longest)] => {
                Ok(Standing { run_id, waits: None, high: high.cast_unsigned(), longest: millis(*longest) })
            }
            [
                Value::BulkString(_),
                Value::BulkString(number),
                Value::Int(since),
                Value::Int(new),
                Value::Int(high),
                Value::Int(longest),
            ] => {
                let number = String::from_utf8_lossy(number).into_owned();
                let waits = Some(Waits { number, since: millis(*since), new: *new == 1 });
                Ok(Standing { run_id, waits, high: high.cast_unsigned(), longest: millis(*longest) })
            }
            _ => Err(self.out_of_step()),
        }
    }

    /// The run id of the server at the other end of the present connection: a restart breaks it.
    async fn run_id(&self) -> Result<String> {
        self.link.opened().await?.run_id.clone().ok_or_else(|| {
            Error::new(ErrorKind::Denied, "redlock needs the command INFO, to know when a server was restarted")
        })
    }

    pub(super) fn out_of_step(&self) -> Error {
        self.link.break_off();
        Error::new(ErrorKind::Unknown, "the answer doesn't fit the request: the connection is out of step")
    }
}

async fn in_time<T>(patience: Duration, request: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(patience, request)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unknown, "a redis server has not answered in time")))
}
