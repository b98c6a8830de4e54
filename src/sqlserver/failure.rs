//! What the errors of the driver and of the server mean here.

use tiberius::error::Error as DriverError;

use super::client::Answer;
use crate::error::{Error, ErrorKind, Result};

/// From this class on an error ends the session.
const FATAL_CLASS: u8 = 20;

/// Whether the server has said that it ends the session.
pub(super) fn is_fatal(error: &DriverError) -> bool {
    matches!(error, DriverError::Server(refused) if refused.class() >= FATAL_CLASS)
}

/// An error of a request that may have been carried out. The connection has ended with it.
pub(super) fn of_request(error: &DriverError) -> Error {
    if is_fatal(error) {
        let message = "SQL Server has ended the session";
        return Error::new(ErrorKind::Unavailable, message).with_source(text(error));
    }
    let failed =
        Error::new(ErrorKind::Unknown, "the request to SQL Server failed, and may have been carried out");
    match error {
        DriverError::Server(refused) => match meaning(refused.code()) {
            Some((kind, says)) => failed.with_source(Error::new(kind, says).with_source(text(error))),
            None => failed.with_source(text(error)),
        },
        _ => failed.with_source(text(error)),
    }
}

/// An error of setting up a session: nothing that matters was done.
pub(super) fn of_opening(error: &DriverError) -> Error {
    let (kind, message) = match error {
        DriverError::Server(refused) => {
            meaning(refused.code()).unwrap_or((ErrorKind::Unavailable, "SQL Server doesn't open a session"))
        }
        DriverError::Protocol(_) if is_without_tls(error) => (
            ErrorKind::Config,
            "the server doesn't offer TLS: for a network that can be trusted, turn it off by `encrypt=off` in the URL",
        ),
        DriverError::Routing { .. } => (
            ErrorKind::Config,
            "the server sends us to another one: name that one, or say how connections are encrypted, by `encrypt`",
        ),
        DriverError::Tls(_) => (
            ErrorKind::Unavailable,
            "no TLS connection to SQL Server: if its certificate isn't one that the system trusts, name its authority by \
             `trust_server_certificate_ca` in the URL, or the configuration",
        ),
        // The driver begins TLS although the server has said that it hasn't got it.
        DriverError::Io { message, .. } if message.contains("tls handshake") => (
            ErrorKind::Unavailable,
            "SQL Server hangs up when TLS begins: if it hasn't got TLS, turn it off by `encrypt=off` in the URL, or \
             `Encrypt=DANGER_PLAINTEXT` in a connection string",
        ),
        _ => (ErrorKind::Unavailable, "SQL Server can't be reached"),
    };
    Error::new(kind, message).with_source(text(error))
}

/// Whether the server hasn't got the encryption that was asked for. The driver has no name for that.
pub(super) fn is_without_tls(error: &DriverError) -> bool {
    matches!(error, DriverError::Protocol(message) if message.contains("encryption level"))
}

/// An error that a statement has caught: what it did is undone, and the session goes on.
fn of_statement(number: i32, message: &str) -> Error {
    let meaning = u32::try_from(number).ok().and_then(meaning);
    let (kind, says) =
        meaning.unwrap_or((ErrorKind::Unavailable, "SQL Server could not do what it was asked for"));
    Error::new(kind, says).with_source(format!("error {number}: {message}"))
}

/// Whether a lock was granted, or not in time, by what `sp_getapplock` is documented to return, which is the first value of an
/// answer; the number and the message of the error that it ended in instead are the second and the third.
pub(super) fn granted(answer: &Answer) -> Result<bool> {
    caught(answer)?;
    let code = answer.require(1)?;
    let (kind, message) = match code {
        0.. => return Ok(true), // at once, or after waiting
        -1 => return Ok(false),
        -2 => (ErrorKind::Unavailable, "SQL Server has cancelled the claim"),
        -3 => (ErrorKind::Unavailable, "the claim was chosen as the victim of a deadlock"),
        _ => (ErrorKind::Config, REFUSED),
    };
    Err(Error::new(kind, message).with_source(format!("sp_getapplock returned {code}")))
}

/// The error that a statement has caught, if it has.
pub(super) fn caught(answer: &Answer) -> Result<()> {
    match answer.get::<i32>(2)? {
        None => Ok(()),
        Some(number) => Err(of_statement(number, answer.get::<&str>(3)?.unwrap_or_default())),
    }
}

const REFUSED: &str = "SQL Server takes the call of sp_getapplock for a wrong one: does the database have this \
    db_principal, and the user belong to it?";

/// The driver's error in words.
fn text(error: &DriverError) -> String {
    match error {
        DriverError::Server(refused) => {
            format!("error {}, class {}: {}", refused.code(), refused.class(), refused.message())
        }
        other => other.to_string(),
    }
}

/// What a number of the server's documented errors means for locks.
fn meaning(number: u32) -> Option<(ErrorKind, &'static str)> {
    Some(match number {
        18_452 | 18_456 | 18_470 | 18_486..=18_488 => {
            (ErrorKind::Denied, "SQL Server doesn't accept the login or the password")
        }
        40_615 | 40_914 => (ErrorKind::Denied, "the firewall of the database doesn't let this address in"),
        4060 => (ErrorKind::Config, "this database doesn't exist, or the login may not open it"),
        229 | 230 | 262 | 297 | 300 | 916 | 2760 | 15_247 => (
            ErrorKind::Denied,
            "SQL Server doesn't let this user do that: the module `fencelock::sqlserver` lists the rights that locks need",
        ),
        207 | 208 | 213 | 271 | 515 => {
            (ErrorKind::Config, "the table of fencing tokens is gone, or isn't the one that this crate makes")
        }
        1202 | 1224..=1228 | 1230 | 15_007 | 15_151 => (ErrorKind::Config, REFUSED),
        701 | 802 | 1204 => (ErrorKind::Exhausted, "SQL Server has no room for another lock"),
        10_928 | 10_929 | 10_936 | 17_809 => (ErrorKind::Exhausted, "SQL Server takes no more sessions"),
        8115 => (ErrorKind::Exhausted, "the fencing tokens have come to their end"),
        1205 => (ErrorKind::Unavailable, "the claim was chosen as the victim of a deadlock"),
        1222 => (ErrorKind::Unavailable, "somebody keeps a row of the table of fencing tokens locked"),
        976 | 978 | 3906 | 3908 => {
            (ErrorKind::Unavailable, "this database takes no writes: it is read-only, or a secondary replica")
        }
        1101 | 1105 | 9002 => (ErrorKind::Unavailable, "SQL Server has no space left for this database"),
        _ => return None,
    })
}
