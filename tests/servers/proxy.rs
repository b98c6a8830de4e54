//! [`Proxy`].

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::resp::{self, Frame};
use super::{ATTEMPTS, PATIENCE, POLL, free_port, lock};

/// A network between clients and a server, which fails on demand.
///
/// It runs in a thread of its own, in real time, so it goes on while a test blocks, or has paused its clock. What a
/// method does is done for every byte that is sent after it has returned, on old and new connections.
///
/// It passes on whole requests and replies, if the client begins with a RESP array, and otherwise bytes as they come;
/// then a "request" or a "reply" is what arrived at once. What is lost is lost: nothing is sent again, as if one had
/// pulled the plug for longer than TCP tries. A loss includes the news that the other side has closed the connection.
///
/// Replies belong to requests by their order. Pushes and messages of subscriptions are told apart.
#[derive(Debug)]
pub(crate) struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What has passed so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Traffic {
    /// Connections accepted.
    pub(crate) connections: u64,
    /// Of these, the ones that are still there on the side of the client.
    pub(crate) open: u64,
    /// Requests that went on to the server.
    pub(crate) commands: u64,
    /// Requests that are held back, or delayed.
    pub(crate) waiting: u64,
    /// Requests that were lost.
    pub(crate) lost_requests: u64,
    /// Replies, and pushes, that went on to the client.
    pub(crate) replies: u64,
    /// Replies and pushes that were lost.
    pub(crate) lost_replies: u64,
    /// Bytes that went on to the server.
    pub(crate) request_bytes: u64,
    /// Bytes that went on to the client.
    pub(crate) reply_bytes: u64,
}

