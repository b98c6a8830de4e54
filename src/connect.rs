//! [`connect`]: from a URL to a provider. The only place that names every backend.

use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "azure")]
use crate::azure::{AzureLocks, Said};
use crate::backend::Backend;
use crate::engine::Provider;
#[cfg(feature = "postgres")]
use crate::engine::check_prefix;
use crate::error::{Error, ErrorKind, Result};
use crate::file::FileLocks;
use crate::lock::LockProvider;
use crate::memory::Memory;
use crate::options::LockOptions;
#[cfg(feature = "postgres")]
use crate::postgres;
#[cfg(feature = "redis")]
use crate::redis::{RedisLocks, RedisUrl, Redlock, SingleParameters};
#[cfg(feature = "sqlserver")]
use crate::sqlserver::{self, SqlServerLocks};

/// Schemes of the backends that are there, the features that they need, and whether this build has them.
const FEATURES: [(&[&str], &str, bool); 4] = [
    (&["redis", "rediss", "redis+unix", "redlock"], "redis", cfg!(feature = "redis")),
    (&["postgres", "postgresql"], "postgres", cfg!(feature = "postgres")),
    (&["sqlserver", "jdbc"], "sqlserver", cfg!(feature = "sqlserver")),
    (&["azblob"], "azure", cfg!(feature = "azure")),
];

/// The provider that a URL names.
///
/// | URL | backend |
/// |---|---|
/// | `memory:` | [`memory`](crate::memory): the same URL in one process has the same locks |
/// | `memory:NAME` | the same, isolated from other names |
/// | `file:PATH` | [`file`](crate::file): lock files in the directory `PATH`, which is created if it is missing |
/// | `redis://USER:PASSWORD@HOST:PORT/DB` | `redis` (feature `redis`): one server; `rediss://` is the same over TLS |
/// | `redis+unix:/PATH?db=DB&user=USER&password=PASSWORD` | the same over a Unix socket |
/// | `redis://HOST,HOST/DB?sentinel=NAME` | the master `NAME` that these Sentinels watch |
/// | `redlock://HOST,HOST,HOST` | Redlock (feature `redis`) over independent servers |
/// | `postgres://USER:PASSWORD@HOST:PORT/DATABASE` | `postgres` (feature `postgres`): advisory locks; `postgresql://` is the same |
/// | `sqlserver://USER:PASSWORD@HOST:PORT/DATABASE` | `sqlserver` (feature `sqlserver`): application locks of SQL Server |
/// | `jdbc:sqlserver://HOST;database=DATABASE;…`, `Server=HOST;Database=DATABASE;…` | the same by a connection string, as JDBC or ADO.NET have it, which has no parameters of ours |
/// | `azblob://ACCOUNT/CONTAINER` | `azblob` (feature `azure`): leases of Azure Blob Storage, with the right that the environment gives |
///
/// The path of `file:` is taken literally, up to a `?`: nothing in it is percent-decoded. `file:///some/dir` is `file:/some/dir`.
///
/// Query parameters set the provider's defaults, on every backend:
///
/// | parameter | meaning |
/// |---|---|
/// | `ttl=30s` | [`LockOptions::ttl`] |
/// | `auto_renew=false` | [`LockOptions::auto_renew`] |
/// | `max_hold=10m` | [`LockOptions::max_hold`] |
/// | `hold_at_least=5s` | [`LockOptions::hold_at_least`] |
/// | `retry_for=10s` | [`LockOptions::retry_for`] |
/// | `prefix=app` | [`ProviderBuilder::prefix`](crate::ProviderBuilder::prefix): letters, digits, `-`, `_` and `.` |
///
/// A duration needs a unit: `500ms`, `30s`, `5m` (minutes), `1h 30m`.
///
/// Those of one backend are described in its module.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> fencelock::Result<()> {
/// let provider = fencelock::connect("memory:?ttl=10s&prefix=billing").await?;
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// [`Config`](ErrorKind::Config) for a URL or a parameter that can't be, [`Unsupported`](ErrorKind::Unsupported) for a
/// backend that this build hasn't got; and what the backend says when it can't be reached, which is tried once: make the
/// provider of a [backend](crate::redis) yourself to start before its server does. The URL is never part of an error: it may
/// contain a password.
///
/// # Cancel safety
///
/// Dropping the future leaves nothing behind, but perhaps the directory of `file:`.
pub async fn connect(url: &str) -> Result<Box<dyn LockProvider>> {
    if url.trim() != url {
        let error =
            Error::new(ErrorKind::Config, "the URL begins or ends with white space, such as a line break");
        return Err(error.during("connect", "url", None));
    }
    // Of a connection string neither keys nor separators could be a scheme.
    let is_string = url.split(':').next().is_some_and(|scheme| scheme.contains('='));
    if is_string {
        return connect_ado(url).await.map_err(|error| error.during("connect", "url", None));
    }
    let parts = url.split_once(':').map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
    let result = match parts.as_ref().map(|(scheme, rest)| (&**scheme, *rest)) {
        Some(("memory", rest)) => connect_memory(rest),
        Some(("file", rest)) => connect_file(rest).await,
        #[cfg(feature = "redis")]
        Some((scheme @ ("redis" | "rediss"), rest)) => connect_redis(scheme == "rediss", rest).await,
        #[cfg(feature = "redis")]
        Some(("redis+unix", rest)) => connect_redis_socket(rest).await,
        #[cfg(feature = "redis")]
        Some(("redlock", rest)) => connect_redlock(rest).await,
        #[cfg(feature = "postgres")]
        Some(("postgres" | "postgresql", rest)) => Box::pin(connect_postgres(rest)).await, // a large one
        #[cfg(feature = "sqlserver")]
        Some(("sqlserver", rest)) => Box::pin(connect_sqlserver(rest)).await,
        #[cfg(feature = "sqlserver")]
        Some(("jdbc", _)) => {
            connect_to_sqlserver(SqlServerLocks::from_jdbc_string(url), Common::default()).await
        }
        #[cfg(feature = "azure")]
        Some(("azblob", rest)) => Box::pin(connect_azure(rest)).await,
        Some((scheme, _)) => Err(unknown(scheme)),
        None => Err(Error::new(
            ErrorKind::Config,
            "this is not a URL: it must begin with a scheme, as in `memory:` or `file:some/dir`",
        )),
    };
    result.map_err(|error| error.during("connect", "url", None))
}

