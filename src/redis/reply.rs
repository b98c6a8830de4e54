//! Reads what the scripts answer.

use std::time::Duration;

use redis::Value;

use super::script;
use super::waiting::Reply;
use crate::error::{Error, ErrorKind, Result};

/// What the claim and transfer scripts answer; `None` if it is something else, or for somebody else.
pub(super) fn read_reply(answer: Value, owner: &str) -> Result<Option<Reply>> {
    let Value::Array(answer) = answer else { return Ok(None) };
    let mut answer = answer.into_iter();
    let Some(Value::BulkString(word)) = answer.next() else { return Ok(None) };
    let rest: Vec<_> = answer.collect();
    let is_owner = |bytes: &[u8]| bytes == owner.as_bytes();
    let left = |left: i64| u64::try_from(left).ok().map(Duration::from_millis);
    Ok(Some(match (&*word, &*rest) {
        (b"granted", [Value::Int(token), Value::BulkString(owner)]) if is_owner(owner) => {
            Reply::Granted { token: token.cast_unsigned() }
        }
        (b"mine", [Value::Int(token), Value::BulkString(owner), Value::Int(ms)]) if is_owner(owner) => {
            Reply::Mine { token: token.cast_unsigned(), left: left(*ms).unwrap_or_default() }
        }
        (b"busy", [Value::Int(ms)]) => Reply::Busy { left: left(*ms) },
        (b"gone", []) => Reply::Gone,
        (b"dead", []) => {
            return Err(Error::new(ErrorKind::Unknown, "the claim had been broken off before it arrived"));
        }
        (b"exhausted", []) => {
            return Err(script::exhausted());
        }
        _ => return Ok(None),
    }))
}

/// What the renewal script answers.
pub(super) fn read_renewals(answer: Value) -> Option<Vec<i64>> {
    let Value::Array(answers) = answer else { return None };
    answers
        .into_iter()
        .map(|answer| if let Value::Int(answer) = answer { Some(answer) } else { None })
        .collect()
}
