//! What a lock is called in PostgreSQL, and programs that know nothing but that.

use std::io::Write as _;
use std::process::Stdio;

use fencelock::postgres::{AdvisoryKey, PostgresLocks, lock_key};
use fencelock::{ErrorKind, LockOptions, LockProvider, Provider};

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::postgres::PostgresServer;
use super::{
    built, client, config, connected, fails, granted, holders, is_free, locks, released, take, until,
    until_waiting, waits, within,
};

/// The statement in the documentation of `lock_key`.
const DOCS: &str = include_str!("../../src/postgres/key.rs");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_computes_the_same_keys() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let documented = DOCS.lines().find_map(|line| line.strip_prefix("/// SELECT ('x'")).expect("it is there");
    let statement = format!("SELECT ('x'{documented}");
    assert!(statement.contains("'nightly-report'"), "{statement}");
    assert_eq!(server.sql(&statement), lock_key("nightly-report").to_string());
    let client = client(&server.url()).await;
    let statement = statement.trim_end_matches(';').replace("'nightly-report'", "$1::text");
    for name in [
        "",
        "x",
        "app:nightly-report",
        "Straße",
        "名前 🔒",
        "e\u{301}",
        "é",
        "it's \"quoted\"\\",
        "line\nbreak",
        &"long".repeat(1000),
    ] {
        let row = client.query_one(&statement, &[&name]).await.expect("computed");
        assert_eq!(row.get::<_, i64>(0), lock_key(name), "{name}");
        assert_eq!(AdvisoryKey::from(name), AdvisoryKey::One(lock_key(name)));
    }
}

