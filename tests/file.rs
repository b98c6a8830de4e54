//! What only the `file` backend can meet: other programs, broken files, and what the kernel does for a killed holder.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{ms, secs};
use fencelock::file::FileLocks;
use fencelock::{ErrorKind, LockOptions, LockProvider, Loss, Provider, connect};
use tempfile::TempDir;

fn provider(dir: &TempDir) -> Provider<FileLocks> {
    Provider::new(FileLocks::new(dir.path()))
}

/// Another program, util-linux's `flock`, that holds the file until it is killed.
struct Foreigner(Child);

impl Foreigner {
    async fn hold(file: &Path) -> Self {
        let held = file.with_extension("held");
        // `cat` hasn't got the locked file, and ends when the pipe to it closes.
        let child = Command::new("flock")
            .args(["--exclusive", "--close"])
            .arg(file)
            .args(["sh", "-c", r#"touch "$0"; exec cat"#])
            .arg(&held)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("util-linux's flock");
        let child = Self(child);
        while !held.exists() {
            tokio::time::sleep(ms(1)).await;
        }
        fs::remove_file(held).expect("removed");
        child
    }

    fn kill(mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("reaped");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_has_the_lock_within_100_ms_of_its_holder_being_killed() {
    let dir = TempDir::new().unwrap();
    let provider = provider(&dir);
    let lock = provider.create_lock("x");
    let mut last = lock.acquire().await.unwrap().fencing_token();
    let mut took = Vec::new();
    for _ in 0..9 {
        let holder = Foreigner::hold(&provider.backend().lock_file("x")).await;
        assert!(lock.try_acquire().await.unwrap().is_none(), "another program excludes us");
        let (acquired, killed) =
            tokio::join!(async { (lock.acquire().await.unwrap(), Instant::now()) }, async {
                tokio::time::sleep(ms(120)).await; // the waiter sleeps by now
                let killed = Instant::now();
                tokio::task::spawn_blocking(|| holder.kill()).await.unwrap();
                killed
            });
        let (guard, at) = acquired;
        took.push(at.saturating_duration_since(killed));
        assert!(guard.fencing_token() > last);
        last = guard.fencing_token();
    }
    took.sort();
    assert!(took[took.len() / 2] < ms(100), "{took:?}");
}

#[tokio::test]
async fn we_exclude_another_program() {
    let dir = TempDir::new().unwrap();
    let provider = provider(&dir);
    let guard = provider.create_lock("x").acquire().await.unwrap();
    let flock = || {
        Command::new("flock")
            .args(["--nonblock", "--exclusive"])
            .arg(provider.backend().lock_file("x"))
            .arg("true")
            .status()
    };
    assert!(!flock().unwrap().success());
    guard.release().await.unwrap();
    assert!(flock().unwrap().success());
}

#[tokio::test]
async fn a_file_removed_while_held_is_a_loss_within_a_heartbeat_and_the_next_token_is_higher() {
    let dir = TempDir::new().unwrap();
    let provider = provider(&dir);
    let lock = provider.create_lock_with("x", LockOptions::new().ttl(ms(600)));
    let guard = lock.acquire().await.unwrap();
    let token = guard.fencing_token();
    fs::remove_file(provider.backend().lock_file("x")).unwrap();
    let removed = Instant::now();
    assert_eq!(guard.lost().await, Loss::Taken);
    assert!(removed.elapsed() < secs(5));
    let next = lock.try_acquire().await.unwrap().expect("free");
    assert!(next.fencing_token() > token);
    assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::Taken));
    next.release().await.unwrap();
}

#[tokio::test]
async fn a_file_removed_while_held_is_a_loss_at_the_release() {
    let dir = TempDir::new().unwrap();
    let provider = provider(&dir);
    let guard = provider.create_lock("x").acquire().await.unwrap();
    fs::remove_file(provider.backend().lock_file("x")).unwrap();
    assert_eq!(guard.release().await.unwrap_err().loss(), Some(Loss::Taken));
}

#[tokio::test]
async fn waiters_notice_a_file_that_was_replaced() {
    let dir = TempDir::new().unwrap();
    let (here, there) = (provider(&dir), provider(&dir));
    let guard = here.create_lock("x").acquire().await.unwrap();
    let waiter = tokio::spawn(async move { there.create_lock("x").acquire().await });
    tokio::time::sleep(ms(100)).await;
    fs::remove_file(here.backend().lock_file("x")).unwrap();
    let next =
        tokio::time::timeout(secs(10), waiter).await.expect("not stuck on the old file").unwrap().unwrap();
    assert!(next.fencing_token() > guard.fencing_token());
}

/// The old file gets free while somebody holds the new one: having locked the old one counts for nothing.
#[tokio::test]
async fn a_lock_on_a_file_that_was_replaced_is_no_grant() {
    let dir = TempDir::new().unwrap();
    let (here, there, third) = (provider(&dir), provider(&dir), provider(&dir));
    let old = here.create_lock("x").acquire().await.unwrap();
    let waiter = tokio::spawn(async move { there.create_lock("x").acquire().await });
    tokio::time::sleep(ms(100)).await; // it waits, with the old file open
    fs::remove_file(here.backend().lock_file("x")).unwrap();
    let new = third.create_lock("x").try_acquire().await.unwrap().expect("a new file");
    drop(old);
    tokio::time::sleep(ms(100)).await;
    assert!(!waiter.is_finished(), "two have it");
    let token = new.fencing_token();
    new.release().await.unwrap();
    let next =
        tokio::time::timeout(secs(10), waiter).await.expect("not stuck on the old file").unwrap().unwrap();
    assert!(next.fencing_token() > token);
}

#[tokio::test]
async fn something_else_in_place_of_the_lock_file_is_an_error_and_is_left_alone() {
    let dir = TempDir::new().unwrap();
    let provider = provider(&dir);
    let file = provider.backend().lock_file("x");
    for content in ["my thesis\n", "fencelock/2 1 2 3\n", "\0"] {
        fs::write(&file, content).unwrap();
        let error = provider.create_lock("x").try_acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), content);
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(provider.create_lock("x").try_acquire().await.unwrap_err().kind(), ErrorKind::Config);
}

#[tokio::test]
async fn what_the_file_system_refuses_is_an_error() {
    let dir = TempDir::new().unwrap();
    // The root user may write anywhere but into the kernel's own file systems.
    let refused = Provider::new(FileLocks::new("/sys")).create_lock("x").try_acquire().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");

    fs::write(dir.path().join("file"), "").unwrap();
    let not_a_directory = connect(&format!("file:{}/file/dir", dir.path().display())).await.unwrap_err();
    assert_eq!(not_a_directory.kind(), ErrorKind::Config, "{not_a_directory}");

    // A counter at the end of its numbers.
    let exhausted = provider(&dir);
    let line = format!("fencelock/1 {:020} {:020} {:020}\n", (1_u64 << 53) - 1, 0, 0);
    fs::write(exhausted.backend().lock_file("x"), line).unwrap();
    let error = exhausted.create_lock("x").try_acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
}

#[tokio::test]
async fn a_directory_removed_in_between_is_made_again() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("locks");
    let provider = connect(&format!("file:{}", path.display())).await.unwrap();
    fs::remove_dir(&path).unwrap();
    assert!(provider.create_lock("x").try_acquire().await.unwrap().is_some());
}

