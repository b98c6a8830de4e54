//! What any server of this language has to do. With `FENCELOCK_SQLSERVER_URL`, against the one that it names.

use std::time::Instant;

use fencelock::sqlserver::driver::FromSql;
use fencelock::sqlserver::lock_resource;

use super::common::history::History;
use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::sqlserver_locks::Driver;
use super::{Site, connected, granted, is_free, released, take, waits, within};

/// What `sp_getapplock` returns to another program.
async fn get_lock(client: &mut Driver, resource: &str, timeout: i32) -> i32 {
    let sql = "DECLARE @r int; EXEC @r = sp_getapplock @Resource = @P1, @LockMode = 'Exclusive', \
               @LockOwner = 'Session', @LockTimeout = @P2; SELECT @r";
    number(client.query(sql, &[&resource, &timeout]).await.expect("an answer")).await
}

/// What `sp_releaseapplock` returns to it.
async fn release_lock(client: &mut Driver, resource: &str) -> i32 {
    let sql =
        "DECLARE @r int; EXEC @r = sp_releaseapplock @Resource = @P1, @LockOwner = 'Session'; SELECT @r";
    number(client.query(sql, &[&resource]).await.expect("an answer")).await
}

async fn number(answer: fencelock::sqlserver::driver::QueryStream<'_>) -> i32 {
    let row = answer.into_row().await.expect("an answer").expect("a row");
    let cell = row.cells().next().expect("a column").1;
    i32::from_sql(cell).expect("a number").expect("not null")
}

/// Two providers: one holds, the other waits and is woken, and tokens rise all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn providers_exclude_each_other_and_tokens_rise() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let (one, other) = (connected(&site.url()).await, site.locks(secs(20)));
    let history = History::default();
    for _ in 0..5 {
        let guard = take(&*one, "x").await;
        assert!(!is_free(&other, "x").await);
        let waiter = waits(&other, "x");
        site.until_blocked("x", 1).await;
        let began = Instant::now();
        history.hold(guard, ms(1)).await.expect("it is held");
        let guard = granted(waiter).await;
        assert!(began.elapsed() < ms(450), "it wasn't woken: {:?}", began.elapsed());
        assert!(!is_free(&*one, "x").await);
        history.hold(guard, ms(1)).await.expect("it is held");
    }
    assert_eq!(history.judge(), 10);
}

/// Another program with the resource that `lock_resource` says excludes us and is excluded, whatever the name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_programs_share_locks_by_their_resource() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let provider = site.locks(secs(20));
    let mut client = site.client().await;
    let (long, longer) = ("x".repeat(300), format!("{}y", "x".repeat(299)));
    for name in
        ["nightly-report", "", "UPPER", "Upper", "Straße", "app:import", "it's [odd]; --", &long, &longer]
    {
        let resource = lock_resource(name);
        assert!(is_free(&provider, name).await, "{name:?}");
        let guard = take(&provider, name).await;
        assert_eq!(
            get_lock(&mut client, &resource, 0).await.min(0),
            busy(&site, &mut client).await,
            "{name:?}"
        );
        released(guard).await;
        assert_eq!(get_lock(&mut client, &resource, 0).await, 0, "{name:?}");
        assert!(!is_free(&provider, name).await, "{name:?}");
        let waiter = waits(&provider, name);
        site.until_waiting(&resource, 1).await;
        assert_eq!(release_lock(&mut client, &resource).await, 0, "{name:?}");
        released(granted(waiter).await).await;
    }
    // Names that differ are different locks.
    let guards =
        [take(&provider, "UPPER").await, take(&provider, "Upper").await, take(&provider, "upper").await];
    let more = [take(&provider, &long).await, take(&provider, &longer).await];
    for guard in guards.into_iter().chain(more) {
        released(guard).await;
    }
}

/// What a server says of a lock that is busy: -1, or what it says instead.
async fn busy(site: &Site, client: &mut Driver) -> i32 {
    let mut other = site.client().await;
    assert_eq!(get_lock(&mut other, "busy", 0).await, 0);
    get_lock(client, "busy", 0).await
}

/// A program that waits for a lock of ours gets it when it is released.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_program_waits_for_us() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let provider = site.locks(secs(20));
    let guard = take(&provider, "x").await;
    let mut client = site.client().await;
    let waiter = tokio::spawn(async move { (get_lock(&mut client, "x", 20_000).await, client) });
    site.until_blocked("x", 1).await;
    released(guard).await;
    let (granted_after_wait, client) = within("granted", waiter).await.expect("no panic");
    assert_eq!(granted_after_wait, 1);
    assert!(!is_free(&provider, "x").await);
    // Its end is the end of its locks.
    drop(client);
    released(take(&provider, "x").await).await;
}
