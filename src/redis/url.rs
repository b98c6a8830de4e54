//! What a URL says about Redis servers. No I/O.

use std::time::Duration;

use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{Client, ConnectionAddr, IntoConnectionInfo, ProtocolVersion, TlsMode};

use super::single::RedisLocks;
use crate::error::{Error, ErrorKind, Result};

/// How long a grant waits for replicas unless the URL says.
const REPLICA_TIMEOUT: Duration = Duration::from_millis(100);

/// Where Sentinels listen unless the URL says.
const SENTINEL_PORT: u16 = 26_379;

/// A URL, taken apart.
#[derive(Debug)]
pub(crate) struct RedisUrl<'a> {
    /// Over TLS.
    pub(crate) tls: bool,
    /// What stands between the scheme and the query.
    pub(crate) rest: &'a str,
}

/// What the query says that only this backend understands.
#[derive(Debug, Default)]
pub(crate) struct SingleParameters {
    /// The name of the master that the hosts, which are Sentinels, watch.
    pub(crate) sentinel: Option<String>,
    pub(crate) sentinel_username: Option<String>,
    pub(crate) sentinel_password: Option<String>,
    /// So many replicas have to have a grant.
    pub(crate) replicas: Option<u32>,
    pub(crate) replica_timeout: Option<Duration>,
}

impl RedisUrl<'_> {
    /// Locks on one server, or on a master behind Sentinels.
    pub(crate) fn single(&self, parameters: SingleParameters) -> Result<RedisLocks> {
        let port = parameters.sentinel.is_some().then_some(SENTINEL_PORT);
        let mut clients = self.clients(port)?;
        let locks = match parameters.sentinel {
            Some(name) if name.is_empty() => {
                return Err(config("sentinel=NAME needs the name of the master that the Sentinels watch"));
            }
            Some(name) => {
                self.sentinel(&clients, name, parameters.sentinel_username, parameters.sentinel_password)?
            }
            None if parameters.sentinel_username.is_some() || parameters.sentinel_password.is_some() => {
                return Err(config("sentinel_username and sentinel_password need sentinel=NAME"));
            }
            None if clients.len() > 1 => {
                return Err(config(
                    "several hosts in a redis URL are Sentinels, and need sentinel=NAME, the name of the master that they \
                     watch; for locks on a majority of independent servers write `redlock://`",
                ));
            }
            None => RedisLocks::new(clients.remove(0)),
        };
        match (parameters.replicas, parameters.replica_timeout) {
            (None, None) => Ok(locks),
            (None, Some(_)) => Err(config("replica_timeout needs replicas=N")),
            (Some(count), timeout) => locks.wait_for_replicas(count, timeout.unwrap_or(REPLICA_TIMEOUT)),
        }
    }

    fn sentinel(
        &self,
        sentinels: &[Client],
        name: String,
        username: Option<String>,
        password: Option<String>,
    ) -> Result<RedisLocks> {
        let addresses = sentinels.iter().map(|client| client.get_connection_info().addr().clone());
        let refused = |error| config("the Sentinel settings can't be used").with_source(error);
        let mut builder =
            SentinelClientBuilder::new(addresses, name, SentinelServerType::Master).map_err(refused)?;
        let master = sentinels[0].get_connection_info().redis_settings();
        builder =
            builder.set_client_to_redis_db(master.db()).set_client_to_redis_protocol(ProtocolVersion::RESP2);
        if let Some(username) = master.username() {
            builder = builder.set_client_to_redis_username(username);
        }
        if let Some(password) = master.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(username) = username {
            builder = builder.set_client_to_sentinel_username(username);
        }
        if let Some(password) = password {
            builder = builder.set_client_to_sentinel_password(password);
        }
        if self.tls {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_tls_mode(TlsMode::Secure);
        }
        #[cfg(all(feature = "rustls", feature = "native-tls"))]
        if self.tls {
            builder = builder.set_client_to_redis_certificates(system_certificates());
        }
        Ok(RedisLocks::with_sentinel(builder.build().map_err(refused)?))
    }

    /// A client for each host. User and password of the first host go for those that have none; the database goes for all.
    /// `port` is that of hosts without one, unless it is Redis' own.
    pub(crate) fn clients(&self, port: Option<u16>) -> Result<Vec<Client>> {
        if self.tls && !cfg!(any(feature = "rustls", feature = "native-tls")) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "TLS needs the cargo feature `rustls` or `native-tls`, which this build hasn't got",
            ));
        }
        let authority_and_path = self
            .rest
            .strip_prefix("//")
            .ok_or_else(|| config("a redis URL names its host, as in `redis://127.0.0.1:6379/0`"))?;
        let (authority, path) = authority_and_path.split_once('/').unwrap_or((authority_and_path, ""));
        let mut first_login = None;
        authority
            .split(',')
            .map(|host| {
                let (login, host) = match host.rsplit_once('@') {
                    Some((login, host)) => (Some(login), host),
                    None => (None, host),
                };
                let login = login.or(first_login);
                first_login = first_login.or(login);
                if host.is_empty() {
                    return Err(config("a host is missing in the URL"));
                }
                let scheme = if self.tls { "rediss" } else { "redis" };
                let login = login.map(|login| format!("{login}@")).unwrap_or_default();
                let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
                let port = port.filter(|_| !has_port).map(|port| format!(":{port}")).unwrap_or_default();
                open(format!("{scheme}://{login}{host}{port}/{path}").as_str())
            })
            .collect()
    }

    /// The client for a Unix socket, `rest` being its path.
    pub(crate) fn unix_client(
        &self,
        db: Option<&str>,
        user: Option<&str>,
        password: Option<&str>,
    ) -> Result<Client> {
        let path = self.rest.strip_prefix("//").unwrap_or(self.rest);
        if !path.starts_with('/') {
            return Err(config("the path of a socket is absolute, as in `redis+unix:///run/redis.sock`"));
        }
        let db: u16 = db.map_or(Ok(0), str::parse).map_err(|_| config("db in the URL must be a number"))?;
        let refused = |error| config("the socket's settings can't be used").with_source(error);
        let mut info = ConnectionAddr::Unix(path.into()).into_connection_info().map_err(refused)?;
        let mut settings = info.redis_settings().clone().set_db(db.into());
        if let Some(user) = user {
            settings = settings.set_username(user);
        }
        if let Some(password) = password {
            settings = settings.set_password(password);
        }
        info = info.set_redis_settings(settings);
        Client::open(info).map_err(refused)
    }
}

