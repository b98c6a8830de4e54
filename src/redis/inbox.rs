//! Messages to those who wait: the places that this process has in queues on the server, and the one subscription over
//! which it hears of them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::keys::parse_owner_value;
use super::link::{Link, OPEN_TIMEOUT};
use crate::backend::{Claim, Instant, OwnerId};
use crate::engine::flight::Flight;
use crate::engine::lock;
use crate::engine::worker::OnDrop;
use crate::error::Result;

/// Who waits for messages in this process, by owner.
#[derive(Debug)]
pub(super) struct Places<P> {
    places: Mutex<HashMap<String, Arc<Place<P>>>>,
    /// When it is looked at again for places that are no use any more.
    sweep_at: Mutex<Instant>,
}

/// How often that is.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

impl<P> Default for Places<P> {
    fn default() -> Self {
        Self { places: Mutex::default(), sweep_at: Mutex::new(Instant::now() + SWEEP_EVERY) }
    }
}

/// One attempt that waits. `P` is what its backend keeps of it.
#[derive(Debug)]
pub(super) struct Place<P> {
    pub(super) state: Mutex<P>,
    heard: Notify,
    /// Once it is being abandoned: when that is given up at the latest.
    given_up_at: Mutex<Option<Instant>>,
}

/// What a message can change.
pub(super) trait Hears: Send + 'static {
    /// This generation of the owner is meant; the rest of the message comes with it.
    fn hears(&mut self, generation: u32, rest: &str);
}

impl<P> Place<P> {
    /// Resolves once something has been heard, or the subscription has ended, since it last resolved.
    pub(super) async fn heard(&self) {
        self.heard.notified().await;
    }

    /// Somebody tries to abandon it, for no longer than the TTL.
    pub(super) fn is_abandoned(&self, ttl: Duration) {
        lock(&self.given_up_at).get_or_insert_with(|| Instant::now() + ttl * 2);
    }
}

impl<P: Hears> Places<P> {
    /// The place of this claim, which it keeps until it [leaves](Self::leave).
    pub(super) fn enter(&self, claim: &Claim, state: impl FnOnce() -> P) -> Arc<Place<P>> {
        let new =
            || Place { state: Mutex::new(state()), heard: Notify::new(), given_up_at: Mutex::default() };
        let mut places = lock(&self.places);
        let mut sweep_at = lock(&self.sweep_at);
        if sweep_at.has_passed() {
            *sweep_at = Instant::now() + SWEEP_EVERY;
            places.retain(|_, place| !lock(&place.given_up_at).is_some_and(Instant::has_passed));
        }
        places.entry(claim.owner.to_hex()).or_insert_with(|| Arc::new(new())).clone()
    }

    pub(super) fn get(&self, owner: OwnerId) -> Option<Arc<Place<P>>> {
        lock(&self.places).get(&owner.to_hex()).cloned()
    }

    pub(super) fn leave(&self, owner: OwnerId) {
        lock(&self.places).remove(&owner.to_hex());
    }

    /// A message: the owner value, a blank, the rest. For somebody who isn't here any more it means nothing: they are
    /// being abandoned, which gives back what they got.
    fn deliver(&self, message: &str) {
        let Some((owner, rest)) = message.split_once(' ') else { return };
        let Some((hex, generation)) = parse_owner_value(owner) else { return };
        let Some(place) = lock(&self.places).get(hex).cloned() else { return };
        lock(&place.state).hears(generation, rest);
        place.heard.notify_one();
    }

    /// Messages may have been lost: everybody has to look.
    fn wake_all(&self) {
        for place in lock(&self.places).values() {
            place.heard.notify_one();
        }
    }
}

/// The subscription to this provider's channel on one server.
pub(super) struct Subscription<P> {
    channel: Arc<str>,
    places: Arc<Places<P>>,
    current: Arc<Mutex<Option<Live>>>,
    subscribing: Flight,
}

struct Live {
    /// Which of the link's connections it belongs to: after a failover it may listen at the wrong server.
    generation: u64,
    ended: Arc<AtomicBool>,
    reader: AbortHandle,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl<P: Hears> Subscription<P> {
    /// `channel` is this provider's alone.
    pub(super) fn new(channel: Arc<str>, places: Arc<Places<P>>) -> Self {
        Self { channel, places, current: Arc::default(), subscribing: Flight::new(OPEN_TIMEOUT) }
    }

    pub(super) fn channel(&self) -> &str {
        &self.channel
    }

    fn is_live(&self, generation: u64) -> bool {
        lock(&self.current)
            .as_ref()
            .is_some_and(|live| live.generation == generation && !live.ended.load(Ordering::Acquire))
    }

    /// A message that should have come hasn't: the next one to wait subscribes anew.
    pub(super) fn doubt(&self) {
        drop(lock(&self.current).take());
    }

    /// Subscribes unless it is. Whatever is published from now on is heard, until the connection breaks.
    pub(super) async fn ensure(&self, link: &Arc<Link>) -> Result<()> {
        let generation = link.opened().await?.generation;
        if self.is_live(generation) {
            return Ok(());
        }
        let attempt = || {
            let (link, channel) = (link.clone(), self.channel.clone());
            let (places, current) = (self.places.clone(), self.current.clone());
            async move {
                let (sink, mut messages) = link.subscribe(&channel).await?;
                let ended = Arc::new(AtomicBool::new(false));
                let end = OnDrop(Some({
                    let (ended, places) = (ended.clone(), places.clone());
                    move || {
                        ended.store(true, Ordering::Release);
                        places.wake_all();
                    }
                }));
                let reader = tokio::spawn(async move {
                    let _end = end;
                    while let Some(message) = messages.next().await {
                        if let Ok(message) = message.get_payload::<String>() {
                            places.deliver(&message);
                        }
                    }
                    drop(sink); // until here it has kept the connection open
                });
                *lock(&current) = Some(Live { generation, ended, reader: reader.abort_handle() });
                Ok(())
            }
        };
        self.subscribing.join(|| self.is_live(generation), attempt).await?;
        self.subscribing.succeeds();
        Ok(())
    }
}

impl<P> fmt::Debug for Subscription<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}
