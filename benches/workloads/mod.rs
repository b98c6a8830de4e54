//! Workloads and measures that the benches of several backends share.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fencelock::{LockOptions, LockProvider};
use tokio::task::JoinSet;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// So that the other process waits by the time of the release.
pub(crate) const SETTLE: Duration = Duration::from_millis(5);

/// Takes and gives back a lock of this name.
pub(crate) async fn cycle(provider: &dyn LockProvider, name: &str) -> Result<()> {
    let guard = provider.create_lock(name).try_acquire().await?.ok_or("busy")?;
    Ok(guard.release().await?)
}

/// One task, a new name each time: raw twice, to see how much it differs from itself, and ours.
pub(crate) async fn uncontended(
    rounds: usize,
    mut raw: impl AsyncFnMut(usize) -> Result<()>,
    provider: &dyn LockProvider,
) -> Result<()> {
    let mut took = [Vec::new(), Vec::new(), Vec::new()];
    for i in 0..rounds {
        for way in [0, 1, 2] {
            let began = Instant::now();
            if way < 2 {
                raw(2 * i + way).await?;
            } else {
                cycle(provider, &format!("name {i}")).await?;
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

/// 64 and 256 tasks, each with names of its own. `raw` makes one of the raw ones.
pub(crate) async fn many<F>(
    cycles: u32,
    raw: impl Fn(u32, u32) -> F,
    provider: impl Fn() -> Result<Box<dyn LockProvider>>,
) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    for tasks in [64, 256] {
        let each = cycles / tasks;
        let began = Instant::now();
        let mut set = JoinSet::new();
        for task in 0..tasks {
            set.spawn(raw(task, each));
        }
        join(set).await?;
        let raw = began.elapsed();
        let provider: Arc<dyn LockProvider> = provider()?.into();
        cycle(&*provider, "the first").await?;
        let began = Instant::now();
        let mut set = JoinSet::new();
        for task in 0..tasks {
            let provider = provider.clone();
            set.spawn(async move {
                for i in 0..each {
                    cycle(&*provider, &format!("ours {task} {i}")).await?;
                }
                Ok(())
            });
        }
        join(set).await?;
        let ours = began.elapsed();
        let rate = |time: Duration| f64::from(tasks * each * 2) / time.as_secs_f64();
        println!(
            "{tasks} tasks, own names: operations/s: raw {:.0}, fencelock {:.0}: ratio {:.2}",
            rate(raw),
            rate(ours),
            rate(ours) / rate(raw)
        );
    }
    Ok(())
}

/// Release in one process to acquired in another, beside what took the raw way so long.
pub(crate) fn handover(
    runtime: &tokio::runtime::Runtime,
    rounds: usize,
    (raw_is, raw): (&str, Vec<Duration>),
    provider: &dyn LockProvider,
    url: &str,
) -> Result<()> {
    let mut other = Other::start("acquire", url)?;
    let lock = provider.create_lock("job");
    let mut ours = Vec::new();
    for _ in 0..rounds {
        let guard = runtime.block_on(lock.acquire())?;
        other.tell("acquire")?;
        std::thread::sleep(SETTLE);
        let released = now();
        runtime.block_on(guard.release())?;
        ours.push(Duration::from_nanos(other.hear()?.saturating_sub(released)));
        other.tell("release")?;
        other.hear()?;
    }
    let (p99, raw, ours) = (quantile(&mut ours, 99), median(raw), median(ours));
    println!(
        "release to acquired in another process, median: {raw_is} {raw:.0?}, fencelock {ours:.0?} (99 %: {p99:.0?}): \
         ratio {:.2}",
        ours.div_duration_f64(raw)
    );
    Ok(())
}

/// 4 processes with 8 tasks each, on one name.
pub(crate) fn processes(url: &str, requests: impl Fn() -> u64) -> Result<()> {
    let before = requests();
    let mut others = (0..4).map(|_| Other::start("contend", url)).collect::<Result<Vec<_>>>()?;
    for other in &mut others {
        other.tell("go")?;
    }
    let mut counts = Vec::new();
    for other in &mut others {
        for _ in 0..8 {
            counts.push((other.hear()?, Duration::from_nanos(other.hear()?)));
        }
    }
    report("4 processes of 8 tasks on one name", &counts, requests() - before);
    Ok(())
}

const CONTEND_FOR: Duration = Duration::from_secs(3);

/// How often each task got the lock, and its longest wait.
pub(crate) async fn contend(provider: Box<dyn LockProvider>, tasks: usize) -> Result<Vec<(u64, Duration)>> {
    let provider: Arc<dyn LockProvider> = provider.into();
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

pub(crate) fn report(what: &str, counts: &[(u64, Duration)], requests: u64) {
    let total: u64 = counts.iter().map(|&(count, _)| count).sum();
    let fewest = counts.iter().map(|&(count, _)| count).min().unwrap_or(0);
    let most = counts.iter().map(|&(count, _)| count).max().unwrap_or(0);
    let worst = counts.iter().map(|&(_, worst)| worst).max().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let (per, rate) = (requests as f64 / total as f64, total as f64 / CONTEND_FOR.as_secs_f64());
    println!(
        "{what}: {rate:.0} acquisitions/s, {per:.2} requests each, fewest/most per task {fewest}/{most}, worst wait {worst:.1?}"
    );
}

/// Many locks with a TTL of 3 s, taken at once and held for 12 s.
pub(crate) async fn held(
    provider: Box<dyn LockProvider>,
    locks: usize,
    requests: impl Fn() -> u64,
) -> Result<()> {
    let provider: Arc<dyn LockProvider> = provider.into();
    let began = Instant::now();
    let mut set = JoinSet::new();
    for i in 0..locks {
        let provider = provider.clone();
        set.spawn(async move {
            let options = LockOptions::new().ttl(Duration::from_secs(3));
            Ok(provider.create_lock_with(&format!("held {i}"), options).try_acquire().await?.ok_or("busy")?)
        });
    }
    let guards = join(set).await?;
    let (taken, before, cpu) = (began.elapsed(), requests(), cpu_time()?);
    tokio::time::sleep(Duration::from_secs(12)).await;
    let lost = guards.iter().filter(|guard| guard.is_lost()).count();
    #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
    let per_second = (requests() - before) as f64 / 12.0;
    let cpu = cpu_time()?.saturating_sub(cpu).div_duration_f64(Duration::from_secs(12));
    println!(
        "{locks} locks held, TTL 3 s: taken in {taken:.0?}, {per_second:.1} requests/s, {:.1} % CPU, {lost} lost",
        cpu * 100.0
    );
    drop(guards);
    provider.close().await?;
    Ok(())
}

/// The other process: does as it is told, and says when it had done it. What isn't known here is `raw`'s.
pub(crate) async fn act_as_child(
    provider: impl Fn() -> Result<Box<dyn LockProvider>>,
    mut raw: impl AsyncFnMut(&str) -> Result<()>,
) -> Result<()> {
    let held_by = provider()?;
    let lock = held_by.create_lock("job");
    let mut held = None;
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "acquire" => held = Some(lock.acquire().await?),
            "release" => {
                if let Some(guard) = held.take() {
                    guard.release().await?;
                }
            }
            "go" => {
                for (count, worst) in contend(provider()?, 8).await? {
                    println!("{count}\n{}", worst.as_nanos());
                }
                continue;
            }
            other => raw(other).await?,
        }
        println!("{}", now());
    }
    Ok(())
}

pub(crate) async fn join<T: 'static>(mut set: JoinSet<Result<T>>) -> Result<Vec<T>> {
    let mut results = Vec::new();
    while let Some(result) = set.join_next().await {
        results.push(result??);
    }
    Ok(results)
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

pub(crate) fn median(mut took: Vec<Duration>) -> Duration {
    quantile(&mut took, 50)
}

pub(crate) fn quantile(took: &mut [Duration], percent: usize) -> Duration {
    took.sort_unstable();
    took[(took.len() - 1) * percent / 100]
}

pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().try_into().unwrap_or(u64::MAX)
}

pub(crate) struct Other {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Other {
    pub(crate) fn start(what: &str, url: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["child", what, url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("its output is piped")?).lines();
        Ok(Self { child, lines })
    }

    pub(crate) fn tell(&mut self, word: &str) -> Result<()> {
        writeln!(self.child.stdin.as_mut().ok_or("its input is piped")?, "{word}")?;
        Ok(())
    }

    pub(crate) fn hear(&mut self) -> Result<u64> {
        Ok(self.lines.next().ok_or("the other process has ended")??.parse()?)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}
