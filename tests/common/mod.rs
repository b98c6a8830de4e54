//! What several test files share.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod faulty;
pub(crate) mod history;

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// A runtime of one thread.
pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().expect("a runtime")
}

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
