//! One connection: its packets, the login, and its requests.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Shared;
use super::execute::{Executor, Stop};
use super::locks::Spid;
#[cfg(feature = "rustls")]
use super::tls::Tls;
use super::tokens::{Answer, Done, packets};
use super::values::{SqlError, Value};
use super::world::{Aim, End, Fate, MASTER};

/// Kinds of packets.
const BATCH: u8 = 1;
const PROCEDURE: u8 = 3;
const ANSWER: u8 = 4;
const ATTENTION: u8 = 6;
const TRANSACTION: u8 = 14;
const LOGIN: u8 = 16;
const PRELOGIN: u8 = 18;

/// What a client or a server says about encryption.
const ENCRYPT_LOGIN: u8 = 0;
const ENCRYPT: u8 = 1;
const NO_ENCRYPTION: u8 = 2;
const ENCRYPTION_REQUIRED: u8 = 3;

/// The size of a packet of a client that wants none.
const PACKET_SIZE: usize = 4096;

/// A kind of packet, and what the packets of a message contain.
type Message = (u8, Vec<u8>);

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not TDS")
}

/// A socket, perhaps with TLS.
struct Wire {
    stream: TcpStream,
    #[cfg(feature = "rustls")]
    tls: Option<Box<Tls>>,
    inbox: Vec<u8>,
    message: Vec<u8>,
}

impl Wire {
    /// Reads what there is. None if the client has closed. May be cancelled.
    async fn receive(&mut self) -> io::Result<Option<()>> {
        let mut buffer = [0; 8192];
        loop {
            self.stream.readable().await?;
            match self.stream.try_read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
                Ok(0) => return Ok(None),
                Ok(length) => {
                    #[cfg(feature = "rustls")]
                    if let Some(tls) = &mut self.tls {
                        tls.decrypt(&buffer[..length], &mut self.inbox)?;
                        return Ok(Some(()));
                    }
                    self.inbox.extend_from_slice(&buffer[..length]);
                    return Ok(Some(()));
                }
            }
        }
    }

    async fn send_plain(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.stream.try_write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        #[cfg(feature = "rustls")]
        if let Some(tls) = &mut self.tls {
            let encrypted = tls.encrypt(bytes)?;
            return self.send_plain(&encrypted).await;
        }
        self.send_plain(bytes).await
    }

    /// Reads a whole message. None if the client has closed. May be cancelled.
    async fn message(&mut self) -> io::Result<Option<Message>> {
        loop {
            while self.inbox.len() >= 8 {
                let length = usize::from(u16::from_be_bytes([self.inbox[2], self.inbox[3]]));
                if length < 8 {
                    return Err(malformed());
                }
                if self.inbox.len() < length {
                    break;
                }
                let (kind, status) = (self.inbox[0], self.inbox[1]);
                self.message.extend_from_slice(&self.inbox[8..length]);
                self.inbox.drain(..length);
                if status & 1 != 0 {
                    return Ok(Some((kind, std::mem::take(&mut self.message))));
                }
            }
            if self.receive().await?.is_none() {
                return Ok(None);
            }
        }
    }

    /// A TLS handshake, in packets as long as the login is to come, or bare.
    #[cfg(feature = "rustls")]
    async fn handshake(&mut self, mut tls: Tls, wrapped: bool) -> io::Result<()> {
        while tls.is_handshaking() {
            let bytes = if wrapped {
                match self.message().await? {
                    Some((PRELOGIN, bytes)) => bytes,
                    _ => return Err(malformed()),
                }
            } else {
                if self.inbox.is_empty() && self.receive().await?.is_none() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                std::mem::take(&mut self.inbox)
            };
            let mut clear = Vec::new();
            let result = tls.decrypt(&bytes, &mut clear);
            let reply = tls.encrypt(&[])?;
            if !reply.is_empty() {
                let reply = if wrapped { packets(PRELOGIN, &reply, 1 << 15, 0) } else { reply };
                self.send_plain(&reply).await?;
            }
            result?;
            self.inbox.splice(0..0, clear);
        }
        self.tls = Some(Box::new(tls));
        Ok(())
    }
}

