//! What stands in a URL or a connection string, right and wrong.

use std::io::ErrorKind as IoErrorKind;
use std::net::TcpListener;
use std::time::Instant;

use fencelock::sqlserver::SqlServerLocks;
use fencelock::{ErrorKind, Fairness, LockProvider, Loss};

use super::common::secs;
use super::servers::left_out;
use super::servers::sqlserver::{DATABASE, PASSWORD as SECRET, SqlServer, USER};
use super::servers::sqlserver_locks::Place;
use super::{
    PASSWORD, assert_no_secret, closed, connected, encoded, everything, excludes, refused, released,
    shows_what_it_can, take, within,
};

/// URLs with all that may need to be encoded, and connection strings of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_way_to_write_it_leads_there() {
    if left_out("sqlserver") {
        return;
    }
    let odd = "Dev's /ice@:";
    let server = SqlServer::options().login(odd, PASSWORD).login("alice", PASSWORD).start();
    let (port, password) = (server.port(), encoded(PASSWORD));
    let known = connected(&server.url()).await;
    for url in [
        format!("sqlserver://{USER}:{SECRET}@localhost:{port}/{DATABASE}?encrypt=off"),
        format!("SQLSERVER://{USER}:{SECRET}@127.0.0.1:{port}/{DATABASE}?encrypt=off"),
        format!("sqlserver://{USER}:{SECRET}@127.0.0.1:{port}/LOCKS?encrypt=off"),
        format!("sqlserver://{USER}:{SECRET}@127.0.0.1:{port}?encrypt=off&database={DATABASE}"),
        format!("sqlserver://{USER}:{SECRET}@127.0.0.1:{port}/?encrypt=off&databaseName={DATABASE}"),
        format!("sqlserver://alice:{password}@127.0.0.1:{port}/{DATABASE}?encrypt=off"),
        format!("sqlserver://{}:{password}@127.0.0.1:{port}/{DATABASE}?encrypt=off&ttl=5s", encoded(odd)),
        format!("sqlserver://{USER}:{SECRET}@127.0.0.1:{port}/%6C%6F%63%6Bs?encrypt=off"),
        // It stays on this machine, and the server has no TLS.
        format!("sqlserver://alice:{password}@127.0.0.1:{port}/{DATABASE}"),
        format!("sqlserver://alice:{password}@localhost:{port}/{DATABASE}"),
        format!("jdbc:sqlserver://127.0.0.1:{port};database={DATABASE};user=alice;password={{{PASSWORD}}}"),
        format!(
            "jdbc:sqlserver://localhost:{port};databaseName={DATABASE};user=alice;password={{{PASSWORD}}};encrypt=DANGER_PLAINTEXT"
        ),
        format!("Server=tcp:127.0.0.1,{port};Database={DATABASE};User ID=alice;Password='{PASSWORD}'"),
        format!(
            "server=127.0.0.1,{port};Initial Catalog={DATABASE};uid=alice;pwd=\"{PASSWORD}\";Encrypt=DANGER_PLAINTEXT"
        ),
    ] {
        let provider = connected(&url).await;
        excludes(&*provider, &*known, &server, "x").await;
        let guard = take(&*provider, "x").await;
        assert_no_secret(&format!("{provider:?} {:?} {guard:?}", provider.create_lock("x")));
        released(guard).await;
        closed(&*provider).await;
    }
    // The same by the constructors.
    let ado = format!("Server=tcp:127.0.0.1,{port};Database={DATABASE};User ID=alice;Password='{PASSWORD}'");
    let jdbc =
        format!("jdbc:sqlserver://127.0.0.1:{port};database={DATABASE};user=alice;password={{{PASSWORD}}}");
    for locks in [SqlServerLocks::from_ado_string(&ado), SqlServerLocks::from_jdbc_string(&jdbc)] {
        let locks = locks.expect("it can be read");
        assert_no_secret(&format!("{locks:?}"));
        excludes(&super::built(locks, secs(10)), &*known, &server, "x").await;
    }
}