#[tokio::test]
async fn bad_options_are_an_error_before_any_io() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("never");
    let error = connect(&format!("file:{}?ttl=1ms", path.display())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    let options = LockOptions::new().ttl(Duration::MAX);
    let lock = Provider::new(FileLocks::new(&path)).create_lock_with("x", options);
    assert_eq!(lock.acquire().await.unwrap_err().kind(), ErrorKind::Config);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_directory_reached_by_two_paths_has_one_set_of_locks() {
    let dir = TempDir::new().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    let here = connect(&format!("file:{}", real.display())).await.unwrap();
    symlink(&real, &link).unwrap();
    let there = connect(&format!("file://{}", link.display())).await.unwrap();
    let guard = here.create_lock("x").acquire().await.unwrap();
    assert!(there.create_lock("x").try_acquire().await.unwrap().is_none());
    drop(guard);
}

#[tokio::test]
async fn hold_at_least_outlives_its_provider() {
    let dir = TempDir::new().unwrap();
    let options = LockOptions::new().hold_at_least(ms(700));
    let began = Instant::now();
    let first = provider(&dir);
    let guard = first.create_lock_with("x", options).acquire().await.unwrap();
    let token = guard.fencing_token();
    guard.release().await.unwrap();
    first.close().await.unwrap();
    drop(first);

    let lock = provider(&dir).create_lock("x");
    assert!(lock.try_acquire().await.unwrap().is_none());
    let next = lock.acquire().await.unwrap();
    assert!(began.elapsed() >= ms(700), "{:?}", began.elapsed());
    assert!(next.fencing_token() > token);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_costs_no_cpu() {
    let dir = TempDir::new().unwrap();
    let (here, there) = (provider(&dir), std::sync::Arc::new(provider(&dir)));
    let mut guards = Vec::new();
    let mut waiters = Vec::new();
    for number in 0..50 {
        guards.push(here.create_lock(&number.to_string()).acquire().await.unwrap());
        let there = there.clone();
        waiters.push(tokio::spawn(async move { there.create_lock(&number.to_string()).acquire().await }));
    }
    tokio::time::sleep(ms(300)).await;
    let (before, began) = (cpu_time(), Instant::now());
    tokio::time::sleep(secs(2)).await;
    let share = cpu_time().checked_sub(before).unwrap().as_secs_f64() / began.elapsed().as_secs_f64();
    drop(guards);
    for waiter in waiters {
        drop(waiter.await.unwrap().unwrap());
    }
    assert!(share < 0.2, "50 waiters took {:.1} % of a CPU", share * 100.0);
}

/// CPU time of this thread's process so far, in the clock ticks of `/proc/self/stat`, which are 10 ms.
fn cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<_> = stat.rsplit(')').next().expect("after the name").split_whitespace().collect();
    let ticks: u64 = fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    ms(ticks * 10)
}
