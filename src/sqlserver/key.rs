//! What a lock is called in SQL Server: the resource of an application lock.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::name::LockName;

/// How long `@Resource` may be, in UTF-16 units. What is longer is cut by the server, silently.
const LONGEST: usize = 255;

/// How long a principal's name may be, in UTF-16 units: that is what a `sysname` takes.
const LONGEST_PRINCIPAL: usize = 128;

/// How many rows the table of fencing tokens has, so that not all grants write to the same one.
const BUCKETS: u8 = 16;

/// An application lock: `@Resource` and `@DbPrincipal` of `sp_getapplock`.
///
/// A lock's name is one by [`lock_resource`]. [`AppLock::of_resource`] is a lock of programs with resources of their own.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct AppLock {
    resource: Arc<str>,
    /// `None`: the provider's.
    principal: Option<Principal>,
}

/// A user or a role of the database.
///
/// Most databases take principals for the same whatever their case, or blanks behind them; where they aren't, a lock of one is in
/// the other's way without need, while a session would be given what it has, again.
#[derive(Clone)]
pub(super) struct Principal {
    name: Arc<str>,
    /// What makes it another one.
    folded: Arc<str>,
}

/// The resource of the lock of this name: the name itself if it consists of `a-z 0-9 - _ .` and doesn't begin with a dot;
/// otherwise [`LockName::encode`] with at most 255 characters.
///
/// The server compares resources byte by byte, and cuts what is longer. Only ASCII is sent, since not every server
/// takes others there. The derivation never changes.
///
/// ```
/// use fencelock::sqlserver::lock_resource;
/// assert_eq!(lock_resource("nightly-report"), "nightly-report");
/// assert_eq!(lock_resource("app:import"), "app%3Aimport");
/// ```
#[must_use]
pub fn lock_resource(name: &str) -> String {
    LockName::new(name).encode(LONGEST)
}

impl AppLock {
    /// The lock of a resource that other programs use: `@Resource`, as they pass it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] if it is empty, or longer than 255 UTF-16 units.
    pub fn of_resource(resource: &str) -> Result<Self> {
        if resource.is_empty() || resource.encode_utf16().count() > LONGEST {
            let message = "the resource of an application lock has 1 to 255 UTF-16 units";
            return Err(Error::new(ErrorKind::Config, message));
        }
        Ok(Self { resource: resource.into(), principal: None })
    }

    /// The lock of that name which belongs to a principal: `@DbPrincipal`, a user or a role of the database of which
    /// the caller is a member. Those of two principals are two locks. Default: `public`, or the provider's
    /// [`db_principal`](super::SqlServerLocks::db_principal).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for what can't be a name.
    pub fn db_principal(mut self, principal: &str) -> Result<Self> {
        self.principal = Some(Principal::parse(principal)?);
        Ok(self)
    }

    /// The same lock, with this principal unless it has one.
    pub(super) fn or_principal(mut self, principal: &Principal) -> Self {
        self.principal.get_or_insert_with(|| principal.clone());
        self
    }

    pub(super) fn resource(&self) -> &Arc<str> {
        &self.resource
    }

    pub(super) fn principal(&self) -> Arc<str> {
        self.principal.clone().unwrap_or_default().name
    }

    /// The row of the table of fencing tokens that its grants draw from: the first byte of the SHA-256 of the resource, modulo
    /// 16.
    pub(super) fn bucket(&self) -> i32 {
        i32::from(Sha256::digest(self.resource.as_bytes())[0] % BUCKETS)
    }
}

impl Principal {
    pub(super) fn parse(name: &str) -> Result<Self> {
        if name.is_empty() || name.contains('\0') || name.encode_utf16().count() > LONGEST_PRINCIPAL {
            let message = "a principal of the database has a name of 1 to 128 characters";
            return Err(Error::new(ErrorKind::Config, message));
        }
        Ok(Self { name: name.into(), folded: name.trim_end().to_lowercase().into() })
    }

    /// As the server is told.
    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }
}

impl Default for Principal {
    /// Everybody who may use the database.
    fn default() -> Self {
        Self { name: "public".into(), folded: "public".into() }
    }
}

impl PartialEq for Principal {
    fn eq(&self, other: &Self) -> bool {
        self.folded == other.folded
    }
}

impl Eq for Principal {}

impl Hash for Principal {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.folded.hash(state);
    }
}

impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.name, f)
    }
}

impl From<&str> for AppLock {
    /// The lock of this name.
    fn from(name: &str) -> Self {
        Self { resource: lock_resource(name).into(), principal: None }
    }
}

impl fmt::Debug for AppLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.resource, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs of all versions share locks, and rows: these values may never change.
    #[test]
    fn resources_and_buckets_are_pinned() {
        let of = |name: &str| {
            let lock = AppLock::from(name);
            (lock.resource().to_string(), lock.bucket())
        };
        assert_eq!(of("nightly-report"), ("nightly-report".to_owned(), 7));
        assert_eq!(of(""), ("%".to_owned(), 11));
        assert_eq!(of("Ä"), ("%C3%84".to_owned(), 4));
        let long = of(&"x".repeat(300)).0;
        assert_eq!((long.len(), &long[..2], &long[189..191]), (255, "xx", "x~"));
    }

    #[test]
    fn what_the_server_would_cut_is_refused() {
        for wrong in [String::new(), "x".repeat(256), "𝄞".repeat(128)] {
            assert_eq!(AppLock::of_resource(&wrong).unwrap_err().kind(), ErrorKind::Config);
        }
        let lock = AppLock::of_resource(&"ä".repeat(255)).unwrap();
        assert_eq!(&*lock.principal(), "public");
        assert_eq!(&*lock.clone().or_principal(&Principal::parse("app").unwrap()).principal(), "app");
        assert_eq!(
            &*lock.db_principal("other").unwrap().or_principal(&Principal::parse("app").unwrap()).principal(),
            "other"
        );
        let of = |principal| AppLock::from("x").db_principal(principal).unwrap();
        assert_eq!(of("app"), of("App "));
        assert_ne!(of("app"), of("another"));
        for wrong in [String::new(), "x".repeat(129), "a\0".to_owned()] {
            assert_eq!(AppLock::from("x").db_principal(&wrong).unwrap_err().kind(), ErrorKind::Config);
        }
    }
}
