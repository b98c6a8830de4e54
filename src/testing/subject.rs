//! [`Subject`]: a backend with a store of its own, as each check gets it, and the times it is judged by.

use std::sync::Arc;
use std::time::Duration;

use super::{Harness, Target};
use crate::{Capabilities, LockOptions, LockProvider, Loss};

/// By which clock a check runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// By the machine's.
    Real,
    /// By tokio's, paused: it stands still while anything runs, and jumps when all wait.
    Paused,
}

/// A backend with a store of its own: what a check is run on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Subject {
    target: Arc<dyn Target>,
    harness: Arc<dyn Harness>,
    clock: Clock,
}

impl Subject {
    /// Servers keep whole milliseconds, and a moment may be rounded twice.
    pub(super) const CLOCK_GRAIN: Duration = Duration::from_millis(5);

    /// Starts a store of the target's. `clock` tells by which clock the current runtime goes; [`Clock::Paused`] is for
    /// a target with [`virtual_time`](Target::virtual_time) only.
    pub async fn start(target: Arc<dyn Target>, clock: Clock) -> Self {
        let subject = Self { harness: target.start().await.into(), target, clock };
        let said = subject.provider().await.capabilities();
        assert_eq!(said, subject.capabilities(), "the target declares other capabilities than its providers");
        subject
    }

    pub(super) fn target(&self) -> &dyn Target {
        &*self.target
    }

    pub(super) fn harness(&self) -> &dyn Harness {
        &*self.harness
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.target.capabilities()
    }

    /// A provider whose locks last.
    pub(super) async fn provider(&self) -> Box<dyn LockProvider> {
        self.provider_with(self.lasting()).await
    }

    pub(super) async fn provider_with(&self, options: LockOptions) -> Box<dyn LockProvider> {
        self.harness.provider(options).await
    }

    pub(super) async fn lose(&self, name: &str) -> Loss {
        self.harness.lose(name).await
    }

    /// A TTL so long that it can't be what has freed a lock within the time that a check waits.
    pub(super) fn lasting(&self) -> LockOptions {
        LockOptions::new().ttl(self.capabilities().max_ttl.min(Duration::from_secs(600)))
    }

    /// A TTL for what is to expire: a slow machine only makes it later.
    pub(super) fn short_ttl(&self) -> Duration {
        self.ttl(Duration::from_millis(400))
    }

    /// A TTL for what must not expire, although a slow machine renews late.
    pub(super) fn steady_ttl(&self) -> Duration {
        self.ttl(Duration::from_secs(2))
    }

    /// A TTL such that a heartbeat, with [`slack`](Self::slack), is over well before it has run out.
    pub(super) fn heartbeat_ttl(&self) -> Duration {
        self.ttl(Duration::from_secs(6))
    }

    /// How much later than promised something may be because the machine is busy.
    pub(super) fn slack(&self) -> Duration {
        match self.clock {
            Clock::Real => Duration::from_secs(3),
            Clock::Paused => Duration::from_millis(10), // each timer rounds up to a millisecond
        }
    }

    /// The backend's nearest to `wanted`.
    fn ttl(&self, wanted: Duration) -> Duration {
        let Capabilities { min_ttl, max_ttl, .. } = self.capabilities();
        wanted.clamp(min_ttl, max_ttl)
    }
}
