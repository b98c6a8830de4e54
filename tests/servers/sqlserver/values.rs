//! The values of Transact-SQL, their types, and the errors that they make.

use std::cmp::Ordering;
use std::sync::Arc;

/// An error as the client sees it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SqlError {
    pub(super) number: u32,
    pub(super) class: u8,
    pub(super) state: u8,
    pub(super) message: String,
}

impl SqlError {
    pub(super) fn new(number: u32, class: u8, message: impl Into<String>) -> Self {
        Self { number, class, state: 1, message: message.into() }
    }
}

/// A type. Of a string, the size is in characters, and 0 stands for `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Bit,
    TinyInt,
    SmallInt,
    Int,
    BigInt,
    VarChar(u16),
    NVarChar(u16),
    /// With so many digits after the second.
    DateTime2(u8),
}

impl Type {
    pub(super) fn named(name: &str, size: Option<u16>) -> Option<Self> {
        Some(match name {
            "bit" => Self::Bit,
            "tinyint" => Self::TinyInt,
            "smallint" => Self::SmallInt,
            "int" | "integer" => Self::Int,
            "bigint" => Self::BigInt,
            "varchar" | "char" => Self::VarChar(size.unwrap_or(1)),
            "nvarchar" | "nchar" => Self::NVarChar(size.unwrap_or(1)),
            "sysname" => Self::NVarChar(128),
            "datetime2" => {
                Self::DateTime2(size.map_or(7, |size| u8::try_from(size.min(7)).expect("up to 7")))
            }
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bit => "bit",
            Self::TinyInt => "tinyint",
            Self::SmallInt => "smallint",
            Self::Int => "int",
            Self::BigInt => "bigint",
            Self::VarChar(_) => "varchar",
            Self::NVarChar(_) => "nvarchar",
            Self::DateTime2(_) => "datetime2",
        }
    }

    /// Which of two types an expression has that has both: the one with the higher precedence.
    pub(super) fn with(self, other: Self) -> Self {
        let rank = |of: Self| match of {
            Self::DateTime2(_) => 7,
            Self::BigInt => 6,
            Self::Int => 5,
            Self::SmallInt => 4,
            Self::TinyInt => 3,
            Self::Bit => 2,
            Self::NVarChar(_) => 1,
            Self::VarChar(_) => 0,
        };
        match (self, other) {
            (Self::NVarChar(one), Self::NVarChar(other) | Self::VarChar(other))
            | (Self::VarChar(other), Self::NVarChar(one)) => Self::NVarChar(longer(one, other)),
            (Self::VarChar(one), Self::VarChar(other)) => Self::VarChar(longer(one, other)),
            _ if rank(self) >= rank(other) => self,
            _ => other,
        }
    }
}

fn longer(one: u16, other: u16) -> u16 {
    if one == 0 || other == 0 { 0 } else { one.max(other) }
}

/// A value. The smaller integers are `Int` too.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Bit(bool),
    Int(i32),
    BigInt(i64),
    Text(Arc<str>),
    /// In units of 100 nanoseconds, since 1970.
    Time(i64),
}

/// A part of what identifies a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum KeyPart {
    Integer(i64),
    Text(String),
}

/// What identifies a row in its table.
pub(super) type RowKey = Vec<KeyPart>;

/// So many units of a [`Value::Time`] are a second.
pub(super) const SECOND: i64 = 10_000_000;

