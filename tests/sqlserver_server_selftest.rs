//! What `tests/servers/sqlserver` does is what the documentation of SQL Server says.

mod servers;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use servers::sqlserver::{ADMINISTRATOR, DATABASE, PASSWORD, SqlServer, USER};
use tiberius::error::Error;
use tiberius::{AuthMethod, Client, Command, Config, EncryptionLevel, FromSql, Row, ToSql};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::compat::{Compat, TokioAsyncWriteCompatExt};

/// Long enough for an answer that isn't lost.
const SILENCE: Duration = Duration::from_millis(200);

type Session = Client<Compat<TcpStream>>;

const SETTINGS: &str = "SET NOCOUNT ON; SET XACT_ABORT OFF; SET IMPLICIT_TRANSACTIONS OFF; SET LOCK_TIMEOUT 2000; \
                        SET TRANSACTION ISOLATION LEVEL READ COMMITTED;";

const TABLE: &str = "CREATE TABLE [dbo].[fencelock_token] (bucket int NOT NULL PRIMARY KEY, token bigint NOT NULL); \
                     INSERT INTO [dbo].[fencelock_token] (bucket, token) VALUES (0, 0), (1, 0), (2, 0), (3, 0);";

const TAKE: &str = "
DECLARE @r int = -999, @e int, @m nvarchar(2048), @now datetime2(3), @us bigint;
BEGIN TRY
  EXEC @r = sp_getapplock @Resource = @P2, @LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = 0,
    @DbPrincipal = @P3;
  IF @r = -999 AND APPLOCK_TEST(@P3, @P2, 'Exclusive', 'Session') = 0 SET @r = -1;
  IF @r >= 0
  BEGIN
    SET @now = SYSUTCDATETIME();
    SET @us = (CAST(DATEDIFF(second, '20000101', @now) AS bigint) + 946684800) * 1000000
      + DATEPART(millisecond, @now) * 1000;
    UPDATE [dbo].[fencelock_token] SET token = CASE WHEN token < @us THEN @us ELSE token + 1 END
      OUTPUT inserted.token WHERE bucket = @P4;
  END
END TRY
BEGIN CATCH
  SELECT @e = ERROR_NUMBER(), @m = ERROR_MESSAGE();
  IF @r >= 0 EXEC sp_releaseapplock @Resource = @P2, @LockOwner = 'Session', @DbPrincipal = @P3;
END CATCH;
SELECT @P1, @r, @e, @m;";

/// Waits for ever for the session's lock named `a`.
const WAIT: &str =
    "DECLARE @r int; EXEC @r = sp_getapplock 'a', 'Exclusive', 'Session', 600000; SELECT @r, @@SPID";

fn config(server: &SqlServer) -> Config {
    let mut config = Config::new();
    config.host("127.0.0.1");
    config.port(server.port());
    config.database(DATABASE);
    config.authentication(AuthMethod::sql_server(USER, PASSWORD));
    config.encryption(EncryptionLevel::NotSupported);
    config
}

async fn connect(config: Config) -> tiberius::Result<Session> {
    let stream = TcpStream::connect(config.get_addr()).await?;
    Box::pin(Client::connect(config, stream.compat_write())).await
}

async fn session(server: &SqlServer) -> Session {
    connect(config(server)).await.expect("it can log in")
}

async fn administrator(server: &SqlServer) -> Session {
    let mut config = config(server);
    config.authentication(AuthMethod::sql_server(ADMINISTRATOR, PASSWORD));
    connect(config).await.expect("it can log in")
}

/// All rows of all results, by a batch.
async fn batch(session: &mut Session, sql: &str) -> tiberius::Result<Vec<Row>> {
    Ok(session.simple_query(sql).await?.into_results().await?.into_iter().flatten().collect())
}

