//! The checks: each is a public function over a [`Subject`] that panics where the backend fails it.
//!
//! [`testing::main`](super::main) runs them all. Called by hand, each needs a [`Subject`] of its own, since they use
//! the same names. Those that start child processes ([`abandonment`], [`contention::processes`]) work below
//! [`testing::main`](super::main) only, which plays the child's part.

pub mod abandonment;
pub mod cancellation;
pub mod closing;
pub mod contention;
pub mod dropping;
pub mod exclusion;
pub mod handles;
pub mod loss;
pub mod names;
pub mod options;
pub mod queueing;
pub mod running;
pub mod secrecy;
pub mod terms;
pub mod waiting;

use std::future::Future;
use std::pin::Pin;

use super::{Clock, Subject, Target};

/// A check as the runner sees it.
pub(super) struct Check {
    pub(super) name: &'static str,
    /// By which clock it runs on a target that has the choice.
    pub(super) clock: Clock,
    needs: &'static [Need],
    pub(super) run: fn(Subject) -> Pin<Box<dyn Future<Output = ()>>>,
}

/// What a target must have for a check to make sense.
#[derive(Clone, Copy)]
enum Need {
    Processes,
    TakingAway,
    WokenWaiters,
    KeepingAfterExit,
}

impl Need {
    /// Why the target doesn't have it, if so.
    fn lacking(self, target: &dyn Target) -> Option<&'static str> {
        let (has, lacking) = match self {
            Self::Processes => (target.crosses_processes(), "its locks can't be had from another process"),
            Self::TakingAway => (target.takes_away(), "nobody can take its locks away"),
            Self::WokenWaiters => (target.capabilities().wakes_waiters, "its waiters poll"),
            Self::KeepingAfterExit => {
                (target.capabilities().keeps_after_exit, "its hold_at_least ends with the process")
            }
        };
        (!has).then_some(lacking)
    }
}

impl Check {
    /// Why the target can't be put through it, if so.
    pub(super) fn obstacle(&self, target: &dyn Target) -> Option<&'static str> {
        self.needs.iter().find_map(|need| need.lacking(target))
    }
}

macro_rules! checks {
    ($($clock:ident: $group:ident :: { $($check:ident $([$($need:ident),+])?,)+ })+) => {
        &[$($(Check {
            name: concat!(stringify!($group), "::", stringify!($check)),
            clock: Clock::$clock,
            needs: &[$($(Need::$need),+)?],
            run: |subject| Box::pin($group::$check(subject)),
        }),+),+]
    };
}

pub(super) const CHECKS: &[Check] = checks! {
    Real: exclusion::{
        one_holder_per_name,
        tokens_increase,
    }
    Real: contention::{
        tasks,
        processes [Processes],
    }
    Paused: waiting::{
        a_timeout_of_zero_is_one_attempt,
        a_timeout_is_kept,
        a_release_ends_the_wait,
        waiters_of_one_provider_are_woken,
        waiters_of_another_provider_are_woken [WokenWaiters],
    }
    Real: queueing::{
        first_come_first_served,
        a_cancelled_waiter_is_passed_over,
    }
    Real: cancellation::{
        acquire,
        try_acquire,
        try_acquire_for,
        release,
    }
    Real: dropping::{
        inside_a_runtime,
        outside_a_runtime,
        after_its_runtime_is_gone,
        in_a_panic,
    }
    Paused: loss::{
        expiry_is_pushed,
        taking_away_is_pushed [TakingAway],
        a_release_is_no_loss,
        a_stale_release_spares_the_new_holder,
        a_stale_drop_spares_the_new_holder,
        releasing_what_was_taken_spares_the_new_holder [TakingAway],
        a_release_says_that_it_was_taken [TakingAway],
    }
    Paused: running::{
        a_job_is_run_to_its_end,
        expiry_stops_the_job,
        taking_away_stops_the_job [TakingAway],
        a_release_stops_the_job,
    }
    Real: running::{
        a_frozen_job_takes_no_further_step,
    }
    Paused: terms::{
        renewal_keeps_it,
        without_renewal_it_expires,
        max_hold_ends_it,
        hold_at_least_keeps_it_after_a_release,
        hold_at_least_keeps_it_after_a_drop,
        hold_at_least_ends,
    }
    Real: names::{
        any_string_is_a_lock_of_its_own,
    }
    Real: options::{
        what_cannot_be_is_said_at_once,
        a_lock_inherits_what_it_leaves_unset,
    }
    Real: closing::{
        dropped_grants_are_free,
        abandoned_attempts_are_free,
        waiters_and_newcomers_are_refused,
        guards_outlive_it_or_hear_of_it,
        twice_is_fine,
        the_first_poll_closes,
        other_providers_go_on,
    }
    Real: abandonment::{
        a_killed_holder_loses_it [Processes],
        an_exited_holder_loses_it [Processes],
        hold_at_least_outlives_the_process [Processes, KeepingAfterExit],
    }
    Real: handles::{
        boxes_arcs_and_references,
        a_try_sees_the_drop_before_it,
        one_provider_serves_many_runtimes,
    }
    Real: secrecy::{
        nothing_secret_is_shown,
    }
};
