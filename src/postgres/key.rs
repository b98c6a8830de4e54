//! What a lock is called in PostgreSQL: the key of an advisory lock.

use std::fmt;

use sha2::{Digest, Sha256};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

/// The key of an advisory lock. Keys of one number and of two never mean the same lock.
///
/// A lock's name is one number, [`lock_key`]; to share locks with programs that use numbers of their own, see
/// [`PostgresLocks::key`](super::PostgresLocks::key).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdvisoryKey {
    /// One number of 64 bits, as in `pg_advisory_lock(bigint)`.
    One(i64),
    /// Two numbers of 32 bits, as in `pg_advisory_lock(integer, integer)`.
    Two(i32, i32),
}

/// The key of the lock of this name: the first eight bytes, big-endian, of the SHA-256 of `fencelock:` and the name.
///
/// In SQL (PostgreSQL 11 or newer):
///
/// ```sql
/// SELECT ('x' || encode(substr(sha256(convert_to('fencelock:' || 'nightly-report', 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint;
/// ```
///
/// Two names can have the same key, with a probability of one to 2^64: then one waits for the other without need. The
/// derivation never changes.
///
/// ```
/// assert_eq!(fencelock::postgres::lock_key("nightly-report"), 5_332_256_758_289_688_054);
/// ```
#[must_use]
pub fn lock_key(name: &str) -> i64 {
    derived("fencelock:", name)
}

fn derived(domain: &str, name: &str) -> i64 {
    let digest = Sha256::new().chain_update(domain).chain_update(name).finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    i64::from_be_bytes(first)
}

impl AdvisoryKey {
    /// Held for moments by those who draw fencing tokens.
    pub(super) fn of_tokens() -> i64 {
        derived("fencelock tokens", "")
    }

    /// Held, shared, by those who want to be told of a release.
    pub(super) fn of_waiters(self) -> i64 {
        derived("fencelock waiters:", &self.to_string())
    }

    /// How `pg_locks` shows it: `classid`, `objid` and `objsubid`.
    pub(super) fn in_pg_locks(self) -> (u32, u32, i16) {
        match self {
            Self::One(key) => {
                let key = key.cast_unsigned();
                #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
                ((key >> 32) as u32, key as u32, 1)
            }
            Self::Two(first, second) => (first.cast_unsigned(), second.cast_unsigned(), 2),
        }
    }

    /// Runs a statement about it, in which `KEY` stands for its numbers.
    pub(super) async fn ask(
        &self,
        client: &impl Asks,
        statement: &str,
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        match self {
            Self::One(key) => client.ask(&statement.replace("KEY", "$1"), &[(key, Type::INT8)]).await,
            Self::Two(first, second) => {
                let parameters: [(&(dyn ToSql + Sync), Type); 2] =
                    [(first, Type::INT4), (second, Type::INT4)];
                client.ask(&statement.replace("KEY", "$1, $2"), &parameters).await
            }
        }
    }

    /// What is told of a release.
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text.split_once(',') {
            Some((first, second)) => Some(Self::Two(first.parse().ok()?, second.parse().ok()?)),
            None => text.parse().ok().map(Self::One),
        }
    }
}

/// What statements can be sent over.
pub(super) trait Asks: Sync {
    fn ask(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> impl Future<Output = Result<Vec<Row>, tokio_postgres::Error>> + Send;
}

impl fmt::Display for AdvisoryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(key) => write!(f, "{key}"),
            Self::Two(first, second) => write!(f, "{first},{second}"),
        }
    }
}

impl From<&str> for AdvisoryKey {
    fn from(name: &str) -> Self {
        Self::One(lock_key(name))
    }
}

impl From<&String> for AdvisoryKey {
    fn from(name: &String) -> Self {
        Self::from(name.as_str())
    }
}

impl From<String> for AdvisoryKey {
    fn from(name: String) -> Self {
        Self::from(name.as_str())
    }
}

impl From<i64> for AdvisoryKey {
    fn from(key: i64) -> Self {
        Self::One(key)
    }
}

impl From<(i32, i32)> for AdvisoryKey {
    fn from((first, second): (i32, i32)) -> Self {
        Self::Two(first, second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other programs compute them, too, and so does every other version: these values may never change.
    #[test]
    fn keys_are_pinned() {
        assert_eq!(lock_key(""), 4_785_541_343_812_736_133);
        assert_eq!(lock_key("nightly-report"), 5_332_256_758_289_688_054);
        assert_eq!(lock_key("app:nightly-report"), -631_436_117_227_465_518);
        assert_eq!(lock_key("é"), -8_737_516_992_136_089_767);
        assert_eq!(AdvisoryKey::of_tokens(), 4_799_424_324_863_618_230);
        assert_eq!(AdvisoryKey::One(42).of_waiters(), -5_416_184_029_762_833_683);
        assert_eq!(AdvisoryKey::Two(1, -2).of_waiters(), -4_545_347_537_010_268_079);
    }

    #[test]
    fn what_is_told_is_understood() {
        for key in [AdvisoryKey::One(i64::MIN), AdvisoryKey::One(7), AdvisoryKey::Two(-1, i32::MAX)] {
            assert_eq!(AdvisoryKey::parse(&key.to_string()), Some(key));
        }
        for other in ["", "x", "1,", "1,2,3", "99999999999999999999"] {
            assert_eq!(AdvisoryKey::parse(other), None, "{other}");
        }
    }
}
