//! The tables.

use crate::backends::Limit;
use crate::contest::{Contestant, Sample, Usage};
use crate::measure::{Quartiles, count, mib, time};
use crate::workload::Workload;

/// Ours beside one limit.
pub(crate) struct Row {
    cells: Vec<String>,
    targets: Vec<Target>,
}

/// What was to be reached, and whether it was.
struct Target {
    says: String,
    met: bool,
}

impl Row {
    pub(crate) fn new(
        backend: &str,
        workload: Workload,
        limit: &Limit,
        hand: &Contestant,
        ours: &Contestant,
    ) -> Self {
        let figure = |of: &Contestant| {
            let figure = of.median(|sample| Some(sample.figure)).unwrap_or(f64::NAN);
            if workload.is_rate() { count(figure) } else { time(figure) }
        };
        let ratios = ours.samples.iter().zip(&hand.samples).map(|(ours, hand)| ours.figure / hand.figure);
        let ratio = Quartiles::of(ratios.collect());
        let quartiles = |of: Quartiles| format!("{:.2} ({:.2}–{:.2})", of.median, of.low, of.high);
        let both = |part: fn(&Sample) -> Option<f64>, write: fn(f64) -> String| {
            let ours = ours.median(part)?;
            Some(format!("{} ({})", write(ours), hand.median(part).map_or_else(String::new, write)))
        };
        let two = |figure: f64| format!("{figure:.2}");
        let worst = ours.worst().zip(hand.worst());
        let cells = vec![
            backend.to_owned(),
            workload.label(),
            limit.says.to_owned(),
            format!("{} {}", workload.unit(), figure(hand)),
            figure(ours),
            ratio.map_or_else(String::new, quartiles),
            both(|sample| sample.fewest_most, two).unwrap_or_default(),
            worst.map_or_else(String::new, |(ours, hand)| format!("{} ({})", time(ours), time(hand))),
            both(|sample| sample.commands, two).unwrap_or_default(),
            usage(hand, ours),
        ];
        Self { cells, targets: judge(workload, limit, ours, ratio) }
    }

    /// One that couldn't be measured.
    pub(crate) fn failed(backend: &str, workload: &str, error: &str) -> Self {
        let mut cells = vec![String::new(); HEADER.len() - 2];
        (cells[0], cells[1], cells[2]) = (backend.to_owned(), workload.to_owned(), error.to_owned());
        Self { cells, targets: vec![Target { says: "to be measured".to_owned(), met: false }] }
    }

    pub(crate) fn misses(&self) -> bool {
        self.targets.iter().any(|target| !target.met)
    }

    fn write(&self, judged: bool) -> String {
        let says: Vec<_> = self.targets.iter().map(|target| target.says.as_str()).collect();
        let missed: Vec<_> =
            self.targets.iter().filter(|target| !target.met).map(|target| target.says.as_str()).collect();
        let verdict = match missed[..] {
            _ if !judged => "not judged".to_owned(),
            _ if says.is_empty() => String::new(),
            [] => "met".to_owned(),
            _ => format!("**MISSED**: {}", missed.join(", ")),
        };
        format!("| {} | {} | {verdict} |", self.cells.join(" | "), says.join(", "))
    }
}

const HEADER: [&str; 12] = [
    "backend",
    "workload",
    "by hand",
    "by hand: figure",
    "fencelock",
    "ratio (quartiles)",
    "fewest/most per task",
    "worst wait",
    "commands each",
    "beside that",
    "target",
    "",
];

/// In brackets: by hand.
pub(crate) fn table(rows: &[Row], judged: bool) -> String {
    let mut lines = vec![format!("| {} |", HEADER.join(" | ")), "|---".repeat(HEADER.len()) + "|"];
    lines.extend(rows.iter().map(|row| row.write(judged)));
    lines.join("\n")
}

fn usage(hand: &Contestant, ours: &Contestant) -> String {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let one = |of: &Contestant| {
        let mut parts = Vec::new();
        if let Some(busy) = of.median(|sample| sample.busy) {
            parts.push(format!("busy {}", percent(busy)));
        }
        if let Some(usage) = of.samples.first().and_then(|sample| sample.usage) {
            let Usage { per_second, cpu, memory, lost } = usage;
            parts.push(format!("{per_second:.0}/s, {} CPU, {}, {lost} lost", percent(cpu), mib(memory)));
        }
        if let Some(connections) = of.median(|sample| sample.connections) {
            parts.push(format!("{connections} connections"));
        }
        if let Some(memory) = of.median(|sample| sample.server_memory) {
            parts.push(format!("server + {}", mib(memory)));
        }
        parts.join(", ")
    };
    match (one(ours), one(hand)) {
        (ours, hand) if ours.is_empty() && hand.is_empty() => String::new(),
        (ours, hand) => format!("{ours} ({hand})"),
    }
}

fn judge(workload: Workload, limit: &Limit, ours: &Contestant, ratio: Option<Quartiles>) -> Vec<Target> {
    let wanted = &limit.targets;
    let usage = |part: fn(&Usage) -> f64| {
        ours.samples.first().and_then(|sample| sample.usage).map(|usage| part(&usage))
    };
    let median = |part: fn(&Sample) -> Option<f64>| ours.median(part);
    let two = |figure: f64, rest: &str| format!("{figure}{rest}");
    let at_least = |wanted: Option<f64>, is: Option<f64>, says: String| {
        wanted.map(|wanted| Target { says: format!("≥ {says}"), met: is.is_some_and(|is| is >= wanted) })
    };
    let at_most = |wanted: Option<f64>, is: Option<f64>, says: String| {
        wanted.map(|wanted| Target { says: format!("≤ {says}"), met: is.is_some_and(|is| is <= wanted) })
    };
    let is = ratio.map(|ratio| ratio.median);
    let or_nan = |wanted: Option<f64>| wanted.unwrap_or(f64::NAN);
    let ratio_says = format!("{:.2}×", or_nan(wanted.ratio));
    let targets = [
        if workload.is_rate() {
            at_least(wanted.ratio, is, ratio_says)
        } else {
            at_most(wanted.ratio, is, ratio_says)
        },
        at_most(wanted.commands, median(|sample| sample.commands), two(or_nan(wanted.commands), " commands")),
        at_least(
            wanted.fewest_most,
            median(|sample| sample.fewest_most),
            two(or_nan(wanted.fewest_most), " fewest/most"),
        ),
        at_most(wanted.worst, ours.worst(), format!("{} wait", time(or_nan(wanted.worst)))),
        at_least(
            wanted.busy,
            median(|sample| sample.busy),
            format!("{:.0} % busy", or_nan(wanted.busy) * 100.0),
        ),
        at_most(wanted.per_second, usage(|usage| usage.per_second), two(or_nan(wanted.per_second), "/s")),
        at_most(wanted.cpu, usage(|usage| usage.cpu), format!("{:.0} % CPU", or_nan(wanted.cpu) * 100.0)),
        at_most(wanted.memory, usage(|usage| usage.memory), mib(or_nan(wanted.memory))),
        at_most(wanted.lost, usage(|usage| usage.lost), two(or_nan(wanted.lost), " lost")),
        at_most(
            wanted.connections,
            median(|sample| sample.connections),
            two(or_nan(wanted.connections), " connections"),
        ),
    ];
    targets.into_iter().flatten().collect()
}
