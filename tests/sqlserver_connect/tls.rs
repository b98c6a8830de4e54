//! `encrypt` and whom to trust, with rustls.

use std::time::Instant;

use fencelock::ErrorKind;

use super::common::secs;
use super::servers::authority::Authority;
use super::servers::left_out;
use super::servers::sqlserver::{DATABASE, PASSWORD as SECRET, SqlServer, SqlServerOptions, USER};
use super::{connected, encoded, everything, excludes, refused, released, take};

/// The authority's certificate as a parameter.
fn trusted(authority: &Authority) -> String {
    format!("trust_server_certificate_ca={}", encoded(&authority.file("ca.pem").display().to_string()))
}

fn options(authority: &Authority) -> SqlServerOptions {
    SqlServer::options().tls(&authority.file("server.pem"), &authority.file("server.key"))
}

/// To which everything has to come encrypted.
fn server(authority: &Authority) -> SqlServer {
    options(authority).requires_tls().start()
}

fn url(server: &SqlServer, host: &str, query: &str) -> String {
    format!("sqlserver://{USER}:{SECRET}@{host}:{}/{DATABASE}?{query}", server.port())
}

/// Before anybody has logged in.
async fn assert_untrusted(server: &SqlServer, host: &str, query: &str) {
    let began = Instant::now();
    let error = refused(&url(server, host, query)).await;
    assert!(began.elapsed() < secs(4), "{query}: {:?}", began.elapsed());
    let said = everything(&error);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{query}: {said}");
    assert!(said.to_lowercase().contains("certificate"), "{query}: {said}");
    assert!(server.sessions().is_empty() && server.requests() == 0, "{query}");
}

/// By `trust_server_certificate_ca`, in each way to encrypt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_of_its_own_is_trusted() {
    if left_out("sqlserver") {
        return;
    }
    let authority = Authority::new();
    let server = server(&authority);
    let trusted = trusted(&authority);
    for host in ["localhost", "127.0.0.1"] {
        for encrypt in ["encrypt=on&", "encrypt=true&", "encrypt=mandatory&", "encrypt=strict&", ""] {
            let url = url(&server, host, &format!("{encrypt}{trusted}"));
            excludes(&*connected(&url).await, &*connected(&url).await, &server, "x").await;
        }
    }
}

/// Neither by another authority, nor by the system, nor under another name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_not() {
    if left_out("sqlserver") {
        return;
    }
    let (authority, another) = (Authority::new(), Authority::new());
    let named = server(&authority);
    for host in ["localhost", "127.0.0.1"] {
        for encrypt in ["on", "strict", "login"] {
            assert_untrusted(&named, host, &format!("encrypt={encrypt}&{}", trusted(&another))).await;
            assert_untrusted(&named, host, &format!("encrypt={encrypt}")).await;
        }
        // Who says whom to trust is heeded where it would do without, too.
        assert_untrusted(&named, host, &trusted(&another)).await;
        assert_untrusted(&named, host, "trust_server_certificate=false&encrypt=on").await;
    }
    let elsewhere = Authority::of("DNS:elsewhere.example");
    let server = server(&elsewhere);
    assert_untrusted(&server, "localhost", &format!("encrypt=on&{}", trusted(&elsewhere))).await;
    // Unless it is expected to be called so.
    let expected = format!("encrypt=on&host_name_in_certificate=elsewhere.example&{}", trusted(&elsewhere));
    released(take(&*connected(&url(&server, "localhost", &expected)).await, "x").await).await;
}

/// Any certificate will do where that is said, and on this machine unless something else is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_is_taken_where_that_is_said() {
    if left_out("sqlserver") {
        return;
    }
    let server = server(&Authority::of("DNS:elsewhere.example"));
    for query in ["trust_server_certificate=true", "trust_server_certificate=true&encrypt=on", "ttl=5s"] {
        for host in ["localhost", "127.0.0.1"] {
            released(take(&*connected(&url(&server, host, query)).await, "x").await).await;
        }
    }
    let port = server.port();
    for string in [
        format!("jdbc:sqlserver://127.0.0.1:{port};database={DATABASE};user={USER};password={SECRET}"),
        format!("Server=tcp:127.0.0.1,{port};Database={DATABASE};User ID={USER};Password={SECRET}"),
        format!(
            "Server=127.0.0.1,{port};Database={DATABASE};uid={USER};pwd={SECRET};TrustServerCertificate=true;Encrypt=true"
        ),
    ] {
        released(take(&*connected(&string).await, "x").await).await;
    }
}

/// What the URL wants, and what the server has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_for_and_what_is_offered_must_fit() {
    if left_out("sqlserver") {
        return;
    }
    let authority = Authority::new();
    // The server wants it, and the URL doesn't.
    let strict = server(&authority);
    let error = refused(&url(&strict, "127.0.0.1", "encrypt=off")).await;
    assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Config), "{}", everything(&error));
    assert!(strict.sessions().is_empty());
    // The URL wants it, and the server has none.
    let plain = SqlServer::start();
    let error = refused(&url(&plain, "127.0.0.1", &format!("encrypt=on&{}", trusted(&authority)))).await;
    assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
    assert!(error.to_string().contains("encrypt=off"), "{error}");
    assert!(plain.sessions().is_empty() && plain.requests() == 0);
    // On this machine it isn't needed, unless it is asked for.
    for query in ["", "encrypt=off"] {
        released(take(&*connected(&url(&plain, "127.0.0.1", query)).await, "x").await).await;
    }
    // A server that offers it and takes who comes without.
    let both = options(&authority).start();
    let port = both.port();
    for string in [
        // By which drivers mean that the login is encrypted.
        format!(
            "jdbc:sqlserver://127.0.0.1:{port};database={DATABASE};user={USER};password={SECRET};encrypt=false;trustServerCertificate=true"
        ),
        format!(
            "Server=127.0.0.1,{port};Database={DATABASE};uid={USER};pwd={SECRET};Encrypt=false;TrustServerCertificate=true"
        ),
    ] {
        released(take(&*connected(&string).await, "x").await).await;
    }
    for query in ["encrypt=off", "", &format!("encrypt=login&{}", trusted(&authority))] {
        released(take(&*connected(&url(&both, "127.0.0.1", query)).await, "x").await).await;
    }
}
