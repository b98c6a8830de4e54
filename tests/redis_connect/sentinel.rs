//! A master that Sentinels watch, and what isn't a server of its own.

use fencelock::redis::driver::sentinel::{SentinelClientBuilder, SentinelServerType};
use fencelock::redis::driver::{ConnectionAddr, ProtocolVersion};
use fencelock::redis::{RedisLocks, lock_key};
use fencelock::{ErrorKind, LockProvider};

use super::common::secs;
use super::servers::locks::within;
use super::servers::redis::RedisServer;
use super::servers::redis_locks::renewed;
use super::servers::{free_port, left_out, wait_until};
use super::{
    PASSWORD, assert_no_secret, built, connected, encoded, everything, granted, is_free, refused,
    shows_what_it_can, take, until_queued, waits,
};

const NAME: &str = "mymaster";

/// A master, its replica, and the Sentinel that watches them.
struct Watched {
    master: RedisServer,
    replica: RedisServer,
    sentinel: RedisServer,
}

impl Watched {
    fn start() -> Self {
        let master = RedisServer::start();
        let replica = RedisServer::options().replica_of(master.addr()).start();
        replica.until(&["ROLE"], |role| role.contains("connected"));
        let sentinel = RedisServer::options().sentinel(NAME, master.addr(), 1).start();
        let port = replica.port().to_string();
        sentinel.until(&["SENTINEL", "REPLICAS", NAME], |said| said.contains(&port));
        Self { master, replica, sentinel }
    }

    fn url(&self, ttl: &str) -> String {
        format!("redis://{}/0?sentinel={NAME}&ttl={ttl}&retry_for=20s", self.sentinel.addr())
    }

    fn until_replicated(&self, name: &str) {
        let key = lock_key(name);
        let owner = self.master.command(&["GET", &key]);
        self.replica.until(&["GET", &key], |value| value == owner);
    }

    /// Sentinel breaks off connections, ours too.
    fn until_role(server: &RedisServer, role: &str) {
        wait_until(role, || server.try_command(&["ROLE"]).is_ok_and(|said| said.starts_with(role)));
    }

