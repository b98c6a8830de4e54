//! What stands in a URL, right and wrong.

use std::io::ErrorKind as IoErrorKind;
use std::net::TcpListener;
use std::time::Instant;

use fencelock::postgres::{PostgresLocks, lock_key};
use fencelock::{ErrorKind, Fairness, LockProvider, Loss};

use super::common::{ms, secs};
use super::servers::postgres::PostgresServer;
use super::servers::{free_port, left_out};
use super::{
    PASSWORD, assert_no_secret, closed, config, connected, encoded, everything, fails, holders, is_free,
    refused, released, shows_what_it_can, take, within,
};

/// What the sessions are called.
const NAMES: &str =
    "select string_agg(distinct application_name, ' ') from pg_stat_activity where usename = 'app'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_way_to_write_it_leads_there() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    server.sql(&format!("CREATE ROLE alice LOGIN PASSWORD '{PASSWORD}'"));
    server.sql("GRANT app TO alice");
    let (port, password) = (server.port(), encoded(PASSWORD));
    let socket = encoded(&server.socket_dir().display().to_string());
    let known = connected(&server.url()).await;
    for url in [
        format!("postgresql://app:secret@127.0.0.1:{port}/test"),
        format!("POSTGRES://app:secret@localhost:{port}/test"),
        format!("postgres://alice:{password}@127.0.0.1:{port}/test"),
        format!("postgres://app:secret@{socket}:{port}/test"),
        format!("postgres://alice:{password}@{socket}:{port}/test?ttl=5s"),
        format!(
            "postgres://app:secret@127.0.0.1:{},127.0.0.1:{port}/test?load_balance_hosts=random",
            free_port()
        ),
        format!("postgres://app:secret@no-such-host.invalid:{port}/test?hostaddr=127.0.0.1"),
    ] {
        let provider = connected(&url).await;
        shows_what_it_can(&*provider, &*known, &server, "x").await;
        let guard = take(&*provider, "x").await;
        assert_no_secret(&format!("{provider:?} {:?} {guard:?}", provider.create_lock("x")));
        released(guard).await;
        closed(&*provider).await;
    }
    let locks = PostgresLocks::new(config(&format!("postgres://alice:{password}@127.0.0.1:{port}/test")));
    assert_no_secret(&format!("{locks:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_passed_over_for_its_primary() {
    if left_out("postgres") {
        return;
    }
    let primary = PostgresServer::start();
    let standby = PostgresServer::standby_of(&primary);
    let hosts =
        format!("postgres://app:secret@127.0.0.1:{},127.0.0.1:{}/test", standby.port(), primary.port());
    let error = refused(&hosts).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    let provider = connected(&(hosts + "?target_session_attrs=read-write")).await;
    let guard = take(&*provider, "x").await;
    assert_eq!(holders(&primary, "x"), 1);
    assert!(!is_free(&*connected(&primary.url()).await, "x").await);
    released(guard).await;
}

/// The driver's parameters.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_of_the_driver() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let url = |query: &str| format!("{}?{query}", server.url());
    for (query, name) in [
        ("ttl=5s", "fencelock"),
        ("application_name=nightly", "nightly"),
        ("application_name=nightly%20report", "nightly report"),
        ("application_name=1%2B1%20%26%20100%25", "1+1 & 100%"),
        ("connect_timeout=3&keepalives=0&tcp_user_timeout=2", "fencelock"),
        ("keepalives=1&keepalives_idle=20&keepalives_interval=3&keepalives_retries=2", "fencelock"),
        ("channel_binding=disable&sslmode=disable&sslnegotiation=postgres", "fencelock"),
        ("target_session_attrs=any&sslmode=prefer", "fencelock"),
        ("host=127.0.0.1&application_name=twice", "twice"),
    ] {
        let provider = connected(&url(query)).await;
        let guard = take(&*provider, "x").await;
        assert_eq!(server.sql(NAMES), name, "{query}");
        released(guard).await;
        closed(&*provider).await;
        super::until(&server, NAMES, "").await;
    }
    // Where unqualified names are looked for.
    server.sql_as("app", "secret", "test", "CREATE SCHEMA elsewhere").expect("it owns the database");
    let provider = connected(&url("options=-c%20search_path%3Delsewhere&token_sequence=drawn")).await;
    released(take(&*provider, "x").await).await;
    assert_eq!(server.sql("select count(*) from elsewhere.drawn"), "1");
    assert_eq!(server.sql("select to_regclass('public.drawn') is null"), "t");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_of_ours() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let url = |query: &str| format!("{}?{query}", server.url());

    let provider = connected(&url("prefix=app&ttl=5s")).await;
    let guard = take(&*provider, "x").await;
    assert_eq!((holders(&server, lock_key("app:x")), holders(&server, lock_key("x"))), (1, 0));
    released(guard).await;

    let provider = connected(&url("max_hold=300ms&auto_renew=true")).await;
    let guard = take(&*provider, "x").await;
    assert_eq!(within("it is lost", guard.lost()).await, Loss::MaxHold);
    drop(guard);

    // Kept on the server after its release.
    let provider = connected(&url("hold_at_least=1s")).await;
    let began = Instant::now();
    released(take(&*provider, "y").await).await;
    assert_eq!(holders(&server, "y"), 1, "{:?}", began.elapsed());
    super::until_free(&server, "y").await;
    assert!(began.elapsed() >= secs(1), "{:?}", began.elapsed());

    let provider = connected(&url("ttl=1s&auto_renew=false")).await;
    let guard = take(&*provider, "x").await;
    assert_eq!(within("it is lost", guard.lost()).await, Loss::Expired);
    drop(guard);

    for (query, fairness) in
        [("", Fairness::Fifo), ("waiting_sessions=1", Fairness::Fifo), ("waiting_sessions=0", Fairness::None)]
    {
        let provider = connected(&url(query)).await;
        assert_eq!(provider.capabilities().fairness, fairness, "{query}");
    }

    let provider = connected(&url("token_sequence=mine")).await;
    let token = take(&*provider, "z").await.fencing_token();
    assert_eq!(server.sql("select last_value from mine"), token.to_string());

    // An open transaction holds it.
    let provider = connected(&url("transaction_scoped=true")).await;
    let guard = take(&*provider, "t").await;
    let open = "select count(*) from pg_stat_activity where state = 'idle in transaction'";
    assert_eq!(server.sql(open), "1");
    released(guard).await;
    super::until(&server, open, "0").await;
}

