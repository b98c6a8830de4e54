//! The statements.

use super::key::AdvisoryKey;
use crate::error::{Error, ErrorKind, Result};

/// Where releases are told of to those who have announced that they wait.
pub(super) const CHANNEL: &str = "fencelock";

/// How far, in microseconds, fencing tokens may lag behind the server's clock before they are raised to it.
const LAG: i64 = 1_000_000;

/// The server's clock in microseconds since 1970. Not `now()`, which is when the transaction began.
const MICROS: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// A sequence, by its name or by schema and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    quoted: String,
}

impl Sequence {
    pub(super) fn parse(name: &str) -> Result<Self> {
        let parts: Vec<_> = name.split('.').collect();
        if parts.len() > 2 || parts.iter().any(|part| part.is_empty() || part.contains('\0')) {
            return Err(Error::new(
                ErrorKind::Config,
                "the sequence of fencing tokens is named as `name` or `schema.name`",
            ));
        }
        let quoted: Vec<_> = parts.iter().map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
        Ok(Self { quoted: quoted.join(".") })
    }

    /// As it is written in SQL.
    pub(super) fn quoted(&self) -> &str {
        &self.quoted
    }

    /// The statement that makes it.
    pub(super) fn ddl(&self) -> String {
        let name = &self.quoted;
        // Without a cache, or sessions would hand out what they fetched long ago.
        format!(
            "CREATE SEQUENCE IF NOT EXISTS {name} AS bigint MINVALUE 1 MAXVALUE 9007199254740991 CACHE 1 NO CYCLE"
        )
    }

    fn regclass(&self) -> String {
        format!("'{}'::regclass", self.quoted.replace('\'', "''"))
    }

    /// An expression that draws a fencing token: larger than all drawn before, and not far behind the clock.
    ///
    /// Most are the next number of the sequence. When that has fallen behind the clock, or was last raised before this
    /// session began (`began`, by the server's clock), the sequence is raised first: what it had lost in a crash lies
    /// behind that. `began` of `None`: always.
    ///
    /// `setval` isn't safe against others at the same time, so those who raise exclude all who draw, by an advisory lock
    /// that ends with the statement.
    pub(super) fn draw(&self, began: Option<i64>) -> String {
        let (name, regclass, guard) = (&self.quoted, self.regclass(), AdvisoryKey::of_tokens());
        let raise = format!(
            "CASE WHEN pg_advisory_xact_lock({guard}) IS NOT NULL THEN \
             setval({regclass}, greatest(nextval({regclass}), {MICROS})) END"
        );
        match began {
            None => raise,
            Some(began) => format!(
                "CASE WHEN (SELECT last_value FROM {name}) >= greatest({began}, {MICROS} - {LAG}) THEN {} ELSE {raise} END",
                self.next()
            ),
        }
    }

    /// An expression that draws the next fencing token, for a session that has just had one: it can't have fallen behind.
    pub(super) fn next(&self) -> String {
        let (regclass, guard) = (self.regclass(), AdvisoryKey::of_tokens());
        format!("CASE WHEN pg_advisory_xact_lock_shared({guard}) IS NOT NULL THEN nextval({regclass}) END")
    }
}

/// What a session is, and what it finds. `$1`: the sequence.
pub(super) fn identify() -> String {
    format!(
        "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint, pg_is_in_recovery(), \
         current_setting('server_version_num')::integer, current_setting('idle_session_timeout', true) IS NOT NULL, \
         {MICROS}, to_regclass($1) IS NOT NULL FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    )
}

/// What can be wrong with the sequence `$1`: its settings, and this user's rights.
pub(super) const CHECK_SEQUENCE: &str = "SELECT seqincrement = 1 AND seqcache = 1 AND NOT seqcycle, \
     has_sequence_privilege(seqrelid, 'USAGE') AND has_sequence_privilege(seqrelid, 'UPDATE') \
     AND has_sequence_privilege(seqrelid, 'SELECT') \
     FROM pg_sequence WHERE seqrelid = to_regclass($1)";

/// Sets those of the settings `$1` to the values `$2` that this version has.
pub(super) const SET: &str = "SELECT set_config(name, value, false) \
     FROM unnest($1::text[], $2::text[]) AS wanted (name, value) JOIN pg_settings USING (name)";

/// How those of the settings `$1` are that this version has.
pub(super) const AS_FOUND: &str =
    "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY ($1::text[])";

pub(super) const PID: &str = "SELECT pg_backend_pid()";

/// Whether a session, `$1` by its process and `$2` by its beginning, is still there.
pub(super) const IS_THERE: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity \
     WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2)";

