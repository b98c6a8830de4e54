//! Locks that end with a transaction of one's own.

use fencelock::postgres::driver::Client;
use fencelock::postgres::{
    AdvisoryKey, PostgresLocks, lock_in_transaction, lock_key, try_lock_in_transaction,
};
use fencelock::{Error, ErrorKind};

use super::common::secs;
use super::servers::left_out;
use super::servers::postgres::PostgresServer;
use super::{
    built, client, config, everything, granted, holders, is_free, locks, released, take, until,
    until_waiting, waits, within,
};

async fn shows(client: &Client, setting: &str) -> String {
    client.query_one(&format!("SHOW {setting}"), &[]).await.expect("an answer").get(0)
}

fn assert_kind(error: &Error, kind: ErrorKind) {
    assert_eq!(error.kind(), kind, "{}", everything(error));
    assert_eq!(error.backend(), Some("postgres"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_excludes_and_is_excluded() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider =
        built(PostgresLocks::new(config(&server.url())).key("one", 42).key("two", (7, -8)), secs(10));
    let mut client = client(&server.url()).await;
    let keys: [(&str, AdvisoryKey); 4] = [
        ("x", "x".into()),
        ("Straße", String::from("Straße").into()),
        ("one", 42.into()),
        ("two", (7, -8).into()),
    ];
    for (name, key) in keys {
        // Excluded.
        let guard = take(&provider, name).await;
        let transaction = client.transaction().await.expect("begun");
        assert!(!try_lock_in_transaction(&transaction, key).await.expect("an answer"));
        let locked = tokio::spawn({
            let server_waits = until_waiting_owned(&server);
            async move {
                server_waits.await;
                released(guard).await;
            }
        });
        within("it is granted", lock_in_transaction(&transaction, key)).await.expect("granted");
        within("released", locked).await.expect("no panic");
        assert_eq!(holders(&server, key), 1, "{name}");
        // Again is no wait.
        assert!(try_lock_in_transaction(&transaction, key).await.expect("an answer"));
        within("it is granted", lock_in_transaction(&transaction, key)).await.expect("granted");

        // And excludes, until it commits.
        assert!(!is_free(&provider, name).await);
        let waiter = waits(&provider, name);
        until_waiting(&server, 1).await;
        transaction.commit().await.expect("committed");
        released(granted(waiter).await).await;

        // Until it is rolled back.
        let transaction = client.transaction().await.expect("begun");
        assert!(try_lock_in_transaction(&transaction, key).await.expect("an answer"));
        let waiter = waits(&provider, name);
        until_waiting(&server, 1).await;
        transaction.rollback().await.expect("rolled back");
        released(granted(waiter).await).await;

        // Until it is dropped.
        let transaction = client.transaction().await.expect("begun");
        lock_in_transaction(&transaction, key).await.expect("granted");
        let waiter = waits(&provider, name);
        until_waiting(&server, 1).await;
        drop(transaction);
        released(granted(waiter).await).await;
    }
    // Until its connection ends.
    let transaction = client.transaction().await.expect("begun");
    lock_in_transaction(&transaction, "x").await.expect("granted");
    let waiter = waits(&provider, "x");
    until_waiting(&server, 1).await;
    drop(transaction);
    drop(client);
    released(granted(waiter).await).await;
}

/// For a task.
fn until_waiting_owned(server: &PostgresServer) -> impl Future<Output = ()> + Send + 'static {
    let url = server.url();
    async move {
        let client = client(&url).await;
        let waiting = async {
            while client.query_one(super::WAITING, &[]).await.expect("an answer").get::<_, i64>(0) == 0 {
                tokio::time::sleep(super::common::ms(5)).await;
            }
        };
        within("somebody waits", waiting).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_dropped_or_killed_frees_it() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = locks(&server, secs(10));
    // One that never ends its transaction.
    let begun = client(&server.url()).await;
    begun.batch_execute("BEGIN").await.expect("begun");
    begun.execute("SELECT pg_advisory_xact_lock($1)", &[&lock_key("x")]).await.expect("granted");
    let waiter = waits(&provider, "x");
    until_waiting(&server, 1).await;
    drop(begun);
    released(granted(waiter).await).await;

    let mut killed = client(&server.url()).await;
    let pid: i32 = killed.query_one("SELECT pg_backend_pid()", &[]).await.expect("an answer").get(0);
    let transaction = killed.transaction().await.expect("begun");
    lock_in_transaction(&transaction, "x").await.expect("granted");
    let waiter = waits(&provider, "x");
    until_waiting(&server, 1).await;
    server.sql(&format!("SELECT pg_terminate_backend({pid})"));
    released(granted(waiter).await).await;
    let error = try_lock_in_transaction(&transaction, "x").await.expect_err("it has ended");
    assert_kind(&error, ErrorKind::Unavailable);
    assert!(transaction.commit().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_transaction_gets_nothing() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let mut client = client(&server.url()).await;
    let transaction = client.transaction().await.expect("begun");
    lock_in_transaction(&transaction, "before").await.expect("granted");
    transaction.batch_execute("SELECT 1 / 0").await.expect_err("it can't be");
    assert_kind(&lock_in_transaction(&transaction, "x").await.expect_err("aborted"), ErrorKind::Unavailable);
    assert_kind(
        &try_lock_in_transaction(&transaction, "x").await.expect_err("aborted"),
        ErrorKind::Unavailable,
    );
    // Neither commit nor anything else can come of it.
    let _ = transaction.commit().await;
    for name in ["before", "x"] {
        assert_eq!(holders(&server, name), 0, "{name}");
    }
    // The connection goes on.
    let transaction = client.transaction().await.expect("begun");
    assert!(try_lock_in_transaction(&transaction, "x").await.expect("an answer"));
    transaction.rollback().await.expect("rolled back");
    assert_eq!(holders(&server, "x"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limits_of_its_session_end_a_wait() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = locks(&server, secs(10));
    let guard = take(&provider, "x").await;
    let mut client = client(&server.url()).await;
    for limit in ["lock_timeout", "statement_timeout"] {
        client.batch_execute(&format!("SET {limit} = '100ms'")).await.expect("set");
        let transaction = client.transaction().await.expect("begun");
        let wait = within("it gives up", lock_in_transaction(&transaction, "x")).await;
        assert_kind(&wait.expect_err("it is held"), ErrorKind::Unavailable);
        transaction.rollback().await.expect("rolled back");
        client.batch_execute(&format!("RESET {limit}")).await.expect("set");
        assert_eq!(holders(&server, "x"), 1, "only ours");
    }
    released(guard).await;
    let transaction = client.transaction().await.expect("begun");
    within("granted", lock_in_transaction(&transaction, "x")).await.expect("it is free");
    transaction.commit().await.expect("committed");
}

/// A deadlock over two locks: one of the two has to give up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_is_an_error_of_one() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options().config("deadlock_timeout", "100ms").start();
    let (mut one, mut other) = (client(&server.url()).await, client(&server.url()).await);
    let (one, other) = (one.transaction().await.expect("begun"), other.transaction().await.expect("begun"));
    lock_in_transaction(&one, "x").await.expect("granted");
    lock_in_transaction(&other, "y").await.expect("granted");
    let wait = async |transaction: fencelock::postgres::driver::Transaction<'_>, name: &str| {
        let locked = lock_in_transaction(&transaction, name).await;
        transaction.rollback().await.expect("rolled back");
        locked.err()
    };
    let (first, second) =
        within("both have an answer", async { tokio::join!(wait(one, "y"), wait(other, "x")) }).await;
    let failed: Vec<_> = first.iter().chain(&second).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_kind(failed[0], ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_session_is_left_as_it_was() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let mut client = client(&server.url()).await;
    client
        .batch_execute(
            "SET default_transaction_isolation = 'repeatable read'; SET synchronous_commit = 'on'; \
             SET lock_timeout = '7s'; SET statement_timeout = '8s'",
        )
        .await
        .expect("set");
    let settings = "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings";
    let ask =
        async |client: &Client| client.query_one(settings, &[]).await.expect("an answer").get::<_, String>(0);
    let before = ask(&client).await;
    let transaction = client.transaction().await.expect("begun");
    lock_in_transaction(&transaction, "x").await.expect("granted");
    assert!(try_lock_in_transaction(&transaction, (1, 2)).await.expect("an answer"));
    for (setting, value) in [
        ("transaction_isolation", "repeatable read"),
        ("synchronous_commit", "on"),
        ("lock_timeout", "7s"),
        ("statement_timeout", "8s"),
        ("idle_in_transaction_session_timeout", "0"),
    ] {
        let row = transaction.query_one(&format!("SHOW {setting}"), &[]).await.expect("an answer");
        assert_eq!(row.get::<_, String>(0), value, "{setting}");
    }
    transaction.commit().await.expect("committed");
    assert_eq!(ask(&client).await, before);
    assert_eq!(shows(&client, "default_transaction_isolation").await, "repeatable read");
}

/// However long it is left open: tokens are drawn, the sequence is raised, and sessions begin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_transaction_who_does_not_want_its_lock() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = locks(&server, secs(10));
    released(take(&provider, "y").await).await;
    let mut client = client(&server.url()).await;
    let transaction = client.transaction().await.expect("begun");
    lock_in_transaction(&transaction, "x").await.expect("granted");
    for number in 0..3 {
        let name = format!("y{number}");
        let other = locks(&server, secs(10));
        let (first, second) = (take(&provider, &name).await, take(&other, "z").await);
        assert!(first.fencing_token() < second.fencing_token());
        released(first).await;
        released(second).await;
    }
    // Also who has to raise the sequence to the clock, as new sessions do.
    server.sql("SELECT setval('fencelock_token', 1)");
    let guard = take(&locks(&server, secs(10)), "y").await;
    assert!(guard.fencing_token().to_string().len() > 10, "{}", guard.fencing_token());
    released(guard).await;
    until(&server, super::WAITING, "0").await;
    transaction.commit().await.expect("committed");
}
