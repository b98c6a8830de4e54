//! Connections that the application has made, and those of its pool.

use std::error::Error as _;
use std::mem;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fencelock::postgres::PostgresLocks;
use fencelock::postgres::driver::{Client, NoTls};
use fencelock::{ErrorKind, Fairness, LockProvider, Loss, Provider};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use super::common::{ms, secs};
use super::servers::left_out;
use super::servers::postgres::PostgresServer;
use super::{
    built, client, closed, config, everything, fails, granted, holders, is_free, locks, released,
    shows_what_it_can, take, until_free, until_waiting, waits, within,
};

/// The settings that a session of ours has, which the application's must not keep.
const SETTINGS: &str = "SELECT coalesce(string_agg(name || '=' || setting, ' ' ORDER BY name), '') FROM pg_settings \
     WHERE name IN ('idle_session_timeout', 'statement_timeout', 'lock_timeout', 'transaction_timeout', \
     'synchronous_commit', 'default_transaction_isolation', 'default_transaction_read_only', 'client_min_messages', \
     'tcp_keepalives_idle', 'tcp_keepalives_interval', 'tcp_keepalives_count', 'tcp_user_timeout', \
     'client_connection_check_interval', 'idle_in_transaction_session_timeout', 'transaction_isolation', 'search_path')";

/// What else a session could keep.
const LEFT: &str = "SELECT (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory') \
     + (SELECT count(*) FROM pg_listening_channels())";

/// A small pool.
#[derive(Clone)]
struct Pool(Arc<Inner>);

struct Inner {
    url: String,
    /// Sent on each new connection.
    setup: String,
    /// Who finds none waits for one; or else it is an error.
    patient: bool,
    permits: Arc<Semaphore>,
    connections: u32,
    idle: Mutex<Vec<Client>>,
}

/// A connection that is lent.
struct Lent {
    client: Option<Client>,
    pool: Pool,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    fn new(url: &str, connections: u32) -> Self {
        Self::set_up(url, connections, "", true)
    }

    fn set_up(url: &str, connections: u32, setup: &str, patient: bool) -> Self {
        let permits = Arc::new(Semaphore::new(connections as usize));
        let (url, setup) = (url.to_owned(), setup.to_owned());
        Self(Arc::new(Inner { url, setup, patient, permits, connections, idle: Mutex::default() }))
    }

    async fn get(self) -> Result<Lent, Box<dyn std::error::Error + Send + Sync>> {
        let permits = self.0.permits.clone();
        let permit =
            if self.0.patient { permits.acquire_owned().await? } else { permits.try_acquire_owned()? };
        let idle = self.idle().pop();
        let client = if let Some(client) = idle {
            client
        } else {
            let (client, connection) = config(&self.0.url).connect(NoTls).await?;
            tokio::spawn(connection);
            client.batch_execute(&self.0.setup).await?;
            client
        };
        Ok(Lent { client: Some(client), pool: self, _permit: permit })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Client>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locks(&self) -> PostgresLocks {
        let pool = self.clone();
        PostgresLocks::with_connections(move || pool.clone().get())
    }

    fn provider(&self, ttl: Duration) -> Provider<PostgresLocks> {
        built(self.locks(), ttl)
    }

    /// Waits until all are back.
    async fn all_back(&self) -> Vec<Client> {
        let all = within("all connections are back", self.0.permits.acquire_many(self.0.connections)).await;
        drop(all.expect("it is never closed"));
        mem::take(&mut *self.idle())
    }

    fn lent(&self) -> usize {
        self.0.connections as usize - self.0.permits.available_permits()
    }
}

impl Deref for Lent {
    type Target = Client;

