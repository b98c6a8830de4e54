//! [`main`]: one named trial for each target and check, as `cargo test` and `cargo nextest` expect them.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Trial};
use tokio::runtime::Builder;

use super::checks::{CHECKS, Check};
use super::child;
use super::{Clock, Subject, Target};

/// Names the targets that are left out, separated by commas.
const SKIP: &str = "FENCELOCK_SKIP";

/// With leases that last so long at least, checks are run side by side, so many at a time unless `--test-threads` says otherwise.
const LONG: Duration = Duration::from_secs(10);
const LONG_AT_A_TIME: usize = 16;

/// Runs every check on every target. The `main` of a test target that has `harness = false`.
///
/// It takes the arguments that the standard test harness takes. The checks re-execute the program for the child
/// processes that they need, so nothing but this function should be in its `main`. Targets named in the environment
/// variable `FENCELOCK_SKIP` (`redis,postgres`) are ignored, and it is said that they are.
#[must_use]
pub fn main(targets: Vec<Arc<dyn Target>>) -> ExitCode {
    if let Some(exit_code) = child::main(&targets) {
        return exit_code;
    }
    let skipped = std::env::var(SKIP).unwrap_or_default();
    let (mut trials, mut long) = (Vec::new(), Vec::new());
    for target in targets {
        let left_out = skipped.split(',').any(|name| name.trim() == target.name());
        if left_out {
            eprintln!("{SKIP}: {} is left out", target.name());
        }
        // These hardly do anything but wait for the end of leases.
        let trials = if target.capabilities().min_ttl >= LONG { &mut long } else { &mut trials };
        for check in CHECKS {
            let obstacle =
                if left_out { Some("left out by FENCELOCK_SKIP") } else { check.obstacle(&*target) };
            trials.push(trial(target.clone(), check, obstacle));
        }
    }
    let mut arguments = Arguments::from_args();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if long.is_empty() {
        return conclusion.exit_code();
    }
    arguments.test_threads.get_or_insert(LONG_AT_A_TIME);
    let of_long = libtest_mimic::run(&arguments, long);
    if conclusion.has_failed() { conclusion.exit_code() } else { of_long.exit_code() }
}

fn trial(target: Arc<dyn Target>, check: &'static Check, obstacle: Option<&'static str>) -> Trial {
    let name = format!("{}::{}", target.name(), check.name);
    let trial = Trial::ignorable_test(name, move || match obstacle {
        None => {
            run(target, check);
            Ok(Completion::Completed)
        }
        // Asked for all the same. Nextest knows only the exit code, by which it would count as passed.
        Some(obstacle) if std::env::var_os("NEXTEST").is_some() => Err(obstacle.into()),
        Some(obstacle) => Ok(Completion::ignored_with(obstacle)),
    });
    trial.with_ignored_flag(obstacle.is_some())
}

fn run(target: Arc<dyn Target>, check: &Check) {
    let clock = if target.virtual_time() { check.clock } else { Clock::Real };
    let mut builder = match clock {
        Clock::Paused => Builder::new_current_thread(),
        Clock::Real => Builder::new_multi_thread(),
    };
    if clock == Clock::Paused {
        builder.start_paused(true);
    }
    let runtime = builder.enable_all().worker_threads(2).build().expect("a runtime can be built");
    runtime.block_on(async { (check.run)(Subject::start(target, clock).await).await });
}
