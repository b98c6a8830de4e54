//! What a server sends in its answers: tokens, in packets.

use super::values::{SECOND, SqlError, Type, Value};

/// More tokens follow.
const MORE: u16 = 0x0001;
/// The statement has failed.
const ERROR: u16 = 0x0002;
/// The number of rows is valid.
const COUNT: u16 = 0x0010;
/// The request was cancelled.
const ATTENTION: u16 = 0x0020;

/// `Latin1_General_CI_AS`.
const COLLATION: [u8; 5] = [0x09, 0x04, 0xd0, 0x00, 0x34];

/// Which kind of end a statement has: of a batch, of one in a procedure, or of a procedure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Done {
    Statement = 0xfd,
    InProcedure = 0xff,
    Procedure = 0xfe,
}

/// A column of an answer.
#[derive(Clone, Debug)]
pub(super) struct Heading {
    pub(super) name: String,
    pub(super) of: Type,
    pub(super) nullable: bool,
}

/// An answer as far as it is written.
#[derive(Debug, Default)]
pub(super) struct Answer {
    bytes: Vec<u8>,
    /// Where the flags of the last end of a statement are, if nothing follows it.
    last_done: Option<usize>,
    /// Whether there was an error since the last end of a statement, or ever.
    failed: bool,
    ever_failed: bool,
}

impl Answer {
    fn push(&mut self, bytes: &[u8]) {
        self.last_done = None;
        self.bytes.extend_from_slice(bytes);
    }

    fn short_text(&mut self, text: &str) {
        let units: Vec<u8> = text.encode_utf16().take(255).flat_map(u16::to_le_bytes).collect();
        self.push(&[u8::try_from(units.len() / 2).expect("at most 255")]);
        self.push(&units);
    }

    fn text(&mut self, text: &str) {
        let units: Vec<u8> = text.encode_utf16().take(2000).flat_map(u16::to_le_bytes).collect();
        self.push(&u16::try_from(units.len() / 2).expect("at most 2000").to_le_bytes());
        self.push(&units);
    }

    /// Writes a token that begins with its length.
    fn with_length(&mut self, token: u8, body: impl FnOnce(&mut Self)) {
        self.push(&[token, 0, 0]);
        let start = self.bytes.len();
        body(self);
        let length = u16::try_from(self.bytes.len() - start).expect("it is short");
        self.bytes[start - 2..start].copy_from_slice(&length.to_le_bytes());
    }

    /// An error.
    pub(super) fn error(&mut self, error: &SqlError) {
        self.failed = true;
        self.ever_failed = true;
        self.message(0xaa, error);
    }

    /// A message that is none.
    pub(super) fn information(&mut self, number: u32, message: &str) {
        self.message(0xab, &SqlError::new(number, 0, message));
    }

    fn message(&mut self, token: u8, error: &SqlError) {
        self.with_length(token, |answer| {
            answer.push(&error.number.to_le_bytes());
            answer.push(&[error.state, error.class]);
            answer.text(&error.message);
            answer.short_text("SQLSERVER");
            answer.short_text("");
            answer.push(&1_u32.to_le_bytes());
        });
    }

    /// The end of a statement that others may follow.
    pub(super) fn done(&mut self, kind: Done, rows: Option<u64>) {
        let failed = if self.failed { ERROR } else { 0 };
        self.write_done(kind, MORE | failed | rows.map_or(0, |_| COUNT), rows.unwrap_or(0));
        self.failed = false;
    }

    fn write_done(&mut self, kind: Done, flags: u16, rows: u64) {
        self.push(&[kind as u8]);
        self.push(&flags.to_le_bytes());
        self.push(&[0xc1, 0]);
        self.push(&rows.to_le_bytes());
        self.last_done = Some(self.bytes.len() - 12);
    }

    /// The end of a batch: the last statement's end says that nothing follows.
    pub(super) fn finish_batch(&mut self) {
        if self.last_done.is_none() || self.failed {
            self.done(Done::Statement, None);
        }
        let place = self.last_done.expect("it was just written");
        self.bytes[place] &= !u8::try_from(MORE).expect("it is small");
    }

    /// The end of a procedure that the client has called.
    pub(super) fn finish_procedure(&mut self, status: i32) {
        self.status(status);
        let failed = if self.ever_failed { ERROR } else { 0 };
        self.write_done(Done::Procedure, failed, 0);
    }

    /// What a procedure has returned.
    pub(super) fn status(&mut self, status: i32) {
        self.push(&[0x79]);
        self.push(&status.to_le_bytes());
    }

    /// The answer to a cancellation.
    pub(super) fn cancelled() -> Vec<u8> {
        let mut answer = Self::default();
        answer.write_done(Done::Statement, ATTENTION, 0);
        answer.bytes
    }

    /// Something of the session has changed.
    pub(super) fn change(&mut self, kind: u8, new: &str, old: &str) {
        self.with_length(0xe3, |answer| {
            answer.push(&[kind]);
            answer.short_text(new);
            answer.short_text(old);
        });
    }

    /// A transaction began.
    pub(super) fn begun(&mut self, transaction: u64) {
        self.with_length(0xe3, |answer| {
            answer.push(&[8, 8]);
            answer.push(&transaction.to_le_bytes());
            answer.push(&[0]);
        });
    }

    /// A transaction was committed, or rolled back.
    pub(super) fn ended(&mut self, transaction: u64, committed: bool) {
        self.with_length(0xe3, |answer| {
            answer.push(&[if committed { 9 } else { 10 }, 0, 8]);
            answer.push(&transaction.to_le_bytes());
        });
    }

