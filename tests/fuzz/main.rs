//! What a user or a disk can pass, and nobody would write by hand: names, URLs, and the content of lock files.
//!
//! Each test runs for `FENCELOCK_FUZZ_SECONDS` (3 by default; some for a sixth of it) on random input, which isn't
//! guided by what code it reaches. A failure prints the input, and a `BOLERO_RANDOM_SEED` which runs it again.

mod lock_file;
mod names;
mod urls;

use std::ops::Bound;
use std::time::Duration;

use bolero::Driver;

/// For how long each test looks for a failure.
fn budget() -> Duration {
    let seconds = match std::env::var("FENCELOCK_FUZZ_SECONDS") {
        Ok(seconds) => seconds.parse().expect("FENCELOCK_FUZZ_SECONDS is a number"),
        Err(_) => 3.0,
    };
    Duration::from_secs_f64(seconds)
}

/// The same for tests that chance alone rarely makes interesting, or that are slow.
fn short_budget() -> Duration {
    budget() / 6
}

/// Makes choices by what the engine says. `None` everywhere: it has no more to say.
struct Choices<'a, D>(&'a mut D);

impl<D: Driver> Choices<'_, D> {
    /// A number from 0 to less than that.
    fn below(&mut self, end: usize) -> Option<usize> {
        self.0.gen_usize(Bound::Included(&0), Bound::Excluded(&end))
    }

    fn one_in(&mut self, times: usize) -> Option<bool> {
        Some(self.below(times)? == 0)
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        Some(all[self.below(all.len())?].clone())
    }

    fn number(&mut self) -> Option<u64> {
        self.0.produce()
    }

    fn character(&mut self) -> Option<char> {
        self.0.produce()
    }

    /// Up to so many of these pieces, one after the other.
    fn text(&mut self, pieces: &[&str], most: usize) -> Option<String> {
        let count = self.below(most + 1)?;
        (0..count).map(|_| self.of(pieces)).collect()
    }
}
