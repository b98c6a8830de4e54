//! What `tests/servers` does to real servers, and on the way to them, really happens.

mod servers;

use std::io::{BufRead, BufReader, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use servers::proxy::Proxy;
use servers::redis::{RawConnection, RedisServer};
use servers::{ChildServer, PortTaken, left_out, wait_until};

/// Long enough for a reply that isn't lost.
const SILENCE: Duration = Duration::from_millis(150);

/// For the test that is killed.
const HELPER: &str = "FENCELOCK_SELFTEST_HELPER";

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn open(proxy: &Proxy) -> RawConnection {
    RawConnection::open(proxy.addr()).expect("the proxy accepts")
}

fn redis_and_proxy() -> (RedisServer, Proxy) {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.addr());
    (redis, proxy)
}

#[test]
fn two_servers_at_once_have_nothing_in_common() {
    if left_out("redis") {
        return;
    }
    let (one, other) = (RedisServer::start(), RedisServer::start());
    assert_ne!(one.port(), other.port());
    assert_eq!(one.command(&["SET", "key", "value"]), "OK");
    assert_eq!(one.command(&["GET", "key"]), "value");
    assert_eq!(other.command(&["GET", "key"]), "(nil)");
    assert_eq!(other.command(&["KEYS", "*"]), "");
    assert_eq!(one.command(&["RPUSH", "list", "a", "b"]), "2");
    assert_eq!(one.command(&["LRANGE", "list", "0", "-1"]), "a\nb");
    assert!(one.command(&["GET"]).starts_with("-ERR wrong number"));
    assert_eq!(one.command(&["CONFIG", "GET", "save"]), "save\n");
    assert_eq!(one.command(&["DEBUG", "SLEEP", "0"]), "OK");
    assert_eq!(one.command(&["SCRIPT", "FLUSH"]), "OK");
    assert_eq!(one.url(), format!("redis://127.0.0.1:{}", one.port()));
}

#[test]
fn a_frozen_server_answers_when_it_continues() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let mut connection = RawConnection::open(redis.addr()).unwrap();
    redis.freeze();
    connection.send(&["PING"]).unwrap();
    assert!(connection.is_silent_for(SILENCE));
    redis.thaw();
    assert_eq!(connection.receive().unwrap(), "PONG");

    redis.freeze();
    redis.kill(); // takes it frozen too
    assert!(connection.receive().is_err());
}

#[test]
fn a_restart_keeps_what_is_on_disk() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().durable().start();
    redis.command(&["SET", "key", "value"]);
    redis.kill();
    assert_eq!(redis.try_command(&["PING"]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    redis.restart();
    assert_eq!(redis.command(&["GET", "key"]), "value");
    redis.restart_empty();
    assert_eq!(redis.command(&["GET", "key"]), "(nil)");

    let forgetful = RedisServer::start();
    let (port, pid) = (forgetful.port(), forgetful.child().pid());
    forgetful.command(&["SET", "key", "value"]);
    forgetful.restart();
    assert_eq!(forgetful.command(&["GET", "key"]), "(nil)");
    assert_eq!(forgetful.port(), port);
    assert_ne!(forgetful.child().pid(), pid);
}

#[test]
fn the_wall_clock_of_a_server_can_be_moved() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start_with_clock();
    let time = || {
        let said = redis.command(&["TIME"]);
        said.lines().next().expect("seconds").parse::<i64>().expect("a number")
    };
    let now = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        i64::try_from(now.as_secs()).expect("before year 292277026596")
    };
    assert!((time() - now()).abs() <= 2);
    redis.command(&["SET", "key", "value", "PX", "60000"]);
    redis.command(&["SET", "long", "value", "PX", "10000000"]);
    redis.set_clock_offset(-3600);
    assert!((time() - now() + 3600).abs() <= 2);
    let left: i64 = redis.command(&["PTTL", "key"]).parse().unwrap();
    assert!((3_650_000..=3_660_000).contains(&left), "{left}");
    redis.set_clock_offset(3600);
    assert!((time() - now() - 3600).abs() <= 2);
    assert_eq!(redis.command(&["GET", "key"]), "(nil)");
    assert_eq!(redis.command(&["GET", "long"]), "value");

    // Its waiting isn't disturbed by that.
    let mut connection = RawConnection::open(redis.addr()).unwrap();
    let began = Instant::now();
    connection.send(&["BLPOP", "nothing", "0.3"]).unwrap();
    redis.until(&["INFO", "clients"], |info| info.contains("blocked_clients:1"));
    assert_eq!(connection.receive().unwrap(), "(nil)");
    assert!((Duration::from_millis(290)..Duration::from_secs(5)).contains(&began.elapsed()));

    // It goes on with the moved clock.
    let before = time();
    wait_until("the moved clock runs", || time() > before);
    redis.restart();
    assert!((time() - now() - 3600).abs() <= 2);
}