    fn until_moved(&self) {
        Self::until_role(&self.replica, "master");
        let port = self.replica.port().to_string();
        self.sentinel.until(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME], |said| said.ends_with(&port));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_survives_the_death_of_its_master() {
    if left_out("redis") {
        return;
    }
    let watched = Watched::start();
    let (one, other) = (connected(&watched.url("15s")).await, connected(&watched.url("15s")).await);
    let guard = take(&*one, "x").await;
    let token = guard.fencing_token();
    let waiter = waits(&*other, "x");
    until_queued(&watched.master, "x", 1);
    watched.until_replicated("x");
    watched.master.kill();
    watched.until_moved();
    renewed(&watched.replica, "x").await;
    assert!(!guard.is_lost());
    until_queued(&watched.replica, "x", 1);
    guard.release().await.expect("released at the new master");
    let guard = granted(waiter).await;
    assert!(guard.fencing_token() > token);
    assert!(!is_free(&*one, "x").await);
    drop(guard);
    shows_what_it_can(&*one, &*other, &watched.replica, "y").await;
}

/// For about ten seconds Sentinel lets the old master go on as one, whoever is connected to it: the TTL has to be longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_lock_survives_its_master_becoming_a_replica() {
    if left_out("redis") {
        return;
    }
    let watched = Watched::start();
    let (one, other) = (connected(&watched.url("60s")).await, connected(&watched.url("60s")).await);
    let guard = take(&*one, "x").await;
    let token = guard.fencing_token();
    let waiter = waits(&*other, "x");
    until_queued(&watched.master, "x", 1);
    watched.until_replicated("x");
    watched.sentinel.until(&["SENTINEL", "FAILOVER", NAME], |said| said == "OK");
    watched.until_moved();
    Watched::until_role(&watched.master, "slave");
    assert!(!guard.is_lost() && !waiter.is_finished());
    guard.release().await.expect("released at the new master");
    let guard = granted(waiter).await;
    assert!(guard.fencing_token() > token);
    assert!(!is_free(&*one, "x").await);
    assert_ne!(watched.replica.command(&["GET", &lock_key("x")]), "(nil)");
    drop(guard);
    shows_what_it_can(&*one, &*other, &watched.replica, "y").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_sentinel_is_passed_over() {
    if left_out("redis") {
        return;
    }
    let master = RedisServer::start();
    let sentinel = RedisServer::options().sentinel(NAME, master.addr(), 1).start();
    let dead = free_port();
    let url = format!("redis://127.0.0.1:{dead},{}/1?sentinel={NAME}", sentinel.addr());
    let (one, other) = (connected(&url).await, connected(&url).await);
    let _guard = take(&*one, "x").await;
    assert!(!is_free(&*other, "x").await);
    assert!(
        !is_free(&*connected(&format!("{}/1", master.url())).await, "x").await,
        "in database 1 of the master"
    );

    let unknown = refused(&format!("redis://{}?sentinel=another", sentinel.addr())).await;
    assert_eq!(unknown.kind(), ErrorKind::Unavailable, "{}", everything(&unknown));
    let none = refused(&format!("redis://127.0.0.1:{dead}?sentinel={NAME}")).await;
    assert_eq!(none.kind(), ErrorKind::Unavailable, "{}", everything(&none));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn master_and_sentinels_have_passwords_of_their_own() {
    if left_out("redis") {
        return;
    }
    let master = RedisServer::options().password("never-of-the-master").start();
    let sentinel = RedisServer::options()
        .sentinel(NAME, master.addr(), 1)
        .config(&format!("sentinel auth-pass {NAME}"), "never-of-the-master")
        .password(PASSWORD)
        .start();
    let (addr, password) = (sentinel.addr(), encoded(PASSWORD));
    let url = |master: &str, sentinel: &str| {
        format!("redis://:{master}@{addr}?sentinel={NAME}&sentinel_password={sentinel}&ttl=10s")
    };
    let right = url("never-of-the-master", &password);
    let named = format!("{right}&sentinel_username=default");
    let (one, other) = (connected(&right).await, connected(&named).await);
    shows_what_it_can(&*one, &*other, &master, "x").await;
    assert_no_secret(&format!("{one:?} {other:?} {:?}", one.create_lock("x")));

    let without = format!("redis://:never-of-the-master@{addr}?sentinel={NAME}");
    for wrong in [url("never-of-the-master", "never-this"), url("never-this", &password), without] {
        let error = refused(&wrong).await;
        assert_eq!(error.kind(), ErrorKind::Denied, "{wrong}: {}", everything(&error));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sentinel_client_of_ones_own() {
    if left_out("redis") {
        return;
    }
    let master = RedisServer::start();
    let sentinel = RedisServer::options().sentinel(NAME, master.addr(), 1).start();
    let provider = || {
        let address = ConnectionAddr::Tcp("127.0.0.1".into(), sentinel.port());
        let client = SentinelClientBuilder::new([address], NAME, SentinelServerType::Master)
            .and_then(|builder| builder.set_client_to_redis_protocol(ProtocolVersion::RESP2).build());
        built(RedisLocks::with_sentinel(client.expect("it can be built")), secs(10))
    };
    shows_what_it_can(&provider(), &provider(), &master, "x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_server_of_its_own_is_told_apart() {
    if left_out("redis") {
        return;
    }
    let master = RedisServer::start();
    let sentinel = RedisServer::options().sentinel(NAME, master.addr(), 1).start();
    let error = refused(&sentinel.url()).await;
    assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
    assert!(error.to_string().contains("sentinel=NAME"), "{error}");

    let cluster = RedisServer::options().cluster().start();
    let error = refused(&cluster.url()).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));
    assert!(error.to_string().contains("Redis Cluster"), "{error}");
    // Without `connect`, the first use says it.
    let provider = super::locks(cluster.addr(), secs(10));
    let error = within("an answer", provider.create_lock("x").try_acquire()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));

    let replica = RedisServer::options().replica_of(master.addr()).start();
    replica.until(&["ROLE"], |role| role.contains("connected"));
    let provider = connected(&format!("{}?retry_for=0s", replica.url())).await;
    let error = within("an answer", provider.create_lock("x").try_acquire()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
}