/// Whether the process `$1` holds or awaits the advisory lock that `pg_locks` shows as `$2`, `$3` and `$4`.
pub(super) const IS_HELD: &str = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database \
     WHERE locktype = 'advisory' AND datname = current_database() AND pid = $1 \
     AND classid = $2 AND objid = $3 AND objsubid = $4)";

/// Whether it has done all that has arrived there.
pub(super) const HAS_ANSWERED: &str = "SELECT state <> 'active' FROM pg_stat_activity \
     WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2";

/// Whether the process `$1`, which serves a transaction, has done all that has arrived there.
pub(super) const HAS_ANSWERED_IN_TRANSACTION: &str =
    "SELECT state <> 'active' FROM pg_stat_activity WHERE pid = $1";

/// Cancels what that session is doing.
pub(super) const CANCEL: &str = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity \
     WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2";

/// Ends that session.
pub(super) const TERMINATE: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
     WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2";

/// Unlocks all that is held in the process `$1`, if that is the one which carries this out.
pub(super) const UNLOCK_THERE: &str =
    "SELECT CASE WHEN pg_backend_pid() = $1 THEN pg_advisory_unlock_all() IS NOT NULL ELSE false END";

/// How a key is passed: one parameter or two, and the number of the next one.
fn parameters(two: bool) -> (&'static str, usize) {
    if two { ("$1, $2", 3) } else { ("$1", 2) }
}

/// Instead of a token: this is another session than the one that it should be. Nothing has been locked.
pub(super) const SWAPPED: i64 = -1;

/// Tries the lock on the session of this process; with its token if it is granted. A `CASE` is evaluated in order.
pub(super) fn try_lock(pid: i32, draw: &str, two: bool) -> String {
    let (key, _) = parameters(two);
    format!(
        "SELECT CASE WHEN pg_backend_pid() <> {pid} THEN {SWAPPED} WHEN pg_try_advisory_lock({key}) THEN {draw} END"
    )
}

/// Waits for the lock, and draws its token then.
pub(super) fn lock(pid: i32, draw: &str, two: bool) -> String {
    let (key, _) = parameters(two);
    format!(
        "SELECT CASE WHEN pg_backend_pid() <> {pid} THEN {SWAPPED} WHEN pg_advisory_lock({key}) IS NOT NULL THEN {draw} END"
    )
}

/// Frees the lock, and tells of it if anybody has announced that it wants to know: then the key of those who do can't be had.
pub(super) fn unlock(two: bool) -> String {
    let (key, next) = parameters(two);
    format!(
        "SELECT CASE WHEN pg_advisory_unlock({key}) THEN CASE WHEN pg_try_advisory_xact_lock(${next}) THEN true \
         ELSE pg_notify('{CHANNEL}', ${}) IS NOT NULL END ELSE false END",
        next + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        let quoted = |name: &str| Sequence::parse(name).map(|sequence| sequence.quoted);
        assert_eq!(quoted("public.fencelock_token").unwrap(), "\"public\".\"fencelock_token\"");
        assert_eq!(quoted("it\"s").unwrap(), "\"it\"\"s\"");
        assert!(Sequence::parse("it's").unwrap().draw(None).contains("nextval('\"it''s\"'::regclass)"));
        for wrong in ["", ".", "a.", ".a", "a.b.c", "a\0"] {
            assert_eq!(quoted(wrong).unwrap_err().kind(), ErrorKind::Config, "{wrong}");
        }
    }
}
