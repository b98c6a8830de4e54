//! The content of a lock file: what a crash, a full disk, another program or a later version may leave there.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bolero::{Driver, ValueGenerator};
use fencelock::file::FileLocks;
use fencelock::{ErrorKind, FencingToken, LockGuard, LockProvider as _, Provider, Result};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{Choices, budget, short_budget};

const NAME: &str = "x";
/// Of a record: the magic, three numbers of 20 digits with a space before each, and the end of the line.
const LENGTH: usize = 75;

/// What stands in a valid record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    token: u64,
    kept_until: u64,
    kept_for: u64,
}

impl Record {
    fn line(self) -> Vec<u8> {
        let Self { token, kept_until, kept_for } = self;
        format!("fencelock/1 {token:020} {kept_until:020} {kept_for:020}\n").into_bytes()
    }

    /// Written by somebody else than the parser that is tested.
    fn read(content: &[u8]) -> Option<Self> {
        if content.is_empty() {
            return Some(Self { token: 0, kept_until: 0, kept_for: 0 });
        }
        if content.len() != LENGTH || !content.starts_with(b"fencelock/1") || content[LENGTH - 1] != b'\n' {
            return None;
        }
        let number = |at: usize| {
            let field = &content[at..at + 21];
            if field[0] != b' ' || !field[1..].iter().all(u8::is_ascii_digit) {
                return None;
            }
            let number = field[1..].iter().fold(0, |sum, digit| sum * 10 + u128::from(digit - b'0'));
            u64::try_from(number).ok()
        };
        Some(Self { token: number(11)?, kept_until: number(32)?, kept_for: number(53)? })
    }

    fn left(self, now: u64) -> u64 {
        self.kept_until.saturating_sub(now).min(self.kept_for)
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_micros()).expect("before the year 586912")
}

/// A lock, of which the file is overwritten again and again.
struct Lock {
    _dir: TempDir,
    file: PathBuf,
    provider: Provider<FileLocks>,
    runtime: Runtime,
}

impl Lock {
    fn new() -> AssertUnwindSafe<Self> {
        // In memory if possible: a disk would take most of the time.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.expect("a directory");
        let locks = FileLocks::new(dir.path());
        let provider = Provider::builder(locks.clone()).build().expect("defaults");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        AssertUnwindSafe(Self { file: locks.lock_file(NAME), _dir: dir, provider, runtime })
    }

    fn claim(&self) -> Result<Option<LockGuard>> {
        self.runtime.block_on(self.provider.create_lock(NAME).try_acquire())
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.file).expect("the file is there")
    }

    /// A wait for it goes on, however long the record says that it is kept.
    fn is_waited_for(&self) {
        self.runtime.block_on(async {
            let lock = self.provider.create_lock(NAME);
            let waited = tokio::time::timeout(Duration::from_millis(2), lock.acquire()).await;
            assert!(waited.is_err(), "it is kept: {waited:?}");
        });
        // This waits until nothing is under way any more that would see the next content half written.
        assert!(self.claim().expect("a valid record").is_none(), "it is kept");
    }

    /// Claims the lock with this content of its file. The token of the grant, if it is one.
    fn check(&self, content: &[u8]) -> Option<FencingToken> {
        std::fs::write(&self.file, content).expect("written");
        let before = now();
        let claimed = self.claim();
        let Some(record) = Record::read(content) else {
            let error = claimed.expect_err("this is no record");
            assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
            assert_eq!(self.content(), content, "what isn't ours isn't overwritten");
            return None;
        };
        match claimed {
            Ok(Some(guard)) => {
                let token = guard.fencing_token();
                assert_eq!(record.left(now()), 0, "it is kept");
                assert!(token.get() > record.token && token.get() >= before, "{token} after {record:?}");
                assert_eq!(Record::read(&self.content()).map(|record| record.token), Some(token.get()));
                assert!(self.claim().expect("a valid record").is_none(), "it is held");
                self.runtime.block_on(guard.release()).expect("released");
                Some(token)
            }
            Ok(None) => {
                assert!(record.left(before) > 0, "it isn't kept: {record:?}");
                assert_eq!(self.content(), content);
                if record.left(now()) > 1_000_000 {
                    self.is_waited_for();
                }
                None
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
                assert!(record.token >= FencingToken::MAX_DRAWN, "{record:?}: {error}");
                assert_eq!(record.left(now()), 0, "it is kept");
                assert_eq!(self.content(), content);
                None
            }
        }
    }
}