/// No server is asked: each of these is wrong whatever is there.
#[tokio::test]
async fn bad_urls_say_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.set_nonblocking(true).expect("a socket");
    let host = listener.local_addr().expect("it is bound").to_string();
    let began = Instant::now();
    for (url, says) in [
        ("postgres:", "names its host"),
        ("postgres:127.0.0.1", "names its host"),
        ("postgresql:HOST", "names its host"),
        ("postgres://", "names no host"),
        ("postgres:///test", "names no host"),
        ("postgres://app:never@127.0.0.1:never/test", "can't be read"),
        ("postgres://app:never@127.0.0.1:99999/test", "can't be read"),
        ("postgres://%FF:never@HOST/test", "can't be read"),
        ("postgres://app:never@HOST/%FF", "can't be read"),
        ("postgres://app:never@HOST/test?password=never", "this backend knows"),
        ("postgres://app:never@HOST/test?user=never", "this backend knows"),
        ("postgres://app:never@HOST/test?dbname=never", "this backend knows"),
        ("postgres://app:never@HOST/test?waiting_session=1", "this backend knows"),
        ("postgres://app:ne?never@HOST/test", "this backend knows"),
        ("postgres://app:never@HOST/test?sslmode=nonsense", "sslmode in the URL is"),
        ("postgres://app:never@HOST/test?sslmode=verify-ca", "sslmode in the URL is"),
        ("postgres://app:never@HOST/test?sslmode=", "sslmode in the URL is"),
        ("postgres://app:never@HOST/test?sslrootcert=%2Fnever", "sslrootcert needs sslmode=require"),
        ("postgres://app:never@HOST/test?sslrootcert=%2Fnever&sslmode=disable", "sslrootcert needs"),
        ("postgres://app:never@HOST/test?sslrootcert=%2Fnever&sslmode=prefer", "sslrootcert needs"),
        ("postgres://app:never@HOST/test?ttl=100ms", "minimum"),
        ("postgres://app:never@HOST/test?ttl=199ms", "minimum"),
        ("postgres://app:never@HOST/test?ttl=30d", "maximum"),
        ("postgres://app:never@HOST/test?ttl=10", "ttl=30s"),
        ("postgres://app:never@HOST/test?auto_renew=maybe", "true or false"),
        ("postgres://app:never@HOST/test?prefix=", "prefix"),
        ("postgres://app:never@HOST/test?prefix=a%20b", "prefix"),
        ("postgres://app:never@HOST/test?prefix=a:b", "prefix"),
        ("postgres://app:never@HOST/test?waiting_sessions=x", "waiting_sessions in the URL must be a whole"),
        ("postgres://app:never@HOST/test?waiting_sessions=-1", "whole number"),
        ("postgres://app:never@HOST/test?waiting_sessions=1&waiting_sessions=1", "twice"),
        ("postgres://app:never@HOST/test?token_sequence=a.b.c", "`schema.name`"),
        ("postgres://app:never@HOST/test?token_sequence=", "`schema.name`"),
        ("postgres://app:never@HOST/test?token_sequence=a.", "`schema.name`"),
        ("postgres://app:never@HOST/test?transaction_scoped=maybe", "true or false"),
        ("postgres://app:never@HOST/test?target_session_attrs=never", "can't be read"),
        ("postgres://app:never@HOST/test?connect_timeout=never", "can't be read"),
        ("postgres://app:never@HOST/test?keepalives=never", "can't be read"),
        ("postgres://app:never@HOST/test?channel_binding=never", "can't be read"),
        ("postgres://app:never@HOST/test?load_balance_hosts=never", "can't be read"),
        ("postgres://app:never@HOST/test?hostaddr=never", "can't be read"),
    ] {
        let url = url.replace("HOST", &host);
        let error = refused(&url).await;
        let said = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Config, "{url}: {said}");
        assert!(said.contains(says), "{url}: {said}");
        assert!(!said.contains(&host), "{url} is echoed: {said}");
    }
    assert!(began.elapsed() < secs(5));
    let nobody = listener.accept().expect_err("nobody has connected");
    assert_eq!(nobody.kind(), IoErrorKind::WouldBlock);
}

