//! What `tests/servers` does to real PostgreSQL servers, and to `PgBouncer`, really happens.

mod servers;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use servers::pgbouncer::PgBouncer;
use servers::postgres::{DATABASE, PASSWORD, PostgresServer, SUPERUSER, USER};
use servers::{left_out, wait_until};

/// Long enough for a reply that isn't lost.
const SILENCE: Duration = Duration::from_millis(300);

/// Long enough for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// For the test that is killed.
const HELPER: &str = "FENCELOCK_SELFTEST_HELPER";

const MY_PID: &str = "select pg_backend_pid();";

/// The processes of a server with which it does its work.
const PIDS: &str = "select string_agg(pid::text, ' ') from pg_stat_activity where pid <> pg_backend_pid()";

/// A connection that stays.
struct Session {
    psql: Child,
    statements: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Session {
    fn open(mut psql: Command) -> Self {
        let mut psql = psql
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("psql can be started");
        let statements = psql.stdin.take();
        let output = BufReader::new(psql.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { psql, statements, lines }
    }

    fn send(&mut self, statement: &str) {
        writeln!(self.statements.as_ref().expect("open"), "{statement}").expect("psql runs");
    }

    fn ask(&mut self, statement: &str) -> String {
        self.send(statement);
        self.lines.recv_timeout(PATIENCE).expect("a line")
    }

    /// Whether the server has ended it.
    fn is_lost(&mut self) -> bool {
        self.lines.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.psql.kill().expect("it is our child");
        self.psql.wait().expect("it is our child");
    }
}

/// A zombie doesn't: in a container, nobody may take care of those.
fn exists(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn app(postgres: &PostgresServer, statement: &str) -> Result<String, String> {
    postgres.sql_as(USER, PASSWORD, DATABASE, statement)
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace().map(|number| number.parse().expect("a number")).collect()
}

#[test]
fn two_servers_at_once_have_nothing_in_common() {
    if left_out("postgres") {
        return;
    }
    let (one, other) = (PostgresServer::start(), PostgresServer::start());
    assert_ne!(one.port(), other.port());
    assert_eq!(app(&one, "create table t (n int); insert into t values (1), (2)").unwrap(), "");
    assert_eq!(app(&one, "select n, n + 1 from t order by n").unwrap(), "1|2\n2|3");
    assert_eq!(one.sql("select count(*) from t"), "2");
    assert_eq!(other.sql("select count(*) from pg_tables where tablename = 't'"), "0");
    let error = other.try_sql("select * from t").unwrap_err();
    assert!(error.contains("relation \"t\" does not exist"), "{error}");
    assert_eq!(one.url(), format!("postgres://app:{PASSWORD}@127.0.0.1:{}/test", one.port()));
    for name in ["fsync", "logging_collector"] {
        assert_eq!(one.sql(&format!("show {name}")), "off");
    }
    assert_eq!(one.sql("show server_encoding"), "UTF8");
    one.sql("create database another");
    assert_eq!(one.sql_as(SUPERUSER, PASSWORD, "another", "select 1").unwrap(), "1");
    assert_eq!(one.until("select 1", |one| one == "1"), "1");
}

#[test]
fn users_have_their_rights_and_need_their_password() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::options().config("application_name", r"it's a \ name").start();
    let who = "select rolsuper, pg_get_userbyid(datdba) from pg_roles, pg_database
        where rolname = current_user and datname = current_database()";
    assert_eq!(app(&postgres, who).unwrap(), "f|app");
    assert_eq!(postgres.sql(who), "t|app");
    assert!(app(&postgres, "create role another").unwrap_err().contains("permission denied"));
    for user in [USER, SUPERUSER] {
        let error = postgres.sql_as(user, "wrong", DATABASE, "select 1").unwrap_err();
        assert!(error.contains("password authentication failed"), "{error}");
    }
    let setting = "select boot_val, reset_val from pg_settings where name = 'port'";
    assert_eq!(postgres.sql(setting), format!("5432|{}", postgres.port()));
    assert_eq!(
        postgres.sql("select setting from pg_file_settings where name = 'application_name'"),
        r"it's a \ name"
    );
    std::os::unix::net::UnixStream::connect(
        postgres.socket_dir().join(format!(".s.PGSQL.{}", postgres.port())),
    )
    .unwrap();
    for url in [postgres.url(), postgres.superuser_url()] {
        let mut psql = Command::new(postgres.psql().get_program());
        let output = psql.args(["-AtXc", "select current_database()"]).arg(url).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "test\n", "{output:?}");
    }
}

#[test]
fn a_frozen_server_answers_when_it_continues() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start();
    let mut session = Session::open(postgres.psql());
    session.ask(MY_PID);
    postgres.freeze();
    session.send("select 'late';");
    assert_eq!(session.lines.recv_timeout(SILENCE), Err(mpsc::RecvTimeoutError::Timeout));
    postgres.thaw();
    assert_eq!(session.lines.recv_timeout(PATIENCE).unwrap(), "late");

