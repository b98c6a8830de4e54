//! What `tests/servers` does to Azurite really happens, and Azurite does what tests of Azure Blob Storage rely on.

mod servers;

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime};

use servers::azurite::{ACCOUNT, AzuriteServer, KEY, Response};
use servers::left_out;
use servers::proxy::Proxy;

/// Long enough for a response that isn't lost.
const SILENCE: Duration = Duration::from_millis(300);

const HOUR: Duration = Duration::from_secs(3600);

const LEASE: &str = "/box/blob?comp=lease";

/// One with the empty blob `blob` in the container `box`.
fn with_blob(azurite: AzuriteServer) -> AzuriteServer {
    azurite.create_container("box");
    azurite.put_blob("box", "blob", b"");
    azurite
}

fn acquire(azurite: &AzuriteServer) -> Response {
    let headers = [("x-ms-lease-action", "acquire"), ("x-ms-lease-duration", "60")];
    azurite.request("PUT", LEASE, &headers, b"")
}

fn lease_id(response: &Response) -> String {
    response.expect(201).header("x-ms-lease-id").expect("a lease has an id").to_owned()
}

#[test]
fn two_servers_at_once_have_nothing_in_common() {
    if left_out("azure") {
        return;
    }
    let one = AzuriteServer::start();
    let other = AzuriteServer::options().account("someone", "c29tZSBrZXk=").start();
    assert_ne!(one.port(), other.port());
    assert_eq!((one.account(), one.key()), (ACCOUNT, KEY));
    assert_eq!((other.account(), other.key()), ("someone", "c29tZSBrZXk="));
    let endpoint = format!("http://127.0.0.1:{}/someone", other.port());
    assert_eq!(other.endpoint(), endpoint);
    assert_eq!(
        other.connection_string(),
        format!(
            "DefaultEndpointsProtocol=http;AccountName=someone;AccountKey=c29tZSBrZXk=;BlobEndpoint={endpoint};"
        )
    );

    one.create_container("box");
    let names = ["a <b> & \"c\"/d", "ä", "z"];
    for name in names {
        one.put_blob("box", name, name.as_bytes());
    }
    let mut found = one.blobs("box");
    found.sort();
    let mut sorted = names.to_vec();
    sorted.sort_unstable();
    assert_eq!(found, sorted);
    assert_eq!(one.request("GET", "/box/z", &[], b"").expect(200).body, b"z");
    assert_eq!(other.request("GET", "/box/z", &[], b"").expect(404).error_code(), "ContainerNotFound");

    one.set_metadata("box", "z", &[("token", "7"), ("Owner", "me")], None);
    let metadata = one.metadata("box", "z");
    assert_eq!(
        metadata.into_iter().collect::<Vec<_>>(),
        [("owner".into(), "me".into()), ("token".into(), "7".into())]
    );
    one.delete_blob("box", "z");
    assert_eq!(one.blobs("box").len(), 2);
    one.delete_container("box");
    one.request("GET", "/box?restype=container&comp=list", &[], b"").expect(404);
}

#[test]
fn a_signature_lets_in_and_an_expired_one_does_not() {
    if left_out("azure") {
        return;
    }
    let azurite = with_blob(AzuriteServer::start());
    let get = |query: &str| azurite.unsigned_request("GET", &format!("/box/blob?{query}"), &[], b"");
    let put =
        |query: &str| azurite.unsigned_request("PUT", &format!("/more?restype=container&{query}"), &[], b"");
    let (past, soon) = (SystemTime::now() - HOUR, SystemTime::now() + HOUR);

    get(&azurite.sas("r", HOUR)).expect(200);
    get(&azurite.container_sas("box", "r", soon)).expect(200);
    for refused in [
        String::new(),
        azurite.sas_until("r", past),
        azurite.sas("w", HOUR),
        azurite.sas("r", HOUR).replace("sp=r", "sp=rw"),
        azurite.container_sas("box", "r", past),
        azurite.container_sas("other", "r", soon),
    ] {
        let response = get(&refused);
        assert!([403, 404, 409].contains(&response.status), "{refused}: {response:?}");
    }
    put(&azurite.sas("r", HOUR)).expect(403);
    put(&azurite.sas("c", HOUR)).expect(201);
}

