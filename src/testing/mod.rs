//! The conformance suite: what any [`Backend`](crate::backend::Backend) has to show before its locks can be relied on.
//!
//! A backend is a [`Target`]; [`main`] runs it through every one of the [`checks`], as one named trial each, in a test
//! target that has `harness = false`:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use std::sync::Arc;
//! use fencelock::testing::{self, Target};
//! # use fencelock::{Capabilities, LockOptions, LockProvider};
//! # use fencelock::testing::Harness;
//! # #[derive(Debug)] struct MyBackend;
//! # #[async_trait::async_trait] impl Target for MyBackend {
//! #     fn name(&self) -> &str { "mine" }
//! #     fn capabilities(&self) -> Capabilities { unreachable!() }
//! #     async fn start(&self) -> Box<dyn Harness> { unreachable!() }
//! # }
//!
//! fn main() -> ExitCode {
//!     testing::main(vec![Arc::new(MyBackend)])
//! }
//! ```
//!
//! `examples/custom_backend.rs` is a whole backend with its target. A check that a target can't be put through, because
//! it can't be reached from another process, say, shows as *ignored*, never as passed.
//!
//! The checks assert exact lower bounds ("not before") and only such upper bounds as the documentation promises, with
//! room for a machine that is busy with other things. They await events, not time, and each for at most 30 s.

#![allow(
    clippy::missing_panics_doc,
    reason = "a check panics where the backend fails it: that is what it is for"
)]

pub mod checks;
mod child;
mod runner;
mod steps;
mod subject;

use std::fmt::Debug;

use async_trait::async_trait;

pub use self::runner::main;
pub use self::subject::{Clock, Subject};
use crate::{Capabilities, LockOptions, LockProvider, Loss};

/// A backend under test. Made once, in the test's process and in each of its child processes.
#[async_trait]
pub trait Target: Debug + Send + Sync + 'static {
    /// What its trials are called: `NAME::group::check`.
    fn name(&self) -> &str;

    /// What its providers say that they can do. It has to be known before anything is started, and it is compared with
    /// what they say.
    fn capabilities(&self) -> Capabilities;

    /// Whether its locks can be had from several processes: by [`attach`](Self::attach) to what
    /// [`Harness::address`] says.
    fn crosses_processes(&self) -> bool {
        false
    }

    /// Whether [`Harness::lose`] can take a lock away from its holder.
    fn takes_away(&self) -> bool {
        false
    }

    /// Whether all of it runs by tokio's clock and in the caller's runtime: then what is about time runs on a paused
    /// clock, takes none, and is judged to the millisecond.
    fn virtual_time(&self) -> bool {
        false
    }

    /// Makes an empty store that no other trial sees.
    async fn start(&self) -> Box<dyn Harness>;

    /// A provider on the store at this [`address`](Harness::address), from a child process.
    async fn attach(&self, address: &str) -> Box<dyn LockProvider> {
        panic!("{} says that it crosses processes, but has no `attach` for {address}", self.name())
    }
}

/// A store that one trial has for itself. It is dropped when the trial is over.
#[async_trait]
pub trait Harness: Debug + Send + Sync + 'static {
    /// Another provider on the store: with whatever a second instance of a service would have for itself, such as
    /// connections. `options` are its defaults. It is called from several runtimes.
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider>;

    /// Where [`Target::attach`] finds the store.
    fn address(&self) -> String {
        panic!("{self:?} crosses processes, but has no `address`")
    }

    /// Takes the lock of this name away from its holder, as an administrator would, and says which loss the holder has
    /// to hear of.
    async fn lose(&self, name: &str) -> Loss {
        panic!("{self:?} can't take {name:?} away, although its target says so")
    }

    /// What must not be seen in any message: passwords and the like.
    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }
}
