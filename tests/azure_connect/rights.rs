//! Keys and signatures that allow too little, and those that allow what is needed and no more.

use std::time::{Duration, SystemTime};

use fencelock::{Error, ErrorKind, LockOptions};

use super::common::secs;
use super::servers::azurite::AzuriteServer;
use super::servers::azurite_locks::{blob, url_with};
use super::servers::connecting::encoded;
use super::servers::left_out;
use super::servers::locks::{SLACK, within};
use super::{OTHER_KEY, assert_no_secret, connected, everything, exclude_each_other, start, take};

/// Connects, and takes a lock whose blob isn't there.
async fn use_it(server: &AzuriteServer, container: &str, right: &str) -> Result<(), Error> {
    let url = url_with(server, server.addr(), container, right);
    let use_it = async {
        let provider = fencelock::connect(&url).await?;
        let job = provider.create_lock_with("new", LockOptions::new().hold_at_least(secs(1)));
        job.acquire().await?.release().await?;
        provider.close().await
    };
    within("an answer", use_it).await
}

fn signature(query: &str) -> String {
    format!("sas={}", encoded(query))
}

/// Who lacks a right is told so at once, and not that the service isn't there, and nothing is left locked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_allowed_to_is_told_so_at_once() {
    if left_out("azure") {
        return;
    }
    let server = start();
    server.create_container("locks");
    let past = SystemTime::now() - secs(60);
    let forged = server.sas("rwc", secs(600)).replace("sp=rwc", "sp=rwcd");
    for (what, right) in [
        ("another key", format!("account_key={}", encoded(OTHER_KEY))),
        ("read only", signature(&server.sas("r", secs(600)))),
        ("read and create", signature(&server.sas("rc", secs(600)))),
        ("expired", signature(&server.sas_until("rwc", past))),
        ("expired for the container", signature(&server.container_sas("locks", "rwc", past))),
        (
            "for another container",
            signature(&server.container_sas("other", "rwc", SystemTime::now() + secs(600))),
        ),
        ("forged", signature(&forged)),
    ] {
        let began = std::time::Instant::now();
        let error = use_it(&server, "locks", &right).await.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Denied, "{what}: {}", everything(&error));
        assert!(!error.is_retryable() && began.elapsed() < SLACK, "{what}: {:?}", began.elapsed());
        assert_no_secret(&everything(&error));
        if server.blobs("locks").contains(&blob("new")) {
            assert_eq!(server.lease_state("locks", &blob("new")), "available", "{what}");
            server.delete_blob("locks", &blob("new"));
        }
    }
}

/// What the documentation of the module says is enough: to read, create and write blobs in a container that is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_read_create_and_write_in_a_container_is_enough() {
    if left_out("azure") {
        return;
    }
    let server = start();
    server.create_container("locks");
    let expiry = SystemTime::now() + Duration::from_secs(600);
    let right = signature(&server.container_sas("locks", "rcw", expiry));
    use_it(&server, "locks", &right).await.unwrap_or_else(|error| panic!("{}", everything(&error)));
    let url = url_with(&server, server.addr(), "locks", &right);
    exclude_each_other(&*connected(&url).await, &*connected(&url).await).await;

    // It doesn't allow to make the container.
    let right = signature(&server.container_sas("missing", "rcw", expiry));
    let error = use_it(&server, "missing", &right).await.expect_err("the container is missing");
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", everything(&error));
    assert_no_secret(&everything(&error));
    // One for the account does.
    let right = signature(&server.sas("rcw", secs(600)));
    use_it(&server, "missing", &right).await.unwrap_or_else(|error| panic!("{}", everything(&error)));
    assert_eq!(server.blobs("missing"), [blob("new")]);
}

/// A signature that expires while a lock is held is a right that was lost: the next claim is denied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signature_that_expires_meanwhile_denies_the_next_claim() {
    if left_out("azure") {
        return;
    }
    let server = start();
    let expiry = SystemTime::now() + secs(4);
    let right = signature(&server.sas_until("rcw", expiry));
    let provider = connected(&url_with(&server, server.addr(), "locks", &right)).await;
    take(&*provider, "x").await.release().await.expect("released");
    tokio::time::sleep(expiry.duration_since(SystemTime::now()).unwrap_or_default() + secs(1)).await;
    let error = within("the error", provider.create_lock("x").acquire()).await.expect_err("it has expired");
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", everything(&error));
}
