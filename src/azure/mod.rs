//! The `azblob` backend (feature `azure`): leases of blobs in Azure Blob Storage, [`AzureLocks`].
//!
//! | URL | |
//! |---|---|
//! | `azblob://ACCOUNT/CONTAINER` | the container of a storage account, which is made if it is missing |
//!
//! Query parameters, percent-encoded: `account_key=…` or `sas=…` (a shared access signature), and `endpoint=…` for one that isn't
//! `https://ACCOUNT.blob.core.windows.net`. Without `account_key` and `sas` the first of these environment variables
//! counts: `AZURE_STORAGE_CONNECTION_STRING`, `AZURE_STORAGE_KEY` (or `AZURE_STORAGE_ACCOUNT_KEY`), `AZURE_STORAGE_SAS_TOKEN`. For
//! Microsoft Entra, and anything else, make an [`AzureLocks`] of your own client.
//!
//! # How it works
//!
//! A lock is an empty block blob with a lease, called by [`LockName::encode`](crate::LockName::encode) with at most 252
//! characters, and a dot at its end as `%2E`. It is made at the first claim, and stays: it has the last fencing token. The id of
//! the lease is new for each claim, so that a claim whose answer was lost, and a release, can be repeated.
//!
//! The service's leases are of 15 to 60 seconds, and so are TTLs; other ones are an error before any I/O. A part of a second is
//! rounded up. Infinite leases aren't used: nothing would free the lock of a process that has died. A lease that has run out is lost
//! by our own clock, although the service would renew it if nobody has taken it meanwhile.
//!
//! [`hold_at_least`](crate::LockOptions::hold_at_least), up to 60 seconds, is left to the service, and outlives the process.
//!
//! A claim takes two requests (the lease, and the token), or three after somebody else has had the lock; a renewal one; a
//! release two, since the service doesn't say of one whether the lease had been broken. A claim of which nobody knows whether it arrived is released at once; if it arrives after that, it stands until
//! its TTL runs out.
//!
//! # Waiting
//!
//! The service tells nobody of a release. Who waits looks once a second or so ([`poll_every`](AzureLocks::poll_every)), by one
//! request, which is a write operation of the price list: about 60 a minute for each name and process, however many wait
//! there. In one process the next one gets it at once. Among processes there is no order.
//!
//! # Fencing tokens
//!
//! The metadata `fencelock_token` of the blob is the last one. It is written under the lease, on condition that the blob hasn't
//! been changed; other metadata stays, with its names in lower case. A token is the last one plus one, or the service's clock in
//! microseconds since 1970 (from its `Date`), whichever is larger. Deleting a blob doesn't turn tokens back by more than the clock
//! has been set back since, or a second: the service says whole ones.
//!
//! # Losing a lock
//!
//! A lease that an administrator breaks, or whose blob is deleted, is noticed by the next renewal, within a third of the TTL
//! ([`Loss::Taken`]). An outage of the service doesn't lose anything until the TTL has run out. Each request
//! is given four seconds.
//!
//! # Rights
//!
//! On blobs: read, create and write (`rcw` in a signature; "Storage Blob Data Contributor"). To make the container: the account's
//! key, or a signature for the account that says so; otherwise make it before.
//!
//! # TLS
//!
//! With the feature `rustls` or `native-tls`, which all but the emulator need.
//!
//! # Traces
//!
//! The SDK's own traces, at the level of debug, show requests without keys and signatures, but with the ids of leases: who has
//! one, and a right to the container, can release the lease. Those of our clients show others in their stead; those of a client
//! of your own show them as they are.

mod account;
mod blob;
mod failure;
mod signing;
mod transport;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The SDK, whose types [`AzureLocks::new`] takes. Its major version is part of this crate's.
pub use azure_storage_blob as driver;

use azure_storage_blob::BlobContainerClient;
use futures_util::StreamExt;
use futures_util::stream;
use tokio::runtime;

pub(crate) use self::account::Said;

use self::account::Account;
use self::blob::{LockBlob, Version};
use self::failure::Refusal;
use self::transport::Mask;
use crate::backend::{Backend, Claim, Due, Grant, Instant, Mode, Outcome, OwnerId, Released, Renewal};
use crate::capabilities::{Capabilities, Expiry, Fairness};
use crate::engine::backoff::jitter;
use crate::engine::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Loss;
use crate::name::LockName;

const MIN_TTL: Duration = Duration::from_secs(15);
const MAX_TTL: Duration = Duration::from_secs(60);

/// How long a blob's name may be between two slashes.
const LONGEST: usize = 252; // and two more for a dot at the end

