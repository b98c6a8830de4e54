//! Who isn't let in, what isn't there, and what a login may not do.

use std::time::{Duration, Instant};

use fencelock::sqlserver::SqlServerLocks;
use fencelock::{Error, ErrorKind, LockProvider};

use tokio::time::sleep;

use super::common::secs;
use super::servers::sqlserver::{DATABASE, PASSWORD as SECRET, SqlServer, USER};
use super::servers::sqlserver_locks::{Place, config};
use super::servers::{free_port, left_out};
use super::{
    PASSWORD, built, connected, encoded, everything, excludes, fails, granted, is_free, refused, released,
    take, url_of, waits, within,
};

/// What the documentation of the module says about the table.
const DOCS: &str = include_str!("../../src/sqlserver/mod.rs");

fn assert_kind(error: &Error, kind: ErrorKind, says: &str) {
    assert_eq!(error.kind(), kind, "{}", everything(error));
    assert!(error.to_string().contains(says), "{says}: {}", everything(error));
    assert_eq!(error.backend(), Some("sqlserver"));
}

/// A wrong login or password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_let_in_is_told_so_at_once() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().login("alice", PASSWORD).start();
    for (login, password) in
        [("app", "never-this"), ("bob", "never-this"), ("bob", PASSWORD), ("alice", SECRET), ("alice", "")]
    {
        let began = Instant::now();
        let error = refused(&url_of(&server, login, password)).await;
        assert_kind(&error, ErrorKind::Denied, "password");
        assert!(!error.is_retryable());
        assert!(began.elapsed() < secs(3), "{login}: {:?}", began.elapsed());
    }
    excludes(
        &*connected(&url_of(&server, "alice", PASSWORD)).await,
        &*connected(&server.url()).await,
        &server,
        "x",
    )
    .await;
}

/// A database that doesn't exist is a mistake in the URL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_not_there() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let error = refused(&format!("sqlserver://{USER}:{SECRET}@{}/missing?encrypt=off", server.addr())).await;
    assert_kind(&error, ErrorKind::Config, "database doesn't exist");
}

/// The table has to be made by somebody else; what the documentation says does it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_that_may_create_no_table_is_told_what_to_do() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().without_create_table(USER).start();
    let provider = built(SqlServerLocks::new(config(&server.url())), secs(10));
    for error in [refused(&server.url()).await, fails(&provider, "x").await] {
        assert_kind(&error, ErrorKind::Denied, "`fencelock::sqlserver`");
        assert!(!error.is_retryable());
    }
    let statements: Vec<_> = DOCS
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.starts_with("CREATE TABLE") || line.starts_with("GRANT "))
        .collect();
    assert_eq!(statements.len(), 2, "{statements:?}");
    Place::of(&server).sql(DATABASE, statements[0]).await.expect("the administrator may");
    excludes(&*connected(&server.url()).await, &*connected(&server.url()).await, &server, "x").await;
    // Who has asked before, too.
    let lock = provider.create_lock("y");
    let again = async {
        while lock.try_acquire().await.is_err() {
            sleep(Duration::from_millis(5)).await; // what has failed isn't tried again at once
        }
    };
    within("it may now", again).await;
}

/// Rights on the table that are missing are known when one connects.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_without_rights_on_the_table_is_told_so_when_it_connects() {
    if left_out("sqlserver") {
        return;
    }
    for (options, says) in [
        (SqlServer::options().login("alice", PASSWORD).without_update("alice"), "rights"),
        (SqlServer::options().login("alice", PASSWORD).without_insert("alice"), "rights"),
    ] {
        let server = options.start();
        // Made by somebody who may, but without the rows that others draw from.
        let table =
            "CREATE TABLE dbo.fencelock_token (bucket int NOT NULL PRIMARY KEY, token bigint NOT NULL)";
        Place::of(&server).sql(DATABASE, table).await.expect("the administrator may");
        let error = refused(&url_of(&server, "alice", PASSWORD)).await;
        assert_kind(&error, ErrorKind::Denied, says);
        excludes(&*connected(&server.url()).await, &*connected(&server.url()).await, &server, "x").await;
    }
}

/// A table of that name which isn't ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_another_is_refused() {
    if left_out("sqlserver") {
        return;
    }
    for columns in ["id int NOT NULL PRIMARY KEY, amount bigint NOT NULL", "bucket int NOT NULL PRIMARY KEY"]
    {
        let server = SqlServer::start();
        let table = format!("CREATE TABLE dbo.fencelock_token ({columns})");
        Place::of(&server).sql(DATABASE, &table).await.expect("the administrator may");
        let error = refused(&server.url()).await;
        assert_kind(&error, ErrorKind::Config, "table of fencing tokens");
        assert!(everything(&error).contains("Invalid column name"), "{}", everything(&error));
        let name = format!("{}&token_table=dbo.another", server.url());
        released(take(&*connected(&name).await, "x").await).await;
    }
}

/// As many connections as there may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_full() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().max_connections(1).start();
    let one = connected(&server.url()).await;
    assert_kind(&refused(&server.url()).await, ErrorKind::Exhausted, "no more sessions");
    // Room for one who tries, and none for one who waits.
    let guard = take(&*one, "x").await;
    assert!(!is_free(&*one, "x").await);
    released(guard).await;
    super::closed(&*one).await;
    server.until("there is room", || server.open_connections() == 0).await;
    released(take(&*connected(&server.url()).await, "x").await).await;
}

/// No token can be drawn from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_read_only() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().read_only_database().start();
    let error = refused(&server.url()).await;
    assert_kind(&error, ErrorKind::Unavailable, "read-only");
    assert!(error.is_retryable());
}

/// Nobody listens there.
#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable_at_once() {
    for host in [format!("127.0.0.1:{}", free_port()), "no-such-host.invalid".into()] {
        let began = Instant::now();
        let error = refused(&format!("sqlserver://app:never@{host}/locks?encrypt=off")).await;
        assert_kind(&error, ErrorKind::Unavailable, "sqlserver");
        assert!(error.is_retryable());
        assert!(began.elapsed() < secs(5), "{host}: {:?}", began.elapsed());
    }
}

/// It is not left to the driver, which would wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_never_answers_is_unavailable_after_some_seconds() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    server.stall_logins(true);
    for query in ["", "&waiting_sessions=0"] {
        let began = Instant::now();
        let error = refused(&format!("{}{query}", server.url())).await;
        let took = began.elapsed();
        assert_kind(&error, ErrorKind::Unavailable, "sqlserver");
        assert!(took > Duration::from_millis(4500) && took < secs(8), "{query}: {took:?}");
    }
    server.stall_logins(false);
    released(take(&*connected(&server.url()).await, "x").await).await;
}

/// A provider of one's own can be made before its server is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_starts_before_its_server_does() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    server.stop();
    let locks = SqlServerLocks::new(config(&server.url()));
    let error = within("connect", Box::pin(locks.connect())).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    let provider = built(locks, secs(5));
    assert_eq!(fails(&provider, "x").await.kind(), ErrorKind::Unavailable);
    let waiter = waits(&provider, "x");
    server.restart();
    released(granted(waiter).await).await;
    within("connect", Box::pin(provider.backend().connect())).await.expect("it is there");
}

/// One that the database doesn't have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_principal_that_is_not_there() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    let error = refused(&format!("{}&db_principal={}", server.url(), encoded("no one"))).await;
    assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
    assert!(everything(&error).contains("db_principal"), "{}", everything(&error));
}
