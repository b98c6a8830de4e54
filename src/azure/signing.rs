//! Signs requests with the key of a storage account ("Authorize with Shared Key", in the reference of its REST API), which the SDK
//! hasn't got.

use std::collections::BTreeMap;
use std::fmt;

use azure_core::credentials::Secret;
use azure_core::hmac::hmac_sha256;
use azure_core::http::Request;
use azure_core::http::headers::{AUTHORIZATION, HeaderName, MS_DATE};
use azure_core::time::{OffsetDateTime, to_rfc7231};

/// The key of an account.
pub(super) struct SharedKey {
    account: String,
    key: Secret,
}

/// The standard headers that are signed, in this order, between the method and those of the service.
const SIGNED: [&str; 11] = [
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
];

impl SharedKey {
    pub(super) fn new(account: String, key: Secret) -> Self {
        Self { account, key }
    }

    /// Signs a request that isn't changed any more.
    pub(super) fn sign(&self, request: &mut Request) -> azure_core::Result<()> {
        request.insert_header(MS_DATE, to_rfc7231(&OffsetDateTime::now_utc()));
        let signature = hmac_sha256(&self.text(request), &self.key)?;
        request.insert_header(AUTHORIZATION, format!("SharedKey {}:{signature}", self.account));
        Ok(())
    }

    /// What is signed.
    fn text(&self, request: &Request) -> String {
        let mut text = request.method().to_string();
        for name in SIGNED {
            text.push('\n');
            match request.headers().get_optional_string(&HeaderName::from_static(name)) {
                // Of an empty body nothing is signed.
                Some(length) if name == "content-length" && length == "0" => {}
                Some(value) => text.push_str(&value),
                None if name == "content-length" => {
                    let length = request.body().len().filter(|length| *length > 0);
                    text.extend(length.map(|length| length.to_string()));
                }
                None => {}
            }
        }
        text.push('\n');
        let headers = request.headers().iter();
        let mut ours: Vec<_> = headers
            .map(|(name, value)| (name.as_str().to_ascii_lowercase(), value.as_str().trim().to_owned()))
            .filter(|(name, _)| name.starts_with("x-ms-"))
            .collect();
        // The service, as its own clients, has the underscore before digits, which only names of metadata have.
        ours.sort_by_key(|(name, _)| name.replace('_', "!"));
        for (name, value) in ours {
            text.extend([&name, ":", &value, "\n"]);
        }
        text.extend(["/", &self.account, request.url().path()]);
        let mut parameters: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in request.url().query_pairs() {
            parameters.entry(name.to_ascii_lowercase()).or_default().push(value.into_owned());
        }
        for (name, mut values) in parameters {
            values.sort();
            text.extend(["\n", &name, ":", &values.join(",")]);
        }
        text
    }
}

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedKey").field("account", &self.account).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use azure_core::http::{Method, Url};

    use super::*;

    #[test]
    fn signs_what_the_reference_says() {
        let url = "https://acc.blob.core.windows.net/locks/a%2Fb?timeout=20&comp=lease&Comp=b";
        let mut request = Request::new(Url::parse(url).unwrap(), Method::Put);
        request.insert_header("x-ms-version", "2025-01-05");
        request.insert_header("x-ms-date", "Tue, 24 Nov 2026 17:00:00 GMT");
        request.insert_header("if-match", "\"0x1\"");
        request.insert_header("user-agent", "test");
        let policy = SharedKey::new("acc".to_owned(), Secret::new("a2V5"));
        assert_eq!(
            policy.text(&request),
            "PUT\n\n\n\n\n\n\n\n\"0x1\"\n\n\n\nx-ms-date:Tue, 24 Nov 2026 17:00:00 GMT\nx-ms-version:2025-01-05\n\
             /acc/locks/a%2Fb\ncomp:b,lease\ntimeout:20"
        );
        request.set_body(vec![1, 2, 3]);
        assert!(policy.text(&request).starts_with("PUT\n\n\n3\n\n"));
        assert!(!format!("{policy:?}").contains("a2V5"));
    }
}
