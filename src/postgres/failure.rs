//! What the driver's errors mean here.

use std::error::Error as _;

use tokio_postgres::Error as DriverError;
use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::error::{Error, ErrorKind};

/// Whether the server has said that it ends the session.
pub(super) fn is_fatal(error: &DriverError) -> bool {
    error.as_db_error().is_some_and(|error| match error.parsed_severity() {
        Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
        None => error.severity() == "FATAL", // PgBouncer says it in one way only
    })
}

/// Whether a statement was cancelled, by a request or by a time limit.
pub(super) fn is_cancelled(error: &DriverError) -> bool {
    error.code() == Some(&SqlState::QUERY_CANCELED)
}

/// An error of a request that may have been carried out.
pub(super) fn of_request(error: &DriverError) -> Error {
    match error.as_db_error() {
        // What fails is rolled back; the locks of a session that the server ends are free.
        Some(refused) => {
            let (kind, message) = refusal(refused)
                .unwrap_or((ErrorKind::Unavailable, "PostgreSQL could not do what it was asked for"));
            Error::new(kind, message)
        }
        None => {
            Error::new(ErrorKind::Unknown, "the request to PostgreSQL failed, and may have been carried out")
        }
    }
    .with_source(text(error))
}

/// An error of setting up a session: nothing that matters was done.
pub(super) fn of_opening(error: &DriverError) -> Error {
    let (kind, message) = match error.as_db_error().and_then(refusal) {
        Some(refusal) => refusal,
        None if is_configuration(error) => (ErrorKind::Config, "the connection settings can't be used"),
        None => (ErrorKind::Unavailable, "PostgreSQL can't be reached"),
    };
    Error::new(kind, message).with_source(text(error))
}

/// The driver has no name for the kinds of its errors, but these have texts of their own.
fn is_configuration(error: &DriverError) -> bool {
    matches!(error.to_string().as_str(), "invalid configuration" | "invalid connection string")
}

/// The driver's error in words, with what it has left to its source.
fn text(error: &DriverError) -> String {
    match (error.as_db_error(), error.source()) {
        (Some(refused), _) => {
            let severity = refused.severity();
            format!("{severity} {}: {}", refused.code().code(), refused.message())
        }
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

pub(super) const NO_TABLE: &str = "PostgreSQL has no room for another lock: raise max_locks_per_transaction";

/// Whether statements are missing, or there, that only another session could have or lack.
pub(super) fn is_swapped(error: &DbError) -> bool {
    [SqlState::INVALID_SQL_STATEMENT_NAME, SqlState::DUPLICATE_PSTATEMENT].contains(error.code())
}

fn refusal(error: &DbError) -> Option<(ErrorKind, &'static str)> {
    let code = error.code();
    let of = |states: &[SqlState]| states.contains(code);
    if of(&[SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION]) {
        return Some((ErrorKind::Denied, "PostgreSQL doesn't accept the user or the password"));
    }
    if of(&[SqlState::INSUFFICIENT_PRIVILEGE]) {
        return Some((
            ErrorKind::Denied,
            "PostgreSQL doesn't let this user do that: the module `fencelock::postgres` lists the rights that locks need",
        ));
    }
    if of(&[SqlState::INVALID_CATALOG_NAME]) {
        return Some((ErrorKind::Config, "this database doesn't exist"));
    }
    if of(&[SqlState::OUT_OF_MEMORY]) {
        return Some((ErrorKind::Exhausted, NO_TABLE));
    }
    if of(&[SqlState::TOO_MANY_CONNECTIONS]) {
        return Some((ErrorKind::Exhausted, "PostgreSQL takes no more connections"));
    }
    if of(&[SqlState::SEQUENCE_GENERATOR_LIMIT_EXCEEDED, SqlState::NUMERIC_VALUE_OUT_OF_RANGE]) {
        return Some((ErrorKind::Exhausted, "the sequence of fencing tokens has come to its end"));
    }
    if of(&[SqlState::READ_ONLY_SQL_TRANSACTION]) {
        return Some((
            ErrorKind::Unavailable,
            "PostgreSQL takes no writes here: it is a standby, or its transactions are read-only",
        ));
    }
    if of(&[SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_OBJECT]) {
        return Some((ErrorKind::Config, "the sequence of fencing tokens is gone"));
    }
    if is_swapped(error) {
        return Some((ErrorKind::Unsupported, POOLED));
    }
    if of(&[SqlState::DISK_FULL]) {
        return Some((ErrorKind::Unavailable, "PostgreSQL has no space left on its disk"));
    }
    if of(&[SqlState::CANNOT_CONNECT_NOW]) {
        return Some((ErrorKind::Unavailable, "PostgreSQL is starting, stopping or recovering"));
    }
    if of(&[SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN]) {
        return Some((ErrorKind::Unavailable, "PostgreSQL has ended the session"));
    }
    if of(&[SqlState::QUERY_CANCELED]) {
        return Some((ErrorKind::Unavailable, "the statement was cancelled, or took too long"));
    }
    None
}

pub(super) const POOLED: &str = "these connections lead to another session of PostgreSQL with each transaction, as behind \
    PgBouncer in transaction mode: connect to PostgreSQL itself, have the pooler keep sessions, or use \
    transaction_scoped(true), in a URL `transaction_scoped=true`";

pub(super) const READ_ONLY: &str = "this PostgreSQL server is a read-only standby";
