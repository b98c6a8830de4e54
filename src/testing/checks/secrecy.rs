//! Nothing secret is shown: not by `Debug`, not by `Display`, not in errors, not in traces.

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Metadata, Subscriber, subscriber};

use crate::testing::Subject;
use crate::testing::steps::{ok, on_thread, within};
use crate::{Error, LockOptions};

/// Neither what the harness calls secret nor an owner id is shown by anything that a lock's life brings forth.
pub async fn nothing_secret_is_shown(subject: Subject) {
    let secrets = subject.harness().secrets();
    let shown = on_thread(move || {
        let shown = Shown::default();
        // With a single dispatcher, what another thread happens to be the first to trace would count as wanted by nobody.
        let _another = Dispatch::new(shown.clone());
        let _traced = subscriber::set_default(shown.clone());
        // On this thread alone, whose traces are recorded.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be built").block_on(lives(&subject, &shown));
        shown
    })
    .await;
    let shown = shown.text();
    assert!(shown.contains("lock.name"), "no trace was recorded, so nothing is known of them");
    for secret in secrets {
        assert!(!shown.contains(&secret), "it shows the secret {secret:?}:\n{shown}");
    }
    // An owner id has 128 bits: 32 hexadecimal digits, or up to 39 decimal ones.
    let digits = shown.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max();
    assert!(digits < Some(32), "it shows what may be an owner id:\n{shown}");
}

/// Takes locks, waits for them, loses them, gets errors, and shows whatever can be shown.
async fn lives(subject: &Subject, shown: &Shown) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let lock = provider.create_lock("job");
    let guard = ok("the grant", lock.acquire()).await;
    shown.debug(&provider);
    shown.debug(&lock);
    shown.debug(&guard);
    let busy = ok("a try", other.create_lock("job").try_acquire_for(Duration::from_millis(100))).await;
    assert!(busy.is_none(), "two have it");
    drop(guard);
    let expiring = LockOptions::new().ttl(subject.short_ttl()).auto_renew(false);
    let guard = ok("the grant", provider.create_lock_with("job", expiring).acquire()).await;
    within("the loss", guard.lost()).await;
    shown.debug(&guard);
    shown.error(&within("the release", guard.release()).await.expect_err("it was lost"));
    if subject.target().takes_away() {
        let guard = ok("the grant", lock.acquire()).await;
        let _ = subject.lose("job").await;
        shown.debug(&guard);
    }
    let wrong = provider.create_lock_with("job", LockOptions::new().ttl(Duration::ZERO));
    shown.debug(&wrong);
    shown.error(&within("the refusal", wrong.acquire()).await.expect_err("it can't be"));
    ok("the end of the provider", provider.close()).await;
    shown.debug(&provider);
    shown.error(&within("the refusal", lock.acquire()).await.expect_err("it is closed"));
    ok("the end of the other provider", other.close()).await;
}

/// All that was shown, and a subscriber that adds whatever is traced.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<String>>);

impl Shown {
    fn write(&self, what: &str, value: &dyn Debug) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(text, "{what}={value:?}").expect("a String takes whatever is written");
    }

    fn debug(&self, value: &impl Debug) {
        self.write("debug", value);
    }

    fn error(&self, error: &Error) {
        self.debug(error);
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        while let Some(error) = cause {
            self.write("display", &format_args!("{error}"));
            cause = error.source();
        }
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
        span.record(&mut &*self);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut &*self);
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut &*self);
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
