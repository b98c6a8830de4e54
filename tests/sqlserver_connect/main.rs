//! How one comes to a SQL Server: URLs, connection strings, logins and their rights, configurations of one's own; and others
//! at the same locks.

#[path = "../common/mod.rs"]
mod common;
#[path = "../servers/mod.rs"]
mod servers;

mod daily_email;
mod errors;
mod own;
mod real;
#[cfg(feature = "rustls")]
mod tls;
mod transaction;
mod urls;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fencelock::sqlserver::lock_resource;
use fencelock::{LockProvider, Provider, sqlserver::SqlServerLocks};
use servers::connecting::{
    PASSWORD, assert_no_secret, built, closed, connected, encoded, everything, fails, granted, is_free,
    refused, released, take, waits,
};
use servers::locks::within;
use servers::sqlserver::{DATABASE, SqlServer};
use servers::sqlserver_locks::{Driver, Place, config};
use tokio::runtime::Handle;
use tokio::task::block_in_place;
use tokio::time::sleep;

use common::ms;

/// A database of a server: of a stand-in, or of the server that the environment names.
struct Site {
    /// `None`: the one that the environment names.
    own: Option<SqlServer>,
    place: Place,
    database: String,
}

impl Site {
    async fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let Some(place) = Place::of_environment() else {
            let own = SqlServer::start();
            let place = Place::of(&own);
            return Self { own: Some(own), place, database: DATABASE.to_owned() };
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let database = format!("fencelock_connect_{}_{number}", std::process::id());
        place.sql("master", &format!("CREATE DATABASE {database}")).await.expect("it is made");
        Self { own: None, place, database }
    }

    fn url(&self) -> String {
        self.place.url(&self.database)
    }

    /// Locks there, without `connect`.
    fn locks(&self, ttl: Duration) -> Provider<SqlServerLocks> {
        built(SqlServerLocks::new(config(&self.url())), ttl)
    }

    async fn client(&self) -> Driver {
        servers::sqlserver_locks::connect(&self.url()).await.expect("it is there")
    }

    /// Waits until so many wait for the lock of this name on the server.
    async fn until_blocked(&self, name: &str, count: usize) {
        self.until_waiting(&lock_resource(name), count).await;
    }

    /// The same of a resource.
    async fn until_waiting(&self, resource: &str, count: usize) {
        if let Some(own) = &self.own {
            return own.until_waiting(DATABASE, resource, count).await;
        }
        let shown: String = resource.chars().take(32).collect();
        let sql = format!(
            "SELECT CAST(COUNT(*) AS int) FROM sys.dm_tran_locks WHERE resource_type = 'APPLICATION' \
             AND request_status = 'WAIT' AND resource_database_id = DB_ID() \
             AND resource_description LIKE '%[[]{shown}]%'"
        );
        let reached = async {
            while self.place.sql(&self.database, &sql).await.expect("the views can be read")
                != [count_of(count)]
            {
                sleep(ms(5)).await;
            }
        };
        within(&format!("{count} wait for {resource}"), reached).await;
    }
}

fn count_of(count: usize) -> i32 {
    i32::try_from(count).expect("it is small")
}

impl Drop for Site {
    /// The databases of a stand-in go with it.
    fn drop(&mut self) {
        if self.own.is_some() {
            return;
        }
        let database = &self.database;
        let drop = format!(
            "ALTER DATABASE {database} SET SINGLE_USER WITH ROLLBACK IMMEDIATE; DROP DATABASE {database}"
        );
        let dropped = block_in_place(|| Handle::current().block_on(self.place.sql("master", &drop)));
        if let Err(error) = dropped {
            eprintln!("the database {database} stays: {error}");
        }
    }
}

/// What a provider is for: one takes the lock, another is refused, waits and is woken, and both release.
async fn shows_what_it_can(
    one: &dyn LockProvider,
    other: &dyn LockProvider,
    server: &SqlServer,
    database: &str,
    resource: &str,
    name: &str,
) {
    let guard = take(one, name).await;
    let first = guard.fencing_token();
    assert_ne!(server.holder(database, resource), None, "{name} isn't {resource}");
    assert!(!is_free(other, name).await);
    let waiter = waits(other, name);
    server.until_waiting(database, resource, 1).await;
    released(guard).await;
    let began = Instant::now();
    let guard = granted(waiter).await;
    // By the server; the next look would be half a second later.
    assert!(began.elapsed() < ms(450), "it wasn't woken: {:?}", began.elapsed());
    assert!(guard.fencing_token() > first);
    assert!(!is_free(one, name).await);
    released(guard).await;
    assert!(is_free(one, name).await);
}

/// The same in the database of the stand-in, with a name that is its resource.
async fn excludes(one: &dyn LockProvider, other: &dyn LockProvider, server: &SqlServer, name: &str) {
    shows_what_it_can(one, other, server, DATABASE, &lock_resource(name), name).await;
}

/// A URL of this login.
fn url_of(server: &SqlServer, login: &str, password: &str) -> String {
    format!("sqlserver://{}:{}@{}/{DATABASE}?encrypt=off", encoded(login), encoded(password), server.addr())
}
