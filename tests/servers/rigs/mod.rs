//! Every backend behind one face, with what can be done to its servers: what suites use that all backends run.
//!
//! [`KINDS`] are the backends. A [`Rig`] is one of them with servers of its own.

mod azure;
mod file;
mod memory;
mod postgres;
mod redis;
mod redlock;
mod sqlserver;

use std::fmt::Debug;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Completion, Failed, Trial};

use super::is_left_out;
use super::locks::Random;

/// A backend, and what it has of what faults are done to.
#[derive(Debug)]
pub(crate) struct Kind {
    /// What its trials are called, `NAME::TRIAL`. It is the scheme of its URLs, or the feature.
    pub(crate) name: &'static str,
    /// What `FENCELOCK_SKIP` calls it.
    pub(crate) feature: &'static str,
    /// A short TTL, over which a busy machine still gets a renewal through.
    pub(crate) short_ttl: Duration,
    /// What it hasn't got, and why a trial that needs it makes no sense.
    lacks: &'static [(Part, &'static str)],
    /// Starts its servers. It may be asked for any number of rigs.
    pub(crate) start: fn() -> Arc<dyn Rig>,
}

/// What a fault needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Locks that other processes can have.
    Processes,
    /// A frozen holder's lock that others get once the TTL is over.
    Expiry,
    /// A server, with a network on the way to it.
    Server,
    /// Servers that keep grants over a restart. Without it a restart is the end of all grants.
    Persistence,
    /// Several servers, of which a minority may be away.
    Minority,
    /// Data that can be lost as a whole, and the locks with it.
    Data,
    /// A wall clock of the server's that can be moved.
    Clock,
    /// An administrator who can take a lock away.
    TakeAway,
    /// Connections that an administrator can end.
    Connections,
    /// A password, or what stands for one.
    Password,
}

impl Kind {
    /// Why what needs these parts doesn't apply.
    pub(crate) fn obstacle(&self, needs: &[Part]) -> Option<&'static str> {
        needs
            .iter()
            .find_map(|need| self.lacks.iter().find(|(part, _)| part == need))
            .map(|(_, reason)| *reason)
    }

    /// Why none of its trials is played, if `FENCELOCK_SKIP` names it, which is said then.
    pub(crate) fn left_out(&self) -> Option<&'static str> {
        is_left_out(self.feature).then(|| {
            eprintln!("FENCELOCK_SKIP: {} is left out", self.name);
            "left out by FENCELOCK_SKIP"
        })
    }

    /// The trial `KIND::NAME`, which is ignored if there is an obstacle.
    pub(crate) fn trial(
        &self,
        name: &str,
        obstacle: Option<&'static str>,
        play: impl FnOnce() -> Result<(), Failed> + Send + 'static,
    ) -> Trial {
        let trial = Trial::ignorable_test(format!("{}::{name}", self.name), move || match obstacle {
            None => play().map(|()| Completion::Completed),
            // Asked for all the same. Nextest knows only the exit code, by which it would count as passed.
            Some(obstacle) if std::env::var_os("NEXTEST").is_some() => Err(obstacle.into()),
            Some(obstacle) => Ok(Completion::ignored_with(obstacle)),
        });
        trial.with_ignored_flag(obstacle.is_some())
    }
}

/// All backends.
pub(crate) const KINDS: &[&Kind] = &[
    &memory::KIND,
    &file::KIND,
    &redis::KIND,
    &redlock::KIND,
    &postgres::KIND,
    &sqlserver::KIND,
    &azure::KIND,
];

/// A backend with servers of its own, which are gone once it is dropped. All methods block; what a method does is done
/// when it returns. Those that need a [`Part`] which the backend lacks panic.
pub(crate) trait Rig: Debug + Send + Sync {
    /// Where its servers listen: none, one, or several for Redlock.
    fn addrs(&self) -> Vec<SocketAddr>;

    /// The URL of locks with this TTL, by way of these addresses instead of its [`addrs`](Self::addrs): of proxies,
    /// say. Parameters can be added with `&`.
    fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String;

    /// The URL of locks with this TTL.
    fn url(&self, ttl: Duration) -> String {
        self.url_by(&self.addrs(), ttl)
    }

    /// Kills a server with SIGKILL.
    fn kill(&self, _server: usize) {
        self.lacks(Part::Server)
    }

    /// Starts a server again with what it had written to disk, after it was killed, or instead.
    fn restart(&self, _server: usize) {
        self.lacks(Part::Server)
    }

    /// Stops a server as SIGSTOP does.
    fn freeze(&self, _server: usize) {
        self.lacks(Part::Server)
    }

    /// Lets a server continue.
    fn thaw(&self, _server: usize) {
        self.lacks(Part::Server)
    }

    /// All data of a server is lost. It is up again.
    fn wipe(&self, _server: usize) {
        self.lacks(Part::Data)
    }

    /// From now on, a server's wall clock differs by that much from the machine's.
    fn set_clock_offset(&self, _server: usize, _seconds: i64) {
        self.lacks(Part::Clock)
    }

    /// Takes the lock away from its holder, as an administrator would. Does nothing if nobody holds it.
    fn take_away(&self, _name: &str) {
        self.lacks(Part::TakeAway)
    }

    /// Ends all connections of clients, as an administrator would.
    fn end_connections(&self) {
        self.lacks(Part::Connections)
    }

    /// A URL whose password is wrong. Where servers asked for none, they do from now on.
    fn wrong_password(&self) -> String {
        self.lacks(Part::Password)
    }

    /// What is in each request that claims a lock of this name with this TTL, but in no other of a provider that holds
    /// nothing and wants nothing else.
    fn claim_part(&self, _name: &str, _ttl: Duration) -> Vec<u8> {
        self.lacks(Part::Server)
    }

    /// How many, of whichever process, are known to wait for a lock. `None` if that can't be seen.
    fn waiters(&self, _name: &str) -> Option<usize> {
        None
    }

    /// Something that an administrator may do to a server at any time, picked at random, such as ending a connection.
    /// Whether it may have freed a lock that is held.
    fn disturb(&self, _random: &mut Random) -> bool {
        self.lacks(Part::Server)
    }

    /// How many connections the servers have, those of the rig's own apart. 0 without a server.
    fn connections(&self) -> usize;

    /// How many things are stored: keys, rows, blobs, files. Tokens of locks that aren't held may be among them.
    fn entries(&self) -> usize;

    /// [`entries`](Self::entries), without those that go away by themselves.
    fn lasting_entries(&self) -> usize {
        self.entries()
    }

    #[doc(hidden)]
    fn lacks(&self, part: Part) -> ! {
        panic!("{self:?} has no {part:?}: ask the kind before")
    }
}
