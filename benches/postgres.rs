//! The `postgres` backend beside the raw client, in one run, on a server of its own whose disk is waited for (`fsync` on).
//!
//! `cargo bench --features postgres --bench postgres [-- WORKLOAD…]`, with the workloads `uncontended`, `many`, `handover`,
//! `tasks`, `processes` and `held`. Without one, all of them.

use std::sync::Arc;
use std::time::Duration;

use fencelock::postgres::PostgresLocks;
use fencelock::postgres::driver::{Client, Config, NoTls, Statement};
use fencelock::{LockProvider, Provider};
use tokio::runtime::Runtime;

#[path = "../tests/servers/mod.rs"]
mod servers;
mod workloads;

use servers::postgres::PostgresServer;
use workloads::{Other, Result, SETTLE, now};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = Runtime::new()?;
    if let [child, _, url] = arguments.as_slice()
        && child == "child"
    {
        return runtime.block_on(act_as_child(url));
    }
    let all = ["uncontended", "many", "handover", "tasks", "processes", "held"].map(str::to_owned);
    let workloads = if arguments.is_empty() { all.to_vec() } else { arguments };
    for workload in &workloads {
        let server = PostgresServer::options().durable().start();
        let url = server.url();
        let requests = || statements_run(&server);
        match workload.as_str() {
            "uncontended" => runtime.block_on(uncontended(&url))?,
            "many" => runtime.block_on(many(&url))?,
            "handover" => handover(&runtime, &url)?,
            "tasks" => {
                let before = requests();
                let counts = runtime.block_on(workloads::contend(provider(&url)?, 32))?;
                workloads::report("32 tasks of one process on one name", &counts, requests() - before);
            }
            "processes" => workloads::processes(&url, requests)?,
            "held" => runtime.block_on(held(&url, requests))?,
            other => return Err(format!("unknown workload {other}: {}", all.join(", ")).into()),
        }
    }
    Ok(())
}

fn provider(url: &str) -> Result<Box<dyn LockProvider>> {
    Ok(Box::new(Provider::new(PostgresLocks::new(url.parse()?))))
}

/// A connection with its statements prepared: no token, no heartbeat, nothing noticed.
struct Raw {
    client: Client,
    try_lock: Statement,
    lock: Statement,
    unlock: Statement,
}

impl Raw {
    async fn connect(url: &str) -> Result<Self> {
        let (client, connection) = url.parse::<Config>()?.connect(NoTls).await?;
        tokio::spawn(connection);
        let try_lock = client.prepare("SELECT pg_try_advisory_lock($1)").await?;
        let lock = client.prepare("SELECT pg_advisory_lock($1)").await?;
        let unlock = client.prepare("SELECT pg_advisory_unlock($1)").await?;
        Ok(Self { client, try_lock, lock, unlock })
    }

    async fn ask(&self, statement: &Statement, key: i64) -> Result<()> {
        self.client.query_one(statement, &[&key]).await?;
        Ok(())
    }

    async fn cycle(&self, key: i64) -> Result<()> {
        self.ask(&self.try_lock, key).await?;
        self.ask(&self.unlock, key).await
    }
}

async fn uncontended(url: &str) -> Result<()> {
    let raw = Raw::connect(url).await?;
    workloads::uncontended(10_000, async |i| raw.cycle(i64::try_from(i)?).await, &*provider(url)?).await
}

async fn many(url: &str) -> Result<()> {
    let raw = Arc::new(Raw::connect(url).await?);
    let raw = |task: u32, cycles: u32| {
        let raw = raw.clone();
        async move {
            for i in 0..cycles {
                raw.cycle((i64::from(task) << 32) + i64::from(i)).await?;
            }
            Ok(())
        }
    };
    workloads::many(50_000, raw, || provider(url)).await
}

/// Beside it the same locks by hand: the other process blocks in the server.
fn handover(runtime: &Runtime, url: &str) -> Result<()> {
    const ROUNDS: usize = 1_000;
    let mut other = Other::start("raw", url)?;
    let raw = runtime.block_on(Raw::connect(url))?;
    let mut blocked = Vec::new();
    for _ in 0..ROUNDS {
        runtime.block_on(raw.ask(&raw.lock, 1))?;
        other.tell("lock")?;
        std::thread::sleep(SETTLE);
        let released = now();
        runtime.block_on(raw.ask(&raw.unlock, 1))?;
        blocked.push(Duration::from_nanos(other.hear()?.saturating_sub(released)));
        other.tell("unlock")?;
        other.hear()?;
    }
    drop(other);
    workloads::handover(runtime, ROUNDS, ("pg_advisory_lock", blocked), &*provider(url)?, url)
}

/// Beside it as many locks by hand, all asked for at once over one connection.
async fn held(url: &str, requests: impl Fn() -> u64) -> Result<()> {
    const LOCKS: usize = 1_000;
    let raw = Arc::new(Raw::connect(url).await?);
    let began = std::time::Instant::now();
    let mut set = tokio::task::JoinSet::new();
    for key in 0..i64::try_from(LOCKS)? {
        let raw = raw.clone();
        set.spawn(async move { raw.ask(&raw.try_lock, key).await });
    }
    workloads::join(set).await?;
    println!("{LOCKS} locks by hand: taken in {:.0?}", began.elapsed());
    workloads::held(provider(url)?, LOCKS, requests).await
}

/// How many transactions there have been in the database, each of ours being a statement.
fn statements_run(server: &PostgresServer) -> u64 {
    let counted =
        "SELECT pg_stat_clear_snapshot(); SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database";
    // Sessions tell how many once in a second, at the end of a statement: a heartbeat at the latest.
    std::thread::sleep(Duration::from_secs(4));
    server.sql(counted).trim().parse().unwrap_or(0)
}

async fn act_as_child(url: &str) -> Result<()> {
    let raw = Raw::connect(url).await?;
    let told = async |what: &str| {
        let statement = if what == "lock" { &raw.lock } else { &raw.unlock };
        raw.ask(statement, 1).await
    };
    workloads::act_as_child(|| provider(url), told).await
}
