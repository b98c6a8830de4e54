//! File systems that are full, or mustn't be written to. In other processes, since it would be so for all trials here.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::servers::holder::Holder;
use crate::servers::locks::{SLACK, take};
use crate::stage::Stage;

/// Mounts a small file system on the first argument, if there is one, fills it, and runs the rest. In a user's own name
/// space, where that needs no rights.
const FULL: [&str; 7] = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs -o size=16k none \"$0\" && head -c 16k /dev/zero >\"$0/full\"; exec \"$@\"",
];

/// The directory of the locks.
fn directory(url: &str) -> &Path {
    let path = url.strip_prefix("file:").and_then(|rest| rest.split('?').next());
    Path::new(path.expect("a URL of ours"))
}

/// The grant is an error of its own kind, since its token can't be written, and the lock is free.
pub(crate) async fn disk_full(stage: &Stage) {
    let url = stage.url(stage.kind.short_ttl);
    // No file may grow: this one needs no rights.
    let no_growth = ["env", "--ignore-signal=XFSZ", "prlimit", "--fsize=0", "--"];
    refused(stage, &no_growth, &url, "exhausted").await;

    let dir = directory(&url).to_str().expect("a path in UTF-8");
    let can_mount = Command::new(FULL[0])
        .args(&FULL[1..])
        .args([dir, "test", "-s"])
        .arg(format!("{dir}/full"))
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if can_mount {
        let full = [&FULL[..], &[dir]].concat();
        refused(stage, &full, &url, "exhausted").await;
    } else {
        println!("nothing may be mounted here: a limit has stood for a full disk");
    }
}

/// It is denied.
pub(crate) async fn lock_dir_read_only(stage: &Stage) {
    let url = stage.url(stage.kind.short_ttl);
    let read_only = |yes| {
        let mode = if yes { 0o555 } else { 0o755 };
        fs::set_permissions(directory(&url), Permissions::from_mode(mode)).expect("it is ours");
    };
    read_only(true);
    // Without what lets root write anywhere.
    let as_anybody: &[&str] = if rustix::process::geteuid().is_root() {
        &["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]
    } else {
        &[]
    };
    refused(stage, as_anybody, &url, "denied").await;
    read_only(false);
    take(&stage.provider(stage.kind.short_ttl).await, "x").await.release().await.expect("it is held");
}

/// A process that is run like that gets an error of this kind, at once; another gets the lock.
async fn refused(stage: &Stage, wrapper: &[&str], url: &str, kind: &str) {
    let mut process = Holder::start_under(wrapper, url, "x");
    process.is_connected().await;
    let connected = Instant::now();
    let error = process.fails().await;
    assert!(error.contains(&format!(": {kind}: ")), "{error}");
    assert!(connected.elapsed() < SLACK, "waiting doesn't mend it: {:?}", connected.elapsed());
    stage.report(&error, connected.elapsed());
    if kind == "exhausted" {
        let guard = take(&stage.provider(stage.kind.short_ttl).await, "x").await;
        guard.release().await.expect("it is held");
        // So that the next one has to write a new file.
        stage.rig.take_away("x");
    }
}