fn open(url: &str) -> Result<Client> {
    #[cfg(all(feature = "rustls", feature = "native-tls"))]
    let client = if url.starts_with("rediss:") {
        Client::build_with_tls(url, system_certificates())
    } else {
        Client::open(url)
    };
    #[cfg(not(all(feature = "rustls", feature = "native-tls")))]
    let client = Client::open(url);
    // The driver's own error may quote what it couldn't read.
    client.ok().filter(|client| client.get_connection_info().redis_settings().db() >= 0).ok_or_else(|| {
        config(
            "this is not a redis URL: it is like `redis://user:password@host:6379/0`, with `/`, `?`, `@`, `:`, `,` and `#` \
             in user and password percent-encoded",
        )
    })
}

/// Whom the system trusts. With both kinds of TLS the driver uses rustls, and trusts nobody unless it is told whom.
#[cfg(all(feature = "rustls", feature = "native-tls"))]
fn system_certificates() -> redis::TlsCertificates {
    use base64::Engine;

    let mut pem = String::new();
    for certificate in rustls_native_certs::load_native_certs().certs {
        if rustls::RootCertStore::empty().add(certificate.clone()).is_err() {
            continue; // one that can't be read must not keep the others out
        }
        let body = base64::engine::general_purpose::STANDARD.encode(certificate);
        pem.extend(["-----BEGIN CERTIFICATE-----\n", &body, "\n-----END CERTIFICATE-----\n"]);
    }
    let pem = pem.into_bytes();
    redis::TlsCertificates { client_tls: None, root_cert: Some(pem) }
}

fn config(message: &'static str) -> Error {
    Error::new(ErrorKind::Config, message)
}
