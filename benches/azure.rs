//! The `azblob` backend beside the raw client, in one run, for orientation: the server is Azurite.
//!
//! `cargo bench --features azure --bench azure`; Azurite is installed by `tests/run.sh`.

use azure_storage_blob::models::BlobClientAcquireLeaseOptions;
use azure_storage_blob::{BlobClient, BlobContainerClient};
use fencelock::Provider;
use fencelock::azure::{AzureLocks, driver as azure_storage_blob};
use tokio::runtime::Runtime;

#[path = "../tests/servers/mod.rs"]
mod servers;
#[allow(dead_code, reason = "the others are for servers that wake waiters")]
mod workloads;

use std::time::Duration;

use servers::azurite::AzuriteServer;
use workloads::Result;

fn main() -> Result<()> {
    Runtime::new()?.block_on(uncontended())
}

/// The lease of a blob that is there: no token, no renewal.
async fn cycle(blob: &BlobClient) -> Result<()> {
    let options = BlobClientAcquireLeaseOptions {
        proposed_lease_id: Some("11111111-2222-3333-4444-555555555555".to_owned()),
        ..Default::default()
    };
    let lease = blob.acquire_lease(30, Some(options)).await;
    lease.map_err(|error| error.to_string())?;
    let released = blob.release_lease("11111111-2222-3333-4444-555555555555".to_owned(), None).await;
    released.map_err(|error| error.to_string())?;
    Ok(())
}

async fn uncontended() -> Result<()> {
    let server = AzuriteServer::start();
    let locks = AzureLocks::from_connection_string(&server.connection_string(), "locks")?;
    locks.connect().await?;
    let provider = Provider::new(locks);
    server.put_blob("locks", "raw", b"");
    let url = format!("{}/locks?{}", server.endpoint(), server.sas("rcw", Duration::from_secs(3600)));
    let container = BlobContainerClient::new(url.parse()?, None, None).map_err(|error| error.to_string())?;
    let blob = container.blob_client("raw");
    workloads::uncontended(500, async |_| cycle(&blob).await, &provider).await
}
