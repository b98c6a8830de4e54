//! Exponential back-off with full jitter, so that those who failed together don't come again together.

use std::time::Duration;

/// Delays drawn evenly from zero up to a bound, which doubles each time until it reaches `cap` ("full jitter": AWS
/// Architecture Blog, "Exponential Backoff And Jitter").
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
    bound: Duration,
}

impl Backoff {
    /// Between retries of what has failed: from 10 ms to 1 s.
    pub(crate) fn between_retries() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_secs(1))
    }

    /// Between looks at a lock whose backend doesn't wait: from 10 ms to 500 ms.
    pub(crate) fn between_polls() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_millis(500))
    }

    pub(crate) fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, bound: base }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let delay = jitter(self.bound);
        self.bound = (self.bound * 2).min(self.cap);
        delay
    }

    /// As it is after so many failures.
    pub(crate) fn after(mut self, failures: u32) -> Self {
        for _ in 0..failures {
            self.bound = (self.bound * 2).min(self.cap);
        }
        self
    }

    pub(crate) fn reset(&mut self) {
        self.bound = self.base;
    }
}

/// An even draw from zero up to `bound`.
pub(crate) fn jitter(bound: Duration) -> Duration {
    // Without random numbers nobody can claim anything anyway; half is as good a spread as one gets then.
    let draw = getrandom::u32().unwrap_or(u32::MAX / 2);
    bound.mul_f64(f64::from(draw) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_cap_and_starts_again() {
        let (base, cap) = (Duration::from_millis(10), Duration::from_millis(35));
        let mut backoff = Backoff::new(base, cap);
        for bound in [10, 20, 35, 35] {
            assert!(backoff.next() <= Duration::from_millis(bound));
        }
        backoff.reset();
        assert!(backoff.next() <= base);
    }

    #[test]
    fn spreads() {
        let second = Duration::from_secs(1);
        let draws: Vec<_> = (0..200).map(|_| jitter(second)).collect();
        assert!(
            draws.iter().any(|&draw| draw < second / 4) && draws.iter().any(|&draw| draw > second / 4 * 3)
        );
        assert!(draws.iter().all(|&draw| draw <= second));
    }
}
