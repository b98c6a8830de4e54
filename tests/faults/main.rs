//! What goes wrong with servers, networks, machines and those who hold locks, and what each backend does then: one
//! suite, which all of them run.
//!
//! A trial is called `KIND::FAULT`, such as `redis::holder_killed`. What a backend can't meet is ignored, and said
//! why. Each prints what happened, and how long it took. What a backend is alone with is in `tests/KIND_faults.rs`.

mod clocks;
mod holders;
mod network;
mod redlock;
mod refusals;
mod releases;
mod servers_down;
mod stage;
mod storage;

#[path = "../servers/mod.rs"]
mod servers;

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::LazyLock;
use std::thread::available_parallelism;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use servers::holder;
use servers::rigs::{KINDS, Kind, Part};
use stage::Stage;
use tokio::runtime::Builder;
use tokio::sync::Semaphore;

/// So many trials are played at a time, unless `--test-threads` allows fewer: three for each processor.
static PLACES: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(places()));

/// Those with TTLs that are so long hardly do anything but wait. So they begin first, side by side, and need no place.
const LONG: Duration = Duration::from_secs(10);

/// What does something to a server, or to its data. All else of those that need no place shares one with a few others:
/// most of the time that a trial takes of a processor would go into its start.
const ALONE: [&str; 5] =
    ["server_wiped", "server_frozen_briefly", "server_frozen_past_ttl", "server_down", "taken_away"];

/// A fault, and what shows what it does.
struct Scenario {
    name: &'static str,
    /// What a backend must have.
    needs: &'static [Part],
    /// If there is something here: the only ones that it is about, and what is to be said of the others.
    only: &'static [(&'static [&'static str], &'static str)],
    play: for<'a> fn(&'a Stage) -> Playing<'a>,
}

type Playing<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

macro_rules! scenarios {
    ($($module:ident::$name:ident [$($part:ident)*] $(for $kinds:expr, or $reason:literal)?;)*) => {
        &[$(Scenario {
            name: stringify!($name),
            needs: &[$(Part::$part),*],
            only: &[$((&$kinds, $reason))?],
            play: |stage| Box::pin($module::$name(stage)),
        }),*]
    };
}

const SCENARIOS: &[Scenario] = scenarios! {
    holders::holder_killed [Processes];
    holders::waiter_killed [Processes];
    holders::holder_frozen [Processes Expiry];
    holders::frozen_holder_keeps_it [Processes]
        for ["file", "sqlserver"], or "the TTL frees a frozen holder's lock, as `holder_frozen` shows";

    servers_down::server_restarted [Server]
        for ["redis", "redlock", "postgres", "sqlserver"],
        or "Azurite ends leases when it is restarted, which Azure doesn't";
    servers_down::server_wiped [Data];
    servers_down::server_frozen_briefly [Server];
    servers_down::server_frozen_past_ttl [Server];
    servers_down::server_down [Server];
    servers_down::connections_ended [Connections];

    network::requests_cut [Server];
    network::replies_cut [Server];
    network::renewal_slower_than_ttl [Server];
    network::reply_to_grant_lost [Server];
    network::reply_to_renewal_lost [Server];
    network::reset_in_mid_frame [Server];
    network::network_resets [Server];

    releases::release_races_renewal [];
    releases::stale_release [];
    releases::late_release [Server];
    releases::taken_away [TakeAway];

    redlock::minority_down [Minority];
    redlock::majority_down [Minority];
    redlock::split_votes [Minority];
    redlock::late_quorum [Minority];
    redlock::wiped_minority [Minority];
    redlock::renewal_on_a_minority [Minority];

    clocks::clock_forward [Clock];
    clocks::clock_back [Clock];

    refusals::wrong_password [Password];
    refusals::database_missing [Server]
        for ["postgres", "sqlserver"], or "it has no databases that must be made before";
    refusals::scripts_flushed [Server]
        for ["redis", "redlock"], or "it uses no scripts that a server could forget";
    refusals::writes_refused [Server]
        for ["redis", "redlock"], or "there is no such state of a server that is up";
    refusals::lock_table_full [Server] for ["postgres"], or "it has no table of locks of a fixed size";

    storage::disk_full [Processes] for ["file"], or "what it does then is its server's affair";
    storage::lock_dir_read_only [Processes] for ["file"], or "it has no directory";
};

fn main() -> ExitCode {
    if holder::is_played() {
        holder::play();
        return ExitCode::SUCCESS;
    }
    let (mut long, mut trials) = (Vec::new(), Vec::new());
    for kind in KINDS {
        let left_out = kind.left_out();
        let trials = if is_long(kind) { &mut long } else { &mut trials };
        for scenario in SCENARIOS {
            trials.push(trial(kind, scenario, left_out.or(scenario.obstacle(kind))));
        }
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(long.len() + places());
    long.append(&mut trials);
    libtest_mimic::run(&arguments, long).exit_code()
}

fn places() -> usize {
    3 * available_parallelism().map_or(1, usize::from)
}

fn is_long(kind: &Kind) -> bool {
    kind.short_ttl >= LONG
}

impl Scenario {
    fn obstacle(&self, kind: &Kind) -> Option<&'static str> {
        let beside_the_point = self.only.iter().find(|(kinds, _)| !kinds.contains(&kind.name));
        kind.obstacle(self.needs).or(beside_the_point.map(|(_, reason)| *reason))
    }
}

fn trial(kind: &'static Kind, scenario: &'static Scenario, obstacle: Option<&'static str>) -> Trial {
    kind.trial(scenario.name, obstacle, move || {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime can be built").block_on(async {
            let place = if is_long(kind) { None } else { Some(PLACES.acquire().await) };
            let _place = place.transpose().expect("it is never closed");
            let shares = is_long(kind) && !ALONE.contains(&scenario.name);
            let stage = Stage::set(kind, scenario.name, shares).await;
            (scenario.play)(&stage).await;
        });
        Ok(())
    })
}
