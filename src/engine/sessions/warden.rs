//! The warden of a session: keeps it alive while nothing is held on it, closes it when nobody has needed it for a while, and
//! notices its end.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::pool::{Pool, close, send_beat};
use super::session::{DOUBT_AFTER, Duty, LockSession};
use super::{Connection, ENDED, Ended, Server};
use crate::backend::Instant;
use crate::engine::backoff::Backoff;
use crate::engine::worker::OnDrop;
use crate::error::Error;
use crate::guard::Loss;

/// Boxed, since it may open a session itself, with a warden of its own.
pub(super) fn warden<S: Server>(
    pool: &Arc<Pool<S>>,
    session: &Arc<LockSession<S::Connection>>,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(watch_over(Arc::downgrade(pool), Arc::downgrade(session), session.connection.closed()))
}

async fn watch_over<S: Server>(
    pool: Weak<Pool<S>>,
    watched: Weak<LockSession<S::Connection>>,
    closed: impl Future<Output = Ended>,
) {
    tokio::pin!(closed);
    // The runtime may end, and the connection with it.
    let _gone = OnDrop(Some({
        let (pool, watched) = (pool.clone(), watched.clone());
        move || {
            if let Some(session) = watched.upgrade() {
                session.end(Ended::Somehow, ENDED);
                if let Some(pool) = pool.upgrade() {
                    pool.remove(&session);
                }
            }
        }
    }));
    loop {
        let Some(session) = watched.upgrade() else { return };
        let pool_is_closed = pool.upgrade().is_none_or(|pool| {
            pool.sweep();
            pool.closed.load(Ordering::Acquire)
        });
        if pool_is_closed && session.end_if_unused(Loss::Closed) {
            return close(&session).await;
        }
        let look_at = match session.duty() {
            Duty::Over => break,
            Duty::Look(at) => at,
            Duty::Close => {
                if session.end_if_unused(ENDED) {
                    return close(&session).await;
                }
                continue;
            }
            Duty::Beat => {
                let heard = tokio::time::timeout(session.ttl() / 3, send_beat(&session));
                tokio::select! {
                    ended = &mut closed => {
                        session.end(ended, ENDED);
                        break;
                    }
                    // One that fails is repeated, until the deadline has passed.
                    answer = heard => if !matches!(answer, Ok(Ok(()))) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                continue;
            }
            Duty::Doubt => {
                let Some(pool) = pool.upgrade() else { continue };
                let silent_since = session.looks();
                tokio::select! {
                    ended = &mut closed => {
                        session.end(ended, ENDED);
                        break;
                    }
                    lost = answer_is_lost(&pool, &session) => if lost && session.still_waits(silent_since) {
                        session.break_off();
                        break;
                    }
                }
                continue;
            }
            Duty::BreakOff => {
                session.end(Ended::Somehow, Loss::Expired);
                session.connection.break_off();
                break;
            }
        };
        // Not kept from going meanwhile.
        let changed = session.changed.clone();
        drop(session);
        tokio::select! {
            ended = &mut closed => {
                if let Some(session) = watched.upgrade() {
                    session.end(ended, ENDED);
                }
                break;
            }
            () = changed.notified() => {}
            () = tokio::time::sleep(look_at.remaining()) => {}
        }
    }
    let (Some(pool), Some(session)) = (pool.upgrade(), watched.upgrade()) else { return };
    pool.remove(&session);
    // Where only the way to the server is broken, what was held there would be in the way of others for a TTL.
    let (give_up_at, mut backoff) = (Instant::now() + session.ttl(), Backoff::between_retries());
    while pool.terminate(&session).await.is_err() && !give_up_at.has_passed() {
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Whether the server has nothing to do for a session that waits for an answer. Asked twice, so that the answer isn't just
/// on its way; when the server can't be asked either, it may be only slow, and nothing is lost yet.
async fn answer_is_lost<S: Server>(pool: &Arc<Pool<S>>, session: &LockSession<S::Connection>) -> bool {
    for _ in 0..2 {
        let ask = async {
            let helper = pool.helper(session.ttl()).await?;
            let other = helper.user();
            let answered = other.errand(other.connection.has_answered(&session.connection)).await?;
            Ok::<_, Error>(answered)
        };
        if !matches!(tokio::time::timeout(DOUBT_AFTER, ask).await, Ok(Ok(true))) {
            return false;
        }
        tokio::time::sleep(DOUBT_AFTER / 4).await;
    }
    true
}