/// An address of IPv6 is one, in brackets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_of_ipv6_is_understood() {
    let listener = match TcpListener::bind("[::1]:0") {
        Ok(listener) => listener,
        Err(error) => return eprintln!("this machine has no IPv6, so this shows nothing: {error}"),
    };
    let port = listener.local_addr().expect("it is bound").port();
    let url = format!("sqlserver://app:never@[::1]:{port}/{DATABASE}?encrypt=off");
    let asked = tokio::spawn(async move { refused(&url).await });
    let (stream, _) = within("somebody comes", tokio::task::spawn_blocking(move || listener.accept()))
        .await
        .expect("no panic")
        .expect("a connection");
    drop(stream);
    assert_eq!(within("an answer", asked).await.expect("no panic").kind(), ErrorKind::Unavailable);
}

/// What the driver does with them is its own affair; here they are read, in all spellings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_of_the_driver() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::start();
    for query in [
        "application_name=nightly%20report",
        "applicationName=nightly",
        "multi_subnet_failover=true",
        "multiSubnetFailover=no",
        "multi_subnet_failover=yes",
        "trust_server_certificate=true",
        "trustServerCertificate=false",
        "TrustServerCertificate=TRUE",
        "host_name_in_certificate=db.example",
        "hostNameInCertificate=db.example",
        "ttl=5s",
    ] {
        let provider = connected(&format!("{}&{query}", server.url())).await;
        released(take(&*provider, "x").await).await;
        closed(&*provider).await;
    }
    for off in ["off", "OFF", "false", "no", "disable", "disabled"] {
        let url = server.url().replace("encrypt=off", &format!("encrypt={off}"));
        released(take(&*connected(&url).await, "x").await).await;
    }
}

/// The port of a named instance is asked for; here nobody knows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_nobody_knows_is_unavailable() {
    for parameter in ["instance=NAME", "instanceName=NAME"] {
        let began = Instant::now();
        let error = refused(&format!("sqlserver://app:never@127.0.0.1/locks?encrypt=off&{parameter}")).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
        assert!(began.elapsed() < secs(8), "{:?}", began.elapsed());
    }
}

/// What this crate adds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_of_ours() {
    if left_out("sqlserver") {
        return;
    }
    let server = SqlServer::options().login("reports", SECRET).start();
    let url = |query: &str| format!("{}&{query}", server.url());

    let provider = connected(&url("prefix=app&ttl=5s")).await;
    let guard = take(&*provider, "x").await;
    assert_ne!(server.holder(DATABASE, "app%3Ax"), None);
    assert_eq!(server.holder(DATABASE, "x"), None);
    released(guard).await;

    let provider = connected(&url("max_hold=300ms&auto_renew=true")).await;
    let guard = take(&*provider, "x").await;
    assert_eq!(within("it is lost", guard.lost()).await, Loss::MaxHold);
    drop(guard);

    // Kept after its release.
    let provider = connected(&url("hold_at_least=1s")).await;
    let began = Instant::now();
    released(take(&*provider, "y").await).await;
    assert_ne!(server.holder(DATABASE, "y"), None, "{:?}", began.elapsed());
    server.until_free(DATABASE, "y").await;
    assert!(began.elapsed() >= secs(1), "{:?}", began.elapsed());

    let provider = connected(&url("ttl=1s&auto_renew=false")).await;
    let guard = take(&*provider, "x").await;
    assert_eq!(within("it is lost", guard.lost()).await, Loss::Expired);
    drop(guard);

    for (query, fairness) in [
        ("ttl=3s", Fairness::Fifo),
        ("waiting_sessions=1", Fairness::Fifo),
        ("waiting_sessions=0", Fairness::None),
    ] {
        let provider = connected(&url(query)).await;
        assert_eq!(provider.capabilities().fairness, fairness, "{query}");
    }

    let provider = connected(&url("token_table=dbo.mine")).await;
    released(take(&*provider, "z").await).await;
    let rows = Place::of(&server).sql(DATABASE, "SELECT bucket FROM dbo.mine").await.expect("it is made");
    assert!(!rows.is_empty());

    let (one, other) =
        (connected(&url("db_principal=reports")).await, connected(&url("db_principal=reports")).await);
    let public = take(&*connected(&server.url()).await, "x").await;
    drop(public);
    shows_what_it_can(&*one, &*other, &server, DATABASE, "x", "x").await;
    let mut held = take(&*one, "x").await;
    let described = format!("{DATABASE}/reports/x");
    assert!(server.sessions().iter().any(|session| session.holds.contains(&described)));
    held = {
        released(held).await;
        take(&*other, "x").await
    };
    released(held).await;
}

