//! [`LockOptions`]: how long a lock is held, renewed and waited for, and what can't be.

use std::time::Duration;

use crate::capabilities::Capabilities;
use crate::error::{Error, ErrorKind, Result};

/// What a lock does about time. Every field left unset has the provider's default, and that has the crate's.
///
/// ```
/// use std::time::Duration;
/// use fencelock::LockOptions;
///
/// let options = LockOptions::new().ttl(Duration::from_secs(20)).max_hold(Duration::from_secs(600));
/// ```
///
/// What can't be is an error of kind [`Config`](ErrorKind::Config) at the first acquire, before any I/O;
/// [`validate`](Self::validate) says it earlier.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockOptions {
    ttl: Option<Duration>,
    auto_renew: Option<bool>,
    max_hold: Option<Duration>,
    hold_at_least: Option<Duration>,
    retry_for: Option<Duration>,
}

impl LockOptions {
    /// The TTL where none is set: 30 s.
    pub const DEFAULT_TTL: Duration = Duration::from_secs(30);
    /// How long an outage is ridden out where [`retry_for`](Self::retry_for) isn't set: 10 s.
    pub const DEFAULT_RETRY_FOR: Duration = Duration::from_secs(10);

    /// Options with nothing set.
    #[must_use]
    pub const fn new() -> Self {
        Self { ttl: None, auto_renew: None, max_hold: None, hold_at_least: None, retry_for: None }
    }

    /// How long a grant stands without renewal: what a crashed holder costs at most, and what a healthy one may be
    /// cut off from the server without losing the lock. Default: 30 s. The backend's
    /// [`Capabilities`] say from where to where.
    #[must_use]
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Whether the grant is renewed in the background as long as the guard lives. Default: `true`. Without it the
    /// lock is lost when its TTL runs out, so the TTL must be longer than the slowest run.
    #[must_use]
    pub const fn auto_renew(mut self, renew: bool) -> Self {
        self.auto_renew = Some(renew);
        self
    }

    /// After this time the job counts as hung: [`lost`](crate::LockGuard::lost) fires with
    /// [`Loss::MaxHold`](crate::Loss::MaxHold), renewal stops, and the TTL runs out. The lock isn't freed earlier
    /// than that, since the job may still be running. Default: no limit.
    #[must_use]
    pub const fn max_hold(mut self, limit: Duration) -> Self {
        self.max_hold = Some(limit);
        self
    }

    /// A release before this time, counted from the grant, only takes effect then. Default: zero, a release frees
    /// at once.
    ///
    /// A "run once" job that takes 100 ms needs it: an instance whose clock is 200 ms late would find the lock free,
    /// and run the job again. Set it to more than the instances' clocks can differ by. The
    /// [`Capabilities`] say whether it outlives the process that asked for it. A holder that crashes frees the lock
    /// as it would without this option.
    #[must_use]
    pub const fn hold_at_least(mut self, time: Duration) -> Self {
        self.hold_at_least = Some(time);
        self
    }

    /// How long an outage is ridden out by an acquire, inside the caller's own time limit, before it becomes an
    /// error; and by a release, which then goes on in the background. Zero: the first failure is one. Default: 10 s.
    #[must_use]
    pub const fn retry_for(mut self, time: Duration) -> Self {
        self.retry_for = Some(time);
        self
    }

    /// Says now what the first acquire on a backend with these capabilities would say.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`]: the TTL is outside the backend's range; `max_hold` is zero, or shorter than
    /// `hold_at_least`; `hold_at_least` is longer than a TTL that isn't renewed, than the backend's maximum, or than 100 years.
    pub fn validate(&self, capabilities: &Capabilities) -> Result<()> {
        Terms::new(self, capabilities).map(drop)
    }

    #[cfg(any(feature = "postgres", feature = "sqlserver"))]
    pub(crate) fn ttl_or_default(&self) -> Duration {
        self.ttl.unwrap_or(Self::DEFAULT_TTL)
    }

    /// These options, and where they are silent those.
    pub(crate) fn or(&self, defaults: &Self) -> Self {
        Self {
            ttl: self.ttl.or(defaults.ttl),
            auto_renew: self.auto_renew.or(defaults.auto_renew),
            max_hold: self.max_hold.or(defaults.max_hold),
            hold_at_least: self.hold_at_least.or(defaults.hold_at_least),
            retry_for: self.retry_for.or(defaults.retry_for),
        }
    }
}