    fn deref(&self) -> &Client {
        self.client.as_ref().expect("until it is dropped")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Those that are closed are thrown away.
        if let Some(client) = self.client.take().filter(|client| !client.is_closed()) {
            self.pool.idle().push(client);
        }
    }
}

async fn ask(client: &Client, statement: &str) -> String {
    let row = client.query_one(&format!("SELECT ({statement})::text"), &[]).await.expect("it works");
    row.get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn boxed_clients() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let provider = || {
        let url = server.url();
        let make = move || {
            let url = url.clone();
            async move {
                let (client, connection) = config(&url).connect(NoTls).await?;
                tokio::spawn(connection);
                Ok(Box::new(client))
            }
        };
        built(PostgresLocks::with_connections(make), secs(10))
    };
    let (one, other, direct) = (provider(), provider(), locks(&server, secs(10)));
    shows_what_it_can(&one, &other, &server, "x").await;
    shows_what_it_can(&one, &direct, &server, "y").await;
    shows_what_it_can(&direct, &one, &server, "z").await;
    for provider in [&one, &other, &direct] {
        closed(provider).await;
    }
    super::until(&server, "select count(*) from pg_stat_activity where usename = 'app'", "0").await;
}

/// Nobody hears of a release on them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_waiting_sessions_they_look() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let pool = Pool::new(&server.url(), 2);
    let provider = built(pool.locks().waiting_sessions(0), secs(10));
    assert!(!provider.capabilities().wakes_waiters);
    assert_eq!(provider.capabilities().fairness, Fairness::None);
    let direct = locks(&server, secs(10));
    let guard = take(&direct, "x").await;
    let waiter = waits(&provider, "x");
    assert!(timeout(ms(700), &mut { waiter }).await.is_err());
    let waiter = waits(&provider, "x");
    released(guard).await;
    released(granted(waiter).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_gets_them_back_as_they_were() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    // As the server has it, and as the application's connections begin.
    for options in ["", "?options=-c%20statement_timeout%3D7s%20-c%20synchronous_commit%3Dlocal"] {
        let url = server.url() + options;
        let before = ask(&client(&url).await, SETTINGS).await;
        let pool = Pool::new(&url, 8);
        let (one, other) = (pool.provider(secs(10)), pool.provider(secs(5)));
        shows_what_it_can(&one, &other, &server, "x").await;
        let guards = [take(&one, "a").await, take(&one, "b").await, take(&other, "c").await];
        let waiters = [waits(&other, "a"), waits(&other, "b"), waits(&one, "c")];
        until_waiting(&server, 3).await;
        assert!(pool.lent() >= 5, "{}", pool.lent());
        for guard in guards {
            released(guard).await;
        }
        for waiter in waiters {
            released(granted(waiter).await).await;
        }
        closed(&one).await;
        closed(&other).await;
        let clients = pool.all_back().await;
        assert!(clients.len() >= 5, "{}", clients.len());
        for client in &clients {
            assert!(!client.is_closed());
            assert_eq!(ask(client, SETTINGS).await, before);
            assert_eq!(ask(client, LEFT).await, "0");
            let none_prepared = async {
                while ask(client, "SELECT count(*) FROM pg_prepared_statements WHERE from_sql").await != "0" {
                    sleep(ms(5)).await;
                }
            };
            within("nothing is prepared", none_prepared).await;
        }
    }
}

/// Not what the server would give a new session, but what the application has set before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_gets_them_back_as_it_had_set_them() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let setup = "SET statement_timeout = '7s'; SET lock_timeout = '6s'; SET idle_session_timeout = '1h'; \
         SET default_transaction_isolation = 'serializable'; SET synchronous_commit = 'local'; \
         SET client_min_messages = 'warning'";
    let known = client(&server.url()).await;
    known.batch_execute(setup).await.expect("set");
    let before = ask(&known, SETTINGS).await;
    let pool = Pool::set_up(&server.url(), 4, setup, true);
    let (one, other) = (pool.provider(secs(10)), locks(&server, secs(10)));
    shows_what_it_can(&one, &other, &server, "x").await;
    shows_what_it_can(&other, &one, &server, "x").await;
    closed(&one).await;
    let clients = pool.all_back().await;
    assert!(clients.len() >= 2, "{}", clients.len());
    for client in &clients {
        assert_eq!(ask(client, SETTINGS).await, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_is_dropped_gives_them_back() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let pool = Pool::new(&server.url(), 4);
    let provider = pool.provider(secs(10));
    let guard = take(&provider, "x").await;
    drop(provider);
    // The guard keeps it.
    assert_eq!(holders(&server, "x"), 1);
    assert!(pool.lent() > 0);
    released(guard).await;
    let clients = pool.all_back().await;
    assert!(!clients.is_empty());
    for client in &clients {
        assert_eq!(ask(client, LEFT).await, "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_connection_is_enough_to_try() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let direct = locks(&server, secs(10));
    for patient in [true, false] {
        let pool = Pool::set_up(&server.url(), 1, "", patient);
        let provider = built(pool.locks().waiting_sessions(0), secs(10));
        for name in ["x", "y"] {
            let guard = take(&provider, name).await;
            assert!(!is_free(&provider, name).await);
            assert!(!is_free(&direct, name).await);
            released(guard).await;
            let guard = take(&direct, name).await;
            assert!(!is_free(&provider, name).await);
            let waiter = waits(&provider, name);
            released(guard).await;
            released(granted(waiter).await).await;
        }
        // With those for waiting that it hasn't got, it can try.
        closed(&provider).await;
        assert_eq!(pool.idle().len(), 1);
        let provider = built(pool.locks(), secs(10));
        assert!(is_free(&provider, "x").await);
        let guard = take(&direct, "x").await;
        assert!(!is_free(&provider, "x").await);
        released(guard).await;
        assert!(is_free(&provider, "x").await);
        closed(&provider).await;
        assert_eq!(pool.all_back().await.len(), 1);
    }
}

/// The process that has it on the server.
fn holder(server: &PostgresServer, name: &str) -> i32 {
    let statement = super::shows(name.into()).replace("count(*)", "pid");
    server.sql(&statement).parse().expect("one holder")
}

fn signal(process: i32, signal: Signal) {
    kill_process(Pid::from_raw(process).expect("not zero"), signal).expect("it is there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_whose_session_is_ended_does_not_come_back() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let pool = Pool::new(&server.url(), 3);
    let provider = pool.provider(secs(10));
    let guard = take(&provider, "x").await;
    server.sql(&format!("select pg_terminate_backend({})", holder(&server, "x")));
    assert_eq!(within("it is lost", guard.lost()).await, Loss::SessionEnded);
    drop(guard);
    released(take(&provider, "x").await).await;
    closed(&provider).await;
    for client in &pool.all_back().await {
        assert_eq!(ask(client, LEFT).await, "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_does_not_answer_comes_back_only_closed() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let pool = Pool::new(&server.url(), 3);
    let provider = pool.provider(secs(1));
    let guard = take(&provider, "x").await;
    let process = holder(&server, "x");
    signal(process, Signal::STOP);
    within("it is lost", guard.lost()).await;
    drop(guard);
    // The server can't end it either, while it is stopped.
    assert_eq!(holder(&server, "x"), process);
    let closing = timeout(secs(5), provider.close());
    let _ = within("it is closed, or not", closing).await;
    drop(provider);
    let back = mem::take(&mut *pool.idle());
    for client in &back {
        let itself = ask(client, "SELECT pg_backend_pid()");
        let itself = timeout(secs(2), itself).await.expect("not the one that is stopped");
        assert_ne!(itself, process.to_string());
        assert_eq!(ask(client, LEFT).await, "0");
    }
    assert!(pool.lent() > 0, "it is still lent");
    signal(process, Signal::CONT);
    until_free(&server, "x").await;
    for client in &pool.all_back().await {
        assert_eq!(ask(client, LEFT).await, "0");
    }
    released(take(&pool.provider(secs(1)), "x").await).await;
}

/// It is renewed as long as the process lives: nobody else may use its connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_with_a_lock_that_is_forgotten_does_not_come_back() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let pool = Pool::new(&server.url(), 3);
    let provider = pool.provider(secs(1));
    let guard = take(&provider, "x").await;
    let process = holder(&server, "x");
    let lost = guard.lost();
    mem::forget(guard);
    let _ = within("it is closed, or not", timeout(secs(5), provider.close())).await;
    drop(provider);
    assert!(timeout(ms(2500), lost).await.is_err(), "it is lost");
    assert_eq!(holder(&server, "x"), process);
    assert_eq!(pool.lent(), 1);
    let back = mem::take(&mut *pool.idle());
    for client in &back {
        assert_eq!(ask(client, LEFT).await, "0");
    }
}

struct Shared(Arc<Client>);

impl Deref for Shared {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

/// Connections that don't lead to a session of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_shared_is_refused() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let shared = Arc::new(client(&server.url()).await);
    let locks = PostgresLocks::with_connections({
        let shared = shared.clone();
        move || {
            let shared = shared.clone();
            async move { Ok(Shared(shared)) }
        }
    });
    let error = fails(&built(locks, secs(10)), "x").await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));
    assert_eq!(ask(&shared, LEFT).await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_application_says_is_the_source() {
    if left_out("postgres") {
        return;
    }
    let nothing = || async { Err::<Box<Client>, _>("the pool is closed".into()) };
    let provider = built(PostgresLocks::with_connections(nothing), secs(10));
    let error = fails(&provider, "x").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    assert_eq!(error.source().expect("a source").to_string(), "the pool is closed");
    let error = within("connect", Box::pin(provider.backend().connect())).await.expect_err("nothing");
    assert_eq!(error.source().expect("a source").to_string(), "the pool is closed");

    // What the driver says means what it always does.
    let server = PostgresServer::start();
    let pool = Pool::new(&server.url().replace("secret", "never"), 3);
    let error = fails(&pool.provider(secs(10)), "x").await;
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", everything(&error));
    server.kill();
    let error = fails(&pool.provider(secs(10)), "x").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
}

/// With a transaction for each lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_with_a_transaction_for_each_lock() {
    if left_out("postgres") {
        return;
    }
    let server = PostgresServer::start();
    let before = ask(&client(&server.url()).await, SETTINGS).await;
    let pool = Pool::new(&server.url(), 8);
    let scoped = || built(pool.locks().transaction_scoped(true), secs(10));
    let (one, other) = (scoped(), scoped());
    shows_what_it_can(&one, &other, &server, "x").await;
    closed(&one).await;
    closed(&other).await;
    let clients = pool.all_back().await;
    let open = "select count(*) from pg_stat_activity where usename = 'app' and state <> 'idle'";
    super::until(&server, open, "0").await;
    assert!(clients.len() >= 2, "{}", clients.len());
    for client in &clients {
        assert_eq!(ask(client, SETTINGS).await, before);
        assert_eq!(ask(client, LEFT).await, "0");
    }
}
