#![doc = include_str!("../README.md")]

#[cfg(feature = "azure")]
pub mod azure;
pub mod backend;
mod capabilities;
mod clock;
mod connect;
mod engine;
mod error;
mod fencing;
pub mod file;
mod guard;
mod lock;
pub mod memory;
mod name;
mod options;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "sqlserver")]
pub mod sqlserver;
mod tenure;
#[cfg(feature = "testing")]
pub mod testing;

pub use capabilities::{Capabilities, Expiry, Fairness};
pub use connect::connect;
pub use engine::{Provider, ProviderBuilder};
pub use error::{Error, ErrorKind, Result};
pub use fencing::{FencingGate, FencingToken, StaleToken};
pub use guard::{LockGuard, Loss, Run};
pub use lock::{DistributedLock, LockProvider};
pub use name::LockName;
pub use options::LockOptions;
