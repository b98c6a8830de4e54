//! [`Carried`]: a request that runs to its end, whoever stops waiting for it.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

/// Runs in the caller's own future as long as there is one, and goes on in a task of `runtime` when that is dropped. For
/// requests whose effect somebody has to know: they end by noting it down themselves.
///
/// The future may not use timers: it may move from one runtime to another.
pub(crate) struct Carried<T: Send + 'static> {
    future: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    runtime: Handle,
}

impl<T: Send + 'static> Carried<T> {
    pub(crate) fn new(runtime: &Handle, future: impl Future<Output = T> + Send + 'static) -> Self {
        Self { future: Some(Box::pin(future)), runtime: runtime.clone() }
    }
}

impl<T: Send + 'static> Future for Carried<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let future = self.future.as_mut().expect("not polled again once it is done");
        let polled = future.as_mut().poll(cx);
        if polled.is_ready() {
            self.future = None;
        }
        polled
    }
}

impl<T: Send + 'static> Drop for Carried<T> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            self.runtime.spawn(future);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn goes_on_when_nobody_waits() {
        let (go, wait) = oneshot::channel();
        let (done, ended) = oneshot::channel();
        let mut carried = Carried::new(&Handle::current(), async {
            wait.await.expect("sent");
            done.send(7).expect("awaited");
        });
        assert!(std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut carried).poll(cx).is_pending())).await);
        drop(carried);
        yield_now().await;
        go.send(()).expect("it still waits");
        assert_eq!(ended.await, Ok(7));
    }

    #[tokio::test]
    async fn ends_where_it_is_awaited() {
        assert_eq!(Carried::new(&Handle::current(), async { 7 }).await, 7);
    }
}
