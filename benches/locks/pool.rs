//! Connections for those who block in the server: each needs one of its own.

use std::sync::{Arc, Mutex, PoisonError};

use crate::locker::Result;

/// Those that nobody uses right now.
pub(crate) struct Pool<C>(Arc<Mutex<Vec<C>>>);

impl<C> Clone for Pool<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C> Default for Pool<C> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<C> Pool<C> {
    /// One of them, or a new one.
    pub(crate) async fn get(&self, open: impl AsyncFnOnce() -> Result<C>) -> Result<C> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match idle {
            Some(connection) => Ok(connection),
            None => open().await,
        }
    }

    pub(crate) fn put(&self, connection: C) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
}
