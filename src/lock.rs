//! What application code holds: [`LockProvider`] and [`DistributedLock`], through a box, an `Arc` or a reference alike.

use std::fmt::Debug;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::capabilities::Capabilities;
use crate::error::Result;
use crate::guard::LockGuard;
use crate::options::LockOptions;

/// Makes locks. Chosen once at start-up, by [`connect`](crate::connect) or a backend's builder, and injected
/// everywhere as `Box<dyn LockProvider>` or `Arc<dyn LockProvider>`.
///
/// ```
/// use std::sync::Arc;
/// use fencelock::LockProvider;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> fencelock::Result<()> {
/// let provider: Arc<dyn LockProvider> = fencelock::connect("memory:").await?.into();
/// let lock = provider.create_lock("nightly-report");
/// if let Some(guard) = lock.try_acquire().await? {
///     println!("running as number {}", guard.fencing_token());
///     guard.release().await?;
/// } // else somebody else is at it: skip
/// provider.close().await?;
/// # Ok(()) }
/// ```
#[async_trait]
pub trait LockProvider: Debug + Send + Sync {
    /// The lock of this name, any string, with the provider's default options. Does no I/O and can't fail.
    fn create_lock(&self, name: &str) -> Box<dyn DistributedLock> {
        self.create_lock_with(name, LockOptions::new())
    }

    /// The lock of this name with options of its own; what they leave unset has the provider's default. Does no I/O
    /// and can't fail: options that can't be are reported by the first acquire.
    fn create_lock_with(&self, name: &str, options: LockOptions) -> Box<dyn DistributedLock>;

    /// What the backend really provides.
    fn capabilities(&self) -> Capabilities;

    /// Ends the provider: refuses new acquires, fails those who wait (both with
    /// [`Closed`](crate::ErrorKind::Closed)), and returns when every guard that was dropped, and every attempt that was
    /// abandoned, has been released on the server. `main` must await this, or what was dropped last may stay locked
    /// until its TTL runs out.
    ///
    /// A lock that is kept for [`hold_at_least`](LockOptions::hold_at_least) is waited for, too, if it would be free as soon
    /// as its connection ends. All this waiting ends when the longest TTL in use has passed.
    ///
    /// Guards that the caller still has stay valid and can still be released, unless their connection has to end with
    /// the provider: then they are lost with [`Loss::Closed`](crate::Loss::Closed). Closing twice is fine.
    ///
    /// # Errors
    ///
    /// What the backend says when it is closed, if anything; [`Config`](crate::ErrorKind::Config) outside a tokio runtime,
    /// where nothing can be waited for: it is closed all the same.
    ///
    /// # Cancel safety
    ///
    /// The provider is closed from the first poll on; dropping the future only gives up the wait.
    async fn close(&self) -> Result<()>;
}

/// A lock that at most one holder has at a time, in whatever process on whatever machine.
///
/// Not re-entrant: a task that holds it and acquires it again waits for itself.
#[async_trait]
pub trait DistributedLock: Debug + Send + Sync {
    /// The name that the lock was created with.
    fn name(&self) -> &str;

    /// Waits until the lock is granted, as long as it takes. Waiters of one process are served first come, first
    /// served.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for options that can't be or without a tokio runtime,
    /// [`Denied`](crate::ErrorKind::Denied), [`Exhausted`](crate::ErrorKind::Exhausted),
    /// [`Unsupported`](crate::ErrorKind::Unsupported), [`Unavailable`](crate::ErrorKind::Unavailable) or
    /// [`Unknown`](crate::ErrorKind::Unknown) when an outage lasts longer than
    /// [`retry_for`](LockOptions::retry_for), [`Closed`](crate::ErrorKind::Closed).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue. Whatever was granted in that moment is released in the
    /// background, or goes to the next waiter. A future that is neither dropped nor polled any more keeps its place, and
    /// holds up those of its process who come after it.
    ///
    /// # Panics
    ///
    /// On a tokio runtime that was built without its timer (`enable_time`), as all of tokio's time functions do.
    async fn acquire(&self) -> Result<LockGuard>;

    /// One attempt: `None` if somebody has the lock, or is before us.
    ///
    /// It doesn't wait for a holder, but it does wait for the answer of the server, and for a release of the same lock
    /// that this process has under way, so that `drop(guard)` followed by `try_acquire()` succeeds.
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    async fn try_acquire(&self) -> Result<Option<LockGuard>>;

    /// Waits until the lock is granted, or `timeout` has passed: then `None`. Zero is one attempt. An attempt that is
    /// under way when the time is up is given 200 ms more to be answered.
    ///
    /// # Errors
    ///
    /// As for [`acquire`](Self::acquire). A timeout isn't an error, except that an outage which lasted until then is:
    /// [`Unavailable`](crate::ErrorKind::Unavailable) or [`Unknown`](crate::ErrorKind::Unknown).
    ///
    /// # Cancel safety
    ///
    /// As for [`acquire`](Self::acquire).
    async fn try_acquire_for(&self, timeout: Duration) -> Result<Option<LockGuard>>;
}

/// What `async_trait` makes of an `async fn`. Written out below, because forwarding with `async` and `await` would
/// box each future a second time.
type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

macro_rules! forward {
    ($($pointer:ty),*) => {$(
        impl<T: LockProvider + ?Sized> LockProvider for $pointer {
            fn create_lock(&self, name: &str) -> Box<dyn DistributedLock> {
                self.deref().create_lock(name)
            }

            fn create_lock_with(&self, name: &str, options: LockOptions) -> Box<dyn DistributedLock> {
                self.deref().create_lock_with(name, options)
            }

            fn capabilities(&self) -> Capabilities {
                self.deref().capabilities()
            }

            fn close<'a, 'f>(&'a self) -> BoxFuture<'f, Result<()>>
            where
                'a: 'f,
                Self: 'f,
            {
                self.deref().close()
            }
        }

        impl<T: DistributedLock + ?Sized> DistributedLock for $pointer {
            fn name(&self) -> &str {
                self.deref().name()
            }

            fn acquire<'a, 'f>(&'a self) -> BoxFuture<'f, Result<LockGuard>>
            where
                'a: 'f,
                Self: 'f,
            {
                self.deref().acquire()
            }

            fn try_acquire<'a, 'f>(&'a self) -> BoxFuture<'f, Result<Option<LockGuard>>>
            where
                'a: 'f,
                Self: 'f,
            {
                self.deref().try_acquire()
            }

            fn try_acquire_for<'a, 'f>(&'a self, timeout: Duration) -> BoxFuture<'f, Result<Option<LockGuard>>>
            where
                'a: 'f,
                Self: 'f,
            {
                self.deref().try_acquire_for(timeout)
            }
        }
    )*};
}

forward!(Box<T>, Arc<T>, &T);
