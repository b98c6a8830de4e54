//! The nemesis: worker processes contend for locks on real servers while faults are injected at random, and a checker
//! judges what they tell. `KIND::nemesis` runs it on a backend, `broken::…` on backends with a flaw, which it must
//! find, and `checker::…` shows histories made by hand to the checker.
//!
//! `FENCELOCK_NEMESIS_SECONDS` is the time for which there are faults (30), `FENCELOCK_NEMESIS_SEED` the seed, which is
//! printed. Workers and streams of faults draw from it what they do; the moments are the machine's.

mod broken;
mod checker;
mod checker_tests;
mod crew;
mod faults;
mod history;
mod report;
mod resource;
mod run;
#[path = "../servers/mod.rs"]
mod servers;
mod worker;

use std::hash::{BuildHasher, RandomState};
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};

use faults::{OnNetwork, OnWorkers};
use run::{Plan, run};
use servers::rigs::{KINDS, Kind, Part};

const SECONDS: &str = "FENCELOCK_NEMESIS_SECONDS";
const SEED: &str = "FENCELOCK_NEMESIS_SEED";

/// Workers and servers mostly wait for each other.
const AT_A_TIME: usize = 3;

fn main() -> ExitCode {
    if let Some(exit_code) = worker::main() {
        return exit_code;
    }
    // The longest first.
    let mut kinds: Vec<_> = KINDS.to_vec();
    kinds.sort_by_key(|kind| std::cmp::Reverse(kind.short_ttl));
    let mut trials: Vec<_> = kinds.into_iter().map(trial).collect();
    trials.extend(checker_tests::trials());
    trials.extend(convictions::trials());
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, and not {text}")))
}

fn seed() -> u64 {
    number(SEED).unwrap_or_else(|| RandomState::new().hash_one(0) >> 24)
}

fn trial(kind: &'static Kind) -> Trial {
    let obstacle = kind.left_out().or(kind.obstacle(&[Part::Processes]));
    kind.trial("nemesis", obstacle, move || nemesis(kind))
}

fn nemesis(kind: &'static Kind) -> Result<(), Failed> {
    let seed = seed();
    println!("{}: {SEED}={seed}", kind.name);
    let time = Duration::from_secs(number(SECONDS).unwrap_or(30));
    let plan = Plan {
        kind,
        flaw: None,
        seed,
        time,
        longest_hold: 150,
        long_holds: 1,
        workers: OnWorkers::ALL,
        servers: None,
        network: OnNetwork::ALL,
    };
    let outcome = run(&plan);
    if !outcome.violations.is_empty() {
        return Err(format!("{} with {SEED}={seed}:\n{outcome}", kind.name).into());
    }
    println!("{}: {outcome}", kind.name);
    // A run in which nothing happens breaks no promise.
    let (grants, faults) = (outcome.grants(), outcome.faults().into_values().sum::<usize>());
    let seconds = usize::try_from(time.as_secs()).expect("not for ever");
    // Where a lock of the dead stays for long there are fewer. On a busy machine, too.
    let least = if kind.short_ttl > Duration::from_secs(5) { seconds / 2 } else { 2 * seconds };
    if grants < least || faults < seconds / 3 {
        return Err(format!("{} with {SEED}={seed}: too little has happened: {outcome}", kind.name).into());
    }
    Ok(())
}

/// Backends with a flaw.
mod convictions {
    use std::time::Duration;

    use libtest_mimic::{Failed, Trial};

    use super::broken::Flaw;
    use super::checker::Broken;
    use super::faults::{OnNetwork as Net, OnServers as Server, OnWorkers as Worker};
    use super::run::{Plan, run};
    use super::servers::is_left_out;
    use super::servers::rigs::{KINDS, Kind};
    use super::{SEED, seed};

