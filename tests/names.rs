//! Distinct strings are distinct locks: the encoding of names, and the files that it makes.

use std::collections::HashSet;

use fencelock::LockName;
use fencelock::file::FileLocks;
use proptest::prelude::*;

/// Names that a careless encoding would confuse.
fn tricky() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[a-cA-C%./~_0-9 -]{0,6}",
        "(con|CON|nul|com1|lpt9|\\.\\.|%|%25|%2e|%2E)[a-z.]{0,3}",
        "[aé\u{301}e]{0,4}",
        "x{100,300}[a-d]{0,2}",
    ]
}

fn decoded(encoded: &str) -> Option<String> {
    if encoded == "%" {
        return Some(String::new());
    }
    let bytes: Vec<u8> = percent_encoding::percent_decode_str(encoded).collect();
    String::from_utf8(bytes).ok()
}

proptest! {
    #[test]
    fn distinct_names_have_distinct_encodings_in_either_case(a in tricky(), b in tricky(), max_len in 66..300_usize) {
        let encode = |name: &str| LockName::new(name).encode(max_len).to_ascii_lowercase();
        prop_assert_eq!(a == b, encode(&a) == encode(&b));
    }

    #[test]
    fn an_encoding_fits_and_is_plain(name in tricky(), max_len in 66..300_usize) {
        let encoded = LockName::new(&*name).encode(max_len);
        prop_assert!((1..=max_len).contains(&encoded.len()));
        prop_assert!(encoded.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.%~".contains(&b)), "{}", encoded);
        prop_assert!(!encoded.starts_with('.'), "{}", encoded);
    }

    #[test]
    fn a_short_encoding_can_be_read_back(name in tricky()) {
        let encoded = LockName::new(&*name).encode(2000);
        prop_assert_eq!(decoded(&encoded), Some(name));
    }

    #[test]
    fn distinct_names_have_distinct_files_within_the_directory(a in tricky(), b in tricky()) {
        let locks = FileLocks::new("/dir");
        let (file_a, file_b) = (locks.lock_file(&a), locks.lock_file(&b));
        let lower = |path: &std::path::Path| path.to_string_lossy().to_lowercase();
        prop_assert_eq!(a == b, lower(&file_a) == lower(&file_b));
        prop_assert_eq!(file_a.parent(), Some("/dir".as_ref()));
        prop_assert!(file_a.file_name().is_some_and(|name| name.len() <= 255));
    }
}

#[test]
fn device_names_are_not_file_names() {
    let locks = FileLocks::new("/dir");
    let stems: HashSet<_> = ["con", "con.x", "nul", "aux", "prn", "com1", "lpt9", "com10", "console"]
        .into_iter()
        .map(|name| locks.lock_file(name).file_name().expect("a file").to_string_lossy().into_owned())
        .collect();
    assert!(stems.contains("com10.lock") && stems.contains("console.lock"));
    assert_eq!(stems.iter().filter(|stem| stem.starts_with('%')).count(), 7, "{stems:?}");
}

/// A service that changes its directory later must not get other locks by that.
#[test]
fn a_relative_directory_is_that_of_the_moment() {
    let file = FileLocks::new("some/dir").lock_file("x");
    assert_eq!(file, std::env::current_dir().expect("a directory").join("some/dir/x.lock"));
}