/// Records, and what is almost one.
struct Contents;

#[derive(Clone)]
struct Content(Vec<u8>);

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

fn number<D: Driver>(choices: &mut Choices<'_, D>) -> Option<u64> {
    let about = choices.of(&[0, 0, 1, now(), now() + 3_600_000_000, 1 << 53, 1 << 63, u64::MAX])?;
    Some(match choices.below(4)? {
        0 => choices.number()?,
        1 => about.saturating_sub(choices.number()? % 1000),
        2 => about.saturating_add(choices.number()? % 1000),
        _ => about,
    })
}

fn record<D: Driver>(choices: &mut Choices<'_, D>) -> Option<Record> {
    let token = number(choices)?;
    let (kept_until, kept_for) =
        if choices.one_in(2)? { (0, 0) } else { (number(choices)?, number(choices)?) };
    Some(Record { token, kept_until, kept_for })
}

fn damage<D: Driver>(choices: &mut Choices<'_, D>, content: &mut Vec<u8>) -> Option<()> {
    const FOREIGN: [&[u8]; 16] = [
        b"\0",
        b"\r\n",
        b"\n",
        b" ",
        b"  ",
        b"\t",
        b"+",
        b"-",
        b"0",
        b"9",
        b"99999999999999999999",
        b"fencelock/1",
        b"fencelock/2",
        b"\xef\xbb\xbf",
        "٣".as_bytes(),
        b"\xff",
    ];
    let at = choices.below(content.len() + 1)?;
    let until = at + choices.below(content.len() - at + 1)?;
    let foreign = choices.of(&FOREIGN)?;
    match choices.below(9)? {
        0 => content.truncate(at),
        1 => drop(content.splice(at..at, foreign.iter().copied())),
        2 => drop(content.drain(at..until)),
        3 => content[at..until].fill(0), // a block that was never written
        4 => {
            let end = (at + foreign.len()).min(content.len());
            drop(content.splice(at..end, foreign.iter().copied()));
        }
        5 => content.extend_from_within(at..until),
        6 => {
            let bit = choices.below(8)?;
            if let Some(byte) = content.get_mut(at) {
                *byte ^= 1 << bit;
            }
        }
        7 => content.extend(std::iter::repeat_n(foreign[0], choices.of(&[1, 100, 10_000])?)),
        _ => *content = FOREIGN[choices.below(FOREIGN.len())?].to_vec(),
    }
    Some(())
}

impl ValueGenerator for Contents {
    type Output = Content;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Content> {
        let mut choices = Choices(driver);
        let mut content = record(&mut choices)?.line();
        for _ in 0..choices.below(4)? {
            damage(&mut choices, &mut content)?;
        }
        Some(Content(content))
    }
}

/// A valid record is heeded, and anything else is refused and left as it is.
#[test]
fn a_damaged_record_is_refused_and_a_valid_one_heeded() {
    let lock = Lock::new();
    bolero::check!().with_test_time(budget()).with_generator(Contents).for_each(|content: &Content| {
        lock.check(&content.0);
    });
}

/// The same on plain bytes.
#[test]
fn any_content_is_a_record_or_refused() {
    let lock = Lock::new();
    bolero::check!().with_test_time(short_budget()).for_each(|content: &[u8]| {
        lock.check(content);
    });
}

#[derive(Clone, Debug)]
struct Torn {
    old: Record,
    new: Record,
    written: usize,
}

struct Tears;

impl ValueGenerator for Tears {
    type Output = Torn;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Torn> {
        let mut choices = Choices(driver);
        let (old, mut new) = (record(&mut choices)?, record(&mut choices)?);
        new.token = new.token.max(old.token.saturating_add(1));
        Some(Torn { old, new, written: choices.below(LENGTH + 1)? })
    }
}

/// A write that a crash has cut off leaves no record by which tokens go back.
#[test]
fn a_torn_write_turns_no_token_back() {
    let lock = Lock::new();
    bolero::check!().with_test_time(budget()).with_generator(Tears).for_each(|torn: &Torn| {
        let mut content = torn.old.line();
        content[..torn.written].copy_from_slice(&torn.new.line()[..torn.written]);
        let token = lock.check(&content);
        assert!(token.is_none_or(|token| token.get() > torn.old.token), "{token:?}");
    });
}