/// The only value of the last row.
async fn ask<T: for<'a> FromSql<'a>>(session: &mut Session, sql: &str) -> Option<T> {
    let mut rows = batch(session, sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    rows.pop().expect("a row").get::<T, _>(0)
}

async fn text(session: &mut Session, sql: &str) -> Option<String> {
    let mut rows = batch(session, sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    rows.pop().expect("a row").get::<&str, _>(0).map(str::to_owned)
}

async fn query(session: &mut Session, sql: &str, values: &[&dyn ToSql]) -> tiberius::Result<Vec<Vec<Row>>> {
    session.query(sql, values).await?.into_results().await
}

/// The number and class of the error that it has to end in.
async fn fails(session: &mut Session, sql: &str) -> (u32, u8) {
    let error = batch(session, sql).await.expect_err("it fails");
    number(&error)
}

fn number(error: &Error) -> (u32, u8) {
    match error {
        Error::Server(error) => (error.code(), error.class()),
        other => panic!("not from the server: {other}"),
    }
}

/// What `sp_getapplock` returns for the arguments.
async fn get(session: &mut Session, arguments: &str) -> i32 {
    ask(session, &format!("DECLARE @r int; EXEC @r = sp_getapplock {arguments}; SELECT @r"))
        .await
        .expect("a status")
}

/// The token, or none, and the status, the error and its message.
async fn take(session: &mut Session, resource: &str) -> (Option<i64>, i32, Option<i32>) {
    let results =
        query(session, TAKE, &[&7_i64, &resource, &"public", &2_i32]).await.expect("it is carried out");
    let last = &results.last().expect("a result")[0];
    assert_eq!(last.get::<i64, _>(0), Some(7));
    let token = if results.len() > 1 { results[0][0].get::<i64, _>(0) } else { None };
    (token, last.get(1).expect("a status"), last.get(2))
}

async fn is_lost(session: &mut Session) -> bool {
    match batch(session, "SELECT 1").await {
        Ok(_) => false,
        Err(error) => {
            assert!(!matches!(error, Error::Server(_)), "{error}");
            true
        }
    }
}

#[tokio::test]
async fn logins_need_their_password_and_an_existing_database() {
    let server = SqlServer::options().login("other", "p'w;d").max_connections(2).start();
    let url = format!("sqlserver://{USER}:{PASSWORD}@127.0.0.1:{}/{DATABASE}?encrypt=off", server.port());
    assert_eq!(server.url(), url);
    let with = |user: &str, password: &str, database: &str| {
        let mut config = config(&server);
        config.database(database);
        config.authentication(AuthMethod::sql_server(user, password));
        connect(config)
    };
    assert_eq!(number(&with(USER, "wrong", DATABASE).await.expect_err("wrong")), (18456, 14));
    assert_eq!(number(&with("nobody", PASSWORD, DATABASE).await.expect_err("unknown")), (18456, 14));
    assert_eq!(number(&with(USER, PASSWORD, "nowhere").await.expect_err("unknown")), (4060, 11));
    let mut one = with("other", "p'w;d", DATABASE).await.expect("it is a login");
    assert_eq!(text(&mut one, "SELECT SUSER_SNAME()").await.as_deref(), Some("other"));
    assert_eq!(text(&mut one, "SELECT DB_NAME()").await.as_deref(), Some(DATABASE));
    let _two = session(&server).await;
    assert_eq!(number(&connect(config(&server)).await.expect_err("too many")), (17809, 20));
    assert_eq!(server.sessions().len(), 2);
}

#[tokio::test]
async fn a_claim_takes_the_lock_and_draws_tokens_that_grow() {
    let server = SqlServer::start();
    let (mut one, mut other) = (session(&server).await, session(&server).await);
    batch(&mut one, SETTINGS).await.unwrap();
    batch(&mut one, TABLE).await.unwrap();
    let (token, status, error) = take(&mut one, "a").await;
    assert_eq!((status, error), (0, None));
    let first = token.expect("drawn");
    assert!(first > 1_600_000_000_000_000 && first % 1000 == 0, "{first}");
    assert_eq!(take(&mut other, "a").await, (None, -1, None));
    server.set_clock_offset(-3_600_000_000);
    assert_eq!(take(&mut one, "a").await, (Some(first + 1), 0, None));
    assert_eq!(
        ask::<i64>(&mut other, "SELECT token FROM fencelock_token WHERE bucket = 2").await,
        Some(first + 1)
    );
    assert_eq!(
        ask::<i64>(&mut other, "SELECT MAX(token) FROM fencelock_token WHERE bucket <> 2").await,
        Some(0)
    );
    assert_eq!(server.holder(DATABASE, "a"), Some(51));
    for (after, holder) in [(0, Some(51)), (1, None)] {
        let release = "DECLARE @r int; IF APPLOCK_MODE(@P3, @P2, 'Session') = 'NoLock' SET @r = -5 ELSE EXEC @r = \
                       sp_releaseapplock @Resource = @P2, @LockOwner = 'Session', @DbPrincipal = @P3; SELECT @P1, @r";
        let rows = query(&mut one, release, &[&1_i64, &"a", &"public"]).await.unwrap();
        assert_eq!(rows[0][0].get::<i32, _>(1), Some(0), "release {after}");
        assert_eq!(server.holder(DATABASE, "a"), holder);
    }
}

#[tokio::test]
async fn a_failed_claim_goes_to_its_catch() {
    let server = SqlServer::options().without_update(USER).start();
    let mut admin = administrator(&server).await;
    batch(&mut admin, TABLE).await.unwrap();
    let mut one = session(&server).await;
    assert_eq!(take(&mut one, "a").await, (None, 0, Some(229)));
    assert_eq!(server.holder(DATABASE, "a"), None);
    let sql = TAKE.replace("'Exclusive', @LockOwner", "'Bad', @LockOwner");
    let results = query(&mut admin, &sql, &[&7_i64, &"a", &"public", &2_i32]).await.unwrap();
    assert_eq!((results[0][0].get(1), results[0][0].get(2)), (Some(-999), Some(1225)));
    server.fail_next("UPDATE [dbo]", 9002, 17, "the log is full");
    assert_eq!(take(&mut admin, "a").await, (None, 0, Some(9002)));
    assert_eq!(server.holder(DATABASE, "a"), None);
    assert!(!server.is_aiming());
    let message = text(
        &mut one,
        "BEGIN TRY EXEC sp_releaseapplock 'x', 'Session' END TRY BEGIN CATCH SELECT ERROR_MESSAGE() END CATCH",
    );
    assert!(message.await.expect("caught").contains("because it is not currently held"));
}

#[tokio::test]
async fn modes_are_compatible_as_documented() {
    let modes = ["IntentShared", "Shared", "Update", "IntentExclusive", "Exclusive"];
    let compatible = ["11110", "11100", "11000", "10010", "00000"];
    let server = SqlServer::start();
    let (mut one, mut other) = (session(&server).await, session(&server).await);
    for (held, row) in modes.iter().zip(compatible) {
        assert_eq!(get(&mut one, &format!("'{held}', '{held}', 'Session'")).await, 0);
        let mode = text(&mut one, &format!("SELECT APPLOCK_MODE('public', '{held}', 'Session')")).await;
        assert_eq!(mode.as_deref(), Some(*held));
        for (wanted, goes) in modes.iter().zip(row.bytes()) {
            let test = format!("SELECT APPLOCK_TEST('public', '{held}', '{wanted}', 'Session')");
            assert_eq!(ask::<i16>(&mut other, &test).await, Some(i16::from(goes == b'1')), "{held} {wanted}");
            let status = get(&mut other, &format!("'{held}', '{wanted}', 'Session', 0")).await;
            assert_eq!(status, if goes == b'1' { 0 } else { -1 }, "{held} {wanted}");
            if status == 0 {
                batch(&mut other, &format!("EXEC sp_releaseapplock '{held}', 'Session'")).await.unwrap();
            }
        }
    }
    assert_eq!(get(&mut one, "'Shared', 'IntentExclusive', 'Session'").await, 0);
    let mode = text(&mut one, "SELECT APPLOCK_MODE('public', 'Shared', 'Session')").await;
    assert_eq!(mode.as_deref(), Some("SharedIntentExclusive"));
}

#[tokio::test]
async fn resources_are_binary_and_cut_and_belong_to_database_and_principal() {
    let server = SqlServer::options().database("other").start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    let long = "x".repeat(255);
    assert_eq!(get(&mut one, &format!("'{long}1', 'Exclusive', 'Session'")).await, 0);
    assert_eq!(server.holder(DATABASE, &long), Some(51));
    assert_eq!(get(&mut two, &format!("N'{long}2', 'Exclusive', 'Session', 0")).await, -1);
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
    assert_eq!(get(&mut two, "'A', 'Exclusive', 'Session', 0").await, 0);
    assert_eq!(get(&mut two, "'a ', 'Exclusive', 'Session', 0").await, 0);
    assert_eq!(get(&mut two, "'a', 'Exclusive', 'Session', 0, 'dbo'").await, 0);
    assert_eq!(get(&mut two, "'a', 'Exclusive', 'Session', 0").await, -1);
    batch(&mut two, "USE other").await.unwrap();
    assert_eq!(get(&mut two, "'a', 'Exclusive', 'Session', 0").await, 0);
    assert_eq!(
        fails(&mut two, "EXEC sp_getapplock 'a', 'Exclusive', 'Session', 0, 'nobody'").await,
        (1230, 16)
    );
    assert_eq!(fails(&mut two, "USE nowhere").await, (911, 16));
    assert_eq!(server.sessions()[1].database, "other");
}

#[tokio::test]
async fn locks_of_a_session_outlive_transactions_and_those_of_a_transaction_do_not() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    assert_eq!(fails(&mut one, "EXEC sp_getapplock 't', 'Exclusive'").await, (15626, 16));
    for end in ["COMMIT", "ROLLBACK"] {
        batch(&mut one, "BEGIN TRAN").await.unwrap();
        assert_eq!(get(&mut one, "'t', 'Exclusive'").await, 0);
        assert_eq!(get(&mut one, "'s', 'Exclusive', 'Session'").await, 0);
        assert_eq!(get(&mut two, "'t', 'Exclusive', 'Session', 0").await, -1);
        batch(&mut one, end).await.unwrap();
        assert_eq!(get(&mut two, "'t', 'Exclusive', 'Session', 0").await, 0);
        assert_eq!(get(&mut two, "'s', 'Exclusive', 'Session', 0").await, -1);
        batch(&mut two, "EXEC sp_releaseapplock 't', 'Session'").await.unwrap();
    }
    drop(one);
    server.until_free(DATABASE, "s").await;
    assert_eq!(server.sessions().len(), 1);
}

#[tokio::test]
async fn what_is_not_held_cannot_be_released() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    assert_eq!(fails(&mut one, "EXEC sp_releaseapplock 'a', 'Session'").await, (1223, 16));
    let stream =
        one.simple_query("DECLARE @r int; EXEC @r = sp_releaseapplock 'a', 'Session'; SELECT @r").await;
    assert_eq!(number(&stream.unwrap().into_results().await.expect_err("it isn't held")), (1223, 16));
    // The batch went on all the same.
    batch(&mut one, TABLE).await.unwrap();
    let went_on = "EXEC sp_releaseapplock 'a', 'Session'; UPDATE fencelock_token SET token = 5";
    assert_eq!(fails(&mut one, went_on).await, (1223, 16));
    assert_eq!(ask::<i32>(&mut one, "SELECT COUNT(*) FROM fencelock_token WHERE token = 5").await, Some(4));
}

