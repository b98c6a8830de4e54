//! Boxes, `Arc`s and references forward every method of the two traits, and hand the future on as it is.
//!
//! Also asserts the auto traits and sizes that users rely on.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use fencelock::{
    Capabilities, DistributedLock, Error, ErrorKind, Expiry, LockGuard, LockOptions, LockProvider, Result,
    Run,
};

/// What was called, in order.
type Calls = Arc<Mutex<Vec<&'static str>>>;

/// Makes each future larger than any that only forwards, so that its size tells which of them is seen.
const LARGE: usize = 1000;

async fn counted<T>(calls: &Calls, call: &'static str, output: T) -> T {
    let large = [0_u8; LARGE];
    tokio::task::yield_now().await;
    calls.lock().unwrap().push(call);
    std::hint::black_box(&large);
    output
}

/// Overrides every method, those with a default too, and writes down that it was called.
#[derive(Debug)]
struct Counting(Calls);

impl Counting {
    fn lock(&self, call: &'static str) -> Box<dyn DistributedLock> {
        self.0.lock().unwrap().push(call);
        Box::new(CountingLock(self.0.clone()))
    }
}

#[async_trait]
impl LockProvider for Counting {
    fn create_lock(&self, name: &str) -> Box<dyn DistributedLock> {
        assert_eq!(name, "name");
        self.lock("create_lock")
    }

    fn create_lock_with(&self, name: &str, options: LockOptions) -> Box<dyn DistributedLock> {
        assert_eq!((name, options), ("name", LockOptions::new().auto_renew(false)));
        self.lock("create_lock_with")
    }

    fn capabilities(&self) -> Capabilities {
        self.0.lock().unwrap().push("capabilities");
        Capabilities::new(Duration::from_millis(17), Duration::from_secs(17), Expiry::Ttl)
    }

    async fn close(&self) -> Result<()> {
        counted(&self.0, "close", Err(Error::new(ErrorKind::Unsupported, "close"))).await
    }
}

#[derive(Debug)]
struct CountingLock(Calls);

#[async_trait]
impl DistributedLock for CountingLock {
    fn name(&self) -> &'static str {
        self.0.lock().unwrap().push("name");
        "the lock's own name"
    }

    async fn acquire(&self) -> Result<LockGuard> {
        counted(&self.0, "acquire", Err(Error::new(ErrorKind::Unsupported, "acquire"))).await
    }

    async fn try_acquire(&self) -> Result<Option<LockGuard>> {
        counted(&self.0, "try_acquire", Ok(None)).await
    }

    async fn try_acquire_for(&self, timeout: Duration) -> Result<Option<LockGuard>> {
        assert_eq!(timeout, Duration::from_secs(5));
        counted(&self.0, "try_acquire_for", Ok(None)).await
    }
}

/// Calls every method once, and returns the sizes of the futures that it got.
async fn call_all<P: LockProvider, L: DistributedLock>(
    provider: P,
    lock: impl FnOnce(Box<dyn DistributedLock>) -> L,
) -> [usize; 4] {
    assert_eq!(provider.capabilities().min_ttl, Duration::from_millis(17));
    let _other = provider.create_lock_with("name", LockOptions::new().auto_renew(false));
    let lock = lock(provider.create_lock("name"));
    assert_eq!(lock.name(), "the lock's own name");
    let acquire = lock.acquire();
    let try_acquire = lock.try_acquire();
    let try_acquire_for = lock.try_acquire_for(Duration::from_secs(5));
    let close = provider.close();
    let sizes = [
        size_of_val(&*acquire),
        size_of_val(&*try_acquire),
        size_of_val(&*try_acquire_for),
        size_of_val(&*close),
    ];
    assert_eq!(acquire.await.unwrap_err().to_string(), "unsupported: acquire");
    assert!(try_acquire.await.unwrap().is_none());
    assert!(try_acquire_for.await.unwrap().is_none());
    assert_eq!(close.await.unwrap_err().to_string(), "unsupported: close");
    sizes
}

const EVERY_METHOD: [&str; 8] = [
    "capabilities",
    "create_lock_with",
    "create_lock",
    "name",
    "acquire",
    "try_acquire",
    "try_acquire_for",
    "close",
];

