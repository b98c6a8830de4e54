//! Clients that the user has made, and several runtimes.

use std::sync::{LazyLock, OnceLock};
use std::thread;
use std::time::SystemTime;

use azure_core::http::Url;
use fencelock::azure::AzureLocks;
use fencelock::azure::driver::BlobContainerClient;
use fencelock::{LockOptions, Provider};
use tokio::runtime::Builder;

use super::common::secs;
use super::servers::azurite::AzuriteServer;
use super::servers::azurite_locks::locks;
use super::servers::left_out;
use super::{assert_no_secret, exclude_each_other, start, take};

/// A client of one's own, here with the URL of a signature, excludes others with a key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client() {
    if left_out("azure") {
        return;
    }
    let server = start();
    server.create_container("locks");
    let sas = server.container_sas("locks", "rcw", SystemTime::now() + secs(600));
    let url = Url::parse(&format!("{}/locks?{sas}", server.endpoint())).expect("a URL of ours");
    let client = BlobContainerClient::new(url, None, None).expect("a client");
    let own = Provider::builder(AzureLocks::new(client)).build().expect("defaults");
    let other = Provider::builder(locks(&server, server.addr(), "locks")).build().expect("defaults");
    own.backend().connect().await.expect("the container is there");
    exclude_each_other(&own, &other).await;
    exclude_each_other(&other, &own).await;
    assert_no_secret(&format!("{own:?} {:?}", own.backend()));
}

/// A provider that lives as long as the program can be used by one runtime after another, each of which takes its
/// connections with it.
#[test]
fn several_runtimes_use_one_provider() {
    static SERVER: OnceLock<AzuriteServer> = OnceLock::new();
    static PROVIDER: LazyLock<Provider<AzureLocks>> = LazyLock::new(|| {
        let server = SERVER.get().expect("started before");
        let options = LockOptions::new().ttl(secs(15));
        Provider::builder(locks(server, server.addr(), "locks")).options(options).build().expect("possible")
    });
    if left_out("azure") {
        return;
    }
    let server = SERVER.get_or_init(AzuriteServer::start);
    let mut tokens = Vec::new();
    // More than there are clients for.
    for round in 0..12 {
        let token = thread::spawn(move || {
            let runtime = if round % 2 == 0 {
                Builder::new_current_thread().enable_all().build()
            } else {
                Builder::new_multi_thread().worker_threads(1).enable_all().build()
            };
            runtime.expect("a runtime").block_on(async {
                let guard = take(&*PROVIDER, "x").await;
                let token = guard.fencing_token();
                guard.release().await.expect("released");
                token
            })
        });
        tokens.push(token.join().expect("no panic"));
    }
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    assert_eq!(server.blobs("locks"), ["x"]);
    server.kill(); // what is static isn't dropped
}
