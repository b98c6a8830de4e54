//! TLS for URLs, by whichever library this build has.
//!
//! Over rustls there is no channel binding, which the driver does without unless `channel_binding=require`.

#[cfg(any(feature = "rustls", feature = "native-tls"))]
mod encrypted;

use tokio_postgres::Config;
#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
use tokio_postgres::config::SslMode;

use super::PostgresLocks;
use crate::error::Result;
#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
use crate::error::{Error, ErrorKind};

/// Whether the server's certificate has to be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verify {
    Nothing,
    All,
}

/// Locks over TLS as far as the configuration asks for it. `root` is a file of certificates to trust instead of the system's.
#[cfg(any(feature = "rustls", feature = "native-tls"))]
pub(super) fn locks(config: Config, verify: Verify, root: Option<&str>) -> Result<PostgresLocks> {
    Ok(PostgresLocks::with_tls(config, encrypted::MakeTls::new(verify, root)?))
}

/// Locks without TLS, if that will do.
#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
pub(super) fn locks(config: Config, _: Verify, _: Option<&str>) -> Result<PostgresLocks> {
    if config.get_ssl_mode() == SslMode::Require {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "TLS needs the cargo feature `rustls` or `native-tls`, which this build hasn't got",
        ));
    }
    Ok(PostgresLocks::new(config))
}