#[tokio::test]
async fn waiting_is_in_order_and_returns_1() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
    let mut waiting = Vec::new();
    for number in 1..=3 {
        let mut other = session(&server).await;
        waiting.push(tokio::spawn(async move {
            let row = batch(&mut other, WAIT).await.unwrap().remove(0);
            (row.get::<i32, _>(0), row.get::<i16, _>(1), other)
        }));
        server.until_waiting(DATABASE, "a", number).await;
    }
    let waiter = &server.sessions()[1];
    assert_eq!((waiter.waits_for.as_deref(), waiter.login.as_str()), (Some("locks/public/a"), USER));
    // One who has it may have it again, but a newcomer may not even share it, before or after.
    batch(&mut one, "EXEC sp_releaseapplock 'a', 'Session'").await.unwrap();
    for (place, task) in waiting.into_iter().enumerate() {
        let (status, spid, other) = task.await.unwrap();
        assert_eq!((status, spid.map(usize::try_from)), (Some(1), Some(Ok(52 + place))));
        assert_eq!(get(&mut one, "'a', 'Shared', 'Session', 0").await, -1);
        drop(other);
    }
    server.until_free(DATABASE, "a").await;
}

#[tokio::test]
async fn a_newcomer_does_not_overtake_who_waits() {
    let server = SqlServer::start();
    let (mut one, mut two, mut three) =
        (session(&server).await, session(&server).await, session(&server).await);
    assert_eq!(get(&mut one, "'a', 'Shared', 'Session'").await, 0);
    let waiting = tokio::spawn(async move { batch(&mut two, WAIT).await.map(|_| two) });
    server.until_waiting(DATABASE, "a", 1).await;
    assert_eq!(get(&mut three, "'a', 'Shared', 'Session', 0").await, -1);
    assert_eq!(get(&mut three, "'a', 'IntentShared', 'Session', 1").await, -1);
    assert_eq!(get(&mut one, "'a', 'Shared', 'Session', 0").await, 0);
    drop(one);
    let _two = waiting.await.unwrap().unwrap();
    assert_eq!(server.holder(DATABASE, "a"), Some(52));
}

