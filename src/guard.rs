//! [`LockGuard`]: the lock while it is held, its [`Loss`], and [`Run`], which stops a job when the lock is lost.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use pin_project_lite::pin_project;

use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;
use crate::tenure::{State, Tenure, Watch};

/// Why a lock was lost before it was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// The TTL ran out: it wasn't renewed, or no renewal came through in time, or this process was frozen.
    #[error("its ttl ran out")]
    Expired,
    /// The server says that it is not ours any more: taken over, deleted, broken by an administrator.
    #[error("it was taken away, broken or deleted")]
    Taken,
    /// The connection that held it has ended.
    #[error("the session that held it has ended")]
    SessionEnded,
    /// It was held longer than [`max_hold`](crate::LockOptions::max_hold).
    #[error("it was held longer than max_hold")]
    MaxHold,
    /// The provider was closed, and with it the connection that held it.
    #[error("its provider was closed")]
    Closed,
}

/// What a guard needs of the engine, without knowing the backend.
#[async_trait]
pub(crate) trait Held: Send + Sync {
    fn name(&self) -> &str;
    fn backend(&self) -> &'static str;
    fn token(&self) -> FencingToken;
    fn tenure(&self) -> &Arc<Tenure>;
    /// The guard is gone: free the grant in the background. Never panics, blocks or spawns.
    fn dropped(self: Arc<Self>);
    async fn release(self: Arc<Self>) -> Result<()>;
}

/// The lock while it is held. Dropping it releases it in the background; [`release`](Self::release) does so and waits.
///
/// Keep it in a **named** variable for as long as the job runs:
///
/// | code | what is held | what the compiler says |
/// |---|---|---|
/// | `let guard = lock.acquire().await?;` | until `guard` goes out of scope | |
/// | `let _guard = lock.acquire().await?;` | the same | |
/// | `let _ = lock.acquire().await?;` | **nothing**: dropped at once | nothing, or `let_underscore_drop` if you turn it on |
/// | `lock.acquire().await?;` | **nothing** | `unused_must_use` |
/// | `lock.try_acquire().await?;` | **nothing** | nothing: an `Option` may be ignored |
/// | `if lock.try_acquire().await?.is_some() { … }` | **nothing**: dropped before the block | nothing |
/// | `let Some(_) = lock.try_acquire().await? else { … };` | **nothing** after that line | nothing |
/// | `let Some(guard) = lock.try_acquire().await? else { … };` | until `guard` goes out of scope | |
///
/// `#![warn(let_underscore_drop)]` at the top of your crate catches the third row.
///
/// The grant is renewed in the background (unless [`auto_renew`](crate::LockOptions::auto_renew) is off) by a task on
/// the runtime on which the provider was first used, and on another one that holds locks when that ends. A runtime that
/// is alive but isn't polled renews nothing, for whatever runtime: then the TTL decides, and the guard says so. A guard
/// that is leaked with [`std::mem::forget`] is renewed as long as the process lives.
#[must_use = "the lock is released as soon as its guard is dropped: keep it in a named variable"]
pub struct LockGuard {
    held: Arc<dyn Held>,
    /// Keeps the engine alive, which `held` alone doesn't.
    _engine: Arc<dyn Any + Send + Sync>,
}

impl LockGuard {
    pub(crate) fn new(held: Arc<dyn Held>, engine: Arc<dyn Any + Send + Sync>) -> Self {
        Self { held, _engine: engine }
    }

    /// The name that the lock was created with.
    #[must_use]
    pub fn name(&self) -> &str {
        self.held.name()
    }

    /// The number of this grant: larger than that of every earlier grant of this lock. Pass it to what the lock
    /// protects; see [`FencingGate`](crate::FencingGate).
    #[must_use]
    pub fn fencing_token(&self) -> FencingToken {
        self.held.token()
    }