#[derive(Debug)]
struct Shared {
    faults: watch::Sender<Faults>,
    traffic: watch::Sender<Traffic>,
    /// What happens to the reply of one request to come.
    aim: Mutex<Option<Aim>>,
    /// Whether the port is open, as asked for and as it is.
    open: watch::Sender<bool>,
    is_open: watch::Sender<bool>,
    ended: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
struct Faults {
    target: SocketAddr,
    requests: Way,
    replies: Way,
    /// Connections accepted before the last of these resets are gone.
    resets: u64,
}

#[derive(Clone, Debug, Default)]
struct Way {
    cut: bool,
    delay: Duration,
    /// Whatever contains this, and what comes after it, stays here.
    hold: Option<Vec<u8>>,
}

impl Way {
    fn holds(&self, bytes: &[u8]) -> bool {
        self.hold.as_ref().is_some_and(|part| contains(bytes, part))
    }
}

#[derive(Debug)]
struct Aim {
    part: Vec<u8>,
    /// The how manieth of those that contain it.
    number: u64,
    fate: Fate,
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It is lost, and so is all that the server says on that connection later.
    Swallowed,
    /// So many bytes of it arrive, and then the connection is reset.
    ResetAfter(usize),
}

impl Proxy {
    /// A network that works, to a server at `target`.
    pub(crate) fn start(target: SocketAddr) -> Self {
        let faults = Faults { target, requests: Way::default(), replies: Way::default(), resets: 0 };
        let shared = Arc::new(Shared {
            faults: watch::Sender::new(faults),
            traffic: watch::Sender::new(Traffic::default()),
            aim: Mutex::new(None),
            open: watch::Sender::new(true),
            is_open: watch::Sender::new(false),
            ended: watch::Sender::new(false),
        });
        // The listener is made here, so that the port is open from the start.
        let (listener, addr) = (0..ATTEMPTS)
            .find_map(|_| {
                let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
                Some((std::net::TcpListener::bind(addr).ok()?, addr))
            })
            .expect("there is a free port");
        listener.set_nonblocking(true).expect("a socket can be nonblocking");
        let theirs = shared.clone();
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serve(listener, addr, theirs));
        });
        let proxy = Self { addr, shared, thread: Some(thread) };
        proxy.await_open(true);
        proxy
    }

    /// Where clients connect to.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The port that clients connect to.
    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    /// `redis://127.0.0.1:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    /// Requests are lost. Connections stay open, and new ones can be made.
    pub(crate) fn cut_requests(&self) {
        self.change(|faults| faults.requests.cut = true);
    }

    /// Replies are lost; requests arrive and are carried out.
    pub(crate) fn cut_replies(&self) {
        self.change(|faults| faults.replies.cut = true);
    }

    /// Ends the cuts in both directions, for what comes from now on.
    pub(crate) fn heal(&self) {
        self.change(|faults| {
            faults.requests.cut = false;
            faults.replies.cut = false;
        });
    }

    /// Each request takes that much longer.
    pub(crate) fn delay_requests(&self, by: Duration) {
        self.change(|faults| faults.requests.delay = by);
    }

    /// Each reply takes that much longer.
    pub(crate) fn delay_replies(&self, by: Duration) {
        self.change(|faults| faults.replies.delay = by);
    }

    /// Requests stay here until they are released; then they arrive, even if the client has closed its connection
    /// long ago. Await [`Traffic::waiting`] to know that one is here.
    pub(crate) fn hold_requests(&self) {
        self.hold_requests_with(b"");
    }

    /// Holds back the requests that contain this, and what follows them on their connection.
    pub(crate) fn hold_requests_with(&self, part: &[u8]) {
        self.change(|faults| faults.requests.hold = Some(part.to_vec()));
    }

    /// Lets the requests go that were held back.
    pub(crate) fn release_requests(&self) {
        self.change(|faults| faults.requests.hold = None);
    }

    /// Replies stay here until they are released.
    pub(crate) fn hold_replies(&self) {
        self.change(|faults| faults.replies.hold = Some(Vec::new()));
    }

    /// Lets the replies go that were held back.
    pub(crate) fn release_replies(&self) {
        self.change(|faults| faults.replies.hold = None);
    }

    /// Loses the reply to the `number`th request from now on, 1 being the next, and all later ones of that connection:
    /// if only one were missing, its client would take the next one for it. [`Traffic::lost_replies`] tells that the
    /// server has replied.
    pub(crate) fn drop_reply(&self, number: u64) {
        self.take_aim(b"", number, Fate::Swallowed);
    }

    /// [`drop_reply`](Self::drop_reply) for the next request that contains this.
    pub(crate) fn drop_reply_to(&self, part: &[u8]) {
        self.take_aim(part, 1, Fate::Swallowed);
    }

    /// Resets the connection of the next request when so many bytes of its reply have arrived.
    pub(crate) fn reset_in_reply(&self, bytes: usize) {
        self.take_aim(b"", 1, Fate::ResetAfter(bytes));
    }

    /// [`reset_in_reply`](Self::reset_in_reply) for the next request that contains this.
    pub(crate) fn reset_in_reply_to(&self, part: &[u8], bytes: usize) {
        self.take_aim(part, 1, Fate::ResetAfter(bytes));
    }

    /// Whether a [`drop_reply`](Self::drop_reply) or [`reset_in_reply`](Self::reset_in_reply) still waits for its
    /// request.
    pub(crate) fn is_aiming(&self) -> bool {
        lock(&self.shared.aim).is_some()
    }

    /// Resets all connections that there are. What was held back or delayed for the server still arrives there.
    pub(crate) fn reset_all(&self) {
        self.change(|faults| faults.resets += 1);
    }

    /// Closes the port: a new connection is refused.
    pub(crate) fn refuse(&self) {
        self.shared.open.send_replace(false);
        self.await_open(false);
    }

    /// Opens the port again.
    pub(crate) fn accept(&self) {
        self.shared.open.send_replace(true);
        self.await_open(true);
    }

    /// Where later connections lead.
    pub(crate) fn set_target(&self, target: SocketAddr) {
        self.change(|faults| faults.target = target);
    }

    /// What has passed so far.
    pub(crate) fn traffic(&self) -> Traffic {
        *self.shared.traffic.borrow()
    }

    /// How many connections there were.
    pub(crate) fn connections(&self) -> u64 {
        self.traffic().connections
    }

    /// How many requests went to the server.
    pub(crate) fn commands(&self) -> u64 {
        self.traffic().commands
    }

    /// Waits for something to have passed.
    ///
    /// # Panics
    ///
    /// If it doesn't within 20 seconds.
    pub(crate) async fn until(&self, reached: impl Fn(&Traffic) -> bool) -> Traffic {
        let mut traffic = self.shared.traffic.subscribe();
        // A thread counts the seconds, since the clock of the caller's runtime may be paused.
        let (patience, over) = oneshot::channel::<()>();
        let (_done, not_done) = std::sync::mpsc::channel::<()>();
        thread::spawn(move || {
            let _ = not_done.recv_timeout(PATIENCE);
            drop(patience);
        });
        tokio::select! {
            biased;
            found = traffic.wait_for(|traffic| reached(traffic)) => *found.expect("we have the sender"),
            _ = over => panic!("not within {PATIENCE:?}, but only {:?}", self.traffic()),
        }
    }

    /// [`until`](Self::until) for tests without a runtime.
    pub(crate) fn wait_until(&self, reached: impl Fn(&Traffic) -> bool) -> Traffic {
        super::wait_until("the wanted traffic has passed", || reached(&self.traffic()));
        self.traffic()
    }

    fn change(&self, change: impl FnOnce(&mut Faults)) {
        self.shared.faults.send_modify(change);
    }

    fn take_aim(&self, part: &[u8], number: u64, fate: Fate) {
        *lock(&self.shared.aim) = Some(Aim { part: part.to_vec(), number, fate });
    }

    fn await_open(&self, open: bool) {
        super::wait_until("the proxy's port is as wanted", || *self.shared.is_open.borrow() == open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.send_replace(true);
        let ended = self.thread.take().is_none_or(|thread| thread.join().is_ok());
        assert!(ended || thread::panicking(), "the proxy has panicked");
    }
}