#[tokio::test]
async fn a_deadlock_has_a_victim() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
    assert_eq!(get(&mut two, "'b', 'Exclusive', 'Session'").await, 0);
    let waiting = tokio::spawn(async move { batch(&mut two, WAIT).await.map(|rows| (rows, two)) });
    server.until_waiting(DATABASE, "a", 1).await;
    assert_eq!(get(&mut one, "'b', 'Exclusive', 'Session'").await, -3);
    drop(one);
    assert_eq!(waiting.await.unwrap().unwrap().0[0].get::<i32, _>(0), Some(1));
}

#[tokio::test]
async fn rows_are_locked_until_the_transaction_ends() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    batch(&mut one, TABLE).await.unwrap();
    batch(&mut one, "BEGIN TRANSACTION; UPDATE fencelock_token SET token = 9 WHERE bucket = 1")
        .await
        .unwrap();
    batch(&mut two, "SET LOCK_TIMEOUT 1").await.unwrap();
    let update = "UPDATE fencelock_token SET token = token + 1 OUTPUT inserted.token WHERE bucket = ";
    assert_eq!(fails(&mut two, &format!("{update} 1")).await, (1222, 16));
    assert_eq!(fails(&mut two, "SELECT * FROM fencelock_token").await, (1222, 16));
    assert_eq!(ask::<i64>(&mut two, &format!("{update} 2")).await, Some(1));
    let caught =
        "BEGIN TRY UPDATE fencelock_token SET token = 1 END TRY BEGIN CATCH SELECT ERROR_NUMBER() END CATCH";
    assert_eq!(ask::<i32>(&mut two, caught).await, Some(1222));
    batch(&mut two, "SET LOCK_TIMEOUT -1").await.unwrap();
    let sql = format!("{update} 1");
    let waiting = tokio::spawn(async move { ask::<i64>(&mut two, &sql).await });
    server.until("the row is waited for", || server.sessions()[1].waits_for.is_some()).await;
    batch(&mut one, "ROLLBACK").await.unwrap();
    assert_eq!(waiting.await.unwrap(), Some(1));
}

#[tokio::test]
async fn the_transactions_of_the_driver_work() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    batch(&mut two, TABLE).await.unwrap();
    one.begin_transaction().await.unwrap();
    batch(&mut one, "UPDATE fencelock_token SET token = 8").await.unwrap();
    one.rollback_transaction().await.unwrap();
    one.begin_transaction().await.unwrap();
    let sql = "DECLARE @r int; EXEC @r = sp_getapplock @P1, 'Exclusive'; UPDATE fencelock_token SET token = 3; \
               SELECT @r, @@TRANCOUNT";
    let rows = query(&mut one, sql, &[&"t"]).await.unwrap();
    assert_eq!((rows[0][0].get(0), rows[0][0].get(1)), (Some(0), Some(1)));
    assert_eq!(server.holder(DATABASE, "t"), Some(51));
    one.commit_transaction().await.unwrap();
    assert_eq!(server.holder(DATABASE, "t"), None);
    assert_eq!(ask::<i64>(&mut two, "SELECT MIN(token) FROM fencelock_token").await, Some(3));
    assert_eq!(fails(&mut two, "COMMIT").await, (3902, 16));
    assert_eq!(fails(&mut two, "ROLLBACK").await, (3903, 16));
    let error = query(&mut two, "BEGIN TRAN", &[&1]).await.expect_err("it leaves a transaction");
    assert_eq!(number(&error), (266, 16));
}