#[test]
fn a_server_ends_with_its_value() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let pid = redis.child().pid();
    assert!(exists(pid));
    drop(redis);
    assert!(!exists(pid));
}

#[test]
fn a_server_outlives_the_thread_that_started_it() {
    if left_out("redis") {
        return;
    }
    let redis = thread::spawn(RedisServer::start).join().unwrap();
    thread::sleep(SILENCE); // until it would be gone
    assert_eq!(redis.command(&["PING"]), "PONG");
}

#[test]
fn a_server_ends_with_a_killed_test() {
    if left_out("redis") {
        return;
    }
    let mut test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper", "--ignored", "--nocapture"])
        .env(HELPER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(test.stdout.take().unwrap()).lines();
    let pid = lines
        .find_map(|line| line.unwrap().split_once("server ")?.1.parse().ok())
        .expect("it says its server");
    assert!(exists(pid));
    test.kill().unwrap();
    test.wait().unwrap();
    wait_until("the server is gone", || !exists(pid));
}

#[test]
#[ignore = "a part of a_server_ends_with_a_killed_test"]
fn helper() {
    if std::env::var_os(HELPER).is_some() {
        let redis = RedisServer::start();
        println!("\nserver {}", redis.child().pid());
        loop {
            thread::park();
        }
    }
}

#[test]
fn a_server_that_does_not_come_up_shows_what_it_said() {
    if left_out("redis") {
        return;
    }
    let start = || RedisServer::options().config("no-such-setting", "1").start();
    let panic = catch_unwind(AssertUnwindSafe(start)).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("no-such-setting"), "{message}");
}

#[test]
fn a_port_that_another_has_is_noticed() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::start();
    let second = ChildServer::new("redis-server");
    let mut command = Command::new(servers::program("redis-server", "redis-server"));
    command.args(["--port", &redis.port().to_string(), "--bind", "127.0.0.1"]);
    let Err(PortTaken) = second.start(&command, redis.port(), || redis.command(&["PING"]) == "PONG") else {
        panic!("two servers on one port");
    };
}

#[test]
#[should_panic(expected = "Debian's package is no-such-package")]
fn a_missing_program_is_named() {
    servers::program("no-such-program", "no-such-package");
}

#[test]
fn passwords_users_and_sockets() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().password("secret").unix_socket().start();
    assert_eq!(redis.command(&["PING"]), "PONG");
    let mut stranger = RawConnection::open(redis.addr()).unwrap();
    assert!(stranger.command(&["PING"]).unwrap().starts_with("-NOAUTH"));
    std::os::unix::net::UnixStream::connect(redis.socket_path()).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("users.acl");
    std::fs::write(&file, "user default off\nuser alice on >secret ~* &* +@all\n").unwrap();
    let redis = RedisServer::options().acl_file(&file, "alice", "secret").start();
    assert_eq!(redis.command(&["ACL", "WHOAMI"]), "alice");
}

