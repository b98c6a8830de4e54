//! TLS for URLs, by whichever library this build has.

use tokio_postgres::Config;
use tokio_postgres::config::SslMode;

use super::PostgresLocks;
use crate::error::{Error, ErrorKind, Result};

/// What of the server's certificate is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verify {
    Nothing,
    All,
}

/// Locks over TLS as far as the configuration asks for it.
pub(super) fn locks(config: Config, _verify: Verify, _root: Option<&str>) -> Result<PostgresLocks> {
    if config.get_ssl_mode() == SslMode::Require {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "TLS needs the cargo feature `rustls` or `native-tls`, which this build hasn't got",
        ));
    }
    Ok(PostgresLocks::new(config))
}
