//! How many connections a provider has, and how they are set.

use std::time::Instant;

use fencelock::{LockOptions, LockProvider};

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::postgres::PostgresServer;
use super::servers::proxy::Proxy;
use super::{
    closed, connected, granted, holders, is_free, locks, released, take, until, until_waiting, waits, within,
};

const COUNT: &str = "select count(*) from pg_stat_activity where application_name = 'fencelock'";

async fn until_sessions(server: &PostgresServer, count: usize) {
    until(server, COUNT, &count.to_string()).await;
}

/// How many there are.
fn sessions(server: &PostgresServer) -> usize {
    server.sql(COUNT).parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_holds_all_locks_of_a_ttl() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = connected(&server.url()).await;
    let mut guards = Vec::new();
    for number in 0..30 {
        guards.push(take(&*provider, &format!("held {number}")).await);
        assert!(is_free(&*provider, &format!("free {number}")).await);
    }
    // The look at the way to it is over.
    until_sessions(&server, 1).await;
    let mut attempts = Vec::new();
    for number in 0..30 {
        let lock = provider.create_lock(&format!("more {number}"));
        attempts.push(tokio::spawn(async move { lock.try_acquire().await }));
    }
    for attempt in attempts {
        let tried = within("an answer", attempt).await.expect("no panic");
        guards.push(tried.expect("no error").expect("it is free"));
    }
    assert_eq!(sessions(&server), 1);
    let held = "select count(*) from pg_locks where locktype = 'advisory' and granted";
    assert_eq!(server.sql(held), "60");
    for guard in guards {
        released(guard).await;
    }
    assert_eq!(server.sql(held), "0");
    closed(&*provider).await;
    until_sessions(&server, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_ttl_has_its_own_whose_limit_it_is() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::options().config("log_statement", "all").start();
    let provider = locks(&server, secs(10));
    let mut guards = Vec::new();
    for (count, ttl) in [(1, 4321), (2, 7654), (2, 4321), (3, 23_456), (3, 7654)] {
        let lock = provider.create_lock_with(&format!("{count} {ttl}"), LockOptions::new().ttl(ms(ttl)));
        guards.push(within("granted", lock.acquire()).await.expect("it is free"));
        until_sessions(&server, count).await;
    }
    drop(guards);
    // What they have asked for.
    let output = server.output();
    for ttl in ["4321", "7654", "23456"] {
        let set = output
            .lines()
            .filter(|line| line.contains("idle_session_timeout") && line.contains("arameters:"));
        let set = set.filter(|line| line.contains(&format!("'{{{ttl},"))).count();
        assert_eq!(set, 1, "{ttl}: {output}");
    }
    closed(&provider).await;
    until_sessions(&server, 0).await;
}

/// A TTL is the limit of a session, whatever happens to the client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_ends_the_session_of_one_that_is_cut_off() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let direct = connected(&server.url()).await;
    for ttl in [1000, 2500] {
        let proxy = Proxy::start(server.addr());
        let url = format!("postgres://app:secret@{}/test?ttl={ttl}ms", proxy.addr());
        let provider = connected(&url).await;
        let guard = take(&*provider, "x").await;
        assert_eq!(holders(&server, "x"), 1);
        let waiter = waits(&*direct, "x");
        until_waiting(&server, 1).await;
        proxy.cut_requests();
        proxy.cut_replies();
        let began = Instant::now();
        released(granted(waiter).await).await;
        let (took, ttl) = (began.elapsed(), ms(ttl));
        // The last heartbeat may have been a third of a TTL before.
        assert!(took > ttl / 2 && took < ttl + secs(2), "{ttl:?}: {took:?}");
        within("it is lost", guard.lost()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_wait_have_their_own_up_to_a_number() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for limit in [0, 1, 3] {
        let provider = connected(&format!("{}?waiting_sessions={limit}", server.url())).await;
        let other = connected(&format!("{}?application_name=other", server.url())).await;
        let mut guards = Vec::new();
        for number in 0..5 {
            guards.push(take(&*other, &format!("lock {number}")).await);
        }
        // Two for each: they share a session.
        // Each lets go at once of what it gets.
        let waiters: Vec<_> = (0..10)
            .map(|number| {
                let lock = provider.create_lock(&format!("lock {}", number % 5));
                tokio::spawn(async move { lock.acquire().await?.release().await })
            })
            .collect();
        until_waiting(&server, limit).await;
        assert!(is_free(&*provider, "another").await);
        until_sessions(&server, 1 + limit).await;
        for guard in guards {
            released(guard).await;
        }
        for waiter in waiters {
            within("it has had the lock", waiter).await.expect("no panic").expect("granted and released");
        }
        assert!(sessions(&server) <= 1 + limit);
        closed(&*provider).await;
        until_sessions(&server, 0).await;
        closed(&*other).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_that_nobody_needs_are_closed() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = connected(&server.url()).await;
    let other = connected(&format!("{}?application_name=other", server.url())).await;
    let held = take(&*other, "x").await;
    let waiter = waits(&*provider, "x");
    until_waiting(&server, 1).await;
    released(held).await;
    released(granted(waiter).await).await;
    // With a TTL of its own.
    let lock = provider.create_lock_with("y", LockOptions::new().ttl(secs(1)));
    released(within("granted", lock.acquire()).await.expect("it is free")).await;
    let guard = take(&*provider, "held").await;
    let used = Instant::now();
    until_sessions(&server, 3).await;
    // The one that holds something stays, the others don't.
    while sessions(&server) > 1 {
        assert!(used.elapsed() < secs(45), "{}", sessions(&server));
        tokio::time::sleep(ms(100)).await;
    }
    let took = used.elapsed();
    assert!(took > secs(25), "{took:?}");
    assert_eq!(holders(&server, "held"), 1);
    released(guard).await;
    // They come back.
    assert!(is_free(&*provider, "x").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_and_dropping_close_all() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    for closes in [true, false] {
        let provider = connected(&server.url()).await;
        let other = connected(&format!("{}?application_name=other", server.url())).await;
        let guards = [take(&*other, "x").await, take(&*other, "y").await];
        let waiters = [waits(&*provider, "x"), waits(&*provider, "y")];
        until_waiting(&server, 2).await;
        for guard in guards {
            released(guard).await;
        }
        for waiter in waiters {
            released(granted(waiter).await).await;
        }
        let lock = provider.create_lock_with("z", LockOptions::new().ttl(secs(5)));
        let held = within("granted", lock.acquire()).await.expect("it is free");
        until_sessions(&server, 4).await;
        let began = Instant::now();
        released(held).await;
        drop(lock);
        if closes {
            closed(&*provider).await;
        }
        drop(provider);
        until_sessions(&server, 0).await;
        assert!(began.elapsed() < secs(5), "{:?}", began.elapsed());
        closed(&*other).await;
    }
    // A guard keeps its session, after the end of its provider, too.
    let provider = connected(&server.url()).await;
    let guard = take(&*provider, "x").await;
    drop(provider);
    assert_eq!(holders(&server, "x"), 1);
    assert!(!guard.is_lost());
    released(guard).await;
    until_sessions(&server, 0).await;
}
