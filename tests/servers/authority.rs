//! [`Authority`].

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::program;

/// An authority, and what it has issued to `localhost` and 127.0.0.1.
#[derive(Debug)]
pub(crate) struct Authority {
    dir: TempDir,
}

impl Authority {
    /// Whose server is called so.
    pub(crate) fn new() -> Self {
        Self::of("DNS:localhost,IP:127.0.0.1")
    }

    /// Whose server is called something.
    pub(crate) fn of(names: &str) -> Self {
        let authority = Self { dir: TempDir::new().expect("a directory") };
        fs::write(authority.file("extensions"), format!("subjectAltName={names}\n")).expect("written");
        let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let own = ["req", "-x509", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"];
        authority.openssl(&[&own[..], &new_key].concat());
        let request = ["req", "-subj", "/CN=server", "-keyout", "server.key", "-out", "server.request"];
        authority.openssl(&[&request[..], &new_key].concat());
        let issue = ["x509", "-req", "-in", "server.request", "-CA", "ca.pem", "-CAkey", "ca.key"];
        let options = ["-set_serial", "1", "-days", "2", "-extfile", "extensions", "-out", "server.pem"];
        authority.openssl(&[&issue[..], &options].concat());
        authority
    }

    fn openssl(&self, arguments: &[&str]) {
        let mut command = Command::new(program("openssl", "openssl"));
        let made = command.args(arguments).current_dir(self.dir.path()).output().expect("it starts");
        assert!(made.status.success(), "{made:?}");
    }

    /// `ca.pem`, and the server's `server.pem` and `server.key`.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
