//! [`Attempt`]: one claim under way, which is never just forgotten.

use std::sync::Arc;

use super::Engine;
use super::releaser::Job;
use crate::backend::{Backend, Claim};

/// A claim that may have reached the server. Unless it is disarmed, by an answer that leaves nothing behind, dropping it
/// at whatever point has it abandoned; until that is done the name stays occupied.
pub(super) struct Attempt<'a, B: Backend> {
    engine: &'a Arc<Engine<B>>,
    pub(super) claim: Claim,
    armed: bool,
}

impl<'a, B: Backend> Attempt<'a, B> {
    pub(super) fn new(engine: &'a Arc<Engine<B>>, claim: Claim) -> Self {
        Self { engine, claim, armed: true }
    }

    pub(super) fn disarm(mut self) -> Claim {
        self.armed = false;
        self.claim.clone()
    }
}

impl<B: Backend> Drop for Attempt<'_, B> {
    fn drop(&mut self) {
        if self.armed {
            self.engine.queues.begin_freeing(&self.claim.name);
            self.engine.releaser.push(self.engine, Job::Abandon(self.claim.clone()));
        }
    }
}
