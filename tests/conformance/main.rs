//! All backends, run through the conformance suite.

mod embedded;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
#[cfg(any(feature = "postgres", feature = "redis"))]
#[path = "../servers/mod.rs"]
mod servers;

use std::process::ExitCode;

use fencelock::backend::Backend;
use fencelock::{LockOptions, LockProvider, Provider, testing};

fn main() -> ExitCode {
    let mut targets = embedded::targets();
    #[cfg(feature = "redis")]
    targets.extend(redis::targets());
    #[cfg(feature = "postgres")]
    targets.extend(postgres::targets());
    let outcome = testing::main(targets);
    #[cfg(feature = "postgres")]
    postgres::stop_servers();
    outcome
}

fn provider(backend: impl Backend, options: LockOptions) -> Box<dyn LockProvider> {
    Box::new(Provider::builder(backend).options(options).build().expect("these options can be"))
}
