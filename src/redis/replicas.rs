//! The wait for replicas to have a grant.

use std::time::Duration;

use redis::Value;

use super::failure;
use super::keys::Keys;
use super::link::Link;
use super::reply::read_renewals;
use super::script;
use super::waiting::{millis, whole_millis};
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};

/// The longest time that a grant may wait for replicas: everything else stands behind it.
pub(super) const MAX_REPLICA_WAIT: Duration = Duration::from_secs(1);

/// How many replicas have to have a grant.
#[derive(Debug)]
pub(super) struct Replicas {
    pub(super) count: u32,
    pub(super) timeout: Duration,
    /// A connection of its own: what follows a `WAIT` on the same one stands behind it, renewals included.
    pub(super) link: Link,
}

impl Replicas {
    /// Waits until they have the grant; until when it stands then. `WAIT` looks at what its own connection has written, and
    /// what was handed over another one has: hence the renewal before it.
    pub(super) async fn wait(&self, keys: &Keys, owner: &str, ttl: Duration) -> Result<Instant> {
        let unknown = |message| Error::new(ErrorKind::Unknown, message);
        let failed = |error: Error| unknown("the wait for replicas failed").with_source(error);
        let mut connected = self.link.connected().await.map_err(failed)?;
        let sent = Instant::now();
        let answer = script::RENEW
            .run_over(&mut connected, std::slice::from_ref(&keys.lock), &[owner, &millis(ttl).to_string()])
            .await
            .map_err(failed)?;
        if read_renewals(answer) != Some(vec![1]) {
            return Err(unknown("the grant was gone before the replicas had it"));
        }
        let mut wait = redis::cmd("WAIT");
        wait.arg(self.count).arg(millis(self.timeout));
        let have = connected.request(&wait).await.map_err(|error| failed(failure::of_request(&error)))?;
        match have {
            Value::Int(have) if have >= i64::from(self.count) => Ok(sent + whole_millis(ttl)),
            _ => Err(unknown("too few replicas have the grant: it is taken back")),
        }
    }
}
