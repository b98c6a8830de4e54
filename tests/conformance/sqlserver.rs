//! A SQL Server, with a database for each trial: our stand-in, or the one that `FENCELOCK_SQLSERVER_URL` names.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use fencelock::sqlserver::{SqlServerLocks, lock_resource};
use fencelock::testing::{Harness, Target};
use fencelock::{Capabilities, Expiry, Fairness, LockOptions, LockProvider, Loss};
use tokio::runtime::Handle;
use tokio::task::block_in_place;

use super::provider;
use super::servers::sqlserver::SqlServer;
use super::servers::sqlserver_locks::{Place, locks};

pub(super) fn targets() -> Vec<Arc<dyn Target>> {
    let mut targets: Vec<Arc<dyn Target>> = vec![
        Arc::new(SqlServerTarget { name: "sqlserver", way: Way::Waiting }),
        Arc::new(SqlServerTarget { name: "sqlserver-looking", way: Way::Looking }),
    ];
    if Place::of_environment().is_none() {
        targets.push(Arc::new(SqlServerTarget { name: "sqlserver-careless", way: Way::Careless }));
    }
    targets
}

#[derive(Clone, Copy, Debug)]
struct SqlServerTarget {
    name: &'static str,
    way: Way,
}

/// How providers wait, and what the server is like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// On the server.
    Waiting,
    /// By looking twice a second.
    Looking,
    /// On a server that doesn't see while it waits for a lock that the client has gone, and says -999 of a lock that is busy.
    Careless,
}

/// One server of each kind for all trials of a process: each has a database, and application locks are a database's.
static SERVERS: Mutex<[Option<Arc<Server>>; 2]> = Mutex::new([None, None]);

#[derive(Debug)]
struct Server {
    /// `None`: the one that the environment names.
    own: Option<SqlServer>,
    place: Place,
}

fn server(way: Way) -> Arc<Server> {
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    let start = || {
        if let Some(place) = Place::of_environment() {
            return Arc::new(Server { own: None, place });
        }
        let options = SqlServer::options();
        let own = match way {
            Way::Waiting | Way::Looking => options.start(),
            Way::Careless => options.notices_closed_sockets(false).busy_is_999().start(),
        };
        let place = Place::of(&own);
        Arc::new(Server { own: Some(own), place })
    };
    servers[usize::from(way == Way::Careless)].get_or_insert_with(start).clone()
}

/// What is static isn't dropped by itself.
pub(super) fn stop_servers() {
    *SERVERS.lock().unwrap_or_else(PoisonError::into_inner) = [None, None];
}

impl Way {
    fn locks(self, url: &str) -> SqlServerLocks {
        let locks = locks(url);
        if self == Self::Looking { locks.waiting_sessions(0) } else { locks }
    }
}

#[async_trait]
impl Target for SqlServerTarget {
    fn name(&self) -> &str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        let (min, max) = (Duration::from_millis(200), Duration::from_secs(24 * 86_400));
        let blocks = self.way != Way::Looking;
        let fairness = if blocks { Fairness::Fifo } else { Fairness::None };
        Capabilities::new(min, max, Expiry::Session).wakes_waiters(blocks).fairness(fairness)
    }

    fn crosses_processes(&self) -> bool {
        true
    }

    fn takes_away(&self) -> bool {
        true
    }

    async fn start(&self) -> Box<dyn Harness> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let server = server(self.way);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let database = format!("fencelock_trial_{}_{number}", std::process::id());
        server.place.sql("master", &format!("CREATE DATABASE {database}")).await.expect("it is made");
        Box::new(Trial { way: self.way, server, database })
    }

    async fn attach(&self, address: &str) -> Box<dyn LockProvider> {
        provider(self.way.locks(address), LockOptions::new())
    }
}

#[derive(Debug)]
struct Trial {
    way: Way,
    server: Arc<Server>,
    database: String,
}

impl Drop for Trial {
    /// The databases of our own server go with it.
    fn drop(&mut self) {
        if self.server.own.is_some() {
            return;
        }
        let database = &self.database;
        let drop = format!(
            "ALTER DATABASE {database} SET SINGLE_USER WITH ROLLBACK IMMEDIATE; DROP DATABASE {database}"
        );
        let dropped = block_in_place(|| Handle::current().block_on(self.server.place.sql("master", &drop)));
        if let Err(error) = dropped {
            eprintln!("the database {database} stays: {error}");
        }
    }
}

#[async_trait]
impl Harness for Trial {
    async fn provider(&self, options: LockOptions) -> Box<dyn LockProvider> {
        let locks = self.way.locks(&self.address());
        locks.connect().await.expect("the server is there"); // as a URL does
        provider(locks, options)
    }

    fn address(&self) -> String {
        self.server.place.url(&self.database)
    }

    async fn lose(&self, name: &str) -> Loss {
        let Server { own, place } = &*self.server;
        if let Some(own) = own {
            let holder = own.holder(&self.database, &lock_resource(name)).expect("somebody holds it");
            assert!(own.kill(holder), "its session is there");
        } else {
            let holder = place.holder(&self.database, name).await.expect("somebody holds it");
            place.sql("master", &format!("KILL {holder}")).await.expect("it is killed");
        }
        Loss::SessionEnded
    }

    fn secrets(&self) -> Vec<String> {
        vec![self.server.place.password()]
    }
}
