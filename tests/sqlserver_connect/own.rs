//! Configurations that the application has made, and what else it can say.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use fencelock::sqlserver::driver::{AuthMethod, Config};
use fencelock::sqlserver::{AppLock, SqlServerLocks, lock_resource};
use fencelock::{ErrorKind, Fairness, LockProvider};

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::sqlserver::{DATABASE, PASSWORD as SECRET, SqlServer, USER};
use super::servers::sqlserver_locks::{Place, config};
use super::{
    assert_no_secret, built, closed, everything, excludes, fails, granted, is_free, released,
    shows_what_it_can, take, waits, within,
};

fn locks(server: &SqlServer) -> SqlServerLocks {
    SqlServerLocks::new(config(&server.url()))
}

/// A configuration of the driver's is all that is needed, and is never shown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_of_the_drivers() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().login("alice", "never shown").start();
    let mut alice = config(&server.url());
    alice.authentication(AuthMethod::sql_server("alice", "never shown"));
    let (one, other) = (built(SqlServerLocks::new(alice), secs(10)), built(locks(&server), secs(10)));
    assert_eq!(server.connections(), 0, "making them is no I/O");
    within("connect", Box::pin(one.backend().connect())).await.expect("it is there");
    assert_eq!(server.sessions()[0].login, "alice");
    excludes(&one, &other, &server, "x").await;
    let guard = take(&one, "x").await;
    assert_no_secret(&format!("{one:?} {:?} {guard:?} {:?}", one.create_lock("x"), one.backend()));
    released(guard).await;
    closed(&one).await;
    closed(&other).await;
    server.until("all are closed", || server.open_connections() == 0).await;
}

/// It is made anew for each connection, and what goes wrong with it is the source of the error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_for_each_connection() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let (made, away) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let locks_of_it = SqlServerLocks::with_configs({
        let (made, away, url) = (made.clone(), away.clone(), server.url());
        move || {
            made.fetch_add(1, Ordering::SeqCst);
            let (away, url) = (away.load(Ordering::SeqCst), url.clone());
            async move { if away { Err("the token service is away".into()) } else { Ok(config(&url)) } }
        }
    });
    let (one, other) = (built(locks_of_it, secs(10)), built(locks(&server), secs(10)));
    assert_eq!(made.load(Ordering::SeqCst), 0);
    excludes(&other, &one, &server, "x").await;
    assert_eq!(made.load(Ordering::SeqCst), 2, "one to try on, and one to wait on");
    // A new connection is needed.
    let guard = take(&one, "x").await;
    away.store(true, Ordering::SeqCst);
    server.kill(server.holder_of("x"));
    within("it is lost", guard.lost()).await;
    let error = fails(&one, "y").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    assert_eq!(error.source().expect("a source").to_string(), "the token service is away");
    let before = made.load(Ordering::SeqCst);
    assert!(before >= 3, "{before}");
    away.store(false, Ordering::SeqCst);
    drop(guard);
    // What has failed isn't tried again at once.
    let lock = one.create_lock("y");
    let again = async {
        loop {
            match lock.try_acquire().await {
                Ok(guard) => return guard.expect("it is free"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error)),
            }
        }
    };
    released(within("there is a configuration", again).await).await;
    assert!(made.load(Ordering::SeqCst) > before);
}

/// A token of Microsoft Entra instead of a password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_entra() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().token("a-fresh-token", USER).start();
    let with_token = |token: &'static str| {
        let url = server.url();
        let locks = SqlServerLocks::with_configs(move || {
            let mut config: Config = config(&url);
            config.authentication(AuthMethod::aad_token(token));
            std::future::ready(Ok(config))
        });
        built(locks, secs(10))
    };
    excludes(&with_token("a-fresh-token"), &built(locks(&server), secs(10)), &server, "x").await;
    let error = fails(&with_token("never: one that has expired"), "x").await;
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", everything(&error));
}

