//! The `sqlserver` backend beside the raw client, in one run, for orientation: the server is the stand-in of the tests, in this
//! process, so that the times are those of the client and the protocol.
//!
//! `cargo bench --features sqlserver --bench sqlserver [-- WORKLOAD…]`, with the workloads `uncontended` and `handover`.
//! Without one, both.

use std::time::Duration;

use fencelock::sqlserver::{SqlServerLocks, driver};
use fencelock::{LockProvider, Provider};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

#[path = "../tests/servers/mod.rs"]
mod servers;
#[allow(dead_code, reason = "the others measure the server, too")]
mod workloads;

use servers::sqlserver::{DATABASE, SqlServer};
use servers::sqlserver_locks::{Driver, Place, config, connect};
use workloads::{Other, Result, SETTLE, now};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = Runtime::new()?;
    if let [child, _, url] = arguments.as_slice()
        && child == "child"
    {
        return runtime.block_on(act_as_child(url));
    }
    let all = ["uncontended", "handover"].map(str::to_owned);
    let workloads = if arguments.is_empty() { all.to_vec() } else { arguments };
    for workload in &workloads {
        let server = SqlServer::start();
        let url = Place::of(&server).url(DATABASE);
        match workload.as_str() {
            "uncontended" => runtime.block_on(uncontended(&url))?,
            "handover" => handover(&runtime, &url)?,
            other => return Err(format!("unknown workload {other}: {}", all.join(", ")).into()),
        }
    }
    Ok(())
}

fn provider(url: &str) -> Box<dyn LockProvider> {
    Box::new(Provider::new(SqlServerLocks::new(config(url))))
}

/// A client that calls the procedures: no token, no heartbeat, nothing noticed.
struct Raw(Mutex<Driver>);

impl Raw {
    async fn connect(url: &str) -> Result<Self> {
        Ok(Self(Mutex::new(connect(url).await?)))
    }

    async fn ask(&self, sql: &str, name: &str) -> Result<()> {
        let mut client = self.0.lock().await;
        let parameters: [&dyn driver::ToSql; 1] = [&name];
        let row = client.query(sql, &parameters).await?.into_row().await?;
        match row.and_then(|row| row.get::<i32, _>(0)) {
            Some(0..) => Ok(()),
            other => Err(format!("the procedure returned {other:?}").into()),
        }
    }

    async fn lock(&self, name: &str) -> Result<()> {
        let sql = "DECLARE @r int; EXEC @r = sp_getapplock @Resource = @P1, @LockMode = 'Exclusive', @LockOwner = 'Session', \
                   @LockTimeout = -1; SELECT @r";
        self.ask(sql, name).await
    }

    async fn unlock(&self, name: &str) -> Result<()> {
        let sql =
            "DECLARE @r int; EXEC @r = sp_releaseapplock @Resource = @P1, @LockOwner = 'Session'; SELECT @r";
        self.ask(sql, name).await
    }
}

async fn uncontended(url: &str) -> Result<()> {
    let raw = Raw::connect(url).await?;
    let cycle = async |i: usize| {
        let name = format!("raw {i}");
        raw.lock(&name).await?;
        raw.unlock(&name).await
    };
    workloads::uncontended(3_000, cycle, &*provider(url)).await
}

/// Beside it the same locks by hand: the other process blocks in the server.
fn handover(runtime: &Runtime, url: &str) -> Result<()> {
    const ROUNDS: usize = 500;
    let mut other = Other::start("raw", url)?;
    let raw = runtime.block_on(Raw::connect(url))?;
    let mut blocked = Vec::new();
    for _ in 0..ROUNDS {
        runtime.block_on(raw.lock("raw"))?;
        other.tell("lock")?;
        std::thread::sleep(SETTLE);
        let released = now();
        runtime.block_on(raw.unlock("raw"))?;
        blocked.push(Duration::from_nanos(other.hear()?.saturating_sub(released)));
        other.tell("unlock")?;
        other.hear()?;
    }
    drop(other);
    workloads::handover(runtime, ROUNDS, ("sp_getapplock", blocked), &*provider(url), url)
}

async fn act_as_child(url: &str) -> Result<()> {
    let raw = Raw::connect(url).await?;
    let told =
        async |what: &str| if what == "lock" { raw.lock("raw").await } else { raw.unlock("raw").await };
    workloads::act_as_child(|| Ok(provider(url)), told).await
}
