//! The keys of one lock, and the values that stand for an owner.

use std::time::Duration;

use percent_encoding::{AsciiSet, utf8_percent_encode};

use crate::backend::OwnerId;
use crate::name::LockName;

/// What would end a hash tag, or is needed to escape it.
const ESCAPED: &AsciiSet = &AsciiSet::EMPTY.add(b'{').add(b'}').add(b'%');

/// Length of an [`OwnerId`] in hexadecimal digits.
const HEX_LEN: usize = 32;

/// A broken-off claim is refused for at least so long: a server may carry it out well after its connection is gone, if it
/// stood still.
const DEAD_FOR: Duration = Duration::from_secs(60);
/// And for no longer, however long the TTL: each one is a key on the server.
const DEAD_FOR_AT_MOST: Duration = Duration::from_secs(600);

/// The key of a lock on the server: `fencelock:{NAME}`, of which the value is the owner and the expiry is the TTL.
///
/// `name` is what was given to [`create_lock`](crate::LockProvider::create_lock), after the provider's prefix and a
/// colon if it has one. It stands in the key as it is, except that `{`, `}`, `%` and what isn't ASCII are percent-encoded,
/// and that the empty name is `%`. A program that takes its lock by `SET KEY VALUE NX PX …` on the same key excludes us,
/// and is excluded.
///
/// ```
/// assert_eq!(fencelock::redis::lock_key("app:nightly-report"), "fencelock:{app:nightly-report}");
/// ```
#[must_use]
pub fn lock_key(name: &str) -> String {
    let mut key = String::with_capacity(name.len() + 12);
    key.push_str("fencelock:{");
    match name {
        "" => key.push('%'),
        _ => key.extend(utf8_percent_encode(name, ESCAPED)),
    }
    key.push('}');
    key
}

/// All keys of one lock have its name as their hash tag: they are in one slot of a cluster, and an ACL can allow them by a
/// pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) lock: String,
}

impl Keys {
    pub(super) fn new(name: &LockName) -> Self {
        Self { lock: lock_key(name.as_str()) }
    }

    /// The keys that the scripts about one lock begin with.
    pub(super) fn common(&self) -> [String; 4] {
        ["", ":fence", ":queue", ":waiters"].map(|suffix| [&self.lock, suffix].concat())
    }

    /// Those, and the tombstone of an owner.
    pub(super) fn with_tombstone(&self, owner: OwnerId) -> Vec<String> {
        self.common().into_iter().chain([self.tombstone(owner)]).collect()
    }

    /// Stands while claims of this owner are refused.
    fn tombstone(&self, owner: OwnerId) -> String {
        [&self.lock, ":dead:", &owner.to_hex()].concat()
    }
}

/// For how long the claims of an owner that was broken off are refused.
pub(super) fn dead_for(ttl: Duration) -> Duration {
    ttl.clamp(DEAD_FOR, DEAD_FOR_AT_MOST)
}

/// The value of a lock: the attempt, and which generation of it.
pub(super) fn owner_value(owner: OwnerId, generation: u32) -> String {
    format!("{}.{generation}", owner.to_hex())
}

/// The reverse: what a message says about whom.
pub(super) fn parse_owner_value(value: &str) -> Option<(&str, u32)> {
    let (hex, generation) = value.split_once('.')?;
    Some((hex, generation.parse().ok()?)).filter(|_| hex.len() == HEX_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_its_keys_hash_tag() {
        for (name, key) in [
            ("", "fencelock:{%}"),
            ("%", "fencelock:{%25}"),
            ("Nightly Report/1", "fencelock:{Nightly Report/1}"),
            ("}{", "fencelock:{%7D%7B}"),
            ("é", "fencelock:{%C3%A9}"),
            ("a\0b", "fencelock:{a\0b}"),
        ] {
            assert_eq!(lock_key(name), key);
            let tag = &key[key.find('{').unwrap() + 1..key.find('}').unwrap()];
            assert!(!tag.is_empty());
            for other in Keys::new(&name.into()).common() {
                assert!(other.starts_with(&format!("fencelock:{{{tag}}}")), "{other}");
            }
        }
    }

    #[test]
    fn an_owner_value_can_be_read_back() {
        let claim =
            crate::backend::Claim::new("x".into(), crate::backend::Mode::Exclusive, DEAD_FOR).unwrap();
        let value = owner_value(claim.owner, 7);
        assert_eq!(parse_owner_value(&value), Some((claim.owner.to_hex().as_str(), 7)));
        for bad in ["", "x", "x.1", &value[1..], &format!("{}:kept", claim.owner.to_hex())] {
            assert_eq!(parse_owner_value(bad), None, "{bad}");
        }
    }
}
