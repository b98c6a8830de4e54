//! [`Resource`]: what the locks protect, a counter for each name behind a [`FencingGate`].

use std::collections::BTreeMap;

use fencelock::{FencingGate, FencingToken};

use super::history::{Id, Log, Step, What, now};

#[derive(Debug)]
pub(crate) struct Resource {
    counters: BTreeMap<String, FencingGate<u64>>,
}

impl Resource {
    pub(crate) fn new(names: &[String]) -> Self {
        Self { counters: names.iter().map(|name| (name.clone(), FencingGate::default())).collect() }
    }

    /// Answers `read NAME TOKEN` and `write NAME TOKEN VALUE`: with the value, `ok` or `stale`.
    pub(crate) fn answer(&self, id: Id, question: &str, log: &Log) -> String {
        let words: Vec<_> = question.split(' ').collect();
        let counter = |name: &str| self.counters.get(name).expect("a name of this run");
        let token = |text: &str| text.parse().ok().and_then(FencingToken::new).expect("a token");
        match words[..] {
            ["read", name, with] => match counter(name).enter(token(with), |counter| *counter) {
                Ok(value) => value.to_string(),
                Err(_) => "stale".to_owned(),
            },
            ["write", name, with, value] => {
                let value = value.parse().expect("a number");
                let write = |counter: &mut u64| std::mem::replace(counter, value);
                let written = counter(name).enter(token(with), write);
                let (accepted, current) = (written.is_ok(), written.unwrap_or_default());
                log.note(now(), What::Of(id, Step::Wrote { value, current, accepted }));
                if accepted { "ok" } else { "stale" }.to_owned()
            }
            _ => panic!("a worker asks {question}"),
        }
    }

    /// What there is in the end.
    pub(crate) fn note(&self, log: &Log) {
        for (name, gate) in &self.counters {
            let Some(highest) = gate.highest() else { continue };
            let value = gate.enter(highest, |counter| *counter).expect("nobody else comes in any more");
            log.note(now(), What::Counter { name: name.clone(), value });
        }
    }
}
