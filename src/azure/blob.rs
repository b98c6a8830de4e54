//! [`LockBlob`]: the blob of a lock, its lease, and the fencing token in its metadata.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use azure_core::http::Etag;
use azure_core::http::headers::{ETAG, HeaderName, Headers};
use azure_core::{Bytes, Error as SdkError};
use azure_storage_blob::models::{
    BlobClientAcquireLeaseOptions, BlobClientBreakLeaseOptions, BlobClientGetPropertiesResultHeaders,
    BlobClientSetMetadataOptions, BlockBlobClientUploadOptions,
};
use azure_storage_blob::{BlobClient, BlobContainerClient};

use super::failure::{self, Refusal};
use crate::backend::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::fencing::FencingToken;

/// The metadata that the last fencing token is in.
pub(super) const TOKEN: &str = "fencelock_token";

/// How often a change of somebody else's may come between reading the metadata and writing it. Under our lease hardly any can.
const DRAWS: usize = 5;

/// How long one request may take. Several fit into the shortest lease.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);

/// The blob of a lock.
pub(super) struct LockBlob<'a> {
    pub(super) container: &'a BlobContainerClient,
    pub(super) blob: BlobClient,
}

/// A blob's metadata at one time.
#[derive(Clone, Debug)]
pub(super) struct Version {
    etag: Etag,
    metadata: HashMap<String, String>,
}

/// A lease that was taken.
pub(super) struct Leased {
    /// When it was asked for.
    pub(super) sent: Instant,
    /// What the blob was like.
    pub(super) etag: Option<Etag>,
    /// By the service's clock.
    pub(super) at: SystemTime,
}

/// The answer to a request that the service may refuse for reasons that are no failure.
pub(super) type Answer<T> = Result<Result<T, Refusal>>;

/// Sends a request and waits for its answer.
async fn send<T>(request: impl Future<Output = Result<T, SdkError>>) -> Answer<T> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(Ok(answer)),
        Ok(Err(error)) => match failure::refusal(&error) {
            Refusal::Other => Err(failure::of_request(&error)),
            refusal => Ok(Err(refusal)),
        },
        Err(_) => Err(failure::timed_out()),
    }
}

/// An error about nothing that lasts: that the answer is lost doesn't matter.
fn harmless(error: Error) -> Error {
    if error.kind() != ErrorKind::Unknown {
        return error;
    }
    Error::new(ErrorKind::Unavailable, "Azure Storage doesn't answer").with_source(error)
}

fn etag(headers: &Headers) -> Option<Etag> {
    headers.get_optional_str(&ETAG).map(Etag::from)
}

/// The service's clock, or ours if it doesn't say. It says whole seconds: what is between them is from ours.
fn date(headers: &Headers) -> SystemTime {
    let (ours, date) = (SystemTime::now(), headers.get_optional_str(&HeaderName::from_static("date")));
    let Some(date) = date.and_then(|date| azure_core::time::parse_rfc7231(date).ok()) else { return ours };
    let date = SystemTime::from(date);
    ours.clamp(date, date + Duration::from_micros(999_999))
}

