//! Locks in Azurite, and what it shows of them.

use std::net::SocketAddr;
use std::time::Duration;

use fencelock::azure::AzureLocks;
use fencelock::{LockName, LockOptions, Provider};
use tokio::task::block_in_place;
use tokio::time::sleep;

use super::azurite::AzuriteServer;
use super::connecting::encoded;
use super::locks::within;

/// What the blob of a lock is called.
pub(crate) fn blob(name: &str) -> String {
    let encoded = LockName::new(name).encode(252);
    match encoded.strip_suffix('.') {
        Some(rest) => format!("{rest}%2E"),
        None => encoded,
    }
}

/// Locks in a container, by way of something at `addr`, such as the server itself.
pub(crate) fn locks(server: &AzuriteServer, addr: SocketAddr, container: &str) -> AzureLocks {
    AzureLocks::from_connection_string(&server.connection_string_at(addr), container)
        .expect("a connection string of ours")
}

/// A provider of [`locks`].
pub(crate) fn provider(
    server: &AzuriteServer,
    addr: SocketAddr,
    container: &str,
    options: LockOptions,
) -> Provider<AzureLocks> {
    Provider::builder(locks(server, addr, container)).options(options).build().expect("possible options")
}

/// The URL of a container, with a key or signature such as `account_key=…`, and more parameters.
pub(crate) fn url_with(
    server: &AzuriteServer,
    addr: SocketAddr,
    container: &str,
    parameters: &str,
) -> String {
    let endpoint = encoded(&server.endpoint_at(addr));
    format!("azblob://{}/{container}?endpoint={endpoint}&{parameters}", server.account())
}

/// [`url_with`] the account's key.
pub(crate) fn url(server: &AzuriteServer, container: &str, parameters: &str) -> String {
    let key = encoded(server.key());
    url_with(server, server.addr(), container, &format!("account_key={key}&{parameters}"))
}

/// Waits until the lease of a lock's blob, which must be there, is in this state. Needs a runtime with several threads.
pub(crate) async fn until_state(server: &AzuriteServer, container: &str, name: &str, state: &str) {
    let reached = async {
        while block_in_place(|| server.lease_state(container, &blob(name))) != state {
            sleep(Duration::from_millis(10)).await;
        }
    };
    within(&format!("the lease of {name} is {state}"), reached).await;
}

/// The last fencing token of a lock, as it is written in its blob.
pub(crate) fn written_token(server: &AzuriteServer, container: &str, name: &str) -> u64 {
    let metadata = block_in_place(|| server.metadata(container, &blob(name)));
    metadata["fencelock_token"].parse().expect("a number")
}