#[test]
fn a_lease_excludes_others_until_it_is_broken() {
    if left_out("azure") {
        return;
    }
    let azurite = with_blob(AzuriteServer::start());
    assert_eq!(azurite.lease_state("box", "blob"), "available");
    let id = lease_id(&acquire(&azurite));
    assert_eq!(azurite.lease_state("box", "blob"), "leased");
    assert_eq!(acquire(&azurite).expect(409).error_code(), "LeaseAlreadyPresent");
    let without = azurite.request("PUT", "/box/blob?comp=metadata", &[("x-ms-meta-token", "1")], b"");
    assert_eq!(without.expect(412).error_code(), "LeaseIdMissing");
    azurite.set_metadata("box", "blob", &[("token", "1")], Some(&id));
    let renew = [("x-ms-lease-action", "renew"), ("x-ms-lease-id", &*id)];
    azurite.request("PUT", LEASE, &renew, b"").expect(200);

    azurite.break_lease("box", "blob");
    assert_eq!(azurite.lease_state("box", "blob"), "broken");
    azurite.request("PUT", LEASE, &renew, b"").expect(409);
    let next = lease_id(&acquire(&azurite));
    assert_ne!(next, id);
    assert_eq!(azurite.metadata("box", "blob")["token"], "1");

    azurite.delete_blob("box", "blob");
    assert_eq!(acquire(&azurite).expect(404).error_code(), "BlobNotFound");
}

#[test]
fn a_restart_keeps_what_is_on_disk() {
    if left_out("azure") {
        return;
    }
    let azurite = with_blob(AzuriteServer::options().durable().start());
    let (port, pid) = (azurite.port(), azurite.pid());
    let id = lease_id(&acquire(&azurite));
    azurite.put_blob("box", "endless", b"");
    let endless = [("x-ms-lease-action", "acquire"), ("x-ms-lease-duration", "-1")];
    azurite.request("PUT", "/box/endless?comp=lease", &endless, b"").expect(201);
    azurite.set_metadata("box", "blob", &[("token", "1")], Some(&id));
    azurite.restart();
    assert_eq!(azurite.port(), port);
    assert_ne!(azurite.pid(), pid);
    assert_eq!(azurite.blobs("box"), ["blob", "endless"]);
    assert_eq!(azurite.metadata("box", "blob")["token"], "1");
    // Unlike Azure's: what `durable` says.
    assert_eq!(azurite.lease_state("box", "blob"), "expired");
    assert_eq!(azurite.lease_state("box", "endless"), "leased");
    azurite.kill();
    let error = azurite.try_request("GET", "?comp=list", &[], b"").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    azurite.restart();
    assert_eq!(azurite.blobs("box"), ["blob", "endless"]);

    let forgetful = with_blob(AzuriteServer::start());
    forgetful.restart();
    forgetful.request("GET", "/box/blob", &[], b"").expect(404);
}

#[test]
fn a_frozen_server_answers_when_it_continues() {
    if left_out("azure") {
        return;
    }
    let azurite = with_blob(AzuriteServer::start());
    azurite.freeze();
    thread::scope(|scope| {
        let (sender, answers) = mpsc::channel();
        let azurite = &azurite;
        scope.spawn(move || sender.send(azurite.blobs("box")));
        assert!(answers.recv_timeout(SILENCE).is_err());
        azurite.thaw();
        assert_eq!(answers.recv().unwrap(), ["blob"]);
    });
    azurite.freeze();
    azurite.kill(); // takes it frozen too
    assert!(azurite.try_request("GET", "?comp=list", &[], b"").is_err());
}

#[test]
fn a_server_on_a_port_that_is_taken_does_not_start() {
    if left_out("azure") {
        return;
    }
    let azurite = AzuriteServer::start();
    let start = || AzuriteServer::options().port(azurite.port()).start();
    let panic = catch_unwind(AssertUnwindSafe(start)).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert_eq!(*message, format!("another has port {}", azurite.port()));
    azurite.request("GET", "?comp=list", &[], b"").expect(200);
}

#[test]
fn a_server_ends_with_its_value() {
    if left_out("azure") {
        return;
    }
    let azurite = AzuriteServer::start();
    let process = format!("/proc/{}", azurite.pid());
    assert!(Path::new(&process).exists());
    assert!(
        azurite
            .output()
            .contains(&format!("listens on {}", azurite.endpoint().replace("/devstoreaccount1", "")))
    );
    drop(azurite);
    assert!(!Path::new(&process).exists());
}

#[test]
fn a_server_with_tls_answers() {
    if left_out("azure") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = (dir.path().join("certificate"), dir.path().join("key"));
    let made = Command::new(servers::program("openssl", "openssl"))
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"])
        .arg("-out")
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let azurite = with_blob(AzuriteServer::options().tls(&certificate, &key).start());
    assert_eq!(azurite.blobs("box"), ["blob"]);
    assert_eq!(azurite.endpoint(), format!("https://127.0.0.1:{}/{ACCOUNT}", azurite.port()));
}

#[test]
fn a_proxy_may_be_in_front_of_a_server() {
    if left_out("azure") {
        return;
    }
    let azurite = AzuriteServer::start();
    let proxy = Proxy::start(azurite.addr());
    assert_eq!(azurite.endpoint_at(proxy.addr()), format!("http://{}/{ACCOUNT}", proxy.addr()));
    assert!(azurite.connection_string_at(proxy.addr()).contains(&azurite.endpoint_at(proxy.addr())));
}
