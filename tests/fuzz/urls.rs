//! URLs and connection strings: right ones are tried, wrong ones are refused before any I/O, and no error shows a
//! secret.

#![expect(clippy::assigning_clones, reason = "what is wrong is read more easily as an assignment")]

use std::error::Error as _;
use std::fmt::Write as _;
use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::mpsc;
use std::task::Poll;
use std::time::Duration;

use bolero::{Driver, ValueGenerator};
use fencelock::{Error, ErrorKind, connect};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tokio::runtime::Builder;

use super::{Choices, budget, short_budget};

/// What came of a URL.
#[derive(Debug)]
enum Came {
    /// A provider, without any I/O.
    Made,
    /// It is right: there was something to be asked for over the network, or on the disk.
    ToIo,
    /// It was refused before.
    Refused(Error),
}

/// All that an error says, to anybody.
fn said(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(error) = source {
        write!(text, " {error}").expect("a String takes whatever is written");
        source = error.source();
    }
    text
}

/// No part of the secret that would help to guess it.
fn assert_no_secret(text: &str, secret: &str) {
    let upper = text.to_uppercase();
    for start in 0..secret.len().saturating_sub(5) {
        assert!(!upper.contains(&secret[start..start + 6]), "{secret} is in: {text}");
    }
}

/// Connects where nothing can be sent: there is no driver of I/O, and the one thread for what blocks, such as DNS and
/// files, is taken.
fn come(url: &str, secret: &str) -> Came {
    let runtime =
        Builder::new_current_thread().enable_time().max_blocking_threads(1).build().expect("a runtime");
    let (stop, stopped) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || stopped.recv());
    let tried = async {
        let mut connecting = pin!(connect(url));
        for _ in 0..4 {
            if let Some(connected) = poll_fn(|context| match connecting.as_mut().poll(context) {
                Poll::Ready(connected) => Poll::Ready(Some(connected)),
                Poll::Pending => Poll::Ready(None),
            })
            .await
            {
                return Some(connected.map(|provider| assert_no_secret(&format!("{provider:?}"), secret)));
            }
            tokio::task::yield_now().await;
        }
        None
    };
    let came = catch_unwind(AssertUnwindSafe(|| runtime.block_on(tried)));
    runtime.shutdown_background();
    drop(stop);
    match came {
        Ok(None) => Came::ToIo,
        Ok(Some(Ok(()))) => Came::Made,
        Ok(Some(Err(error))) => {
            assert_no_secret(&said(&error), secret);
            assert_eq!(error.operation(), Some("connect"), "{error}");
            match error.backend() {
                Some("url") => {
                    let kinds = [ErrorKind::Config, ErrorKind::Unsupported];
                    assert!(kinds.contains(&error.kind()), "{error:?}");
                    Came::Refused(error)
                }
                _ => Came::ToIo,
            }
        }
        // What tokio says when a socket is opened.
        Err(panic) => {
            match panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref().copied()) {
                Some(message) if message.contains("IO is disabled") => Came::ToIo,
                _ => resume_unwind(panic),
            }
        }
    }
}

/// Whether an address is in it to which something could be sent: sockets begin to connect before they find out that
/// they can't.
fn could_leave(url: &str) -> bool {
    let decoded = percent_decode_str(url).decode_utf8_lossy();
    [url, &decoded].into_iter().any(|text| {
        let v4 =
            text.split(|c: char| !(c.is_ascii_digit() || c == '.')).map(|part| part.parse().map(IpAddr::V4));
        let v6 = text.split(|c: char| !(c.is_ascii_hexdigit() || ".:".contains(c)));
        let v6 = v6.map(|part| part.parse().map(IpAddr::V6));
        v4.chain(v6).flatten().any(|ip| !ip.is_loopback() && ip != IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    })
}

/// What should come of a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Made,
    ToIo,
    Refused,
    Unsupported,
}