/// A table is made where it is named, quoted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_can_be_called_anything() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let place = Place::of(&server);
    for (name, sql) in [
        ("dbo.drawn_tokens", "[dbo].[drawn_tokens]"),
        ("plain", "[plain]"),
        ("it]s [odd]", "[it]]s [odd]]]"),
        ("select", "[select]"),
        ("Straße 1;--", "[Straße 1;--]"),
    ] {
        let made = || built(locks(&server).token_table(name).expect("a name"), secs(10));
        let (one, other) = (made(), made());
        excludes(&one, &other, &server, "x").await;
        let rows = place.sql(DATABASE, &format!("SELECT bucket FROM {sql}")).await.expect("it is there");
        assert!(!rows.is_empty() && rows.len() <= 16, "{name}: {rows:?}");
    }
    for wrong in ["", ".", "a.", ".a", "a.b.c", "a\0"] {
        let error = locks(&server).token_table(wrong).map(drop).expect_err("no name");
        assert_eq!(error.kind(), ErrorKind::Config, "{wrong}");
    }
}

/// There are sixteen rows at most, however many names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_stays_small() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let provider = built(locks(&server), secs(10));
    for number in 0..200 {
        released(take(&provider, &format!("lock {number}")).await).await;
    }
    let rows =
        Place::of(&server).sql(DATABASE, "SELECT bucket FROM dbo.fencelock_token").await.expect("rows");
    assert_eq!(rows.len(), 16, "{rows:?}");
    assert!(rows.iter().all(|bucket| (0..16).contains(bucket)), "{rows:?}");
}

/// Locks of two principals are two locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_principal_has_locks_of_its_own() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().login("reports", SECRET).start();
    let of_reports = || locks(&server).db_principal("reports").expect("a name");
    let (one, other) = (built(of_reports(), secs(10)), built(of_reports(), secs(10)));
    let public = built(locks(&server), secs(10));
    excludes(&one, &other, &server, "x").await;
    let (theirs, ours) = (take(&one, "x").await, take(&public, "x").await);
    assert!(!is_free(&other, "x").await);
    released(theirs).await;
    released(ours).await;

    // A lock may have another than its provider.
    let lock = AppLock::of_resource("x").and_then(|lock| lock.db_principal("public")).expect("a lock");
    let mixed = built(of_reports().lock("theirs", lock), secs(10));
    let guard = take(&public, "x").await;
    assert!(!is_free(&mixed, "theirs").await);
    assert!(is_free(&mixed, "x").await);
    released(guard).await;

    // One that isn't there.
    let nobody = built(locks(&server).db_principal("nobody").expect("a name"), secs(10));
    let error = fails(&nobody, "x").await;
    assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
    for wrong in ["", "a\0", &"x".repeat(129)] {
        assert_eq!(
            locks(&server).db_principal(wrong).map(drop).expect_err("no name").kind(),
            ErrorKind::Config
        );
    }
}

/// Names that have been given the resource of another program.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resources_of_other_programs() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let import = || AppLock::of_resource("Import of Orders").expect("a resource");
    let made = |name: &str| built(locks(&server).lock(name, import()), secs(10));
    let (one, other) = (made("import"), made("orders"));
    shows_what_it_can(&one, &made("import"), &server, DATABASE, "Import of Orders", "import").await;
    // Two names for the same lock, of two providers, and of one.
    let guard = take(&one, "import").await;
    assert!(!is_free(&other, "orders").await);
    assert!(is_free(&other, "import").await, "that is only a name there");
    released(guard).await;
    let both = built(locks(&server).lock("import", import()).lock("orders", import()), secs(10));
    let guard = take(&both, "import").await;
    assert!(!is_free(&both, "orders").await);
    let waiter = waits(&both, "orders");
    released(guard).await;
    released(granted(waiter).await).await;
    // The resource of a name is that name's lock.
    let alias = AppLock::of_resource(&lock_resource("app:x")).expect("a resource");
    let aliased = built(locks(&server).lock("alias", alias), secs(10));
    let guard = take(&aliased, "alias").await;
    assert!(!is_free(&one, "app:x").await);
    released(guard).await;
}

/// With none they look twice a second, and need one connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_waiting_sessions_they_look() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let provider = built(locks(&server).waiting_sessions(0), secs(10));
    assert!(!provider.capabilities().wakes_waiters);
    assert_eq!(provider.capabilities().fairness, Fairness::None);
    let direct = built(locks(&server), secs(10));
    assert_eq!((direct.capabilities().fairness, direct.capabilities().wakes_waiters), (Fairness::Fifo, true));
    let guard = take(&direct, "x").await;
    let mut waiter = waits(&provider, "x");
    assert!(tokio::time::timeout(ms(700), &mut waiter).await.is_err());
    assert_eq!((server.waiters(DATABASE, "x"), server.open_connections()), (0, 2));
    released(guard).await;
    released(granted(waiter).await).await;
}
