//! `rediss:`, with rustls and with the system's TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fencelock::ErrorKind;
use fencelock::redis::RedisLocks;
use fencelock::redis::driver::{Client, TlsCertificates};
use tempfile::TempDir;

use super::common::secs;
use super::servers::redis::RedisServer;
use super::servers::{left_out, program};
use super::{built, connected, everything, is_free, refused, shows_what_it_can};

/// An authority, and what it has issued to `localhost` and 127.0.0.1.
struct Authority {
    dir: TempDir,
}

impl Authority {
    fn new() -> Self {
        let authority = Self { dir: TempDir::new().expect("a directory") };
        fs::write(authority.file("extensions"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n")
            .expect("written");
        let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let own = ["req", "-x509", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"];
        authority.openssl(&[&own[..], &new_key].concat());
        let request = ["req", "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.request"];
        authority.openssl(&[&request[..], &new_key].concat());
        authority.openssl(&[
            "x509",
            "-req",
            "-in",
            "server.request",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-set_serial",
            "1",
            "-days",
            "2",
            "-extfile",
            "extensions",
            "-out",
            "server.pem",
        ]);
        authority
    }

    fn openssl(&self, arguments: &[&str]) {
        let mut command = Command::new(program("openssl", "openssl"));
        let made = command.args(arguments).current_dir(self.dir.path()).output().expect("it starts");
        assert!(made.status.success(), "{made:?}");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn certificate(&self) -> PathBuf {
        self.file("ca.pem")
    }

    fn server(&self) -> RedisServer {
        let [certificate, key] = ["server.pem", "server.key"].map(|name| self.file(name));
        RedisServer::options().tls(&certificate, &key, &self.certificate()).start()
    }
}

fn assert_untrusted(error: &fencelock::Error) {
    let said = everything(error);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{said}");
    assert!(said.to_lowercase().contains("certificate"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_an_unknown_authority_is_refused() {
    if left_out("redis") {
        return;
    }
    let redis = Authority::new().server();
    assert_untrusted(&refused(&format!("rediss://localhost:{}", redis.tls_port())).await);
    assert_untrusted(&refused(&format!("rediss://127.0.0.1:{}", redis.tls_port())).await);
    // Where nobody speaks TLS.
    let error = refused(&format!("rediss://127.0.0.1:{}", redis.port())).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_an_authority_of_its_own_works() {
    if left_out("redis") {
        return;
    }
    let authority = Authority::new();
    let redis = authority.server();
    let provider = |host: &str| {
        let root_cert = Some(fs::read(authority.certificate()).expect("it was made"));
        let url = format!("rediss://{host}:{}", redis.tls_port());
        let client = Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert });
        built(RedisLocks::new(client.expect("a certificate of ours")), secs(10))
    };
    let (one, other) = (provider("localhost"), provider("127.0.0.1"));
    shows_what_it_can(&one, &other, &redis, "x").await;
}

/// Runs a test of this program in a process of its own, which an environment and the process' one provider of
/// cryptography need.
fn run_alone(test: &str, trusted: &Path, variables: &[(&str, String)]) {
    let mut command = Command::new(std::env::current_exe().expect("it is known"));
    command.args(["--exact", test, "--nocapture"]).env("SSL_CERT_FILE", trusted).env_remove("SSL_CERT_DIR");
    let ran = command.envs(variables.iter().cloned()).output().expect("it starts");
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.contains("1 passed"), "{test}: {ran:?}");
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

const URL: &str = "FENCELOCK_TLS_URL";
const TRUSTED: &str = "FENCELOCK_TLS_TRUSTED";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_system_trusts_is_trusted() {
    if let (Some(url), Some(trusted)) = (variable(URL), variable(TRUSTED)) {
        match &*trusted {
            "yes" => {
                let (one, other) = (connected(&url).await, connected(&url).await);
                let guard = super::take(&*one, "x").await;
                assert!(!is_free(&*other, "x").await);
                guard.release().await.expect("released");
            }
            _ => assert_untrusted(&refused(&url).await),
        }
        return;
    }
    if left_out("redis") {
        return;
    }
    let (authority, another) = (Authority::new(), Authority::new());
    let redis = authority.server();
    let nodes = [authority.server(), authority.server()];
    let port = redis.tls_port();
    let redlock = format!(
        "redlock://localhost:{port},localhost:{},127.0.0.1:{}?tls=true",
        nodes[0].tls_port(),
        nodes[1].tls_port()
    );
    for url in [format!("rediss://localhost:{port}"), format!("rediss://127.0.0.1:{port}/1"), redlock] {
        for (authority, trusted) in [(&authority, "yes"), (&another, "no")] {
            let variables = [(URL, url.clone()), (TRUSTED, trusted.to_owned())];
            run_alone("tls::what_the_system_trusts_is_trusted", &authority.certificate(), &variables);
        }
    }
}

/// The Sentinel, the master that it names, and the way to both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_speak_tls_too() {
    if let Some(url) = variable(URL) {
        let (one, other) = (connected(&url).await, connected(&url).await);
        let guard = super::take(&*one, "x").await;
        assert!(!is_free(&*other, "x").await);
        guard.release().await.expect("released");
        return;
    }
    if left_out("redis") {
        return;
    }
    let authority = Authority::new();
    let [certificate, key] = ["server.pem", "server.key"].map(|name| authority.file(name));
    let master = authority.server();
    let secure = ([127, 0, 0, 1], master.tls_port()).into();
    let sentinel = RedisServer::options()
        .tls(&certificate, &key, &authority.certificate())
        .config("tls-replication", "yes") // a Sentinel speaks TLS to its master by this
        .sentinel("mymaster", secure, 1)
        .start();
    let url = format!("rediss://localhost:{}?sentinel=mymaster", sentinel.tls_port());
    run_alone("tls::sentinels_speak_tls_too", &authority.certificate(), &[(URL, url)]);
}

#[cfg(feature = "rustls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rustls_has_a_provider_of_cryptography_whoever_installs_it() {
    use rustls::crypto::CryptoProvider;
    const INSTALLED: &str = "FENCELOCK_TLS_INSTALLED";

    if let (Some(url), Some(installed)) = (variable(URL), variable(INSTALLED)) {
        assert!(CryptoProvider::get_default().is_none(), "this process has one already");
        let mut own = rustls::crypto::ring::default_provider();
        own.cipher_suites.truncate(1);
        if installed == "yes" {
            own.install_default().expect("it is the first");
        }
        let guard = super::take(&*connected(&url).await, "x").await;
        guard.release().await.expect("released"); // before the process ends
        let provider = CryptoProvider::get_default().expect("one is installed now");
        assert_eq!(provider.cipher_suites.len() == 1, installed == "yes", "the application's own stays");
        return;
    }
    if left_out("redis") {
        return;
    }
    let authority = Authority::new();
    let redis = authority.server();
    for installed in ["yes", "no"] {
        let url = format!("rediss://localhost:{}", redis.tls_port());
        run_alone(
            "tls::rustls_has_a_provider_of_cryptography_whoever_installs_it",
            &authority.certificate(),
            &[(URL, url), (INSTALLED, installed.to_owned())],
        );
    }
}