/// Counts an open connection, and ends its session however it ends.
struct Guard {
    shared: Arc<Shared>,
    spid: Option<Spid>,
    /// The session that it had.
    had: Option<Spid>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut world = self.shared.world();
        world.open_connections -= 1;
        if let Some(spid) = self.had {
            world.closing.remove(&spid);
        }
        // It may be another's number by now, unless we have seen no end.
        if let Some(spid) = self.spid {
            world.end_session(spid, End::Over);
        }
        world.changed();
    }
}

/// Serves a connection until its end.
pub(super) async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    {
        let mut world = shared.world();
        world.connections += 1;
        world.open_connections += 1;
        world.changed();
    }
    let mut guard = Guard { shared: shared.clone(), spid: None, had: None };
    let _ = stream.set_nodelay(true);
    let wire = Wire {
        stream,
        #[cfg(feature = "rustls")]
        tls: None,
        inbox: Vec::new(),
        message: Vec::new(),
    };
    let mut connection = Connection {
        wire,
        shared,
        spid: 0,
        packet_size: PACKET_SIZE,
        last_answer: Vec::new(),
        queue: VecDeque::new(),
    };
    // An error of a socket is the client's affair.
    let Ok(Some(ended)) = connection.log_in(&mut guard).await else { return };
    let _ = connection.requests(ended, &mut guard).await;
}

struct Connection {
    wire: Wire,
    shared: Arc<Shared>,
    spid: Spid,
    packet_size: usize,
    last_answer: Vec<u8>,
    /// Messages that came while a request was under way.
    queue: VecDeque<Message>,
}

/// What a client says about itself.
struct Login {
    version: [u8; 4],
    packet_size: usize,
    user: String,
    password: String,
    database: String,
    token: Option<String>,
}

fn utf16(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    String::from_utf16_lossy(&units)
}

/// [`utf16`], but what came before, such as the statements of a client, isn't decoded again.
fn long_text(bytes: &[u8]) -> Arc<str> {
    /// More than clients have different statements.
    const MOST: usize = 64;
    thread_local! {
        static RECENT: RefCell<VecDeque<(Vec<u8>, Arc<str>)>> = const { RefCell::new(VecDeque::new()) };
    }
    if bytes.len() < 200 {
        return utf16(bytes).into();
    }
    RECENT.with_borrow_mut(|recent| {
        if let Some((_, text)) = recent.iter().find(|(known, _)| known == bytes) {
            return text.clone();
        }
        let text: Arc<str> = utf16(bytes).into();
        recent.truncate(MOST - 1);
        recent.push_front((bytes.to_vec(), text.clone()));
        text
    })
}

fn login(body: &[u8]) -> Option<Login> {
    let word = |at: usize| Some(usize::from(u16::from_le_bytes(body.get(at..at + 2)?.try_into().ok()?)));
    let double = |at: usize| usize::try_from(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?)).ok();
    let raw = |at: usize| {
        let (start, length) = (word(at)?, word(at + 2)? * 2);
        body.get(start..start + length)
    };
    let password: Vec<u8> = raw(44)?.iter().map(|byte| (byte ^ 0xa5).rotate_left(4)).collect();
    let mut token = None;
    if body.get(27)? & 0x10 != 0 {
        let mut at = double(word(56)?)?;
        while *body.get(at)? != 0xff {
            let length = double(at + 1)?;
            if body[at] == 2 {
                let size = double(at + 6)?;
                token = Some(utf16(body.get(at + 10..at + 10 + size)?));
            }
            at += 5 + length;
        }
    }
    let mut version: [u8; 4] = body.get(4..8)?.try_into().ok()?;
    version.reverse();
    Some(Login {
        version,
        packet_size: double(8)?,
        user: utf16(raw(40)?),
        password: utf16(&password),
        database: utf16(raw(68)?),
        token,
    })
}

