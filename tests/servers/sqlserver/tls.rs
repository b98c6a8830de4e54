//! The server's side of TLS.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};

/// A TLS session.
#[derive(Debug)]
pub(super) struct Tls(ServerConnection);

/// The settings, with a certificate and its key in PEM files.
pub(super) fn config(certificate: &Path, key: &Path) -> Arc<ServerConfig> {
    let certificates = CertificateDer::pem_file_iter(certificate).expect("the certificate can be read");
    let certificates = certificates.collect::<Result<Vec<_>, _>>().expect("it is a certificate");
    let key = PrivateKeyDer::from_pem_file(key).expect("the key can be read");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("it speaks TLS 1.2")
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .expect("the key belongs to the certificate");
    Arc::new(config)
}

impl Tls {
    pub(super) fn new(config: Arc<ServerConfig>) -> Self {
        Self(ServerConnection::new(config).expect("the settings are valid"))
    }

    pub(super) fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    /// Takes what was received, and appends what is in it.
    pub(super) fn decrypt(&mut self, mut bytes: &[u8], clear: &mut Vec<u8>) -> io::Result<()> {
        while !bytes.is_empty() {
            self.0.read_tls(&mut bytes)?;
            self.0.process_new_packets().map_err(io::Error::other)?;
            match self.0.reader().read_to_end(clear) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// What is to be sent, with these bytes at its end.
    pub(super) fn encrypt(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut encrypted = Vec::new();
        for part in bytes.chunks(1 << 14) {
            self.0.writer().write_all(part)?;
            while self.0.wants_write() {
                self.0.write_tls(&mut encrypted)?;
            }
        }
        while self.0.wants_write() {
            self.0.write_tls(&mut encrypted)?;
        }
        Ok(encrypted)
    }
}
