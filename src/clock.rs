//! [`Instant`]: time that passes during suspend, and that tokio's paused clock can move.

use std::ops::Add;
use std::sync::LazyLock;
use std::time::Duration;

/// A moment by which grants are judged.
///
/// It is tokio's time, so that tests can pause and advance it, plus all the time that the machine has been suspended,
/// which [`std::time::Instant`] leaves out on Unix: a laptop that slept for an hour has lost a 30 s lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(i64);

impl Instant {
    /// So far ahead that no clock reaches it: no deadline.
    pub(crate) const NEVER: Self = Self(i64::MAX);

    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self(tokio_nanos().saturating_add(suspended_nanos()))
    }

    /// Whether this moment lies in the past.
    #[must_use]
    pub fn has_passed(self) -> bool {
        self.has_passed_at(Self::now())
    }

    /// How long it is until then; zero if it has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.since(Self::now())
    }

    /// How long ago it was; zero if it is ahead.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0).max(0).cast_unsigned())
    }

    pub(crate) fn has_passed_at(self, now: Self) -> bool {
        self <= now
    }

    /// This moment moved back.
    pub(crate) fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }

    pub(crate) fn to_nanos(self) -> i64 {
        self.0
    }

    pub(crate) fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }
}

/// Saturates: a moment too far ahead to represent is never reached.
impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// Tokio's clock: `CLOCK_MONOTONIC`, or whatever a paused runtime makes of it.
fn tokio_nanos() -> i64 {
    static EPOCH: LazyLock<tokio::time::Instant> = LazyLock::new(tokio::time::Instant::now);
    let (epoch, now) = (*EPOCH, tokio::time::Instant::now());
    match now.checked_duration_since(epoch) {
        Some(since) => nanos(since),
        None => -nanos(epoch.duration_since(now)), // a paused clock that stands before the epoch
    }
}

/// How long the machine has been suspended since this process began to ask, within [`TOLERANCE`].
///
/// It is the lead of a clock that runs on during suspend over `std`'s, which stops. The two can't be read at one
/// moment: being preempted in between looks like a suspend. So a lead counts once it has grown by more than the
/// tolerance, and the smallest of a few readings is taken.
#[cfg(unix)]
fn suspended_nanos() -> i64 {
    use std::sync::atomic::{AtomicI64, Ordering};

    /// 50 ms.
    const TOLERANCE: i64 = 50_000_000;
    static EPOCH: LazyLock<(std::time::Instant, i64)> =
        LazyLock::new(|| (std::time::Instant::now(), suspend_aware_nanos()));
    static LEAD: AtomicI64 = AtomicI64::new(0);

    let &(epoch, suspend_aware_epoch) = LazyLock::force(&EPOCH);
    let lead = || {
        let awake = nanos(epoch.elapsed());
        suspend_aware_nanos().saturating_sub(suspend_aware_epoch).saturating_sub(awake)
    };
    let known = LEAD.load(Ordering::Relaxed);
    if lead() <= known.saturating_add(TOLERANCE) {
        return known;
    }
    let lead = (0..5).map(|_| lead()).min().unwrap_or(known);
    if lead > known.saturating_add(TOLERANCE) {
        LEAD.fetch_max(lead, Ordering::Relaxed).max(lead)
    } else {
        known
    }
}

/// Apple's `CLOCK_MONOTONIC` counts time asleep; the other Unixes have nothing better, or don't sleep.
#[cfg(unix)]
fn suspend_aware_nanos() -> i64 {
    use rustix::time::{ClockId, clock_gettime};

    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: ClockId = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: ClockId = ClockId::Monotonic;
    let time = clock_gettime(CLOCK);
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

/// `std`'s clock, and so tokio's, runs on during suspend on Windows.
#[cfg(not(unix))]
fn suspended_nanos() -> i64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn far_is_never() {
        assert_eq!(Instant::now() + Duration::MAX, Instant::NEVER);
        assert!(!Instant::NEVER.has_passed());
    }

    #[test]
    fn a_process_that_was_not_suspended_has_no_lead() {
        assert_eq!(suspended_nanos(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn follows_a_paused_clock_and_no_other() {
        let deadline = Instant::now() + 60 * SECOND;
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(deadline.remaining(), 60 * SECOND);
        tokio::time::advance(60 * SECOND).await;
        assert!(deadline.has_passed());
        assert_eq!(deadline.before(60 * SECOND).elapsed(), 60 * SECOND);
    }
}