#[test]
fn tls_is_on_a_port_of_its_own() {
    if left_out("redis") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
    let openssl = || Command::new(servers::program("openssl", "openssl"));
    let made = openssl()
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let redis = RedisServer::options().tls(&certificate, &key, &certificate).start();
    let mut client = openssl()
        .args(["s_client", "-quiet", "-verify_return_error", "-verify_ip", "127.0.0.1", "-connect"])
        .arg(format!("127.0.0.1:{}", redis.tls_port()))
        .arg("-CAfile")
        .arg(&certificate)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(client.stdin.as_mut().unwrap(), b"PING\r\n").unwrap();
    let reply = BufReader::new(client.stdout.take().unwrap()).lines().next();
    client.kill().unwrap();
    client.wait().unwrap();
    assert_eq!(reply.expect("a reply").unwrap(), "+PONG");
    assert_eq!(redis.command(&["PING"]), "PONG", "without TLS too");
}

#[test]
fn a_sentinel_moves_the_master() {
    if left_out("redis") {
        return;
    }
    let master = RedisServer::start();
    let replica = RedisServer::options().replica_of(master.addr()).start();
    replica.until(&["ROLE"], |role| role.contains("connected"));
    master.command(&["SET", "key", "value"]);
    replica.until(&["GET", "key"], |value| value == "value");
    let sentinel = RedisServer::options().sentinel("mymaster", master.addr(), 1).start();
    sentinel.until(&["SENTINEL", "REPLICAS", "mymaster"], |said| said.contains(&replica.port().to_string()));
    master.kill();
    let address = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"];
    sentinel.until(&address, |said| said == format!("127.0.0.1\n{}", replica.port()));
    replica.until(&["ROLE"], |role| role.starts_with("master"));
    assert_eq!(replica.command(&["GET", "key"]), "value");
    sentinel.restart();
    assert_eq!(sentinel.command(&address), format!("127.0.0.1\n{}", replica.port()));
}

#[test]
fn a_cluster_of_one() {
    if left_out("redis") {
        return;
    }
    let redis = RedisServer::options().cluster().start();
    assert_eq!(redis.command(&["SET", "key", "value"]), "OK");
    redis.restart();
    assert!(redis.command(&["CLUSTER", "INFO"]).contains("cluster_state:ok"));
}

#[test]
fn requests_and_replies_can_be_lost_apart() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let mut client = open(&proxy);
    assert_eq!(client.command(&["INCR", "n"]).unwrap(), "1");

    proxy.cut_requests();
    client.send(&["INCR", "n"]).unwrap();
    assert!(client.is_silent_for(SILENCE));
    assert_eq!(redis.command(&["GET", "n"]), "1");
    proxy.heal();
    assert_eq!(client.command(&["GET", "n"]).unwrap(), "1", "what was lost stays lost");

    proxy.cut_replies();
    client.send(&["INCR", "n"]).unwrap();
    proxy.wait_until(|traffic| traffic.lost_replies == 1);
    assert_eq!(redis.command(&["GET", "n"]), "2");
    assert!(client.is_silent_for(SILENCE));
    proxy.heal();
    assert_eq!(client.command(&["ECHO", "x"]).unwrap(), "x", "what was lost stays lost");
    let traffic = proxy.traffic();
    assert_eq!((traffic.lost_requests, traffic.lost_replies, traffic.commands), (1, 1, 4));
}

#[test]
fn a_cut_hides_the_end_of_the_server() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let mut client = open(&proxy);
    client.command(&["PING"]).unwrap();
    proxy.cut_replies();
    redis.kill();
    assert!(client.is_silent_for(SILENCE));
    proxy.heal();
    client.send(&["PING"]).unwrap();
    assert_eq!(client.receive().unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn each_direction_can_be_slow() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let mut client = open(&proxy);
    let delay = Duration::from_millis(200);
    client.command(&["PING"]).unwrap();

    proxy.delay_replies(delay);
    let began = Instant::now();
    client.send(&["SET", "key", "1"]).unwrap();
    redis.until(&["GET", "key"], |value| value == "1");
    assert!(began.elapsed() < delay);
    client.receive().unwrap();
    assert!(began.elapsed() >= delay);

    proxy.delay_replies(Duration::ZERO);
    proxy.delay_requests(delay);
    let began = Instant::now();
    client.send(&["SET", "key", "2"]).unwrap();
    client.send(&["SET", "key", "3"]).unwrap();
    redis.until(&["GET", "key"], |value| value != "1");
    assert!(began.elapsed() >= delay);
    client.receive().unwrap();
    client.receive().unwrap();
    assert!(began.elapsed() < 2 * delay, "the delays add up");
}