impl Connection {
    async fn log_in(&mut self, guard: &mut Guard) -> io::Result<Option<watch::Receiver<Option<End>>>> {
        #[cfg(feature = "rustls")]
        {
            let mut first = [0];
            if self.wire.stream.peek(&mut first).await? == 0 {
                return Ok(None);
            }
            if first[0] == 0x16 {
                let Some(tls) = self.shared.tls() else { return Ok(None) };
                self.wire.handshake(tls, false).await?;
            }
        }
        let Some((PRELOGIN, body)) = self.wire.message().await? else { return Ok(None) };
        while self.shared.world().stalls_logins {
            sleep(super::super::POLL).await;
        }
        let (wanted, token) = prelogin(&body).ok_or_else(malformed)?;
        let answer = self.shared.encryption(wanted);
        self.wire.send(&packets(ANSWER, &prelogin_answer(answer, token), PACKET_SIZE, 0)).await?;
        if answer == ENCRYPTION_REQUIRED && wanted == NO_ENCRYPTION {
            return Ok(None);
        }
        #[cfg(feature = "rustls")]
        if answer != NO_ENCRYPTION && self.wire.tls.is_none() {
            let Some(tls) = self.shared.tls() else { return Ok(None) };
            self.wire.handshake(tls, true).await?;
        }
        let Some((LOGIN, body)) = self.wire.message().await? else { return Ok(None) };
        #[cfg(feature = "rustls")]
        if answer == ENCRYPT_LOGIN {
            self.wire.tls = None;
        }
        let login = login(&body).ok_or_else(malformed)?;
        while self.shared.world().stalls_logins {
            sleep(super::super::POLL).await;
        }
        let mut answer = Answer::default();
        match self.admit(&login, guard) {
            Ok((ended, database)) => {
                if (512..=32767).contains(&login.packet_size) {
                    self.packet_size = login.packet_size;
                }
                answer.logged_in(login.version, &database, self.packet_size, login.token.is_some());
                self.wire.send(&packets(ANSWER, &answer.into_bytes(), PACKET_SIZE, self.spid)).await?;
                Ok(Some(ended))
            }
            Err(error) => {
                answer.error(&error);
                answer.finish_batch();
                self.wire.send(&packets(ANSWER, &answer.into_bytes(), PACKET_SIZE, 0)).await?;
                Ok(None)
            }
        }
    }

    fn admit(
        &mut self,
        login: &Login,
        guard: &mut Guard,
    ) -> Result<(watch::Receiver<Option<End>>, String), SqlError> {
        let options = &self.shared.options;
        let user = if let Some(token) = &login.token {
            options.token.as_ref().filter(|(known, _)| known == token).map(|(_, user)| user.clone())
        } else {
            let known = |(name, password): &&(String, String)| {
                name.eq_ignore_ascii_case(&login.user) && *password == login.password
            };
            options.logins.iter().find(known).map(|(name, _)| name.clone())
        };
        let refused = || SqlError::new(18456, 14, format!("Login failed for user '{}'.", login.user));
        let user = user.ok_or_else(refused)?;
        let mut world = self.shared.world();
        if world.sessions.len() >= options.max_connections {
            let message = format!(
                "Could not connect because the maximum number of '{}' user connections has already been reached. The \
                 system administrator can use sp_configure to increase the maximum value. The connection has been \
                 closed.",
                options.max_connections
            );
            return Err(SqlError::new(17809, 20, message));
        }
        let name = if login.database.is_empty() { MASTER } else { &login.database };
        let key: Arc<str> = name.to_lowercase().into();
        let Some(database) = world.databases.get(&key).map(|database| database.name.clone()) else {
            let message =
                format!("Cannot open database \"{name}\" requested by the login. The login failed.");
            return Err(SqlError::new(4060, 11, message));
        };
        let (spid, ended) = world.begin_session(&user, options.denied(&user), key);
        guard.spid = Some(spid);
        guard.had = Some(spid);
        self.spid = spid;
        Ok((ended, database))
    }