impl LockBlob<'_> {
    /// Takes the lease, for so many seconds, under this id; also if that id has it already. Makes what is missing.
    pub(super) async fn lease(&self, seconds: i32, id: &str) -> Answer<Leased> {
        match self.try_lease(seconds, id).await? {
            Err(missing @ (Refusal::NoBlob | Refusal::NoContainer)) => {
                self.make(missing).await?;
                self.try_lease(seconds, id).await
            }
            answer => Ok(answer),
        }
    }

    /// The same of a blob that is there.
    pub(super) async fn try_lease(&self, seconds: i32, id: &str) -> Answer<Leased> {
        let options =
            BlobClientAcquireLeaseOptions { proposed_lease_id: Some(id.to_owned()), ..Default::default() };
        let sent = Instant::now();
        let answer = send(self.blob.acquire_lease(seconds, Some(options))).await?;
        Ok(answer.map(|response| Leased {
            sent,
            etag: etag(response.headers()),
            at: date(response.headers()),
        }))
    }

    /// Makes the blob, and the container if that is missing, too.
    async fn make(&self, missing: Refusal) -> Result<()> {
        if missing == Refusal::NoContainer {
            self.make_container().await?;
        }
        match self.make_blob().await? {
            Err(Refusal::NoContainer) => {
                self.make_container().await?;
                self.make_blob().await?.map_err(|_| nobody_has_it())
            }
            _ => Ok(()), // there, or somebody else has made it, and may have leased it
        }
    }

    async fn make_blob(&self) -> Answer<()> {
        let options = BlockBlobClientUploadOptions::default().if_not_exists();
        let blob = self.blob.block_blob_client();
        let answer = send(blob.upload(Bytes::new().into(), Some(options))).await;
        Ok(answer.map_err(harmless)?.map(drop))
    }

    pub(super) async fn make_container(&self) -> Result<()> {
        let answer = send(self.container.create(None)).await.map_err(harmless)?;
        match answer {
            Ok(_) | Err(Refusal::IsThere) => Ok(()),
            Err(_) => Err(nobody_has_it()),
        }
    }

    /// Draws a fencing token under the lease: larger than the last one, and not behind the clock. The metadata as it is then.
    pub(super) async fn draw(
        &self,
        id: &str,
        known: Option<Version>,
        clock: SystemTime,
    ) -> Answer<(FencingToken, Version)> {
        let mut known = known;
        for _ in 0..DRAWS {
            let mut version = match known.take() {
                Some(version) => version,
                None => match self.read().await? {
                    Ok(version) => version,
                    Err(refusal) => return Ok(Err(refusal)),
                },
            };
            let last = version.metadata.iter().find(|(key, _)| key.eq_ignore_ascii_case(TOKEN));
            let last = last.map_or(Ok(0), |(_, last)| last.parse::<u64>()).map_err(|_| {
                Error::new(ErrorKind::Config, "the blob's metadata fencelock_token isn't a number")
            })?;
            let token = FencingToken::after(last, clock)?;
            version.metadata.retain(|key, _| !key.eq_ignore_ascii_case(TOKEN));
            version.metadata.insert(TOKEN.to_owned(), token.to_string());
            let options = BlobClientSetMetadataOptions {
                lease_id: Some(id.to_owned()),
                if_match: Some(version.etag.clone()),
                ..Default::default()
            };
            match send(self.blob.set_metadata(&version.metadata, Some(options))).await? {
                Ok(response) => {
                    if let Some(etag) = etag(response.headers()) {
                        version.etag = etag;
                    }
                    return Ok(Ok((token, version)));
                }
                Err(Refusal::Changed) => {}
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "somebody keeps changing the blob of this lock"))
    }

    /// What its metadata is.
    pub(super) async fn read(&self) -> Answer<Version> {
        let response = match send(self.blob.get_properties(None)).await.map_err(harmless)? {
            Ok(response) => response,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let metadata = response.metadata().map_err(|error| harmless(failure::of_request(&error)))?;
        let etag = etag(response.headers());
        let etag =
            etag.ok_or_else(|| Error::new(ErrorKind::Unavailable, "Azure Storage answers without an ETag"))?;
        Ok(Ok(Version { etag, metadata }))
    }

    pub(super) async fn renew(&self, id: &str) -> Answer<()> {
        Ok(send(self.blob.renew_lease(id.to_owned(), None)).await?.map(drop))
    }

    pub(super) async fn release(&self, id: &str) -> Answer<()> {
        Ok(send(self.blob.release_lease(id.to_owned(), None)).await?.map(drop))
    }

    /// Gives the lease another id.
    pub(super) async fn change(&self, id: &str, to: &str) -> Answer<SystemTime> {
        let answer = send(self.blob.change_lease(id.to_owned(), to.to_owned(), None)).await?;
        Ok(answer.map(|response| date(response.headers())))
    }

    /// Lets the lease end by itself after so many seconds, whoever has it, if the blob hasn't changed.
    pub(super) async fn end_after(&self, seconds: i32, etag: Etag) -> Answer<()> {
        let options = BlobClientBreakLeaseOptions {
            break_period: Some(seconds),
            if_match: Some(etag),
            ..Default::default()
        };
        Ok(send(self.blob.break_lease(Some(options))).await?.map(drop))
    }
}

impl Version {
    /// It, if the blob is still the same.
    pub(super) fn if_still(self, etag: Option<&Etag>) -> Option<Self> {
        etag.is_some_and(|etag| *etag == self.etag).then_some(self)
    }
}

fn nobody_has_it() -> Error {
    Error::new(ErrorKind::Unavailable, "the container disappears while it is being used")
}
