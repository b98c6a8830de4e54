//! What such a process does. Each line that it reads is an order, and answered by a line of numbers; times are in
//! nanoseconds.

use std::io::Write;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::locker::{Locker, Result};
use crate::measure::{cpu_time, memory, nanos, now, quantile};

/// How many tasks take many locks between them.
const TAKERS: usize = 256;

/// Does as it is told until there is nobody to tell it anything.
pub(crate) async fn play<L: Locker>(locker: L) -> Result<()> {
    answer(&[])?;
    let mut state = State::new(locker);
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.split(' ').collect();
        answer(&state.obey(&words).await?)?;
    }
    Ok(())
}

fn answer(numbers: &[u64]) -> Result<()> {
    let words: Vec<_> = numbers.iter().map(u64::to_string).collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", words.join(" "))?;
    Ok(out.flush()?)
}

fn number<T: FromStr>(words: &[&str], at: usize) -> Result<T> {
    let word = words.get(at).ok_or("the order is too short")?;
    word.parse().map_err(|_| format!("{word} is no number").into())
}

struct State<L: Locker> {
    locker: L,
    guard: Option<L::Guard>,
    held: Arc<Vec<L::Guard>>,
    /// Where those who wait bring what they got.
    granted: mpsc::UnboundedReceiver<L::Guard>,
    grants: mpsc::UnboundedSender<L::Guard>,
}

impl<L: Locker> State<L> {
    fn new(locker: L) -> Self {
        let (grants, granted) = mpsc::unbounded_channel();
        Self { locker, guard: None, held: Arc::default(), granted, grants }
    }

    async fn obey(&mut self, words: &[&str]) -> Result<Vec<u64>> {
        let locker = self.locker.clone();
        let name = || words.get(1).map(|name| (*name).to_owned()).ok_or("the order names no lock");
        match words[0] {
            "cycle" => in_task(cycle(locker, name()?, number(words, 2)?)).await,
            "many" => many(&locker, &name()?, number(words, 2)?, number(words, 3)?).await,
            "lock" => {
                let name = name()?;
                let (guard, at) = in_task(async move { Ok((locker.lock(&name).await?, now())) }).await?;
                self.guard = Some(guard);
                Ok(vec![at])
            }
            "unlock" => {
                let guard = self.guard.take().ok_or("it has no lock")?;
                in_task(async move {
                    let began = now();
                    locker.unlock(guard).await?;
                    Ok(vec![began])
                })
                .await
            }
            "handover" => in_task(handover(locker, name()?, number(words, 2)?, number(words, 3)?)).await,
            "contend" => {
                let contest = Contest {
                    end: Instant::now() + Duration::from_millis(number(words, 3)?),
                    held_for: Duration::from_micros(number(words, 4)?),
                    pause: Duration::from_micros(number(words, 5)?),
                };
                contend(&locker, &name()?, number(words, 2)?, contest).await
            }
            "take" => {
                let (many, ttl) = (number(words, 2)?, Duration::from_millis(number(words, 3)?));
                let began = Instant::now();
                let tasks = if words.get(4) == Some(&"serial") { 1 } else { TAKERS };
                self.held = Arc::new(take(&locker, &name()?, many, ttl, tasks).await?);
                let took = began.elapsed();
                locker.keep(&self.held, ttl);
                Ok(vec![nanos(took)])
            }
            "usage" => {
                let lost = self.held.iter().filter(|guard| L::is_lost(guard)).count() as u64;
                Ok(vec![cpu_time(), memory()?, lost])
            }
            "wait" => {
                for _ in 0..number(words, 2)? {
                    self.wait(&name()?);
                }
                Ok(vec![])
            }
            "release" => self.release(&name()?, number(words, 2)?).await,
            other => Err(format!("unknown order {other}").into()),
        }
    }

    /// A task that waits for a lock.
    fn wait(&self, name: &str) {
        let (locker, name, grants) = (self.locker.clone(), name.to_owned(), self.grants.clone());
        tokio::spawn(async move {
            if let Ok(guard) = locker.lock(&name).await {
                let _ = grants.send(guard); // at the end nobody wants it
            }
        });
    }

    /// Releases a lock for which others wait here, again and again, with always as many of them.
    async fn release(&mut self, name: &str, times: usize) -> Result<Vec<u64>> {
        let mut took = Vec::new();
        let mut guard = self.guard.take().ok_or("it has no lock")?;
        for _ in 0..times {
            let locker = self.locker.clone();
            took.push(
                in_task(async move {
                    let began = Instant::now();
                    locker.unlock(guard).await?;
                    Ok(nanos(began.elapsed()))
                })
                .await?,
            );
            guard = self.granted.recv().await.ok_or("nobody waits")?;
            self.wait(name);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.guard = Some(guard);
        Ok(vec![quantile(&mut took, 50)])
    }
}

/// On a thread that also serves the connections.
async fn in_task<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await?
}