impl Value {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(text.into())
    }

    pub(super) fn is_null(&self) -> bool {
        *self == Self::Null
    }

    /// As an integer, if it is one.
    pub(super) fn integer(&self) -> Option<i64> {
        match self {
            Self::Bit(bit) => Some((*bit).into()),
            Self::Int(value) => Some((*value).into()),
            Self::BigInt(value) => Some(*value),
            _ => None,
        }
    }

    /// As a string.
    pub(super) fn to_text(&self) -> Option<Arc<str>> {
        match self {
            Self::Null => None,
            Self::Text(text) => Some(text.clone()),
            Self::Time(time) => {
                let (days, rest) = (time.div_euclid(86_400 * SECOND), time.rem_euclid(86_400 * SECOND));
                let (year, month, day) = date(days);
                let (seconds, part) = (rest / SECOND, rest % SECOND);
                let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
                Some(
                    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{part:07}")
                        .into(),
                )
            }
            other => other.integer().map(|value| value.to_string().into()),
        }
    }

    /// The type of a value that nobody has declared.
    pub(super) fn own_type(&self) -> Type {
        match self {
            Self::Null | Self::Int(_) => Type::Int,
            Self::Bit(_) => Type::Bit,
            Self::BigInt(_) => Type::BigInt,
            Self::Text(text) => {
                let length = text.encode_utf16().count().max(1);
                Type::NVarChar(u16::try_from(length).ok().filter(|length| *length <= 4000).unwrap_or(0))
            }
            Self::Time(_) => Type::DateTime2(7),
        }
    }

    /// Converts it, as an assignment does: strings are cut, and numbers must fit.
    pub(super) fn cast(&self, to: Type) -> Result<Self, SqlError> {
        if self.is_null() {
            return Ok(Self::Null);
        }
        match to {
            Type::VarChar(size) | Type::NVarChar(size) => {
                let text = self.to_text().expect("it isn't null");
                Ok(Self::Text(cut(&text, size)))
            }
            Type::DateTime2(digits) => self.to_time(digits),
            Type::Bit => {
                let word =
                    if let Self::Text(text) = self { text.trim().to_lowercase() } else { String::new() };
                match word.as_str() {
                    "true" => Ok(Self::Bit(true)),
                    "false" => Ok(Self::Bit(false)),
                    _ => Ok(Self::Bit(self.to_integer(to)? != 0)),
                }
            }
            _ => {
                let value = self.to_integer(to)?;
                let fits = match to {
                    Type::TinyInt => u8::try_from(value).is_ok(),
                    Type::SmallInt => i16::try_from(value).is_ok(),
                    _ => true,
                };
                match i32::try_from(value) {
                    _ if to == Type::BigInt => Ok(Self::BigInt(value)),
                    Ok(value) if fits => Ok(Self::Int(value)),
                    _ => Err(overflow(to)),
                }
            }
        }
    }

    fn to_integer(&self, to: Type) -> Result<i64, SqlError> {
        if let Some(value) = self.integer() {
            return Ok(value);
        }
        let Self::Text(text) = self else {
            let message = format!(
                "Implicit conversion from data type datetime2 to {} is not allowed. Use the CONVERT function to run \
                 this query.",
                to.name()
            );
            return Err(SqlError::new(257, 16, message));
        };
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Ok(0);
        }
        trimmed.parse().map_err(|_| {
            let message = format!(
                "Conversion failed when converting the nvarchar value '{text}' to data type {}.",
                to.name()
            );
            SqlError::new(245, 16, message)
        })
    }

    fn to_time(&self, digits: u8) -> Result<Self, SqlError> {
        let time = match self {
            Self::Time(time) => *time,
            Self::Text(text) => time(text).ok_or_else(|| {
                let message = "Conversion failed when converting date and/or time from character string.";
                SqlError::new(241, 16, message)
            })?,
            _ => {
                return Err(SqlError::new(206, 16, "Operand type clash: int is incompatible with datetime2"));
            }
        };
        let unit = 10_i64.pow(7 - u32::from(digits));
        Ok(Self::Time((time + unit / 2).div_euclid(unit) * unit))
    }

    /// Compares as a case-insensitive collation does. None if one is NULL.
    pub(super) fn compare(&self, other: &Self) -> Result<Option<Ordering>, SqlError> {
        Ok(match (self, other) {
            (Self::Null, _) | (_, Self::Null) => None,
            (Self::Text(one), Self::Text(other)) => Some(folded(one).cmp(&folded(other))),
            (Self::Time(one), Self::Time(other)) => Some(one.cmp(other)),
            (Self::Time(one), other) => match other.to_time(7)? {
                Self::Time(other) => Some(one.cmp(&other)),
                _ => None,
            },
            (one, Self::Time(other)) => match one.to_time(7)? {
                Self::Time(one) => Some(one.cmp(other)),
                _ => None,
            },
            (one, other) => Some(one.to_integer(Type::Int)?.cmp(&other.to_integer(Type::Int)?)),
        })
    }

    /// What identifies a row with this value in its key.
    pub(super) fn key(&self) -> KeyPart {
        match self.integer() {
            Some(value) => KeyPart::Integer(value),
            None => KeyPart::Text(self.to_text().map(|text| folded(&text)).unwrap_or_default()),
        }
    }
}

/// As an error about a number that doesn't fit.
pub(super) fn overflow(to: Type) -> SqlError {
    let message = format!("Arithmetic overflow error converting expression to data type {}.", to.name());
    SqlError { state: 2, ..SqlError::new(8115, 16, message) }
}

fn folded(text: &str) -> String {
    text.trim_end_matches(' ').to_lowercase()
}

