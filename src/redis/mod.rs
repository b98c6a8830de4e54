//! The `redis` backend.

mod failure;
mod inbox;
mod keys;
mod link;
mod redlock;
mod script;
mod single;
mod url;
mod waiting;

use std::sync::Arc;

/// The driver, whose types the constructors take.
pub use redis as driver;

pub use self::keys::lock_key;
pub(crate) use self::url::{RedisUrl, SingleParameters};
pub use self::redlock::{Redlock, RedlockHold};
pub use self::single::{RedisHold, RedisLocks};

/// A channel of one provider's own.
fn new_channel() -> Arc<str> {
    // Not for ever unique, but only messages to owners that are known here are heeded.
    let random = getrandom::u64().unwrap_or_default();
    format!("fencelock:wake:{random:016x}").into()
}
