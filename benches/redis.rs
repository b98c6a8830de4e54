//! The `redis` backend beside the raw client, in one run, on a server of its own.
//!
//! `cargo bench --features redis --bench redis [-- WORKLOAD…]`, with the workloads `uncontended`, `many`, `handover`,
//! `tasks`, `processes` and `held`. Without one, all of them.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fencelock::redis::RedisLocks;
use fencelock::redis::driver::aio::MultiplexedConnection;
use fencelock::redis::driver::{Client, Script, cmd};
use fencelock::{LockOptions, LockProvider, Provider};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

#[path = "../tests/servers/mod.rs"]
mod servers;

use servers::redis::RedisServer;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What a careful user of the raw client sends to give a lock back.
const DELETE_IF_OURS: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";
/// So that the other process waits by the time of the release.
const SETTLE: Duration = Duration::from_millis(5);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = Runtime::new()?;
    if let [child, what, url] = arguments.as_slice()
        && child == "child"
    {
        return runtime.block_on(act_as_child(what, url));
    }
    let all = ["uncontended", "many", "handover", "tasks", "processes", "held"].map(str::to_owned);
    let workloads = if arguments.is_empty() { all.to_vec() } else { arguments };
    for workload in &workloads {
        let server = RedisServer::start();
        match workload.as_str() {
            "uncontended" => runtime.block_on(uncontended(&server))?,
            "many" => runtime.block_on(many(&server))?,
            "handover" => handover(&server)?,
            "tasks" => runtime.block_on(tasks(&server))?,
            "processes" => processes(&server)?,
            "held" => runtime.block_on(held(&server))?,
            other => return Err(format!("unknown workload {other}: {}", all.join(", ")).into()),
        }
    }
    Ok(())
}

fn provider(url: &str) -> Result<Provider<RedisLocks>> {
    Ok(Provider::new(RedisLocks::new(Client::open(url)?)))
}

async fn raw(url: &str) -> Result<MultiplexedConnection> {
    Ok(Client::open(url)?.get_multiplexed_async_connection().await?)
}

async fn raw_cycle(connection: &mut MultiplexedConnection, script: &Script, name: &str) -> Result<()> {
    cmd("SET").arg(name).arg("owner").arg("NX").arg("PX").arg(30_000).query_async::<()>(connection).await?;
    script.key(name).arg("owner").invoke_async::<()>(connection).await?;
    Ok(())
}

/// One task, a new name each time: acquire and release.
async fn uncontended(server: &RedisServer) -> Result<()> {
    const ROUNDS: usize = 20_000;
    let (mut connection, script) = (raw(&server.url()).await?, Script::new(DELETE_IF_OURS));
    let provider = provider(&server.url())?;
    let mut took = [Vec::new(), Vec::new(), Vec::new()];
    for i in 0..ROUNDS {
        // Raw twice, to see how much it differs from itself.
        for way in [0, 1, 2] {
            let name = format!("name {way} {i}");
            let began = Instant::now();
            if way < 2 {
                raw_cycle(&mut connection, &script, &name).await?;
            } else {
                let guard = provider.create_lock(&name).try_acquire().await?.ok_or("busy")?;
                guard.release().await?;
            }
            took[way].push(began.elapsed());
        }
    }
    let [raw, again, ours] = took.map(median);
    println!(
        "uncontended: acquire + release, median: raw {raw:.1?}, raw again {again:.1?}, fencelock {ours:.1?}: ratio {:.2}",
        ours.div_duration_f64(raw)
    );
    Ok(())
}

/// Many tasks, each with names of its own.
async fn many(server: &RedisServer) -> Result<()> {
    for tasks in [64, 256] {
        let (connection, script) = (raw(&server.url()).await?, Arc::new(Script::new(DELETE_IF_OURS)));
        let provider = Arc::new(provider(&server.url())?);
        let cycles = 100_000 / tasks;
        let began = Instant::now();
        let mut set = JoinSet::new();
        for task in 0..tasks {
            let (mut connection, script) = (connection.clone(), script.clone());
            set.spawn(async move {
                for i in 0..cycles {
                    raw_cycle(&mut connection, &script, &format!("raw {task} {i}")).await?;
                }
                Ok::<_, Box<dyn Error + Send + Sync>>(())
            });
        }
        join(set).await?;
        let raw = began.elapsed();
        let began = Instant::now();
        let mut set = JoinSet::new();
        for task in 0..tasks {
            let provider = provider.clone();
            set.spawn(async move {
                for i in 0..cycles {
                    let lock = provider.create_lock(&format!("ours {task} {i}"));
                    lock.try_acquire().await?.ok_or("busy")?.release().await?;
                }
                Ok(())
            });
        }
        join(set).await?;
        let ours = began.elapsed();
        let rate = |time: Duration| f64::from(tasks * cycles * 2) / time.as_secs_f64();
        println!(
            "{tasks} tasks, own names: operations/s: raw {:.0}, fencelock {:.0}: ratio {:.2}",
            rate(raw),
            rate(ours),
            rate(ours) / rate(raw)
        );
    }
    Ok(())
}