async fn serve(first: std::net::TcpListener, addr: SocketAddr, shared: Arc<Shared>) {
    let mut listener = Some(TcpListener::from_std(first).expect("a nonblocking listener"));
    let mut connections = JoinSet::new();
    let mut open = shared.open.subscribe();
    let mut ended = shared.ended.subscribe();
    loop {
        if *open.borrow_and_update() {
            while listener.is_none() {
                // Another who looks for a free port may have it for a moment.
                listener = TcpListener::bind(addr).await.ok();
                sleep(POLL).await;
            }
        } else {
            listener = None;
        }
        shared.is_open.send_replace(listener.is_some());
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await.expect("a connection").0,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            client = accepted => {
                shared.traffic.send_modify(|traffic| {
                    traffic.connections += 1;
                    traffic.open += 1;
                });
                let resets = shared.faults.borrow().resets;
                connections.spawn(connect(client, resets, shared.clone()));
            }
            _ = open.changed() => {}
            Some(result) = connections.join_next() => result.expect("a connection doesn't panic"),
            _ = ended.changed() => return,
        }
    }
}

/// Connects to the server, and passes on until both sides are done.
async fn connect(client: TcpStream, resets: u64, shared: Arc<Shared>) {
    let target = shared.faults.borrow().target;
    let Ok(server) = TcpStream::connect(target).await else {
        // Too late to refuse it.
        let _ = client.set_zero_linger();
        shared.traffic.send_modify(|traffic| traffic.open -= 1);
        return;
    };
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("a TCP socket");
    }
    let connection = Connection {
        resets,
        shared,
        client: Mutex::new(Some(Arc::new(client))),
        server: Arc::new(server),
        foreign: AtomicBool::new(false),
        order: Mutex::new(Order::default()),
        gone: watch::Sender::new(false),
    };
    tokio::join!(connection.requests(), connection.replies());
}

struct Connection {
    resets: u64,
    shared: Arc<Shared>,
    /// None once it is closed or reset.
    client: Mutex<Option<Arc<TcpStream>>>,
    server: Arc<TcpStream>,
    /// Whether this isn't RESP.
    foreign: AtomicBool,
    order: Mutex<Order>,
    /// Whether the client's side is closed.
    gone: watch::Sender<bool>,
}

#[derive(Default)]
struct Order {
    requests: u64,
    replies: u64,
    doomed: Option<(u64, Fate)>,
    mute: bool,
    /// The server has closed, which the client may not know.
    server_closed: bool,
}

/// What was read from one side.
enum Item {
    Bytes(Vec<u8>),
    End,
}

impl Connection {
    fn faults(&self) -> Faults {
        self.shared.faults.borrow().clone()
    }

    fn count(&self, change: impl FnOnce(&mut Traffic)) {
        self.shared.traffic.send_modify(change);
    }

    fn client(&self) -> Option<Arc<TcpStream>> {
        lock(&self.client).clone()
    }