fn connect_memory(rest: &str) -> Result<Box<dyn LockProvider>> {
    let (name, common, _) = Common::take(rest, &[])?;
    let name = name.strip_prefix("//").unwrap_or(name);
    Ok(Box::new(common.build(Memory::named(name))?))
}

async fn connect_file(rest: &str) -> Result<Box<dyn LockProvider>> {
    let (path, common, _) = Common::take(rest, &[])?;
    let path = match path.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        Some(_) => {
            return Err(Error::new(
                ErrorKind::Config,
                "a file URL names no host: write `file:some/dir`, `file:/some/dir` or `file:///some/dir`",
            ));
        }
        None => path,
    };
    if path.is_empty() {
        return Err(Error::new(ErrorKind::Config, "a file URL needs a directory, as in `file:some/dir`"));
    }
    let provider = common.build(FileLocks::new(PathBuf::from(path)))?;
    provider.backend().prepare().await?;
    Ok(Box::new(provider))
}

#[cfg(feature = "redis")]
async fn connect_redis(tls: bool, rest: &str) -> Result<Box<dyn LockProvider>> {
    let known = ["sentinel", "sentinel_username", "sentinel_password", "replicas", "replica_timeout"];
    let (rest, common, own) = Common::take(rest, &known)?;
    let [sentinel, sentinel_username, sentinel_password, _, _] =
        known.map(|key| own.get(key).map(str::to_owned));
    let locks = RedisUrl { tls, rest }.single(SingleParameters {
        sentinel,
        sentinel_username,
        sentinel_password,
        replicas: own.number("replicas")?,
        replica_timeout: own.duration("replica_timeout")?,
    })?;
    let provider = common.build(locks)?;
    provider.backend().connect().await.map_err(reached("redis"))?;
    Ok(Box::new(provider))
}

/// An error of the backend itself, no longer of the URL.
#[cfg(any(feature = "azure", feature = "postgres", feature = "redis", feature = "sqlserver"))]
fn reached(backend: &'static str) -> impl Fn(Error) -> Error {
    move |error| error.during("connect", backend, None)
}

