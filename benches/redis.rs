//! The `redis` backend beside the raw client, in one run, on a server of its own.
//!
//! `cargo bench --features redis --bench redis [-- WORKLOAD…]`, with the workloads `uncontended`, `many`, `handover`,
//! `tasks`, `processes` and `held`. Without one, all of them.

use std::sync::Arc;
use std::time::Duration;

use fencelock::redis::RedisLocks;
use fencelock::redis::driver::aio::MultiplexedConnection;
use fencelock::redis::driver::{Client, Script, cmd};
use fencelock::{LockProvider, Provider};
use tokio::runtime::Runtime;

#[path = "../tests/servers/mod.rs"]
mod servers;
mod workloads;

use servers::redis::RedisServer;
use workloads::{Other, Result, SETTLE, now};

/// What a careful user of the raw client sends to give a lock back.
const DELETE_IF_OURS: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

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
        let server = RedisServer::start();
        let url = server.url();
        let requests = || scripts_run(&server);
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
            "held" => runtime.block_on(workloads::held(provider(&url)?, 10_000, requests))?,
            other => return Err(format!("unknown workload {other}: {}", all.join(", ")).into()),
        }
    }
    Ok(())
}

fn provider(url: &str) -> Result<Box<dyn LockProvider>> {
    Ok(Box::new(Provider::new(RedisLocks::new(Client::open(url)?))))
}

async fn raw(url: &str) -> Result<MultiplexedConnection> {
    Ok(Client::open(url)?.get_multiplexed_async_connection().await?)
}

async fn raw_cycle(connection: &mut MultiplexedConnection, script: &Script, name: &str) -> Result<()> {
    cmd("SET").arg(name).arg("owner").arg("NX").arg("PX").arg(30_000).query_async::<()>(connection).await?;
    script.key(name).arg("owner").invoke_async::<()>(connection).await?;
    Ok(())
}

async fn uncontended(url: &str) -> Result<()> {
    let (mut connection, script) = (raw(url).await?, Script::new(DELETE_IF_OURS));
    let raw = async |i| raw_cycle(&mut connection, &script, &format!("raw {i}")).await;
    workloads::uncontended(20_000, raw, &*provider(url)?).await
}

async fn many(url: &str) -> Result<()> {
    let (connection, script) = (raw(url).await?, Arc::new(Script::new(DELETE_IF_OURS)));
    let raw = |task, cycles| {
        let (mut connection, script) = (connection.clone(), script.clone());
        async move {
            for i in 0..cycles {
                raw_cycle(&mut connection, &script, &format!("raw {task} {i}")).await?;
            }
            Ok(())
        }
    };
    workloads::many(100_000, raw, || provider(url)).await
}

/// Beside it an element pushed to a list on which the other process blocks.
fn handover(runtime: &Runtime, url: &str) -> Result<()> {
    const ROUNDS: usize = 1_000;
    let mut other = Other::start("blpop", url)?;
    let mut connection = runtime.block_on(raw(url))?;
    let mut blpop = Vec::new();
    for _ in 0..ROUNDS {
        other.tell("pop")?;
        std::thread::sleep(SETTLE);
        let released = now();
        runtime.block_on(cmd("LPUSH").arg("list").arg("x").query_async::<()>(&mut connection))?;
        blpop.push(Duration::from_nanos(other.hear()?.saturating_sub(released)));
    }
    drop(other);
    workloads::handover(runtime, ROUNDS, ("BLPOP", blpop), &*provider(url)?, url)
}

fn scripts_run(server: &RedisServer) -> u64 {
    let stats = server.command(&["INFO", "commandstats"]);
    let calls = |line: &str| line.strip_prefix("cmdstat_evalsha:calls=")?.split(',').next()?.parse().ok();
    stats.lines().find_map(calls).unwrap_or(0)
}

async fn act_as_child(url: &str) -> Result<()> {
    let mut connection = raw(url).await?;
    connection.set_response_timeout(Duration::from_secs(60));
    let pop = async |what: &str| {
        assert_eq!(what, "pop");
        cmd("BLPOP").arg("list").arg(0).query_async::<(String, String)>(&mut connection).await?;
        Ok(())
    };
    workloads::act_as_child(|| provider(url), pop).await
}
