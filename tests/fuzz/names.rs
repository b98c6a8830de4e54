//! Names of locks: distinct ones stay distinct, whatever a server or a file system makes of them.

use std::fmt::Write as _;

use bolero::{Driver, ValueGenerator};
use fencelock::LockName;
use fencelock::file::FileLocks;
use percent_encoding::percent_decode_str;
use sha2::{Digest, Sha256};

use super::{Choices, budget, short_budget};

/// What encodings, paths, keys or case foldings have a meaning for.
const PIECES: [&str; 46] = [
    "a",
    "A",
    "b",
    "Z",
    "0",
    "9",
    "-",
    "_",
    ".",
    "..",
    "/",
    "\\",
    "%",
    "%2E",
    "%2e",
    "%25",
    "%%",
    "~",
    "{",
    "}",
    ":",
    ";",
    "'",
    "\"",
    "?",
    "#",
    " ",
    "\t",
    "\n",
    "\0",
    "con",
    "CON",
    "nul",
    "com1",
    "lpt9",
    "aux.",
    ".lock",
    "é",
    "e\u{301}",
    "ß",
    "ẞ",
    "İ",
    "\u{212a}",
    "\u{feff}",
    "😀",
    "fencelock:",
];

#[derive(Clone, Debug)]
struct Pair {
    one: String,
    other: String,
}

/// Each byte of it as an escape.
fn percent_encoded(c: char) -> String {
    let mut encoded = String::new();
    for byte in c.to_string().bytes() {
        write!(encoded, "%{byte:02X}").expect("a String takes whatever is written");
    }
    encoded
}

/// Two names of which the second is often what a careless encoding would take for the first.
struct Pairs;

fn name<D: Driver>(choices: &mut Choices<'_, D>) -> Option<String> {
    Some(match choices.below(4)? {
        0 => choices.text(&PIECES, 3)?,
        1 => choices.text(&PIECES, 12)?,
        2 => {
            let length = choices.below(12)?;
            (0..length).map(|_| choices.character()).collect::<Option<_>>()?
        }
        // About as long as the longest that is readable.
        _ => {
            let piece = choices.of(&PIECES)?;
            let length = choices.of(&[1, 60, 66, 180, 190, 240, 250, 255, 300, 1000])? + choices.below(12)?;
            let mut long = piece.repeat(length / piece.len() + 1);
            long.push_str(&choices.text(&PIECES, 2)?);
            long
        }
    })
}

impl ValueGenerator for Pairs {
    type Output = Pair;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Pair> {
        let mut choices = Choices(driver);
        let one = name(&mut choices)?;
        let at = choices.below(one.chars().count().max(1))?;
        let edited = |edit: &dyn Fn(char) -> String| -> String {
            let edit = |(place, c): (usize, char)| if place == at { edit(c) } else { c.to_string() };
            one.chars().enumerate().map(edit).collect()
        };
        let other = match choices.below(12)? {
            0 => one.clone(),
            1 => name(&mut choices)?,
            2 => LockName::new(&*one).encode(choices.of(&[66, 250, 252, 255, 5000])?),
            3 => edited(&|c| {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            }),
            4 => edited(&percent_encoded),
            5 => edited(&|_| String::new()),
            6 => format!("{one}{}", choices.of(&PIECES)?),
            7 => format!("{}{one}", choices.of(&PIECES)?),
            8 => one.replace('é', "e\u{301}"),
            9 => one.to_lowercase(),
            10 => percent_decode_str(&one).decode_utf8_lossy().into_owned(),
            _ => {
                let piece = choices.of(&PIECES)?;
                edited(&|_| piece.to_owned())
            }
        };
        Some(Pair { one, other })
    }
}

/// What each backend calls the lock of this name, where case is ignored if that can happen to it; checked.
fn keys(name: &str) -> Vec<(String, String)> {
    let mut keys = vec![("file".to_owned(), file_key(name))];
    for longest in [66, 67, 100, 250, 252, 255, 1000] {
        keys.push((format!("encode({longest})"), encoded(name, longest).to_ascii_lowercase()));
    }
    #[cfg(feature = "redis")]
    keys.push(("redis".to_owned(), redis_key(name)));
    #[cfg(feature = "postgres")]
    {
        let key = fencelock::postgres::lock_key(name);
        let digest = Sha256::digest(format!("fencelock:{name}"));
        assert_eq!(key.to_be_bytes(), digest[..8], "the documented derivation");
        keys.push(("postgres".to_owned(), key.to_string()));
    }
    #[cfg(feature = "sqlserver")]
    {
        let resource = fencelock::sqlserver::lock_resource(name);
        assert_eq!(resource, encoded(name, 255), "the documented derivation");
        assert!(!resource.contains(':'), "what has a colon is of sessions: {resource}");
        keys.push(("sqlserver".to_owned(), resource.to_lowercase()));
    }
    keys
}

