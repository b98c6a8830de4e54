//! [`AzuriteServer`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use rustix::process::Signal;
use sha2::{Digest as _, Sha256};

use super::{
    ATTEMPTS, ChildServer, PATIENCE, POLL, PortTaken, free_port, program, signal, state, wait_until,
};

/// The account that Azurite has, and that everybody knows.
pub(crate) const ACCOUNT: &str = "devstoreaccount1";

/// The key of [`ACCOUNT`].
pub(crate) const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// The version of the protocol, and of signatures.
const VERSION: &str = "2021-12-02";

/// Azurite's blob service on 127.0.0.1. It keeps nothing on disk unless it is told to.
///
/// It stands for Azure Blob Storage. Its clock is the machine's.
#[derive(Debug)]
pub(crate) struct AzuriteServer {
    server: ChildServer,
    port: u16,
    options: AzuriteOptions,
}

/// How an [`AzuriteServer`] is started.
#[derive(Clone, Debug)]
pub(crate) struct AzuriteOptions {
    account: String,
    key: String,
    durable: bool,
    tls: Option<[PathBuf; 2]>,
    port: Option<u16>,
}

impl AzuriteOptions {
    /// [`AzuriteServer::restart`] and [`AzuriteServer::stop`] keep what was written.
    ///
    /// Azurite saves every five seconds, and when it is told to end. So what was written shortly before
    /// [`AzuriteServer::kill`] is lost, although it was acknowledged. And after any restart, leases that would end are
    /// `expired`, as Azurite doesn't read their end as a time; those without an end stay. Azure does neither.
    pub(crate) fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Listens with TLS, and only with TLS.
    pub(crate) fn tls(mut self, certificate: &Path, key: &Path) -> Self {
        self.tls = Some([certificate.into(), key.into()]);
        self
    }

    /// Another account than [`ACCOUNT`], with a key in Base64.
    pub(crate) fn account(mut self, name: &str, key: &str) -> Self {
        self.account = name.into();
        self.key = key.into();
        self
    }

    /// Not on a free port, but on this one.
    pub(crate) fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Starts it, and waits until it answers.
    ///
    /// # Panics
    ///
    /// If it isn't installed, or another has its [`port`](Self::port).
    pub(crate) fn start(self) -> AzuriteServer {
        for _ in 0..ATTEMPTS {
            let server = ChildServer::new("azurite");
            let port = self.port.unwrap_or_else(free_port);
            let azurite = AzuriteServer { server, port, options: self.clone() };
            if azurite.run().is_ok() {
                return azurite;
            }
            assert!(self.port.is_none(), "another has port {port}");
        }
        panic!("{ATTEMPTS} ports that were free were taken a moment later");
    }
}

impl AzuriteServer {
    /// One with the defaults.
    pub(crate) fn start() -> Self {
        Self::options().start()
    }

    /// For one with other than the defaults.
    pub(crate) fn options() -> AzuriteOptions {
        AzuriteOptions { account: ACCOUNT.into(), key: KEY.into(), durable: false, tls: None, port: None }
    }

    /// The port, which stays the same over restarts.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The name of its only account.
    pub(crate) fn account(&self) -> &str {
        &self.options.account
    }

    /// The key of its account, in Base64.
    pub(crate) fn key(&self) -> &str {
        &self.options.key
    }

    /// `http://127.0.0.1:PORT/ACCOUNT`.
    pub(crate) fn endpoint(&self) -> String {
        self.endpoint_at(self.addr())
    }

    /// [`endpoint`](Self::endpoint) of something in front of it, such as a [`Proxy`](super::proxy::Proxy).
    pub(crate) fn endpoint_at(&self, addr: SocketAddr) -> String {
        format!("{}://{addr}/{}", self.protocol(), self.account())
    }

    /// `DefaultEndpointsProtocol=http;AccountName=…;AccountKey=…;BlobEndpoint=http://127.0.0.1:PORT/ACCOUNT;`.
    pub(crate) fn connection_string(&self) -> String {
        self.connection_string_at(self.addr())
    }

