//! The `redis` backends (feature `redis`): locks on one server, [`RedisLocks`], and on a majority of several, [`Redlock`].
//!
//! | URL | |
//! |---|---|
//! | `redis://USER:PASSWORD@HOST:PORT/DB` | one server. User, password, port (6379) and database (0) may be left out |
//! | `rediss://…` | the same over TLS: with feature `rustls` or `native-tls`, and the certificates that the system trusts |
//! | `redis+unix:/PATH?db=DB&user=USER&password=PASSWORD` | the same over a Unix socket |
//! | `redis://HOST,HOST/DB?sentinel=NAME` | the master `NAME` that these Sentinels (port 26379) watch; with `sentinel_username=` and `sentinel_password=` if the Sentinels ask for them |
//! | `redlock://HOST,HOST,HOST` | Redlock over three or more independent servers; `/DB` and users as above, `tls=true` for TLS, `longest_ttl=60s` for [`Redlock::longest_ttl`] |
//!
//! `replicas=N` and `replica_timeout=100ms` of a `redis` URL are [`RedisLocks::wait_for_replicas`]. In user and password
//! `/ ? @ : , # %` are percent-encoded. User and password of the first host are also those of hosts without. For anything
//! else make the driver's [`Client`](driver::Client) yourself. Redis 5 or newer, or what speaks its protocol; a Redis Cluster
//! is refused.
//!
//! # One server
//!
//! A lock is the key that [`lock_key`] names, with the owner as its value and the TTL as its expiry. A claim, a release and
//! a renewal are a script and a round trip each, up to 500 renewals one together. The script that grants draws the fencing
//! token, `max(last + 1, microseconds since 1970)`, so that a server that comes back without its data doesn't turn it
//! back.
//!
//! Waiters queue on the server, a place for each process. The release hands the lock to the first one whose process
//! listens, and tells it by a message; within the process, callers take turns. Whoever is waiting asks again at least every
//! second, and when the holder's TTL ends, in case that a message was lost or somebody has deleted the key. A process that
//! died is passed over at once, one that is frozen within three seconds (or the TTL, if that is less).
//!
//! It takes two connections: one for commands, and one for messages once somebody waits. They are opened on first use, and
//! again, with back-off, when they break.
//!
//! What can go wrong:
//!
//! - The lock is as durable as the server. If it comes back without its data, or a replica takes over that hasn't got the
//!   grant ([`wait_for_replicas`](RedisLocks::wait_for_replicas) makes that less likely), another process may get the lock
//!   before the old holder's next renewal, which tells it ([`Loss::Taken`](crate::Loss::Taken)); in between only the
//!   fencing token protects. Masters on both sides of a split network give neither exclusion nor order. Nor does a
//!   `SENTINEL FAILOVER` of a master that lives: it goes on answering those who are connected for some ten seconds, so a TTL
//!   behind Sentinel should be well above that, or the master have `min-replicas-to-write`.
//! - Expiry follows the server's wall clock: set forward, it frees locks early, which again is the token's case; set back,
//!   it keeps the locks of crashed holders for as much longer.
//! - Redis must not evict keys (`maxmemory-policy noeviction`, its default): every other policy takes a held lock for a
//!   cached value.
//! - A token can repeat only if the server has lost its data and its clock is behind by more than the outage took, or if
//!   a lock that nobody has used for seven days is used while the clock is that far behind.
//!
//! # Programs without this crate
//!
//! A program that takes its lock as
//!
//! ```text
//! SET fencelock:{app:nightly-report} <something random> NX PX 30000
//! ```
//!
//! excludes us, and is excluded. It has to renew the key by itself, and to delete it only while the value is its own (a
//! script that compares first: a bare `DEL` by a holder who is late frees somebody else's lock). It draws no fencing token.
//! Waiters notice that it is gone within a second. While processes of this crate queue, the lock goes from one to the next, so
//! that such a program may wait for long. With `redlock:` the key would have to be set on a majority of the servers.
//!
//! Beside the lock there are `…:fence`, the counter of tokens, which stays for seven days after the last use of the name;
//! `…:queue` and `…:waiters`, while somebody waits; and `…:dead:…` for some minutes after a claim that was broken off.
//!
//! # Redlock
//!
//! A lock is held by whoever has it on a majority of servers that know nothing of each other, so that it survives the death
//! of the others. A grant takes one round trip to all of them in parallel, or two if their counters of tokens differ; it
//! stands for the TTL less the time that took, 1 % of the TTL, and 2 ms. A server that doesn't answer is waited for no
//! longer than a tenth of the TTL, at most a second; when connecting, two seconds.
//!
//! A server that was restarted, or has lost its data, has no vote for [`longest_ttl`](Redlock::longest_ttl), measured by its own
//! clock: it could give away what it has forgotten. If its data came back, the locks in it still count for their holders; if
//! not, a lock that was taken before stands on the other servers only, until it is taken anew. So restart one at a time, at
//! least `longest_ttl` apart, and without persistence only as often as locks are taken. New servers are all needed once,
//! when the first provider connects. If all lose their data within one TTL they look like new ones, and locks are lost. Two
//! servers of three that restart within `longest_ttl` leave no majority until it is over.
//!
//! A client whose clock is wrong by more than an hour proposes tokens within an hour of the servers' clocks.
//!
//! Waiters are woken by the release, in no order that would hold.
//!
//! # Rights
//!
//! A user of `redis:` needs, with an ACL,
//!
//! ```text
//! ~fencelock:* &fencelock:* +eval +evalsha +subscribe +publish +time +exists +get +set +del +pttl +pexpire +zadd +zrange +zrem +zscore +hget +hset +hdel
//! ```
//!
//! and for `redlock:` also `+info +hmget`. `+info` lets `redis:` notice a Sentinel or a cluster, `+script|load` saves
//! a round trip after each restart of the server, `+select` is for a database other than 0, `+wait` for `replicas=`, `+role` for a master behind Sentinel. What is missing is an error of kind
//! [`Denied`](crate::ErrorKind::Denied).
//!
//! # TLS
//!
//! Feature `rustls` uses *ring* unless the application has installed another provider of cryptography for rustls. With
//! both TLS features on, rustls is used; a `rediss://` client that you make yourself then has to be given its
//! certificates, since the driver doesn't load the system's.

mod failure;
mod inbox;
mod keys;
mod link;
mod redlock;
mod replicas;
mod reply;
mod script;
mod single;
mod url;
mod waiting;

use std::sync::Arc;

/// The driver, whose types the constructors take. Its major version is part of this crate's.
pub use redis as driver;

pub use self::keys::lock_key;
pub use self::redlock::{Redlock, RedlockHold};
pub use self::single::{RedisHold, RedisLocks};
pub(crate) use self::url::{RedisUrl, SingleParameters};

/// A channel of one provider's own.
fn new_channel() -> Arc<str> {
    // Should two be the same all the same, nothing happens: only messages to owners that are known here are heeded.
    let random = getrandom::u64().unwrap_or_default();
    format!("fencelock:wake:{random:016x}").into()
}
