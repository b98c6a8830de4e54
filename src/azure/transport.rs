//! What goes over the wire: the SDK writes requests into its traces, so that what mustn't be there is put into them only here.

use std::fmt;

use async_trait::async_trait;
use azure_core::Result;
use azure_core::http::headers::{HeaderName, Headers};
use azure_core::http::{AsyncRawResponse, HttpClient, Request};

use super::signing::SharedKey;
use crate::backend::OwnerId;

/// The headers that have the id of a lease.
const IDS: [&str; 2] = ["x-ms-lease-id", "x-ms-proposed-lease-id"];

/// What the SDK knows the ids of leases by: others, of the same form, which mean nothing to anybody without this.
#[derive(Clone, Copy)]
pub(super) struct Mask(u128);

impl Mask {
    /// None: for a client of the application's, which sends what it is told.
    pub(super) const NONE: Self = Self(0);

    pub(super) fn random() -> crate::error::Result<Self> {
        OwnerId::random().map(|bits| Self(u128::from_be_bytes(bits.to_bytes())))
    }

    /// What the SDK is told.
    pub(super) fn hide(self, lease: OwnerId) -> String {
        format(u128::from_be_bytes(lease.to_bytes()) ^ self.0)
    }

    /// What it means, if it is an id.
    fn reveal(self, id: &str) -> Option<String> {
        let bits = u128::from_str_radix(&id.replace('-', ""), 16).ok()?;
        Some(format(bits ^ self.0))
    }
}

/// As the service writes an id.
fn format(bits: u128) -> String {
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Sends requests with the right ids, signed if there is a key.
pub(super) struct Transport {
    pub(super) http: reqwest::Client,
    pub(super) mask: Mask,
    pub(super) key: Option<SharedKey>,
}

impl Transport {
    /// The ids among these headers, revealed, or hidden: the mask does both.
    fn masked(&self, headers: &Headers) -> Vec<(HeaderName, String)> {
        let ids = IDS.map(HeaderName::from_static).into_iter();
        ids.filter_map(|name| {
            let id = self.mask.reveal(headers.get_optional_str(&name)?)?;
            Some((name, id))
        })
        .collect()
    }
}

#[async_trait]
impl HttpClient for Transport {
    async fn execute_request(&self, request: &Request) -> Result<AsyncRawResponse> {
        let mut request = request.clone();
        for (name, id) in self.masked(request.headers()) {
            request.insert_header(name, id);
        }
        if let Some(key) = &self.key {
            key.sign(&mut request)?;
        }
        let (status, mut headers, body) = self.http.execute_request(&request).await?.deconstruct();
        for (name, id) in self.masked(&headers) {
            headers.insert(name, id);
        }
        Ok(AsyncRawResponse::new(status, headers, Box::pin(body)))
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("key", &self.key).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_can_be_revealed() {
        let (mask, lease) = (Mask::random().unwrap(), OwnerId::random().unwrap());
        let (hidden, shown) = (mask.hide(lease), Mask::NONE.hide(lease));
        assert_ne!(hidden, shown);
        assert_eq!(mask.reveal(&hidden), Some(shown.clone()));
        assert_eq!(shown.replace('-', ""), lease.to_hex());
        assert_eq!(shown.len(), 36);
        assert_eq!(mask.reveal("none"), None);
    }
}
