//! `sslmode`, with rustls and with the system's TLS.

use std::fs;
use std::time::Instant;

use fencelock::ErrorKind;
use tempfile::TempDir;

use super::common::secs;
use super::servers::authority::Authority;
use super::servers::left_out;
use super::servers::postgres::{PostgresOptions, PostgresServer};
use super::{connected, encoded, everything, refused, released, shows_what_it_can, take};

/// The authority's certificate as a parameter.
fn trusted(authority: &Authority) -> String {
    format!("sslrootcert={}", encoded(&authority.file("ca.pem").display().to_string()))
}

fn options(authority: &Authority) -> PostgresOptions {
    PostgresServer::options().tls(&authority.file("server.pem"), &authority.file("server.key"), None)
}

/// Whose user `app` has to come over TLS.
fn encrypted(authority: &Authority) -> PostgresServer {
    options(authority).hba("hostnossl all app all reject").start()
}

fn url(server: &PostgresServer, host: &str, query: &str) -> String {
    format!("postgres://app:secret@{host}:{}/test?{query}", server.port())
}

/// How many of the sessions of the user are encrypted, and how many aren't.
const ENCRYPTED: &str = "select count(*) filter (where ssl) || ' ' || count(*) filter (where not ssl) \
     from pg_stat_ssl join pg_stat_activity using (pid) where usename = 'app'";

/// What it is refused with, soon.
async fn soon_refused(url: &str) -> fencelock::Error {
    let began = Instant::now();
    let error = refused(url).await;
    assert!(began.elapsed() < secs(4), "{url}: {:?}", began.elapsed());
    error
}

async fn assert_untrusted(url: &str) {
    let error = soon_refused(url).await;
    let said = everything(&error);
    assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Denied), "{said}");
    assert!(said.to_lowercase().contains("certificate"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_of_its_own_is_trusted() {
    if left_out("postgres") {
        return;
    }
    let authority = Authority::new();
    let server = encrypted(&authority);
    let trusted = trusted(&authority);
    let one = connected(&url(&server, "localhost", &format!("sslmode=require&{trusted}"))).await;
    let other = connected(&url(&server, "127.0.0.1", &format!("sslmode=verify-full&{trusted}"))).await;
    shows_what_it_can(&*one, &*other, &server, "x").await;
    let sessions = server.sql(ENCRYPTED);
    assert!(sessions.ends_with(" 0") && !sessions.starts_with('0'), "{sessions}");
    let scoped = format!("sslmode=require&transaction_scoped=true&{trusted}");
    shows_what_it_can(&*connected(&url(&server, "localhost", &scoped)).await, &*one, &server, "y").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_not() {
    if left_out("postgres") {
        return;
    }
    let (authority, another) = (Authority::new(), Authority::new());
    let elsewhere = Authority::of("DNS:elsewhere.example,IP:127.0.0.9");
    let server = encrypted(&authority);
    for mode in ["require", "verify-full"] {
        for host in ["localhost", "127.0.0.1"] {
            // Neither by somebody else, nor by the system.
            assert_untrusted(&url(&server, host, &format!("sslmode={mode}&{}", trusted(&another)))).await;
            assert_untrusted(&url(&server, host, &format!("sslmode={mode}"))).await;
        }
    }
    // The right authority, and another's name.
    let server = encrypted(&elsewhere);
    for host in ["localhost", "127.0.0.1"] {
        assert_untrusted(&url(&server, host, &format!("sslmode=require&{}", trusted(&elsewhere)))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_mode_it_takes_what_there_is() {
    if left_out("postgres") {
        return;
    }
    // Whoever has issued the certificate, to whomever.
    let server = encrypted(&Authority::of("DNS:elsewhere.example"));
    for query in ["", "sslmode=prefer"] {
        let provider = connected(&url(&server, "127.0.0.1", query)).await;
        released(take(&*provider, "x").await).await;
        super::until(&server, ENCRYPTED, "1 0").await;
        super::closed(&*provider).await;
        super::until(&server, ENCRYPTED, "0 0").await;
    }
    // Where there is none.
    let plain = PostgresServer::start();
    for query in ["", "sslmode=prefer", "sslmode=disable"] {
        released(take(&*connected(&url(&plain, "127.0.0.1", query)).await, "x").await).await;
    }
    // Over a socket there never is.
    let socket = encoded(&server.socket_dir().display().to_string());
    released(take(&*connected(&url(&server, &socket, "")).await, "x").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_for_and_what_is_offered_must_fit() {
    if left_out("postgres") {
        return;
    }
    let authority = Authority::new();
    let server = encrypted(&authority);
    // The server wants it, and the URL doesn't.
    let error = soon_refused(&url(&server, "127.0.0.1", "sslmode=disable")).await;
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", everything(&error));
    // The URL wants it, and the server has none.
    let plain = PostgresServer::start();
    for query in ["sslmode=require", "sslmode=verify-full"] {
        let query = format!("{query}&{}", trusted(&authority));
        let error = soon_refused(&url(&plain, "127.0.0.1", &query)).await;
        let said = everything(&error);
        assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Config), "{said}");
        assert!(said.to_lowercase().contains("tls"), "{said}");
    }
    // A server that offers it and takes who comes without.
    let both = options(&authority).start();
    let provider = connected(&url(&both, "127.0.0.1", "sslmode=disable")).await;
    released(take(&*provider, "x").await).await;
    super::until(&both, ENCRYPTED, "0 1").await;
}

#[tokio::test]
async fn a_file_without_certificates_is_a_mistake() {
    if left_out("postgres") {
        return;
    }
    let dir = TempDir::new().expect("a directory");
    let file = |name: &str, content: &str| {
        fs::write(dir.path().join(name), content).expect("written");
        encoded(&dir.path().join(name).display().to_string())
    };
    for file in [
        "%2Fno%2Fsuch%2Ffile".to_owned(),
        file("empty", ""),
        file("other", "never a certificate"),
        file("broken", "-----BEGIN CERTIFICATE-----\nnever\n-----END CERTIFICATE-----\n"),
    ] {
        // Nobody is asked: nobody is there.
        let error =
            refused(&format!("postgres://app:never@127.0.0.1:1/test?sslmode=require&sslrootcert={file}"))
                .await;
        assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
    }
}
