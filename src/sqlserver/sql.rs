//! The statements: T-SQL that the documentation of SQL Server has, and no more of it than any server of that language has.
//!
//! `@P1` is the proof in each of them: a number that the last row of the answer has to bring back.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// How a session is set, since a login or the server may have other defaults. A wait for a row of the table of tokens takes
/// a part of the TTL at most, since heartbeats stand behind it: nobody keeps one for longer than a statement.
pub(super) fn settings(ttl: Duration) -> String {
    let row_timeout = (ttl / 8).clamp(Duration::from_millis(20), Duration::from_millis(500)).as_millis();
    format!(
        "SET NOCOUNT ON; SET XACT_ABORT OFF; SET IMPLICIT_TRANSACTIONS OFF; SET LOCK_TIMEOUT {row_timeout}; \
         SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
    )
}

/// What a session is, and what it finds. `@P2`: a lock that shows to others that it lives. `@P3`: the principal. `@P4`: the
/// table of tokens.
pub(super) const IDENTIFY: &str = "DECLARE @r int = -999, @e int, @m nvarchar(2048); \
    BEGIN TRY \
    EXEC @r = sp_getapplock @Resource = @P2, @LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = 0, \
    @DbPrincipal = @P3; \
    END TRY \
    BEGIN CATCH SELECT @e = ERROR_NUMBER(), @m = ERROR_MESSAGE(); END CATCH; \
    SELECT @P1, @r, @e, @m, CAST(@@SPID AS int), CAST(OBJECT_ID(@P4) AS int);";

/// Which session it is.
pub(super) const BEAT: &str = "SELECT @P1, CAST(@@SPID AS int);";

/// Whether nobody has the lock `@P2`.
pub(super) const IS_FREE: &str = "SELECT @P1, CAST(APPLOCK_TEST(@P3, @P2, 'Exclusive', 'Session') AS int);";

/// Releases the lock, if it is held: releasing what isn't raises an error.
pub(super) const UNLOCK: &str = "DECLARE @r int = -999; \
    IF APPLOCK_MODE(@P3, @P2, 'Session') <> 'NoLock' \
    EXEC @r = sp_releaseapplock @Resource = @P2, @LockOwner = 'Session', @DbPrincipal = @P3; \
    SELECT @P1, @r;";

/// Takes a lock for the open transaction, within `@P4` milliseconds.
pub(super) const LOCK_IN_TRANSACTION: &str = "DECLARE @r int = -999, @e int, @m nvarchar(2048), @open int = @@TRANCOUNT; \
    IF @open > 0 BEGIN \
    BEGIN TRY \
    EXEC @r = sp_getapplock @Resource = @P2, @LockMode = 'Exclusive', @LockOwner = 'Transaction', @LockTimeout = @P4, \
    @DbPrincipal = @P3; \
    IF @r = -999 AND APPLOCK_TEST(@P3, @P2, 'Exclusive', 'Transaction') = 0 SET @r = -1; \
    END TRY \
    BEGIN CATCH SELECT @e = ERROR_NUMBER(), @m = ERROR_MESSAGE(); END CATCH; \
    END; \
    SELECT @P1, @r, @e, @m, @open;";

/// The table of fencing tokens, by its name or by schema and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TokenTable {
    quoted: String,
}

impl Default for TokenTable {
    fn default() -> Self {
        Self { quoted: "[dbo].[fencelock_token]".to_owned() }
    }
}

impl TokenTable {
    pub(super) fn parse(name: &str) -> Result<Self> {
        let parts: Vec<_> = name.split('.').collect();
        if parts.len() > 2 || parts.iter().any(|part| part.is_empty() || part.contains('\0')) {
            return Err(Error::new(
                ErrorKind::Config,
                "the table of fencing tokens is named as `name` or `schema.name`",
            ));
        }
        let quoted: Vec<_> = parts.iter().map(|part| format!("[{}]", part.replace(']', "]]"))).collect();
        Ok(Self { quoted: quoted.join(".") })
    }

    /// As it is written in SQL.
    pub(super) fn quoted(&self) -> &str {
        &self.quoted
    }

    /// Makes it. What is wrong with that is in the answer.
    pub(super) fn create(&self) -> String {
        let table = &self.quoted;
        format!(
            "DECLARE @e int, @m nvarchar(2048); \
             BEGIN TRY \
             CREATE TABLE {table} (bucket int NOT NULL PRIMARY KEY, token bigint NOT NULL); \
             END TRY BEGIN CATCH SELECT @e = ERROR_NUMBER(), @m = ERROR_MESSAGE(); END CATCH; \
             SELECT @P1, 0, @e, @m;"
        )
    }