    /// [`connection_string`](Self::connection_string) of something in front of it.
    pub(crate) fn connection_string_at(&self, addr: SocketAddr) -> String {
        format!(
            "DefaultEndpointsProtocol={};AccountName={};AccountKey={};BlobEndpoint={};",
            self.protocol(),
            self.account(),
            self.key(),
            self.endpoint_at(addr),
        )
    }

    fn protocol(&self) -> &'static str {
        if self.options.tls.is_some() { "https" } else { "http" }
    }

    /// The query string of a shared access signature (SAS) for the account: for all containers and blobs, with
    /// `permissions` such as `rwdlc`.
    pub(crate) fn sas(&self, permissions: &str, valid_for: Duration) -> String {
        self.sas_until(permissions, SystemTime::now() + valid_for)
    }

    /// [`sas`](Self::sas), until a time that may have passed. Parts of a second are cut off.
    pub(crate) fn sas_until(&self, permissions: &str, expiry: SystemTime) -> String {
        let expiry = humantime::format_rfc3339_seconds(expiry);
        // The empty lines: start, addresses; at the end, encryption scope and what follows the last line.
        let signed =
            format!("{}\n{permissions}\nb\nsco\n\n{expiry}\n\nhttps,http\n{VERSION}\n\n", self.account());
        format!("sv={VERSION}&ss=b&srt=sco&{}", self.sas_tail(permissions, &expiry, &signed))
    }

    /// The query string of a shared access signature for one container, which needn't exist yet, and its blobs.
    pub(crate) fn container_sas(&self, container: &str, permissions: &str, expiry: SystemTime) -> String {
        let expiry = humantime::format_rfc3339_seconds(expiry);
        // The empty lines: start; policy and addresses; snapshot, encryption scope and five headers of the response.
        let signed = format!(
            "{permissions}\n\n{expiry}\n/blob/{}/{container}\n\n\nhttps,http\n{VERSION}\nc\n\n\n\n\n\n\n",
            self.account()
        );
        format!("sv={VERSION}&sr=c&{}", self.sas_tail(permissions, &expiry, &signed))
    }

    fn sas_tail(&self, permissions: &str, expiry: &impl std::fmt::Display, signed: &str) -> String {
        let (expiry, signature) = (expiry.to_string(), self.sign(signed));
        let [expiry, signature] =
            [&expiry, &signature].map(|value| utf8_percent_encode(value, NON_ALPHANUMERIC));
        format!("sp={permissions}&se={expiry}&spr=https,http&sig={signature}")
    }

    /// HMAC-SHA256 with the account's key, in Base64.
    fn sign(&self, text: &str) -> String {
        let key = BASE64.decode(self.key()).expect("the key is Base64");
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("a key may have any length");
        mac.update(text.as_bytes());
        BASE64.encode(mac.finalize().into_bytes())
    }

    /// The process: its id, its output.
    pub(crate) fn child(&self) -> &ChildServer {
        &self.server
    }

    /// The id of its process.
    ///
    /// # Panics
    ///
    /// If it is down.
    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// What it has written to stdout and stderr since its last start.
    pub(crate) fn output(&self) -> String {
        self.server.output()
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(&self) {
        self.server.kill();
    }

    /// Tells it to end, which it does after it has answered the requests that it has. It saves what it has if it is
    /// [`durable`](AzuriteOptions::durable).
    ///
    /// # Panics
    ///
    /// If it is down, or frozen.
    pub(crate) fn stop(&self) {
        let pid = self.pid();
        signal(pid, Signal::TERM);
        wait_until("Azurite has ended", || matches!(state(pid), None | Some('Z')));
        self.kill(); // nothing but to forget it
    }

    /// [`stop`](Self::stop) for a network that cuts requests in the middle, for which it would wait: after this time it
    /// is killed. It saves what it has every five seconds.
    pub(crate) fn stop_within(&self, patience: Duration) {
        let (pid, began) = (self.pid(), Instant::now());
        signal(pid, Signal::TERM);
        while !matches!(state(pid), None | Some('Z')) && began.elapsed() < patience {
            thread::sleep(POLL);
        }
        self.kill();
    }

    /// Starts it on the same port, after it was [stopped](Self::stop), unless it is down. Without
    /// [`durable`](AzuriteOptions::durable) it has nothing then.
    pub(crate) fn restart(&self) {
        if self.options.durable && self.is_up() {
            self.stop();
        }
        self.kill();
        // Another who looks for a free port may have this one for a moment.
        let up = (0..ATTEMPTS).any(|_| self.run().is_ok());
        assert!(up, "another has port {}", self.port);
    }

    fn is_up(&self) -> bool {
        super::lock(&self.server.child).is_some()
    }

    /// Stops it as SIGSTOP does: connections stay open, nothing is answered.
    pub(crate) fn freeze(&self) {
        self.server.freeze();
    }

    /// Lets it continue.
    pub(crate) fn thaw(&self) {
        self.server.thaw();
    }

    /// An administrator's request, over a connection of its own. `path_and_query` comes after the account, and is
    /// sent as it is: `/container/blob?comp=lease`.
    ///
    /// # Panics
    ///
    /// If there is no response.
    pub(crate) fn request(
        &self,
        method: &str,
        path_and_query: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        self.try_request(method, path_and_query, headers, body)
            .unwrap_or_else(|error| panic!("{method} {path_and_query} has no response: {error}"))
    }

    /// [`request`](Self::request), for a server that may be down or frozen.
    pub(crate) fn try_request(
        &self,
        method: &str,
        path_and_query: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        let mut headers = with_standard_headers(headers);
        let signature = self.sign(&self.string_to_sign(method, path_and_query, &headers, body.len()));
        headers.insert("authorization".into(), format!("SharedKey {}:{signature}", self.account()));
        self.send(method, path_and_query, &headers, body)
    }

    /// [`request`](Self::request) without a signature, except for a SAS in its query.
    pub(crate) fn unsigned_request(
        &self,
        method: &str,
        path_and_query: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        self.send(method, path_and_query, &with_standard_headers(headers), body)
            .unwrap_or_else(|error| panic!("{method} {path_and_query} has no response: {error}"))
    }

    /// Makes a container.
    pub(crate) fn create_container(&self, container: &str) {
        self.request("PUT", &format!("/{container}?restype=container"), &[], b"").expect(201);
    }

    /// Deletes a container, and all that is in it, with or without leases.
    pub(crate) fn delete_container(&self, container: &str) {
        self.request("DELETE", &format!("/{container}?restype=container"), &[], b"").expect(202);
    }

    /// The names of the blobs in a container, up to 5000, in order.
    pub(crate) fn blobs(&self, container: &str) -> Vec<String> {
        let response = self.request("GET", &format!("/{container}?restype=container&comp=list"), &[], b"");
        let text = response.expect(200).text();
        text.split("<Name>")
            .skip(1)
            .map(|rest| unescape(rest.split("</Name>").next().expect("the first part is always there")))
            .collect()
    }

    /// Writes a blob, which must not have a lease.
    pub(crate) fn put_blob(&self, container: &str, blob: &str, content: &[u8]) {
        let headers = [("x-ms-blob-type", "BlockBlob")];
        self.request("PUT", &path(container, blob), &headers, content).expect(201);
    }

    /// Deletes a blob, after its lease is broken, if it has one.
    pub(crate) fn delete_blob(&self, container: &str, blob: &str) {
        if self.lease_state(container, blob) != "available" {
            self.break_lease(container, blob);
        }
        self.request("DELETE", &path(container, blob), &[], b"").expect(202);
    }

    /// Breaks the lease of a blob at once. It must have had one; if that was released, this panics.
    pub(crate) fn break_lease(&self, container: &str, blob: &str) {
        let headers = [("x-ms-lease-action", "break"), ("x-ms-lease-break-period", "0")];
        self.request("PUT", &format!("{}?comp=lease", path(container, blob)), &headers, b"").expect(202);
    }

    /// `available`, `leased`, `expired`, `breaking`, or `broken`.
    pub(crate) fn lease_state(&self, container: &str, blob: &str) -> String {
        let response = self.request("HEAD", &path(container, blob), &[], b"");
        response.expect(200).header("x-ms-lease-state").expect("every blob has it").to_owned()
    }

    /// The metadata of a blob. The names are in lower case.
    pub(crate) fn metadata(&self, container: &str, blob: &str) -> BTreeMap<String, String> {
        let response = self.request("HEAD", &path(container, blob), &[], b"");
        let headers = &response.expect(200).headers;
        let metadata =
            headers.iter().filter_map(|(name, value)| Some((name.strip_prefix("x-ms-meta-")?, value)));
        metadata.map(|(name, value)| (name.to_owned(), value.clone())).collect()
    }

    /// Replaces all metadata of a blob. If it is leased, this needs the id of the `lease`.
    pub(crate) fn set_metadata(
        &self,
        container: &str,
        blob: &str,
        metadata: &[(&str, &str)],
        lease: Option<&str>,
    ) {
        let named: Vec<_> =
            metadata.iter().map(|(name, value)| (format!("x-ms-meta-{name}"), *value)).collect();
        let mut headers: Vec<_> = named.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        headers.extend(lease.map(|id| ("x-ms-lease-id", id)));
        self.request("PUT", &format!("{}?comp=metadata", path(container, blob)), &headers, b"").expect(200);
    }

    /// What the signature of the scheme `SharedKey` signs.
    fn string_to_sign(
        &self,
        method: &str,
        path_and_query: &str,
        headers: &BTreeMap<String, String>,
        length: usize,
    ) -> String {
        let header = |name: &str| headers.get(name).map_or("", String::as_str);
        let length = if length == 0 { String::new() } else { length.to_string() };
        let mut text = format!(
            "{method}\n{}\n{}\n{length}\n{}\n{}\n{}\n{}\n{}\n{}\n{}\n{}\n",
            header("content-encoding"),
            header("content-language"),
            header("content-md5"),
            header("content-type"),
            header("date"),
            header("if-modified-since"),
            header("if-match"),
            header("if-none-match"),
            header("if-unmodified-since"),
            header("range"),
        );
        for (name, value) in headers.iter().filter(|(name, _)| name.starts_with("x-ms-")) {
            writeln!(text, "{name}:{value}").expect("a string takes all");
        }
        let (path, query) = path_and_query.split_once('?').unwrap_or((path_and_query, ""));
        // Twice, as it is a part of the path too.
        write!(text, "/{0}/{0}{path}", self.account()).expect("a string takes all");
        let parameters = query.split('&').filter(|parameter| !parameter.is_empty());
        let parameters: BTreeMap<_, _> = parameters
            .map(|parameter| parameter.split_once('=').unwrap_or((parameter, "")))
            .map(|(name, value)| (name.to_lowercase(), percent_decode_str(value).decode_utf8_lossy()))
            .collect();
        for (name, value) in parameters {
            write!(text, "\n{name}:{value}").expect("a string takes all");
        }
        text
    }

    fn send(
        &self,
        method: &str,
        path_and_query: &str,
        headers: &BTreeMap<String, String>,
        body: &[u8],
    ) -> io::Result<Response> {
        let mut head = format!(
            "{method} /{}{path_and_query} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n",
            self.account(),
            self.addr(),
            body.len(),
        );
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").expect("a string takes all");
        }
        let request = [head.as_bytes(), b"\r\n", body].concat();
        let response = if self.options.tls.is_some() {
            self.exchange_by_openssl(&request)?
        } else {
            let mut stream = TcpStream::connect_timeout(&self.addr(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&request)?;
            let mut response = Vec::new();
            stream.read_to_end(&mut response)?;
            response
        };
        Response::parse(&response, method)
    }

    /// Without a look at the certificate.
    fn exchange_by_openssl(&self, request: &[u8]) -> io::Result<Vec<u8>> {
        let openssl = Command::new(program("openssl", "openssl"))
            .args(["s_client", "-quiet", "-connect", &self.addr().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        // It may have ended by itself: then there is no response.
        let written = openssl.stdin.as_ref().expect("piped").write_all(request);
        let output = openssl.wait_with_output()?;
        written.map(|()| output.stdout)
    }

    fn data_dir(&self) -> PathBuf {
        self.server.dir().join("data")
    }

    fn run(&self) -> Result<(), PortTaken> {
        let mut command = Command::new(program("node", "nodejs"));
        command.arg(installed().join("node_modules/.bin/azurite-blob"));
        command.args(["--silent", "--disableTelemetry", "--skipApiVersionCheck"]);
        command.args(["--blobHost", "127.0.0.1", "--blobPort", &self.port.to_string()]);
        if self.options.durable {
            command.arg("--location").arg(self.data_dir());
        } else {
            command.arg("--inMemoryPersistence");
        }
        if let Some([certificate, key]) = &self.options.tls {
            command.arg("--cert").arg(certificate).arg("--key").arg(key);
        }
        command.env("AZURITE_ACCOUNTS", format!("{}:{}", self.account(), self.key()));
        self.server.start(&command, self.port, || {
            self.try_request("GET", "?comp=list", &[], b"").is_ok_and(|response| response.status == 200)
        })
    }
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Response {
    /// Such as 201.
    pub(crate) status: u16,
    /// By their names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    /// Without chunks.
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// A header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// What Azure calls the error, such as `LeaseAlreadyPresent`, or nothing.
    pub(crate) fn error_code(&self) -> &str {
        self.header("x-ms-error-code").unwrap_or_default()
    }

    /// The body.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The same, if that is its status.
    ///
    /// # Panics
    ///
    /// If it isn't.
    #[track_caller]
    pub(crate) fn expect(&self, status: u16) -> &Self {
        assert_eq!(self.status, status, "{}: {}", self.error_code(), self.text());
        self
    }

    /// All that came until the end of the connection.
    fn parse(bytes: &[u8], method: &str) -> io::Result<Self> {
        Self::parts(bytes, method).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn parts(bytes: &[u8], method: &str) -> Option<Self> {
        let end = bytes.windows(4).position(|part| part == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let rest = &bytes[end + 4..];
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers: BTreeMap<String, String> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
            .collect();
        let body = if method == "HEAD" {
            Vec::new()
        } else if headers.get("transfer-encoding").is_some_and(|encoding| encoding == "chunked") {
            chunks(rest)?
        } else {
            let length = headers.get("content-length").and_then(|length| length.parse().ok());
            rest.get(..length.unwrap_or(rest.len()))?.to_vec()
        };
        Some(Self { status, headers, body })
    }
}

/// The bytes in chunks, or nothing if the last is missing.
fn chunks(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|part| part == b"\r\n")?;
        let length = usize::from_str_radix(str::from_utf8(&rest[..end]).ok()?.trim(), 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(end + 2..end + 2 + length)?);
        rest = rest.get(end + 2 + length + 2..)?;
    }
}

/// The path of a blob, whose name may contain anything.
fn path(container: &str, blob: &str) -> String {
    format!("/{container}/{}", utf8_percent_encode(blob, NON_ALPHANUMERIC))
}

/// A text of XML.
fn unescape(text: &str) -> String {
    let entities = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    entities.iter().fold(text.to_owned(), |text, (entity, character)| text.replace(entity, character))
}

/// `headers`, and the ones that each request needs.
fn with_standard_headers(headers: &[(&str, &str)]) -> BTreeMap<String, String> {
    let standard = [("x-ms-date", http_date(SystemTime::now())), ("x-ms-version", VERSION.to_owned())];
    let own = headers.iter().map(|(name, value)| (name.to_lowercase(), (*value).to_owned()));
    standard.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(own).collect()
}

/// A time as HTTP has it: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = time.duration_since(UNIX_EPOCH).expect("after 1970").as_secs() / 86400;
    let day = DAYS[usize::try_from(days % 7).expect("below 7")];
    // 1994-11-06T08:49:37Z
    let text = humantime::format_rfc3339_seconds(time).to_string();
    let month: usize = text[5..7].parse().expect("two digits");
    format!("{day}, {} {} {} {} GMT", &text[8..10], MONTHS[month - 1], &text[..4], &text[11..19])
}

/// The directory where `tests/run.sh` has installed Azurite: in that version, with what it depends on as locked.
fn installed() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let lock = fs::read(root.join("tests/azurite/package-lock.json")).expect("it is a part of the tests");
    let mut name = String::new();
    for byte in &Sha256::digest(lock)[..8] {
        write!(name, "{byte:02x}").expect("a string takes all");
    }
    let dir = root.join("target/azurite").join(name);
    assert!(dir.is_dir(), "Azurite is missing: ./tests/run.sh installs it, and runs the tests");
    dir
}
