//! What the environment says. Each case is a process of its own, since a process has one environment.

use std::process::Command;

use fencelock::ErrorKind;

use super::common::secs;
use super::servers::azurite_locks::{url, url_with};
use super::servers::connecting::encoded;
use super::servers::left_out;
use super::{OTHER_KEY, assert_no_secret, everything, start};

const URL: &str = "FENCELOCK_CONNECT_URL";
const CONNECTION_STRING: &str = "AZURE_STORAGE_CONNECTION_STRING";
const KEY: &str = "AZURE_STORAGE_KEY";
const SAS: &str = "AZURE_STORAGE_SAS_TOKEN";

/// A name and a value.
type Variable<'a> = (&'a str, &'a str);

/// Connects, takes a lock, and says how that went.
#[test]
#[ignore = "a process that another test starts"]
fn connecting_process() {
    let Ok(url) = std::env::var(URL) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let result = runtime.block_on(async {
        let provider = fencelock::connect(&url).await?;
        provider.create_lock("x").acquire().await?.release().await?;
        provider.close().await
    });
    match result {
        Ok(()) => println!("\nresult: ok"),
        Err(error) => println!("\nresult: {:?} {}", error.kind(), everything(&error)),
    }
}

/// How a process with this environment fares.
fn connect_in(url: &str, variables: &[Variable<'_>]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.args(["--exact", "environment::connecting_process", "--ignored", "--nocapture"]);
    for name in [CONNECTION_STRING, KEY, SAS] {
        command.env_remove(name);
    }
    let ran = command.env(URL, url).envs(variables.iter().copied()).output().expect("it starts");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert_no_secret(&said);
    let result = said.lines().find_map(|line| line.strip_prefix("result: "));
    result.unwrap_or_else(|| panic!("{ran:?}")).to_owned()
}

/// The right to an account comes from the URL, or else from the first of three variables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_comes_from_the_url_or_the_environment() {
    if left_out("azure") {
        return;
    }
    let server = start();
    let endpoint = url_with(&server, server.addr(), "locks", "ttl=15s");
    // The connection string has an endpoint.
    let bare = format!("azblob://{}/locks", server.account());
    let string = server.connection_string();
    let sas = server.sas("rwc", secs(600));
    let (marked, space) = (format!("?{sas}"), " ".to_owned());
    let of_other = string.replace(&format!("AccountName={}", server.account()), "AccountName=another");
    let by_sas = format!("BlobEndpoint={};SharedAccessSignature={sas}", server.endpoint());
    let wrong_key_in_url =
        url_with(&server, server.addr(), "locks", &format!("account_key={}", encoded(OTHER_KEY)));
    let right_key_in_url = url(&server, "locks", "");
    let (key, other) = (server.key(), OTHER_KEY);
    let (ok, config, denied) =
        ("ok".to_owned(), format!("{:?}", ErrorKind::Config), format!("{:?}", ErrorKind::Denied));
    let cases: [(&str, &[Variable<'_>], &str); 16] = [
        (&bare, &[(CONNECTION_STRING, &string)], &ok),
        (&bare, &[(CONNECTION_STRING, &by_sas)], &ok),
        (&endpoint, &[(CONNECTION_STRING, &string)], &ok),
        (&endpoint, &[(KEY, key)], &ok),
        (&endpoint, &[(SAS, &sas)], &ok),
        (&endpoint, &[(SAS, &marked)], &ok),
        (&bare, &[(CONNECTION_STRING, &string), (KEY, other), (SAS, "sig=x")], &ok),
        (&endpoint, &[(KEY, key), (SAS, "sig=x")], &ok),
        (&endpoint, &[(CONNECTION_STRING, &space), (KEY, ""), (SAS, &sas)], &ok),
        (&right_key_in_url, &[(CONNECTION_STRING, "nonsense"), (KEY, other)], &ok),
        (&wrong_key_in_url, &[(CONNECTION_STRING, &string), (KEY, key)], &denied),
        (&endpoint, &[(KEY, other), (SAS, &sas)], &denied),
        (&endpoint, &[], &config),
        (&bare, &[(CONNECTION_STRING, &of_other)], &config),
        (&bare, &[(CONNECTION_STRING, "nonsense"), (KEY, key)], &config),
        (&endpoint, &[(KEY, "not a key!")], &config),
    ];
    let mut processes = tokio::task::JoinSet::new();
    for (number, (url, variables, wanted)) in cases.into_iter().enumerate() {
        let owned: Vec<_> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (url, wanted) = (url.to_owned(), wanted.to_owned());
        processes.spawn_blocking(move || {
            let variables: Vec<_> = owned.iter().map(|(name, value)| (&**name, &**value)).collect();
            let result = connect_in(&url, &variables);
            assert_eq!(result.split(' ').next(), Some(&*wanted), "case {number}: {result}");
        });
    }
    crate::servers::locks::within("all have connected, or not", processes.join_all()).await;
}

/// The example of the daily mail, as it is run with a container of Azure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_daily_mail_is_sent_once() {
    if left_out("azure") {
        return;
    }
    let server = start();
    let tests = std::env::current_exe().expect("this program has a path");
    let example =
        tests.ancestors().nth(2).expect("it is in a directory of Cargo's").join("examples/daily_email");
    assert!(
        example.is_file(),
        "the example isn't built: `cargo build --features azure --example daily_email`, or all tests at once, does it",
    );
    for run in 1..=3 {
        let example = example.clone();
        let string = server.connection_string();
        let url = format!("azblob://{}/locks", server.account());
        let ran = tokio::task::spawn_blocking(move || {
            Command::new(example).env(CONNECTION_STRING, string).env("FENCELOCK_URL", url).output()
        });
        let ran = crate::servers::locks::within("it ends", ran).await.expect("no panic").expect("it starts");
        let said = String::from_utf8_lossy(&ran.stdout);
        let last = said.lines().last().unwrap_or_default();
        assert!(ran.status.success() && last.contains("1 sent, 2 skipped"), "run {run}: {ran:?}");
    }
}
