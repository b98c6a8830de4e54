//! Locks that end with a transaction of one's own. With `FENCELOCK_SQLSERVER_URL`, on the server that it names.

use std::time::Instant;

use fencelock::sqlserver::{AppLock, SqlServerLocks, lock_in_transaction, try_lock_in_transaction};
use fencelock::{Error, ErrorKind};

use super::common::secs;
use super::servers::left_out;
use super::servers::sqlserver_locks::Driver;
use super::{Site, built, config, everything, granted, is_free, released, take, waits, within};

fn assert_kind(error: &Error, kind: ErrorKind) {
    assert_eq!(error.kind(), kind, "{}", everything(error));
    assert_eq!(error.backend(), Some("sqlserver"));
}

async fn run(client: &mut Driver, sql: &str) {
    client.simple_query(sql.to_owned()).await.expect("sent").into_results().await.expect("carried out");
}

/// Begins a transaction, by the driver or by SQL.
async fn begin(client: &mut Driver, by_driver: bool) {
    if by_driver {
        client.begin_transaction().await.expect("begun");
    } else {
        run(client, "BEGIN TRAN").await;
    }
}

async fn commit(client: &mut Driver, by_driver: bool) {
    if by_driver {
        client.commit_transaction().await.expect("committed");
    } else {
        run(client, "COMMIT").await;
    }
}

async fn roll_back(client: &mut Driver, by_driver: bool) {
    if by_driver {
        client.rollback_transaction().await.expect("rolled back");
    } else {
        run(client, "ROLLBACK").await;
    }
}

/// Against providers, until the transaction commits, is rolled back, or ends with its connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_excludes_and_is_excluded() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let import = AppLock::of_resource("Import of Orders").expect("a resource");
    let locks = SqlServerLocks::new(config(&site.url())).lock("import", import.clone());
    let provider = built(locks, secs(20));
    for by_driver in [true, false] {
        for (name, lock, resource) in [
            ("x", AppLock::from("x"), "x"),
            ("straße", "straße".into(), "stra%C3%9Fe"),
            ("import", import.clone(), "Import of Orders"),
        ] {
            let mut client = site.client().await;
            // Excluded.
            let guard = take(&provider, name).await;
            begin(&mut client, by_driver).await;
            assert!(!try_lock_in_transaction(&mut client, lock.clone()).await.expect("an answer"));
            let waiting = tokio::spawn({
                let lock = lock.clone();
                async move {
                    lock_in_transaction(&mut client, lock).await.expect("granted");
                    client
                }
            });
            site.until_waiting(resource, 1).await;
            released(guard).await;
            let mut client = within("it is granted", waiting).await.expect("no panic");
            // Again is no wait.
            assert!(try_lock_in_transaction(&mut client, lock.clone()).await.expect("an answer"));
            within("it is granted", lock_in_transaction(&mut client, lock.clone())).await.expect("granted");

            // And excludes, until it commits.
            assert!(!is_free(&provider, name).await);
            let waiter = waits(&provider, name);
            site.until_waiting(resource, 1).await;
            commit(&mut client, by_driver).await;
            released(granted(waiter).await).await;

            // Until it is rolled back.
            begin(&mut client, by_driver).await;
            assert!(try_lock_in_transaction(&mut client, lock.clone()).await.expect("an answer"));
            let waiter = waits(&provider, name);
            site.until_waiting(resource, 1).await;
            roll_back(&mut client, by_driver).await;
            released(granted(waiter).await).await;

            // Until its connection ends.
            begin(&mut client, by_driver).await;
            lock_in_transaction(&mut client, lock.clone()).await.expect("granted");
            let waiter = waits(&provider, name);
            site.until_waiting(resource, 1).await;
            drop(client);
            released(granted(waiter).await).await;
        }
    }
}

