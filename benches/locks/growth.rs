//! How cost grows: an uncontended acquire must not depend on how many locks are held, nor a release on how many wait.

use std::thread::sleep;
use std::time::Duration;

use crate::backends::{Backend, Purpose, Site};
use crate::locker::{OURS, Result};
use crate::measure::{Quartiles, as_f64, count, median, time};
use crate::process::Process;
use crate::workload::{CONTENDED, Scale};

/// What a filter calls it.
pub(crate) const KEY: &str = "growth";

/// How many wait.
const WAITING: [usize; 3] = [1, 100, 5_000];

/// What counts as independent: figures of the same thing scatter by some percent.
const FLAT: f64 = 1.25;

pub(crate) struct Growth {
    cells: [String; 6],
    met: bool,
}

/// A process with a server of its own, which so many locks or waiters burden.
struct Burdened {
    burden: usize,
    site: Box<dyn Site>,
    process: Process,
    figures: Vec<f64>,
    /// What each lock or waiter takes of the process, in bytes.
    memory: f64,
}

impl Burdened {
    fn start(backend: &Backend, burden: usize, locks: usize) -> Result<Self> {
        let site = (backend.start)(Purpose::Holding(locks))?;
        let mut process = Process::start(backend.name, OURS, &site.url())?;
        process.ask(&format!("cycle warm-up {}", 500))?;
        Ok(Self { burden, site, process, figures: Vec::new(), memory: 0.0 })
    }

    /// Brings the burden, and notes what memory it takes.
    fn burden(&mut self, order: &str) -> Result<()> {
        let before = self.process.ask("usage")?[1];
        self.process.ask(order)?;
        sleep(Duration::from_millis(200));
        let grown = self.process.ask("usage")?[1].saturating_sub(before);
        self.memory = as_f64(grown) / as_f64(self.burden as u64);
        Ok(())
    }
}

pub(crate) fn run(backend: &Backend, scale: Scale) -> Result<Vec<Growth>> {
    if backend.held.is_empty() {
        return Ok(vec![]);
    }
    Ok([holding(backend, scale)?, waiting(backend, scale)?].into_iter().flatten().collect())
}

fn holding(backend: &Backend, scale: Scale) -> Result<Vec<Growth>> {
    let mut all = Vec::new();
    for &locks in backend.held {
        let locks = scale.of(locks).min(locks);
        let mut one = Burdened::start(backend, locks, locks)?;
        if locks > 0 {
            one.burden(&format!("take held {locks} 600000 at-once"))?;
        }
        all.push(one);
    }
    let cycles = scale.of(backend.pace.cycles / 2);
    for round in 0..scale.rounds() {
        for one in &mut all {
            let figure = one.process.ask(&format!("cycle round-{round} {cycles}"))?[1];
            one.figures.push(as_f64(figure));
        }
    }
    let mut rows = vec![Growth::time(backend, "acquire, by locks held", &all)];
    rows.extend(Growth::connections(backend, "connections, by locks held", &all));
    rows.extend(all.last().map(|most| Growth::memory(backend, "memory of a held lock", most)));
    Ok(rows)
}

fn waiting(backend: &Backend, scale: Scale) -> Result<Vec<Growth>> {
    let mut all = Vec::new();
    for waiters in WAITING {
        let mut one = Burdened::start(backend, scale.of(waiters), 0)?;
        one.process.ask(&format!("lock {CONTENDED}"))?;
        one.burden(&format!("wait {CONTENDED} {}", one.burden))?;
        all.push(one);
    }
    let times = scale.of(20);
    for _ in 0..scale.rounds() {
        for one in &mut all {
            let figure = one.process.ask_one(&format!("release {CONTENDED} {times}"))?;
            one.figures.push(as_f64(figure));
        }
    }
    let mut rows = vec![Growth::time(backend, "release, by waiters", &all)];
    rows.extend(Growth::connections(backend, "connections, by waiters", &all));
    rows.extend(all.last().map(|most| Growth::memory(backend, "memory of a waiter", most)));
    Ok(rows)
}

impl Growth {
    fn time(backend: &Backend, what: &str, all: &[Burdened]) -> Self {
        let of = |one: &Burdened| {
            format!("{}: {}", count(as_f64(one.burden as u64)), time(median(one.figures.clone())))
        };
        let figures: Vec<_> = all.iter().map(of).collect();
        let ratios = |least: &Burdened, most: &Burdened| {
            most.figures.iter().zip(&least.figures).map(|(most, least)| most / least).collect()
        };
        let ratio = all.first().zip(all.last()).and_then(|(least, most)| Quartiles::of(ratios(least, most)));
        let (grows, met) = match ratio {
            None => (String::new(), false),
            Some(of) => (format!("{:.2}× ({:.2}–{:.2})", of.median, of.low, of.high), of.median <= FLAT),
        };
        Self::row(backend, what, figures.join("; "), grows, format!("≤ {FLAT}×"), met)
    }

    fn connections(backend: &Backend, what: &str, all: &[Burdened]) -> Option<Self> {
        let counts: Vec<_> =
            all.iter().map(|one| Some((one.burden, one.site.connections()?))).collect::<Option<_>>()?;
        let figures: Vec<_> = counts
            .iter()
            .map(|(burden, open)| format!("{}: {open}", count(as_f64(*burden as u64))))
            .collect();
        let (first, last) = (counts.first()?.1, counts.last()?.1);
        let grows = format!("{:+}", last.cast_signed() - first.cast_signed());
        Some(Self::row(backend, what, figures.join("; "), grows, "no more".into(), last <= first))
    }

    fn memory(backend: &Backend, what: &str, most: &Burdened) -> Self {
        let figure = format!("{} bytes each, of {}", count(most.memory), count(as_f64(most.burden as u64)));
        Self::row(backend, what, figure, String::new(), String::new(), true)
    }

    fn row(backend: &Backend, what: &str, figures: String, grows: String, target: String, met: bool) -> Self {
        Self { cells: [backend.name.into(), what.into(), figures, grows, target, String::new()], met }
    }

    pub(crate) fn failed(backend: &Backend, error: &str) -> Self {
        Self::row(backend, KEY, error.to_owned(), String::new(), "to be measured".into(), false)
    }

    pub(crate) fn misses(&self) -> bool {
        !self.met
    }

    fn write(&self, judged: bool) -> String {
        let mut cells = self.cells.clone();
        cells[5] = match (judged, self.met) {
            _ if cells[4].is_empty() => String::new(),
            (false, _) => "not judged".into(),
            (true, true) => "met".into(),
            (true, false) => "**MISSED**".into(),
        };
        format!("| {} |", cells.join(" | "))
    }
}

pub(crate) fn table(rows: &[Growth], judged: bool) -> String {
    let header = "| backend | what | figures | from first to last | target | |\n|---|---|---|---|---|---|";
    let lines: Vec<_> = rows.iter().map(|row| row.write(judged)).collect();
    format!("{header}\n{}", lines.join("\n"))
}
