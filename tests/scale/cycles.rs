//! Very many locks taken and given back, in all the ways that there are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fencelock::{DistributedLock, ErrorKind, LockGuard, LockProvider};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::measures::{at_most, descriptors, memory, settled, tasks};
use crate::servers::locks::Random;
use crate::stage::{PATIENCE, Stage, within};

/// For how long there are cycles, if nobody says how many.
const TIME: Duration = Duration::from_secs(3);

/// Longer than a cycle takes, of which a number was asked for.
const EACH: Duration = Duration::from_millis(100);

/// So many at a time, of two providers.
const CALLERS: usize = 16;

const NAMES: usize = 8;

/// How much more memory the process may have after the second half than after the first.
const ALLOWANCE: usize = 4 << 20;

/// What may stay.
pub(crate) struct Size {
    /// Keys, rows, blobs, files.
    pub(crate) entries: usize,
}

/// When callers stop.
#[derive(Clone, Copy, Debug)]
enum End {
    Cycles(usize),
    Time(Duration),
}

impl End {
    /// Of that many parts, one.
    fn part(self, of: u32) -> Self {
        match self {
            Self::Cycles(cycles) => Self::Cycles(cycles.div_ceil(of as usize)),
            Self::Time(time) => Self::Time(time / of),
        }
    }
}

/// What there is of what must not grow.
#[derive(Clone, Copy, Debug)]
struct Footprint {
    descriptors: usize,
    tasks: usize,
    connections: usize,
}

impl Footprint {
    async fn take(stage: &Stage) -> Self {
        Self {
            descriptors: settled("descriptors", descriptors).await,
            tasks: settled("tasks", tasks).await,
            connections: settled("connections", || stage.rig.connections()).await,
        }
    }

    /// Waits until there is no more than this.
    async fn is_the_limit(self, stage: &Stage) {
        at_most("tasks", self.tasks, tasks).await;
        at_most("connections", self.connections, || stage.rig.connections()).await;
        at_most("descriptors", self.descriptors, descriptors).await;
    }
}

/// Nothing is left of them.
pub(crate) async fn many_cycles(stage: &Stage, size: &Size, cycles: Option<usize>) {
    let end = cycles.map_or(End::Time(TIME), End::Cycles);
    let ttl = stage.kind.short_ttl.max(Duration::from_secs(5));
    let nobody = Footprint::take(stage).await;
    let providers = [stage.direct(ttl).await, stage.direct(ttl).await];
    let mut random = Random::new();
    go_round(&providers, end.part(4), &mut random).await;
    let first = Footprint::take(stage).await;
    let stored = stage.rig.lasting_entries();
    let began = Instant::now();
    let early = go_round(&providers, end.part(2), &mut random).await;
    first.is_the_limit(stage).await;
    let half_way = memory();
    let late = go_round(&providers, end.part(2), &mut random).await;
    first.is_the_limit(stage).await;
    let took = began.elapsed();
    let growth = memory().saturating_sub(half_way);
    for provider in &providers {
        within("the provider is closed", provider.close()).await.expect("it is closed");
    }
    drop(providers);
    nobody.is_the_limit(stage).await;
    println!(
        "{}: {} cycles of {} calls in {took:.1?}: {first:?} after the first and the last, {growth} bytes more in the \
         second half, {stored} entries and then {}",
        stage.kind.name,
        early.cycles + late.cycles,
        early.calls + late.calls,
        stage.rig.lasting_entries(),
    );
    assert!(growth <= ALLOWANCE, "{growth} bytes more after the second half");
    at_most("entries", size.entries, || stage.rig.lasting_entries()).await;
}

/// How much was done.
#[derive(Clone, Copy, Debug)]
struct Done {
    cycles: usize,
    calls: usize,
}

/// Grants, and some calls that don't come to one.
async fn go_round(providers: &[Arc<dyn LockProvider>; 2], end: End, random: &mut Random) -> Done {
    let started = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let highest: Arc<[AtomicU64; NAMES]> = Arc::default();
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let create = |name| providers[caller % 2].create_lock(&format!("turn/{name}"));
        let locks: Vec<_> = (0..NAMES).map(create).collect();
        let (started, highest) = (started.clone(), highest.clone());
        let mut random = Random(random.below(u64::MAX) | 1);
        callers.spawn(async move {
            let places: [usize; NAMES] = std::array::from_fn(|place| place);
            let mut done = Done { cycles: 0, calls: 0 };
            loop {
                let ends = match end {
                    End::Cycles(cycles) => started.fetch_add(1, Ordering::Relaxed) >= cycles,
                    End::Time(time) => began.elapsed() >= time,
                };
                if ends {
                    return done;
                }
                done.cycles += 1;
                loop {
                    let place = *random.pick(&places);
                    let how = random.below(10);
                    done.calls += 1;
                    if let Some(guard) = call(&*locks[place], how, random.below(2000)).await {
                        let token = guard.fencing_token().get();
                        let before = highest[place].swap(token, Ordering::SeqCst);
                        assert!(before < token, "{token} after {before}");
                        // The others are dropped.
                        if random.below(2) == 0 {
                            guard.release().await.expect("it was held");
                        }
                        break;
                    }
                }
            }
        });
    }
    let patience = match end {
        End::Cycles(cycles) => PATIENCE + EACH * u32::try_from(cycles).unwrap_or(u32::MAX),
        End::Time(time) => PATIENCE + time,
    };
    let all = timeout(patience, callers.join_all()).await;
    let all = all.unwrap_or_else(|_| panic!("not all are through within {patience:?}"));
    all.into_iter().fold(Done { cycles: 0, calls: 0 }, |sum, done| Done {
        cycles: sum.cycles + done.cycles,
        calls: sum.calls + done.calls,
    })
}

/// One of the ways to ask for a lock.
async fn call(lock: &dyn DistributedLock, how: u64, micros: u64) -> Option<LockGuard> {
    let time = Duration::from_micros(micros);
    match how {
        0..=3 => Some(lock.acquire().await.expect("granted in the end")),
        4..=5 => lock.try_acquire().await.expect("the server is there"),
        6..=7 => match lock.try_acquire_for(time).await {
            Ok(granted) => granted,
            // A server that isn't as quick as that, which is no outage to those who have more time.
            Err(error) if error.kind() == ErrorKind::Unknown => None,
            Err(error) => panic!("the server is there: {error:?}"),
        },
        // Given up at any point.
        _ => timeout(time, lock.acquire()).await.ok().map(|granted| granted.expect("the server is there")),
    }
}