#[derive(Clone)]
struct Case {
    url: String,
    /// Letters that stand in its password, key or signature.
    secret: String,
    expected: Expected,
    /// What was made wrong.
    fault: Option<&'static str>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { url, expected, fault, .. } = self;
        write!(f, "{url:?}, which should be {expected:?}, being wrong by {fault:?}")
    }
}

/// A URL before it is written down.
#[derive(Clone, Debug)]
struct Parts {
    scheme: String,
    slashes: &'static str,
    /// Encoded.
    login: Option<String>,
    hosts: Vec<String>,
    path: String,
    query: Vec<(String, String)>,
    secret: String,
    /// Written at the ends.
    around: (&'static str, &'static str),
}

impl Parts {
    fn add(&mut self, key: &str, value: &str) {
        self.query.push((key.to_owned(), value.to_owned()));
    }

    /// Instead of what is there.
    fn set(&mut self, key: &str, value: &str) {
        self.query.retain(|(known, _)| known != key);
        self.add(key, value);
    }

    fn remove(&mut self, key: &str) {
        self.query.retain(|(known, _)| known != key);
    }

    fn url(&self) -> String {
        let Self { scheme, slashes, login, hosts, path, query, around: (before, after), .. } = self;
        let login = login.as_ref().map(|login| format!("{login}@")).unwrap_or_default();
        let query: Vec<_> = query.iter().map(|(key, value)| format!("{key}={}", encoded(value))).collect();
        let mark = if query.is_empty() { "" } else { "?" };
        format!("{before}{scheme}:{slashes}{login}{}{path}{mark}{}{after}", hosts.join(","), query.join("&"))
    }
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// A way to make a URL wrong, whatever else stands in it.
type Fault = (&'static str, fn(&mut Parts));

/// Wrong on every backend.
const COMMON: &[Fault] = &[
    ("white space before it", |parts| parts.around.0 = " "),
    ("a line break behind it", |parts| parts.around.1 = "\n"),
    ("ttl without a unit", |parts| parts.set("ttl", "30")),
    ("ttl of nothing", |parts| parts.set("ttl", "0s")),
    ("ttl of a million years", |parts| parts.set("ttl", "1000000years")),
    ("an empty ttl", |parts| parts.set("ttl", "")),
    ("a ttl beyond all numbers", |parts| parts.set("ttl", "99999999999999999999s")),
    ("auto_renew=maybe", |parts| parts.set("auto_renew", "maybe")),
    ("max_hold of nothing", |parts| parts.set("max_hold", "0s")),
    ("hold_at_least longer than max_hold", |parts| {
        parts.set("hold_at_least", "50s");
        parts.set("max_hold", "40s");
    }),
    ("retry_for that is negative", |parts| parts.set("retry_for", "-1s")),
    ("an empty prefix", |parts| parts.set("prefix", "")),
    ("a prefix with a colon", |parts| parts.set("prefix", "a:b")),
    ("the secret as a prefix", |parts| parts.set("prefix", &format!("{}!", parts.secret.clone()))),
    ("a parameter twice", |parts| {
        parts.set("ttl", "30s");
        parts.add("ttl", "30s");
    }),
    ("a parameter that nobody knows", |parts| parts.add("colour", "red")),
    ("the secret as a parameter", |parts| parts.query.push((parts.secret.clone(), parts.secret.clone()))),
];

const NETWORK: &[Fault] = &[
    ("no slashes", |parts| parts.slashes = ""),
    ("one slash", |parts| parts.slashes = "/"),
    ("no host", |parts| parts.hosts = vec![String::new()]),
    ("a port that is none", |parts| parts.hosts[0] = "localhost:x".to_owned()),
    ("a port that is too large", |parts| parts.hosts[0] = "localhost:65536".to_owned()),
    ("the secret as a port", |parts| parts.hosts[0] = format!("localhost:{}", parts.secret)),
];

/// But on PostgreSQL, of which passwords are bytes.
const NO_UTF8: Fault =
    ("a password that is no UTF-8", |parts| parts.login = Some(format!("user:{}%FF", parts.secret)));

const FILE: &[Fault] = &[
    ("no directory", |parts| parts.path = String::new()),
    ("a host", |parts| parts.path = format!("//{}/dir", parts.secret.clone())),
];

const REDIS: &[Fault] = &[
    NO_UTF8,
    ("a database that is none", |parts| parts.path = "/x".to_owned()),
    ("a negative database", |parts| parts.path = "/-1".to_owned()),
    ("the secret as a database", |parts| parts.path = format!("/{}", parts.secret)),
    ("several hosts", |parts| {
        parts.remove("sentinel");
        parts.remove("sentinel_password");
        parts.hosts = vec!["localhost:1".to_owned(), "localhost:2".to_owned()];
    }),
    ("an empty sentinel", |parts| parts.set("sentinel", "")),
    ("sentinel_password without sentinel", |parts| {
        parts.remove("sentinel");
        parts.set("sentinel_password", &parts.secret.clone());
    }),
    ("no replicas", |parts| parts.set("replicas", "0")),
    ("replicas that are no number", |parts| parts.set("replicas", &parts.secret.clone())),
    ("replica_timeout without replicas", |parts| {
        parts.remove("replicas");
        parts.set("replica_timeout", "10ms");
    }),
    ("a long replica_timeout", |parts| {
        parts.set("replicas", "1");
        parts.set("replica_timeout", "2s");
    }),
    ("a parameter of others", |parts| parts.add("tls", "true")),
    ("an empty host among others", |parts| parts.hosts.push(String::new())),
];

const SOCKET: &[Fault] = &[
    ("a relative path", |parts| parts.path = "run/redis.sock".to_owned()),
    ("a database that is none", |parts| parts.set("db", "x")),
    ("the secret as a database", |parts| parts.set("db", &parts.secret.clone())),
    ("a negative database", |parts| parts.set("db", "-1")),
];

const REDLOCK: &[Fault] = &[
    NO_UTF8,
    ("two hosts", |parts| parts.hosts.truncate(2)),
    ("a host twice", |parts| parts.hosts.push(parts.hosts[0].clone())),
    ("tls=maybe", |parts| parts.set("tls", "maybe")),
    ("the secret as tls", |parts| parts.set("tls", &parts.secret.clone())),
    ("longest_ttl without a unit", |parts| parts.set("longest_ttl", "60")),
    ("a parameter of others", |parts| parts.add("sentinel", "main")),
    ("a database that is none", |parts| parts.path = "/x".to_owned()),
];

const POSTGRES: &[Fault] = &[
    ("an sslmode that is none", |parts| parts.set("sslmode", "maybe")),
    ("the secret as an sslmode", |parts| parts.set("sslmode", &parts.secret.clone())),
    ("sslrootcert without sslmode", |parts| {
        parts.set("sslmode", "prefer");
        parts.set("sslrootcert", "/nowhere");
    }),
    ("a connect_timeout that is no number", |parts| parts.set("connect_timeout", &parts.secret.clone())),
    ("target_session_attrs that are none", |parts| parts.set("target_session_attrs", &parts.secret.clone())),
    ("a hostaddr that is none", |parts| parts.set("hostaddr", &parts.secret.clone())),
    ("a sequence with three parts", |parts| parts.set("token_sequence", "a.b.c")),
    ("the secret as a sequence", |parts| parts.set("token_sequence", &format!("..{}", parts.secret.clone()))),
    ("waiting_sessions that are no number", |parts| parts.set("waiting_sessions", "-1")),
    ("transaction_scoped=maybe", |parts| parts.set("transaction_scoped", "maybe")),
    ("a parameter of others", |parts| parts.add("replicas", "1")),
];

const SQLSERVER: &[Fault] = &[
    NO_UTF8,
    ("port 0", |parts| parts.hosts = vec!["localhost:0".to_owned()]),
    ("two hosts", |parts| parts.hosts.push("localhost".to_owned())),
    ("a host with an instance", |parts| parts.hosts = vec!["localhost\\x".to_owned()]),
    ("IPv6 without brackets", |parts| parts.hosts = vec!["::1:1433".to_owned()]),
    #[cfg(not(windows))]
    ("no user", |parts| parts.login = None),
    ("encrypt=maybe", |parts| parts.set("encrypt", "maybe")),
    ("the secret as encrypt", |parts| parts.set("encrypt", &parts.secret.clone())),
    ("trust in any and in one", |parts| {
        parts.set("trust_server_certificate", "true");
        parts.set("trust_server_certificate_ca", "/nowhere.pem");
    }),
    ("a parameter in two spellings", |parts| {
        parts.set("applicationName", "a");
        parts.set("application_name", "a");
    }),
    ("two databases", |parts| {
        parts.path = "/one".to_owned();
        parts.set("database", "two");
    }),
    ("a path", |parts| parts.path = "/one/two".to_owned()),
    ("a database that is no UTF-8", |parts| parts.path = format!("/{}%FF", parts.secret)),
    ("a table with three parts", |parts| parts.set("token_table", "a.b.c")),
    ("an empty db_principal", |parts| parts.set("db_principal", "")),
    ("a long db_principal", |parts| parts.set("db_principal", &parts.secret.repeat(20))),
    ("waiting_sessions that are no number", |parts| parts.set("waiting_sessions", "1.5")),
];

const AZURE: &[Fault] = &[
    ("no slashes", |parts| parts.slashes = ""),
    ("an account in upper case", |parts| parts.hosts = vec!["Account".to_owned()]),
    ("a short account", |parts| parts.hosts = vec!["ab".to_owned()]),
    ("a login", |parts| parts.login = Some(format!("user:{}", parts.secret))),
    ("no container", |parts| parts.path = String::new()),
    ("a container with a slash", |parts| parts.path = "/a/b".to_owned()),
    ("a container with two hyphens", |parts| parts.path = "/a--b".to_owned()),
    ("the secret as a container", |parts| parts.path = format!("/{}", parts.secret)),
    ("key and signature", |parts| {
        parts.set("account_key", &parts.secret.clone());
        parts.set("sas", &format!("sig={}", parts.secret));
    }),
    ("a key that isn't base64", |parts| {
        parts.remove("sas");
        parts.set("account_key", &format!("{}!", parts.secret));
    }),
    ("a signature without one", |parts| {
        parts.remove("account_key");
        parts.set("sas", &parts.secret.clone());
    }),
    ("an endpoint of another scheme", |parts| parts.set("endpoint", "ftp://localhost")),
    ("an endpoint that is no URL", |parts| parts.set("endpoint", &parts.secret.clone())),
    ("an endpoint with a query", |parts| {
        parts.set("endpoint", &format!("http://localhost/?sig={}", parts.secret));
    }),
    ("a ttl below the minimum", |parts| parts.set("ttl", "14s")),
    ("a ttl above the maximum", |parts| parts.set("ttl", "61s")),
];

const TLS: bool = cfg!(any(feature = "rustls", feature = "native-tls"));

/// Letters that stand nowhere else, in a number that base64 takes, too.
fn secret<D: Driver>(choices: &mut Choices<'_, D>) -> Option<String> {
    (0..12).map(|_| choices.of(&["Q", "X", "Z", "J", "7"])).collect()
}

/// A password with what needs to be encoded around the secret.
fn password<D: Driver>(choices: &mut Choices<'_, D>, secret: &str) -> Option<String> {
    const ODD: [&str; 20] = [
        "a", "/", "?", "@", ":", "#", "%", "%25", ",", "&", "=", "+", " ", ";", "'", "\"", "{", "}", "ä",
        "😀",
    ];
    Some(format!("{}{secret}{}", choices.text(&ODD, 3)?, choices.text(&ODD, 3)?))
}

fn host<D: Driver>(choices: &mut Choices<'_, D>, port: u16) -> Option<String> {
    let name = choices.of(&["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])?;
    Some(if choices.one_in(4)? { name.to_owned() } else { format!("{name}:{port}") })
}

/// The parameters that every backend has, each of them sometimes.
fn common<D: Driver>(choices: &mut Choices<'_, D>, parts: &mut Parts) -> Option<()> {
    for (key, values) in [
        ("ttl", ["20s", "30s", "1m", "15s 500ms"]),
        ("auto_renew", ["true", "false", "true", "false"]),
        ("max_hold", ["1m", "10m", "1h 30m", "1day"]),
        ("hold_at_least", ["0s", "500ms", "1s", "15s"]),
        ("retry_for", ["0s", "10s", "1day", "100000years"]),
        ("prefix", ["app", "a.b-c_d", "A", "0"]),
    ] {
        if choices.one_in(3)? {
            let value = choices.of(&values)?;
            parts.add(key, value);
        }
    }
    Some(())
}

/// Some of these parameters.
fn some<D: Driver>(choices: &mut Choices<'_, D>, parts: &mut Parts, all: &[(&str, &str)]) -> Option<()> {
    for (key, value) in all {
        if choices.one_in(3)? {
            parts.add(key, value);
        }
    }
    Some(())
}

/// A right URL, whether this build has its backend, what can be wrong with it, and what comes of it.
type Right = (Parts, bool, [&'static [Fault]; 2], Expected);

#[expect(clippy::too_many_lines, reason = "a case for each backend")]
fn right<D: Driver>(choices: &mut Choices<'_, D>) -> Option<Right> {
    // Seldom Azure, of which a client takes long to make.
    let kind = choices.of(&[0, 1, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7])?;
    let secret = secret(choices)?;
    let password = password(choices, &secret)?;
    let port: u16 = choices.of(&[1, 1, 6379, 65535])?;
    let user = choices.of(&["user", "us@er", "ü", "a:b", "100%"])?;
    let mut parts = Parts {
        scheme: String::new(),
        slashes: "//",
        login: Some(format!("{}:{}", encoded(user), encoded(&password))),
        hosts: vec![host(choices, port)?],
        path: String::new(),
        query: Vec::new(),
        secret,
        around: ("", ""),
    };
    let nowhere = |parts: &mut Parts| {
        parts.login = None;
        parts.hosts.clear();
    };
    common(choices, &mut parts)?;
    let (scheme, has, faults, expected): (_, _, [&[Fault]; 2], _) = match kind {
        0 => {
            nowhere(&mut parts);
            parts.slashes = choices.of(&["", "//"])?;
            parts.path = choices.text(&["a", "ä", "%", "/", ":", "@", " b", "#"], 4)?;
            ("memory", true, [&[], &[]], Expected::Made)
        }
        1 => {
            nowhere(&mut parts);
            parts.slashes = "";
            parts.path =
                choices.of(&["some/dir", "/some/dir", "///some/dir", "ä %41", "..", "C:\\dir"])?.to_owned();
            ("file", true, [FILE, &[]], Expected::ToIo)
        }
        2 => {
            parts.path = choices.of(&["", "/", "/0", "/15"])?.to_owned();
            if choices.one_in(3)? {
                parts.add("sentinel", "main");
                if choices.one_in(2)? {
                    let more = format!("localhost:{}", choices.of(&[2, 3])?);
                    parts.hosts.push(more);
                    parts.add("sentinel_password", &password);
                }
            }
            if choices.one_in(3)? {
                parts.add("replicas", choices.of(&["1", "2"])?);
                some(choices, &mut parts, &[("replica_timeout", "1s")])?;
            }
            let scheme = if TLS && choices.one_in(16)? { "rediss" } else { "redis" };
            (scheme, cfg!(feature = "redis"), [NETWORK, REDIS], Expected::ToIo)
        }
        3 => {
            nowhere(&mut parts);
            parts.slashes = choices.of(&["", "//"])?;
            parts.path = choices.of(&["/run/nowhere.sock", "/ä b/%41"])?.to_owned();
            parts.add("password", &password);
            some(choices, &mut parts, &[("db", "7"), ("user", user)])?;
            ("redis+unix", cfg!(feature = "redis"), [SOCKET, &[]], Expected::ToIo)
        }
        4 => {
            parts.hosts.extend(["localhost:2", "127.0.0.1:3"].map(str::to_owned));
            parts.path = choices.of(&["", "/", "/3"])?.to_owned();
            some(choices, &mut parts, &[("tls", "false"), ("longest_ttl", "5m")])?;
            ("redlock", cfg!(feature = "redis"), [NETWORK, REDLOCK], Expected::ToIo)
        }
        5 => {
            parts.path = choices.of(&["", "/", "/db", "/%C3%A4%20b"])?.to_owned();
            let all = [
                ("application_name", "a b+c"),
                ("connect_timeout", "1"),
                ("keepalives", "1"),
                ("options", "-c search_path=x"),
                ("target_session_attrs", "any"),
                ("token_sequence", "app.\"tokens"),
                ("waiting_sessions", "3"),
                ("transaction_scoped", "true"),
                ("sslmode", "disable"),
            ];
            some(choices, &mut parts, &all)?;
            let scheme = choices.of(&["postgres", "postgresql"])?;
            (scheme, cfg!(feature = "postgres"), [NETWORK, POSTGRES], Expected::ToIo)
        }
        6 => {
            let all = [
                ("encrypt", "off"),
                ("trustServerCertificate", "yes"),
                ("hostNameInCertificate", "db.example.com"),
                ("application_name", "a;b"),
                ("multi_subnet_failover", "true"),
                ("token_table", "app.to]kens"),
                ("db_principal", "ä b"),
                ("waiting_sessions", "0"),
            ];
            some(choices, &mut parts, &all)?;
            if choices.one_in(2)? {
                parts.path = choices.of(&["/", "/db", "/%C3%A4%2F"])?.to_owned();
            } else {
                some(choices, &mut parts, &[("databaseName", "db")])?;
            }
            ("sqlserver", cfg!(feature = "sqlserver"), [NETWORK, SQLSERVER], Expected::ToIo)
        }
        _ => {
            parts.login = None;
            let endpoint = format!("http://{}", parts.hosts[0]);
            parts.hosts = vec![choices.of(&["account", "devstoreaccount1", "abc"])?.to_owned()];
            parts.path = choices.of(&["/locks", "/a-b-3", "/locks/"])?.to_owned();
            parts.add("endpoint", &format!("{endpoint}{}", choices.of(&["", "/", "/account"])?));
            let secret = parts.secret.clone();
            if choices.one_in(2)? {
                parts.add("account_key", &secret);
            } else {
                parts.add("sas", &format!("{}sv=2025-01-05&sig={secret}", choices.of(&["", "?"])?));
            }
            ("azblob", cfg!(feature = "azure"), [AZURE, &[]], Expected::ToIo)
        }
    };
    let upper = choices.one_in(8)?;
    parts.scheme = if upper { scheme.to_uppercase() } else { scheme.to_owned() };
    Some((parts, has, faults, expected))
}

/// Right URLs, and those in which one thing is wrong.
struct Urls;

impl ValueGenerator for Urls {
    type Output = Case;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Case> {
        let mut choices = Choices(driver);
        let (mut parts, has, [first, second], mut expected) = right(&mut choices)?;
        let mut fault = None;
        if choices.one_in(2)? {
            let at = choices.below(COMMON.len() + first.len() + second.len())?;
            let (name, make) = COMMON.iter().chain(first).chain(second).nth(at)?;
            make(&mut parts);
            fault = Some(*name);
            expected = Expected::Refused;
        }
        if !has && expected != Expected::Refused {
            expected = Expected::Unsupported;
        }
        Some(Case { url: parts.url(), secret: parts.secret, expected, fault })
    }
}

fn check(case: &Case) {
    let outcome = come(&case.url, &case.secret);
    let is_right = match (&outcome, case.expected) {
        (Came::Made, Expected::Made)
        | (Came::ToIo, Expected::ToIo)
        | (Came::Refused(_), Expected::Refused) => true,
        (Came::Refused(error), Expected::Unsupported) => error.kind() == ErrorKind::Unsupported,
        _ => false,
    };
    assert!(is_right, "{outcome:?} came of {case:?}");
}

/// A URL of valid parts is tried, and one that is made wrong in any place is refused before any I/O.
#[test]
fn a_right_url_is_tried_and_a_wrong_one_refused() {
    bolero::check!().with_test_time(budget()).with_generator(Urls).for_each(check);
}

/// Connection strings of SQL Server, which its driver reads.
struct Strings;

impl ValueGenerator for Strings {
    type Output = Case;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Case> {
        const FAULTS: [(&str, &str); 11] = [
            ("a quote that isn't closed", "password="),
            ("a pair without a value", "colour"),
            ("a value without a key", "=x"),
            ("trust that is neither", "TrustServerCertificate=maybe"),
            ("trust in any and in one", "TrustServerCertificate=true;TrustServerCertificateCA=/nowhere.pem"),
            ("encryption of no kind", "encrypt=maybe"),
            ("failover that is neither", "MultiSubnetFailover=maybe"),
            ("white space behind it", "application name=x\n"),
            ("what the driver would pass over", ""),
            ("a port that is too large", ""),
            ("a port that is none", ""),
        ];
        let mut choices = Choices(driver);
        let (jdbc, secret) = (choices.one_in(2)?, secret(&mut choices)?);
        let (open, close) = if jdbc { ("{", "}") } else { choices.of(&[("'", "'"), ("\"", "\"")])? };
        let password = format!(
            "{open}{}{secret}{}{close}",
            choices.text(&[";", "=", "a", " ", ","], 3)?,
            choices.text(&[";", "=", "a"], 3)?
        );
        let fault = if choices.one_in(2)? { Some(choices.below(FAULTS.len())?) } else { None };
        let port = match fault {
            Some(9) => "65536".to_owned(),
            Some(10) => secret.clone(),
            _ => choices.of(&[1, 1433, 65535])?.to_string(),
        };
        let mut string = if jdbc {
            format!("jdbc:sqlserver://{}:{port}", choices.of(&["localhost", "127.0.0.1", "[::1]"])?)
        } else {
            format!(
                "{}=tcp:{},{port}",
                choices.of(&["Server", "data source", "SERVER"])?,
                choices.of(&["localhost", "127.0.0.1"])?
            )
        };
        let mut pairs =
            vec![format!("user id={}", choices.of(&["sa", "app"])?), format!("Password={password}")];
        for pair in ["database=locks", "Application Name=app", "MultiSubnetFailover=true"] {
            if choices.one_in(3)? {
                pairs.push(pair.to_owned());
            }
        }
        if fault != Some(3) && fault != Some(4) && choices.one_in(3)? {
            pairs.push("TrustServerCertificate=true".to_owned());
        }
        if choices.one_in(2)? {
            pairs.reverse();
        }
        match fault {
            Some(0) => pairs.push(format!("password={open}{secret}")),
            Some(8) if jdbc => pairs.push(choices.of(&[" database=locks", "encrypt =true"])?.to_owned()),
            Some(8) => pairs.push(choices.of(&["Address=db", "addr=db", "Network Address=db"])?.to_owned()),
            Some(fault) if fault < 8 => pairs.push(FAULTS[fault].1.to_owned()),
            _ => {}
        }
        for pair in pairs {
            // For JDBC the driver takes a blank for a part of the key.
            string.push_str(if jdbc { ";" } else { choices.of(&[";", "; "])? });
            string.push_str(&pair);
        }
        let expected = match fault {
            Some(_) => Expected::Refused,
            None if cfg!(feature = "sqlserver") => Expected::ToIo,
            None => Expected::Unsupported,
        };
        Some(Case { url: string, secret, expected, fault: fault.map(|fault| FAULTS[fault].0) })
    }
}

#[test]
fn a_right_connection_string_is_tried_and_a_wrong_one_refused() {
    bolero::check!().with_test_time(budget()).with_generator(Strings).for_each(check);
}

/// URLs and strings that have been edited without care, around the secret.
struct Typos;

impl ValueGenerator for Typos {
    type Output = Case;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Case> {
        const PIECES: [&str; 40] = [
            "",
            "",
            "",
            "/",
            "//",
            ":",
            "::",
            "@",
            "?",
            "&",
            "=",
            "#",
            "%",
            "%0",
            "%00",
            "%FF",
            "%2F",
            "%3A",
            "+",
            ",",
            ";",
            "[",
            "]",
            "{",
            "}",
            "'",
            "\"",
            " ",
            "\n",
            "\0",
            "é",
            "😀",
            "\\",
            "-1",
            "99999999999",
            "s3",
            "x=",
            "&&",
            "redis:",
            "jdbc:sqlserver:",
        ];
        let case =
            if Choices(driver).one_in(4)? { Strings.generate(driver)? } else { Urls.generate(driver)? };
        let mut choices = Choices(driver);
        let mut url = case.url;
        // A password as it is, which the user didn't know had to be encoded.
        if choices.one_in(2)? {
            url = url
                .replace("%3A", ":")
                .replace("%40", "@")
                .replace("%2F", "/")
                .replace("%3F", "?")
                .replace("%23", "#");
        }
        for _ in 0..choices.below(4)? {
            let at = choices.below(url.len() + 1)?;
            let until = (at + choices.of(&[0, 0, 1, 1, 2, 8, 20])?).min(url.len());
            let kept = url.find(&case.secret).map_or(0..0, |start| start..start + case.secret.len());
            let piece = choices.of(&PIECES)?;
            let is_within = at < kept.end && kept.start < until.max(at + 1) && at != kept.start;
            if is_within
                || (at < kept.end && until > kept.start)
                || !url.is_char_boundary(at)
                || !url.is_char_boundary(until)
            {
                continue;
            }
            url.replace_range(at..until, piece);
        }
        Some(Case { url, ..case })
    }
}

/// Whatever becomes of them, it is no panic, and no error shows the secret.
#[test]
fn no_typo_shows_the_secret() {
    bolero::check!().with_test_time(budget()).with_generator(Typos).for_each(|case: &Case| {
        if !could_leave(&case.url) {
            come(&case.url, &case.secret);
        }
    });
}

/// The same on any text.
#[test]
fn any_text_is_a_url_or_refused() {
    bolero::check!().with_test_time(short_budget()).for_each(|text: &[u8]| {
        let url = String::from_utf8_lossy(text);
        if !could_leave(&url) {
            come(&url, "");
        }
    });
}

/// Right URLs, with nobody behind them.
struct Closed;

impl ValueGenerator for Closed {
    type Output = Case;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Case> {
        let mut choices = Choices(driver);
        let (mut parts, has, _, _) = right(&mut choices)?;
        if !has || parts.hosts.is_empty() {
            return None;
        }
        // Nothing listens where only the system may.
        for (host, port) in parts.hosts.iter_mut().zip(1..) {
            if !parts.scheme.eq_ignore_ascii_case("azblob") {
                *host = format!("127.0.0.1:{port}");
            }
        }
        if parts.scheme.eq_ignore_ascii_case("azblob") {
            parts.set("endpoint", "http://127.0.0.1:1/account");
        }
        Some(Case { url: parts.url(), secret: parts.secret, expected: Expected::ToIo, fault: None })
    }
}

/// What the drivers say when a server isn't there has no secret in it either.
#[test]
fn a_closed_port_shows_no_secret() {
    bolero::check!().with_test_time(short_budget()).with_generator(Closed).for_each(|case: &Case| {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let tried = runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), connect(&case.url)).await });
        runtime.shutdown_background();
        let error = match tried {
            Ok(Ok(provider)) => panic!("{provider:?} at a closed port"),
            Ok(Err(error)) => error,
            Err(elapsed) => panic!("a refused connection takes 20 seconds: {elapsed}"),
        };
        assert_no_secret(&said(&error), &case.secret);
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    });
}
