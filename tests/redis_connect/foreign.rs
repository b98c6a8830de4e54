//! Programs that know nothing of us but the key; and a server that answers what wasn't asked.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use fencelock::redis::driver::Client;
use fencelock::redis::{Redlock, lock_key};
use fencelock::{ErrorKind, LockOptions, LockProvider};

use super::common::secs;
use super::servers::left_out;
use super::servers::locks::within;
use super::servers::redis::RedisServer;
use super::{built, everything, granted, is_free, locks, take, until_queued, waits};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_only_knows_the_key_excludes_us_and_is_excluded() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let provider = locks(redis.addr(), secs(10));
    let key = lock_key("x");
    let take_over = |value: &str, ttl: &str| redis.command(&["SET", &key, value, "NX", "PX", ttl]);

    let guard = take(&provider, "x").await;
    let mut last = guard.fencing_token();
    assert_eq!(take_over("foreign", "60000"), "(nil)");
    guard.release().await.expect("released");
    assert_eq!(take_over("foreign", "60000"), "OK");
    assert!(!is_free(&provider, "x").await);

    // It deletes its key, and tells nobody.
    let waiter = waits(&provider, "x");
    until_queued(&redis, "x", 1);
    let deleted = Instant::now();
    assert_eq!(redis.command(&["DEL", &key]), "1");
    let guard = granted(waiter).await;
    assert!(deleted.elapsed() < secs(2), "{:?}", deleted.elapsed());
    assert!(guard.fencing_token() > last);
    last = guard.fencing_token();
    guard.release().await.expect("released");

    // Its time runs out.
    assert_eq!(take_over("foreign", "700"), "OK");
    let began = Instant::now();
    let guard = take(&provider, "x").await;
    assert!(began.elapsed() < secs(2), "{:?}", began.elapsed());
    assert!(guard.fencing_token() > last);
    last = guard.fencing_token();
    guard.release().await.expect("released");

    // Values that we never write, one of them for ever.
    for value in ["foreign", ""] {
        assert_eq!(redis.command(&["SET", &key, value]), "OK");
        assert!(!is_free(&provider, "x").await, "{value:?}");
        let waiter = waits(&provider, "x");
        until_queued(&redis, "x", 1);
        assert_eq!(redis.command(&["GET", &key]), value);
        redis.command(&["DEL", &key]);
        let guard = granted(waiter).await;
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
        guard.release().await.expect("released");
    }

    // Something that isn't a lock at all.
    redis.command(&["RPUSH", &key, "a"]);
    let error = within("an answer", provider.create_lock("x").try_acquire()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Config, "{}", everything(&error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_only_knows_the_key_excludes_redlock_and_is_excluded() {
    if left_out("redis") {
        return;
    }
    let servers: Vec<_> = (0..3).map(|_| RedisServer::start()).collect();
    let clients = servers.iter().map(|server| Client::open(server.url()).expect("a URL of ours"));
    let provider = built(Redlock::new(clients).expect("three"), secs(10));
    let key = lock_key("x");
    let guard = take(&provider, "x").await;
    let mut last = guard.fencing_token();
    let refused =
        servers.iter().filter(|server| server.command(&["SET", &key, "v", "NX", "PX", "60000"]) == "(nil)");
    assert!(refused.count() >= 2);
    guard.release().await.expect("released");
    for value in ["foreign", ""] {
        for server in &servers[..2] {
            assert_eq!(server.command(&["SET", &key, value]), "OK");
        }
        assert!(!is_free(&provider, "x").await, "{value:?}");
        for server in &servers[..2] {
            assert_eq!(server.command(&["GET", &key]), value);
        }
        let waiter = waits(&provider, "x");
        until_queued(&servers[0], "x", 1);
        let deleted = Instant::now();
        for server in &servers[..2] {
            server.command(&["DEL", &key]);
        }
        let guard = granted(waiter).await;
        assert!(deleted.elapsed() < secs(3), "{:?}", deleted.elapsed());
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
        guard.release().await.expect("released");
    }
}

/// A server that answers each script with what it should have answered to the one before.
struct OutOfStep {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    scripts: Arc<AtomicUsize>,
}

impl OutOfStep {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let (connections, scripts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (opened, asked) = (connections.clone(), scripts.clone());
        // It ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                opened.fetch_add(1, Ordering::SeqCst);
                let asked = asked.clone();
                thread::spawn(move || answer(&stream, &asked));
            }
        });
        Self { addr, connections, scripts }
    }
}

fn answer(stream: &TcpStream, scripts: &AtomicUsize) -> Option<()> {
    let mut to = stream;
    let mut from = BufReader::new(stream);
    let somebody = "0123456789abcdef0123456789abcdef.0";
    let mut before = granted_to(somebody);
    loop {
        let command = read_command(&mut from)?;
        let answer = match &*command[0] {
            "EVALSHA" => {
                scripts.fetch_add(1, Ordering::SeqCst);
                let keys: usize = command[2].parse().ok()?;
                let answer = match command.get(3 + keys) {
                    Some(owner) => granted_to(owner),
                    None => ":1\r\n".to_owned(),
                };
                std::mem::replace(&mut before, answer)
            }
            "INFO" => {
                let info = "redis_mode:standalone\r\nrun_id:0\r\n";
                format!("${}\r\n{info}\r\n", info.len())
            }
            _ => "+OK\r\n".to_owned(),
        };
        to.write_all(answer.as_bytes()).ok()?;
    }
}

fn granted_to(owner: &str) -> String {
    format!("*3\r\n$7\r\ngranted\r\n:1\r\n${}\r\n{owner}\r\n", owner.len())
}

fn read_command(from: &mut impl BufRead) -> Option<Vec<String>> {
    let number = |from: &mut dyn BufRead| {
        let mut line = String::new();
        from.read_line(&mut line).ok()?;
        line.trim().get(1..)?.parse::<usize>().ok()
    };
    let count = number(from)?;
    let mut command = Vec::new();
    for _ in 0..count {
        let length = number(from)?;
        let mut text = vec![0; length + 2];
        from.read_exact(&mut text).ok()?;
        text.truncate(length);
        command.push(String::from_utf8_lossy(&text).into_owned());
    }
    Some(command)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_another_question_is_never_a_grant() {
    let server = OutOfStep::start();
    let provider = locks(server.addr, secs(10));
    // Another each time: what may have been granted is being taken back.
    let lock = |name: &str| provider.create_lock_with(name, LockOptions::new().retry_for(secs(0)));
    for attempt in 1..=5 {
        let lock = lock(&attempt.to_string());
        let error = within("an answer", lock.try_acquire()).await.expect_err("somebody else's answer");
        assert_eq!(error.kind(), ErrorKind::Unknown, "{}", everything(&error));
        assert!(server.connections.load(Ordering::SeqCst) >= attempt, "it goes on over the same connection");
        assert!(server.scripts.load(Ordering::SeqCst) >= attempt);
    }
    let error =
        within("an answer", lock("x").try_acquire_for(secs(1))).await.expect_err("somebody else's answer");
    assert_eq!(error.kind(), ErrorKind::Unknown, "{}", everything(&error));
}