    postgres.freeze();
    postgres.kill(); // takes it frozen too
    session.send("select 'never';");
    assert!(session.is_lost());
}

#[test]
fn a_restart_keeps_what_was_committed() {
    if left_out("postgres") {
        return;
    }
    for options in [PostgresServer::options().durable(), PostgresServer::options()] {
        let postgres = options.start();
        let pid = postgres.pid();
        postgres.sql("create table t (n int)");
        let mut session = Session::open(postgres.psql());
        session.ask("begin; select pg_advisory_xact_lock(1), 'got';");
        postgres.sql("insert into t select generate_series(1, 1000)");
        postgres.kill();
        assert!(postgres.try_sql("select 1").unwrap_err().contains("Connection refused"));
        postgres.restart();
        assert!(postgres.output().contains("not properly shut down"), "{}", postgres.output());
        assert_eq!(postgres.sql("select count(*) from t"), "1000");
        assert_eq!(postgres.sql("select pg_try_advisory_lock(1)"), "t");
        session.send("select 1;");
        assert!(session.is_lost());

        postgres.sql("insert into t values (1001)");
        postgres.restart();
        postgres.restart();
        assert_eq!(postgres.sql("select count(*) from t"), "1001");
        assert_ne!(postgres.pid(), pid);
    }
    let durable = PostgresServer::options().durable().start();
    assert_eq!(durable.sql("show fsync"), "on");
}

#[test]
fn a_clean_stop_needs_no_recovery() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start();
    postgres.sql("create table t as select 1 as n");
    let mut session = Session::open(postgres.psql());
    session.ask(MY_PID);
    postgres.stop_fast();
    assert!(postgres.output().contains("database system is shut down"));
    session.send("select 1;");
    assert!(session.is_lost());
    postgres.restart();
    assert!(postgres.output().contains("database system was shut down at"), "{}", postgres.output());
    assert_eq!(postgres.sql("select n from t"), "1");
}

#[test]
fn a_crash_of_one_process_ends_all_connections() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start();
    let (mut one, mut other) = (Session::open(postgres.psql()), Session::open(postgres.psql()));
    let victim = one.ask(MY_PID).parse().unwrap();
    other.ask(MY_PID);
    let pid = postgres.pid();
    postgres.crash_backend(victim);
    for session in [&mut one, &mut other] {
        session.send("select 1;");
        assert!(session.is_lost());
    }
    assert_eq!(postgres.sql("select 1"), "1");
    assert_eq!(postgres.pid(), pid);
}

#[test]
fn the_wall_clock_of_a_server_can_be_moved() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start_with_clock();
    let difference = |said: String| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        said.parse::<f64>().expect("a number") - now.as_secs_f64()
    };
    let time = "select extract(epoch from clock_timestamp());";
    let mut session = Session::open(postgres.psql());
    assert!(difference(session.ask(time)).abs() < 2.0);
    for offset in [-3600, 3600, 0, 3600] {
        postgres.set_clock_offset(offset.into());
        // In a connection that is there, in a new one, and for the start of a transaction.
        assert!((difference(session.ask(time)) - f64::from(offset)).abs() < 2.0);
        assert!((difference(postgres.sql(time)) - f64::from(offset)).abs() < 2.0);
        assert!(
            (difference(postgres.sql("select extract(epoch from now())")) - f64::from(offset)).abs() < 2.0
        );
    }

    // Its waiting isn't disturbed by that.
    let began = Instant::now();
    postgres.sql("select pg_sleep(0.3)");
    assert!((Duration::from_millis(290)..Duration::from_secs(5)).contains(&began.elapsed()));
    // Nor are its timeouts, which look at the wall clock.
    for offset in [-3600, 3600] {
        postgres.set_clock_offset(offset);
        let began = Instant::now();
        let error = postgres.try_sql("set statement_timeout = 300; select pg_sleep(60)").unwrap_err();
        assert!(error.contains("statement timeout"), "{error}");
        assert!((Duration::from_millis(290)..Duration::from_secs(5)).contains(&began.elapsed()));
    }

    // It goes on with the moved clock.
    let before = postgres.sql(time);
    postgres.until(time, |now| now > before.as_str());
    postgres.restart();
    assert!((difference(postgres.sql(time)) - 3600.0).abs() < 2.0);
}

