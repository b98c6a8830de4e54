//! One workload on one backend: ours and those by hand take turns, round by round, so that what the machine does
//! meanwhile meets all of them.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::backends::{Backend, Limit, Purpose, Site};
use crate::locker::{OURS, Result};
use crate::measure::{as_f64, median, quantile};
use crate::process::Process;
use crate::report::Row;
use crate::workload::{CONTENDED, Scale, Taken, Workload};

/// So that the other process waits by the time of the release.
const SETTLE: Duration = Duration::from_millis(4);

/// What one round has shown.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    /// A time in nanoseconds, or a number per second.
    pub(crate) figure: f64,
    /// Of acquisitions per task.
    pub(crate) fewest_most: Option<f64>,
    pub(crate) worst: Option<f64>,
    pub(crate) commands: Option<f64>,
    pub(crate) busy: Option<f64>,
    pub(crate) connections: Option<f64>,
    pub(crate) server_memory: Option<f64>,
    pub(crate) usage: Option<Usage>,
}

/// What holding takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    pub(crate) per_second: f64,
    pub(crate) cpu: f64,
    pub(crate) memory: f64,
    pub(crate) lost: f64,
}

/// One way of taking locks, and how it did.
pub(crate) struct Contestant {
    way: &'static str,
    processes: Vec<Process>,
    pub(crate) samples: Vec<Sample>,
}

impl Contestant {
    /// The median over the rounds of what all of them have.
    pub(crate) fn median(&self, part: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let parts: Vec<_> = self.samples.iter().filter_map(part).collect();
        (!parts.is_empty()).then(|| median(parts))
    }

    pub(crate) fn worst(&self) -> Option<f64> {
        self.samples.iter().filter_map(|sample| sample.worst).max_by(f64::total_cmp)
    }
}

/// A row for each limit, none if the backend hasn't got this workload.
pub(crate) fn run(backend: &Backend, workload: Workload, scale: Scale) -> Result<Vec<Row>> {
    let limits = (backend.limits)(workload);
    if limits.is_empty() {
        return Ok(vec![]);
    }
    let mut contest = Contest::prepare(backend, workload, scale, &limits)?;
    // The first round is for connections to be made and scripts to be loaded.
    for round in 0..=scale.rounds() {
        for turn in 0..contest.contestants.len() {
            let who = (turn + round) % contest.contestants.len();
            let sample = contest.sample(who, round)?;
            if round > 0 {
                contest.contestants[who].samples.push(sample);
            }
        }
    }
    if workload == Workload::W5 {
        contest.hold()?;
    }
    let (ours, by_hand) = contest.contestants.split_last().ok_or("somebody takes part")?;
    let rows =
        limits.iter().zip(by_hand).map(|(limit, hand)| Row::new(backend.name, workload, limit, hand, ours));
    Ok(rows.collect())
}

struct Contest<'a> {
    backend: &'a Backend,
    workload: Workload,
    scale: Scale,
    /// One, or one for each contestant.
    sites: Vec<Box<dyn Site>>,
    /// Ours is the last.
    contestants: Vec<Contestant>,
}

impl<'a> Contest<'a> {
    fn prepare(backend: &'a Backend, workload: Workload, scale: Scale, limits: &[Limit]) -> Result<Self> {
        let purpose = match workload {
            Workload::W1 | Workload::W2(_) | Workload::W3 => Purpose::Times,
            _ => Purpose::Counts,
        };
        let ways: Vec<_> = limits.iter().map(|limit| limit.way).chain([OURS]).collect();
        let count = if workload == Workload::W5 { ways.len() } else { 1 };
        let sites = (0..count).map(|_| (backend.start)(purpose)).collect::<Result<Vec<_>>>()?;
        let contestants =
            ways.iter().map(|way| Contestant { way, processes: Vec::new(), samples: Vec::new() }).collect();
        let mut contest = Self { backend, workload, scale, sites, contestants };
        let processes = match workload {
            Workload::W3 if backend.name == "memory" => 1,
            Workload::W3 => 2,
            Workload::W4b | Workload::W4c => 4,
            Workload::W5 | Workload::W6(_) => 0, // new ones each round
            _ => 1,
        };
        for who in 0..ways.len() {
            for _ in 0..processes {
                let process = contest.start(who)?;
                contest.contestants[who].processes.push(process);
            }
        }
        Ok(contest)
    }

    fn site(&self, who: usize) -> &dyn Site {
        &**self.sites.get(who).unwrap_or(&self.sites[0])
    }

    fn start(&self, who: usize) -> Result<Process> {
        let (site, way) = (self.site(who), self.contestants[who].way);
        let url = if way == OURS { site.url() } else { site.raw_url() };
        Process::start(self.backend.name, way, &url)
    }

    fn sample(&mut self, who: usize, round: usize) -> Result<Sample> {
        let way = self.contestants[who].way;
        let name = format!("{way}-{round}");
        match self.workload {
            Workload::W1 => {
                let order = format!("cycle {name} {}", self.scale.of(self.backend.pace.cycles));
                Ok(Sample { figure: as_f64(self.first(who).ask_one(&order)?), ..Sample::default() })
            }
            Workload::W2(tasks) => {
                let each = (self.scale.of(self.backend.pace.many) / tasks).max(1);
                let took = self.first(who).ask_one(&format!("many {name} {tasks} {each}"))?;
                let operations = (2 * tasks * each) as u64;
                Ok(Sample { figure: as_f64(operations) / (as_f64(took) / 1e9), ..Sample::default() })
            }
            Workload::W3 => self.hand_over(who),
            Workload::W4a => self.contend(who, 32, 600, (0, 0)),
            Workload::W4b => self.contend(who, 8, 600, (0, 0)),
            Workload::W4c => self.contend(who, 8, 1_500, (2_000, 20_000)),
            Workload::W5 => {
                let order = format!("take {name} {} 3000 at-once", self.held());
                Ok(Sample { figure: as_f64(self.start(who)?.ask_one(&order)?), ..Sample::default() })
            }
            Workload::W6(taken) => self.take(who, &name, taken),
        }
    }