/// No server is asked: each of these is wrong whatever is there.
#[tokio::test]
async fn bad_urls_say_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.set_nonblocking(true).expect("a socket");
    let host = listener.local_addr().expect("it is bound").to_string();
    let port = listener.local_addr().expect("it is bound").port().to_string();
    let began = Instant::now();
    for (url, says) in [
        ("sqlserver:", "sqlserver://USER:PASSWORD@HOST"),
        ("sqlserver:HOST", "sqlserver://USER:PASSWORD@HOST"),
        ("sqlserver://", "sqlserver://USER:PASSWORD@HOST"),
        ("sqlserver:///locks", "sqlserver://USER:PASSWORD@HOST"),
        ("sqlserver://app:never@/locks", "can't be read"),
        ("sqlserver://app:never@127.0.0.1:never/locks", "can't be read"),
        ("sqlserver://app:never@127.0.0.1:99999/locks", "can't be read"),
        ("sqlserver://app:never@127.0.0.1:0/locks", "can't be read"),
        ("sqlserver://app:never@::1/locks", "can't be read"),
        ("sqlserver://app:never@HOST,HOST/locks", "can't be read"),
        ("sqlserver://app:never@127.0.0.1\\NAME/locks", "can't be read"),
        ("sqlserver://%FF:never@HOST/locks", "can't be read"),
        ("sqlserver://app:%FF@HOST/locks", "can't be read"),
        ("sqlserver://app:never@HOST/%FF", "can't be read"),
        ("sqlserver://app:never@HOST/locks/more", "can't be read"),
        ("sqlserver://app:never@HOST/locks?database=locks", "can't be read"),
        ("sqlserver://app:ne/ver@HOST/locks", "can't be read"),
        ("sqlserver://app:never@HOST/locks?password=never", "this backend knows"),
        ("sqlserver://app:never@HOST/locks?user=never", "this backend knows"),
        ("sqlserver://app:never@HOST/locks?waiting_session=1", "this backend knows"),
        ("sqlserver://app:ne?never@HOST/locks", "this backend knows"),
        ("sqlserver://app:never@HOST/locks?encrypt=nonsense", "on, strict, login or off"),
        ("sqlserver://app:never@HOST/locks?encrypt=", "on, strict, login or off"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&encrypt=off", "twice"),
        ("sqlserver://app:never@HOST/locks?application_name=a&applicationName=a", "twice"),
        ("sqlserver://app:never@HOST?database=a&databaseName=a", "twice"),
        ("sqlserver://app:never@HOST/locks?instance=a&instanceName=a", "twice"),
        ("sqlserver://app:never@HOST/locks?trust_server_certificate=no&trustServerCertificate=no", "twice"),
        ("sqlserver://app:never@HOST/locks?host_name_in_certificate=a&hostNameInCertificate=a", "twice"),
        ("sqlserver://app:never@HOST/locks?multi_subnet_failover=no&multiSubnetFailover=no", "twice"),
        (
            "sqlserver://app:never@HOST/locks?trust_server_certificate_ca=a&trustServerCertificateCA=a",
            "twice",
        ),
        ("sqlserver://app:never@HOST/locks?trust_server_certificate=maybe", "true or false"),
        ("sqlserver://app:never@HOST/locks?multi_subnet_failover=maybe", "true or false"),
        (
            "sqlserver://app:never@HOST/locks?trust_server_certificate=true&trust_server_certificate_ca=%2Fnever",
            "would say nothing",
        ),
        ("sqlserver://app:never@HOST/locks?encrypt=off&ttl=100ms", "minimum"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&ttl=199ms", "minimum"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&ttl=30d", "maximum"),
        ("sqlserver://app:never@HOST/locks?ttl=10", "ttl=30s"),
        ("sqlserver://app:never@HOST/locks?auto_renew=maybe", "true or false"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&prefix=", "prefix"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&prefix=a%20b", "prefix"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&waiting_sessions=x", "whole number"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&waiting_sessions=-1", "whole number"),
        ("sqlserver://app:never@HOST/locks?waiting_sessions=1&waiting_sessions=1", "twice"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&token_table=a.b.c", "`schema.name`"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&token_table=", "`schema.name`"),
        ("sqlserver://app:never@HOST/locks?encrypt=off&db_principal=", "principal"),
        ("jdbc:sqlserver://HOST;database=locks;user=app;password={never", "jdbc:sqlserver://HOST:PORT"),
        ("jdbc:postgresql://HOST/locks?password=never", "jdbc:sqlserver://HOST:PORT"),
        ("jdbc:sqlserver://;serverName=HOST;user=app;password=never", "names no server"),
        ("jdbc:sqlserver://HOST; database=locks;user=app;password=never", "no blank"),
        ("jdbc:sqlserver://HOST;encrypt =strict;user=app;password=never", "no blank"),
        ("Database=locks;User ID=app;Password=never", "names no server"),
        ("Address=tcp:127.0.0.1,PORT;Password=never", "names no server"),
        ("Server=tcp:127.0.0.1,PORT;Addr=db;Password=never", "`Server` or `Data Source`"),
        ("Server=tcp:127.0.0.1,PORT;Password='never", "Server=tcp:HOST,PORT"),
        ("Server=tcp:127.0.0.1,never;Password=never", "Server=tcp:HOST,PORT"),
    ] {
        let url = if url.contains("jdbc") || says.contains("HOST") {
            url.replace("//HOST", &format!("//{host}"))
        } else {
            url.replace("HOST", &host)
        };
        let url = url.replace("PORT", &port);
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

/// Without a login it would be the Windows user's.
#[cfg(not(windows))]
#[tokio::test]
async fn a_url_without_a_login_is_refused() {
    let error = refused("sqlserver://127.0.0.1:1/locks?encrypt=off").await;
    assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
    assert!(error.to_string().contains("names no user"), "{error}");
}

/// Both connection strings and URLs.
#[cfg(not(feature = "rustls"))]
#[tokio::test]
async fn without_a_tls_feature_it_is_named() {
    for url in [
        "sqlserver://app:never@127.0.0.1:1/locks?encrypt=on",
        "sqlserver://app:never@127.0.0.1:1/locks?encrypt=strict",
        "sqlserver://app:never@127.0.0.1:1/locks?encrypt=login",
        "sqlserver://app:never@db.example/locks",
        "jdbc:sqlserver://db.example;database=locks;user=app;password=never",
        "jdbc:sqlserver://127.0.0.1:1;database=locks;user=app;password=never;encrypt=true",
        "Server=tcp:127.0.0.1,1;Database=locks;User ID=app;Password=never;Encrypt=true",
        "Server=tcp:db.example,1433;Database=locks;User ID=app;Password=never",
    ] {
        let error = refused(url).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{url}: {}", everything(&error));
        for feature in ["`rustls`", "`native-tls`"] {
            assert!(error.to_string().contains(feature), "{error}");
        }
    }
}