    async fn requests(
        &mut self,
        mut ended: watch::Receiver<Option<End>>,
        guard: &mut Guard,
    ) -> io::Result<()> {
        loop {
            let message = if let Some(message) = self.queue.pop_front() {
                message
            } else {
                tokio::select! {
                    biased;
                    _ = ended.changed() => {
                        guard.spid = None;
                        return Ok(());
                    }
                    message = self.wire.message() => match message? {
                        Some(message) => message,
                        None => return Ok(()),
                    },
                }
            };
            if message.0 == ATTENTION {
                self.wire.send(&packets(ANSWER, &Answer::cancelled(), self.packet_size, self.spid)).await?;
                continue;
            }
            let request = request(&message).ok_or_else(malformed)?;
            let fates = {
                let mut world = self.shared.world();
                world.requests += 1;
                world.fates(self.spid, &request.texts())
            };
            let shared = self.shared.clone();
            let mut work = Box::pin(carry_out(&shared, self.spid, request, &fates));
            let mut gone = false;
            let result = loop {
                tokio::select! {
                    biased;
                    _ = ended.changed() => {
                        guard.spid = None;
                        if *ended.borrow() == Some(End::Killed(true)) {
                            let message = "Cannot continue the execution because the session is in the kill state.";
                            let mut answer = Answer::default();
                            answer.error(&SqlError::new(596, 21, message));
                            answer.finish_batch();
                            self.answer(answer.into_bytes()).await?;
                        }
                        return Ok(());
                    }
                    result = &mut work => break Some(result),
                    message = self.wire.message(), if !gone => match message {
                        Ok(Some((ATTENTION, _))) => break None,
                        Ok(Some(message)) => self.queue.push_back(message),
                        Ok(None) | Err(_) if self.shared.options.notices_closed_sockets => {
                            self.shared.world().end_session(self.spid, End::Over);
                            guard.spid = None;
                            return Ok(());
                        }
                        Ok(None) | Err(_) => gone = true,
                    },
                }
            };
            // What was broken off waits no longer when its client hears of it.
            drop(work);
            let (bytes, close) = result.unwrap_or_else(|| {
                self.shared.world().cancelled(self.spid);
                (Answer::cancelled(), false)
            });
            if gone {
                return Ok(());
            }
            if !self.deliver(bytes, &fates).await? || close {
                return Ok(());
            }
        }
    }

    async fn answer(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        let sent = packets(ANSWER, &bytes, self.packet_size, self.spid);
        self.last_answer = bytes;
        self.wire.send(&sent).await
    }

    /// Returns whether the connection is still there.
    async fn deliver(&mut self, bytes: Vec<u8>, fates: &[Aim]) -> io::Result<bool> {
        for aim in fates {
            match aim.fate {
                Fate::LoseAnswer => return Ok(true),
                Fate::ResetAfter(length) => {
                    let sent = packets(ANSWER, &bytes, self.packet_size, self.spid);
                    self.wire.send(&sent[..length.min(sent.len())]).await?;
                    self.wire.stream.set_zero_linger()?;
                    return Ok(false);
                }
                Fate::RepeatLastAnswer => {
                    let again = packets(ANSWER, &self.last_answer, self.packet_size, self.spid);
                    self.wire.send(&again).await?;
                }
                Fate::Fail(_) => {}
            }
        }
        self.answer(bytes).await?;
        Ok(true)
    }
}

/// What a client wants.
enum Request {
    Batch(Arc<str>),
    /// The name of a procedure, and its arguments.
    Procedure(String, Vec<(Option<String>, Value)>),
    Begin,
    Commit,
    Rollback,
}

impl Request {
    /// The texts in which the part is looked for that a request must contain.
    fn texts(&self) -> Vec<&str> {
        match self {
            Self::Batch(text) => vec![&**text],
            Self::Procedure(name, arguments) => {
                let texts = arguments.iter().filter_map(|(_, value)| match value {
                    Value::Text(text) => Some(&**text),
                    _ => None,
                });
                std::iter::once(name.as_str()).chain(texts).collect()
            }
            Self::Begin => vec!["BEGIN TRANSACTION"],
            Self::Commit => vec!["COMMIT TRANSACTION"],
            Self::Rollback => vec!["ROLLBACK TRANSACTION"],
        }
    }
}

