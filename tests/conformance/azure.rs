//! Azurite, with a container for each trial.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use fencelock::azure::AzureLocks;
use fencelock::testing::{Harness, Target};
use fencelock::{Capabilities, Expiry, LockName, LockOptions, LockProvider, Loss};

use super::provider;
use super::servers::azurite::AzuriteServer;

pub(super) fn targets() -> Vec<Arc<dyn Target>> {
    vec![Arc::new(Azure)]
}

#[derive(Debug)]
struct Azure;

/// One server for all trials of a process.
static SERVER: Mutex<Option<Arc<AzuriteServer>>> = Mutex::new(None);

fn server() -> Arc<AzuriteServer> {
    let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    server.get_or_insert_with(|| Arc::new(AzuriteServer::start())).clone()
}

/// What is static isn't dropped by itself, and would leave its data behind.
pub(super) fn stop_server() {
    SERVER.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn locks(connection_string: &str, container: &str) -> AzureLocks {
    AzureLocks::from_connection_string(connection_string, container).expect("a connection string of ours")
}

#[async_trait]
impl Target for Azure {
    fn name(&self) -> &'static str {
        "azure"
    }

    fn capabilities(&self) -> Capabilities {
        let (min, max) = (Duration::from_secs(15), Duration::from_secs(60));
        Capabilities::new(min, max, Expiry::Ttl).keeps_after_exit(true).max_hold_at_least(max)
    }

    fn crosses_processes(&self) -> bool {
        true
    }

    fn takes_away(&self) -> bool {
        true
    }

    async fn start(&self) -> Box<dyn Harness> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let server = tokio::task::spawn_blocking(server).await.expect("Azurite is started");
        let container = format!("trial{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Box::new(Trial { server, container })
    }

    async fn attach(&self, address: &str) -> Box<dyn LockProvider> {
        let (container, connection_string) = address.split_once(' ').expect("an address of ours");
        provider(locks(connection_string, container), LockOptions::new())
    }
}

#[derive(Debug)]
struct Trial {
    server: Arc<AzuriteServer>,
    container: String,
}

#[async_trait]
impl Harness for Trial {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        let locks = locks(&self.server.connection_string(), &self.container);
        locks.connect().await.expect("the server is there"); // as a URL does
        provider(locks, options)
    }

    fn address(&self) -> String {
        format!("{} {}", self.container, self.server.connection_string())
    }

    async fn lose(&self, name: &str) -> Loss {
        self.server.break_lease(&self.container, &LockName::new(name).encode(254));
        Loss::Taken
    }

    fn secrets(&self) -> Vec<String> {
        vec![self.server.key().to_owned()]
    }
}
