//! The driver's connector over rustls or native-tls.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Socket;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};

use super::Verify;
use crate::error::{Error, ErrorKind, Result};

/// How TLS is spoken, whichever library does it. With both features it is rustls.
#[cfg(feature = "rustls")]
mod library {
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::{CryptoProvider, ring};
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

    use super::{ChannelBinding, Result, Socket, Verify, io, unusable};

    pub(super) type Connector = tokio_rustls::TlsConnector;
    pub(super) type Encrypted = tokio_rustls::client::TlsStream<Socket>;

    pub(super) fn connector(verify: Verify, root: Option<&str>) -> Result<Connector> {
        // The application's own provider of cryptography, if it has one.
        let provider =
            CryptoProvider::get_default().cloned().unwrap_or_else(|| Arc::new(ring::default_provider()));
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let mut config = match verify {
            Verify::Nothing => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Whoever(provider)))
                .with_no_client_auth(),
            Verify::All => builder.with_root_certificates(roots(root)?).with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"postgresql".to_vec()]; // `sslnegotiation=direct` needs it
        Ok(Arc::new(config).into())
    }

    fn roots(file: Option<&str>) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        match file {
            Some(file) => {
                for certificate in CertificateDer::pem_file_iter(file).map_err(unusable)? {
                    roots.add(certificate.map_err(unusable)?).map_err(unusable)?;
                }
            }
            None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
        }
        if roots.is_empty() {
            return Err(unusable("no certificate to trust was found"));
        }
        Ok(roots)
    }

    pub(super) async fn connect(
        connector: Connector,
        domain: String,
        socket: Socket,
    ) -> io::Result<Encrypted> {
        let name = ServerName::try_from(domain).map_err(io::Error::other)?;
        connector.connect(name, socket).await
    }

    pub(super) fn channel_binding(_: &Encrypted) -> ChannelBinding {
        ChannelBinding::none()
    }

    /// Trusts whoever answers.
    #[derive(Debug)]
    struct Whoever(Arc<CryptoProvider>);

    impl ServerCertVerifier for Whoever {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}

#[cfg(all(feature = "native-tls", not(feature = "rustls")))]
mod library {
    use tokio_native_tls::native_tls::{Certificate, TlsConnector};

    use super::{ChannelBinding, Result, Socket, Verify, io, unusable};

    pub(super) type Connector = tokio_native_tls::TlsConnector;
    pub(super) type Encrypted = tokio_native_tls::TlsStream<Socket>;

    pub(super) fn connector(verify: Verify, root: Option<&str>) -> Result<Connector> {
        let mut builder = TlsConnector::builder();
        if verify == Verify::Nothing {
            builder.danger_accept_invalid_certs(true).danger_accept_invalid_hostnames(true);
        }
        if let Some(file) = root {
            let certificates = std::fs::read(file).map_err(unusable)?;
            let certificates = Certificate::stack_from_pem(&certificates).map_err(unusable)?;
            if certificates.is_empty() {
                return Err(unusable("no certificate to trust was found"));
            }
            builder.disable_built_in_roots(true);
            for certificate in certificates {
                builder.add_root_certificate(certificate);
            }
        }
        Ok(builder.build().map_err(unusable)?.into())
    }

    pub(super) async fn connect(
        connector: Connector,
        domain: String,
        socket: Socket,
    ) -> io::Result<Encrypted> {
        connector.connect(&domain, socket).await.map_err(io::Error::other)
    }

    pub(super) fn channel_binding(encrypted: &Encrypted) -> ChannelBinding {
        match encrypted.get_ref().tls_server_end_point() {
            Ok(Some(binding)) => ChannelBinding::tls_server_end_point(binding),
            Ok(None) | Err(_) => ChannelBinding::none(),
        }
    }
}

fn unusable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Config, "the certificates for TLS can't be used").with_source(error)
}

/// Makes a connector for each host.
#[derive(Clone)]
pub(super) struct MakeTls(library::Connector);

impl MakeTls {
    pub(super) fn new(verify: Verify, root: Option<&str>) -> Result<Self> {
        Ok(Self(library::connector(verify, root)?))
    }
}

impl MakeTlsConnect<Socket> for MakeTls {
    type Stream = Stream;
    type TlsConnect = Connect;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Connect> {
        Ok(Connect { connector: self.0.clone(), domain: domain.to_owned() })
    }
}

/// Connects to one host.
pub(super) struct Connect {
    connector: library::Connector,
    domain: String,
}

impl TlsConnect<Socket> for Connect {
    type Stream = Stream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        Box::pin(async move { library::connect(self.connector, self.domain, socket).await.map(Stream) })
    }
}

/// An encrypted stream, as the driver wants it.
pub(super) struct Stream(library::Encrypted);

impl TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        library::channel_binding(&self.0)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