/// Carries a request out. Returns the answer, and whether the connection ends with it.
async fn carry_out(shared: &Shared, spid: Spid, request: Request, fates: &[Aim]) -> (Vec<u8>, bool) {
    let is_procedure = matches!(request, Request::Procedure(..));
    let text = request.texts().get(usize::from(is_procedure)).copied().unwrap_or_default().to_owned();
    let mut executor = Executor::new(shared, spid, is_procedure, fates, &text);
    let result = match request {
        Request::Batch(text) => executor.run(&text, "", Vec::new(), 0).await,
        Request::Procedure(name, arguments) if name == "sp_executesql" => {
            executor.execute_sql(arguments, 0).await
        }
        Request::Procedure(name, arguments) => match executor.fault.take() {
            Some((_, error)) if error.class >= 20 => Err(Stop::Fatal(error)),
            Some((_, error)) => Err(Stop::Error(error, None)),
            None => executor.procedure(&name, arguments, 0).await,
        },
        other => match (executor.fault.take(), other) {
            (Some((_, error)), _) if error.class >= 20 => Err(Stop::Fatal(error)),
            (Some((_, error)), _) => Err(Stop::Error(error, None)),
            (None, Request::Begin) => {
                executor.begin_transaction();
                Ok(0)
            }
            (None, Request::Commit) => executor.commit().map(|()| 0),
            (None, _) => executor.rollback().map(|()| 0),
        },
    };
    let mut close = false;
    let status = match result {
        Ok(status) => status,
        Err(Stop::Error(error, _)) => {
            executor.report(&error);
            i32::try_from(error.number).unwrap_or(1)
        }
        Err(Stop::Fatal(error)) => {
            executor.answer.error(&error);
            executor.answer.done(Done::Statement, None);
            shared.world().end_session_quietly(spid);
            close = true;
            1
        }
        Err(Stop::Scope | Stop::Batch) => 1,
        // The connection learns it at the same time.
        Err(Stop::Ended) => std::future::pending().await,
    };
    if !close {
        executor.end_of_batch();
    }
    let mut answer = executor.answer;
    if is_procedure && !close {
        answer.finish_procedure(status);
    } else {
        answer.finish_batch();
    }
    let delay = shared.world().delay;
    if !delay.is_zero() {
        sleep(delay).await;
    }
    (answer.into_bytes(), close)
}

/// What a client says about encryption, and whether it has a token.
fn prelogin(body: &[u8]) -> Option<(u8, bool)> {
    let (mut encryption, mut token) = (NO_ENCRYPTION, false);
    let mut at = 0;
    while *body.get(at)? != 0xff {
        let offset = usize::from(u16::from_be_bytes([*body.get(at + 1)?, *body.get(at + 2)?]));
        match body[at] {
            1 => encryption = *body.get(offset)?,
            6 => token = *body.get(offset)? != 0,
            _ => {}
        }
        at += 5;
    }
    Some((encryption, token))
}

fn prelogin_answer(encryption: u8, token: bool) -> Vec<u8> {
    let mut options: Vec<(u8, &[u8])> = vec![
        (0, &[16, 0, 0x10, 0x19, 0, 0]),
        (1, std::slice::from_ref(&encryption)),
        (2, &[0]),
        (3, &[]),
        (4, &[0]),
    ];
    if token {
        options.push((6, &[1]));
    }
    let mut offset = options.len() * 5 + 1;
    let (mut head, mut tail) = (Vec::new(), Vec::new());
    for (option, value) in options {
        head.push(option);
        head.extend(u16::try_from(offset).expect("it is short").to_be_bytes());
        head.extend(u16::try_from(value.len()).expect("it is short").to_be_bytes());
        tail.extend_from_slice(value);
        offset += value.len();
    }
    head.push(0xff);
    head.extend(tail);
    head
}

impl Shared {
    /// The answer to what a client says about encryption.
    fn encryption(&self, wanted: u8) -> u8 {
        match wanted {
            _ if self.options.tls.is_none() => NO_ENCRYPTION,
            ENCRYPT | ENCRYPTION_REQUIRED => ENCRYPT,
            _ if self.options.requires_tls => ENCRYPTION_REQUIRED,
            ENCRYPT_LOGIN => ENCRYPT_LOGIN,
            _ => NO_ENCRYPTION,
        }
    }
}