    /// The login has succeeded.
    pub(super) fn logged_in(&mut self, version: [u8; 4], database: &str, packet_size: usize, token: bool) {
        self.change(1, database, "master");
        self.information(5701, &format!("Changed database context to '{database}'."));
        self.with_length(0xe3, |answer| {
            answer.push(&[7, 5]);
            answer.push(&COLLATION);
            answer.push(&[0]);
        });
        self.change(2, "us_english", "");
        self.information(5703, "Changed language setting to us_english.");
        self.with_length(0xad, |answer| {
            answer.push(&[1]);
            answer.push(&version);
            answer.short_text("Microsoft SQL Server");
            answer.push(&[16, 0, 0x10, 0x19]);
        });
        self.change(4, &packet_size.to_string(), "4096");
        if token {
            self.push(&[0xae, 2, 0, 0, 0, 0, 0xff]);
        }
        self.finish_batch();
    }

    /// The columns of the rows that follow.
    pub(super) fn columns(&mut self, columns: &[Heading]) {
        self.push(&[0x81]);
        self.push(&u16::try_from(columns.len()).expect("they are few").to_le_bytes());
        for column in columns {
            self.push(&[0, 0, 0, 0, u8::from(column.nullable), 0]);
            self.column_type(column);
            self.short_text(&column.name);
        }
    }

    fn column_type(&mut self, column: &Heading) {
        match (column.of, column.nullable) {
            (Type::Bit, false) => self.push(&[0x32]),
            (Type::TinyInt, false) => self.push(&[0x30]),
            (Type::SmallInt, false) => self.push(&[0x34]),
            (Type::Int, false) => self.push(&[0x38]),
            (Type::BigInt, false) => self.push(&[0x7f]),
            (Type::Bit, true) => self.push(&[0x68, 1]),
            (Type::TinyInt, true) => self.push(&[0x26, 1]),
            (Type::SmallInt, true) => self.push(&[0x26, 2]),
            (Type::Int, true) => self.push(&[0x26, 4]),
            (Type::BigInt, true) => self.push(&[0x26, 8]),
            (Type::DateTime2(digits), _) => self.push(&[0x2a, digits]),
            // All strings are sent in UTF-16.
            (Type::VarChar(size) | Type::NVarChar(size), _) => {
                self.push(&[0xe7]);
                let bytes = if size == 0 || size > 4000 { 0xffff } else { size * 2 };
                self.push(&bytes.to_le_bytes());
                self.push(&COLLATION);
            }
        }
    }

    /// A row.
    pub(super) fn row(&mut self, columns: &[Heading], values: &[Value]) {
        self.push(&[0xd1]);
        for (column, value) in columns.iter().zip(values) {
            self.value(column, value);
        }
    }

    fn value(&mut self, column: &Heading, value: &Value) {
        let size = match column.of {
            Type::Bit | Type::TinyInt => 1,
            Type::SmallInt => 2,
            Type::Int => 4,
            Type::BigInt => 8,
            Type::DateTime2(digits) => return self.time(digits, value),
            Type::VarChar(size) | Type::NVarChar(size) => return self.string(size, value),
        };
        match value.integer() {
            Some(value) => {
                if column.nullable {
                    self.push(&[size]);
                }
                self.push(&value.to_le_bytes()[..usize::from(size)]);
            }
            None => self.push(&[0]),
        }
    }

    fn string(&mut self, size: u16, value: &Value) {
        let long = size == 0 || size > 4000;
        let Some(text) = value.to_text() else {
            return if long { self.push(&[0xff; 8]) } else { self.push(&[0xff; 2]) };
        };
        let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        if !long {
            let units = &units[..units.len().min(usize::from(size) * 2)];
            self.push(&u16::try_from(units.len()).expect("at most 8000").to_le_bytes());
            return self.push(units);
        }
        self.push(&(units.len() as u64).to_le_bytes());
        if !units.is_empty() {
            self.push(&u32::try_from(units.len()).expect("it is in memory").to_le_bytes());
            self.push(&units);
        }
        self.push(&[0; 4]);
    }

    fn time(&mut self, digits: u8, value: &Value) {
        let Value::Time(time) = value else { return self.push(&[0]) };
        let days = time.div_euclid(86_400 * SECOND) + 719_162;
        let of_day = time.rem_euclid(86_400 * SECOND) / 10_i64.pow(7 - u32::from(digits));
        let size = match digits {
            0..=2 => 3,
            3..=4 => 4,
            _ => 5,
        };
        self.push(&[size + 3]);
        self.push(&of_day.to_le_bytes()[..usize::from(size)]);
        self.push(&days.to_le_bytes()[..3]);
    }

    /// All that was written.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Cuts what is to be sent into packets of a kind.
pub(super) fn packets(kind: u8, bytes: &[u8], packet_size: usize, spid: u16) -> Vec<u8> {
    let mut parts = bytes.chunks(packet_size - 8).peekable();
    let mut sent = Vec::with_capacity(bytes.len() + 8);
    let mut number = 0_u8;
    loop {
        let part = parts.next().unwrap_or_default();
        let last = parts.peek().is_none();
        number = number.wrapping_add(1);
        sent.extend([kind, u8::from(last)]);
        sent.extend(u16::try_from(part.len() + 8).expect("a packet is small").to_be_bytes());
        sent.extend(spid.to_be_bytes());
        sent.extend([number, 0]);
        sent.extend(part);
        if last {
            return sent;
        }
    }
}