#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
#[tokio::test]
async fn without_a_tls_feature_it_is_named() {
    for query in ["sslmode=require", "sslmode=verify-full", "sslmode=require&sslrootcert=%2Fnever"] {
        let error = refused(&format!("postgres://app:never@127.0.0.1/test?{query}")).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));
        for feature in ["`rustls`", "`native-tls`"] {
            assert!(error.to_string().contains(feature), "{error}");
        }
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable_at_once() {
    for host in [format!("127.0.0.1:{}", free_port()), "no-such-host.invalid".into(), "%2Fnowhere".into()] {
        let began = Instant::now();
        let error = refused(&format!("postgres://app:never@{host}/test")).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
        assert_eq!(error.backend(), Some("postgres"));
        assert!(error.is_retryable());
        assert!(error.to_string().contains("postgres"), "{error}");
        assert!(began.elapsed() < secs(5), "{host}: {:?}", began.elapsed());
    }
}

/// It is not left to the driver, which would wait for ever.
#[tokio::test]
async fn a_server_that_never_answers_is_unavailable_after_some_seconds() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let host = listener.local_addr().expect("it is bound");
    for query in ["", "?transaction_scoped=true", "?waiting_sessions=0"] {
        let began = Instant::now();
        let error = refused(&format!("postgres://app:never@{host}/test{query}")).await;
        let took = began.elapsed();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
        assert_eq!(error.backend(), Some("postgres"));
        assert!(took > ms(4500) && took < secs(8), "{query}: {took:?}");
    }
}

/// A provider of one's own can be made before its server is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_starts_before_its_server_does() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    server.kill();
    let locks = PostgresLocks::new(config(&server.url()));
    let error = within("connect", Box::pin(locks.connect())).await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    let provider = super::built(locks, secs(5));
    assert_eq!(fails(&provider, "x").await.kind(), ErrorKind::Unavailable);
    let waiter = super::waits(&provider, "x");
    server.restart();
    released(super::granted(waiter).await).await;
    within("connect", Box::pin(provider.backend().connect())).await.expect("it is there");
}
