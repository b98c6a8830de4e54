//! [`Stage`]: a backend with servers of its own, and networks on the way to them that count.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::LockProvider;
use tokio::time::timeout;

use crate::servers::proxy::Proxy;
use crate::servers::rigs::{Kind, Rig};

/// Longer than anything takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);

/// What a trial runs on.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) kind: &'static Kind,
    pub(crate) rig: Arc<dyn Rig>,
    network: Vec<Proxy>,
}

impl Stage {
    pub(crate) fn set(kind: &'static Kind) -> Self {
        let rig = (kind.start)();
        let network = rig.addrs().into_iter().map(Proxy::start).collect();
        Self { kind, rig, network }
    }

    /// A provider whose requests and connections are counted.
    pub(crate) async fn counted(&self, ttl: Duration) -> Arc<dyn LockProvider> {
        let addrs: Vec<SocketAddr> = self.network.iter().map(Proxy::addr).collect();
        connected(&self.rig.url_by(&addrs, ttl)).await
    }

    /// A provider that has nothing in between.
    pub(crate) async fn direct(&self, ttl: Duration) -> Arc<dyn LockProvider> {
        connected(&self.rig.url(ttl)).await
    }

    /// How many requests went to all servers. Of a protocol other than Redis's those that arrive at once count as one.
    pub(crate) fn commands(&self) -> u64 {
        self.network.iter().map(Proxy::commands).sum()
    }

    /// How many connections there were to all servers, over all the time.
    pub(crate) fn connections(&self) -> u64 {
        self.network.iter().map(Proxy::connections).sum()
    }
}

async fn connected(url: &str) -> Arc<dyn LockProvider> {
    within("the provider is there", fencelock::connect(url)).await.expect("the servers are there").into()
}

/// Awaits what has to happen.
pub(crate) async fn within<F: Future>(event: &str, future: F) -> F::Output {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {event}"))
}
