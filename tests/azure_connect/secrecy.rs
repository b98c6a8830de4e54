//! Keys, signatures and the ids of leases stay out of errors, `Debug` and traces, with and without success.

use std::collections::BTreeSet;
use std::fmt::{Debug, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use azure_core::http::Url;
use fencelock::azure::AzureLocks;
use fencelock::azure::driver::BlobContainerClient;
use fencelock::{LockOptions, LockProvider, Provider};
use percent_encoding::percent_decode_str;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Metadata, Subscriber, subscriber};

use super::common::secs;
use super::servers::azurite::AzuriteServer;
use super::servers::azurite_locks::{blob, url_with};
use super::servers::connecting::encoded;
use super::servers::locks::within;
use super::servers::proxy::Proxy;
use super::servers::{free_port, left_out};
use super::{OTHER_KEY, everything, take};

/// All that was shown, and a subscriber that adds whatever is traced, at all levels.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<String>>);

impl Shown {
    fn write(&self, what: &str, value: &dyn Debug) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(text, "{what}={value:?}").expect("a string takes all");
    }

    fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Visit for &Shown {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.write(field.name(), value);
    }
}

impl Subscriber for Shown {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.write("span", &span.metadata().name());
        span.record(&mut &*self);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut &*self);
    }

    fn event(&self, event: &Event<'_>) {
        self.write("event", &event.metadata().target());
        event.record(&mut &*self);
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// The value of `sig` in a signature, as it is in a URL and decoded.
fn signatures(sas: &str) -> [String; 2] {
    let signature = sas.split("sig=").nth(1).expect("it is signed").to_owned();
    let decoded = percent_decode_str(&signature).decode_utf8_lossy().into_owned();
    [signature, decoded]
}

/// What a provider and its locks show as they succeed and fail: they are refused, lose a lock, get no answer, and find
/// nobody. The traces of a client that isn't ours show what that client wants.
async fn lives(
    provider: &dyn LockProvider,
    is_ours: bool,
    server: &AzuriteServer,
    proxy: &Proxy,
    shown: &Shown,
) {
    shown.write("debug", &provider);
    let guard = take(provider, "x").await;
    shown.write("debug", &(&guard, provider.create_lock("x")));
    assert!(provider.create_lock("x").try_acquire().await.expect("an answer").is_none());
    let waiter = provider.create_lock("x");
    let waiter = tokio::spawn(async move { waiter.acquire().await });
    tokio::task::yield_now().await;
    guard.release().await.expect("released");
    let guard = within("the waiter has it", waiter).await.expect("no panic").expect("granted");
    if is_ours {
        assert_ids_are_of_no_use(server, shown);
    }
    server.break_lease("locks", &blob("x"));
    shown.write("error", &everything(&guard.release().await.expect_err("it was taken away")));
    let no_retry = LockOptions::new().retry_for(secs(0));
    for _ in 0..2 {
        proxy.reset_in_reply(9);
        if let Err(error) = provider.create_lock_with("x", no_retry.clone()).try_acquire().await {
            shown.write("error", &everything(&error));
        }
    }
    proxy.refuse();
    proxy.reset_all();
    let error = within("the error", provider.create_lock_with("x", no_retry).try_acquire()).await;
    shown.write("error", &everything(&error.expect_err("nobody is there")));
    proxy.accept();
    let wrong = provider.create_lock_with("x", LockOptions::new().ttl(secs(1)));
    shown.write("error", &everything(&wrong.acquire().await.expect_err("it can't be")));
    within("closed", provider.close()).await.expect("closed");
    shown.write("debug", &provider);
}

async fn connect(url: &str, shown: &Shown) -> Option<Box<dyn LockProvider>> {
    match within("connect", fencelock::connect(url)).await {
        Ok(provider) => Some(provider),
        Err(error) => {
            shown.write("error", &everything(&error));
            None
        }
    }
}

/// What the SDK itself logs of requests and responses, at the level `DEBUG`. It takes the ids of leases for no secret.
const SDK: [&str; 2] = ["message===> Request: ", "message=<== Response: "];

/// Whatever has the form of a lease's id, 8, 4, 4, 4 and 12 hexadecimal digits, or 32, but for the ids of requests, in
/// what the SDK logs, or in all else.
fn ids(text: &str, by_sdk: bool) -> BTreeSet<&str> {
    let lines = text.lines().filter(|line| SDK.iter().any(|logged| line.starts_with(logged)) == by_sdk);
    let is_hex = |c: char| c.is_ascii_hexdigit() || c == '-';
    let is_id = |word: &str| {
        word.len() == 32 && !word.contains('-') || word.split('-').map(str::len).eq([8, 4, 4, 4, 12])
    };
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    let pairs = words.windows(2).filter(|pair| !pair[0].ends_with("request-id:"));
    let parts = pairs.flat_map(|pair| pair[1].split(|c| !is_hex(c)));
    parts.filter(|part| is_id(part)).collect()
}

/// Nobody can release what is held by an id that the traces show.
fn assert_ids_are_of_no_use(server: &AzuriteServer, shown: &Shown) {
    let shown = shown.text();
    let ids = ids(&shown, true);
    assert!(ids.len() > 1, "the SDK shows no ids any more, so there is no need for others: {ids:?}");
    for id in ids {
        let headers = [("x-ms-lease-action", "release"), ("x-ms-lease-id", id)];
        let path = format!("/locks/{}?comp=lease", blob("x"));
        let response = server.request("PUT", &path, &headers, b"");
        assert_eq!(response.expect(409).error_code(), "LeaseIdMismatchWithLeaseOperation", "{id}");
    }
}

/// Nothing of that is shown by a provider with a key, with a signature, or with a client of one's own.
#[test]
fn nothing_secret_is_shown() {
    if left_out("azure") {
        return;
    }
    let server = AzuriteServer::start();
    server.create_container("locks");
    let proxy = Proxy::start(server.addr());
    let shown = Shown::default();
    // With a single dispatcher, what another thread happens to be the first to trace would count as wanted by nobody.
    let _another = Dispatch::new(shown.clone());
    let _traced = subscriber::set_default(shown.clone());
    let right = server.container_sas("locks", "rcw", SystemTime::now() + secs(600));
    let expired = server.container_sas("locks", "rcw", SystemTime::now() - secs(60));
    let mut secrets =
        vec![server.key().to_owned(), encoded(server.key()), OTHER_KEY.to_owned(), encoded(OTHER_KEY)];
    secrets.extend(signatures(&right).into_iter().chain(signatures(&expired)));
    // On this thread alone, whose traces are recorded.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let url = |right: &str| url_with(&server, proxy.addr(), "locks", right);
        let provider = connect(&url(&format!("account_key={}", encoded(server.key()))), &shown).await;
        lives(&*provider.expect("the key is right"), true, &server, &proxy, &shown).await;
        let provider = connect(&url(&format!("sas={}", encoded(&right))), &shown).await;
        lives(&*provider.expect("the signature is right"), true, &server, &proxy, &shown).await;
        let endpoint = format!("{}/locks?{right}", server.endpoint_at(proxy.addr()));
        let client = BlobContainerClient::new(Url::parse(&endpoint).expect("a URL of ours"), None, None);
        let own = Provider::builder(AzureLocks::new(client.expect("a client"))).build().expect("defaults");
        lives(&own, false, &server, &proxy, &shown).await;

        for wrong in [format!("account_key={}", encoded(OTHER_KEY)), format!("sas={}", encoded(&expired))] {
            assert!(connect(&url(&wrong), &shown).await.is_none(), "it is refused");
            let nowhere = encoded(&format!("http://127.0.0.1:{}/x", free_port()));
            let nowhere = format!("azblob://{}/locks?endpoint={nowhere}&{wrong}", server.account());
            assert!(connect(&nowhere, &shown).await.is_none(), "nobody is there");
        }
    });
    let shown = shown.text();
    // Of locks, and of requests.
    assert!(
        shown.contains("lock.name") && shown.contains("lease-id: "),
        "no trace was recorded, so nothing is known of them"
    );
    for secret in secrets {
        assert!(!shown.contains(&secret), "it shows the secret {secret:?}:\n{shown}");
    }
    let authorizations: Vec<_> = shown.lines().filter(|line| line.contains("SharedKey ")).collect();
    assert!(authorizations.is_empty(), "it shows a signature: {authorizations:?}");
    let ids = ids(&shown, false);
    assert!(ids.is_empty(), "it shows what may be the id of a lease, {ids:?}:\n{shown}");
}