/// The first so many units of UTF-16, all if it is 0.
pub(super) fn cut(text: &Arc<str>, size: u16) -> Arc<str> {
    // A unit takes at least a byte.
    if size == 0 || text.len() <= usize::from(size) {
        return text.clone();
    }
    let units: Vec<u16> = text.encode_utf16().collect();
    if units.len() <= usize::from(size) {
        return text.clone();
    }
    String::from_utf16_lossy(&units[..usize::from(size)]).into()
}

/// Computes with two values, of which none is NULL.
pub(super) fn arithmetic(sign: char, left: &Value, right: &Value) -> Result<Value, SqlError> {
    if let (Value::Text(left), Value::Text(right), '+') = (left, right, sign) {
        return Ok(Value::Text(format!("{left}{right}").into()));
    }
    let big = matches!(left, Value::BigInt(_)) || matches!(right, Value::BigInt(_));
    let to = if big { Type::BigInt } else { Type::Int };
    let (left, right) = (left.to_integer(to)?, right.to_integer(to)?);
    if matches!(sign, '/' | '%') && right == 0 {
        return Err(SqlError::new(8134, 16, "Divide by zero error encountered."));
    }
    let result = match sign {
        '+' => left.checked_add(right),
        '-' => left.checked_sub(right),
        '*' => left.checked_mul(right),
        '/' => left.checked_div(right),
        '%' => left.checked_rem(right),
        _ => Some(left & right),
    };
    Value::BigInt(result.ok_or_else(|| overflow(to))?).cast(to)
}

/// The days since 1970 of a date.
pub(super) fn days(year: i64, month: i64, day: i64) -> i64 {
    let years = if month <= 2 { year - 1 } else { year };
    let (century_of_leaps, of_era) = (years.div_euclid(400), years.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let of_leaps = of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    century_of_leaps * 146_097 + of_leaps - 719_468
}

/// The date, so many days after 1970.
fn date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (cycle, of_cycle) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let of_era = (of_cycle - of_cycle / 1460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
    let of_year = of_cycle - (365 * of_era + of_era / 4 - of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (of_era + cycle * 400 + i64::from(month <= 2), month, day)
}

/// `YYYYMMDD` or `YYYY-MM-DD`, and perhaps `hh:mm[:ss[.fraction]]`.
fn time(text: &str) -> Option<i64> {
    let text = text.trim();
    let (date, clock) = text.split_once([' ', 'T']).unwrap_or((text, "00:00:00"));
    let digits: String = date.chars().filter(|letter| *letter != '-').collect();
    if digits.len() != 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number = |range: std::ops::Range<usize>| digits[range].parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(4..6)?, number(6..8)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some(days(year, month, day) * 86_400 * SECOND + time_of_day(clock)?)
}

/// `hh:mm[:ss[.fraction]]`.
pub(super) fn time_of_day(clock: &str) -> Option<i64> {
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let parts: Vec<i64> = clock.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let seconds = match parts[..] {
        [hours, minutes] => hours * 3600 + minutes * 60,
        [hours, minutes, seconds] => hours * 3600 + minutes * 60 + seconds,
        _ => return None,
    };
    let fraction: i64 = format!("{fraction:0<7}").get(..7)?.parse().ok()?;
    Some(seconds * SECOND + fraction)
}

/// How many boundaries of a unit are between two times.
pub(super) fn difference(unit: &str, from: i64, to: i64) -> Option<i64> {
    let units = match unit {
        "day" | "dd" | "d" => 86_400 * SECOND,
        "hour" | "hh" => 3600 * SECOND,
        "minute" | "mi" | "n" => 60 * SECOND,
        "second" | "ss" | "s" => SECOND,
        "millisecond" | "ms" => SECOND / 1000,
        "microsecond" | "mcs" => SECOND / 1_000_000,
        _ => return None,
    };
    Some(to.div_euclid(units) - from.div_euclid(units))
}

/// A part of a time.
pub(super) fn part(unit: &str, time: i64) -> Option<i64> {
    let (days, rest) = (time.div_euclid(86_400 * SECOND), time.rem_euclid(86_400 * SECOND));
    Some(match unit {
        "year" | "yy" | "yyyy" => date(days).0,
        "month" | "mm" | "m" => date(days).1,
        "day" | "dd" | "d" => date(days).2,
        "hour" | "hh" => rest / SECOND / 3600,
        "minute" | "mi" | "n" => rest / SECOND / 60 % 60,
        "second" | "ss" | "s" => rest / SECOND % 60,
        "millisecond" | "ms" => rest % SECOND / (SECOND / 1000),
        "microsecond" | "mcs" => rest % SECOND / (SECOND / 1_000_000),
        "nanosecond" | "ns" => rest % SECOND * 100,
        _ => return None,
    })
}
