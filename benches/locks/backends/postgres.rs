//! One PostgreSQL server (`fsync` off), and what can be done by hand with its driver: prepared statements, no token, no
//! heartbeat.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::time::Duration;

use fencelock::postgres::driver::{Client, Config, NoTls, Statement};

use crate::backends::{Limit, Site};
use crate::child::play;
use crate::locker::{Locker, Result};
use crate::pool::Pool;
use crate::servers::postgres::{PostgresServer, USER};
use crate::transfer::{Passing, Transfer};
use crate::workload::{Targets, Workload};

pub(crate) struct Postgres {
    server: PostgresServer,
    counts: bool,
}

impl Postgres {
    /// `locks`: its `max_locks_per_transaction`, of which there are a hundred. What counts costs a statement some time:
    /// it is on where times are in relation to each other only.
    pub(crate) fn start(locks: u32, counts: bool) -> Self {
        let mut options = PostgresServer::options().config("max_locks_per_transaction", &locks.to_string());
        if counts {
            options = options.config("shared_preload_libraries", "pg_stat_statements");
        }
        let server = options.start();
        if counts {
            server.sql("CREATE EXTENSION pg_stat_statements");
        }
        Self { server, counts }
    }

    fn count(&self, sql: &str) -> Option<u64> {
        self.server.sql(sql).trim().parse().ok()
    }
}

impl Site for Postgres {
    fn url(&self) -> String {
        self.server.url()
    }

    fn commands(&self, _: &str) -> Option<u64> {
        let sql = format!(
            "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements WHERE userid = '{USER}'::regrole"
        );
        self.counts.then(|| self.count(&sql)).flatten()
    }

    fn connections(&self) -> Option<u64> {
        self.count(&format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{USER}'"))
    }

    fn memory(&self) -> Option<u64> {
        Some(self.server.child().memory())
    }
}

pub(crate) fn limits(workload: Workload) -> Vec<Limit> {
    let limit = |way, says, targets| vec![Limit { way, says, targets }];
    let none = Targets::NONE;
    let blocked = "blocked in `pg_advisory_lock`";
    match workload {
        Workload::W1 => {
            limit("raw", "`pg_try_advisory_lock` + unlock", Targets { ratio: Some(1.15), ..none })
        }
        Workload::W2(_) => limit("raw", "the same, on one connection", Targets { ratio: Some(0.85), ..none }),
        Workload::W3 => limit("blocked", blocked, Targets { ratio: Some(1.1), ..none }),
        Workload::W4a => {
            let mut limits = limit("transfer", "in-process transfer, a `SELECT` each", Targets::W4A);
            limits.extend(limit("blocked", blocked, none));
            limits
        }
        Workload::W4b => limit("blocked", blocked, Targets::W4B),
        Workload::W4c => limit("blocked", blocked, Targets::W4C),
        Workload::W5 => limit("raw", "one connection, nothing renewed", Targets::W5),
        Workload::W6(_) => limit("raw", "one connection", Targets::W6),
    }
}

pub(crate) async fn play_by_hand(way: &str, url: &str) -> Result<()> {
    let url = Arc::from(url);
    match way {
        "raw" => play(Raw(Session::connect(&url).await?)).await,
        "transfer" => play(Transfer::new(Raw(Session::connect(&url).await?))).await,
        "blocked" => play(Blocked { url, idle: Pool::default() }).await,
        other => Err(format!("postgres has no way {other}").into()),
    }
}

struct Session {
    client: Client,
    try_lock: Statement,
    lock: Statement,
    unlock: Statement,
    pass: Statement,
}

impl Session {
    async fn connect(url: &str) -> Result<Arc<Self>> {
        let (client, connection) = url.parse::<Config>()?.connect(NoTls).await?;
        tokio::spawn(connection);
        let try_lock = client.prepare("SELECT pg_try_advisory_lock($1)").await?;
        let lock = client.prepare("SELECT pg_advisory_lock($1)").await?;
        let unlock = client.prepare("SELECT pg_advisory_unlock($1)").await?;
        let pass = client.prepare("SELECT $1::bigint > 0").await?;
        Ok(Arc::new(Self { client, try_lock, lock, unlock, pass }))
    }

    async fn is_true(&self, statement: &Statement, key: i64) -> Result<bool> {
        Ok(self.client.query_one(statement, &[&key]).await?.try_get(0)?)
    }

    async fn try_lock(&self, key: i64) -> Result<bool> {
        self.is_true(&self.try_lock, key).await
    }

    async fn unlock(&self, key: i64) -> Result<()> {
        if self.is_true(&self.unlock, key).await? { Ok(()) } else { Err("it wasn't held".into()) }
    }
}

fn key(name: &str) -> i64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(name).cast_signed()
}

#[derive(Clone)]
struct Raw(Arc<Session>);

impl Locker for Raw {
    type Guard = i64;

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<i64> {
        let key = key(name);
        if self.0.try_lock(key).await? { Ok(key) } else { Err("busy".into()) }
    }

    async fn lock(&self, name: &str) -> Result<i64> {
        self.try_lock(name, None).await
    }

    async fn unlock(&self, key: i64) -> Result<()> {
        self.0.unlock(key).await
    }
}

impl Passing for Raw {
    async fn take(&self, name: &str, _: u64) -> Result<bool> {
        self.0.try_lock(key(name)).await
    }

    /// The session has it all along. Whether the session is there, and what its number is, takes a command.
    async fn pass(&self, _: &str, _: u64, to: u64) -> Result<()> {
        self.0.is_true(&self.0.pass, i64::try_from(to)?).await?;
        Ok(())
    }

    async fn give_back(&self, name: &str, _: u64) -> Result<()> {
        self.0.unlock(key(name)).await
    }
}

#[derive(Clone)]
struct Blocked {
    url: Arc<str>,
    idle: Pool<Arc<Session>>,
}

impl Locker for Blocked {
    type Guard = (i64, Arc<Session>);

    async fn try_lock(&self, name: &str, _: Option<Duration>) -> Result<Self::Guard> {
        self.lock(name).await
    }

    async fn lock(&self, name: &str) -> Result<Self::Guard> {
        let key = key(name);
        let session = self.idle.get(async || Session::connect(&self.url).await).await?;
        session.client.query_one(&session.lock, &[&key]).await?;
        Ok((key, session))
    }

    async fn unlock(&self, (key, session): Self::Guard) -> Result<()> {
        session.unlock(key).await?;
        self.idle.put(session);
        Ok(())
    }
}