#[test]
fn a_server_ends_with_its_value() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start();
    let bouncer = PgBouncer::start(postgres.addr());
    let memory = |id: &str| {
        let table = std::fs::read_to_string("/proc/sysvipc/shm").expect("Linux has it");
        table.lines().any(|line| line.split_whitespace().nth(1) == Some(id))
    };
    let file = postgres.socket_dir().join("data/postmaster.pid");
    let status = std::fs::read_to_string(file).unwrap();
    let id = status.lines().nth(6).unwrap().split_whitespace().nth(1).unwrap();
    assert!(memory(id));
    let mut pids = numbers(&postgres.sql(PIDS));
    assert!(pids.len() > 3);
    pids.extend([postgres.pid(), bouncer.pid()]);
    assert!(pids.iter().all(|pid| exists(*pid)));
    drop((bouncer, postgres));
    assert!(!pids.iter().any(|pid| exists(*pid)));
    assert!(!memory(id));
}

#[test]
fn a_server_outlives_the_thread_that_started_it() {
    if left_out("postgres") {
        return;
    }
    let start = || {
        let postgres = PostgresServer::start();
        let bouncer = PgBouncer::start(postgres.addr());
        (postgres, bouncer)
    };
    let (postgres, bouncer) = thread::spawn(start).join().unwrap();
    thread::sleep(SILENCE); // until it would be gone
    assert_eq!(postgres.sql("select 1"), "1");
    assert_eq!(bouncer.try_sql("select 1").unwrap(), "1");
}

#[test]
fn a_server_ends_with_a_killed_test() {
    if left_out("postgres") {
        return;
    }
    // Where it leaves its files, which the servers' user must be able to reach.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let mut test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper", "--ignored", "--nocapture"])
        .env(HELPER, "1")
        .env("TMPDIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(test.stdout.take().unwrap()).lines();
    let pids = lines
        .find_map(|line| Some(numbers(line.unwrap().split_once("servers ")?.1)))
        .expect("it says its servers");
    assert!(pids.len() > 5 && pids.iter().all(|pid| exists(*pid)), "{pids:?}");
    test.kill().unwrap();
    test.wait().unwrap();
    wait_until("the servers are gone", || !pids.iter().any(|pid| exists(*pid)));
}

#[test]
#[ignore = "a part of a_server_ends_with_a_killed_test"]
fn helper() {
    if std::env::var_os(HELPER).is_some() {
        let postgres = PostgresServer::start();
        let bouncer = PgBouncer::start(postgres.addr());
        let clock = PostgresServer::start_with_clock();
        let (pid, bouncers, clocks) = (postgres.pid(), bouncer.pid(), clock.pid());
        println!("\nservers {pid} {bouncers} {clocks} {} {}", postgres.sql(PIDS), clock.sql(PIDS));
        loop {
            thread::park();
        }
    }
}

#[test]
fn a_server_that_does_not_come_up_shows_what_it_said() {
    if left_out("postgres") {
        return;
    }
    let start = || PostgresServer::options().config("no_such_setting", "1").start();
    let panic = catch_unwind(AssertUnwindSafe(start)).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("no_such_setting"), "{message}");

    let target = (std::net::Ipv4Addr::LOCALHOST, 1).into();
    let start = || PgBouncer::options(target).pool_mode("no such mode").start();
    let panic = catch_unwind(AssertUnwindSafe(start)).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("no such mode"), "{message}");
}

#[test]
fn a_port_that_another_has_is_noticed() {
    if left_out("postgres") {
        return;
    }
    let other = PostgresServer::start();
    let port = other.port().to_string();
    let start = || PostgresServer::options().config("port", &port).start();
    let panic = catch_unwind(AssertUnwindSafe(start)).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("were taken a moment later"), "{message}");
    let start = || PgBouncer::options(other.addr()).config("listen_port", &port).start();
    let panic = catch_unwind(AssertUnwindSafe(start)).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("were taken a moment later"), "{message}");
}

#[test]
fn tls_is_on_the_same_port() {
    if left_out("postgres") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
    let made = Command::new(servers::program("openssl", "openssl"))
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let options = PostgresServer::options().tls(&certificate, &key, Some(&certificate));
    let postgres = options.hba("hostnossl all app all reject").start();
    let ask = |mode: &str| {
        let statement = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
        let mut psql = postgres.psql();
        psql.env("PGSSLROOTCERT", &certificate).env("PGSSLMODE", mode).args(["-c", statement]);
        psql.output().unwrap()
    };
    let verified = ask("verify-full");
    assert_eq!(String::from_utf8_lossy(&verified.stdout), "t\n", "{verified:?}");
    let plain = ask("disable");
    assert!(String::from_utf8_lossy(&plain.stderr).contains("rejects"), "{plain:?}");
}