/// Not later than so long before its end is a lease broken: an answer takes four seconds at most.
const BREAK_WITHIN: Duration = Duration::from_secs(8);

/// How many renewals are under way at a time.
const RENEWALS: usize = 32;

/// Of how many locks it is remembered what their blobs are like, which saves a request.
const REMEMBERED: usize = 10_000;

/// For how many runtimes there are clients at a time.
const RUNTIMES: usize = 8;

/// Locks in a container of Azure Blob Storage. See the [module](self).
pub struct AzureLocks {
    clients: Clients,
    poll_every: Duration,
    remembered: Mutex<HashMap<LockName, Version>>,
}

/// Clients for a container.
enum Clients {
    /// The application's own.
    One(Arc<BlobContainerClient>),
    /// One for each runtime: connections die, or stand still, with the one that they were made on.
    Many(Box<Many>),
}

struct Many {
    account: Account,
    container: String,
    mask: Mask,
    made: Mutex<Vec<(runtime::Id, Arc<BlobContainerClient>)>>,
}

/// A lock that is held.
pub struct AzureHold {
    name: LockName,
    lease: OwnerId,
    ttl: Duration,
    /// Until when it stands, in the nanoseconds of [`Instant`].
    until: AtomicI64,
    /// A release has asked whether it still stands, and has had no answer.
    is_unsure: AtomicBool,
}

impl AzureHold {
    fn until(&self) -> Instant {
        Instant::from_nanos(self.until.load(Ordering::Acquire))
    }
}

/// In whole seconds, rounded up, as the service takes them.
fn seconds(duration: Duration) -> i32 {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    i32::try_from(seconds).unwrap_or(i32::MAX)
}

fn lost() -> Error {
    Error::new(ErrorKind::Unavailable, "the lease was broken, or its blob deleted, before it could be used")
}

impl AzureLocks {
    /// Locks in the container of this client. What it retries by itself has to fit into the four seconds of a request. No I/O.
    #[must_use]
    pub fn new(container: BlobContainerClient) -> Self {
        Self::of(Clients::One(Arc::new(container)))
    }