/// The encoding: within its length and alphabet, and either to be read back or the documented hash.
fn encoded(name: &str, longest: usize) -> String {
    let encoded = LockName::new(name).encode(longest);
    assert!((1..=longest).contains(&encoded.len()), "{} bytes in {longest}: {encoded}", encoded.len());
    assert!(!encoded.starts_with('.'), "{encoded}");
    let (readable, hash) = match encoded.split_once('~') {
        Some((readable, hash)) => (readable, Some(hash)),
        None => (&*encoded, None),
    };
    // Upper case is nowhere but in escapes, so that nothing depends on case.
    let mut rest = readable;
    while let Some(first) = rest.bytes().next() {
        let is_escape = rest.len() >= 3
            && first == b'%'
            && rest.bytes().skip(1).take(2).all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        let is_plain = first.is_ascii_lowercase() || first.is_ascii_digit() || b"-_.".contains(&first);
        // An escape may be cut.
        let digits = rest.strip_prefix('%').filter(|digits| digits.len() < 2).unwrap_or("-");
        let is_cut = digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        if is_cut && (hash.is_some() || encoded == "%") {
            break;
        }
        assert!(is_escape || is_plain, "{rest} in {encoded}");
        rest = if is_escape { &rest[3..] } else { &rest[1..] };
    }
    match hash {
        Some(hash) => {
            assert_eq!(encoded.len(), longest, "it is cut where it has to be: {encoded}");
            let mut digest = String::new();
            for byte in Sha256::digest(name) {
                write!(digest, "{byte:02x}").expect("a String takes whatever is written");
            }
            assert_eq!(hash, digest);
        }
        None if name.is_empty() => assert_eq!(encoded, "%"),
        None => assert_eq!(percent_decode_str(&encoded).decode_utf8().ok().as_deref(), Some(name)),
    }
    encoded
}

/// What Windows takes for devices, the last ones with a digit behind them.
const DEVICES: [&str; 6] = ["con", "prn", "aux", "nul", "com", "lpt"];

/// The file: in the directory, and one that every file system takes, and takes for itself.
fn file_key(name: &str) -> String {
    let path = FileLocks::new("/locks").lock_file(name);
    assert_eq!(path.parent(), Some("/locks".as_ref()), "{}", path.display());
    assert_eq!(path.components().count(), 3, "{}", path.display());
    let file = path.file_name().and_then(|file| file.to_str()).expect("it has a name");
    // As many bytes as most file systems take.
    assert!(file.is_ascii() && file.len() <= 255, "{file}");
    assert!(
        file.strip_suffix(".lock").is_some_and(|stem| !stem.is_empty()) && !file.starts_with('.'),
        "{file}"
    );
    let forbidden = |b: u8| b.is_ascii_control() || b"<>:\"/\\|?* ".contains(&b);
    assert!(!file.bytes().any(forbidden), "{file}");
    let device = file.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_port = DEVICES[4..].iter().any(|port| {
        device
            .strip_prefix(port)
            .is_some_and(|number| number.len() == 1 && number.bytes().all(|b| b.is_ascii_digit()))
    });
    assert!(!is_port && !DEVICES[..4].contains(&&*device), "{file} is a device of Windows");
    file.to_ascii_lowercase()
}

/// The key: one hash tag, which is the name.
#[cfg(feature = "redis")]
fn redis_key(name: &str) -> String {
    let key = fencelock::redis::lock_key(name);
    let tag =
        key.strip_prefix("fencelock:{").and_then(|rest| rest.strip_suffix('}')).expect("it is all the tag");
    assert!(!tag.is_empty() && !tag.contains(['{', '}']) && tag.is_ascii(), "{key:?}");
    if name.is_empty() {
        assert_eq!(tag, "%");
    } else {
        assert_eq!(percent_decode_str(tag).decode_utf8().ok().as_deref(), Some(name));
    }
    key
}