#[test]
fn a_standby_only_reads_until_it_is_promoted() {
    if left_out("postgres") {
        return;
    }
    let primary = PostgresServer::start();
    primary.sql("create table t as select 1 as n");
    let standby = PostgresServer::standby_of(&primary);
    assert_ne!(standby.port(), primary.port());
    assert_eq!(standby.sql("select n from t"), "1");
    primary.sql("update t set n = 2");
    standby.until("select n from t", |n| n == "2");
    let is_standby = "select pg_is_in_recovery()";
    assert_eq!((primary.sql(is_standby), standby.sql(is_standby)), ("f".to_owned(), "t".to_owned()));
    let error = standby.try_sql("update t set n = 3").unwrap_err();
    assert!(error.contains("read-only transaction"), "{error}");

    // It finds its primary again.
    primary.restart();
    primary.sql("update t set n = 3");
    standby.until("select n from t", |n| n == "3");
    standby.restart();
    primary.sql("update t set n = 4");
    standby.until("select n from t", |n| n == "4");

    primary.kill();
    standby.promote();
    assert_eq!(standby.sql(is_standby), "f");
    standby.sql("update t set n = 5");
    standby.restart();
    assert_eq!(standby.sql("select n from t"), "5");
}

#[test]
fn a_pool_shares_connections_as_it_is_told() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start();
    let pool = |mode, size| PgBouncer::options(postgres.addr()).pool_mode(mode).pool_size(size);

    let bouncer = pool("transaction", 1).start();
    let (mut one, mut other) = (Session::open(bouncer.psql()), Session::open(bouncer.psql()));
    let shared = one.ask(MY_PID);
    assert_eq!(other.ask(MY_PID), shared);
    one.ask("begin; select 1;");
    other.send(MY_PID);
    assert_eq!(other.lines.recv_timeout(SILENCE), Err(mpsc::RecvTimeoutError::Timeout));
    one.send("commit;");
    assert_eq!(other.lines.recv_timeout(PATIENCE).unwrap(), shared);

    let bouncer = pool("transaction", 2).round_robin().start();
    let (mut one, mut other) = (Session::open(bouncer.psql()), Session::open(bouncer.psql()));
    let first = one.ask(&format!("begin; {MY_PID}"));
    let second = other.ask(MY_PID);
    assert_ne!(first, second);
    one.ask("commit; select 1;");
    let seen: BTreeSet<_> = (0..4).map(|_| other.ask(MY_PID)).collect();
    assert_eq!(seen, BTreeSet::from([first, second]));
    assert_eq!(bouncer.command("SHOW CONFIG").matches("server_round_robin|1|").count(), 1);

    let bouncer = pool("session", 2).start();
    let (mut one, mut other) = (Session::open(bouncer.psql()), Session::open(bouncer.psql()));
    let (first, second) = (one.ask(MY_PID), other.ask(MY_PID));
    assert_ne!(first, second);
    assert_eq!((one.ask(MY_PID), other.ask(MY_PID)), (first, second));
    assert_ne!(bouncer.port(), postgres.port());
    assert_eq!(
        bouncer.url(),
        postgres.url().replace(&postgres.port().to_string(), &bouncer.port().to_string())
    );
}

#[test]
fn a_pool_can_be_killed_and_frozen_and_does_not_need_its_server() {
    if left_out("postgres") {
        return;
    }
    let postgres = PostgresServer::start();
    let bouncer = PgBouncer::start(postgres.addr());
    let mut session = Session::open(bouncer.psql());
    session.ask(MY_PID);
    bouncer.freeze();
    session.send("select 'late';");
    assert_eq!(session.lines.recv_timeout(SILENCE), Err(mpsc::RecvTimeoutError::Timeout));
    bouncer.thaw();
    assert_eq!(session.lines.recv_timeout(PATIENCE).unwrap(), "late");

    let port = bouncer.port();
    bouncer.kill();
    session.send("select 'never';");
    assert!(session.is_lost());
    assert!(bouncer.try_sql("select 1").unwrap_err().contains("Connection refused"));
    postgres.kill();
    bouncer.restart();
    assert_eq!(bouncer.port(), port);
    postgres.restart();
    assert_eq!(bouncer.try_sql("select 1").unwrap(), "1");

    let mut wrong = bouncer.psql();
    wrong.env("PGPASSWORD", "wrong").args(["-c", "select 1"]);
    assert!(!wrong.output().unwrap().status.success());
}