    fn first(&mut self, who: usize) -> &mut Process {
        &mut self.contestants[who].processes[0]
    }

    fn held(&self) -> usize {
        if self.scale.quick { 1_000 } else { 10_000 }
    }

    fn hand_over(&mut self, who: usize) -> Result<Sample> {
        let times = self.scale.of(self.backend.pace.handovers);
        let mut took = match &mut self.contestants[who].processes[..] {
            [both] => both.ask(&format!("handover {CONTENDED} {times} {}", SETTLE.as_millis()))?,
            [from, to, ..] => {
                let mut took = Vec::new();
                for _ in 0..times {
                    from.ask(&format!("lock {CONTENDED}"))?;
                    to.tell(&format!("lock {CONTENDED}"))?;
                    sleep(SETTLE);
                    let released = from.ask_one("unlock")?;
                    took.push(to.hear()?[0].saturating_sub(released));
                    to.ask("unlock")?;
                }
                took
            }
            [] => return Err("nobody is there".into()),
        };
        Ok(Sample { figure: as_f64(quantile(&mut took, 50)), ..Sample::default() })
    }

    /// Many tasks want the same lock for a while.
    fn contend(
        &mut self,
        who: usize,
        tasks: usize,
        millis: u64,
        (held, pause): (u64, u64),
    ) -> Result<Sample> {
        let millis = self.scale.millis(millis);
        let way = self.contestants[who].way;
        let before = self.site(who).commands(way);
        let order = format!("contend {CONTENDED} {tasks} {millis} {held} {pause}");
        let processes = &mut self.contestants[who].processes;
        for process in &mut *processes {
            process.tell(&order)?;
        }
        let (mut took, mut counts, mut worst, mut busy, mut waits) = (0, Vec::new(), 0, 0, Vec::new());
        for process in processes {
            let numbers = process.hear()?;
            let (tasks, its_waits) = numbers[1..].split_at(3 * tasks);
            took = took.max(numbers[0]);
            for task in tasks.chunks(3) {
                counts.push(task[0]);
                worst = worst.max(task[1]);
                busy += task[2];
            }
            waits.extend_from_slice(its_waits);
        }
        let (seconds, total) = (as_f64(took) / 1e9, as_f64(counts.iter().sum()));
        let fewest = counts.iter().min().map_or(0.0, |count| as_f64(*count));
        let most = counts.iter().max().map_or(0.0, |count| as_f64(*count));
        let commands = before.zip(self.site(who).commands(way)).map(|(before, after)| as_f64(after - before));
        Ok(Sample {
            figure: if held > 0 { as_f64(quantile(&mut waits, 99)) } else { total / seconds },
            fewest_most: Some(fewest / most),
            worst: Some(as_f64(worst)),
            commands: commands.map(|commands| commands / total),
            busy: (held > 0).then(|| as_f64(busy) / as_f64(took)),
            ..Sample::default()
        })
    }

    /// 1,000 locks by a new process.
    fn take(&mut self, who: usize, name: &str, taken: Taken) -> Result<Sample> {
        let site = self.site(who);
        // Those of the process before.
        let began = Instant::now();
        while site.connections().is_some_and(|open| open > 0) && began.elapsed() < Duration::from_secs(5) {
            sleep(Duration::from_millis(10));
        }
        let before = site.memory();
        let mut process = self.start(who)?;
        let how = if taken == Taken::OneByOne { "serial" } else { "at-once" };
        let took = process.ask_one(&format!("take {name} {} 30000 {how}", self.scale.of(1_000)))?;
        let grown = before.zip(site.memory()).map(|(before, after)| as_f64(after.saturating_sub(before)));
        Ok(Sample {
            figure: as_f64(took),
            connections: site.connections().map(as_f64),
            server_memory: grown,
            ..Sample::default()
        })
    }

    /// All hold what they have taken, at the same time, each on a server of its own.
    fn hold(&mut self) -> Result<()> {
        let (locks, time) = (self.held(), Duration::from_millis(self.scale.millis(12_000)));
        let mut holders = Vec::new();
        for who in 0..self.contestants.len() {
            let mut process = self.start(who)?;
            process.ask(&format!("take held {locks} 3000 at-once"))?;
            holders.push(process);
        }
        let mut before = Vec::new();
        for (who, process) in holders.iter_mut().enumerate() {
            let commands = self.site(who).commands(self.contestants[who].way);
            before.push((Instant::now(), process.ask("usage")?[0], commands.unwrap_or(0)));
        }
        sleep(time);
        for (who, (process, (began, cpu, commands))) in holders.iter_mut().zip(before).enumerate() {
            let later = self.site(who).commands(self.contestants[who].way).unwrap_or(0);
            let seconds = began.elapsed().as_secs_f64();
            let usage = process.ask("usage")?;
            let usage = Usage {
                per_second: as_f64(later - commands) / seconds,
                cpu: as_f64(usage[0] - cpu) / 1e9 / seconds,
                memory: as_f64(usage[1]),
                lost: as_f64(usage[2]),
            };
            for sample in &mut self.contestants[who].samples {
                sample.usage = Some(usage);
            }
        }
        Ok(())
    }
}
