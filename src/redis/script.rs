//! The Lua scripts, and how one is sent: by its hash, and in full if the server hasn't got it (any more).

use std::sync::LazyLock;

use redis::{Cmd, Value};

use super::failure;
use super::link::{Connected, Link};
use crate::error::{Error, ErrorKind, Result};

/// A script as the server keeps it.
pub(super) struct Script {
    hash: String,
    source: &'static str,
}

macro_rules! script {
    ($($part:literal),+) => {
        LazyLock::new(|| Script::new(concat!($(include_str!(concat!("scripts/", $part))),+)))
    };
}

pub(super) static CLAIM: LazyLock<Script> = script!("queue.lua", "claim.lua");
pub(super) static RELEASE: LazyLock<Script> = script!("queue.lua", "release.lua");
pub(super) static TRANSFER: LazyLock<Script> = script!("queue.lua", "transfer.lua");
pub(super) static LEAVE: LazyLock<Script> = script!("queue.lua", "leave.lua");
pub(super) static RENEW: LazyLock<Script> = script!("renew.lua");

// Of a node of Redlock.
pub(super) static VOTE: LazyLock<Script> = script!("queue.lua", "redlock/node.lua", "redlock/claim.lua");
pub(super) static RAISE: LazyLock<Script> = script!("queue.lua", "redlock/node.lua", "redlock/raise.lua");
pub(super) static NODE_RELEASE: LazyLock<Script> = script!("queue.lua", "redlock/node.lua", "release.lua");
pub(super) static NODE_LEAVE: LazyLock<Script> = script!("queue.lua", "redlock/node.lua", "leave.lua");
pub(super) static ENLIST: LazyLock<Script> = script!("redlock/enlist.lua");
pub(super) static ADMIT: LazyLock<Script> = script!("redlock/admit.lua");

/// What locks on one server take.
pub(super) static OF_SERVER: [&LazyLock<Script>; 5] = [&CLAIM, &RELEASE, &TRANSFER, &LEAVE, &RENEW];
/// What a node of Redlock takes.
pub(super) static OF_NODE: [&LazyLock<Script>; 7] =
    [&VOTE, &RAISE, &NODE_RELEASE, &NODE_LEAVE, &RENEW, &ENLIST, &ADMIT];

/// The scripts count in numbers that are exact up to 2^53.
pub(super) fn exhausted() -> Error {
    Error::new(
        ErrorKind::Exhausted,
        "the next fencing token would be larger than 2^53 - 1: is a clock or the server's counter wrong?",
    )
}

impl Script {
    fn new(source: &'static str) -> Self {
        Self { hash: redis::Script::new(source).get_hash().to_owned(), source }
    }

    pub(super) fn source(&self) -> &'static str {
        self.source
    }

    /// One round trip, except where the server has forgotten the script (`SCRIPT FLUSH`, a restart, a failover).
    pub(super) async fn run(&self, link: &Link, keys: &[String], args: &[&str]) -> Result<Value> {
        self.run_over(&mut link.connected().await?, keys, args).await
    }

    pub(super) async fn run_over(
        &self,
        connected: &mut Connected,
        keys: &[String],
        args: &[&str],
    ) -> Result<Value> {
        let answer = connected.request(&command("EVALSHA", &self.hash, keys, args)).await;
        match answer {
            // It wasn't carried out: no risk in asking once more.
            Err(error) if failure::is_no_script(&error) => {
                connected.request(&command("EVAL", self.source, keys, args)).await
            }
            answer => answer,
        }
        .map_err(|error| failure::of_request(&error))
    }
}

fn command(name: &str, script: &str, keys: &[String], args: &[&str]) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(script).arg(keys.len()).arg(keys).arg(args);
    command
}
