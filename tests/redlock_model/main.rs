//! Redlock through every schedule of three nodes and two clients, and by chance through some of more: the crate's own
//! decisions (`src/redis/redlock/ballot.rs` and `standing.rs`), against a model of the nodes that is compared with the
//! real scripts.
//!
//! What is checked: no two hold at the same time; of any two grants the later has the higher token; there is a verdict
//! once all have answered, and `Busy` only where a majority names one holder; and whenever nothing is under way, one
//! who asks all nodes gets it.
//!
//! `FENCELOCK_MODEL_DEPTH=1` (with a release build) takes bounds that need minutes and gigabytes.

#[path = "../../src/redis/redlock/ballot.rs"]
mod ballot;
mod convicted;
mod node;
mod rules;
mod scripts;
mod search;
#[path = "../../src/redis/redlock/standing.rs"]
mod standing;
#[allow(dead_code, reason = "the other model uses more of it")]
#[path = "../redis_queue_model/store.rs"]
mod store;
mod world;

use std::time::Instant;

use rules::Rules;
use search::{Dice, Found};
use world::{Bounds, World};

/// One attempt of each client. Clocks disagree: any attempt may propose either number.
const ONCE: Bounds = Bounds {
    rounds: 1,
    proposals: &[1, 3],
    thorough: false,
    wipes: 0,
    restarts: false,
    only_when_settled: false,
    deaf_looks: false,
};

/// The scheme as it is.
const AS_IT_IS: Rules = Rules::NONE;

fn deep() -> bool {
    std::env::var_os("FENCELOCK_MODEL_DEPTH").is_some()
}

/// Searches it all, and says how much that was.
fn holds<const N: usize, const A: usize>(what: &str, start: World<N, A>, bounds: &Bounds) -> Found {
    let began = Instant::now();
    let found = search::all(start, bounds, &AS_IT_IS, usize::MAX);
    let Found { states, held, deepest, .. } = found;
    eprintln!("{what}: {states} states, {held} with a holder, {deepest} steps deep, {:?}", began.elapsed());
    assert_eq!(found.violation, None, "{what}: {}", found.trace());
    assert!(held > 0, "{what}: nobody has ever got it");
    found
}

const THOROUGH: Bounds = Bounds { thorough: true, ..ONCE };
const TWICE: Bounds = Bounds { rounds: 2, ..ONCE };

#[test]
fn two_clients() {
    holds("1+1 attempts, thorough", World::<3, 2>::new(), &THOROUGH);
    holds("1+1 attempts, counters apart", World::<3, 2>::drifted(), &ONCE);
    holds("2+1 attempts", World::<3, 3>::new(), &TWICE);
    if deep() {
        holds("1+1 attempts, counters apart, thorough", World::<3, 2>::drifted(), &THOROUGH);
        holds("2+1 attempts, counters apart", World::<3, 3>::drifted(), &TWICE);
        holds(
            "2+1 attempts, thorough",
            World::<3, 3>::new(),
            &Bounds { thorough: true, proposals: &[1], ..TWICE },
        );
        holds("2+2 attempts", World::<3, 4>::new(), &Bounds { proposals: &[1], ..TWICE });
        holds("1+1+1 attempts", World::<3, 3>::new(), &ONCE);
        holds("1+1 attempts, 4 nodes", World::<4, 2>::drifted(), &ONCE);
    }
}

/// If a server's clock jumps, a lock may run out early, and two may hold it. What protects then is their tokens.
#[test]
fn clocks_that_jump() {
    let bounds = if deep() { ONCE } else { Bounds { proposals: &[3], ..ONCE } };
    holds("1+1 attempts, clocks jump", World::<3, 2>::drifted().with_clocks_that_jump(), &bounds);
    if deep() {
        holds("2+1 attempts, clocks jump", World::<3, 3>::new().with_clocks_that_jump(), &TWICE);
    }
}

const ONE_LOSS: Bounds = Bounds { wipes: 1, restarts: true, deaf_looks: true, ..ONCE };

#[test]
fn nodes_that_forget() {
    holds("1+1 attempts, 1 loss", World::<3, 2>::new(), &ONE_LOSS);
    let two = Bounds { wipes: 2, proposals: &[1], ..ONCE };
    if deep() {
        holds("1+1 attempts, 1 loss, thorough", World::<3, 2>::new(), &Bounds { thorough: true, ..ONE_LOSS });
        holds("1+1 attempts, 1 loss, counters apart", World::<3, 2>::drifted(), &ONE_LOSS);
        holds(
            "1+1 attempts, 2 losses",
            World::<3, 2>::new(),
            &Bounds { restarts: true, deaf_looks: true, ..two },
        );
        holds(
            "1+1 attempts, 2 losses, counters apart",
            World::<3, 2>::drifted(),
            &Bounds { proposals: &[1, 3], ..two },
        );
        holds("2+1 attempts, 1 loss", World::<3, 3>::new(), &Bounds { rounds: 2, ..ONE_LOSS });
        holds("2+1 attempts, 2 losses", World::<3, 3>::new(), &Bounds { rounds: 2, ..two });
    } else {
        holds("1+1 attempts, 2 losses", World::<3, 2>::new(), &Bounds { only_when_settled: true, ..two });
    }
}

#[test]
fn new_nodes() {
    let bounds = Bounds { wipes: 1, only_when_settled: true, ..ONCE };
    if deep() {
        holds("1+1 attempts, new nodes, 1 loss", World::<3, 2>::bare(), &bounds);
    } else {
        holds(
            "1+1 attempts, new nodes, 1 loss",
            World::<3, 2>::bare(),
            &Bounds { proposals: &[1], ..bounds },
        );
    }
}

fn walks<const N: usize, const A: usize>(what: &str, start: World<N, A>, bounds: &Bounds, seed: u64) {
    let (began, mut grants) = (Instant::now(), 0);
    let count = if deep() { 300_000 } else { 1_500 };
    for number in 0..count {
        let mut dice = Dice(seed << 32 | number);
        match search::walk(start, bounds, &AS_IT_IS, &mut dice) {
            Ok(granted) => grants += granted,
            Err((violation, path)) => panic!("{what}: walk {number}: {violation:?} after {path:?}"),
        }
    }
    eprintln!("{what}: {count} walks, {grants} grants, {:?}", began.elapsed());
    assert!(u64::from(grants) > count / 2, "{what}: hardly anybody gets it");
}

/// Three clients with two attempts each, nodes that fail and that forget.
#[test]
fn more_by_chance() {
    let bounds = Bounds {
        rounds: 2,
        proposals: &[1, 2, 5, 9],
        thorough: true,
        wipes: 2,
        restarts: true,
        only_when_settled: false,
        deaf_looks: true,
    };
    walks("4 nodes", World::<4, 6>::new(), &bounds, 4);
    walks("5 nodes", World::<5, 6>::new(), &bounds, 5);
    walks("5 new nodes", World::<5, 6>::bare(), &Bounds { only_when_settled: true, ..bounds }, 6);
    walks("4 nodes, nothing lost", World::<4, 6>::new(), &Bounds { wipes: 0, ..bounds }, 7);
    walks("5 nodes, nothing lost", World::<5, 6>::new(), &Bounds { wipes: 0, ..bounds }, 8);
}
