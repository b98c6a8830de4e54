//! [`LockName`]: any string names a lock, and distinct strings are distinct locks on every backend.

use std::borrow::Cow;
use std::fmt;
use std::fmt::Write as _;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest, Sha256};

/// The name of a lock: any string at all. Cheap to clone.
///
/// No normalisation takes place: `a` and `A`, or an `é` written as one code point and as two, are two locks.
/// A server that can't take every string gets the injective [`encode`](Self::encode)d form.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LockName(Arc<str>);

/// What [`LockName::encode`] leaves as it is. Upper case isn't among it, so that a file system which ignores
/// case keeps distinct names apart.
const READABLE: &AsciiSet = &{
    let mut set = NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');
    let mut upper = b'A';
    while upper <= b'Z' {
        set = set.add(upper);
        upper += 1;
    }
    set
};

/// Between the readable beginning of a long name and its hash. Never in the encoding of a short one.
const HASH_MARK: char = '~';
/// The mark and 64 hexadecimal digits of SHA-256.
const HASHED_TAIL: usize = 65;

impl LockName {
    /// The lock of this name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name as it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name in at most `max_len` bytes out of `a-z 0-9 - _ . % A-F ~`, for servers and file systems that
    /// don't take every string: distinct names stay distinct, also where upper and lower case are the same.
    ///
    /// Readable where possible: `nightly-report` is itself. Any other byte of the UTF-8 form is `%XX`, and so is a
    /// leading dot; an empty name is `%`. What would be longer than `max_len` is cut and closed with `~` and the
    /// SHA-256 of the whole name in hexadecimal, which is injective for all practical purposes.
    ///
    /// # Panics
    ///
    /// If `max_len` is below 66, which leaves no room for the hash.
    ///
    /// ```
    /// use fencelock::LockName;
    /// assert_eq!(LockName::new("nightly-report").encode(100), "nightly-report");
    /// assert_eq!(LockName::new("EU/import").encode(100), "%45%55%2Fimport");
    /// assert_eq!(LockName::new("x".repeat(1000)).encode(100).len(), 100);
    /// ```
    #[must_use]
    pub fn encode(&self, max_len: usize) -> String {
        assert!(max_len > HASHED_TAIL, "an encoded name needs room for its hash: max_len {max_len} < 66");
        let name = self.as_str();
        let mut encoded = match name.strip_prefix('.') {
            _ if name.is_empty() => "%".to_owned(),
            Some(rest) => format!("%2E{}", utf8_percent_encode(rest, READABLE)),
            None => Cow::from(utf8_percent_encode(name, READABLE)).into_owned(),
        };
        if encoded.len() > max_len {
            encoded.truncate(max_len - HASHED_TAIL); // ASCII: every index is a boundary
            encoded.push(HASH_MARK);
            for byte in Sha256::digest(name.as_bytes()) {
                write!(encoded, "{byte:02x}").expect("a String takes whatever is written");
            }
        }
        encoded
    }

    /// The name in quotes with control characters escaped, cut after 64 characters, for messages and logs.
    pub(crate) fn quoted(&self) -> impl fmt::Display + '_ {
        struct Quoted<'a>(&'a str);
        impl fmt::Display for Quoted<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0.char_indices().nth(64) {
                    None => write!(f, "{:?}", self.0),
                    Some((cut, _)) => write!(f, "{:?}… ({} bytes)", &self.0[..cut], self.0.len()),
                }
            }
        }
        Quoted(&self.0)
    }
}

impl From<&str> for LockName {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

impl From<String> for LockName {
    fn from(name: String) -> Self {
        Self::new(name)
    }
}

impl AsRef<str> for LockName {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lock files and blobs of one version must be found by the next: these values may never change.
    #[test]
    fn encodings_are_pinned() {
        let encode = |name: &str| LockName::new(name).encode(80);
        assert_eq!(encode(""), "%");
        assert_eq!(encode("%"), "%25");
        assert_eq!(encode("."), "%2E");
        assert_eq!(encode("../up"), "%2E.%2Fup");
        assert_eq!(encode("a.b_c-9"), "a.b_c-9");
        assert_eq!(encode("~"), "%7E");
        assert_eq!(encode("nul\0"), "nul%00");
        assert_eq!(encode("é"), "%C3%A9");
        assert_eq!(
            encode(&"x".repeat(81)),
            "xxxxxxxxxxxxxxx~4d1f7bb876c6aae013f06a7430b8c6545ff30d8f9252838eb18b6357c1a2ba13"
        );
    }

    #[test]
    fn long_names_are_cut_in_messages() {
        let name = LockName::new("ä".repeat(100));
        assert_eq!(name.quoted().to_string(), format!("{:?}… (200 bytes)", "ä".repeat(64)));
    }
}