/// Release in one process to acquired in another. Beside it an element pushed to a list on which the other blocks.
fn handover(server: &RedisServer) -> Result<()> {
    const ROUNDS: usize = 1_000;
    let url = server.url();
    let runtime = Runtime::new()?;
    let mut other = Other::start("blpop", &url)?;
    let mut connection = runtime.block_on(raw(&url))?;
    let mut blpop = Vec::new();
    for _ in 0..ROUNDS {
        other.tell("pop")?;
        std::thread::sleep(SETTLE);
        let released = now();
        runtime.block_on(cmd("LPUSH").arg("list").arg("x").query_async::<()>(&mut connection))?;
        blpop.push(Duration::from_nanos(other.hear()?.saturating_sub(released)));
    }
    drop(other);
    let mut other = Other::start("acquire", &url)?;
    let provider = provider(&url)?;
    let lock = provider.create_lock("job");
    let mut ours = Vec::new();
    for _ in 0..ROUNDS {
        let guard = runtime.block_on(lock.acquire())?;
        other.tell("acquire")?;
        std::thread::sleep(SETTLE);
        let released = now();
        runtime.block_on(guard.release())?;
        ours.push(Duration::from_nanos(other.hear()?.saturating_sub(released)));
        other.tell("release")?;
        other.hear()?;
    }
    let (p99, blpop, ours) = (quantile(&mut ours, 99), median(blpop), median(ours));
    println!(
        "release to acquired in another process, median: BLPOP {blpop:.0?}, fencelock {ours:.0?} (99 %: {p99:.0?}): \
         ratio {:.2}",
        ours.div_duration_f64(blpop)
    );
    Ok(())
}

/// 32 tasks of one process on one name, which is held for no time.
async fn tasks(server: &RedisServer) -> Result<()> {
    let before = scripts_run(server);
    let counts = contend(&server.url(), 32).await?;
    report("32 tasks of one process on one name", &counts, scripts_run(server) - before);
    Ok(())
}

/// 4 processes with 8 tasks each.
fn processes(server: &RedisServer) -> Result<()> {
    let before = scripts_run(server);
    let mut others = (0..4).map(|_| Other::start("contend", &server.url())).collect::<Result<Vec<_>>>()?;
    for other in &mut others {
        other.tell("go")?;
    }
    let mut counts = Vec::new();
    for other in &mut others {
        for _ in 0..8 {
            counts.push((other.hear()?, Duration::from_nanos(other.hear()?)));
        }
    }
    report("4 processes of 8 tasks on one name", &counts, scripts_run(server) - before);
    Ok(())
}

const CONTEND_FOR: Duration = Duration::from_secs(3);

/// How often each task got the lock, and its longest wait.
async fn contend(url: &str, tasks: usize) -> Result<Vec<(u64, Duration)>> {
    let provider = Arc::new(provider(url)?);
    let end = Instant::now() + CONTEND_FOR;
    let mut set = JoinSet::new();
    for _ in 0..tasks {
        let provider = provider.clone();
        set.spawn(async move {
            let lock = provider.create_lock("contended");
            let (mut count, mut worst) = (0, Duration::ZERO);
            while Instant::now() < end {
                let began = Instant::now();
                let guard = lock.acquire().await?;
                (count, worst) = (count + 1, worst.max(began.elapsed()));
                guard.release().await?;
            }
            Ok((count, worst))
        });
    }
    join(set).await
}