#[cfg(feature = "redis")]
async fn connect_redis_socket(rest: &str) -> Result<Box<dyn LockProvider>> {
    let (rest, common, own) = Common::take(rest, &["db", "user", "password"])?;
    let url = RedisUrl { tls: false, rest };
    let client = url.unix_client(own.get("db"), own.get("user"), own.get("password"))?;
    let provider = common.build(RedisLocks::new(client))?;
    provider.backend().connect().await.map_err(reached("redis"))?;
    Ok(Box::new(provider))
}

#[cfg(feature = "redis")]
async fn connect_redlock(rest: &str) -> Result<Box<dyn LockProvider>> {
    let (rest, common, own) = Common::take(rest, &["tls", "longest_ttl"])?;
    let tls = own.get("tls").map_or(Ok(false), |value| boolean("tls", value))?;
    let mut locks = Redlock::new(RedisUrl { tls, rest }.clients(None)?)?;
    if let Some(ttl) = own.duration("longest_ttl")? {
        locks = locks.longest_ttl(ttl);
    }
    let provider = common.build(locks)?;
    provider.backend().connect().await.map_err(reached("redlock"))?;
    Ok(Box::new(provider))
}

#[cfg(feature = "postgres")]
async fn connect_postgres(rest: &str) -> Result<Box<dyn LockProvider>> {
    let ours = ["sslmode", "sslrootcert", "waiting_sessions", "token_sequence", "transaction_scoped"];
    let known: Vec<_> = ours.into_iter().chain(postgres::DRIVERS_PARAMETERS).collect();
    let (rest, common, own) = Common::take(rest, &known)?;
    let drivers: Vec<_> =
        postgres::DRIVERS_PARAMETERS.into_iter().filter_map(|key| Some((key, own.get(key)?))).collect();
    let mut locks = postgres::locks_of_url(rest, &drivers, own.get("sslmode"), own.get("sslrootcert"))?;
    if let Some(sessions) = own.number("waiting_sessions")? {
        locks = locks.waiting_sessions(usize::try_from(sessions).unwrap_or(usize::MAX));
    }
    if let Some(name) = own.get("token_sequence") {
        locks = locks.token_sequence(name)?;
    }
    if let Some(scoped) = own.get("transaction_scoped") {
        locks = locks.transaction_scoped(boolean("transaction_scoped", scoped)?);
    }
    // Before any I/O; what the server can do is only known afterwards.
    common.options.validate(&locks.capabilities())?;
    common.prefix.as_deref().map(check_prefix).transpose()?;
    let locks = locks.connect_to_any(common.options.ttl_or_default()).await.map_err(reached("postgres"))?;
    Ok(Box::new(common.build(locks)?))
}

#[cfg(feature = "sqlserver")]
async fn connect_sqlserver(rest: &str) -> Result<Box<dyn LockProvider>> {
    let ours = ["waiting_sessions", "token_table", "db_principal"];
    let known: Vec<_> = ours.into_iter().chain(sqlserver::parameters_of_url()).collect();
    let (rest, common, own) = Common::take(rest, &known)?;
    let drivers: Vec<_> =
        sqlserver::parameters_of_url().filter_map(|key| Some((key, own.get(key)?))).collect();
    let mut locks = sqlserver::locks_of_url(rest, &drivers)?;
    if let Some(sessions) = own.number("waiting_sessions")? {
        locks = locks.waiting_sessions(usize::try_from(sessions).unwrap_or(usize::MAX));
    }
    if let Some(name) = own.get("token_table") {
        locks = locks.token_table(name)?;
    }
    if let Some(principal) = own.get("db_principal") {
        locks = locks.db_principal(principal)?;
    }
    connect_to_sqlserver(Ok(locks), common).await
}

#[cfg(feature = "sqlserver")]
async fn connect_to_sqlserver(
    locks: Result<SqlServerLocks>,
    common: Common,
) -> Result<Box<dyn LockProvider>> {
    let ttl = common.options.ttl_or_default();
    let provider = common.build(locks?)?;
    Box::pin(provider.backend().connect_for(ttl)).await.map_err(reached("sqlserver"))?;
    Ok(Box::new(provider))
}

