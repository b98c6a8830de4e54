//! What the driver's errors mean here.

use redis::{ErrorKind as Kind, RedisError, ServerErrorKind as Server};

use crate::error::{Error, ErrorKind};

pub(super) fn is_no_script(error: &RedisError) -> bool {
    error.kind() == Kind::Server(Server::NoScript)
}

/// Whether the connection must not be used any more: it is broken, it may be out of step, or it leads to the wrong server.
pub(super) fn spoils_connection(error: &RedisError) -> bool {
    error.is_unrecoverable_error()
        || error.is_io_error()
        || matches!(
            error.kind(),
            Kind::Parse | Kind::Server(Server::ReadOnly | Server::MasterDown | Server::BusyLoading)
        )
        || error.code() == Some("NOAUTH")
}

/// An error of a request that may have been carried out.
pub(super) fn of_request(error: &RedisError) -> Error {
    match refusal(error) {
        Some((kind, message)) => Error::new(kind, message),
        None => Error::new(ErrorKind::Unknown, "the request to redis failed, and may have been carried out"),
    }
    .with_source(text(error))
}

/// The driver's error in words: as a source it would say the same as its own source once more.
fn text(error: &RedisError) -> String {
    error.to_string()
}

/// An error of setting up a connection to this server: nothing that matters was sent.
pub(super) fn of_opening(error: &RedisError, server: &str) -> Error {
    let (kind, message) = match (refusal(error), error.kind()) {
        (Some(refusal), _) => refusal,
        (None, Kind::AuthenticationFailed) => (ErrorKind::Denied, NO_LOGIN),
        (None, Kind::InvalidClientConfig | Kind::RESP3NotSupported) => {
            (ErrorKind::Config, "the connection settings can't be used")
        }
        (None, Kind::MasterNameNotFoundBySentinel) => {
            (ErrorKind::Unavailable, "the sentinels know no reachable master of this name")
        }
        (None, Kind::Server(Server::ResponseError)) => {
            (ErrorKind::Config, "redis refuses the connection's settings")
        }
        (None, _) => (ErrorKind::Unavailable, "redis can't be reached"),
    };
    Error::new(kind, format!("{message}: {server}")).with_source(text(error))
}

const NO_LOGIN: &str = "redis doesn't accept the user or the password, or misses them (in a URL a password alone is \
                        written `redis://:PASSWORD@host`)";

const CLUSTER: &str = "this server is part of a Redis Cluster, which isn't supported: use one server, Sentinel, or \
                       `redlock://` over independent servers";

pub(super) fn cluster() -> Error {
    Error::new(ErrorKind::Unsupported, CLUSTER)
}

const NO_RIGHT: &str = "redis doesn't let this user do that: see the documentation of the module `fencelock::redis` for the commands, keys and \
                        channels that locks need";

/// What a user may not do within a script is an error without a code of its own, up to Redis 7.0.
fn is_denied_in_script(error: &RedisError) -> bool {
    error.code() == Some("ERR")
        && error.detail().is_some_and(|detail| detail.starts_with("The user executing the script can't"))
}

/// What the server says when it has not carried a request out: the scripts write only once nothing can go wrong any more.
fn refusal(error: &RedisError) -> Option<(ErrorKind, &'static str)> {
    let unavailable = |message| Some((ErrorKind::Unavailable, message));
    match (error.kind(), error.code()) {
        (Kind::Server(Server::NoPerm), _) => Some((ErrorKind::Denied, NO_RIGHT)),
        _ if is_denied_in_script(error) => Some((ErrorKind::Denied, NO_RIGHT)),
        (_, Some("NOAUTH" | "WRONGPASS")) => Some((ErrorKind::Denied, NO_LOGIN)),
        (Kind::Server(Server::Moved | Server::Ask | Server::CrossSlot | Server::ClusterDown), _) => {
            Some((ErrorKind::Unsupported, CLUSTER))
        }
        (Kind::Server(Server::BusyLoading), _) => unavailable("redis is still loading its data"),
        (Kind::Server(Server::ReadOnly), _) => unavailable("this redis server is a read-only replica"),
        (Kind::Server(Server::MasterDown | Server::TryAgain), _) => {
            unavailable("this redis server has no master")
        }
        (_, Some("MISCONF")) => unavailable("redis takes no writes, since it can't save its data (MISCONF)"),
        (_, Some("OOM")) => unavailable("redis takes no writes, since its memory is full (OOM)"),
        (_, Some("NOREPLICAS")) => {
            unavailable("redis takes no writes, since too few replicas are there (NOREPLICAS)")
        }
        (_, Some("BUSY")) => unavailable("redis is busy with another script (BUSY)"),
        (_, Some("WRONGTYPE")) => {
            Some((ErrorKind::Config, "a key of this lock is used for something else, and isn't a string"))
        }
        _ => None,
    }
}
