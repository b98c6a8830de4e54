//! The real Lua scripts and the real client half of the queue in Redis, in a simulated world where everything goes wrong:
//! late and lost messages, connections that break while requests are under way, processes that stop or crash, callers
//! that give up, programs that use the same key. A judge looks at each history: none may break a rule. And without any
//! one of the precautions that the protocol consists of (`broken.rs`), one must.
//!
//! A history is made from its seed. `FENCELOCK_MODEL_SEEDS=20` runs twenty times as many.

mod broken;
mod client;
mod judge;
mod store;
#[path = "../../src/redis/waiting.rs"]
mod waiting;
mod world;

use std::time::Instant;

use store::{Server, Sources};
use world::{Figures, Plan, World};

const HISTORIES: u64 = 1000;

fn histories() -> u64 {
    let times = std::env::var("FENCELOCK_MODEL_SEEDS").map_or(1, |times| times.parse().expect("a number"));
    HISTORIES * times
}

/// A history line by line.
fn trace(server: &Server, plan: Plan<'_>) -> String {
    let world = World::new(server, Plan { trace: true, ..plan }).run();
    let found = world.violation().map(|found| format!("{:?}: {}", found.rule, found.what));
    let (found, lines) = (found.unwrap_or_default(), world.trace.unwrap_or_default().join("\n"));
    format!("seed {}: {found}\n{lines}", plan.seed)
}

#[test]
fn no_history_breaks_a_rule() {
    let server = Server::new(&Sources::real());
    let (began, mut all) = (Instant::now(), Figures::default());
    for seed in 0..histories() {
        let plan = Plan { seed, ..Plan::default() };
        let world = World::new(&server, plan).run();
        assert!(world.violation().is_none(), "{}", trace(&server, plan));
        all.add(&world.figures);
    }
    println!("{} histories in {:?}: {all:?}", histories(), began.elapsed());
    // A world in which nothing happens breaks no rule.
    for what in [
        "Claim granted",
        "Claim mine",
        "Claim busy",
        "Claim gone",
        "Claim dead",
        "Release 0",
        "Release 1",
        "Renew 0",
        "Renew 1",
        "Transfer granted",
        "Transfer gone",
        "Leave 1",
        "handed over",
        "executed late",
        "too late",
        "lost",
        "foreign program",
        "deleted",
    ] {
        assert!(all.seen.get(what).is_some_and(|&times| times >= 10), "hardly ever {what:?}: {all:?}");
    }
}