/// A connection string of ADO.NET, which has no scheme.
#[cfg(feature = "sqlserver")]
async fn connect_ado(string: &str) -> Result<Box<dyn LockProvider>> {
    connect_to_sqlserver(SqlServerLocks::from_ado_string(string), Common::default()).await
}

#[cfg(not(feature = "sqlserver"))]
#[expect(clippy::unused_async, reason = "as with the feature")]
async fn connect_ado(_: &str) -> Result<Box<dyn LockProvider>> {
    Err(Error::new(
        ErrorKind::Unsupported,
        "this is no URL; if it is a connection string of SQL Server, it needs the cargo feature `sqlserver`, which this build \
         hasn't got",
    ))
}

#[cfg(feature = "azure")]
async fn connect_azure(rest: &str) -> Result<Box<dyn LockProvider>> {
    let (rest, common, own) = Common::take(rest, &["account_key", "sas", "endpoint"])?;
    let said = Said { key: own.get("account_key"), sas: own.get("sas"), endpoint: own.get("endpoint") };
    let provider = common.build(AzureLocks::of_url(rest, &said)?)?;
    provider.backend().connect().await.map_err(reached("azblob"))?;
    Ok(Box::new(provider))
}

fn unknown(scheme: &str) -> Error {
    let known = FEATURES.iter().find(|(schemes, ..)| schemes.contains(&scheme));
    if let Some((_, feature, false)) = known {
        return Error::new(
            ErrorKind::Unsupported,
            format!("`{scheme}:` needs the cargo feature `{feature}`, which this build hasn't got"),
        );
    }
    // Not echoed: what stands before the first colon may be anything, if somebody forgot the scheme.
    let others = FEATURES.iter().filter(|(.., is_there)| *is_there).flat_map(|(schemes, ..)| *schemes);
    let known: Vec<_> =
        ["memory", "file"].iter().chain(others).map(|scheme| format!("`{scheme}:`")).collect();
    Error::new(ErrorKind::Config, format!("unknown scheme: this build knows {}", known.join(", ")))
}

/// The parameters that only one backend understands.
#[derive(Debug, Default)]
struct Own(Vec<(String, String)>);

#[cfg(any(feature = "azure", feature = "postgres", feature = "redis", feature = "sqlserver"))]
impl Own {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find_map(|(name, value)| (name == key).then_some(value.as_str()))
    }

    #[cfg(feature = "redis")]
    fn duration(&self, key: &'static str) -> Result<Option<Duration>> {
        self.get(key).map(|value| duration(key, value)).transpose()
    }

    #[cfg(any(feature = "postgres", feature = "redis", feature = "sqlserver"))]
    fn number(&self, key: &'static str) -> Result<Option<u32>> {
        let refused = |_| Error::new(ErrorKind::Config, format!("{key} in the URL must be a whole number"));
        self.get(key).map(|value| value.parse().map_err(refused)).transpose()
    }
}

/// The parameters that every backend understands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Common {
    options: LockOptions,
    prefix: Option<String>,
}

impl Common {
    /// Splits what follows the scheme into the backend's part, the parameters that every backend understands, and those
    /// that `known` names besides.
    fn take<'a>(rest: &'a str, known: &[&str]) -> Result<(&'a str, Self, Own)> {
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut common, mut own) = (Self::default(), Own::default());
        let mut seen = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let options = std::mem::take(&mut common.options);
            common.options = match &*key {
                "ttl" => options.ttl(duration("ttl", &value)?),
                "auto_renew" => options.auto_renew(boolean("auto_renew", &value)?),
                "max_hold" => options.max_hold(duration("max_hold", &value)?),
                "hold_at_least" => options.hold_at_least(duration("hold_at_least", &value)?),
                "retry_for" => options.retry_for(duration("retry_for", &value)?),
                "prefix" => {
                    common.prefix = Some(value.into_owned());
                    options
                }
                key if known.contains(&key) => {
                    own.0.push((key.to_owned(), value.into_owned()));
                    options
                }
                // Not echoed: a password may have come here through a stray `?`.
                _ => {
                    let own: String = known.iter().flat_map(|key| [", ", *key]).collect();
                    return Err(Error::new(
                        ErrorKind::Config,
                        format!(
                            "unknown parameter in the URL: this backend knows ttl, auto_renew, max_hold, hold_at_least, \
                             retry_for, prefix{own}"
                        ),
                    ));
                }
            };
            if seen.contains(&key) {
                return Err(Error::new(
                    ErrorKind::Config,
                    format!("the parameter {key} stands twice in the URL"),
                ));
            }
            seen.push(key);
        }
        Ok((rest, common, own))
    }

    /// Checks everything, and does no I/O.
    fn build<B: Backend>(self, backend: B) -> Result<Provider<B>> {
        let mut builder = Provider::builder(backend).options(self.options);
        if let Some(prefix) = self.prefix {
            builder = builder.prefix(prefix);
        }
        builder.build()
    }
}