#[test]
fn the_reply_to_one_request_can_be_lost() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let (mut client, mut other) = (open(&proxy), open(&proxy));
    proxy.drop_reply_to(b"INCR");
    assert_eq!(client.command(&["PING"]).unwrap(), "PONG");
    for command in [["ECHO", "before"], ["INCR", "n"], ["ECHO", "after"]] {
        client.send(&command).unwrap();
    }
    assert_eq!(client.receive().unwrap(), "before");
    proxy.wait_until(|traffic| traffic.lost_replies == 2);
    assert!(client.is_silent_for(SILENCE));
    assert_eq!(redis.command(&["GET", "n"]), "1");
    assert!(!proxy.is_aiming());
    assert_eq!(other.command(&["INCR", "n"]).unwrap(), "2", "only one connection is mute");

    proxy.drop_reply(2);
    assert_eq!(other.command(&["INCR", "n"]).unwrap(), "3");
    other.send(&["INCR", "n"]).unwrap();
    proxy.wait_until(|traffic| traffic.lost_replies == 3);
    assert!(other.is_silent_for(SILENCE));
    assert_eq!(redis.command(&["GET", "n"]), "4");
}

#[test]
fn a_subscription_does_not_confuse_the_order_of_replies() {
    if left_out("redis") {
        return;
    }
    for protocol in ["2", "3"] {
        let (redis, proxy) = redis_and_proxy();
        let mut client = open(&proxy);
        client.command(&["HELLO", protocol]).unwrap();
        client.send(&["SUBSCRIBE", "a", "b"]).unwrap();
        client.receive().unwrap();
        client.receive().unwrap();
        redis.command(&["PUBLISH", "a", "hello"]);
        client.receive().unwrap();
        proxy.drop_reply_to(b"two");
        client.send(&["PING", "one"]).unwrap();
        client.send(&["PING", "two"]).unwrap();
        assert!(client.receive().unwrap().ends_with("one"), "RESP{protocol}");
        proxy.wait_until(|traffic| traffic.lost_replies == 1);
        assert!(client.is_silent_for(SILENCE), "RESP{protocol}");
    }
}

