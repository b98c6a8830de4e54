//! A PostgreSQL server, with a database for each trial, and PgBouncer before it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use fencelock::postgres::driver::{Config, NoTls};
use fencelock::postgres::{PostgresLocks, lock_key};
use fencelock::testing::{Harness, Target};
use fencelock::{Capabilities, Expiry, Fairness, LockOptions, LockProvider, Loss};

use super::provider;
use super::servers::pgbouncer::PgBouncer;
use super::servers::postgres::{PASSWORD, PostgresServer, USER};

pub(super) fn targets() -> Vec<Arc<dyn Target>> {
    vec![
        Arc::new(Postgres { name: "postgres", way: Way::Direct }),
        Arc::new(Postgres { name: "postgres-announced", way: Way::Announced }),
        Arc::new(Postgres { name: "postgres-connections", way: Way::Connections }),
        Arc::new(Postgres { name: "postgres-pgbouncer", way: Way::PgBouncer }),
        Arc::new(Postgres { name: "postgres-without-expiry", way: Way::WithoutExpiry }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Postgres {
    name: &'static str,
    way: Way,
}

/// How providers come to the server, and wait there.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Direct,
    /// Without sessions that block.
    Announced,
    /// Over connections of the application's own.
    Connections,
    /// In transactions, through a pooler that swaps sessions.
    PgBouncer,
    WithoutExpiry,
}

impl Way {
    fn locks(self, url: &str) -> PostgresLocks {
        let config: Config = url.parse().expect("a URL of ours");
        match self {
            Self::Direct => PostgresLocks::new(config),
            Self::Announced => PostgresLocks::new(config).waiting_sessions(0),
            Self::PgBouncer => PostgresLocks::new(config).transaction_scoped(true),
            Self::WithoutExpiry => PostgresLocks::new(config).without_server_expiry(),
            Self::Connections => PostgresLocks::with_connections(move || {
                let config = config.clone();
                async move {
                    let (client, connection) = config.connect(NoTls).await?;
                    tokio::spawn(connection);
                    Ok(Box::new(client))
                }
            }),
        }
    }
}

#[derive(Debug)]
struct Servers {
    postgres: PostgresServer,
    pgbouncer: PgBouncer,
}

/// One server for all trials of a process: each has a database, and advisory locks are a database's.
static SERVERS: Mutex<Option<Arc<Servers>>> = Mutex::new(None);

fn servers() -> Arc<Servers> {
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    servers.get_or_insert_with(|| Arc::new(start_servers())).clone()
}

/// What is static isn't dropped by itself, and would leave its data behind.
pub(super) fn stop_servers() {
    SERVERS.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn start_servers() -> Servers {
    let postgres = PostgresServer::options().config("max_connections", "1000").start();
    let pgbouncer = PgBouncer::options(postgres.addr())
        .pool_mode("transaction")
        .pool_size(200)
        .config("max_client_conn", "2000")
        .start();
    Servers { postgres, pgbouncer }
}

#[async_trait]
impl Target for Postgres {
    fn name(&self) -> &str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        let (min, max) = (std::time::Duration::from_millis(200), std::time::Duration::from_secs(24 * 86_400));
        let expiry = if self.way == Way::WithoutExpiry { Expiry::Session } else { Expiry::SessionOrTtl };
        let blocks = self.way != Way::Announced;
        let fairness = if blocks { Fairness::Fifo } else { Fairness::None };
        Capabilities::new(min, max, expiry).wakes_waiters(true).fairness(fairness)
    }

    fn crosses_processes(&self) -> bool {
        true
    }

    fn takes_away(&self) -> bool {
        true
    }

    async fn start(&self) -> Box<dyn Harness> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let way = self.way;
        let made = move || {
            let database = format!("trial{}", NUMBER.fetch_add(1, Ordering::Relaxed));
            let servers = servers();
            let Servers { postgres, pgbouncer } = &*servers;
            postgres.sql(&format!("CREATE DATABASE {database} OWNER {USER}"));
            let port = if way == Way::PgBouncer { pgbouncer.port() } else { postgres.port() };
            let url = format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{port}/{database}");
            Trial { way, servers, database, url }
        };
        Box::new(tokio::task::spawn_blocking(made).await.expect("the database is made"))
    }

    async fn attach(&self, address: &str) -> Box<dyn LockProvider> {
        provider(self.way.locks(address), LockOptions::new())
    }
}

#[derive(Debug)]
struct Trial {
    way: Way,
    servers: Arc<Servers>,
    database: String,
    url: String,
}

impl Drop for Trial {
    fn drop(&mut self) {
        let database = &self.database;
        let dropped = self.servers.postgres.try_sql(&format!("DROP DATABASE {database} WITH (FORCE)"));
        if let Err(error) = dropped {
            eprintln!("the database {database} stays until the server ends: {error}");
        }
    }
}

#[async_trait]
impl Harness for Trial {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        let locks = self.way.locks(&self.url);
        locks.connect().await.expect("the server is there"); // as a URL does; logging in takes a while
        provider(locks, options)
    }

    fn address(&self) -> String {
        self.url.clone()
    }

    async fn lose(&self, name: &str) -> Loss {
        let (key, database) = (lock_key(name), self.database.clone());
        let terminated = self.servers.postgres.sql(&format!(
            "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database ON pg_database.oid = database \
             WHERE locktype = 'advisory' AND datname = '{database}' AND granted AND objsubid = 1 \
             AND (classid::bigint << 32) | objid::bigint = {key}"
        ));
        assert_eq!(terminated, "t", "somebody holds it");
        Loss::SessionEnded
    }

    fn secrets(&self) -> Vec<String> {
        vec![PASSWORD.to_owned()]
    }
}
