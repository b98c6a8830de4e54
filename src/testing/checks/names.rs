//! Any string is a name, and distinct strings are distinct locks.

use crate::testing::Subject;
use crate::testing::steps::ok;

/// Names that servers, file systems, protocols and query languages have trouble with, or take for each other.
#[rustfmt::skip] // one in each line would be 90 lines
const ODD: &[&str] = &[
    "", " ", "x", "name", "Name", "NAME", "name ", " name", "name\0", "\0", "a\0b", "\n", "a\nb", "a\r\nb", "\t",
    "\u{7f}", "\u{1b}[0m", "{}", "{name}", "{name}:lock", "[name]", "<name>", "*", "?", "n?me", "-", "--", "~", "@",
    "/", "//", "/../", "../", "..", ".", "a/b", "a//b", "a\\b", "C:\\name", "con", "nul", "name.lock", ":", "name:1",
    "'", "''", "\"", "`", "$$", "$1", ";", "'; DROP TABLE locks; --", "%", "%%", "%s", "%2F", "%2f", "%252F", "%00",
    "*1\r\n$8\r\nFLUSHALL\r\n", "$-1\r\n", "\u{e9}", "e\u{301}", "\u{c9}", "ß", "ss", "ﬁ", "fi", "ı", "i", "I", "İ",
    "🔒", "🔒\u{fe0f}", "\u{200d}", "\u{feff}", "\u{feff}name", "\u{202e}name", "日本語", "\u{10ffff}",
];

fn names() -> Vec<String> {
    let mut names: Vec<_> = ODD.iter().map(ToString::to_string).collect();
    // Lengths at which something is cut: 255 and 256 characters that differ at the end, if at all.
    for filler in ["n", "N", "é"] {
        for length in [63, 64, 127, 128, 254, 255, 256] {
            names.push(filler.repeat(length));
        }
        for end in ["a", "b", "A"] {
            names.push(filler.repeat(254) + end);
            names.push(filler.repeat(255) + end);
            names.push(filler.repeat(10 * 1024) + end);
        }
    }
    names
}

/// All of many odd names can be held at once, and then nobody else gets any of them.
pub async fn any_string_is_a_lock_of_its_own(subject: Subject) {
    let (provider, other) = (subject.provider().await, subject.provider().await);
    let mut guards = Vec::new();
    for name in names() {
        let lock = provider.create_lock(&name);
        assert_eq!(lock.name(), name);
        let guard = ok("the grant of an odd name", lock.try_acquire()).await;
        let guard = guard.unwrap_or_else(|| panic!("{name:.80?} is the same lock as an earlier name"));
        assert_eq!(guard.name(), name);
        guards.push(guard);
    }
    for name in names() {
        let busy = ok("a try", other.create_lock(&name).try_acquire()).await;
        assert!(busy.is_none(), "two have {name:.80?}");
    }
    for guard in guards {
        ok("the release of an odd name", guard.release()).await;
    }
    for name in names() {
        let free = ok("a released name", other.create_lock(&name).try_acquire()).await;
        let guard = free.unwrap_or_else(|| panic!("{name:.80?} was released"));
        ok("the release of an odd name", guard.release()).await;
    }
}