/// Each way to hold a provider is used as a type of its own, so that its own implementation is what is called.
#[tokio::test]
async fn every_method_is_forwarded_and_no_future_is_boxed_twice() {
    let calls = Calls::default();
    let new = || Counting(calls.clone());
    let seen = || std::mem::take(&mut *calls.lock().unwrap());

    let direct = call_all(new(), |_| CountingLock(calls.clone())).await;
    assert_eq!(seen(), EVERY_METHOD);
    assert!(direct.iter().all(|&size| size >= LARGE), "{direct:?}");

    macro_rules! forwards {
        ($($provider:expr, $lock:expr;)*) => {$(
            let sizes = call_all($provider, $lock).await;
            assert_eq!(seen(), EVERY_METHOD, "{}", stringify!($provider));
            assert_eq!(sizes, direct, "{}", stringify!($provider));
        )*};
    }
    forwards! {
        Box::new(new()), |lock| lock;
        Arc::new(new()), Arc::new;
        &new(), |lock| &*Box::leak(lock);
        Box::new(new()) as Box<dyn LockProvider>, |lock| lock;
        Arc::new(new()) as Arc<dyn LockProvider>, Arc::<dyn DistributedLock>::from;
        &new() as &dyn LockProvider, |lock| &*Box::leak(lock) as &dyn DistributedLock;
        Box::new(Arc::new(new()) as Arc<dyn LockProvider>), |lock| Box::new(Arc::<dyn DistributedLock>::from(lock));
        Arc::new(Box::new(new()) as Box<dyn LockProvider>), |lock| Arc::new(Box::new(lock));
        &&new(), |lock| &*Box::leak(Box::new(&*Box::leak(lock)));
    }
}

/// Without an override `create_lock` is `create_lock_with` with nothing set, through a pointer too.
#[tokio::test]
async fn create_lock_has_its_default_through_pointers() {
    #[derive(Debug, Default)]
    struct Defaulting(AtomicUsize);

    #[async_trait]
    impl LockProvider for Defaulting {
        fn create_lock_with(&self, name: &str, options: LockOptions) -> Box<dyn DistributedLock> {
            assert_eq!((name, options), ("name", LockOptions::new()));
            self.0.fetch_add(1, Ordering::Relaxed);
            Box::new(CountingLock(Calls::default()))
        }
        fn capabilities(&self) -> Capabilities {
            Capabilities::new(Duration::ZERO, Duration::MAX, Expiry::Ttl)
        }
        async fn close(&self) -> Result<()> {
            Ok(())
        }
    }

    let provider = Arc::new(Defaulting::default());
    let pointers: [Box<dyn LockProvider>; 2] =
        [Box::new(provider.clone()), Box::new(Box::new(provider.clone()))];
    for pointer in pointers {
        let _lock = pointer.create_lock("name");
    }
    assert_eq!(provider.0.load(Ordering::Relaxed), 2);
}

fn send<T: Send>(value: T) -> T {
    value
}

const fn is_send<T: Send + ?Sized>() {}
const fn is_sync<T: Sync + ?Sized>() {}
const fn is_unpin<T: Unpin + ?Sized>() {}
const fn is_static<T: 'static + ?Sized>() {}
const fn is_debug<T: Debug + ?Sized>() {}

const _: () = {
    is_send::<LockGuard>();
    is_sync::<LockGuard>();
    is_unpin::<LockGuard>();
    is_static::<LockGuard>();
    is_debug::<LockGuard>();
    is_send::<Run<std::future::Pending<()>>>();
    is_sync::<Run<std::future::Pending<()>>>();
    is_static::<Run<std::future::Pending<()>>>();
    is_send::<dyn LockProvider>();
    is_sync::<dyn LockProvider>();
    is_send::<Box<dyn LockProvider>>();
    is_sync::<Arc<dyn LockProvider>>();
    is_send::<dyn DistributedLock>();
    is_sync::<dyn DistributedLock>();
    is_send::<Error>();
    is_sync::<Error>();
    is_static::<Error>();
};

/// The futures of guard and provider can move to another thread, and `run` stores the job once.
#[tokio::test]
async fn futures_are_send_and_a_job_is_stored_once() {
    let provider = send(fencelock::connect("memory:futures").await.unwrap());
    let lock = provider.create_lock("job");
    let guard = send(lock.acquire()).await.unwrap();
    assert!(send(lock.try_acquire()).await.unwrap().is_none());
    assert!(send(lock.try_acquire_for(Duration::ZERO)).await.unwrap().is_none());

    let job = |large: [u8; LARGE]| async move {
        tokio::task::yield_now().await;
        large.len()
    };
    let alone = size_of_val(&job([0; LARGE]));
    let run = send(guard.run(job([0; LARGE])));
    let added = size_of_val(&run) - alone;
    assert!(added < LARGE / 2, "`run` adds {added} bytes to a job of {alone}");
    assert_eq!(run.await.unwrap(), LARGE);

    let lost = send(guard.lost());
    is_static_value(&lost);
    send(guard.release()).await.unwrap();
    drop(lost);
    send(provider.close()).await.unwrap();
}

fn is_static_value<T: 'static>(_: &T) {}
