//! Behind `PgBouncer`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fencelock::{Error, ErrorKind, LockOptions, LockProvider, Loss, connect};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::common::{ms, secs};
use super::servers::holder::Holder;
use super::servers::left_out;
use super::servers::pgbouncer::PgBouncer;
use super::servers::postgres::PostgresServer;
use super::servers::proxy::Proxy;
use super::{
    client, closed, connected, everything, granted, holders, is_free, refused, released, shows_what_it_can,
    take, until, until_free, until_waiting, waits, within,
};

const OPEN: &str = "select count(*) from pg_stat_activity where state like 'idle in transaction%'";

/// Other clients, who go on with their transactions.
struct Traffic {
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Traffic {
    async fn start(url: &str, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for number in 0..clients {
            let (client, stop) = (client(url).await, stop.clone());
            tasks.spawn(async move {
                let statement = format!("BEGIN; SELECT pg_sleep(0.00{number}); COMMIT");
                while !stop.load(Ordering::Relaxed) {
                    client.batch_execute(&statement).await.expect("a transaction");
                    tokio::task::yield_now().await;
                }
            });
        }
        Self { stop, clients: tasks }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        within("the others have stopped", self.clients.join_all()).await;
    }
}

/// The error by which claims notice that they were sent to somebody else's session.
async fn noticed(provider: &dyn LockProvider) -> Option<Error> {
    let options = LockOptions::new().retry_for(Duration::ZERO);
    for number in 0..100 {
        let lock = provider.create_lock_with(&format!("lock {number}"), options.clone());
        match lock.try_acquire().await {
            Err(error) if error.kind() == ErrorKind::Unsupported => return Some(error),
            Err(_) => sleep(ms(20)).await, // it is in doubt
            Ok(guard) => drop(guard),
        }
    }
    None
}

/// What is wrong with how it was refused, of which `others` that use the pooler may be the reason.
async fn wrongly_refused(url: &str, what: &str, others: bool) -> Option<String> {
    let began = Instant::now();
    let error = match within("connect", Box::pin(connect(url))).await {
        Err(error) => error,
        // By chance it was the same session each time, as others left it no choice. Then it shows sooner or later.
        Ok(provider) if others => match within("it is noticed", noticed(&*provider)).await {
            Some(error) => error,
            None => return Some(format!("{what}: used")),
        },
        Ok(_) => return Some(format!("{what}: accepted")),
    };
    let as_it_should = error.kind() == ErrorKind::Unsupported
        && error.to_string().contains("transaction_scoped")
        && !error.is_retryable()
        && (others || began.elapsed() < secs(4));
    (!as_it_should).then(|| format!("{what}, {:?}: {}", began.elapsed(), everything(&error)))
}

fn transaction_mode(server: &PostgresServer, pool_size: usize, round_robin: bool) -> PgBouncer {
    let options = PgBouncer::options(server.addr()).pool_mode("transaction").pool_size(pool_size);
    if round_robin { options.round_robin().start() } else { options.start() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_swaps_sessions_is_refused() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    // The sequence is there, or not yet.
    let mut wrong = Vec::new();
    for (size, round_robin) in [(1, false), (2, false), (20, false), (1, true), (2, true), (20, true)] {
        let bouncer = transaction_mode(&server, size, round_robin);
        for query in ["", "?ttl=5s", "?waiting_sessions=0"] {
            let what = format!("{size} {round_robin} {query}");
            wrong.extend(wrongly_refused(&(bouncer.url() + query), &what, false).await);
        }
        assert_eq!(server.sql("select count(*) from pg_locks where locktype = 'advisory'"), "0");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_refused_while_others_use_it() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let mut wrong = Vec::new();
    for (size, round_robin, clients) in
        [(1, false, 2), (2, false, 3), (2, true, 3), (5, true, 2), (20, false, 6), (20, true, 6)]
    {
        let bouncer = transaction_mode(&server, size, round_robin);
        let traffic = Traffic::start(&bouncer.url(), clients).await;
        for attempt in 0..6 {
            let what = format!("{size} {round_robin} {clients}, attempt {attempt}");
            wrong.extend(wrongly_refused(&bouncer.url(), &what, true).await);
        }
        traffic.stop().await;
        // Whatever was locked before it was noticed is not left to others.
        until(&server, "select count(*) from pg_locks where locktype = 'advisory'", "0").await;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_swaps_with_each_statement_is_refused() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let bouncer = PgBouncer::options(server.addr()).pool_mode("statement").start();
    let error = refused(&bouncer.url()).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));
    // It allows no transaction at all.
    let scoped = bouncer.url() + "?transaction_scoped=true";
    let error = match within("connect", Box::pin(connect(&scoped))).await {
        Err(error) => error,
        Ok(provider) => super::fails(&*provider, "x").await,
    };
    assert!(!error.to_string().is_empty());
    assert_eq!(holders(&server, "x"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_keeps_sessions_is_like_none() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let bouncer = PgBouncer::options(server.addr()).pool_mode("session").start();
    let (one, other) = (connected(&bouncer.url()).await, connected(&server.url()).await);
    shows_what_it_can(&*one, &*other, &server, "x").await;
    shows_what_it_can(&*other, &*one, &server, "y").await;

    // With the pooler ends what it holds.
    let guard = take(&*one, "x").await;
    let waiter = waits(&*other, "x");
    until_waiting(&server, 1).await;
    let began = Instant::now();
    bouncer.kill();
    assert_eq!(within("it is lost", guard.lost()).await, Loss::SessionEnded);
    assert!(began.elapsed() < secs(3), "{:?}", began.elapsed());
    released(granted(waiter).await).await;
    drop(guard);
    bouncer.restart();
    shows_what_it_can(&*one, &*other, &server, "x").await;

    // And with the session behind it.
    let guard = take(&*one, "x").await;
    let waiter = waits(&*one, "x");
    server.sql(&format!(
        "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and granted and pid <> pg_backend_pid() \
         and ({})::bigint > 0",
        super::shows("x".into())
    ));
    assert_eq!(within("it is lost", guard.lost()).await, Loss::SessionEnded);
    drop(guard);
    released(granted(waiter).await).await;

    // A session that goes back to the pooler has nothing on it.
    closed(&*one).await;
    until(&server, "select count(*) from pg_locks where locktype = 'advisory' and granted", "0").await;
}

/// Scoped to a transaction, through a pooler in transaction mode; and direct.
struct Scoped {
    server: PostgresServer,
    bouncer: PgBouncer,
}

impl Scoped {
    fn start() -> Self {
        let server = PostgresServer::start();
        let bouncer = PgBouncer::options(server.addr()).pool_mode("transaction").start();
        Self { server, bouncer }
    }

    fn url(&self, query: &str) -> String {
        format!("{}?transaction_scoped=true&{query}", self.bouncer.url())
    }

    async fn connect(&self) -> (Box<dyn LockProvider>, Box<dyn LockProvider>, Box<dyn LockProvider>) {
        let url = self.url("ttl=5s");
        (connected(&url).await, connected(&url).await, connected(&self.server.url()).await)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_for_each_lock() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let (one, other, direct) = scoped.connect().await;
    let server = &scoped.server;
    let traffic = Traffic::start(&scoped.bouncer.url(), 3).await;
    for name in ["x", "y", "z"] {
        shows_what_it_can(&*one, &*other, server, name).await;
        shows_what_it_can(&*one, &*direct, server, name).await;
        shows_what_it_can(&*direct, &*one, server, name).await;
    }
    // Several at a time.
    let mut guards = Vec::new();
    for number in 0..5 {
        let name = format!("lock {number}");
        guards.push(take(&*one, &name).await);
        assert_eq!(holders(server, name.as_str()), 1);
        assert!(!is_free(&*direct, &name).await);
    }
    for guard in guards {
        let name = guard.name().to_owned();
        released(guard).await;
        assert!(is_free(&*direct, &name).await, "{name}");
    }
    traffic.stop().await;
    until(server, OPEN, "0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_ended_is_a_loss() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let (one, other, _) = scoped.connect().await;
    let guard = take(&*one, "x").await;
    let waiter = waits(&*other, "x");
    until_waiting(&scoped.server, 1).await;
    let began = Instant::now();
    let end =
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where state = 'idle in transaction'";
    assert_eq!(scoped.server.sql(end), "1");
    let loss = within("it is lost", guard.lost()).await;
    assert_eq!(loss, Loss::SessionEnded);
    assert!(began.elapsed() < secs(3), "{:?}", began.elapsed());
    let next = granted(waiter).await;
    assert!(next.fencing_token() > guard.fencing_token());
    drop(guard);
    released(next).await;
    shows_what_it_can(&*one, &*other, &scoped.server, "x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_is_killed_frees_it() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let direct = connected(&scoped.server.url()).await;
    for query in ["ttl=20s", "ttl=20s&waiting_sessions=0"] {
        let mut holder = Holder::start(&scoped.url(query), "x");
        holder.holds().await;
        assert!(!is_free(&*direct, "x").await);
        let waiter = waits(&*direct, "x");
        until_waiting(&scoped.server, 1).await;
        let began = Instant::now();
        holder.kill();
        released(granted(waiter).await).await;
        assert!(began.elapsed() < secs(5), "{:?}", began.elapsed());
    }
}

/// The server ends a transaction that it hasn't heard of for a TTL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_cut_off_loses_it_at_its_ttl() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let direct = connected(&scoped.server.url()).await;
    let proxy = Proxy::start(scoped.bouncer.addr());
    let url = format!("postgres://app:secret@{}/test?transaction_scoped=true&ttl=2s", proxy.addr());
    let cut_off = connected(&url).await;
    let guard = take(&*cut_off, "x").await;
    let waiter = waits(&*direct, "x");
    until_waiting(&scoped.server, 1).await;
    proxy.cut_requests();
    proxy.cut_replies();
    let began = Instant::now();
    let next = granted(waiter).await;
    let took = began.elapsed();
    // The last heartbeat may have been two thirds of a TTL before.
    assert!(took > ms(600) && took < secs(4), "{took:?}");
    within("it is lost", guard.lost()).await;
    assert!(guard.is_lost());
    assert!(next.fencing_token() > guard.fencing_token());
    drop(guard);
    proxy.heal();
    released(next).await;
    released(take(&*cut_off, "x").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_held_for_many_ttls() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let provider = connected(&scoped.url("ttl=2s")).await;
    let direct = connected(&scoped.server.url()).await;
    let traffic = Traffic::start(&scoped.bouncer.url(), 2).await;
    let guard = take(&*provider, "x").await;
    let waiter = waits(&*direct, "x");
    let lost = timeout(ms(7000), guard.lost()).await;
    assert!(lost.is_err(), "{lost:?}");
    assert!(!waiter.is_finished() && !is_free(&*direct, "x").await);
    released(guard).await;
    released(granted(waiter).await).await;
    traffic.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_ends_its_connections() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let clients =
        || scoped.bouncer.command("SHOW CLIENTS").lines().filter(|line| line.contains("|app|")).count();
    let none_left = async || {
        let gone = async {
            while clients() > 0 {
                sleep(ms(10)).await;
            }
        };
        within("all of its connections are closed", gone).await;
    };
    let provider = connected(&scoped.url("ttl=5s")).await;
    let guard = take(&*provider, "x").await;
    let other = take(&*provider, "y").await;
    assert!(clients() >= 3, "{}", clients());
    released(other).await;
    closed(&*provider).await;
    // What is held when it is closed is freed by its guard.
    drop(guard);
    until_free(&scoped.server, "x").await;
    none_left().await;

    let provider = connected(&scoped.url("ttl=5s")).await;
    released(take(&*provider, "x").await).await;
    drop(provider);
    none_left().await;
    until(&scoped.server, OPEN, "0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_rise_whichever_way_they_are_drawn() {
    if left_out("postgres") {
        return;
    }
    let scoped = Scoped::start();
    let (one, other, direct) = scoped.connect().await;
    // Others hold locks meanwhile, in transactions that stay open.
    let held = take(&*other, "held").await;
    let mut last = held.fencing_token();
    for _ in 0..10 {
        for provider in [&one, &direct, &other, &direct] {
            let guard = take(&**provider, "x").await;
            assert!(guard.fencing_token() > last, "{} after {last}", guard.fencing_token());
            last = guard.fencing_token();
            released(guard).await;
        }
    }
    released(held).await;
}

/// It needs a second connection to draw its tokens: one is an error, and no lock is left behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_with_a_single_connection_is_not_enough() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let bouncer = PgBouncer::options(server.addr()).pool_mode("transaction").pool_size(1).start();
    let url = bouncer.url() + "?transaction_scoped=true&ttl=2s";
    let error = match within("connect", Box::pin(connect(&url))).await {
        Err(error) => error,
        Ok(provider) => {
            let lock = provider.create_lock_with("x", LockOptions::new().retry_for(Duration::ZERO));
            within("an answer", lock.try_acquire()).await.expect_err("no token can be drawn")
        }
    };
    let kinds = [ErrorKind::Unavailable, ErrorKind::Exhausted, ErrorKind::Unknown];
    assert!(kinds.contains(&error.kind()), "{}", everything(&error));
    until_free(&server, "x").await;
}
