//! Asking all nodes the same, and going on as soon as enough have answered.

use std::error::Error as _;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::Value;

use super::Shared;
use super::ballot::quorum;
use super::node::{Node, in_time};
use crate::error::{Error, ErrorKind, Result};
use crate::redis::script::Script;

impl Shared {
    /// Asks all nodes, and hands each answer to `take` until that has enough. The slow ones are asked to the end all the
    /// same: their answers aren't needed, but what is asked is to be done.
    pub(super) async fn ask_all<T, F>(
        &self,
        ask: impl Fn(Arc<Node>) -> F,
        mut take: impl FnMut(usize, Result<T>) -> ControlFlow<()>,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let mut answers: FuturesUnordered<_> = self
            .nodes
            .iter()
            .enumerate()
            .map(|(number, node)| {
                let answer = ask(node.clone());
                async move { (number, answer.await) }
            })
            .collect();
        while let Some((number, answer)) = answers.next().await {
            if take(number, answer).is_break() {
                break;
            }
        }
        if !answers.is_empty() {
            tokio::spawn(async move { while answers.next().await.is_some() {} });
        }
    }

    /// Has a script run on all nodes for its effect, and says what a majority has answered, once one has.
    pub(super) async fn tell_all(
        &self,
        script: &'static LazyLock<Script>,
        keys: Vec<String>,
        args: Vec<String>,
        patience: Duration,
    ) -> Result<bool> {
        let told = Arc::new((keys, args));
        let quorum = quorum(self.nodes.len());
        let (mut yes, mut no, mut errors) = (0, 0, Vec::new());
        self.ask_all(
            |node| {
                let told = told.clone();
                async move {
                    let (keys, args) = &*told;
                    let args: Vec<_> = args.iter().map(String::as_str).collect();
                    match node.run(script, keys, &args, patience).await? {
                        Value::Int(answer) => Ok(answer == 1),
                        _ => Err(node.out_of_step()),
                    }
                }
            },
            |_, answer| {
                match answer {
                    Ok(true) => yes += 1,
                    Ok(false) => no += 1,
                    Err(error) => errors.push(error),
                }
                if yes.max(no) >= quorum { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )
        .await;
        match (yes >= quorum, no >= quorum) {
            (true, _) => Ok(true),
            (false, true) => Ok(false),
            (false, false) => Err(no_majority(errors, self.nodes.len())),
        }
    }

    /// Listens at a majority of the nodes, if they can be reached: the others don't wake anybody yet.
    pub(super) async fn listen(&self, patience: Duration) {
        let (quorum, mut listening) = (quorum(self.nodes.len()), 0);
        self.ask_all(
            |node| async move { in_time(patience, node.subscription.ensure(&node.link)).await },
            |_, ensured| {
                listening += usize::from(ensured.is_ok()); // what is wrong, the votes will show
                if listening >= quorum { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )
        .await;
    }
}

/// What to say if these errors, out of so many nodes, leave no majority.
pub(super) fn no_majority(errors: Vec<Error>, nodes: usize) -> Error {
    let for_good = errors.iter().filter(|error| !error.is_retryable()).count();
    // What most of them say won't go away; what a minority says would keep nobody from getting a lock.
    let hopeless = for_good > nodes - quorum(nodes);
    let unknown = errors.iter().any(|error| error.kind() == ErrorKind::Unknown);
    let kind = if unknown { ErrorKind::Unknown } else { ErrorKind::Unavailable };
    let in_full = |error: &Error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let all: Vec<_> = errors.iter().map(in_full).collect();
    match errors.into_iter().min_by_key(Error::is_retryable) {
        Some(error) if hopeless => error,
        Some(_) => Error::new(kind, "too few of the redis servers can be reached, or have a vote")
            .with_source(all.join("; ")),
        None => Error::new(
            ErrorKind::Unavailable,
            "too few of the redis servers have a vote: those that were restarted or have lost their data have none \
             until the longest TTL has passed",
        ),
    }
}