/// The bytes of a string, unless it is NULL.
type Bytes = Option<Vec<u8>>;

/// Reads the fields of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn double(&mut self) -> Option<usize> {
        usize::try_from(u32::from_le_bytes(self.take(4)?.try_into().ok()?)).ok()
    }

    fn integer(&mut self, size: usize) -> Option<i64> {
        let bytes = self.take(size)?;
        Some(match size {
            1 => bytes[0].into(),
            2 => i16::from_le_bytes(bytes.try_into().ok()?).into(),
            4 => i32::from_le_bytes(bytes.try_into().ok()?).into(),
            8 => i64::from_le_bytes(bytes.try_into().ok()?),
            _ => return None,
        })
    }

    /// A parameter's value, after its type.
    fn value(&mut self) -> Option<Value> {
        let sized = |size: usize, value: i64| {
            if size == 8 {
                Value::BigInt(value)
            } else {
                i32::try_from(value).map_or(Value::Null, Value::Int)
            }
        };
        Some(match self.byte()? {
            0x1f => Value::Null,
            0x30 => sized(1, self.integer(1)?),
            0x34 => sized(2, self.integer(2)?),
            0x38 => sized(4, self.integer(4)?),
            0x7f => sized(8, self.integer(8)?),
            0x32 => Value::Bit(self.byte()? != 0),
            kind @ (0x26 | 0x68) => {
                self.byte()?;
                let size = usize::from(self.byte()?);
                match size {
                    0 => Value::Null,
                    _ if kind == 0x68 => Value::Bit(self.byte()? != 0),
                    _ => sized(size, self.integer(size)?),
                }
            }
            kind @ (0xe7 | 0xef | 0xa7 | 0xaf) => {
                let longest = self.word()?;
                self.take(5)?;
                let bytes = if longest == 0xffff { self.long()? } else { self.short()? };
                let Some(bytes) = bytes else { return Some(Value::Null) };
                if matches!(kind, 0xe7 | 0xef) {
                    Value::Text(long_text(&bytes))
                } else {
                    Value::text(&bytes.iter().map(|byte| char::from(*byte)).collect::<String>())
                }
            }
            _ => return None,
        })
    }

    fn short(&mut self) -> Option<Bytes> {
        match self.word()? {
            0xffff => Some(None),
            length => Some(Some(self.take(usize::from(length))?.to_vec())),
        }
    }

    fn long(&mut self) -> Option<Bytes> {
        if self.take(8)? == [0xff; 8] {
            return Some(None);
        }
        let mut bytes = Vec::new();
        // An empty one may come without its end.
        while !self.0.is_empty() {
            match self.double()? {
                0 => break,
                length => bytes.extend_from_slice(self.take(length)?),
            }
        }
        Some(Some(bytes))
    }
}

fn request((kind, body): &Message) -> Option<Request> {
    let mut reader = Reader(body);
    let headers = reader.double()?;
    reader.take(headers.checked_sub(4)?)?;
    Some(match *kind {
        BATCH => Request::Batch(long_text(reader.0)),
        PROCEDURE => {
            let name = match reader.word()? {
                0xffff if reader.word()? == 10 => "sp_executesql".to_owned(),
                0xffff => return None,
                length => utf16(reader.take(usize::from(length) * 2)?),
            };
            reader.word()?;
            let mut arguments = Vec::new();
            while !reader.0.is_empty() {
                let length = usize::from(reader.byte()?);
                let name = utf16(reader.take(length * 2)?);
                reader.byte()?;
                arguments.push((Some(name).filter(|name| !name.is_empty()), reader.value()?));
            }
            Request::Procedure(name, arguments)
        }
        TRANSACTION => match reader.word()? {
            5 => Request::Begin,
            7 => Request::Commit,
            8 => Request::Rollback,
            _ => return None,
        },
        _ => return None,
    })
}