/// Longer than this a duration stands for "no limit", or is an error where there has to be one: 100 years. It can
/// be added to any instant in i64 nanoseconds.
pub(crate) const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Options with every default filled in, checked against a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) ttl: Duration,
    pub(crate) auto_renew: bool,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) hold_at_least: Duration,
    pub(crate) retry_for: Duration,
}

impl Terms {
    pub(crate) fn new(options: &LockOptions, capabilities: &Capabilities) -> Result<Self> {
        let terms = Self {
            ttl: options.ttl.unwrap_or(LockOptions::DEFAULT_TTL),
            auto_renew: options.auto_renew.unwrap_or(true),
            max_hold: options.max_hold.filter(|&limit| limit <= LONGEST),
            hold_at_least: options.hold_at_least.unwrap_or(Duration::ZERO),
            retry_for: options.retry_for.unwrap_or(LockOptions::DEFAULT_RETRY_FOR).min(LONGEST),
        };
        let Self { ttl, hold_at_least, .. } = terms;
        let (min, max) = (capabilities.min_ttl, capabilities.max_ttl.min(LONGEST));
        let wrong = if ttl < min {
            format!("a ttl of {ttl:?} is below this backend's minimum of {min:?}")
        } else if ttl > max {
            format!("a ttl of {ttl:?} is above this backend's maximum of {max:?}")
        } else if ttl.is_zero() {
            "a ttl of zero would expire before it is granted".to_owned()
        } else if terms.max_hold.is_some_and(|limit| limit.is_zero()) {
            "a max_hold of zero would lose the lock before the job begins".to_owned()
        } else if hold_at_least > LONGEST {
            format!("a hold_at_least of {hold_at_least:?} can't be represented")
        } else if hold_at_least > capabilities.max_hold_at_least {
            let max = capabilities.max_hold_at_least;
            format!("a hold_at_least of {hold_at_least:?} is above this backend's maximum of {max:?}")
        } else if let Some(limit) = terms.max_hold.filter(|&limit| hold_at_least > limit) {
            format!("hold_at_least ({hold_at_least:?}) is longer than max_hold ({limit:?})")
        } else if !terms.auto_renew && hold_at_least > ttl {
            format!("hold_at_least ({hold_at_least:?}) is longer than a ttl ({ttl:?}) that isn't renewed")
        } else {
            return Ok(terms);
        };
        Err(Error::new(ErrorKind::Config, wrong))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities::Expiry;

    const SECOND: Duration = Duration::from_secs(1);

    fn capabilities() -> Capabilities {
        Capabilities::new(SECOND, 60 * SECOND, Expiry::Ttl).max_hold_at_least(3600 * SECOND)
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let terms = Terms::new(&LockOptions::new(), &capabilities()).unwrap();
        assert_eq!((terms.ttl, terms.auto_renew, terms.retry_for), (30 * SECOND, true, 10 * SECOND));
        assert_eq!((terms.max_hold, terms.hold_at_least), (None, Duration::ZERO));
    }

    #[test]
    fn a_lock_overrides_its_provider_field_by_field() {
        let provider = LockOptions::new().ttl(5 * SECOND).auto_renew(false);
        let merged = LockOptions::new().ttl(7 * SECOND).or(&provider);
        assert_eq!(merged, LockOptions::new().ttl(7 * SECOND).auto_renew(false));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let new = LockOptions::new;
        for (wrong, says) in [
            (new().ttl(Duration::ZERO), "below this backend's minimum"),
            (new().ttl(Duration::from_millis(999)), "below this backend's minimum"),
            (new().ttl(61 * SECOND), "above this backend's maximum"),
            (new().ttl(Duration::MAX), "above this backend's maximum"),
            (new().max_hold(Duration::ZERO), "max_hold of zero"),
            (new().max_hold(SECOND).hold_at_least(2 * SECOND), "longer than max_hold"),
            (new().auto_renew(false).ttl(SECOND).hold_at_least(2 * SECOND), "isn't renewed"),
            (new().hold_at_least(Duration::MAX), "can't be represented"),
            (new().hold_at_least(3601 * SECOND), "hold_at_least of 3601s is above this backend's maximum"),
        ] {
            let error = wrong.validate(&capabilities()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn an_endless_limit_is_no_limit() {
        let endless = LockOptions::new().max_hold(Duration::MAX).retry_for(Duration::MAX);
        assert_eq!(Terms::new(&endless, &capabilities()).unwrap().max_hold, None);
    }
}
