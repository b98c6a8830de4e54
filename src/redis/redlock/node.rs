//! One of the servers.

use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::Knocks;
use super::standing::{Standing, Waits};
use crate::error::{Error, ErrorKind, Result};
use crate::redis::inbox::Subscription;
use crate::redis::link::{Connected, Link};
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
    Busy {
        holder: Vec<u8>,
        left: Option<Duration>,
    },
    /// The node has no vote: it is new, was restarted, or has lost its data.
    Outside,
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

    /// Runs a script of which the first argument is the server's run id. It is the id of the very server that is asked, since
    /// a restart breaks the connection: over a newer one the script could find the old id in data that came back.
    async fn run_identified(
        &self,
        script: &Script,
        keys: &[String],
        args: &[&str],
        patience: Duration,
    ) -> Result<Value> {
        let opened = tokio::time::timeout(patience, self.link.opened()).await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Unavailable, "a redis server has not let us in in time"))
        })?;
        let run_id = opened.run_id.clone().ok_or_else(|| {
            Error::new(
                ErrorKind::Denied,
                "redlock needs the command INFO, to know when a server was restarted",
            )
        })?;
        let args = [&[&*run_id], args].concat();
        in_time(patience, script.run_over(&mut Connected::Ours(opened), keys, &args)).await
    }

    pub(super) async fn vote(&self, question: &Question, proposal: u64, patience: Duration) -> Result<Vote> {
        let proposal = proposal.to_string();
        let mut args = vec![&*question.owner, &question.from, &question.ttl, &proposal];
        args.extend(question.waiter.iter().flatten().map(String::as_str));
        let answer = self.run_identified(&script::VOTE, &question.keys, &args, patience).await?;
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
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "the claim had been broken off before it arrived",
                ));
            }
            _ => return Err(self.out_of_step()),
        })
    }

    /// Whether the counter is at least `token` now, under this owner's lock.
    pub(super) async fn raise(&self, question: &Question, token: u64, patience: Duration) -> Result<bool> {
        let args = [&*question.owner, &token.to_string()];
        match self.run_identified(&script::RAISE, &question.keys, &args, patience).await? {
            Value::Int(raised) => Ok(raised == 1),
            _ => Err(self.out_of_step()),
        }
    }

    /// Frees what this claim may have got here.
    pub(super) async fn take_back(&self, question: &Question, patience: Duration) {
        let released =
            self.run(&script::NODE_RELEASE, &question.keys, &[&question.owner, "0"], patience).await;
        if let Err(error) = released {
            tracing::debug!(%error, "a failed round was not taken back on a redis server: its ttl frees it");
        }
    }

    pub(super) async fn enlist(&self, key: &[String], number: &str, patience: Duration) -> Result<Standing> {
        let answer = self.run_identified(&script::ENLIST, key, &[number], patience).await?;
        let Value::Array(answer) = answer else { return Err(self.out_of_step()) };
        let millis = |ms: i64| Duration::from_millis(ms.try_into().unwrap_or_default());
        match &*answer {
            [Value::BulkString(_), Value::Int(high), Value::Int(longest)] => {
                Ok(Standing { waits: None, high: high.cast_unsigned(), longest: millis(*longest) })
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
                Ok(Standing { waits, high: high.cast_unsigned(), longest: millis(*longest) })
            }
            _ => Err(self.out_of_step()),
        }
    }

    /// Gives it its vote, if it still waits for it under this number. Whether it has one now.
    pub(super) async fn admit(
        &self,
        key: &[String],
        number: &str,
        [floor, margin, longest]: [&str; 3],
        patience: Duration,
    ) -> Result<bool> {
        let args = [number, floor, margin, longest];
        match self.run_identified(&script::ADMIT, key, &args, patience).await? {
            Value::Int(admitted) => Ok(admitted == 1),
            _ => Err(self.out_of_step()),
        }
    }

    pub(super) fn out_of_step(&self) -> Error {
        self.link.break_off();
        Error::new(ErrorKind::Unknown, "the answer doesn't fit the request: the connection is out of step")
    }
}

pub(super) async fn in_time<T>(patience: Duration, request: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(patience, request)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unknown, "a redis server has not answered in time")))
}
