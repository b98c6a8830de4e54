//! What can go wrong: one opaque [`Error`] with a [`kind`](Error::kind) to act on.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::guard::Loss;
use crate::name::LockName;

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is, for code that decides what to do next.
///
/// A lock that is held by somebody else is not an error: it is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A URL or an option that can't be, found before any I/O; something else where a lock file or its directory should
    /// be; or a call from outside a tokio runtime. Wrong until it is changed.
    Config,
    /// The server or the file system refuses this user: wrong password, missing right, read-only.
    Denied,
    /// The backend can't be reached or can't serve now. Nothing was changed by this operation.
    Unavailable,
    /// The outcome can't be known: the request may have been carried out and its answer lost. The possible
    /// grant has been handed to the provider to be taken back, so nothing stays locked.
    Unknown,
    /// The lock had been lost already; [`Error::loss`] says why. Without a reason: the guard had been released while a
    /// job was running under it.
    Lost,
    /// The backend can't do what was asked.
    Unsupported,
    /// A limit of the backend is reached: no more locks, connections or fencing tokens.
    Exhausted,
    /// The provider has been closed.
    Closed,
}

impl ErrorKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Config => "configuration",
            Self::Denied => "denied",
            Self::Unavailable => "unavailable",
            Self::Unknown => "outcome unknown",
            Self::Lost => "lost",
            Self::Unsupported => "unsupported",
            Self::Exhausted => "exhausted",
            Self::Closed => "closed",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error of this crate: one word, whatever it carries.
///
/// `Display` tells which operation on which lock of which backend failed and why, and leaves the
/// [`source`](StdError::source) to the caller, so that a printed chain says nothing twice. Neither `Display`
/// nor `Debug` ever contains a URL, a password, a signature or an owner id.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: Cow<'static, str>,
    lock: Option<LockName>,
    backend: Option<&'static str>,
    operation: Option<&'static str>,
    loss: Option<Loss>,
    // Shared, because one failed attempt is reported to each waiter that it served.
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of this kind. Backends make these; the engine adds the lock's name, the backend and the
    /// operation. The message must not contain anything secret.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            lock: None,
            backend: None,
            operation: None,
            loss: None,
            source: None,
        }))
    }

    /// Adds the cause. It is shown by whoever prints the chain through `Display`: it must not print secrets.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(Arc::from(source.into()));
        self
    }

    /// The error of an operation on a grant that had been lost already.
    #[must_use]
    pub fn lost(loss: Loss) -> Self {
        let mut error = Self::new(ErrorKind::Lost, loss.to_string());
        error.0.loss = Some(loss);
        error
    }

    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Why the lock had been lost, where that is what this error says.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.0.loss
    }

    /// Whether the same call may succeed later although nothing was changed: [`ErrorKind::Unavailable`] and
    /// [`ErrorKind::Unknown`].
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Unavailable | ErrorKind::Unknown)
    }

    /// The name of the lock concerned, if it was one.
    #[must_use]
    pub fn lock_name(&self) -> Option<&str> {
        self.0.lock.as_ref().map(LockName::as_str)
    }

    /// The backend concerned, as its URL scheme spells it, or `url` while a URL is being made sense of.
    #[must_use]
    pub fn backend(&self) -> Option<&'static str> {
        self.0.backend
    }

    /// What was being done: `acquire`, `run`, `renew`, `release`, `close`, `connect`.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn message(&self) -> &str {
        &self.0.message
    }

    /// Says on which lock of which backend what was being done, where that isn't said yet.
    pub(crate) fn during(
        mut self,
        operation: &'static str,
        backend: &'static str,
        lock: Option<&LockName>,
    ) -> Self {
        let inner = &mut *self.0;
        inner.operation.get_or_insert(operation);
        inner.backend.get_or_insert(backend);
        if inner.lock.is_none() {
            inner.lock = lock.cloned();
        }
        self
    }

    /// The same error for another caller who was served by the same attempt.
    pub(crate) fn duplicate(&self) -> Self {
        let inner = &*self.0;
        Self(Box::new(Inner {
            kind: inner.kind,
            message: inner.message.clone(),
            lock: inner.lock.clone(),
            backend: inner.backend,
            operation: inner.operation,
            loss: inner.loss,
            source: inner.source.clone(),
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if let Some(operation) = inner.operation {
            f.write_str(operation)?;
            if let Some(lock) = &inner.lock {
                write!(f, " {}", lock.quoted())?;
            }
            if let Some(backend) = inner.backend {
                write!(f, " ({backend})")?;
            }
            f.write_str(": ")?;
        }
        write!(f, "{}: {}", inner.kind, inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        // The source's `Debug` is not ours to trust (a driver's may print a URL): its `Display` has to do.
        let source = inner.source.as_ref().map(ToString::to_string);
        f.debug_struct("Error")
            .field("kind", &inner.kind)
            .field("message", &inner.message)
            .field("lock", &inner.lock)
            .field("backend", &inner.backend)
            .field("operation", &inner.operation)
            .field("loss", &inner.loss)
            .field("source", &source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_word() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn display_says_where_and_leaves_the_source_to_the_chain() {
        let error = Error::new(ErrorKind::Unavailable, "the server does not answer")
            .with_source("connection refused")
            .during("acquire", "redis", Some(&LockName::new("nightly\nreport")));
        assert_eq!(
            error.to_string(),
            "acquire \"nightly\\nreport\" (redis): unavailable: the server does not answer"
        );
        assert_eq!(error.source().expect("a source").to_string(), "connection refused");
        assert!(error.is_retryable());
    }

    #[test]
    fn the_first_place_that_knows_wins() {
        let error =
            Error::lost(Loss::Expired).during("renew", "file", None).during("release", "memory", None);
        assert_eq!((error.operation(), error.backend()), (Some("renew"), Some("file")));
        assert_eq!(error.duplicate().loss(), Some(Loss::Expired));
    }
}
