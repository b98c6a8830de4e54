//! Locks of one process: beside `memory:` a map of `tokio` mutexes, from which a name goes when nobody wants it any
//! more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

use crate::backends::{Limit, Site};
use crate::locker::{Locker, Result};
use crate::workload::{Targets, Workload};

pub(crate) struct Memory;

impl Site for Memory {
    fn url(&self) -> String {
        "memory:".to_owned()
    }
}

pub(crate) fn limits(workload: Workload) -> Vec<Limit> {
    match workload {
        Workload::W1 | Workload::W2(_) | Workload::W3 | Workload::W4a => {
            vec![Limit { way: "map", says: "map of tokio mutexes", targets: Targets::NONE }]
        }
        _ => vec![],
    }
}

#[derive(Clone, Default)]
pub(crate) struct Map(Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>);

impl Map {
    fn mutex(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.entry(name.to_owned()).or_default().clone()
    }
}

impl Locker for Map {
    type Guard = (String, OwnedMutexGuard<()>);

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<Self::Guard> {
        Ok((name.to_owned(), self.mutex(name).try_lock_owned()?))
    }

    async fn lock(&self, name: &str) -> Result<Self::Guard> {
        Ok((name.to_owned(), self.mutex(name).lock_owned().await))
    }

    async fn unlock(&self, (name, guard): Self::Guard) -> Result<()> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(guard);
        if map.get(&name).is_some_and(|mutex| Arc::strong_count(mutex) == 1) {
            map.remove(&name);
        }
        Ok(())
    }
}
