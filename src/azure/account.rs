//! Which storage account, and by what right: connection strings, URLs and the environment. No I/O.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use azure_core::credentials::Secret;
use azure_core::http::{ClientOptions, RetryOptions, Transport as SdkTransport, Url};
use azure_storage_blob::{BlobContainerClient, BlobContainerClientOptions};

use super::blob::REQUEST_TIMEOUT;
use super::signing::SharedKey;
use super::transport::{Mask, Transport};
use crate::error::{Error, ErrorKind, Result};

/// The account of the emulator, as its documentation has it.
const EMULATOR: &str = "devstoreaccount1";
const EMULATOR_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const EMULATOR_ENDPOINT: &str = "http://127.0.0.1:10000/devstoreaccount1";

/// How long a connection that nobody uses is kept.
const IDLE: Duration = Duration::from_secs(60);

/// A container of a storage account, and the right to use it.
#[derive(Clone)]
pub(super) struct Account {
    name: String,
    /// Without the container.
    endpoint: Url,
    right: Right,
}

#[derive(Clone)]
enum Right {
    Key(Secret),
    /// The query of a URL that has been signed.
    Signature(Secret),
}

/// What a URL says of the account.
#[derive(Default)]
pub(crate) struct Said<'a> {
    pub(crate) key: Option<&'a str>,
    pub(crate) sas: Option<&'a str>,
    pub(crate) endpoint: Option<&'a str>,
}

fn config(message: &'static str) -> Error {
    Error::new(ErrorKind::Config, message)
}