    /// Closes the client's side, once its last user has let go of it.
    fn close_client(&self, reset: bool) {
        let Some(client) = lock(&self.client).take() else { return };
        if reset {
            // Fails if the client has closed it already.
            let _ = client.set_zero_linger();
        }
        drop(client);
        self.gone.send_replace(true);
        self.count(|traffic| traffic.open -= 1);
    }

    async fn gone(&self) {
        self.gone.subscribe().wait_for(|gone| *gone).await.expect("we have the sender");
    }

    async fn reset(&self) {
        let mut faults = self.shared.faults.subscribe();
        faults.wait_for(|faults| faults.resets > self.resets).await.expect("the proxy has the sender");
    }

    /// Everything from the client to the server, until the client is gone and the server has got what was sent to it.
    async fn requests(&self) {
        let (queue, queued) = mpsc::unbounded_channel();
        let read = async {
            let reset = self.read_requests(&queue).await;
            self.close_client(reset);
            if self.faults().requests.cut {
                // The server can't know.
                self.faults_until(|faults| !faults.requests.cut).await;
            }
            let _ = queue.send((Instant::now(), Item::End));
        };
        tokio::join!(read, self.deliver_requests(queued));
    }

    /// Whether a reset ended it. Otherwise the client has closed its side for writing at least: it expects no reply.
    async fn read_requests(&self, queue: &mpsc::UnboundedSender<(Instant, Item)>) -> bool {
        let Some(client) = self.client() else { return false };
        let reading = self.read(&client, |bytes| {
            let faults = self.faults();
            if faults.requests.cut || faults.resets > self.resets {
                self.count(|traffic| traffic.lost_requests += 1);
                return;
            }
            self.count(|traffic| traffic.waiting += 1);
            // Fails after an error of the server, of which the client will hear.
            let _ = queue.send((Instant::now(), Item::Bytes(bytes)));
        });
        tokio::select! {
            biased;
            () = self.reset() => true,
            () = self.gone() => false,
            () = reading => false,
        }
    }

    async fn deliver_requests(&self, mut queued: mpsc::UnboundedReceiver<(Instant, Item)>) {
        while let Some((since, item)) = queued.recv().await {
            let bytes = match &item {
                Item::Bytes(bytes) => bytes.as_slice(),
                Item::End => b"",
            };
            sleep_until(since + self.faults().requests.delay).await;
            self.faults_until(|faults| !faults.requests.holds(bytes)).await;
            if let Item::End = item {
                break;
            }
            self.count(|traffic| traffic.waiting -= 1);
            if self.faults().requests.cut {
                self.count(|traffic| traffic.lost_requests += 1);
                continue;
            }
            let (server_closed, client_may_know) = {
                let mut order = lock(&self.order);
                if let Some(fate) = self.hit(bytes) {
                    let number = if self.is_foreign() { order.replies } else { order.requests };
                    order.doomed = Some((number, fate));
                }
                if !is_subscription(bytes) {
                    order.requests += 1;
                }
                (order.server_closed, !order.mute && !self.faults().replies.cut)
            };
            self.count(|traffic| {
                traffic.commands += 1;
                traffic.request_bytes += bytes.len() as u64;
            });
            let failed = write(&self.server, bytes).await.is_err();
            if (failed || server_closed) && client_may_know {
                self.close_client(true);
            }
        }
        // Not a reset, by which the server might lose what it hasn't read.
        let _ = shutdown(&*self.server, Shutdown::Write);
    }

    /// Whether a request is the one whose reply is aimed at.
    fn hit(&self, bytes: &[u8]) -> Option<Fate> {
        let mut aim = lock(&self.shared.aim);
        let wanted = aim.as_mut().filter(|aim| contains(bytes, &aim.part))?;
        wanted.number -= 1;
        if wanted.number > 0 {
            return None;
        }
        aim.take().map(|aim| aim.fate)
    }

    /// Everything from the server to the client, until the server has closed. Goes on reading without a client, or
    /// else the server would have to wait for somebody to read, and not carry out what comes late.
    async fn replies(&self) {
        let (queue, queued) = mpsc::unbounded_channel();
        let read = async {
            let send = |item| {
                let _ = queue.send((Instant::now(), self.faults().replies.cut, item));
            };
            self.read(&self.server, |bytes| send(Item::Bytes(bytes))).await;
            lock(&self.order).server_closed = true;
            send(Item::End);
        };
        tokio::join!(read, self.deliver_replies(queued));
    }