    /// A backend with a flaw.
    struct Case {
        flaw: Flaw,
        /// Any of the promises that it breaks.
        broken: &'static [Broken],
        /// What brings it to light.
        workers: &'static [Worker],
        servers: &'static [Server],
        network: &'static [Net],
        /// Hundredths of the TTL for which a lock is held at most.
        longest_hold: u32,
        /// For how many seconds there are faults.
        seconds: u64,
    }

    const CASE: Case = Case {
        flaw: Flaw::None,
        broken: &[Broken::Exclusion],
        workers: &[],
        servers: &[],
        network: &[],
        longest_hold: 150,
        seconds: 40,
    };

    const CASES: &[Case] = &[
        Case { flaw: Flaw::DeletesAnybodysKey, workers: Worker::ALL, network: Net::ALL, ..CASE },
        Case { flaw: Flaw::RenewsAnybodysKey, servers: &[Server::TakeAway], longest_hold: 500, ..CASE },
        // A name that is mostly free is granted while replies are held.
        Case { flaw: Flaw::CountsFromTheReply, network: &[Net::HoldRepliesLong], longest_hold: 30, ..CASE },
        Case {
            flaw: Flaw::BelievesTooLong,
            workers: &[Worker::FreezeLong],
            network: &[Net::CutLong],
            longest_hold: 300,
            ..CASE
        },
        Case {
            flaw: Flaw::DrawsTokensItself,
            // By its tokens, nobody can tell who was first.
            broken: &[Broken::Tokens, Broken::Exclusion],
            workers: Worker::ALL,
            ..CASE
        },
        Case { flaw: Flaw::TakesSilenceForYes, network: Net::ALL, ..CASE },
        Case {
            flaw: Flaw::NeverExpires,
            broken: &[Broken::Service],
            workers: &[Worker::Kill],
            // It is found afterwards.
            seconds: 5,
            ..CASE
        },
        Case { flaw: Flaw::MistakesOutages, broken: &[Broken::Errors], network: &[Net::Refuse], ..CASE },
    ];

    pub(super) fn trials() -> Vec<Trial> {
        let Some(kind) = KINDS.iter().copied().find(|kind| kind.name == "redis") else { return Vec::new() };
        let left_out = is_left_out("redis");
        let mut trials: Vec<_> = CASES
            .iter()
            .map(|case| Trial::test(format!("broken::{}", case.flaw.name()), move || convict(kind, case)))
            .collect();
        trials.push(Trial::test("broken::control_is_acquitted", move || acquit(kind)));
        trials.into_iter().map(|trial| trial.with_ignored_flag(left_out)).collect()
    }

    fn convict(kind: &'static Kind, case: &Case) -> Result<(), Failed> {
        let (seed, flaw) = (seed(), case.flaw);
        println!("{}: {SEED}={seed}", flaw.name());
        let plan = Plan {
            kind,
            flaw: Some(flaw),
            seed,
            time: Duration::from_secs(case.seconds),
            longest_hold: case.longest_hold,
            long_holds: 10,
            workers: case.workers,
            servers: Some(case.servers),
            network: case.network,
        };
        let outcome = run(&plan);
        let found = outcome.violations.iter().find(|violation| case.broken.contains(&violation.broken));
        match found {
            Some(violation) => {
                println!("{}, after {:?}: {}", flaw.name(), outcome.took, violation.says);
                Ok(())
            }
            None => Err(format!("{} wasn't found with {SEED}={seed}: {outcome}", flaw.name()).into()),
        }
    }

    fn acquit(kind: &'static Kind) -> Result<(), Failed> {
        let seed = seed();
        println!("control: {SEED}={seed}");
        let plan = Plan {
            kind,
            flaw: Some(Flaw::None),
            seed,
            time: Duration::from_secs(15),
            longest_hold: 300,
            long_holds: 4,
            workers: Worker::ALL,
            servers: None,
            network: Net::ALL,
        };
        let outcome = run(&plan);
        if !outcome.violations.is_empty() {
            return Err(format!("without a flaw, with {SEED}={seed}:\n{outcome}").into());
        }
        println!("control: {outcome}");
        Ok(())
    }
}