    /// Draws a token from the row `@bucket`, as its one result: larger than all before, and not behind the server's clock. The
    /// row of a new table is made with it. A statement of its own, since an error about the table wouldn't be caught otherwise.
    pub(super) fn draw(&self) -> String {
        let table = &self.quoted;
        // In microseconds since 1970, of which the server's own arithmetic overflows in 2038.
        format!(
            "DECLARE @now datetime2(3) = SYSUTCDATETIME(), @us bigint; \
             SET @us = (CAST(DATEDIFF(second, '20000101', @now) AS bigint) + 946684800) * 1000000 \
             + DATEPART(millisecond, @now) * 1000; \
             UPDATE {table} SET token = CASE WHEN token < @us THEN @us ELSE token + 1 END OUTPUT inserted.token \
             WHERE bucket = @bucket; \
             IF @@ROWCOUNT = 0 BEGIN INSERT INTO {table} (bucket, token) VALUES (@bucket, @us); SELECT @us; END;"
        )
    }
}

/// Draws a token by the statement `@P5`, from the row `@P4`.
const DRAW: &str = "EXEC sp_executesql @P5, N'@bucket int', @P4;";

/// A claim: takes the lock with `take`, and draws its token if it has it. The last row has the proof, what `sp_getapplock`
/// returned, and the number and message of the error that the token ended in, after which nothing is held.
fn claim(before: &str, take: &str, after: &str) -> String {
    let release = "EXEC sp_releaseapplock @Resource = @P2, @LockOwner = 'Session', @DbPrincipal = @P3;";
    // Of a new table somebody else may have made the row meanwhile.
    format!(
        "DECLARE @r int = -999, @mark int = -999, @e int, @m nvarchar(2048); \
         {before} \
         BEGIN TRY \
         {take} \
         IF @r >= 0 {DRAW} \
         END TRY \
         BEGIN CATCH \
         SELECT @e = ERROR_NUMBER(), @m = ERROR_MESSAGE(); \
         IF @r >= 0 AND (@e = 2601 OR @e = 2627) BEGIN SELECT @e = NULL, @m = NULL; {DRAW} END \
         ELSE IF @r >= 0 {release} \
         END CATCH; \
         {after} \
         SELECT @P1, @r, @e, @m;"
    )
}

/// Tries the lock `@P2` of the principal `@P3`, with a token if it is granted.
///
/// What the session has already, under another spelling, it would be given again. One server says -999 instead of -1 of a lock
/// that somebody has; then another question tells them apart.
pub(super) fn try_lock() -> String {
    let take = "IF APPLOCK_MODE(@P3, @P2, 'Session') <> 'NoLock' SET @r = -1 \
                ELSE EXEC @r = sp_getapplock @Resource = @P2, @LockMode = 'Exclusive', @LockOwner = 'Session', \
                @LockTimeout = 0, @DbPrincipal = @P3; \
                IF @r = -999 AND APPLOCK_TEST(@P3, @P2, 'Exclusive', 'Session') = 0 SET @r = -1;";
    claim("", take, "")
}

/// Waits for the lock up to `@P6` milliseconds. Another one, `@P7` of the principal `@P8`, is held as long as the server works
/// at it.
pub(super) fn lock() -> String {
    let mark = "EXEC @mark = sp_getapplock @Resource = @P7, @LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = 0, \
                @DbPrincipal = @P8;";
    let take = "EXEC @r = sp_getapplock @Resource = @P2, @LockMode = 'Exclusive', @LockOwner = 'Session', \
                @LockTimeout = @P6, @DbPrincipal = @P3;";
    let done =
        "IF @mark >= 0 EXEC sp_releaseapplock @Resource = @P7, @LockOwner = 'Session', @DbPrincipal = @P8;";
    claim(mark, take, done)
}

/// Draws a token for a lock that is held.
pub(super) fn token() -> String {
    format!(
        "DECLARE @e int, @m nvarchar(2048); \
         BEGIN TRY {DRAW} END TRY \
         BEGIN CATCH \
         SELECT @e = ERROR_NUMBER(), @m = ERROR_MESSAGE(); \
         IF @e = 2601 OR @e = 2627 BEGIN SELECT @e = NULL, @m = NULL; {DRAW} END \
         END CATCH; \
         SELECT @P1, 0, @e, @m;"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        assert_eq!(
            TokenTable::parse(super::super::SqlServerLocks::TOKEN_TABLE).unwrap(),
            TokenTable::default()
        );
        let quoted = |name: &str| TokenTable::parse(name).map(|table| table.quoted);
        assert_eq!(quoted("dbo.fencelock_token").unwrap(), "[dbo].[fencelock_token]");
        assert_eq!(quoted("it]s").unwrap(), "[it]]s]");
        for wrong in ["", ".", "a.", ".a", "a.b.c", "a\0"] {
            assert_eq!(quoted(wrong).unwrap_err().kind(), ErrorKind::Config, "{wrong}");
        }
    }
}
