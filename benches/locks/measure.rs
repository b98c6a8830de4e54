//! Times, shares and sizes, and how they are written.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::locker::Result;

/// Of a few figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quartiles {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Quartiles {
    /// `None` of none.
    pub(crate) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_unstable_by(f64::total_cmp);
        let last = figures.len().checked_sub(1)?;
        let at = |quarter: usize| {
            let (whole, rest) = (last * quarter / 4, last * quarter % 4);
            let next = figures[last.min(whole + 1)];
            figures[whole] + (next - figures[whole]) * as_f64(rest as u64) / 4.0
        };
        Some(Self { low: at(1), median: at(2), high: at(3) })
    }
}

/// `NaN` of none.
pub(crate) fn median(figures: Vec<f64>) -> f64 {
    Quartiles::of(figures).map_or(f64::NAN, |quartiles| quartiles.median)
}

/// Sorts them.
pub(crate) fn quantile(figures: &mut [u64], percent: usize) -> u64 {
    figures.sort_unstable();
    figures.len().checked_sub(1).map_or(0, |last| figures[last * percent / 100])
}

#[expect(clippy::cast_precision_loss, reason = "below 2^53")]
pub(crate) fn as_f64(number: u64) -> f64 {
    number as f64
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A clock that all processes of the machine share, in nanoseconds.
pub(crate) fn now() -> u64 {
    read(ClockId::Monotonic)
}

/// What this process has used so far, in nanoseconds.
pub(crate) fn cpu_time() -> u64 {
    read(ClockId::ProcessCPUTime)
}

fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0) * 1_000_000_000 + nanos.unwrap_or(0)
}

/// What this process has in memory, in bytes.
pub(crate) fn memory() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("Linux says it")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

pub(crate) fn mib(bytes: f64) -> String {
    format!("{:.0} MiB", bytes / f64::from(1 << 20))
}

/// A time in nanoseconds.
pub(crate) fn time(nanos: f64) -> String {
    match nanos {
        1e9.. => format!("{:.2} s", nanos / 1e9),
        1e7.. => format!("{:.0} ms", nanos / 1e6),
        1e6.. => format!("{:.1} ms", nanos / 1e6),
        1e5.. => format!("{:.0} µs", nanos / 1e3),
        1e3.. => format!("{:.1} µs", nanos / 1e3),
        _ => format!("{nanos:.0} ns"),
    }
}

/// A number, with commas between thousands.
pub(crate) fn count(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