    /// Locks in a container of the account of a connection string; `UseDevelopmentStorage=true` is the emulator's. No I/O.
    ///
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) for a string that can't be read, or what can't be a container's name;
    /// [`Unsupported`](ErrorKind::Unsupported) for TLS in a build without.
    pub fn from_connection_string(string: &str, container: &str) -> Result<Self> {
        Self::in_account(Account::of_connection_string(string)?, container)
    }

    /// Locks in the container that a URL names.
    pub(crate) fn of_url(rest: &str, said: &Said<'_>) -> Result<Self> {
        let (account, container) = rest
            .strip_prefix("//")
            .and_then(|rest| rest.trim_end_matches('/').split_once('/'))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Config,
                    "an azblob URL names account and container: `azblob://account/container`",
                )
            })?;
        Self::in_account(Account::of_url(account, said, |name| std::env::var(name).ok())?, container)
    }

    fn in_account(account: Account, container: &str) -> Result<Self> {
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let is_name = (3..=63).contains(&container.len())
            && container.bytes().all(|byte| is_plain(byte) || byte == b'-')
            && !container.starts_with('-')
            && !container.ends_with('-')
            && !container.contains("--");
        if !is_name {
            return Err(Error::new(
                ErrorKind::Config,
                "a container has a name of 3 to 63 lower-case letters, digits and single hyphens between them",
            ));
        }
        account.check_tls()?;
        let mask = Mask::random()?;
        // What is wrong with it is said now.
        let client = Arc::new(account.container(container, mask)?);
        let here = runtime::Handle::try_current().map(|here| (here.id(), client));
        let (container, made) = (container.to_owned(), Mutex::new(here.into_iter().collect()));
        Ok(Self::of(Clients::Many(Box::new(Many { account, container, mask, made }))))
    }

    fn of(clients: Clients) -> Self {
        Self { clients, poll_every: Duration::from_secs(1), remembered: Mutex::default() }
    }

    /// How often who waits for a lock looks whether it is free, on average; each time by one request. Default: one second.
    #[must_use]
    pub fn poll_every(mut self, period: Duration) -> Self {
        self.poll_every = period;
        self
    }

    /// Looks whether the container can be used, and makes it if it is missing, so that what is wrong is known now. The first
    /// claim would do it otherwise.
    ///
    /// # Errors
    ///
    /// What the service says.
    pub async fn connect(&self) -> Result<()> {
        // No lock has this blob: it isn't there, if one can see that.
        let container = self.container()?;
        let nobody = LockBlob { blob: container.blob_client("fencelock:nobody"), container: &container };
        match nobody.read().await? {
            Err(Refusal::NoContainer) => nobody.make_container().await,
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn container(&self) -> Result<Arc<BlobContainerClient>> {
        let Many { account, container, mask, made } = match &self.clients {
            Clients::One(client) => return Ok(client.clone()),
            Clients::Many(many) => &**many,
        };
        let here = runtime::Handle::current().id();
        let mut made = lock(made);
        if let Some((_, client)) = made.iter().find(|(runtime, _)| *runtime == here) {
            return Ok(client.clone());
        }
        let client = Arc::new(account.container(container, *mask)?);
        if made.len() >= RUNTIMES {
            made.remove(0);
        }
        made.push((here, client.clone()));
        Ok(client)
    }

    /// What the client calls a lease.
    fn id(&self, lease: OwnerId) -> String {
        match &self.clients {
            Clients::One(_) => Mask::NONE.hide(lease),
            Clients::Many(many) => many.mask.hide(lease),
        }
    }

    fn remember(&self, name: &LockName, version: Version) {
        let mut remembered = lock(&self.remembered);
        if remembered.len() >= REMEMBERED && !remembered.contains_key(name) {
            remembered.clear();
        }
        remembered.insert(name.clone(), version);
    }

    /// One attempt. `None`: somebody has it.
    async fn take(&self, claim: &Claim) -> Result<Option<Grant<AzureHold>>> {
        let container = self.container()?;
        let blob = blob_of(&container, &claim.name);
        let id = self.id(claim.owner);
        let leased = match blob.lease(seconds(claim.ttl), &id).await? {
            Ok(leased) => leased,
            Err(Refusal::Leased) => return Ok(None),
            Err(_) => {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "the blob of this lock disappears while it is used",
                ));
            }
        };
        let until = leased.sent + claim.ttl;
        let known = lock(&self.remembered).get(&claim.name).cloned();
        let known = known.and_then(|version| version.if_still(leased.etag.as_ref()));
        match blob.draw(&id, known, leased.at).await {
            Ok(Ok((token, version))) => {
                self.remember(&claim.name, version);
                let hold = AzureHold::new(claim, until);
                Ok(Some(Grant::lease(hold, token, until)))
            }
            Ok(Err(_)) => Err(lost()),
            Err(error) => {
                // It must not stay because nobody could write down its token.
                match blob.release(&id).await {
                    Ok(_) if error.kind() == ErrorKind::Unknown => {
                        let message =
                            "Azure Storage has not confirmed a fencing token, and the lease was given back";
                        Err(Error::new(ErrorKind::Unavailable, message).with_source(error))
                    }
                    Ok(_) => Err(error),
                    Err(_) => {
                        let message = "a lease may be left from a claim that failed";
                        Err(Error::new(ErrorKind::Unknown, message).with_source(error))
                    }
                }
            }
        }
    }

    async fn renew_one(&self, hold: &AzureHold, ttl: Duration) -> Renewal {
        if hold.until().has_passed() {
            return Renewal::Lost(Loss::Expired);
        }
        let container = match self.container() {
            Ok(container) => container,
            Err(error) => return Renewal::Failed(error),
        };
        let sent = Instant::now();
        match blob_of(&container, &hold.name).renew(&self.id(hold.lease)).await {
            Ok(Ok(())) => {
                let until = sent + hold.ttl.min(ttl);
                hold.until.fetch_max(until.to_nanos(), Ordering::AcqRel);
                Renewal::Until(until)
            }
            Ok(Err(_)) => Renewal::Lost(Loss::Taken),
            Err(error) => Renewal::Failed(error),
        }
    }
}

impl AzureHold {
    fn new(claim: &Claim, until: Instant) -> Self {
        let until = AtomicI64::new(until.to_nanos());
        let is_unsure = AtomicBool::new(false);
        Self { name: claim.name.clone(), lease: claim.owner, ttl: claim.ttl, until, is_unsure }
    }
}

fn blob_of<'a>(container: &'a BlobContainerClient, name: &LockName) -> LockBlob<'a> {
    let mut encoded = name.encode(LONGEST);
    // The service may take a name for the same without it. Nothing else is encoded like this.
    if encoded.ends_with('.') {
        encoded.truncate(encoded.len() - 1);
        encoded.push_str("%2E");
    }
    LockBlob { blob: container.blob_client(&encoded), container }
}

impl Backend for AzureLocks {
    type Hold = AzureHold;

