//! [`Provider`]: the one implementation of [`LockProvider`], over any [`Backend`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::Engine;
use super::acquire::{Patience, Request};
use crate::backend::Backend;
use crate::capabilities::Capabilities;
use crate::clock::Instant;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::LockGuard;
use crate::lock::{DistributedLock, LockProvider};
use crate::name::LockName;
use crate::options::{LockOptions, Terms};

/// Makes a [`LockProvider`] of a [`Backend`].
///
/// ```
/// use fencelock::memory::Memory;
/// use fencelock::{LockProvider, Provider};
///
/// let provider: Box<dyn LockProvider> = Box::new(Provider::new(Memory::new()));
/// ```
pub struct Provider<B: Backend> {
    pub(super) engine: Arc<Engine<B>>,
    defaults: LockOptions,
    prefix: String,
}

impl<B: Backend> Provider<B> {
    /// A provider with the crate's defaults and no prefix.
    #[must_use]
    pub fn new(backend: B) -> Self {
        Self { engine: Engine::new(backend), defaults: LockOptions::new(), prefix: String::new() }
    }

    /// A provider with defaults of its own.
    pub fn builder(backend: B) -> ProviderBuilder<B> {
        ProviderBuilder { backend, defaults: LockOptions::new(), prefix: None }
    }

    /// The backend.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.engine.backend
    }
}

/// [`Provider::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct ProviderBuilder<B: Backend> {
    backend: B,
    defaults: LockOptions,
    prefix: Option<String>,
}

impl<B: Backend> ProviderBuilder<B> {
    /// What applies to a lock whose own options leave it unset. Default: the crate's defaults.
    pub fn options(mut self, defaults: LockOptions) -> Self {
        self.defaults = defaults;
        self
    }

    /// Keeps the locks of one application apart from others on the same server: the lock `name` is `prefix:name` there.
    /// Letters, digits, `-`, `_` and `.`, so that no two prefixes can mean the same lock. Default: none.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// The provider. No I/O.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] for a prefix with other characters or none, and for options that can't be on this backend.
    pub fn build(self) -> Result<Provider<B>> {
        let prefix = match self.prefix {
            None => String::new(),
            Some(prefix) => {
                check_prefix(&prefix)?;
                prefix + ":"
            }
        };
        self.defaults.validate(&self.backend.capabilities())?;
        Ok(Provider { engine: Engine::new(self.backend), defaults: self.defaults, prefix })
    }
}

/// Whether this can be a prefix.
pub(crate) fn check_prefix(prefix: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !prefix.is_empty() && prefix.chars().all(allowed) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Config, "a prefix consists of at least one letter, digit, `-`, `_` or `.`"))
}

#[async_trait]
impl<B: Backend> LockProvider for Provider<B> {
    fn create_lock_with(&self, name: &str, options: LockOptions) -> Box<dyn DistributedLock> {
        let display_name = LockName::new(name);
        let name = if self.prefix.is_empty() {
            display_name.clone()
        } else {
            LockName::new([&self.prefix, name].concat())
        };
        let terms = Terms::new(&options.or(&self.defaults), &self.engine.capabilities);
        Box::new(Lock { engine: self.engine.clone(), name, display_name, terms })
    }

    fn capabilities(&self) -> Capabilities {
        self.engine.capabilities.clone()
    }

    async fn close(&self) -> Result<()> {
        self.engine.close().await.map_err(|error| error.during("close", self.engine.backend.name(), None))
    }
}

impl<B: Backend> fmt::Debug for Provider<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider")
            .field("engine", &self.engine)
            .field("defaults", &self.defaults)
            .field("prefix", &self.prefix)
            .finish()
    }
}

struct Lock<B: Backend> {
    engine: Arc<Engine<B>>,
    /// The name on the server.
    name: LockName,
    display_name: LockName,
    terms: Result<Terms>,
}

impl<B: Backend> Lock<B> {
    async fn acquire_with(&self, patience: Patience) -> Result<Option<LockGuard>> {
        let terms = self.terms.as_ref().map_err(|error| {
            error.duplicate().during("acquire", self.engine.backend.name(), Some(&self.display_name))
        })?;
        let request = Request { name: &self.name, display_name: &self.display_name, terms, patience };
        self.engine.acquire(request).await
    }
}

#[async_trait]
impl<B: Backend> DistributedLock for Lock<B> {
    fn name(&self) -> &str {
        self.display_name.as_str()
    }

    async fn acquire(&self) -> Result<LockGuard> {
        loop {
            // Without a deadline the answer is a guard or an error.
            if let Some(guard) = self.acquire_with(Patience::Until(Instant::NEVER)).await? {
                return Ok(guard);
            }
        }
    }

    async fn try_acquire(&self) -> Result<Option<LockGuard>> {
        self.acquire_with(Patience::Try).await
    }

    async fn try_acquire_for(&self, timeout: Duration) -> Result<Option<LockGuard>> {
        let patience = match timeout {
            Duration::ZERO => Patience::Try,
            _ => Patience::Until(Instant::now() + timeout),
        };
        self.acquire_with(patience).await
    }
}

impl<B: Backend> fmt::Debug for Lock<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock")
            .field("name", &self.display_name)
            .field("backend", &self.engine.backend.name())
            .field("terms", &self.terms)
            .finish()
    }
}
