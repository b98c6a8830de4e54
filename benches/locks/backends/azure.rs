//! Azurite, for orientation. By hand: the lease of a blob that is there, asked for again and again if it is taken.

use std::time::Duration;

use azure_storage_blob::models::BlobClientAcquireLeaseOptions;
use azure_storage_blob::{BlobClient, BlobContainerClient};
use fencelock::azure::driver as azure_storage_blob;

use crate::backends::{Limit, Site};
use crate::locker::{Locker, Result};
use crate::servers::azurite::AzuriteServer;
use crate::servers::azurite_locks;
use crate::workload::{Targets, Workload};

const CONTAINER: &str = "locks";
const BLOB: &str = "raw";

/// Between two attempts at a lease that is taken.
const POLL: Duration = Duration::from_millis(10);

pub(crate) struct Azurite(AzuriteServer);

impl Azurite {
    pub(crate) fn start() -> Self {
        let server = AzuriteServer::start();
        server.create_container(CONTAINER);
        server.put_blob(CONTAINER, BLOB, b"");
        Self(server)
    }
}

impl Site for Azurite {
    fn url(&self) -> String {
        azurite_locks::url(&self.0, CONTAINER, "ttl=30s")
    }

    fn raw_url(&self) -> String {
        let signature = self.0.sas("rcw", Duration::from_secs(3600));
        format!("{}/{CONTAINER}?{signature}", self.0.endpoint())
    }
}

pub(crate) fn limits(workload: Workload) -> Vec<Limit> {
    let says = match workload {
        Workload::W1 => "lease of a blob that is there",
        Workload::W3 => "the lease, tried every 10 ms",
        _ => return vec![],
    };
    vec![Limit { way: "raw", says, targets: Targets::NONE }]
}

#[derive(Clone)]
pub(crate) struct Raw(std::sync::Arc<BlobClient>);

impl Raw {
    pub(crate) fn connect(url: &str) -> Result<Self> {
        let container =
            BlobContainerClient::new(url.parse()?, None, None).map_err(|error| error.to_string())?;
        Ok(Self(std::sync::Arc::new(container.blob_client(BLOB))))
    }
}

fn lease_id() -> String {
    format!("11111111-2222-3333-4444-{:012}", std::process::id())
}

impl Locker for Raw {
    type Guard = ();

    async fn try_lock(&self, _: &str, _: Option<Duration>) -> Result<()> {
        let options =
            BlobClientAcquireLeaseOptions { proposed_lease_id: Some(lease_id()), ..Default::default() };
        self.0.acquire_lease(30, Some(options)).await.map_err(|error| error.to_string())?;
        Ok(())
    }

    async fn lock(&self, name: &str) -> Result<()> {
        while self.try_lock(name, None).await.is_err() {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    async fn unlock(&self, (): ()) -> Result<()> {
        self.0.release_lease(lease_id(), None).await.map_err(|error| error.to_string())?;
        Ok(())
    }
}
