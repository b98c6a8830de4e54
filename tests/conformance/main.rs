//! All backends, run through the conformance suite.

#[cfg(feature = "azure")]
mod azure;
mod embedded;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
#[cfg(any(feature = "azure", feature = "postgres", feature = "redis", feature = "sqlserver"))]
#[path = "../servers/mod.rs"]
mod servers;
#[cfg(feature = "sqlserver")]
mod sqlserver;

use std::process::ExitCode;

use fencelock::backend::Backend;
use fencelock::{LockOptions, LockProvider, Provider, testing};

fn main() -> ExitCode {
    let mut targets = embedded::targets();
    #[cfg(feature = "redis")]
    targets.extend(redis::targets());
    #[cfg(feature = "postgres")]
    targets.extend(postgres::targets());
    #[cfg(feature = "sqlserver")]
    targets.extend(sqlserver::targets());
    #[cfg(feature = "azure")]
    targets.extend(azure::targets());
    let outcome = testing::main(targets);
    #[cfg(feature = "postgres")]
    postgres::stop_servers();
    #[cfg(feature = "sqlserver")]
    sqlserver::stop_servers();
    #[cfg(feature = "azure")]
    azure::stop_server();
    outcome
}

fn provider(backend: impl Backend, options: LockOptions) -> Box<dyn LockProvider> {
    Box::new(Provider::builder(backend).options(options).build().expect("these options can be"))
}