#[tokio::test]
async fn errors_have_their_numbers_and_reach() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    batch(&mut one, TABLE).await.unwrap();
    for (sql, error) in [
        ("SELECT * FROM nothing", (208, 16)),
        ("SELECT (1", (102, 15)),
        ("SELECT @x", (137, 15)),
        ("EXEC sp_nothing", (2812, 16)),
        ("CREATE TABLE dbo.fencelock_token (a int)", (2714, 16)),
        ("INSERT INTO fencelock_token (bucket, token) VALUES (9, 1), (1, 1)", (2627, 14)),
        ("INSERT INTO fencelock_token (bucket) VALUES (9)", (515, 16)),
        ("SELECT 2147483647 + 1", (8115, 16)),
        ("SELECT 1 / 0", (8134, 16)),
        ("SELECT CAST('x' AS int)", (245, 16)),
        ("KILL 51", (6102, 14)),
        ("CREATE DATABASE more", (262, 14)),
        ("THROW 50001, 'mine', 1", (50001, 16)),
        ("RAISERROR('mine', 16, 1)", (50000, 16)),
    ] {
        assert_eq!(fails(&mut one, sql).await, error, "{sql}");
        let caught = format!("BEGIN TRY {sql}; END TRY BEGIN CATCH SELECT ERROR_NUMBER() END CATCH");
        match error.0 {
            // Found when the statement, or the batch, is compiled.
            208 | 102 | 137 => assert_eq!(fails(&mut one, &caught).await, error, "{caught}"),
            number => assert_eq!(ask::<i32>(&mut one, &caught).await, i32::try_from(number).ok(), "{caught}"),
        }
        let inner = format!("EXEC('{}')", sql.replace('\'', "''"));
        let caught = format!("BEGIN TRY {inner} END TRY BEGIN CATCH SELECT ERROR_NUMBER() END CATCH");
        assert_eq!(ask::<i32>(&mut one, &caught).await, i32::try_from(error.0).ok(), "{caught}");
    }
    assert_eq!(ask::<i32>(&mut one, "SELECT COUNT(*) FROM fencelock_token").await, Some(4));
    // Nothing of a batch with a syntax error is carried out, and the statements after a missing table aren't either.
    for end in ["SELECT (1", "SELECT 1 FROM nothing; UPDATE fencelock_token SET token = 8"] {
        let sql = format!("IF 1 = 2 UPDATE fencelock_token SET token = 7; {end}");
        fails(&mut one, &sql).await;
        assert_eq!(ask::<i64>(&mut one, "SELECT MAX(token) FROM fencelock_token").await, Some(0));
    }
    let goes_on = "UPDATE fencelock_token SET token = 1 / 0; UPDATE fencelock_token SET token = 6";
    assert_eq!(fails(&mut one, goes_on).await, (8134, 16));
    assert_eq!(ask::<i64>(&mut one, "SELECT MIN(token) FROM fencelock_token").await, Some(6));
    let aborts = "SET XACT_ABORT ON; BEGIN TRAN; UPDATE fencelock_token SET token = 4; SELECT 1 / 0; COMMIT";
    assert_eq!(fails(&mut one, aborts).await, (8134, 16));
    assert_eq!(ask::<i32>(&mut one, "SELECT @@TRANCOUNT").await, Some(0));
    assert_eq!(ask::<i64>(&mut one, "SELECT MAX(token) FROM fencelock_token").await, Some(6));
}

#[tokio::test]
async fn rights_and_read_only_databases_are_respected() {
    let server =
        SqlServer::options().without_create_table(USER).without_insert(USER).without_select(USER).start();
    let (mut one, mut admin) = (session(&server).await, administrator(&server).await);
    assert_eq!(fails(&mut one, TABLE).await, (262, 14));
    batch(&mut admin, TABLE).await.unwrap();
    assert_eq!(fails(&mut one, "INSERT INTO fencelock_token VALUES (8, 8)").await, (229, 14));
    assert_eq!(fails(&mut one, "SELECT token FROM fencelock_token").await, (229, 14));
    batch(&mut one, "UPDATE fencelock_token SET token = 1").await.unwrap();
    batch(&mut admin, "CREATE DATABASE more").await.unwrap();
    batch(&mut admin, "USE more; CREATE TABLE t (a int); INSERT INTO t VALUES (1), (1); DROP TABLE t")
        .await
        .unwrap();
    let read_only = SqlServer::options().read_only_database().start();
    let mut one = session(&read_only).await;
    assert_eq!(fails(&mut one, TABLE).await, (3906, 16));
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
}