    async fn deliver_replies(&self, mut queued: mpsc::UnboundedReceiver<(Instant, bool, Item)>) {
        while let Some((since, lost_on_arrival, item)) = queued.recv().await {
            tokio::select! {
                () = async {
                    sleep_until(since + self.faults().replies.delay).await;
                    self.faults_until(|faults| !faults.replies.holds(b"")).await;
                } => {}
                () = self.gone() => {}
            }
            let lost = lost_on_arrival || self.faults().replies.cut || lock(&self.order).mute;
            let Item::Bytes(bytes) = item else {
                if !lost {
                    self.close_client(false);
                }
                break;
            };
            let fate = self.fate(&bytes);
            let (lost, end) = match fate {
                Some(Fate::Swallowed) => (true, None),
                Some(Fate::ResetAfter(end)) => (lost, Some(end.min(bytes.len()))),
                None => (lost, None),
            };
            let Some(client) = self.client().filter(|_| !lost && self.faults().resets <= self.resets) else {
                self.count(|traffic| traffic.lost_replies += 1);
                continue;
            };
            let part = &bytes[..end.unwrap_or(bytes.len())];
            self.count(|traffic| {
                if end.is_none() {
                    traffic.replies += 1;
                }
                traffic.reply_bytes += part.len() as u64;
            });
            // A client that doesn't read mustn't keep us when it is gone.
            let written = tokio::select! {
                written = write(&client, part) => written.is_ok(),
                () = self.gone() => false,
            };
            drop(client);
            if end.is_some() || !written {
                self.close_client(true);
            }
        }
    }

    /// What is to happen to a reply, which is counted.
    fn fate(&self, bytes: &[u8]) -> Option<Fate> {
        let mut order = lock(&self.order);
        if !self.is_foreign() && is_push(bytes) {
            return None;
        }
        let number = order.replies;
        order.replies += 1;
        let (_, fate) = order.doomed.take_if(|(doomed, _)| *doomed <= number)?;
        if let Fate::Swallowed = fate {
            order.mute = true;
        }
        Some(fate)
    }

    fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Relaxed)
    }

    async fn faults_until(&self, wanted: impl Fn(&Faults) -> bool) {
        let mut faults = self.shared.faults.subscribe();
        faults.wait_for(|faults| wanted(faults)).await.expect("the proxy has the sender");
    }

    /// Reads whole frames, or what there is if it isn't RESP, until the other side ends it.
    async fn read(&self, from: &TcpStream, mut take: impl FnMut(Vec<u8>)) {
        let mut buffer = vec![0; 1 << 16];
        let mut pending = VecDeque::new();
        loop {
            let length = match from.readable().await.and_then(|()| from.try_read(&mut buffer)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Ok(0) | Err(_) => break,
                Ok(length) => length,
            };
            pending.extend(&buffer[..length]);
            while !pending.is_empty() {
                let frame =
                    if self.is_foreign() { Frame::Foreign } else { resp::frame(pending.make_contiguous()) };
                match frame {
                    Frame::Whole(length) => take(pending.drain(..length).collect()),
                    Frame::Partial => break,
                    Frame::Foreign => {
                        self.foreign.store(true, Ordering::Relaxed);
                        take(pending.drain(..).collect());
                    }
                }
            }
        }
        if !pending.is_empty() {
            take(pending.into());
        }
    }
}

async fn write(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether it gets no reply in its turn, but pushes.
fn is_subscription(request: &[u8]) -> bool {
    let command = request.split(|byte| *byte == b'\n').nth(2).unwrap_or_default();
    command.trim_ascii().to_ascii_lowercase().ends_with(b"subscribe")
}

/// Whether the server sends it unasked, or to a subscription: a push of RESP3, or what stands for one in RESP2.
fn is_push(reply: &[u8]) -> bool {
    let word = reply.split(|byte| *byte == b'\n').nth(2).unwrap_or_default().trim_ascii();
    reply.starts_with(b">")
        || reply.starts_with(b"*")
            && (word.ends_with(b"subscribe") || matches!(word, b"message" | b"pmessage"))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    part.is_empty() || bytes.windows(part.len()).any(|window| window == part)
}
