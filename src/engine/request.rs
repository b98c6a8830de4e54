//! A request to the backend that comes to an end: in time, and by an error where the backend panics.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// What a request comes to. One that isn't answered in time, or panics, has failed with an unknown outcome: what is
/// retried in the background must not be retried in a hot loop because of a panic.
pub(super) async fn answered<T>(patience: Duration, request: impl Future<Output = Result<T>>) -> Result<T> {
    let mut request = pin!(request);
    let caught = poll_fn(|cx| {
        catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(cx)))
            .unwrap_or_else(|_| Poll::Ready(Err(Error::new(ErrorKind::Unknown, "the backend panicked"))))
    });
    tokio::time::timeout(patience, caught)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unknown, "the request has not been answered")))
}