fn duration(key: &'static str, value: &str) -> Result<Duration> {
    humantime::parse_duration(value).map_err(|_| {
        Error::new(
            ErrorKind::Config,
            format!("{key} in the URL must be a number with a unit, as in {key}=30s"),
        )
    })
}

fn boolean(key: &'static str, value: &str) -> Result<bool> {
    value
        .parse()
        .map_err(|_| Error::new(ErrorKind::Config, format!("{key} in the URL must be true or false")))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(url: &str) -> Error {
        match connect(url).await {
            Ok(provider) => panic!("{url} was accepted: {provider:?}"),
            Err(error) => error,
        }
    }

    #[tokio::test]
    async fn the_same_memory_url_is_the_same_locks() {
        let acquire = async |url| connect(url).await.unwrap().create_lock("x").try_acquire().await.unwrap();
        let held = acquire("memory:the-same").await.expect("free");
        assert!(acquire("memory:the-same?ttl=5s").await.is_none());
        assert!(acquire("MEMORY://the-same").await.is_none());
        assert!(acquire("memory:another").await.is_some());
        drop(held);
    }

    /// A job that connects anew for each run must not find a lock free that `hold_at_least` still holds.
    #[tokio::test(start_paused = true)]
    async fn a_memory_url_outlives_its_providers_while_a_lock_is_held() {
        let run = async || {
            let provider = connect("memory:outlives?hold_at_least=60s").await.unwrap();
            let guard = provider.create_lock("x").try_acquire().await.unwrap();
            let ran = guard.is_some();
            drop(guard);
            provider.close().await.unwrap();
            ran
        };
        assert!(run().await);
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert!(!run().await);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(run().await);
    }

    #[tokio::test]
    async fn bad_urls_say_what_to_do() {
        for (url, says) in [
            ("", "must begin with a scheme"),
            ("memory", "must begin with a scheme"),
            ("memory:\n", "white space"),
            ("mysql://localhost", "this build knows `memory:`"),
            ("file:", "needs a directory"),
            ("file://host/dir", "names no host"),
            ("memory:?ttl=30", "ttl=30s"),
            ("memory:?ttl=-1s", "ttl=30s"),
            ("memory:?ttl=0s", "below this backend's minimum"),
            ("memory:?auto_renew=maybe", "true or false"),
            ("memory:?ttl=5s&ttl=6s", "twice"),
            ("memory:?colour=red", "unknown parameter"),
            ("memory:?prefix=", "a prefix consists of"),
            ("memory:?prefix=a%3Ab", "a prefix consists of"),
        ] {
            let error = refused(url).await;
            assert_eq!(error.kind(), ErrorKind::Config, "{url}");
            assert!(error.to_string().contains(says), "{url}: {error}");
        }
    }

    #[tokio::test]
    async fn a_backend_that_is_not_built_names_its_feature() {
        for (schemes, feature, is_there) in FEATURES {
            for scheme in schemes.iter().filter(|_| !is_there) {
                let error = refused(&format!("{scheme}://user:secret@host/0")).await;
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(error.to_string().contains(&format!("feature `{feature}`")), "{error}");
                assert!(!format!("{error:?} {error}").contains("secret"));
            }
        }
    }

    #[test]
    fn parameters_are_taken_out() {
        let (rest, common, _) =
            Common::take("some/dir?ttl=1m%2030s&auto_renew=false&prefix=app", &[]).unwrap();
        assert_eq!(rest, "some/dir");
        let options = LockOptions::new().ttl(Duration::from_secs(90)).auto_renew(false);
        assert_eq!(common, Common { options, prefix: Some("app".to_owned()) });
    }
}