/// Against another transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_exclude_each_other() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let (mut one, mut other) = (site.client().await, site.client().await);
    begin(&mut one, true).await;
    begin(&mut other, false).await;
    lock_in_transaction(&mut one, "x").await.expect("granted");
    assert!(!try_lock_in_transaction(&mut other, "x").await.expect("an answer"));
    assert!(try_lock_in_transaction(&mut other, "y").await.expect("an answer"));
    let waiting = tokio::spawn(async move {
        lock_in_transaction(&mut other, "x").await.expect("granted");
        other
    });
    site.until_blocked("x", 1).await;
    commit(&mut one, true).await;
    let mut other = within("it is granted", waiting).await.expect("no panic");
    begin(&mut one, false).await;
    assert!(!try_lock_in_transaction(&mut one, "x").await.expect("an answer"));
    commit(&mut other, false).await;
    assert!(try_lock_in_transaction(&mut one, "x").await.expect("an answer"));
}

/// Without a transaction the lock would be the session's, or nobody's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_transaction_it_is_refused() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let mut client = site.client().await;
    let error = try_lock_in_transaction(&mut client, "x").await.expect_err("there is none");
    assert_kind(&error, ErrorKind::Config);
    assert!(error.to_string().contains("no transaction is open"), "{error}");
    assert_kind(&lock_in_transaction(&mut client, "x").await.expect_err("none"), ErrorKind::Config);
    assert!(is_free(&site.locks(secs(20)), "x").await);
    // The client can be used as before.
    begin(&mut client, true).await;
    assert!(try_lock_in_transaction(&mut client, "x").await.expect("an answer"));
}

/// A principal that the database doesn't have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_call_is_a_mistake() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let mut client = site.client().await;
    begin(&mut client, true).await;
    let lock = AppLock::of_resource("x").and_then(|lock| lock.db_principal("nobody")).expect("a lock");
    let error = try_lock_in_transaction(&mut client, lock).await.expect_err("nobody is nobody");
    assert!(matches!(error.kind(), ErrorKind::Config | ErrorKind::Unavailable), "{}", everything(&error));
}

/// The server is asked again every five seconds, and the driver's own timeout doesn't cut that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_is_longer_than_one_request() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let provider = site.locks(secs(20));
    let guard = take(&provider, "x").await;
    let mut client = site.client().await;
    begin(&mut client, true).await;
    let mut waiting = tokio::spawn(async move {
        lock_in_transaction(&mut client, "x").await.expect("granted");
        client
    });
    site.until_blocked("x", 1).await;
    assert!(tokio::time::timeout(secs(6), &mut waiting).await.is_err(), "it is held");
    site.until_blocked("x", 1).await;
    released(guard).await;
    let began = Instant::now();
    let _client = within("it is granted", waiting).await.expect("no panic");
    assert!(began.elapsed() < secs(2), "{:?}", began.elapsed());
    assert!(!is_free(&provider, "x").await);
}

/// A deadlock over two locks: one of the two has to give up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_is_an_error_of_one() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let mut clients = [site.client().await, site.client().await];
    for (client, name) in clients.iter_mut().zip(["x", "y"]) {
        begin(client, true).await;
        lock_in_transaction(client, name).await.expect("granted");
    }
    let [mut one, mut other] = clients;
    // Whoever fails drops its client, which frees what the other waits for.
    let waiting = tokio::spawn(async move { lock_in_transaction(&mut one, "y").await.err() });
    let failed = tokio::spawn(async move { lock_in_transaction(&mut other, "x").await.err() });
    let both = [
        within("an answer", waiting).await.expect("no panic"),
        within("an answer", failed).await.expect("no panic"),
    ];
    let failed: Vec<_> = both.iter().flatten().collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_kind(failed[0], ErrorKind::Unavailable);
}

/// One whose session is killed frees it, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_killed_frees_it() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let provider = site.locks(secs(20));
    let mut client = site.client().await;
    let spid = client.simple_query("SELECT CAST(@@SPID AS int)").await.expect("sent");
    let spid: i32 = spid.into_row().await.expect("an answer").expect("a row").get(0).expect("a number");
    begin(&mut client, true).await;
    lock_in_transaction(&mut client, "x").await.expect("granted");
    let waiter = waits(&provider, "x");
    site.until_blocked("x", 1).await;
    site.place.sql("master", &format!("KILL {spid}")).await.expect("it is killed");
    released(granted(waiter).await).await;
    let error = try_lock_in_transaction(&mut client, "x").await.expect_err("it has ended");
    assert_kind(&error, ErrorKind::Unavailable);
}
