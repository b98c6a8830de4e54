//! What a URL says about a PostgreSQL server. No I/O.

use tokio_postgres::Config;
use tokio_postgres::config::SslMode;

use super::PostgresLocks;
use super::tls::{self, Verify};
use crate::error::{Error, ErrorKind, Result};

/// Parameters of the driver's that a URL may have; `sslmode` has more values here.
pub(crate) const DRIVERS_PARAMETERS: [&str; 14] = [
    "application_name",
    "channel_binding",
    "connect_timeout",
    "hostaddr",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "load_balance_hosts",
    "options",
    "sslnegotiation",
    "target_session_attrs",
    "tcp_user_timeout",
    "host",
];

/// Locks on the server that a URL names: what stands between its scheme and its query, the driver's parameters, and what it
/// says of TLS.
pub(crate) fn locks(
    rest: &str,
    parameters: &[(&str, &str)],
    sslmode: Option<&str>,
    sslrootcert: Option<&str>,
) -> Result<PostgresLocks> {
    let config = |message: &'static str| Error::new(ErrorKind::Config, message);
    if !rest.starts_with("//") {
        return Err(config(
            "a postgres URL names its host, as in `postgres://user:password@127.0.0.1:5432/database`",
        ));
    }
    // The driver decodes percent signs, and takes `+` as it is.
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
    let url = format!("postgres:{rest}?{}", query.replace('+', "%20"));
    // The driver's error may contain a part of the URL.
    let mut settings: Config = url.trim_end_matches('?').parse().map_err(|_| {
        config(
            "the postgres URL can't be read: `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, with / ? @ : # % in user and \
             password percent-encoded",
        )
    })?;
    if settings.get_hosts().is_empty() && settings.get_hostaddrs().is_empty() {
        return Err(config("the postgres URL names no host, as in `postgres://user@127.0.0.1/database`"));
    }
    let (mode, verify) = match sslmode {
        Some("disable") => (SslMode::Disable, Verify::Nothing),
        // Who takes none at all for good enough gains nothing from a certificate.
        None | Some("prefer") => (SslMode::Prefer, Verify::Nothing),
        Some("require" | "verify-full") => (SslMode::Require, Verify::All),
        Some(_) => {
            return Err(config("sslmode in the URL is disable, prefer, require or verify-full"));
        }
    };
    if sslrootcert.is_some() && verify == Verify::Nothing {
        return Err(config("sslrootcert needs sslmode=require"));
    }
    settings.ssl_mode(mode);
    tls::locks(settings, verify, sslrootcert)
}
