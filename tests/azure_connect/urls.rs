//! What stands in a URL, right and wrong.

use std::time::Instant;

use fencelock::azure::AzureLocks;
use fencelock::{ErrorKind, LockOptions, LockProvider, Provider};

use super::common::{ms, secs};
use super::servers::azurite::{ACCOUNT, KEY};
use super::servers::azurite_locks::{locks, url, url_with};
use super::servers::connecting::encoded;
use super::servers::locks::{SLACK, within};
use super::servers::proxy::Proxy;
use super::servers::{free_port, left_out};
use super::{OTHER_KEY, assert_no_secret, connected, everything, exclude_each_other, refused, start, take};

/// A key or a signature in the URL will do; the container is made; two providers exclude each other; and a URL without
/// an error may say all that is common to backends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_or_a_signature_stands_in_the_url() {
    if left_out("azure") {
        return;
    }
    let server = start();
    let sas = encoded(&server.sas("rwc", secs(600)));
    let key = url(&server, "locks", "ttl=15s");
    let by_signature = url_with(&server, server.addr(), "locks", &format!("sas={sas}&ttl=60s"));
    // As the portal shows it.
    let with_mark = url_with(&server, server.addr(), "locks", &format!("sas=%3F{sas}"));
    let slash = key.replace("/locks?", "/locks/?");
    for (one, other) in [(&key, &by_signature), (&with_mark, &slash)] {
        exclude_each_other(&*connected(one).await, &*connected(other).await).await;
    }
    // What is signed has to be the same wherever escapes are needed.
    let spaced = connected(&url(&server, "other-container", "prefix=app")).await;
    take(&*spaced, "a name/with ä?&=").await.release().await.expect("released");
    assert_eq!(server.blobs("locks"), ["x"]);
    let blobs = server.blobs("other-container");
    assert!(blobs.len() == 1 && blobs[0].starts_with("app"), "{blobs:?}");
}

/// What can't be is an error before anything is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_said_before_any_request() {
    if left_out("azure") {
        return;
    }
    let server = start();
    let proxy = Proxy::start(server.addr());
    let endpoint = format!("endpoint={}", encoded(&server.endpoint_at(proxy.addr())));
    let key = format!("account_key={}", encoded(KEY));
    let sas = format!("sas={}", encoded("sv=2021-12-02&sig=x"));
    let right = format!("{endpoint}&{key}");
    let mut wrong: Vec<_> = [
        "",
        "ab",
        "Locks",
        "a--b",
        "-ab",
        "ab-",
        "a_b",
        "a/b",
        "%6cocks",
        "$root",
        "lo cks",
        &"a".repeat(64),
    ]
    .map(|container| format!("azblob://{ACCOUNT}/{container}?{right}"))
    .into();
    for account in
        ["", "ab", "Dev", "dev_account", "user:never@devstoreaccount1", "127.0.0.1:1", &"a".repeat(25)]
    {
        wrong.push(format!("azblob://{account}/locks?{right}"));
    }
    for parameters in [
        format!("{right}&{sas}"),
        format!("{endpoint}&account_key=not-a-key!"),
        format!("{endpoint}&account_key="),
        format!("{endpoint}&sas=sv%3D2021-12-02"),
        format!("{endpoint}&sas="),
        format!("{key}&endpoint=ftp%3A%2F%2Fhost%2F"),
        format!("{key}&endpoint=host"),
        format!("{key}&endpoint="),
        format!("{right}&ttl=14s"),
        format!("{right}&ttl=14999ms"),
        format!("{right}&ttl=61s"),
        format!("{right}&ttl=15"),
        format!("{right}&hold_at_least=61s"),
        format!("{right}&retries=3"),
        format!("{right}&account_key={OTHER_KEY}"),
    ] {
        wrong.push(format!("azblob://{ACCOUNT}/locks?{parameters}"));
    }
    wrong.extend([format!("azblob:{ACCOUNT}/locks?{right}"), format!("azblob://{ACCOUNT}?{right}")]);
    for url in wrong {
        let error = refused(&url).await;
        assert_eq!(error.kind(), ErrorKind::Config, "{url}: {}", everything(&error));
        assert!(!error.is_retryable());
    }
    for ttl in [ms(14_999), ms(60_001), secs(1)] {
        let options = LockOptions::new().ttl(ttl);
        let built = Provider::builder(locks(&server, proxy.addr(), "locks")).options(options.clone()).build();
        assert_eq!(built.expect_err("refused").kind(), ErrorKind::Config);
        let provider = Provider::builder(locks(&server, proxy.addr(), "locks")).build().expect("defaults");
        let lock = provider.create_lock_with("x", options);
        let error = within("the error", lock.acquire()).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Config);
    }
    assert_eq!(proxy.connections(), 0);
    // It would have been seen.
    connected(&format!("azblob://{ACCOUNT}/locks?{right}")).await;
    assert!(proxy.connections() > 0);
}

/// The emulator's own connection string is known, and connection strings that can't be read are errors that don't show
/// what is in them.
#[test]
fn connection_strings() {
    let emulator = AzureLocks::from_connection_string("UseDevelopmentStorage=true", "locks");
    let shown = format!("{:?}", emulator.expect("it is known"));
    assert!(shown.contains(ACCOUNT), "{shown}");
    assert_no_secret(&shown);
    for string in [
        "",
        "nonsense",
        "UseDevelopmentStorage=false",
        &format!("AccountName={ACCOUNT}"),
        &format!("AccountName={ACCOUNT};AccountKey={OTHER_KEY}!"),
        &format!("AccountKey={OTHER_KEY}"),
        &format!("AccountName={ACCOUNT};AccountKey={OTHER_KEY};BlobEndpoint=nowhere"),
        &format!("{OTHER_KEY} AccountName"),
    ] {
        let error = AzureLocks::from_connection_string(string, "locks").expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Config, "{string}");
        assert_no_secret(&everything(&error));
    }
    let error =
        AzureLocks::from_connection_string("UseDevelopmentStorage=true", "Locks").expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Config);
}

/// A service that isn't there is said to be so at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_not_there_is_unavailable_at_once() {
    let key = encoded(OTHER_KEY);
    let endpoint = encoded(&format!("http://127.0.0.1:{}/shop", free_port()));
    for (endpoint, limit) in [(endpoint, secs(0)), (encoded("http://no-such-host.invalid"), secs(8))] {
        let began = Instant::now();
        let error = refused(&format!("azblob://shop/locks?account_key={key}&endpoint={endpoint}")).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
        assert!(error.is_retryable());
        assert!(began.elapsed() < limit + SLACK, "{:?}", began.elapsed());
    }
}

/// Without a feature for TLS an account of Azure can't be used, which is said before anything is sent; the emulator can.
#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
#[tokio::test]
async fn without_tls_azure_itself_is_unsupported() {
    let error = refused(&format!("azblob://shop/locks?account_key={}", encoded(OTHER_KEY))).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));
}