fn check(one: &str, other: &str) {
    for ((what, key), (_, others)) in keys(one).into_iter().zip(keys(other)) {
        assert_eq!(one == other, key == others, "{what}: {key:?} and {others:?} for {one:?} and {other:?}");
    }
}

#[test]
fn distinct_names_have_distinct_keys() {
    bolero::check!()
        .with_test_time(budget())
        .with_generator(Pairs)
        .for_each(|pair: &Pair| check(&pair.one, &pair.other));
}

/// The same on text: two names, with the end of a line between them.
#[test]
fn any_two_lines_have_distinct_keys() {
    bolero::check!().with_test_time(short_budget()).for_each(|input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        let (one, other) = text.split_once('\n').unwrap_or((&text, ""));
        check(one, other);
    });
}

/// What goes over the wire for each: the blob's name as the service reads it.
#[cfg(feature = "azure")]
mod blobs {
    use std::panic::AssertUnwindSafe;
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::Duration;

    use async_trait::async_trait;
    use azure_core::http::{
        AsyncRawResponse, ClientOptions, HttpClient, Request, RetryOptions, Transport, Url,
    };
    use fencelock::LockName;
    use fencelock::azure::AzureLocks;
    use fencelock::azure::driver::{BlobContainerClient, BlobContainerClientOptions};
    use fencelock::backend::{Backend as _, Claim, Mode};
    use percent_encoding::percent_decode_str;

    use super::{Pair, Pairs, budget, encoded};

    /// Sends nothing, and remembers what for.
    #[derive(Clone, Debug, Default)]
    struct Nowhere(Arc<Mutex<Option<Url>>>);

    #[async_trait]
    impl HttpClient for Nowhere {
        async fn execute_request(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(request.url().clone());
            Err(azure_core::Error::with_message(azure_core::error::ErrorKind::Io, "there is nobody"))
        }
    }

    /// The blob of the lock of this name.
    async fn blob(locks: &AzureLocks, sent: &Nowhere, name: &str) -> String {
        let claim =
            Claim::new(LockName::new(name), Mode::Exclusive, Duration::from_secs(30)).expect("random bytes");
        assert!(locks.try_claim(&claim, Duration::ZERO).await.is_err(), "nobody answers");
        let url = sent.0.lock().unwrap_or_else(PoisonError::into_inner).take().expect("it was asked for");
        assert_eq!(url.host_str(), Some("account.invalid"), "{url}");
        let segments: Vec<_> = url.path_segments().expect("a path").collect();
        let [container, blob] = *segments else { panic!("the blob isn't in the container: {url}") };
        assert_eq!(container, "locks", "{url}");
        let blob = percent_decode_str(blob).decode_utf8().expect("text").into_owned();
        assert!((1..=254).contains(&blob.len()) && blob.is_ascii() && !blob.ends_with('.'), "{blob}");
        let plain = encoded(name, 252);
        let expected = plain.strip_suffix('.').map_or(plain.clone(), |start| format!("{start}%2E"));
        assert_eq!(blob, expected, "the documented derivation");
        blob
    }

    #[test]
    fn distinct_names_have_distinct_blobs() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let sent = Nowhere::default();
        let client_options = ClientOptions {
            retry: RetryOptions::none(),
            transport: Some(Transport::new(Arc::new(sent.clone()))),
            ..ClientOptions::default()
        };
        let options = BlobContainerClientOptions { client_options, ..BlobContainerClientOptions::default() };
        let url = Url::parse("https://account.invalid/locks").expect("a URL");
        let client = BlobContainerClient::new(url, None, Some(options)).expect("a client");
        let all = AssertUnwindSafe((runtime, AzureLocks::new(client), sent));
        bolero::check!().with_test_time(budget()).with_generator(Pairs).for_each(|pair: &Pair| {
            let AssertUnwindSafe((runtime, locks, sent)) = &all;
            let (one, other) = runtime.block_on(async {
                (blob(locks, sent, &pair.one).await, blob(locks, sent, &pair.other).await)
            });
            assert_eq!(pair.one == pair.other, one.eq_ignore_ascii_case(&other), "{one} and {other}");
        });
    }
}
