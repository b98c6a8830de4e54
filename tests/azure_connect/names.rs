//! What the blobs of locks are called.

use std::collections::BTreeSet;

use fencelock::Provider;
use tokio::task::JoinSet;

use super::servers::azurite_locks::{blob, locks};
use super::servers::left_out;
use super::{is_free, start, take};

/// Any string is the name of a lock of its own, whatever it means in paths, URLs, headers or signatures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_string_is_the_name_of_a_lock_of_its_own() {
    if left_out("azure") {
        return;
    }
    let server = start();
    let provider = || Provider::builder(locks(&server, server.addr(), "locks")).build().expect("defaults");
    let (one, other) = (provider(), provider());
    let (long, longer) = ("a".repeat(10_000), "a".repeat(9_999) + "b");
    let names = [
        "",
        " ",
        "  ",
        ".",
        "..",
        "x",
        "X",
        "x.",
        "x%2E",
        "x%",
        "x..",
        "x/",
        "/",
        "/x",
        "//",
        "a/b",
        "a//b",
        "a/../b",
        "b",
        "../x",
        "a\\b",
        "%",
        "%2F",
        "%2f",
        "%25",
        "a%00b",
        "a\0b",
        "a\nb",
        "a\r\nb",
        "a?b",
        "a?b#c",
        "a#b",
        "a&b=c",
        "a+b",
        "a b",
        "a:b",
        "?comp=lease",
        "ü",
        "u\u{308}",
        "日本語",
        "😀",
        "\u{feff}",
        "\u{202e}x",
        "'\"<>",
        "~",
        "_",
        "-",
        "fencelock:nobody",
        "$root",
        "CON",
        &long,
        &longer,
        &"ü".repeat(5_000),
        &"/".repeat(300),
    ];
    let distinct: BTreeSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), names.len());
    let mut guards = Vec::new();
    for name in names {
        assert!(is_free(&other, name).await, "{name:?} isn't a lock of its own");
        guards.push(take(&one, name).await);
    }
    let blobs = server.blobs("locks");
    let expected: BTreeSet<_> = names.iter().map(|name| blob(name)).collect();
    assert_eq!(blobs.iter().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(blobs.len(), names.len());
    assert!(blobs.iter().all(|blob| blob.len() <= 254), "{blobs:?}");
    for name in names {
        assert!(!is_free(&other, name).await, "{name:?} is held");
    }
    let mut releases = JoinSet::new();
    for guard in guards {
        releases.spawn(async move { guard.release().await.expect("released") });
    }
    crate::servers::locks::within("all are released", releases.join_all()).await;
    for name in names {
        assert!(is_free(&other, name).await, "{name:?} is free");
    }
}
