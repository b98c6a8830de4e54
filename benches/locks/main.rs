//! Ours beside what can be written by hand against the same server, in one run:
//!
//! ```sh
//! cargo bench --all-features --bench locks [-- [--quick] FILTER…]
//! ```
//!
//! A filter is `BACKEND`, `BACKEND:WORKLOAD` or `:WORKLOAD`, with the workloads `w1`, `w2`, `w3`, `w4a`, `w4b`, `w4c`,
//! `w5`, `w6` and `growth`; `w4` is all that begin with it. With `--quick` it is only tried out whether everything
//! works. Servers are started by it, on free ports, and need to be installed (`tests/run.sh` does). Output is Markdown.
//!
//! "By hand" is the best that can be done without any safety: no fencing token, no renewal where that isn't measured,
//! no loss noticed, no dead waiter passed over. Each round measures all of them, one after the other; a ratio is that
//! of ours to theirs in the same round, and its quartiles are over the rounds.

#[path = "../../tests/servers/mod.rs"]
mod servers;

mod backends;
mod child;
mod contest;
mod growth;
mod locker;
mod measure;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod pool;
mod process;
mod report;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod transfer;
mod workload;

use std::time::Instant;

use tokio::runtime::Runtime;

use self::backends::{BACKENDS, Backend, play_as};
use self::growth::Growth;
use self::locker::Result;
use self::report::Row;
use self::workload::{Scale, Workload};

fn main() -> Result<()> {
    // Cargo adds this.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [child, backend, way, url] = &arguments[..]
        && child == process::CHILD
    {
        return Runtime::new()?.block_on(play_as(backend, way, url));
    }
    let (flags, filters): (Vec<_>, Vec<_>) =
        arguments.into_iter().partition(|argument| argument.starts_with("--"));
    if let Some(unknown) = flags.iter().find(|flag| *flag != "--quick") {
        return Err(format!("unknown option {unknown}: there is --quick").into());
    }
    let scale = Scale { quick: !flags.is_empty() };
    check(&filters)?;
    let is_wanted = |backend: &Backend, workload: &str| {
        filters.is_empty() || filters.iter().any(|filter| matches(filter, backend.name, workload))
    };

    let began = Instant::now();
    let (mut rows, mut grown) = (Vec::new(), Vec::new());
    for backend in BACKENDS {
        for workload in Workload::ALL {
            if is_wanted(backend, workload.key()) {
                eprintln!("{:>4} s: {} {}", began.elapsed().as_secs(), backend.name, workload.label());
                let failed = |error: &str| vec![Row::failed(backend.name, &workload.label(), error)];
                rows.extend(
                    contest::run(backend, workload, scale).unwrap_or_else(|error| failed(&error.to_string())),
                );
            }
        }
        if is_wanted(backend, growth::KEY) {
            eprintln!("{:>4} s: {} {}", began.elapsed().as_secs(), backend.name, growth::KEY);
            let failed = |error: &str| vec![Growth::failed(backend, error)];
            grown.extend(growth::run(backend, scale).unwrap_or_else(|error| failed(&error.to_string())));
        }
    }
    eprintln!("{:>4} s: done", began.elapsed().as_secs());

    if scale.quick {
        println!("**`--quick`: too few rounds for figures that mean anything.**\n");
    }
    if !rows.is_empty() {
        println!("{}\n", report::table(&rows, !scale.quick));
    }
    if !grown.is_empty() {
        println!("{}\n", growth::table(&grown, !scale.quick));
    }
    let missed = rows.iter().filter(|row| row.misses()).count()
        + grown.iter().filter(|growth| growth.misses()).count();
    if !scale.quick {
        println!("{missed} of {} rows miss their target.", rows.len() + grown.len());
    }
    Ok(())
}

fn matches(filter: &str, backend: &str, workload: &str) -> bool {
    let (its_backend, its_workload) = filter.split_once(':').unwrap_or((filter, ""));
    (its_backend.is_empty() || its_backend == backend) && workload.starts_with(its_workload)
}

/// A filter that fits nothing is a mistake.
fn check(filters: &[String]) -> Result<()> {
    let workloads: Vec<_> = Workload::ALL.map(Workload::key).into_iter().chain([growth::KEY]).collect();
    for filter in filters {
        let fits =
            |backend: &Backend| workloads.iter().any(|workload| matches(filter, backend.name, workload));
        if !BACKENDS.iter().any(fits) {
            let backends: Vec<_> = BACKENDS.iter().map(|backend| backend.name).collect();
            return Err(format!(
                "{filter} fits nothing: backends of this build are {}; workloads {}",
                backends.join(", "),
                workloads.join(", ")
            )
            .into());
        }
    }
    Ok(())
}
