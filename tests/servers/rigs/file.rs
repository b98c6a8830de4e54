//! Lock files in a directory.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fencelock::LockName;
use tempfile::TempDir;

use super::{Kind, Part, Rig};

const NO_SERVER: &str = "it has no server";

pub(super) const KIND: Kind = Kind {
    name: "file",
    feature: "file",
    short_ttl: Duration::from_millis(600),
    lacks: &[
        (Part::Expiry, "the kernel keeps a frozen holder's lock"),
        (Part::Server, NO_SERVER),
        (Part::Persistence, NO_SERVER),
        (Part::Minority, NO_SERVER),
        (Part::Connections, NO_SERVER),
        (Part::Password, "it asks for no password"),
        (Part::Data, "a lock file that is removed is one lock that is taken away"),
        (Part::Clock, "locks are the kernel's, and look at no wall clock"),
    ],
    start: || Arc::new(FileRig(tempfile::tempdir().expect("a directory can be made"))),
};

#[derive(Debug)]
struct FileRig(TempDir);

impl Rig for FileRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        Vec::new()
    }

    fn url_by(&self, _: &[SocketAddr], ttl: Duration) -> String {
        format!("file:{}?ttl={}ms", self.0.path().display(), ttl.as_millis())
    }

    fn take_away(&self, name: &str) {
        // It may not be there.
        let _ = fs::remove_file(self.0.path().join(LockName::new(name).encode(250) + ".lock"));
    }

    fn connections(&self) -> usize {
        0
    }

    fn entries(&self) -> usize {
        fs::read_dir(self.0.path()).expect("it is ours").count()
    }
}
