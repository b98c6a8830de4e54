//! The example, with its lock on the server.

use std::process::Command;

use super::Site;
use super::servers::left_out;

/// Who wins is a race, so it runs several times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_sends_and_two_skip() {
    if left_out("sqlserver") {
        return;
    }
    let site = Site::new().await;
    let this = std::env::current_exe().expect("this program has a path");
    let built = this.parent().and_then(|deps| deps.parent()).expect("it is in a directory of Cargo's");
    let example = built.join("examples").join("daily_email");
    assert!(
        example.is_file(),
        "the example isn't built: run `cargo build --example daily_email` with the same features first"
    );
    for run in 0..5 {
        let mut command = Command::new(&example);
        command.env("FENCELOCK_URL", site.url());
        let ran = tokio::task::block_in_place(|| command.output()).expect("it can be started");
        let said = String::from_utf8_lossy(&ran.stdout);
        let complains = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "run {run}: {said}{complains}");
        assert!(
            said.lines().last().is_some_and(|last| last.contains("1 sent, 2 skipped")),
            "run {run}: {said}"
        );
    }
}