#[tokio::test]
async fn expressions_have_their_values() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    for (expression, value) in [
        ("1 + 2 * 3 - -4", Some(11)),
        ("7 / 2 + 7 % 4", Some(6)),
        ("1 + NULL", None),
        ("CASE WHEN NULL = NULL THEN 1 WHEN 2 > 1 AND NOT 1 = 2 THEN 2 END", Some(2)),
        ("ISNULL(NULL, 5)", Some(5)),
        ("COALESCE(NULL, 6, 7)", Some(6)),
        ("CAST(N'12' AS int) + CONVERT(int, '3')", Some(15)),
        ("DATEDIFF(second, '20000101', '2000-01-02 00:00:01.5')", Some(86_401)),
        ("DATEPART(millisecond, CAST('2000-01-02 00:00:01.2345' AS datetime2(3)))", Some(235)),
        ("CASE WHEN 'A ' = N'a' THEN 1 ELSE 0 END", Some(1)),
        ("OBJECT_ID('nothing', 'U')", None),
        ("/* a /* nested */ comment */ LEN('it''s' + [x]) -- and another", None),
    ] {
        if expression.contains("[x]") {
            assert_eq!(fails(&mut one, &format!("SELECT {expression}")).await, (207, 16));
            continue;
        }
        assert_eq!(
            ask::<i32>(&mut one, &format!("SELECT {expression} AS value")).await,
            value,
            "{expression}"
        );
    }
    assert_eq!(text(&mut one, "SELECT N'it''s ' + 'ä'").await.as_deref(), Some("it's ä"));
    let sql = "DECLARE @n int = 0; WHILE @n < 10 BEGIN SET @n = @n + 1; IF @n = 5 BREAK; END; SELECT @n";
    assert_eq!(ask::<i32>(&mut one, sql).await, Some(5));
    let sql = "DECLARE @a int, @b nvarchar(3) = 'abcdef'; SELECT @a = 1, @b = @b + 'x'; SELECT @b; RETURN; SELECT 'no'";
    assert_eq!(text(&mut one, sql).await.as_deref(), Some("abc"));
    batch(&mut one, TABLE).await.unwrap();
    let sql = "IF NOT EXISTS (SELECT * FROM fencelock_token WHERE bucket = 9) SELECT OBJECT_ID('dbo.fencelock_token')";
    assert!(ask::<i32>(&mut one, sql).await.is_some());
    let sql =
        "DECLARE @v bigint; UPDATE fencelock_token SET @v = token = token + 3 WHERE bucket = 1; SELECT @v";
    assert_eq!(ask::<i64>(&mut one, sql).await, Some(3));
    let sql = "SELECT TOP 1 bucket FROM fencelock_token WHERE token IN (0, 1) ORDER BY bucket DESC";
    assert_eq!(ask::<i32>(&mut one, sql).await, Some(3));
    assert_eq!(
        ask::<i32>(&mut one, "DELETE FROM fencelock_token WHERE bucket > 1; SELECT @@ROWCOUNT").await,
        Some(2)
    );
}

#[tokio::test]
async fn parameters_and_long_texts_arrive() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    let long = "äx".repeat(5000);
    let none: Option<i64> = None;
    let values: [&dyn ToSql; 6] = [&long, &none, &true, &1_i32, &None::<&str>, &String::new()];
    let rows = query(&mut one, "SELECT @P1, @P2, @P3, @P4, @P5, @P6", &values).await.unwrap();
    let row = &rows[0][0];
    assert_eq!(row.get::<&str, _>(0), Some(long.as_str()));
    assert_eq!(row.get::<i64, _>(1), None);
    assert_eq!((row.get(2), row.get(3)), (Some(true), Some(1_i32)));
    assert_eq!((row.get::<&str, _>(4), row.get::<&str, _>(5)), (None, Some("")));
    assert_eq!(text(&mut one, &format!("SELECT '{long}'")).await, Some(long));
    let changed =
        one.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (@P1), (@P1)", &[&4]).await.unwrap();
    assert_eq!(changed.total(), 2);
}

#[tokio::test]
async fn settings_last_for_the_session_or_for_the_call() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    batch(&mut one, SETTINGS).await.unwrap();
    query(&mut one, "SET LOCK_TIMEOUT 7", &[&1]).await.unwrap();
    assert_eq!(ask::<i32>(&mut one, "SELECT @@LOCK_TIMEOUT").await, Some(2000));
    batch(&mut one, "EXEC sp_executesql N'SET LOCK_TIMEOUT @a', N'@a int', @a = 3")
        .await
        .expect_err("no variable");
    batch(&mut one, "SET LOCK_TIMEOUT 8").await.unwrap();
    assert_eq!(ask::<i32>(&mut one, "SELECT @@LOCK_TIMEOUT").await, Some(8));
    let sql = "EXEC sp_executesql N'SELECT @a + @b', N'@a int, @b int', @b = 4, @a = 3";
    assert_eq!(ask::<i32>(&mut one, sql).await, Some(7));
}

#[tokio::test]
async fn procedures_can_be_called_by_name() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    let call = |timeout: i32| {
        let mut command = Command::new("sp_getapplock");
        command.bind_param("@Resource", "a");
        command.bind_param("@LockMode", "Exclusive");
        command.bind_param("@LockOwner", "Session");
        command.bind_param("@LockTimeout", timeout);
        command
    };
    let status = async |session: &mut Session, command: Command<'static>| {
        let result = command.exec(session).await?.into_command_result().await?;
        tiberius::Result::Ok(result.return_code().cast_signed())
    };
    assert_eq!(status(&mut one, call(0)).await.unwrap(), 0);
    assert_eq!(status(&mut two, call(0)).await.unwrap(), -1);
    server.getapplock_returns(-3);
    assert_eq!(status(&mut two, call(0)).await.unwrap(), -3);
    assert_eq!(status(&mut two, call(0)).await.unwrap(), -1);
    let error = status(&mut two, Command::new("sp_releaseapplock")).await.expect_err("no resource");
    assert_eq!(number(&error), (201, 16));
}