fn report(what: &str, counts: &[(u64, Duration)], scripts: u64) {
    let total: u64 = counts.iter().map(|&(count, _)| count).sum();
    let fewest = counts.iter().map(|&(count, _)| count).min().unwrap_or(0);
    let most = counts.iter().map(|&(count, _)| count).max().unwrap_or(0);
    let worst = counts.iter().map(|&(_, worst)| worst).max().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let (per, rate) = (scripts as f64 / total as f64, total as f64 / CONTEND_FOR.as_secs_f64());
    println!(
        "{what}: {rate:.0} acquisitions/s, {per:.2} requests each, fewest/most per task {fewest}/{most}, worst wait {worst:.1?}"
    );
}

/// 10,000 locks with a TTL of 3 s, held for 12 s.
async fn held(server: &RedisServer) -> Result<()> {
    const LOCKS: usize = 10_000;
    let provider = Arc::new(provider(&server.url())?);
    let began = Instant::now();
    let mut set = JoinSet::new();
    for i in 0..LOCKS {
        let provider = provider.clone();
        set.spawn(async move {
            let options = LockOptions::new().ttl(Duration::from_secs(3));
            Ok(provider.create_lock_with(&format!("held {i}"), options).try_acquire().await?.ok_or("busy")?)
        });
    }
    let guards = join(set).await?;
    let (taken, before, cpu) = (began.elapsed(), scripts_run(server), cpu_time()?);
    tokio::time::sleep(Duration::from_secs(12)).await;
    let lost = guards.iter().filter(|guard| guard.is_lost()).count();
    let (requests, cpu) = (
        (scripts_run(server) - before) / 12,
        cpu_time()?.saturating_sub(cpu).div_duration_f64(Duration::from_secs(12)),
    );
    println!(
        "{LOCKS} locks held, TTL 3 s: taken in {taken:.0?}, {requests} requests/s, {:.1} % CPU, {lost} lost",
        cpu * 100.0
    );
    drop(guards);
    provider.close().await?;
    Ok(())
}

async fn join<T: 'static>(mut set: JoinSet<Result<T>>) -> Result<Vec<T>> {
    let mut results = Vec::new();
    while let Some(result) = set.join_next().await {
        results.push(result??);
    }
    Ok(results)
}

fn scripts_run(server: &RedisServer) -> u64 {
    let stats = server.command(&["INFO", "commandstats"]);
    let calls = |line: &str| line.strip_prefix("cmdstat_evalsha:calls=")?.split(',').next()?.parse().ok();
    stats.lines().find_map(calls).unwrap_or(0)
}

/// What this process has used so far.
fn cpu_time() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks: u64 = fields.get(11).zip(fields.get(12)).map_or(Ok(0), |(user, system)| {
        Ok::<_, std::num::ParseIntError>(user.parse::<u64>()? + system.parse::<u64>()?)
    })?;
    Ok(Duration::from_millis(ticks * 10)) // Linux has 100 a second
}

fn median(mut took: Vec<Duration>) -> Duration {
    quantile(&mut took, 50)
}

fn quantile(took: &mut [Duration], percent: usize) -> Duration {
    took.sort_unstable();
    took[(took.len() - 1) * percent / 100]
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// The other process: does as it is told, and says when it had done it.
async fn act_as_child(what: &str, url: &str) -> Result<()> {
    let provider = provider(url)?;
    let lock = provider.create_lock("job");
    let mut connection = raw(url).await?;
    connection.set_response_timeout(Duration::from_secs(60));
    let mut held = None;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "pop" => {
                cmd("BLPOP").arg("list").arg(0).query_async::<(String, String)>(&mut connection).await?;
            }
            "acquire" => held = Some(lock.acquire().await?),
            "release" => {
                if let Some(guard) = held.take() {
                    guard.release().await?;
                }
            }
            "go" => {
                for (count, worst) in contend(url, 8).await? {
                    println!("{count}\n{}", worst.as_nanos());
                }
                continue;
            }
            other => return Err(format!("{what}: what is {other}?").into()),
        }
        println!("{}", now());
    }
    Ok(())
}

struct Other {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Other {
    fn start(what: &str, url: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["child", what, url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("its output is piped")?).lines();
        Ok(Self { child, lines })
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        writeln!(self.child.stdin.as_mut().ok_or("its input is piped")?, "{word}")?;
        Ok(())
    }

    fn hear(&mut self) -> Result<u64> {
        Ok(self.lines.next().ok_or("the other process has ended")??.parse()?)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}