impl Account {
    /// The account of this name, with the right that a URL gives, or else one of these variables.
    pub(super) fn of_url(
        name: &str,
        said: &Said<'_>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let is_name = (3..=24).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !is_name {
            return Err(config("an azblob URL names a storage account, as in `azblob://account/container`"));
        }
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let right = match (said.key, said.sas) {
            (Some(_), Some(_)) => {
                return Err(config("account_key and sas in one URL: one of them is enough"));
            }
            (Some(key), None) => Right::Key(checked_key(key)?),
            (None, Some(sas)) => Right::Signature(checked_signature(sas)?),
            (None, None) => match variable("AZURE_STORAGE_CONNECTION_STRING") {
                Some(string) => {
                    let account = Self::of_connection_string(&string)?;
                    if account.name != name {
                        let message =
                            "AZURE_STORAGE_CONNECTION_STRING is that of another account than the URL's";
                        return Err(config(message));
                    }
                    let endpoint = said.endpoint.map(parse_endpoint).transpose()?;
                    return Ok(Self { endpoint: endpoint.unwrap_or(account.endpoint), ..account });
                }
                None => right_of_environment(variable)?,
            },
        };
        let endpoint = match said.endpoint {
            Some(endpoint) => parse_endpoint(endpoint)?,
            None if name == EMULATOR => parse_endpoint(EMULATOR_ENDPOINT)?,
            None => parse_endpoint(&format!("https://{name}.blob.core.windows.net"))?,
        };
        Ok(Self { name: name.to_owned(), endpoint, right })
    }

    /// The account of a connection string.
    pub(super) fn of_connection_string(string: &str) -> Result<Self> {
        let unreadable = || {
            config(
                "the connection string can't be read: `DefaultEndpointsProtocol=https;AccountName=NAME;AccountKey=KEY`, or with \
                 `SharedAccessSignature` and `BlobEndpoint`, or `UseDevelopmentStorage=true`",
            )
        };
        let mut pairs = Vec::new();
        for pair in string.split(';').map(str::trim).filter(|pair| !pair.is_empty()) {
            pairs.push(pair.split_once('=').ok_or_else(unreadable)?);
        }
        let get = |name: &str| {
            let found = pairs.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| *value).filter(|value| !value.is_empty())
        };
        if get("UseDevelopmentStorage").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            let endpoint = match get("DevelopmentStorageProxyUri") {
                Some(proxy) => format!("{}:10000/{EMULATOR}", proxy.trim_end_matches('/')),
                None => EMULATOR_ENDPOINT.to_owned(),
            };
            return Ok(Self {
                name: EMULATOR.to_owned(),
                endpoint: parse_endpoint(&endpoint)?,
                right: Right::Key(Secret::new(EMULATOR_KEY)),
            });
        }
        let endpoint = match (get("BlobEndpoint"), get("AccountName")) {
            (Some(endpoint), _) => parse_endpoint(endpoint)?,
            (None, Some(name)) => {
                let suffix = get("EndpointSuffix").unwrap_or("core.windows.net");
                let protocol = get("DefaultEndpointsProtocol").unwrap_or("https");
                parse_endpoint(&format!("{protocol}://{name}.blob.{suffix}"))?
            }
            (None, None) => return Err(unreadable()),
        };
        let right = match (get("AccountKey"), get("SharedAccessSignature")) {
            (Some(key), _) => Right::Key(checked_key(key)?),
            (None, Some(sas)) => Right::Signature(checked_signature(sas)?),
            (None, None) => return Err(unreadable()),
        };
        let name = match (get("AccountName"), &right) {
            (Some(name), _) => name.to_owned(),
            // It is in the host's name, or first in the path.
            (None, Right::Signature(_)) => account_of(&endpoint).ok_or_else(unreadable)?,
            (None, Right::Key(_)) => return Err(unreadable()),
        };
        Ok(Self { name, endpoint, right })
    }

    /// A client for a container, with connections of its own, which belong to the runtime that uses them.
    pub(super) fn container(&self, container: &str, mask: Mask) -> Result<BlobContainerClient> {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .map_err(|()| config("the endpoint of the storage account is no base of a URL"))?
            .pop_if_empty()
            .push(container);
        let http = reqwest::Client::builder()
            .connect_timeout(REQUEST_TIMEOUT)
            .pool_idle_timeout(IDLE)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            // Its text is about certificates of the system, and has no URL.
            .map_err(|error| config("no HTTP client can be made").with_source(error.to_string()))?;
        let key = match &self.right {
            Right::Key(key) => Some(SharedKey::new(self.name.clone(), key.clone())),
            Right::Signature(sas) => {
                url.set_query(Some(sas.secret()));
                None
            }
        };
        let client_options = ClientOptions {
            // Claims are never retried below the engine, and all else it retries itself.
            retry: RetryOptions::none(),
            transport: Some(SdkTransport::new(Arc::new(Transport { http, mask, key }))),
            ..ClientOptions::default()
        };
        let options = BlobContainerClientOptions { client_options, ..BlobContainerClientOptions::default() };
        // The SDK's error would have the URL in it.
        BlobContainerClient::new(url, None, Some(options))
            .map_err(|_| config("no client can be made for this endpoint"))
    }

    /// Whether it needs TLS, which not every build has.
    pub(super) fn check_tls(&self) -> Result<()> {
        if self.endpoint.scheme() == "https" && !cfg!(any(feature = "rustls", feature = "native-tls")) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "TLS needs the cargo feature `rustls` or `native-tls`, which this build hasn't got",
            ));
        }
        Ok(())
    }
}

fn right_of_environment(variable: impl Fn(&str) -> Option<String>) -> Result<Right> {
    let key = variable("AZURE_STORAGE_KEY").or_else(|| variable("AZURE_STORAGE_ACCOUNT_KEY"));
    match (key, variable("AZURE_STORAGE_SAS_TOKEN")) {
        (Some(key), _) => checked_key(&key).map(Right::Key),
        (None, Some(sas)) => checked_signature(&sas).map(Right::Signature),
        (None, None) => Err(config(
            "no right to the storage account: set AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or \
             `account_key` or `sas` in the URL; for Microsoft Entra make an AzureLocks of a BlobContainerClient",
        )),
    }
}

fn account_of(endpoint: &Url) -> Option<String> {
    let host = endpoint.host_str()?;
    let name = match host.split_once(".blob.") {
        Some((name, _)) => name,
        None => endpoint.path_segments()?.next()?,
    };
    (!name.is_empty()).then(|| name.to_owned())
}

fn parse_endpoint(endpoint: &str) -> Result<Url> {
    let url = Url::parse(endpoint).ok().filter(|url| {
        ["http", "https"].contains(&url.scheme())
            && url.has_host()
            && url.query().is_none()
            && url.fragment().is_none()
    });
    url.ok_or_else(|| config("the blob endpoint of the storage account is no URL, as in `https://account.blob.core.windows.net`"))
}