/// The name on the server is the provider's prefix and the lock's name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_is_part_of_the_name() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let plain = connected(&server.url()).await;
    let app = connected(&(server.url() + "?prefix=app")).await;
    let guard = take(&*app, "x").await;
    assert_eq!((holders(&server, "app:x"), holders(&server, "x")), (1, 0));
    assert!(is_free(&*plain, "x").await);
    assert!(!is_free(&*plain, "app:x").await);
    released(guard).await;

    let locks = PostgresLocks::new(config(&server.url())).key("app:x", 7).key("x", 8);
    let provider = Provider::builder(locks).prefix("app").build().expect("possible options");
    let guard = take(&provider, "x").await;
    assert_eq!((holders(&server, 7), holders(&server, 8), holders(&server, "app:x")), (1, 0, 0));
    released(guard).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_knows_sql_excludes_and_is_excluded() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = connected(&server.url()).await;
    let other = client(&server.url()).await;
    let key = lock_key("x");

    let guard = take(&*provider, "x").await;
    let tried = other.query_one("SELECT pg_try_advisory_lock($1)", &[&key]).await.expect("an answer");
    assert!(!tried.get::<_, bool>(0));
    let waiting = tokio::spawn(async move {
        other.execute("SELECT pg_advisory_lock($1)", &[&key]).await.expect("granted");
        other
    });
    until_waiting(&server, 1).await;
    released(guard).await;
    let other = within("it has the lock", waiting).await.expect("no panic");

    assert!(!is_free(&*provider, "x").await);
    let waiter = waits(&*provider, "x");
    until_waiting(&server, 1).await;
    other.execute("SELECT pg_advisory_unlock($1)", &[&key]).await.expect("freed");
    released(granted(waiter).await).await;

    // The end of its session frees it, too.
    other.execute("SELECT pg_advisory_lock($1)", &[&key]).await.expect("granted");
    let waiter = waits(&*provider, "x");
    until_waiting(&server, 1).await;
    drop(other);
    released(granted(waiter).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_is_killed_frees_it() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for sessions in [3, 0] {
        let locks = PostgresLocks::new(config(&server.url())).waiting_sessions(sessions);
        let provider = built(locks, secs(5));
        let mut psql =
            server.psql().stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("psql starts");
        let mut input = psql.stdin.take().expect("piped");
        writeln!(input, "SELECT pg_advisory_lock({});", lock_key("x")).expect("psql runs");
        until(&server, &super::shows(lock_key("x").into()), "1").await;
        assert!(!is_free(&provider, "x").await);
        let waiter = waits(&provider, "x");
        if sessions > 0 {
            until_waiting(&server, 1).await;
        }
        assert!(!is_free(&provider, "x").await);
        psql.kill().expect("it is our child");
        psql.wait().expect("it is our child");
        released(granted(waiter).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_other_programs() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let keyed = || {
        let locks = PostgresLocks::new(config(&server.url()));
        let locks =
            locks.key("one", 42).key("two", (7, -8)).key("least", i64::MIN).key("most", (i32::MIN, i32::MAX));
        built(locks.key("small", (0, 42)), secs(10))
    };
    let (provider, other) = (keyed(), keyed());
    let program = client(&server.url()).await;
    let all = [
        ("one", AdvisoryKey::One(42), "42"),
        ("two", AdvisoryKey::Two(7, -8), "7, -8"),
        ("least", AdvisoryKey::One(i64::MIN), "-9223372036854775808"),
        ("most", AdvisoryKey::Two(i32::MIN, i32::MAX), "-2147483648, 2147483647"),
        ("small", AdvisoryKey::Two(0, 42), "0, 42"),
    ];
    for (name, key, sql) in all {
        let ask = async |function: &str| {
            let row = program.query_one(&format!("SELECT {function}({sql})::text"), &[]).await;
            row.expect("an answer").get::<_, String>(0)
        };
        let guard = take(&provider, name).await;
        assert_eq!((holders(&server, key), holders(&server, name)), (1, 0), "{name}");
        assert_eq!(ask("pg_try_advisory_lock").await, "false", "{name}");
        assert!(!is_free(&other, name).await);
        let waiter = waits(&other, name);
        until_waiting(&server, 1).await;
        released(guard).await;
        released(granted(waiter).await).await;
        assert_eq!(ask("pg_try_advisory_lock").await, "true", "{name}");
        // The others have keys of their own.
        for (another, ..) in all {
            assert_eq!(is_free(&provider, another).await, another != name, "{name} {another}");
        }
        let waiter = waits(&provider, name);
        until_waiting(&server, 1).await;
        assert_eq!(ask("pg_advisory_unlock").await, "true", "{name}");
        released(granted(waiter).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_with_the_same_key_are_the_same_lock() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for scoped in [false, true] {
        for key in [AdvisoryKey::One(42), AdvisoryKey::Two(4, 2), lock_key("named").into()] {
            let keyed = || {
                let locks = PostgresLocks::new(config(&server.url())).key("a", key).key("b", key);
                built(locks.transaction_scoped(scoped), secs(10))
            };
            let (provider, other) = (keyed(), keyed());
            let guard = take(&provider, "a").await;
            assert!(!is_free(&provider, "b").await);
            assert!(!is_free(&other, "b").await);
            let lock = provider.create_lock("b");
            let answer = within("an answer", lock.try_acquire_for(ms(50))).await.expect("no error");
            assert!(answer.is_none());
            let waiter = waits(&provider, "b");
            // It may not be seen on the server: whoever holds it is the same provider.
            assert!(!is_free(&provider, "b").await);
            released(guard).await;
            let guard = granted(waiter).await;
            assert_eq!(holders(&server, key), 1);
            assert!(!is_free(&provider, "a").await);
            let waiter = waits(&other, "a");
            until_waiting(&server, 1).await;
            released(guard).await;
            released(granted(waiter).await).await;
            assert_eq!(holders(&server, key), 0);
            // And with a name that has this key by itself.
            if key == lock_key("named").into() {
                let guard = take(&provider, "named").await;
                assert!(!is_free(&provider, "a").await);
                released(guard).await;
            }
        }
    }
}

/// Held by those who draw fencing tokens: it would be in their way, or they in its.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_of_those_who_draw_tokens_is_refused() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = locks(&server, secs(10));
    // Known by what the server shows while somebody draws.
    let reserved = 4_799_424_324_863_618_230_i64;
    let keyed = built(PostgresLocks::new(config(&server.url())).key("x", reserved), secs(10));
    assert_eq!(fails(&keyed, "x").await.kind(), ErrorKind::Config);
    let lock = keyed.create_lock_with("x", LockOptions::new());
    let error = within("an answer", lock.acquire()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(is_free(&keyed, "y").await);

    let other = client(&server.url()).await;
    released(take(&provider, "y").await).await;
    other.execute("SELECT pg_advisory_lock($1)", &[&reserved]).await.expect("granted");
    let waiter = waits(&provider, "y");
    until_waiting(&server, 1).await;
    other.execute("SELECT pg_advisory_unlock($1)", &[&reserved]).await.expect("freed");
    released(granted(waiter).await).await;
}