async fn join<T: 'static>(mut set: JoinSet<Result<T>>) -> Result<Vec<T>> {
    let mut results = Vec::new();
    while let Some(result) = set.join_next().await {
        results.push(result??);
    }
    Ok(results)
}

/// Takes a lock and gives it back, each time another one. The medians of both together, and of the first.
async fn cycle<L: Locker>(locker: L, name: String, times: usize) -> Result<Vec<u64>> {
    let (mut both, mut first) = (Vec::with_capacity(times), Vec::with_capacity(times));
    for i in 0..times {
        let name = format!("{name}-{i}");
        let began = Instant::now();
        let guard = locker.try_lock(&name, None).await?;
        first.push(nanos(began.elapsed()));
        locker.unlock(guard).await?;
        both.push(nanos(began.elapsed()));
    }
    Ok(vec![quantile(&mut both, 50), quantile(&mut first, 50)])
}

/// Tasks that take and give back, each with names of its own.
async fn many<L: Locker>(locker: &L, name: &str, tasks: usize, each: usize) -> Result<Vec<u64>> {
    let began = Instant::now();
    let mut set = JoinSet::new();
    for task in 0..tasks {
        let (locker, name) = (locker.clone(), format!("{name}-{task}"));
        set.spawn(async move {
            for i in 0..each {
                let guard = locker.try_lock(&format!("{name}-{i}"), None).await?;
                locker.unlock(guard).await?;
            }
            Ok(())
        });
    }
    join(set).await?;
    Ok(vec![nanos(began.elapsed())])
}

/// From one task to another of the same process: what it takes each time.
async fn handover<L: Locker>(locker: L, name: String, times: usize, settle: u64) -> Result<Vec<u64>> {
    let mut took = Vec::new();
    for _ in 0..times {
        let guard = locker.lock(&name).await?;
        let (other, its_name) = (locker.clone(), name.clone());
        let waiter = tokio::spawn(async move {
            let guard = other.lock(&its_name).await?;
            let at = now();
            other.unlock(guard).await?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(at)
        });
        tokio::time::sleep(Duration::from_millis(settle)).await;
        let released = now();
        locker.unlock(guard).await?;
        took.push(waiter.await??.saturating_sub(released));
    }
    Ok(took)
}

#[derive(Clone, Copy)]
struct Contest {
    end: Instant,
    held_for: Duration,
    pause: Duration,
}

/// Tasks that want the same lock. How long all took, then for each task how often it got it, its longest wait, and for
/// how long it had it; then all waits.
async fn contend<L: Locker>(locker: &L, name: &str, tasks: usize, contest: Contest) -> Result<Vec<u64>> {
    let began = Instant::now();
    let mut set = JoinSet::new();
    for _ in 0..tasks {
        let (locker, name) = (locker.clone(), name.to_owned());
        set.spawn(async move {
            let (mut waits, mut held) = (Vec::new(), Duration::ZERO);
            while Instant::now() < contest.end {
                let began = Instant::now();
                let guard = locker.lock(&name).await?;
                let granted = Instant::now();
                waits.push(nanos(granted - began));
                if !contest.held_for.is_zero() {
                    tokio::time::sleep(contest.held_for).await;
                    held += granted.elapsed();
                }
                locker.unlock(guard).await?;
                if !contest.pause.is_zero() {
                    tokio::time::sleep(contest.pause).await;
                }
            }
            Ok((waits, nanos(held)))
        });
    }
    let results = join(set).await?;
    let mut numbers = vec![nanos(began.elapsed())];
    for (waits, held) in &results {
        numbers.extend([waits.len() as u64, waits.iter().max().copied().unwrap_or(0), *held]);
    }
    numbers.extend(results.iter().flat_map(|(waits, _)| waits));
    Ok(numbers)
}

async fn take<L: Locker>(
    locker: &L,
    name: &str,
    many: usize,
    ttl: Duration,
    tasks: usize,
) -> Result<Vec<L::Guard>> {
    let mut set = JoinSet::new();
    for task in 0..tasks {
        let (locker, name) = (locker.clone(), name.to_owned());
        set.spawn(async move {
            let mut guards = Vec::with_capacity(many.div_ceil(tasks));
            for i in (task..many).step_by(tasks) {
                guards.push(locker.try_lock(&format!("{name}-{i}"), Some(ttl)).await?);
            }
            Ok(guards)
        });
    }
    let mut all = Vec::with_capacity(many);
    for guards in join(set).await? {
        all.extend(guards);
    }
    Ok(all)
}
