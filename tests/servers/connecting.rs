//! Coming to a server, right and wrong, and what a provider is for, of whatever server.

use std::error::Error as _;
use std::fmt::Write as _;
use std::time::Duration;

use fencelock::backend::Backend;
use fencelock::{Error, LockGuard, LockOptions, LockProvider, Provider, connect};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::task::JoinHandle;

use super::azurite::KEY;
use super::locks::within;

/// A password with everything that means something in a URL.
pub(crate) const PASSWORD: &str = "never/to@be:seen#?,%&=+ ";

pub(crate) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

pub(crate) async fn connected(url: &str) -> Box<dyn LockProvider> {
    within("connect", Box::pin(connect(url))).await.unwrap_or_else(|error| panic!("{}", everything(&error)))
}

pub(crate) async fn refused(url: &str) -> Error {
    match within(&format!("an answer to {url}"), Box::pin(connect(url))).await {
        Ok(provider) => panic!("accepted: {provider:?}"),
        Err(error) => {
            assert_no_secret(&everything(&error));
            error
        }
    }
}

/// What an error can show in any way.
pub(crate) fn everything(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(cause) = source {
        write!(text, " <- {cause} {cause:?}").expect("a string takes all");
        source = cause.source();
    }
    text
}

/// A key of a storage account that isn't that of Azurite's.
pub(crate) const OTHER_KEY: &str = "bmV2ZXIgdG8gYmUgc2Vlbg==";

/// Whether it shows the password, or the beginning of one, a key of a storage account, or a signature.
pub(crate) fn assert_no_secret(text: &str) {
    for secret in [PASSWORD, &encoded(PASSWORD), "never", KEY, &encoded(KEY), &KEY[..8], OTHER_KEY, "sig="] {
        assert!(!text.contains(secret), "a secret is shown: {text}");
    }
}

pub(crate) fn built<B: Backend>(locks: B, ttl: Duration) -> Provider<B> {
    Provider::builder(locks).options(LockOptions::new().ttl(ttl)).build().expect("possible options")
}

pub(crate) async fn take(provider: &dyn LockProvider, name: &str) -> LockGuard {
    within("the lock is taken", provider.create_lock(name).acquire())
        .await
        .unwrap_or_else(|error| panic!("{}", everything(&error)))
}

pub(crate) async fn is_free(provider: &dyn LockProvider, name: &str) -> bool {
    match within("an answer", provider.create_lock(name).try_acquire()).await {
        Ok(Some(guard)) => {
            released(guard).await;
            true
        }
        Ok(None) => false,
        Err(error) => panic!("{}", everything(&error)),
    }
}

/// What a try fails with that isn't repeated.
pub(crate) async fn fails(provider: &dyn LockProvider, name: &str) -> Error {
    let lock = provider.create_lock_with(name, LockOptions::new().retry_for(Duration::ZERO));
    let error = within("an answer", lock.try_acquire()).await.expect_err("it can't be had");
    assert_no_secret(&everything(&error));
    error
}

pub(crate) async fn released(guard: LockGuard) {
    let answer = within("the lock is released", guard.release()).await;
    answer.unwrap_or_else(|error| panic!("{}", everything(&error)));
}

pub(crate) async fn closed(provider: &dyn LockProvider) {
    within("the provider is closed", provider.close()).await.expect("closed");
}

/// Waits in a task.
pub(crate) fn waits(provider: &dyn LockProvider, name: &str) -> JoinHandle<fencelock::Result<LockGuard>> {
    let lock = provider.create_lock(name);
    tokio::spawn(async move { lock.acquire().await })
}

pub(crate) async fn granted(waiter: JoinHandle<fencelock::Result<LockGuard>>) -> LockGuard {
    let answer = within("a waiter has the lock", waiter).await.expect("it doesn't panic");
    answer.unwrap_or_else(|error| panic!("{}", everything(&error)))
}
