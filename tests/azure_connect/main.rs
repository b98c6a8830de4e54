//! How one comes to a container of Azure Blob Storage, for which Azurite stands: URLs, the environment, keys and
//! signatures, clients of one's own; what blobs are called; and that nothing secret is shown.

#[path = "../common/mod.rs"]
mod common;
#[path = "../servers/mod.rs"]
mod servers;

mod environment;
mod names;
mod own;
mod rights;
mod secrecy;
mod urls;

use fencelock::LockProvider;
use servers::azurite::AzuriteServer;
use servers::connecting::{
    OTHER_KEY, assert_no_secret, connected, everything, granted, is_free, refused, take, waits,
};
use tokio::task::block_in_place;

/// A server, started without blocking the runtime, which must have several threads.
fn start() -> AzuriteServer {
    block_in_place(AzuriteServer::start)
}

/// What providers are for: one takes the lock, another is refused, waits, and gets it.
async fn exclude_each_other(one: &dyn LockProvider, other: &dyn LockProvider) {
    let guard = take(one, "x").await;
    assert!(!is_free(other, "x").await);
    let waiter = waits(other, "x");
    let token = guard.fencing_token();
    guard.release().await.expect("released");
    let guard = granted(waiter).await;
    assert!(guard.fencing_token() > token);
    assert!(!is_free(one, "x").await);
    assert_no_secret(&format!("{one:?} {other:?} {guard:?} {:?}", one.create_lock("x")));
    guard.release().await.expect("released");
    take(one, "x").await.release().await.expect("released");
}