    /// Whether the lock is lost. It compares the clock itself, so it is right after a freeze or a suspend, too; no I/O.
    ///
    /// Between this look and the next step anything can happen: only the resource, with the
    /// [`fencing_token`](Self::fencing_token), can refuse a holder that comes too late.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self.held.tenure().state(), State::Lost(_))
    }

    /// Resolves when the lock is lost, with the reason. After a normal release it pends for ever. It doesn't borrow
    /// the guard, and watches the deadline in the runtime that awaits it.
    ///
    /// # Cancel safety
    ///
    /// Dropping it changes nothing; call it again any time.
    pub fn lost(&self) -> impl Future<Output = Loss> + Send + use<> {
        let watch = Watch::new(self.held.tenure());
        async move {
            match watch.await {
                State::Lost(loss) => loss,
                State::Held | State::Released => std::future::pending().await,
            }
        }
    }

    /// Runs `future` as long as the lock is held. When the lock is lost the future is dropped, and the result is an
    /// error of kind [`Lost`](ErrorKind::Lost). The lock is checked before every poll, so that a job that was frozen
    /// doesn't take one more step. Once the guard has been released, the result is such an error, too.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> fencelock::Result<()> {
    /// # use fencelock::LockProvider;
    /// # let provider = fencelock::connect("memory:").await?;
    /// # async fn import_orders() -> u32 { 3 }
    /// let guard = provider.create_lock("import").acquire().await?;
    /// let imported = guard.run(import_orders()).await?;
    /// # assert_eq!(imported, 3);
    /// # Ok(()) }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops `future`; the lock is held on.
    pub fn run<F: Future>(&self, future: F) -> Run<F> {
        Run { watch: Watch::new(self.held.tenure()), held: self.held.clone(), future: Some(future) }
    }

    /// Releases the lock and waits until the server has confirmed it.
    ///
    /// # Errors
    ///
    /// [`Lost`](ErrorKind::Lost) if it had been lost already ([`Error::loss`] says why): the job may have run beside
    /// another. [`Config`](ErrorKind::Config) outside a tokio runtime: it is then released as if it were dropped. [`Unavailable`](ErrorKind::Unavailable) or [`Unknown`](ErrorKind::Unknown) if the server could not be
    /// reached within [`retry_for`](crate::LockOptions::retry_for): the release is tried further in the background, and
    /// at the latest the TTL frees the lock.
    ///
    /// # Cancel safety
    ///
    /// The lock is released all the same, in the background.
    pub async fn release(self) -> Result<()> {
        self.held.clone().release().await
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        self.held.clone().dropped();
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("name", &self.name())
            .field("backend", &self.held.backend())
            .field("fencing_token", &self.fencing_token())
            .field("state", &self.held.tenure().state())
            .finish_non_exhaustive()
    }
}

pin_project! {
    /// The future of [`LockGuard::run`].
    #[must_use = "futures do nothing unless they are awaited"]
    pub struct Run<F> {
        held: Arc<dyn Held>,
        #[pin]
        watch: Watch,
        #[pin]
        future: Option<F>,
    }
}

impl<F: Future> Future for Run<F> {
    type Output = Result<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if this.future.is_none() {
            return Poll::Pending; // polled again after it was ready
        }
        if let Poll::Ready(state) = this.watch.poll(cx) {
            this.future.set(None);
            let error = match state {
                State::Lost(loss) => Error::lost(loss),
                State::Held | State::Released => {
                    Error::new(ErrorKind::Lost, "the guard was released while the job was running")
                }
            };
            let name = this.held.name().into();
            return Poll::Ready(Err(error.during("run", this.held.backend(), Some(&name))));
        }
        let future = this.future.as_mut().as_pin_mut().expect("seen above");
        future.poll(cx).map(|output| {
            this.future.set(None);
            Ok(output)
        })
    }
}

impl<F> fmt::Debug for Run<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("lock", &self.held.name()).finish_non_exhaustive()
    }
}
