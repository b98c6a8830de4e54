//! Who isn't let in, what isn't there, and what a user may not do.

use std::time::Instant;

use fencelock::postgres::PostgresLocks;
use fencelock::postgres::driver::Client;
use fencelock::{Error, ErrorKind, LockProvider};

use super::common::secs;
use super::servers::left_out;
use super::servers::postgres::{PostgresServer, SUPERUSER};
use super::{
    PASSWORD, built, closed, config, connected, encoded, everything, fails, granted, holders, is_free, locks,
    refused, released, shows_what_it_can, take, waits, within,
};

/// What `docs` of the module say about the sequence.
const DOCS: &str = include_str!("../../src/postgres/mod.rs");

/// One that isn't the owner of anything.
fn make_alice(server: &PostgresServer) -> String {
    server.sql(&format!("CREATE ROLE alice LOGIN PASSWORD '{PASSWORD}'"));
    format!("postgres://alice:{}@127.0.0.1:{}/test", encoded(PASSWORD), server.port())
}

fn assert_kind(error: &Error, kind: ErrorKind, says: &str) {
    assert_eq!(error.kind(), kind, "{}", everything(error));
    assert!(error.to_string().contains(says), "{says}: {}", everything(error));
    assert_eq!(error.backend(), Some("postgres"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_let_in_is_told_so_at_once() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options().hba("host all outcast all reject").start();
    make_alice(&server);
    server.sql("CREATE ROLE outcast LOGIN PASSWORD 'secret'");
    server.sql("CREATE ROLE nobody PASSWORD 'secret'");
    server.sql("CREATE ROLE unset LOGIN");
    let error = refused(&format!("postgres://app@127.0.0.1:{}/test", server.port())).await;
    assert_kind(&error, ErrorKind::Config, "settings");
    assert!(everything(&error).contains("password missing"), "{}", everything(&error));
    let right = encoded(PASSWORD);
    for login in [
        "app:never-this",
        "app:never%2Fthis",
        "bob:never-this",
        &format!("bob:{right}"),
        "alice:secret",
        "outcast:secret",
        "nobody:secret",
        "unset:secret",
    ] {
        let began = Instant::now();
        let error = refused(&format!("postgres://{login}@127.0.0.1:{}/test", server.port())).await;
        assert_eq!(error.kind(), ErrorKind::Denied, "{login}: {}", everything(&error));
        assert_eq!(error.backend(), Some("postgres"));
        assert!(!error.is_retryable());
        assert!(began.elapsed() < secs(3), "{login}: {:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_not_there() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    // Without one it is called like the user.
    for path in ["/missing", ""] {
        let error = refused(&format!("postgres://app:secret@127.0.0.1:{}{path}", server.port())).await;
        assert_kind(&error, ErrorKind::Config, "database doesn't exist");
    }
    // Nor one that lets nobody in.
    let closes = "ALTER DATABASE test ALLOW_CONNECTIONS false";
    server.sql_as(SUPERUSER, "secret", "template1", closes).expect("it may");
    let error = refused(&server.url()).await;
    assert!(error.to_string().contains("postgres"), "{}", everything(&error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_says_so_until_it_is_promoted() {
    if left_out("postgres") {
        return;
    }
    let primary = PostgresServer::start();
    let standby = PostgresServer::standby_of(&primary);
    let error = refused(&standby.url()).await;
    assert_kind(&error, ErrorKind::Unavailable, "read-only standby");
    assert!(error.is_retryable());
    let provider = locks(&standby, secs(10));
    assert_kind(&fails(&provider, "x").await, ErrorKind::Unavailable, "read-only standby");
    let waiter = waits(&provider, "x");
    standby.promote();
    released(granted(waiter).await).await;
    shows_what_it_can(&provider, &*connected(&standby.url()).await, &standby, "x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_full() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options()
        .config("max_connections", "8")
        .config("superuser_reserved_connections", "2")
        .start();
    let mut others: Vec<Client> = Vec::new();
    let config = config(&server.url());
    while let Ok((client, connection)) = config.connect(fencelock::postgres::driver::NoTls).await {
        tokio::spawn(connection);
        others.push(client);
    }
    assert!(others.len() >= 4, "{}", others.len());
    assert_kind(&refused(&server.url()).await, ErrorKind::Exhausted, "no more connections");
    let provider = locks(&server, secs(10));
    assert_kind(&fails(&provider, "x").await, ErrorKind::Exhausted, "no more connections");
    drop(others);
    super::until(&server, "select count(*) from pg_stat_activity where usename = 'app'", "0").await;
    assert!(is_free(&provider, "x").await);
    shows_what_it_can(&provider, &*connected(&server.url()).await, &server, "x").await;

    // Room for those who try, and none for one who waits.
    closed(&provider).await;
    let (one, other) = (locks(&server, secs(10)), locks(&server, secs(10)));
    let guard = take(&one, "x").await;
    assert!(!is_free(&other, "x").await);
    let mut others: Vec<Client> = Vec::new();
    while let Ok((client, connection)) = config.connect(fencelock::postgres::driver::NoTls).await {
        tokio::spawn(connection);
        others.push(client);
    }
    let lock = other.create_lock_with("x", fencelock::LockOptions::new().retry_for(secs(0)));
    let error = within("an answer", lock.acquire()).await.expect_err("no session to wait on");
    assert_kind(&error, ErrorKind::Exhausted, "no more connections");
    assert!(!is_free(&other, "x").await);
    released(guard).await;
    assert!(is_free(&other, "x").await);
}

/// What a message says that somebody is to run, for `alice`.
fn advice(error: &Error) -> String {
    let said = error.to_string();
    let (_, advice) = said.split_once(": CREATE").or_else(|| said.split_once("run: ")).expect("statements");
    let advice = if said.contains(": CREATE") { format!("CREATE{advice}") } else { advice.to_owned() };
    assert!(advice.ends_with(" TO the user"), "{advice}");
    advice.replace(" TO the user", " TO alice")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_without_rights_is_told_what_to_do() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let url = make_alice(&server);
    let error = refused(&url).await;
    assert_kind(&error, ErrorKind::Denied, "CREATE SEQUENCE IF NOT EXISTS \"public\".\"fencelock_token\"");
    assert!(!error.is_retryable());
    let provider = built(PostgresLocks::new(config(&url)), secs(10));
    assert_kind(&fails(&provider, "x").await, ErrorKind::Denied, "CREATE SEQUENCE");
    server.sql(&advice(&error));
    // Who has asked before, too, once it asks again.
    shows_what_it_can(&*connected(&url).await, &*connected(&url).await, &server, "x").await;
    super::until(&server, super::WAITING, "0").await;
    let lock = provider.create_lock("x");
    released(within("granted", lock.acquire()).await.expect("it may now")).await;

    // Where one has its own name.
    let url = url + "?token_sequence=Drawn%20here";
    let error = refused(&url).await;
    assert_kind(&error, ErrorKind::Denied, "\"Drawn here\"");
    server.sql(&advice(&error));
    shows_what_it_can(&*connected(&url).await, &*connected(&url).await, &server, "y").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_documentation_says_does_it() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let url = make_alice(&server);
    let statements: Vec<_> = DOCS
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.starts_with("CREATE SEQUENCE") || line.starts_with("GRANT "))
        .map(|line| line.replace(" TO app;", " TO alice;"))
        .collect();
    assert_eq!(statements.len(), 2, "{statements:?}");
    server.sql(&statements[0]);
    assert_kind(&refused(&url).await, ErrorKind::Denied, "GRANT SELECT, USAGE, UPDATE ON SEQUENCE");
    server.sql(&statements[1]);
    shows_what_it_can(&*connected(&url).await, &*connected(&url).await, &server, "x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_without_rights_on_it() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let url = make_alice(&server);
    // It is made by the first who may.
    released(take(&*connected(&server.url()).await, "x").await).await;
    for too_little in ["", "USAGE", "SELECT", "UPDATE", "SELECT, USAGE", "SELECT, UPDATE", "USAGE, UPDATE"] {
        server.sql("REVOKE ALL ON SEQUENCE fencelock_token FROM alice");
        if !too_little.is_empty() {
            server.sql(&format!("GRANT {too_little} ON SEQUENCE fencelock_token TO alice"));
        }
        let error = refused(&url).await;
        assert_kind(&error, ErrorKind::Denied, "GRANT SELECT, USAGE, UPDATE ON SEQUENCE");
        if too_little == "USAGE, UPDATE" {
            server.sql(&advice(&error));
        }
    }
    let provider = connected(&url).await;
    let guard = take(&*provider, "x").await;

    // Rights that are taken away later: what is held stays, and no claim leaves a lock behind.
    server.sql("REVOKE ALL ON SEQUENCE fencelock_token FROM alice");
    assert_kind(&fails(&*provider, "y").await, ErrorKind::Denied, "rights");
    assert_eq!((holders(&server, "x"), holders(&server, "y")), (1, 0));
    released(guard).await;
    server.sql("GRANT SELECT, USAGE, UPDATE ON SEQUENCE fencelock_token TO alice");
    assert!(is_free(&*provider, "y").await);
}

/// A schema is more than one who draws from a sequence in it may look at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_without_rights_on_it_or_that_is_not_there() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let url = make_alice(&server);
    server.sql("CREATE SCHEMA hidden");
    server.sql("CREATE SEQUENCE hidden.drawn");
    server.sql("GRANT SELECT, USAGE, UPDATE ON SEQUENCE hidden.drawn TO alice");
    let hidden = format!("{url}?token_sequence=hidden.drawn");
    let error = refused(&hidden).await;
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", everything(&error));
    server.sql("GRANT USAGE ON SCHEMA hidden TO alice");
    released(take(&*connected(&hidden).await, "x").await).await;

    let error = refused(&format!("{}?token_sequence=missing.drawn", server.url())).await;
    assert!(matches!(error.kind(), ErrorKind::Config | ErrorKind::Denied), "{}", everything(&error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_give_tokens_is_refused() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for (make, drop) in [
        ("CREATE SEQUENCE fencelock_token CACHE 10", "SEQUENCE"),
        ("CREATE SEQUENCE fencelock_token INCREMENT 2", "SEQUENCE"),
        ("CREATE SEQUENCE fencelock_token INCREMENT -1", "SEQUENCE"),
        ("CREATE SEQUENCE fencelock_token CYCLE", "SEQUENCE"),
        ("CREATE TABLE fencelock_token (n bigint)", "TABLE"),
        ("CREATE VIEW fencelock_token AS SELECT 1 AS last_value", "VIEW"),
    ] {
        server.sql(make);
        server.sql(&format!("ALTER {drop} fencelock_token OWNER TO app"));
        let error = refused(&server.url()).await;
        assert_kind(&error, ErrorKind::Config, "\"fencelock_token\"");
        server.sql(&format!("DROP {drop} fencelock_token"));
    }
    // Which has no room for the clock.
    for make in ["AS integer", "AS smallint", "MAXVALUE 1000000"] {
        server
            .sql_as("app", "secret", "test", &format!("CREATE SEQUENCE fencelock_token {make}"))
            .expect("made");
        let error = match within("connect", Box::pin(fencelock::connect(&server.url()))).await {
            Ok(provider) => fails(&*provider, "x").await,
            Err(error) => error,
        };
        assert!(matches!(error.kind(), ErrorKind::Config | ErrorKind::Exhausted), "{}", everything(&error));
        assert_eq!(holders(&server, "x"), 0);
        server.sql("DROP SEQUENCE fencelock_token");
    }
    shows_what_it_can(&*connected(&server.url()).await, &*connected(&server.url()).await, &server, "x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_at_its_end_or_gone_leaves_no_lock_behind() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = connected(&server.url()).await;
    let scoped = connected(&(server.url() + "?transaction_scoped=true")).await;
    let guard = take(&*provider, "x").await;
    server.sql("SELECT setval('fencelock_token', 9007199254740991)");
    for provider in [&provider, &scoped] {
        let error = fails(&**provider, "y").await;
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{}", everything(&error));
        super::until_free(&server, "y").await;
    }
    server.sql("DROP SEQUENCE fencelock_token");
    for provider in [&provider, &scoped] {
        let error = fails(&**provider, "y").await;
        assert!(matches!(error.kind(), ErrorKind::Config | ErrorKind::Exhausted), "{}", everything(&error));
        super::until_free(&server, "y").await;
    }
    // What is held stays.
    assert_eq!(holders(&server, "x"), 1);
    released(guard).await;
    // Who comes anew makes it anew.
    assert!(is_free(&*connected(&server.url()).await, "y").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_can_be_called_anything() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    server
        .sql_as("app", "secret", "test", "CREATE SCHEMA \"Odd \"\"one\"\"\"")
        .expect("it owns the database");
    for (name, sql) in [
        ("Odd \"one\".It's \"My\" Sequence", "\"Odd \"\"one\"\"\".\"It's \"\"My\"\" Sequence\""),
        ("MixedCase", "\"MixedCase\""),
        ("public.straße 1;--", "public.\"straße 1;--\""),
        ("select", "\"select\""),
        ("$1 %s {}\\", "\"$1 %s {}\\\""),
    ] {
        let url = format!("{}?token_sequence={}", server.url(), encoded(name));
        let (one, other) = (connected(&url).await, connected(&url).await);
        shows_what_it_can(&*one, &*other, &server, name).await;
        let guard = take(&*one, "x").await;
        let last = server.sql(&format!("SELECT last_value FROM {sql}"));
        assert_eq!(last, guard.fencing_token().to_string(), "{name}");
        released(guard).await;
        let scoped = connected(&(url + "&transaction_scoped=true")).await;
        released(take(&*scoped, "x").await).await;
    }
}

/// All want to make the sequence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_start_at_once_on_an_empty_database() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for round in 0..3 {
        server.sql("DROP SEQUENCE IF EXISTS fencelock_token");
        let url = server.url();
        let starts = (0..20).map(|number| {
            let url = url.clone();
            tokio::spawn(async move {
                let provider = connected(&url).await;
                let guard = take(&*provider, &format!("lock {number}")).await;
                let token = guard.fencing_token();
                released(guard).await;
                closed(&*provider).await;
                token
            })
        });
        let starts: Vec<_> = starts.collect();
        let mut tokens = Vec::new();
        for start in starts {
            tokens.push(within("it has started", start).await.expect("no panic"));
        }
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), 20, "round {round}");
    }
}
