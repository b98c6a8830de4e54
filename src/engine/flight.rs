//! [`Flight`]: something that many want at the same time, done once for all of them, and with back-off when it fails.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::backoff::Backoff;
use super::lock;
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};

/// How it ended; `None`: not yet.
type Outcome = Option<Arc<Result<()>>>;

/// How much longer than an attempt is given others wait for it.
const LONGER: Duration = Duration::from_millis(100);

pub(crate) struct Flight {
    limit: Duration,
    state: Arc<Mutex<State>>,
}

struct State {
    under_way: Option<(Instant, watch::Receiver<Outcome>)>,
    backoff: Backoff,
    /// Why it isn't tried again before that time.
    failed: Option<(Instant, Error)>,
}

impl Flight {
    /// An attempt that has not ended after `limit` counts as failed.
    pub(crate) fn new(limit: Duration) -> Self {
        let state = State { under_way: None, backoff: Backoff::between_retries(), failed: None };
        Self { limit, state: Arc::new(Mutex::new(state)) }
    }

    /// Joins the attempt under way, or makes one.
    ///
    /// `is_there` tells whether it has been done meanwhile: by an attempt that ended after the caller had looked.
    ///
    /// It is made in a task of its own, so that who gives up waiting doesn't set back all others; and another is made if
    /// the runtime of that task ends, or isn't polled any more.
    pub(crate) async fn join<F>(&self, is_there: impl Fn() -> bool, attempt: impl Fn() -> F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        loop {
            let mut ended = {
                let mut state = lock(&self.state);
                if let Some((not_before, error)) = &state.failed
                    && !not_before.has_passed()
                {
                    return Err(error.duplicate());
                }
                let joinable = |(began, ended): &(Instant, watch::Receiver<Outcome>)| {
                    began.elapsed() < self.limit + LONGER
                        && ended.borrow().is_none()
                        && ended.has_changed().is_ok()
                };
                match &state.under_way {
                    Some(under_way) if joinable(under_way) => under_way.1.clone(),
                    _ if is_there() => return Ok(()),
                    _ => {
                        let (end, ended) = watch::channel(None);
                        state.under_way = Some((Instant::now(), ended.clone()));
                        let attempt = tokio::time::timeout(self.limit, attempt());
                        let shared = self.state.clone();
                        tokio::spawn(async move {
                            let outcome = attempt.await.unwrap_or_else(|_| {
                                Err(Error::new(ErrorKind::Unavailable, "the server doesn't answer"))
                            });
                            if let Err(error) = &outcome {
                                lock(&shared).fails(error.duplicate());
                            }
                            end.send_replace(Some(Arc::new(outcome)));
                        });
                        ended
                    }
                }
            };
            // A little longer than the attempt itself is given.
            let outcome = tokio::time::timeout(self.limit + LONGER, ended.wait_for(Option::is_some)).await;
            if let Ok(Ok(outcome)) = outcome
                && let Some(outcome) = outcome.as_deref()
            {
                return outcome.as_ref().copied().map_err(Error::duplicate);
            }
        }
    }

    /// What it was for works: the next failure is the first one again.
    pub(crate) fn succeeds(&self) {
        let mut state = lock(&self.state);
        state.backoff.reset();
        state.failed = None;
    }

    /// It has worked, but what it was for doesn't.
    #[cfg(feature = "redis")]
    pub(crate) fn fails(&self, error: Error) {
        lock(&self.state).fails(error);
    }
}

impl State {
    fn fails(&mut self, error: Error) {
        self.failed = Some((Instant::now() + self.backoff.next(), error));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    fn counting(
        count: &Arc<AtomicUsize>,
        outcome: fn() -> Result<()>,
        takes: Duration,
    ) -> impl Future<Output = Result<()>> + Send + 'static {
        let count = count.clone();
        async move {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(takes).await;
            outcome()
        }
    }

    fn nothing_yet() -> bool {
        false
    }

    fn failure() -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, "down"))
    }

    #[tokio::test(start_paused = true)]
    async fn all_who_ask_share_one_attempt() {
        let (flight, count) = (Flight::new(LIMIT), Arc::default());
        let attempt = || counting(&count, || Ok(()), Duration::from_secs(1));
        let (a, b) = tokio::join!(flight.join(nothing_yet, attempt), flight.join(nothing_yet, attempt));
        a.and(b).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        flight.join(nothing_yet, attempt).await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_comes_just_after_its_end_has_what_it_brought() {
        let (flight, count) = (Flight::new(LIMIT), Arc::default());
        let attempt = || counting(&count, || Ok(()), Duration::from_secs(1));
        let is_there = || count.load(Ordering::Relaxed) > 0;
        flight.join(is_there, attempt).await.unwrap();
        flight.join(is_there, attempt).await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_does_not_set_back_the_others() {
        let (flight, count) = (Flight::new(LIMIT), Arc::default());
        let attempt = || counting(&count, || Ok(()), Duration::from_secs(1));
        tokio::time::timeout(Duration::from_millis(500), flight.join(nothing_yet, attempt))
            .await
            .unwrap_err();
        flight.join(nothing_yet, attempt).await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_backed_off_from() {
        let (flight, count) = (Flight::new(LIMIT), Arc::default());
        let attempt = || counting(&count, failure, Duration::ZERO);
        let began = tokio::time::Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            flight.join(nothing_yet, attempt).await.unwrap_err();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let attempts = count.load(Ordering::Relaxed);
        assert!((5..60).contains(&attempts), "{attempts} attempts in 10 s");
    }

    /// The runtime that makes the attempt stands still, or is gone.
    #[test]
    fn another_is_made_where_one_is_left() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let limit = Duration::from_millis(200);
        for gone in [false, true] {
            let (flight, count) = (Flight::new(limit), Arc::default());
            let attempt = || counting(&count, || Ok(()), Duration::from_millis(50));
            let first = runtime();
            first.block_on(async {
                tokio::time::timeout(Duration::from_millis(10), flight.join(nothing_yet, attempt))
                    .await
                    .unwrap_err();
            });
            let first = (!gone).then_some(first);
            runtime().block_on(flight.join(nothing_yet, attempt)).unwrap();
            assert_eq!(count.load(Ordering::Relaxed), 2);
            drop(first);
        }
    }
}