#[tokio::test]
async fn a_busy_lock_may_be_999() {
    let server = SqlServer::options().busy_is_999().start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    batch(&mut one, TABLE).await.unwrap();
    assert_eq!(take(&mut one, "a").await.1, 0);
    assert_eq!(get(&mut two, "'a', 'Exclusive', 'Session', 0").await, -999);
    assert_eq!(take(&mut two, "a").await, (None, -1, None));
    assert_eq!(get(&mut two, "'a', 'Exclusive', 'Session', 1").await, -1);
    server.getapplock_of_returns("b", -2);
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session', 1").await, 0);
    assert_eq!(get(&mut one, "'b', 'Exclusive', 'Session', 1").await, -2);
    assert_eq!(server.holder(DATABASE, "b"), None);
}

#[tokio::test]
async fn a_killed_session_is_gone_with_its_locks_and_changes() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    batch(&mut two, TABLE).await.unwrap();
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
    batch(&mut one, "BEGIN TRAN; UPDATE fencelock_token SET token = 9").await.unwrap();
    assert!(server.kill(51));
    assert_eq!(server.holder(DATABASE, "a"), None);
    assert!(!server.kill(51));
    assert_eq!(ask::<i64>(&mut two, "SELECT MAX(token) FROM fencelock_token").await, Some(0));
    assert!(is_lost(&mut one).await);
    let mut admin = administrator(&server).await;
    assert_eq!(get(&mut admin, "'a', 'Exclusive', 'Session'").await, 0);
    for told in [false, true] {
        let mut waiting = session(&server).await;
        let spid = ask::<i16>(&mut waiting, "SELECT @@SPID").await.expect("it has one");
        let waiting = tokio::spawn(async move { batch(&mut waiting, WAIT).await.expect_err("it is killed") });
        server.until_waiting(DATABASE, "a", 1).await;
        if told {
            batch(&mut admin, &format!("KILL {spid}")).await.unwrap();
            assert_eq!(number(&waiting.await.unwrap()), (596, 21));
        } else {
            assert!(server.kill(spid.unsigned_abs()));
            assert!(!matches!(waiting.await.unwrap(), Error::Server(_)));
        }
        assert_eq!(server.waiters(DATABASE, "a"), 0);
    }
    assert_eq!(fails(&mut admin, "KILL 300").await, (6106, 16));
}

#[tokio::test]
async fn a_frozen_server_does_nothing() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    let before = server.requests();
    server.freeze();
    {
        let mut asked = std::pin::pin!(ask::<i32>(&mut one, "SELECT 1"));
        let mut connecting = std::pin::pin!(session(&server));
        assert!(timeout(SILENCE, &mut asked).await.is_err());
        assert!(timeout(SILENCE, &mut connecting).await.is_err());
        assert_eq!(server.requests(), before);
        server.thaw();
        assert_eq!(asked.await, Some(1));
        connecting.await;
    }
    server.freeze();
    server.stop();
    assert!(is_lost(&mut one).await);
    assert!(TcpStream::connect(server.addr()).await.is_err());
    server.restart();
    session(&server).await;
}

#[tokio::test]
async fn a_restart_ends_sessions_and_keeps_tables() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    batch(&mut one, TABLE).await.unwrap();
    batch(&mut one, "BEGIN TRAN; DELETE FROM fencelock_token").await.unwrap();
    server.restart();
    assert_eq!((server.sessions().len(), server.open_connections(), server.connections()), (0, 0, 1));
    assert!(is_lost(&mut one).await);
    let mut one = session(&server).await;
    assert_eq!(ask::<i32>(&mut one, "SELECT COUNT(*) FROM fencelock_token").await, Some(4));
    assert_eq!((server.open_connections(), server.connections()), (1, 2));
}

#[tokio::test]
async fn answers_are_lost_late_cut_or_repeated() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    batch(&mut one, TABLE).await.unwrap();
    server.lose_answer_to("token = 1");
    assert!(timeout(SILENCE, batch(&mut one, "UPDATE fencelock_token SET token = 1")).await.is_err());
    assert_eq!(server.open_connections(), 1);
    let mut one = session(&server).await;
    assert_eq!(ask::<i64>(&mut one, "SELECT MIN(token) FROM fencelock_token").await, Some(1));
    server.delay_answers(Duration::from_secs(600));
    assert!(timeout(SILENCE, batch(&mut one, "SELECT 1")).await.is_err());
    server.delay_answers(Duration::ZERO);
    for bytes in [0, 12] {
        let mut one = session(&server).await;
        server.reset_in_answer_to("@P1", bytes);
        let error = query(&mut one, "SELECT @P1", &[&1]).await.expect_err("it is reset");
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
    let mut one = session(&server).await;
    assert_eq!(ask::<i32>(&mut one, "SELECT 1").await, Some(1));
    server.repeat_answer_before("SELECT 2");
    assert_eq!(ask::<i32>(&mut one, "SELECT 2").await, Some(1));
    assert_eq!(ask::<i32>(&mut one, "SELECT 3").await, Some(2));
    assert_eq!(ask::<i32>(&mut one, "SELECT 4").await, Some(3));
}