    fn name(&self) -> &'static str {
        "azblob"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(MIN_TTL, MAX_TTL, Expiry::Ttl)
            .keeps_after_exit(true)
            .max_hold_at_least(MAX_TTL)
            .wakes_waiters(false)
            .fairness(Fairness::None)
    }

    async fn try_claim(&self, claim: &Claim, wait: Duration) -> Result<Outcome<AzureHold>> {
        if claim.mode != Mode::Exclusive {
            return Err(Error::new(ErrorKind::Unsupported, "azblob locks are exclusive"));
        }
        let until = Instant::now() + wait;
        loop {
            if let Some(grant) = self.take(claim).await? {
                return Ok(Outcome::Granted(grant));
            }
            if wait.is_zero() {
                return Ok(Outcome::Busy { retry_after: None });
            }
            let nap = self.poll_every / 2 + jitter(self.poll_every);
            tokio::time::sleep(nap.min(until.remaining())).await;
            if until.has_passed() {
                return Ok(Outcome::Busy { retry_after: Some(Duration::ZERO) });
            }
        }
    }

    async fn abandon(&self, claim: &Claim) -> Result<()> {
        let container = self.container()?;
        // Refused, it has no lease.
        blob_of(&container, &claim.name).release(&self.id(claim.owner)).await.map(drop)
    }

    async fn renew(&self, due: &[Due<'_, AzureHold>]) -> Vec<Renewal> {
        let renewals: Vec<_> = due.iter().map(|due| self.renew_one(due.hold, due.ttl)).collect();
        stream::iter(renewals).buffered(RENEWALS).collect().await
    }

    async fn release(&self, hold: &AzureHold, keep_for: Duration) -> Result<Released> {
        let container = self.container()?;
        let (blob, id) = (blob_of(&container, &hold.name), self.id(hold.lease));
        let given_back = async || {
            let released = blob.release(&id).await?;
            Ok(if released.is_ok() { Released::Yes } else { Released::NotHeld })
        };
        // Renewed, a lease that has run out would be there again. And while answers are lost, each try would renew it, and
        // none release it.
        let is_unsure = hold.is_unsure.swap(true, Ordering::AcqRel);
        if hold.until().has_passed() || (is_unsure && keep_for.is_zero()) {
            return given_back().await;
        }
        // The service releases a lease that was broken, too, and says nothing of that.
        let stands = blob.renew(&id).await;
        if !stands.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unknown) {
            hold.is_unsure.store(false, Ordering::Release);
        }
        if stands?.is_err() {
            return Ok(Released::NotHeld);
        }
        if keep_for.is_zero() {
            return given_back().await;
        }
        // Taken again under the same id, it gets another time.
        let Ok(kept) = blob.try_lease(seconds(keep_for.max(MIN_TTL)), &id).await? else {
            return Ok(Released::NotHeld);
        };
        if keep_for < MIN_TTL {
            // The shortest one is cut by breaking it, which the service lets anybody do: while it is surely ours, and
            // nobody has had a token since.
            let ours_for = (kept.sent + MIN_TTL).remaining();
            if let Some(etag) = kept.etag
                && ours_for > BREAK_WITHIN
            {
                let _ = blob.end_after(seconds(keep_for), etag).await?; // refused, it has ended
            }
        }
        Ok(Released::Yes)
    }

    async fn transfer(&self, hold: &AzureHold, to: &Claim) -> Result<Option<Grant<AzureHold>>> {
        // The lease goes on as it is: with the time that it has, and that is left of it.
        let until = hold.until();
        if hold.ttl != to.ttl || hold.name != to.name || until.remaining() < to.ttl / 3 {
            return Ok(None);
        }
        let container = self.container()?;
        let blob = blob_of(&container, &hold.name);
        let new = self.id(to.owner);
        let Ok(at) = blob.change(&self.id(hold.lease), &new).await? else { return Ok(None) };
        let known = lock(&self.remembered).get(&hold.name).cloned();
        let drawn = blob.draw(&new, known, at).await?;
        let Ok((token, version)) = drawn else { return Err(lost()) };
        self.remember(&hold.name, version);
        Ok(Some(Grant::lease(AzureHold::new(to, until), token, until)))
    }
}

impl fmt::Debug for AzureLocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("AzureLocks");
        if let Clients::Many(many) = &self.clients {
            debug.field("account", &many.account).field("container", &many.container);
        }
        debug.field("poll_every", &self.poll_every).finish_non_exhaustive()
    }
}

impl fmt::Debug for AzureHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureHold").field("name", &self.name).finish_non_exhaustive()
    }
}