/// A key is base64; found out now rather than at the first request.
fn checked_key(key: &str) -> Result<Secret> {
    match azure_core::base64::decode(key.trim()) {
        Ok(decoded) if !decoded.is_empty() => Ok(Secret::new(key.trim().to_owned())),
        _ => {
            Err(config("the key of the storage account isn't base64: in a URL its + / = are percent-encoded"))
        }
    }
}

fn checked_signature(sas: &str) -> Result<Secret> {
    let sas = sas.trim().trim_start_matches('?');
    if sas.split('&').any(|pair| pair.starts_with("sig=")) && !sas.contains('#') {
        return Ok(Secret::new(sas.to_owned()));
    }
    Err(config("the shared access signature has no `sig`: in a URL its = & % + are percent-encoded"))
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "c2VjcmV0";
    const SAS: &str = "sv=2025-01-05&sig=c2VjcmV0";

    fn url_of(account: &Account) -> String {
        account.container("locks", Mask::NONE).unwrap().url().to_string()
    }

    #[test]
    fn connection_strings() {
        for (string, url) in [
            ("UseDevelopmentStorage=true", "http://127.0.0.1:10000/devstoreaccount1/locks"),
            (
                "UseDevelopmentStorage=true;DevelopmentStorageProxyUri=http://azurite",
                "http://azurite:10000/devstoreaccount1/locks",
            ),
            (
                "DefaultEndpointsProtocol=https;AccountName=shop;AccountKey=c2VjcmV0;EndpointSuffix=core.windows.net",
                "https://shop.blob.core.windows.net/locks",
            ),
            (
                "accountname=shop;AccountKey=c2VjcmV0;BlobEndpoint=http://127.0.0.1:1/shop;",
                "http://127.0.0.1:1/shop/locks",
            ),
            (
                "BlobEndpoint=https://shop.blob.core.windows.net/;SharedAccessSignature=sv=2025-01-05&sig=c2VjcmV0",
                "https://shop.blob.core.windows.net/locks?sv=2025-01-05&sig=c2VjcmV0",
            ),
        ] {
            let account = Account::of_connection_string(string).unwrap();
            assert_eq!(url_of(&account), url, "{string}");
            assert!(["shop", EMULATOR].contains(&&*account.name));
            assert!(!format!("{account:?}").contains(KEY));
        }
        for wrong in [
            "",
            "nonsense",
            "AccountName=shop",
            "AccountKey=c2VjcmV0",
            "AccountName=shop;AccountKey=!",
            "AccountName=a;SharedAccessSignature=x",
        ] {
            let error = Account::of_connection_string(wrong).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{wrong}");
        }
    }

    #[test]
    fn the_url_comes_before_the_environment() {
        let nothing = |_: &str| None;
        let all = |name: &str| match name {
            "AZURE_STORAGE_CONNECTION_STRING" => Some("AccountName=shop;AccountKey=b3RoZXI=".to_owned()),
            "AZURE_STORAGE_SAS_TOKEN" => Some(format!("?{SAS}")),
            _ => None,
        };
        let sas_only = |name: &str| all(name).filter(|_| name == "AZURE_STORAGE_SAS_TOKEN");
        let key_of = |account: Account| match account.right {
            Right::Key(key) => key.secret().to_owned(),
            Right::Signature(sas) => sas.secret().to_owned(),
        };
        let said = Said { key: Some(KEY), ..Said::default() };
        assert_eq!(key_of(Account::of_url("shop", &said, all).unwrap()), KEY);
        assert_eq!(key_of(Account::of_url("shop", &Said::default(), all).unwrap()), "b3RoZXI=");
        assert_eq!(key_of(Account::of_url("shop", &Said::default(), sas_only).unwrap()), SAS);
        let another = Account::of_url("another", &Said::default(), all).unwrap_err();
        assert!(another.to_string().contains("another account"));
        for (name, said) in [
            ("shop", Said::default()),
            ("Shop", Said { key: Some(KEY), ..Said::default() }),
            ("shop", Said { key: Some(KEY), sas: Some(SAS), ..Said::default() }),
            ("shop", Said { sas: Some("sv=1"), ..Said::default() }),
            ("shop", Said { key: Some(KEY), endpoint: Some("ftp://x"), ..Said::default() }),
        ] {
            assert_eq!(Account::of_url(name, &said, nothing).unwrap_err().kind(), ErrorKind::Config);
        }
    }
}
