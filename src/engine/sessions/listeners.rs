//! [`Listeners`]: claims that wait to hear of a release.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::engine::lock;

/// Claims that wait to hear of a release, by key. Names with the same key hear of the same.
#[derive(Debug)]
pub(crate) struct Listeners<K>(Mutex<HashMap<K, Vec<Arc<Notify>>>>);

impl<K> Default for Listeners<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> Listeners<K> {
    /// The lock of this key has been released.
    #[cfg(any(test, feature = "postgres"))]
    pub(crate) fn wake(&self, key: &K) {
        if let Some(listeners) = lock(&self.0).get(key) {
            for listener in listeners {
                listener.notify_one();
            }
        }
    }

    /// Some releases may not have been heard.
    pub(crate) fn wake_all(&self) {
        for listener in lock(&self.0).values().flatten() {
            listener.notify_one();
        }
    }

    pub(super) fn listen(self: &Arc<Self>, key: &K) -> Listening<K> {
        let heard = Arc::<Notify>::default();
        lock(&self.0).entry(key.clone()).or_default().push(heard.clone());
        Listening { all: self.clone(), key: key.clone(), heard }
    }
}

/// As long as it lives, releases are heard.
pub(super) struct Listening<K: Eq + Hash> {
    all: Arc<Listeners<K>>,
    key: K,
    heard: Arc<Notify>,
}

impl<K: Eq + Hash> Listening<K> {
    pub(super) fn key(&self) -> &K {
        &self.key
    }

    /// Is notified of each release that is heard.
    pub(super) fn heard(&self) -> Arc<Notify> {
        self.heard.clone()
    }
}

impl<K: Eq + Hash> Drop for Listening<K> {
    fn drop(&mut self) {
        let mut all = lock(&self.all.0);
        if let Some(listeners) = all.get_mut(&self.key) {
            listeners.retain(|listener| !Arc::ptr_eq(listener, &self.heard));
            if listeners.is_empty() {
                all.remove(&self.key);
            }
        }
    }
}
