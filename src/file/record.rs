//! What stands in a lock file: one line of a fixed length, overwritten in place under the lock.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MAGIC: &str = "fencelock/1";
/// The magic and three numbers of 20 digits, each after a space, and the end of the line.
const LEN: usize = MAGIC.len() + 3 * 21 + 1;

/// The last grant of a lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Its fencing token; 0 if there was none yet.
    pub(super) token: u64,
    /// Until when the lock stays held although it was released, in microseconds since 1970; 0 for not at all.
    kept_until: u64,
    /// For how long that was, in microseconds: more can't be left, whatever happens to the clock.
    kept_for: u64,
}

impl Record {
    pub(super) fn granted(token: u64) -> Self {
        Self { token, ..Self::default() }
    }

    /// The record of a grant that is released now, but stays in force for a while.
    pub(super) fn kept(token: u64, now: SystemTime, kept_for: Duration) -> Self {
        let kept_for = u64::try_from(kept_for.as_micros()).unwrap_or(u64::MAX);
        Self { token, kept_until: micros(now).saturating_add(kept_for), kept_for }
    }

    /// How long the lock still stays held after its release. A wall clock that was set back doesn't lengthen that past
    /// what was asked for.
    pub(super) fn remaining(&self, now: SystemTime) -> Option<Duration> {
        let left = self.kept_until.saturating_sub(micros(now)).min(self.kept_for);
        (left > 0).then(|| Duration::from_micros(left))
    }

    /// The record in a file's content; `None` if that is something else. An empty file has had no grant yet.
    pub(super) fn parse(content: &[u8]) -> Option<Self> {
        if content.is_empty() {
            return Some(Self::default());
        }
        let line = std::str::from_utf8(content).ok().filter(|line| line.len() == LEN)?.strip_suffix('\n')?;
        let mut fields = line.split(' ');
        if fields.next()? != MAGIC {
            return None;
        }
        let mut number = || {
            let digits = fields.next()?;
            let all_digits = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
            all_digits.then(|| digits.parse().ok())?
        };
        let record = Self { token: number()?, kept_until: number()?, kept_for: number()? };
        Some(record)
    }

    fn to_line(self) -> String {
        let Self { token, kept_until, kept_for } = self;
        format!("{MAGIC} {token:020} {kept_until:020} {kept_for:020}\n")
    }

    pub(super) fn read(mut file: &File) -> io::Result<Self> {
        file.seek(SeekFrom::Start(0))?;
        let mut content = Vec::with_capacity(LEN + 1);
        file.take(LEN as u64 + 1).read_to_end(&mut content)?;
        Self::parse(&content).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "it is damaged, or no lock file of fencelock: remove it while no process uses the directory",
            )
        })
    }

    /// Writes it and has it reach the disk.
    pub(super) fn write(self, mut file: &File) -> io::Result<()> {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(self.to_line().as_bytes())?;
        file.sync_data()
    }
}

fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The next version must read what this one wrote.
    #[test]
    fn the_format_is_pinned() {
        let record = Record { token: 1_795_500_000_000_000, kept_until: 7, kept_for: 5 };
        let line = "fencelock/1 00001795500000000000 00000000000000000007 00000000000000000005\n";
        assert_eq!(record.to_line(), line);
        assert_eq!(line.len(), LEN);
    }

    #[test]
    fn a_clock_set_back_keeps_no_longer_than_asked() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let record = Record::kept(1, at(1000), Duration::from_secs(5));
        assert_eq!(record.remaining(at(1001)), Some(Duration::from_secs(4)));
        assert_eq!(record.remaining(at(0)), Some(Duration::from_secs(5)));
        assert_eq!(record.remaining(at(1005)), None);
        assert_eq!(Record::granted(1).remaining(at(0)), None);
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(token: u64, kept_until: u64, kept_for: u64) {
            let record = Record { token, kept_until, kept_for };
            prop_assert_eq!(Record::parse(record.to_line().as_bytes()), Some(record));
        }

        #[test]
        fn anything_else_is_refused(content in prop::collection::vec(any::<u8>(), 0..200)) {
            let read = Record::parse(&content);
            prop_assert!(read.is_none() || content.is_empty());
        }

        #[test]
        fn one_changed_byte_is_read_as_another_record_or_refused(token: u64, at in 0..LEN, byte: u8) {
            let record = Record::granted(token);
            let mut content = record.to_line().into_bytes();
            content[at] = byte;
            if let Some(read) = Record::parse(&content) {
                prop_assert_eq!(read.to_line().into_bytes(), content);
            }
        }
    }
}
