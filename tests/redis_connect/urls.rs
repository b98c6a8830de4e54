//! What stands in a URL, right and wrong.

use std::net::{Ipv6Addr, TcpListener};
use std::time::Instant;

use fencelock::ErrorKind;
use fencelock::redis::lock_key;

use super::common::secs;
use super::servers::redis::RedisServer;
use super::servers::{free_port, left_out};
use super::{PASSWORD, assert_no_secret, connected, encoded, everything, is_free, refused, take};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_let_in_is_told_so_at_once() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().password(PASSWORD).start();
    redis.command(&["ACL", "SETUSER", "alice", "on", &format!(">{PASSWORD}"), "~*", "&*", "+@all"]);
    let (addr, right) = (redis.addr(), encoded(PASSWORD));
    for login in [
        "",
        ":never-this@",
        ":never%2Fthis@",
        "alice:never-this@",
        "bob:never-this@",
        &format!("bob:{right}@"),
    ] {
        let began = Instant::now();
        let error = refused(&format!("redis://{login}{addr}/0")).await;
        assert_eq!(error.kind(), ErrorKind::Denied, "{login}: {}", everything(&error));
        assert!(began.elapsed() < secs(2), "{login}: {:?}", began.elapsed());
    }
    for login in [format!(":{right}@"), format!("default:{right}@"), format!("alice:{right}@")] {
        let provider = connected(&format!("redis://{login}{addr}")).await;
        let guard = take(&*provider, "x").await;
        let lock = provider.create_lock("x");
        assert_no_secret(&format!("{provider:?} {lock:?} {guard:?}"));
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unavailable_at_once() {
    let began = Instant::now();
    let error = refused(&format!("redis://:never@127.0.0.1:{}", free_port())).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    assert!(error.is_retryable());
    assert!(began.elapsed() < secs(1), "{:?}", began.elapsed());

    // However long the resolver takes.
    let began = Instant::now();
    let error = refused("redis://:never@no-such-host.invalid").await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", everything(&error));
    assert!(began.elapsed() < secs(4), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_database_has_its_own_locks() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let [default, zero, one] = ["", "/0", "/1"].map(|path| redis.url() + path);
    let default = connected(&default).await;
    let guard = take(&*default, "x").await;
    assert!(!is_free(&*connected(&zero).await, "x").await);
    let one = connected(&one).await;
    let other = take(&*one, "x").await;
    assert_eq!(redis.command(&["INFO", "keyspace"]).matches("db").count(), 2);
    drop((guard, other));

    for path in ["/99", "/x"] {
        let error = refused(&(redis.url() + path)).await;
        assert_eq!(error.kind(), ErrorKind::Config, "{path}: {}", everything(&error));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_stands_before_the_name() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let provider = connected(&(redis.url() + "?prefix=app&ttl=5s")).await;
    let _guard = take(&*provider, "x").await;
    assert_eq!(lock_key("app:x"), "fencelock:{app:x}");
    let left: u64 = redis.command(&["PTTL", &lock_key("app:x")]).parse().unwrap();
    assert!((1..=5000).contains(&left), "{left}");
    assert!(is_free(&*connected(&redis.url()).await, "x").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_address_stands_in_brackets() {
    if left_out("redis") {
        return;
    }
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        eprintln!("this machine has no IPv6, so this shows nothing");
        return;
    }
    let redis = RedisServer::options().config("bind", "127.0.0.1 ::1").start();
    let provider = connected(&format!("redis://[::1]:{}/0", redis.port())).await;
    let _guard = take(&*provider, "x").await;
    assert!(!is_free(&*connected(&redis.url()).await, "x").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unix_socket_takes_its_login_from_the_query() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().password(PASSWORD).unix_socket().start();
    redis.command(&["ACL", "SETUSER", "alice", "on", &format!(">{PASSWORD}"), "~*", "&*", "+@all"]);
    let (path, right) = (redis.socket_path(), encoded(PASSWORD));
    let path = path.display();
    let over_tcp = connected(&format!("redis://:{right}@{}/1", redis.addr())).await;
    let guard = take(&*over_tcp, "x").await;
    for url in [
        format!("redis+unix:{path}?db=1&user=alice&password={right}"),
        format!("redis+unix://{path}?password={right}&db=1"),
    ] {
        let provider = connected(&url).await;
        assert!(!is_free(&*provider, "x").await);
        assert_no_secret(&format!("{provider:?}"));
    }
    assert!(is_free(&*connected(&format!("redis+unix:{path}?password={right}")).await, "x").await);
    drop(guard);

    let denied = refused(&format!("redis+unix:{path}?user=alice&password=never")).await;
    assert_eq!(denied.kind(), ErrorKind::Denied, "{}", everything(&denied));
    let missing = refused(&format!("redis+unix:{path}.not-there?password={right}")).await;
    assert_eq!(missing.kind(), ErrorKind::Unavailable, "{}", everything(&missing));
}

/// No server is asked: each of these is wrong whatever is there.
#[tokio::test]
async fn bad_urls_say_what_to_do() {
    let began = Instant::now();
    for (url, says) in [
        ("redis:", "names its host"),
        ("redis:127.0.0.1", "names its host"),
        ("redis://", "a host is missing"),
        ("redis:///0", "a host is missing"),
        ("redis://:never@", "a host is missing"),
        ("redis://:never@/0", "a host is missing"),
        ("redis://:never@a,,b?sentinel=m", "a host is missing"),
        ("redis://:never@a:port", "not a redis URL"),
        ("redis://:never@a:99999", "not a redis URL"),
        ("redis://:never@a/database", "not a redis URL"),
        ("redis://:never/this@a", "not a redis URL"),
        ("redis://:never@[::1", "not a redis URL"),
        ("redis://:never@a,b", "sentinel=NAME"),
        ("redis://:never@a?sentinel_password=never", "need sentinel=NAME"),
        ("redis://:never@a?sentinel_username=never", "need sentinel=NAME"),
        ("redis://:never@a?sentinel=", "sentinel="),
        ("redis://:never@a?replicas=0", "at least 1"),
        ("redis://:never@a?replicas=never", "replicas in the URL must be a whole number"),
        ("redis://:never@a?replicas=-1", "whole number"),
        ("redis://:never@a?replica_timeout=100ms", "needs replicas=N"),
        ("redis://:never@a?replicas=1&replica_timeout=100", "replica_timeout=30s"),
        ("redis://:never@a?replicas=1&replica_timeout=2s", "from 1 ms to 1 s"),
        ("redis://:never@a?replicas=1&replicas=1", "twice"),
        ("redis://:never@a?password=never", "this backend knows"),
        ("redis://:never@a?ttl=1ms", "minimum"),
        ("redis+unix:", "absolute"),
        ("redis+unix:socket?password=never", "absolute"),
        ("redis+unix:///socket?password=never&db=never", "db in the URL must be a number"),
        ("redis+unix:///socket?sentinel=never", "this backend knows"),
        ("redlock://:never@a", "at least three"),
        ("redlock://:never@a,b", "at least three"),
        ("redlock://:never@a,b,a", "named twice"),
        ("redlock://:never@a,b,a:6379", "named twice"),
        ("redlock://:never@a,b,c?tls=maybe", "tls in the URL must be true or false"),
        ("redlock://:never@a,b,c?replicas=1", "this backend knows"),
        ("redlock://:never@a,b,c?longest_ttl=60", "longest_ttl=30s"),
        ("redlock://", "a host is missing"),
        ("redlock:a,b,c", "names its host"),
    ] {
        let error = refused(url).await;
        let said = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Config, "{url}: {said}");
        assert!(said.contains(says), "{url}: {said}");
        assert!(!said.contains("://:"), "{url} is echoed: {said}");
    }
    assert!(began.elapsed() < secs(5));
}

#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
#[tokio::test]
async fn without_a_tls_feature_it_is_named() {
    for url in ["rediss://:never@a", "redlock://:never@a,b,c?tls=true", "rediss://:never@a?sentinel=m"] {
        let error = refused(url).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", everything(&error));
        for feature in ["`rustls`", "`native-tls`"] {
            assert!(error.to_string().contains(feature), "{error}");
        }
    }
}
