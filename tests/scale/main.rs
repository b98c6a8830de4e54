//! What is small with one lock, with very many of them: those who wait, those that are held, and those that come and
//! go.
//!
//! A trial is called `KIND::TRIAL`, such as `redis::five_thousand_waiters`, and has the number in its name. The trials
//! `many_cycles` do as many as fit in some seconds, or `FENCELOCK_SCALE_CYCLES`. Each prints a line of what it has
//! cost. They run one after the other, since they count what the process has: descriptors, tasks, memory.

mod cycles;
mod held;
mod measures;
mod stage;
mod waiters;

#[path = "../servers/mod.rs"]
mod servers;

use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use servers::rigs::{KINDS, Kind};
use stage::Stage;
use tokio::runtime::Builder;

/// How many cycles there are, instead of as many as fit in some seconds.
const CYCLES: &str = "FENCELOCK_SCALE_CYCLES";

/// How much of everything a kind is given, and what that may cost it.
struct Size {
    kind: &'static str,
    waiters: waiters::Size,
    held: held::Size,
    cycles: cycles::Size,
}

fn main() -> ExitCode {
    let count = std::env::var(CYCLES)
        .ok()
        .map(|count| count.parse::<usize>().expect("FENCELOCK_SCALE_CYCLES is a number"));
    let mut trials = Vec::new();
    for kind in KINDS {
        let left_out = kind.left_out();
        let size = SIZES.iter().find(|size| size.kind == kind.name).expect("every kind has its sizes");
        let waiters = format!("{}_waiters", in_words(size.waiters.count));
        let held = format!("{}_held", in_words(size.held.count));
        trials.extend([
            trial(kind, &waiters, left_out, |stage| Box::pin(waiters::many_waiters(stage, &size.waiters))),
            trial(kind, &held, left_out, |stage| Box::pin(held::many_held(stage, &size.held))),
            trial(kind, "many_cycles", left_out, move |stage| {
                Box::pin(cycles::many_cycles(stage, &size.cycles, count))
            }),
        ]);
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What a trial with so many calls itself.
fn in_words(count: usize) -> &'static str {
    match count {
        10_000 => "ten_thousand",
        5000 => "five_thousand",
        1000 => "one_thousand",
        200 => "two_hundred",
        _ => panic!("{count} has no words yet"),
    }
}

type Playing<'a> = std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>;

fn trial(
    kind: &'static Kind,
    name: &str,
    obstacle: Option<&'static str>,
    play: impl for<'a> Fn(&'a Stage) -> Playing<'a> + Send + 'static,
) -> Trial {
    kind.trial(name, obstacle, move || {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime can be built").block_on(async {
            let stage = Stage::set(kind);
            play(&stage).await;
        });
        Ok(())
    })
}

/// Renewals may take 40 requests a second of each server, but on Azure, where each lease is renewed alone. Azurite is
/// slow, and so is the stand-in for SQL Server, in this process and not optimised: they have fewer of everything.
static SIZES: &[Size] = &[
    Size {
        kind: "memory",
        waiters: waiters::Size { count: 5000, connections: 0, commands: 0.0, entries: 0 },
        held: held::Size {
            count: 10_000,
            ttl: Duration::from_secs(3),
            time: Duration::from_secs(4),
            at_a_time: 10_000,
            connections: 0,
            commands: 0.0,
            entries: 0,
        },
        cycles: cycles::Size { entries: 0 },
    },
    Size {
        kind: "file",
        waiters: waiters::Size { count: 5000, connections: 0, commands: 0.0, entries: 1 },
        held: held::Size {
            count: 10_000,
            ttl: Duration::from_secs(3),
            time: Duration::from_secs(4),
            at_a_time: 256,
            connections: 0,
            commands: 0.0,
            entries: 10_000,
        },
        cycles: cycles::Size { entries: 8 },
    },
    Size {
        kind: "redis",
        waiters: waiters::Size { count: 5000, connections: 6, commands: 2.0, entries: 1 },
        held: held::Size {
            count: 10_000,
            ttl: Duration::from_secs(8),
            time: Duration::from_secs(9),
            at_a_time: 64,
            connections: 4,
            commands: 107.0,
            entries: 10_000,
        },
        cycles: cycles::Size { entries: 8 },
    },
    Size {
        kind: "redlock",
        waiters: waiters::Size { count: 5000, connections: 18, commands: 6.0, entries: 3 },
        held: held::Size {
            count: 10_000,
            ttl: Duration::from_secs(10),
            time: Duration::from_secs(11),
            at_a_time: 32,
            connections: 12,
            commands: 400.0,
            entries: 30_000,
        },
        cycles: cycles::Size { entries: 24 },
    },
    Size {
        kind: "postgres",
        waiters: waiters::Size { count: 5000, connections: 10, commands: 2.0, entries: 100 },
        held: held::Size {
            count: 10_000,
            ttl: Duration::from_secs(8),
            time: Duration::from_secs(9),
            at_a_time: 64,
            connections: 8,
            commands: 107.0,
            entries: 20_000,
        },
        cycles: cycles::Size { entries: 100 },
    },
    Size {
        kind: "sqlserver",
        waiters: waiters::Size { count: 1000, connections: 10, commands: 2.0, entries: 100 },
        held: held::Size {
            count: 1000,
            ttl: Duration::from_secs(8),
            time: Duration::from_secs(9),
            at_a_time: 32,
            connections: 4,
            commands: 107.0,
            entries: 1000,
        },
        cycles: cycles::Size { entries: 100 },
    },
    Size {
        kind: "azure",
        waiters: waiters::Size { count: 200, connections: 16, commands: 6.0, entries: 1 },
        held: held::Size {
            count: 200,
            ttl: Duration::from_secs(15),
            time: Duration::from_secs(17),
            at_a_time: 16,
            connections: 40,
            commands: 400.0,
            entries: 200,
        },
        cycles: cycles::Size { entries: 8 },
    },
];