#[test]
fn a_reset_is_a_reset() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let mut clients = [open(&proxy), open(&proxy)];
    for client in &mut clients {
        client.command(&["PING"]).unwrap();
    }
    assert_eq!(proxy.traffic().open, 2);
    proxy.reset_all();
    for client in &mut clients {
        assert_eq!(client.receive().unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    proxy.wait_until(|traffic| traffic.open == 0);
    redis.until(&["INFO", "clients"], |info| info.contains("connected_clients:1\r\n"));
    assert_eq!(open(&proxy).command(&["PING"]).unwrap(), "PONG");
    assert_eq!(proxy.connections(), 3);
}

#[test]
fn a_reply_can_break_off() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let mut client = open(&proxy);
    redis.command(&["SET", "key", "abcdefgh"]);
    client.command(&["PING"]).unwrap();
    proxy.reset_in_reply(7); // $8\r\nabc
    client.send(&["GET", "key"]).unwrap();
    assert_eq!(client.receive().unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(client.received(), b"$8\r\nabc");

    let mut client = open(&proxy);
    proxy.reset_in_reply_to(b"GET", 0);
    assert_eq!(client.command(&["PING"]).unwrap(), "PONG");
    client.send(&["GET", "key"]).unwrap();
    assert_eq!(client.receive().unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(client.received(), b"");
}

#[test]
fn the_port_can_be_closed_and_lead_elsewhere() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let other = RedisServer::start();
    redis.command(&["SET", "name", "one"]);
    other.command(&["SET", "name", "other"]);
    let mut client = open(&proxy);
    assert_eq!(client.command(&["GET", "name"]).unwrap(), "one");
    proxy.refuse();
    assert_eq!(RawConnection::open(proxy.addr()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(client.command(&["GET", "name"]).unwrap(), "one", "old connections stay");
    proxy.accept();
    proxy.set_target(other.addr());
    assert_eq!(client.command(&["GET", "name"]).unwrap(), "one", "old connections stay");
    assert_eq!(open(&proxy).command(&["GET", "name"]).unwrap(), "other");
    other.kill();
    let refused = RawConnection::open(proxy.addr()).and_then(|mut client| client.command(&["GET", "name"]));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_request_can_arrive_after_its_client_has_gone() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    proxy.hold_requests();
    let mut zombie = open(&proxy);
    zombie.send(&["SET", "key", "zombie"]).unwrap();
    proxy.wait_until(|traffic| traffic.waiting == 1);
    drop(zombie);
    proxy.wait_until(|traffic| traffic.open == 0);
    // Neither does a reset stop it.
    let mut reset = open(&proxy);
    reset.send(&["INCR", "n"]).unwrap();
    proxy.wait_until(|traffic| traffic.waiting == 2);
    proxy.reset_all();
    assert_eq!(reset.receive().unwrap_err().kind(), ErrorKind::ConnectionReset);

    redis.command(&["SET", "key", "successor"]);
    assert_eq!(redis.command(&["GET", "n"]), "(nil)");
    assert_eq!(proxy.commands(), 0);
    proxy.release_requests();
    redis.until(&["GET", "key"], |value| value == "zombie");
    redis.until(&["GET", "n"], |value| value == "1");
    assert_eq!(proxy.commands(), 2);
    redis.until(&["INFO", "clients"], |info| info.contains("connected_clients:1\r\n"));
}

#[test]
fn only_some_requests_can_be_held() {
    if left_out("redis") {
        return;
    }
    let (redis, proxy) = redis_and_proxy();
    let (mut client, mut other) = (open(&proxy), open(&proxy));
    proxy.hold_requests_with(b"slow");
    client.send(&["SET", "slow", "1"]).unwrap();
    client.send(&["SET", "behind", "1"]).unwrap();
    proxy.wait_until(|traffic| traffic.waiting == 2);
    assert_eq!(other.command(&["SET", "fast", "1"]).unwrap(), "OK");
    assert_eq!(redis.command(&["KEYS", "*"]), "fast");
    proxy.release_requests();
    assert_eq!(client.receive().unwrap(), "OK");
    assert_eq!(client.receive().unwrap(), "OK");

    proxy.hold_replies();
    client.send(&["SET", "reply", "1"]).unwrap();
    redis.until(&["GET", "reply"], |value| value == "1");
    assert!(client.is_silent_for(SILENCE));
    proxy.release_replies();
    assert_eq!(client.receive().unwrap(), "OK");
}

/// On a runtime whose clock is paused and which blocks: the proxy lives elsewhere.
#[tokio::test(start_paused = true)]
async fn commands_are_counted() {
    if left_out("redis") {
        return;
    }
    let (_redis, proxy) = redis_and_proxy();
    let large = "x".repeat(1 << 20);
    thread::scope(|scope| {
        for number in 0..4 {
            let (proxy, large) = (&proxy, &large);
            scope.spawn(move || {
                let mut client = open(proxy);
                let (key, tricky) = (format!("key{number}"), "*1\r\n$4\r\nPING\r\n".repeat(3));
                for _ in 0..50 {
                    client.send(&["SET", &key, &tricky]).unwrap();
                }
                client.send(&["SET", &key, large]).unwrap();
                client.send(&["GET", &key]).unwrap();
                for _ in 0..51 {
                    assert_eq!(client.receive().unwrap(), "OK");
                }
                assert_eq!(client.receive().unwrap(), *large);
            });
        }
    });
    let traffic = proxy.until(|traffic| traffic.open == 0).await;
    assert_eq!((traffic.connections, traffic.commands, traffic.replies, traffic.waiting), (4, 208, 208, 0));
    assert!(traffic.request_bytes > 4 << 20 && traffic.reply_bytes > 4 << 20);
}