#[tokio::test]
async fn logins_can_be_stalled() {
    let server = SqlServer::start();
    server.stall_logins(true);
    let mut connecting = std::pin::pin!(session(&server));
    assert!(timeout(SILENCE, &mut connecting).await.is_err());
    server.stall_logins(false);
    connecting.await;
}

#[tokio::test]
async fn a_request_can_be_made_to_fail() {
    let server = SqlServer::start();
    let mut one = session(&server).await;
    server.fail_next("SELECT 2", 701, 17, "no memory");
    let sql = "DECLARE @a int = 1; BEGIN TRY SELECT 2; END TRY BEGIN CATCH SELECT ERROR_NUMBER() END CATCH";
    assert_eq!(ask::<i32>(&mut one, sql).await, Some(701));
    server.fail_next("needle", 701, 17, "no memory");
    assert_eq!(
        number(&query(&mut one, "SELECT @P1", &[&"a needle"]).await.expect_err("it fails")),
        (701, 17)
    );
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
    server.fail_next("SELECT 2", 823, 24, "the disk is broken");
    assert_eq!(fails(&mut one, sql).await, (823, 24));
    assert!(is_lost(&mut one).await);
    assert_eq!(server.holder(DATABASE, "a"), None);
    let mut one = session(&server).await;
    assert_eq!(ask::<i32>(&mut one, "SELECT 2").await, Some(2));
}

#[tokio::test]
async fn a_wait_ends_with_its_socket_or_not() {
    for notices in [true, false] {
        let server = SqlServer::options().notices_closed_sockets(notices).start();
        let mut one = session(&server).await;
        assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
        let mut two = session(&server).await;
        let waiting = tokio::spawn(async move { batch(&mut two, WAIT).await.map(|_| ()) });
        server.until_waiting(DATABASE, "a", 1).await;
        waiting.abort();
        assert!(waiting.await.is_err());
        if notices {
            server.until_waiting(DATABASE, "a", 0).await;
            assert_eq!(server.sessions().len(), 1);
        } else {
            tokio::time::sleep(SILENCE).await;
            assert_eq!(server.waiters(DATABASE, "a"), 1);
            drop(one);
            server.until_free(DATABASE, "a").await;
            server.until("both have ended", || server.sessions().is_empty()).await;
        }
    }
}

#[tokio::test]
async fn a_request_can_be_cancelled() {
    let server = SqlServer::start();
    let (mut one, mut two) = (session(&server).await, session(&server).await);
    assert_eq!(get(&mut one, "'a', 'Exclusive', 'Session'").await, 0);
    let sql = format!("DECLARE @s int; EXEC @s = sp_getapplock 'b', 'Exclusive', 'Session'; {WAIT}");
    {
        let mut stream = std::pin::pin!(two.simple_query(sql));
        let waiting = async { server.until_waiting(DATABASE, "a", 1).await };
        tokio::select! {
            biased;
            result = async { stream.as_mut().await?.into_results().await } => panic!("{result:?}"),
            () = waiting => {}
        }
    }
    two.cancel_query().await.unwrap();
    assert_eq!((server.waiters(DATABASE, "a"), server.holder(DATABASE, "b")), (0, Some(52)));
    assert_eq!(ask::<i32>(&mut two, "SELECT 5").await, Some(5));
}

#[test]
fn a_client_that_does_not_speak_tds_is_turned_away() {
    let server = SqlServer::start();
    let mut stream = std::net::TcpStream::connect(server.addr()).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer, b"");
    assert_eq!(server.sessions(), []);
    servers::wait_until("the connection is gone", || server.open_connections() == 0);
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_token_is_a_login() {
    let server = SqlServer::options().token("t0ken", "somebody").start();
    let mut config = config(&server);
    config.authentication(AuthMethod::aad_token("t0ken"));
    let mut one = connect(config.clone()).await.unwrap();
    assert_eq!(text(&mut one, "SELECT SUSER_SNAME()").await.as_deref(), Some("somebody"));
    config.authentication(AuthMethod::aad_token("another"));
    assert_eq!(number(&connect(config).await.expect_err("unknown")), (18456, 14));
}

#[cfg(feature = "rustls")]
#[tokio::test]
async fn all_kinds_of_encryption_work() {
    let dir = tempfile::tempdir().unwrap();
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
    let made = std::process::Command::new(servers::program("openssl", "openssl"))
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
        .args([
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ])
        .arg("-out")
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let long = "x".repeat(50_000);
    for requires in [false, true] {
        let options = SqlServer::options().tls(&certificate, &key);
        let server = if requires { options.requires_tls().start() } else { options.start() };
        for level in [
            EncryptionLevel::NotSupported,
            EncryptionLevel::Off,
            EncryptionLevel::On,
            EncryptionLevel::Required,
            EncryptionLevel::Strict,
        ] {
            let mut config = config(&server);
            config.encryption(level);
            config.trust_cert();
            let connected = connect(config).await;
            if requires && level == EncryptionLevel::NotSupported {
                assert!(connected.is_err());
                continue;
            }
            let mut one = connected.unwrap_or_else(|error| panic!("{level:?}: {error}"));
            assert_eq!(text(&mut one, &format!("SELECT '{long}'")).await.as_ref(), Some(&long), "{level:?}");
        }
    }
    let server = SqlServer::start();
    let mut config = config(&server);
    config.encryption(EncryptionLevel::Required);
    assert!(connect(config).await.is_err());
}
