//! Azurite, which stands for Azure Blob Storage.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::super::azurite::AzuriteServer;
use super::super::azurite_locks::{blob, url_with};
use super::super::connecting::encoded;
use super::super::locks::Random;
use super::{Kind, Part, Rig};

const CONTAINER: &str = "locks";

pub(super) const KIND: Kind = Kind {
    name: "azure",
    feature: "azure",
    // The shortest that there is.
    short_ttl: Duration::from_secs(15),
    lacks: &[
        (Part::Persistence, "Azurite ends leases when it is restarted, which Azure doesn't"),
        (Part::Minority, "it is one service"),
        (Part::Connections, "each request may come over another connection, which holds nothing"),
        (Part::Clock, "Azurite's clock is the machine's"),
    ],
    start: || {
        // Many at once would keep each other from coming up in time.
        static STARTING: Mutex<()> = Mutex::new(());
        let starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let server = AzuriteServer::options().durable().start();
        drop(starting);
        server.create_container(CONTAINER);
        Arc::new(AzureRig(server))
    },
};

#[derive(Debug)]
struct AzureRig(AzuriteServer);

impl Rig for AzureRig {
    fn addrs(&self) -> Vec<SocketAddr> {
        vec![self.0.addr()]
    }

    fn url_by(&self, addrs: &[SocketAddr], ttl: Duration) -> String {
        let parameters = format!("account_key={}&ttl={}ms", encoded(self.0.key()), ttl.as_millis());
        url_with(&self.0, addrs[0], CONTAINER, &parameters)
    }

    fn kill(&self, _: usize) {
        // Told to end: what it has acknowledged is on disk by then, as it is in Azure.
        self.0.stop_within(Duration::from_secs(8));
    }

    fn restart(&self, _: usize) {
        self.0.restart();
    }

    fn freeze(&self, _: usize) {
        self.0.freeze();
    }

    fn thaw(&self, _: usize) {
        self.0.thaw();
    }

    fn wipe(&self, _: usize) {
        self.0.delete_container(CONTAINER);
        self.0.create_container(CONTAINER);
    }

    fn take_away(&self, name: &str) {
        // Refused if there is no such blob, or no lease of it.
        let path = format!("/{CONTAINER}/{}?comp=lease", encoded(&blob(name)));
        let headers = [("x-ms-lease-action", "break"), ("x-ms-lease-break-period", "0")];
        self.0.request("PUT", &path, &headers, b"");
    }

    fn wrong_password(&self) -> String {
        self.url(KIND.short_ttl).replace(&encoded(self.0.key()), &encoded("bm90IHRoZSBrZXk="))
    }

    fn claim_part(&self, _: &str, _: Duration) -> Vec<u8> {
        b"x-ms-lease-action: acquire".to_vec()
    }

    fn disturb(&self, _: &mut Random) -> bool {
        // There is nothing else that an administrator does to a service.
        false
    }

    fn connections(&self) -> usize {
        0
    }

    fn entries(&self) -> usize {
        self.0.blobs(CONTAINER).len()
    }
}
