//! A background task that lives on the runtime of first use, and on the next one when that is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Handle;
use tokio::sync::Notify;

/// Whether the task runs, and how to wake it. Shared with the task, which must not keep the engine alive.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    running: AtomicBool,
    wake: Notify,
}

impl Worker {
    /// Wakes the task. Remembered if it isn't waiting just now.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    pub(crate) async fn woken(&self) {
        self.wake.notified().await;
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Starts the task on `runtime` unless it runs. However it ends (the runtime's shutdown drops it), `on_end` is
    /// called, and the next call starts it anew.
    pub(crate) fn ensure_running<F>(
        self: &Arc<Self>,
        runtime: &Handle,
        task: impl FnOnce() -> F,
        on_end: impl FnOnce() + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        if self.is_running() || self.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let ended = OnDrop(Some({
            let worker = self.clone();
            move || {
                worker.running.store(false, Ordering::Release);
                on_end();
            }
        }));
        let task = task();
        runtime.spawn(async move {
            let _ended = ended;
            task.await;
        });
    }
}

/// Calls a closure when it is dropped.
pub(crate) struct OnDrop<F: FnOnce()>(pub(crate) Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call();
        }
    }
}
