//! A simulated network: hosts by their addresses, and between them links that delay, lose for a while and are cut, in each direction for
//! itself. What goes over a link that is cut stays on its way, as TCP has it, and arrives some time after it was mended.
//!
//! The world moves what is on its way when it is told what time it is ([`Net::deliver`]), so what a host sends arrives with a later step
//! at the earliest. All chance comes from one seed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Octets on their way in one direction of a connection, or waiting to be read.
const WINDOW: usize = 256 << 10;
/// What was lost or held up is sent again after this time.
const AGAIN: Duration = Duration::from_millis(200);

thread_local! {
    static HERE: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// The simulated host on which this thread runs, if any.
pub(super) fn here() -> Option<Host> {
    HERE.with(|host| host.borrow().clone())
}

/// Whether this thread plays a simulated host.
pub fn is_simulated() -> bool {
    HERE.with(|host| host.borrow().is_some())
}

enum Piece {
    Octets(Vec<u8>),
    End,
    Reset,
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    on_its_way: VecDeque<(Duration, Piece)>,
    arrived: VecDeque<u8>,
    unread: usize,
    ended: bool,
    reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

struct Connection {
    /// Who connected, and who was connected to.
    ends: [SocketAddr; 2],
    /// What the end of this number receives.
    pipes: [Pipe; 2],
    /// None until the other side has answered.
    established: Option<bool>,
    connecting: Option<Waker>,
    syn: Option<Duration>,
    answer: Option<(Duration, bool)>,
    /// Ends that are still held by somebody.
    held: [bool; 2],
}

#[derive(Default)]
struct Door {
    waiting: VecDeque<(u64, SocketAddr)>,
    waker: Option<Waker>,
}

/// How a link treats what goes over it.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Shortest and longest delay.
    pub delay: (Duration, Duration),
    /// Of a thousand pieces so many are lost at first.
    pub loses: u32,
}

struct World {
    now: Duration,
    seed: u64,
    link: Link,
    slow: BTreeMap<(IpAddr, IpAddr), Link>,
    cut: BTreeSet<(IpAddr, IpAddr)>,
    /// Who is not let in, and by whom.
    refused: BTreeSet<(IpAddr, IpAddr)>,
    /// Hosts that hold less than others of what they have not read.
    windows: BTreeMap<IpAddr, usize>,
    /// Hosts without power.
    dark: BTreeSet<IpAddr>,
    doors: BTreeMap<SocketAddr, Door>,
    connections: BTreeMap<u64, Box<Connection>>,
    /// When something may arrive, by host, and over which connection.
    due: BTreeMap<IpAddr, BTreeSet<(Duration, u64)>>,
    next: u64,
    ports: u16,
}

impl World {
    fn random(&mut self) -> u64 {
        // splitmix64 (Steele et al., OOPSLA'14).
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// When something that is sent now arrives.
    fn arrival(&mut self, from: IpAddr, to: IpAddr) -> Duration {
        let link = self.slow.get(&(from, to)).copied().unwrap_or(self.link);
        let (least, most) = link.delay;
        let spread = most.saturating_sub(least).as_micros() as u64 + 1;
        let mut at = self.now + least + Duration::from_micros(self.random() % spread);
        while self.random() % 1000 < u64::from(link.loses.min(900)) {
            at += AGAIN;
        }
        at
    }

    /// What is due on its way from an end of a connection, unless the link is cut: that is tried again.
    fn is_through(&mut self, from: IpAddr, to: IpAddr, at: &mut Duration) -> bool {
        if *at > self.now {
            return false;
        }
        // What was sent before the sender lost its power arrives.
        if self.cut.contains(&(from, to)) || self.dark.contains(&to) {
            *at = self.now + AGAIN + Duration::from_micros(self.random() % 100_000);
            return false;
        }
        true
    }

    fn send(&mut self, id: u64, end: usize, piece: Piece) {
        let Some(ends) = self.connections.get(&id).map(|c| c.ends) else { return };
        let at = self.arrival(ends[end].ip(), ends[1 - end].ip());
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let pipe = &mut connection.pipes[1 - end];
        let at = pipe.on_its_way.back().map_or(at, |(before, _)| at.max(*before));
        pipe.on_its_way.push_back((at, piece));
        self.expect(ends[1 - end].ip(), at, id);
    }

    /// Something arrives at a host then, over this connection.
    fn expect(&mut self, host: IpAddr, at: Duration, id: u64) {
        self.due.entry(host).or_default().insert((at, id));
    }

    fn deliver(&mut self, host: IpAddr) {
        let Some(due) = self.due.get_mut(&host) else { return };
        let mut ids = BTreeSet::new();
        while let Some((_, id)) = due.first().copied().filter(|(at, _)| *at <= self.now) {
            due.pop_first();
            ids.insert(id);
        }
        for id in ids {
            let Some(mut connection) = self.connections.remove(&id) else { continue };
            let [client, server] = connection.ends.map(|end| end.ip());
            if server == host
                && let Some(mut at) = connection.syn
            {
                let through = self.is_through(client, server, &mut at);
                connection.syn = if through { None } else { Some(at) };
                if !through {
                    self.expect(host, at, id);
                }
                if through {
                    let door = self.doors.get_mut(&connection.ends[1]);
                    let is_open = door.is_some() && !self.refused.contains(&(client, server));
                    if let Some(door) = door.filter(|_| is_open) {
                        door.waiting.push_back((id, connection.ends[0]));
                        door.waker.take().into_iter().for_each(Waker::wake);
                    }
                    let at = self.arrival(server, client);
                    connection.answer = Some((at, is_open));
                    self.expect(client, at, id);
                    connection.held[1] = is_open;
                }
            }
            if client == host
                && let Some((mut at, is_open)) = connection.answer
            {
                let through = self.is_through(server, client, &mut at);
                connection.answer = if through { None } else { Some((at, is_open)) };
                if !through {
                    self.expect(host, at, id);
                }
                if through {
                    connection.established = Some(is_open);
                    connection.connecting.take().into_iter().for_each(Waker::wake);
                }
            }
            for end in 0..2 {
                if connection.ends[end].ip() != host {
                    continue;
                }
                let (from, to) = (connection.ends[1 - end].ip(), host);
                while let Some((mut at, piece)) = connection.pipes[end].on_its_way.pop_front() {
                    if !self.is_through(from, to, &mut at) {
                        connection.pipes[end].on_its_way.push_front((at, piece));
                        self.expect(host, at, id);
                        break;
                    }
                    let pipe = &mut connection.pipes[end];
                    match piece {
                        Piece::Octets(octets) => pipe.arrived.extend(octets),
                        Piece::End => pipe.ended = true,
                        Piece::Reset => pipe.reset = true,
                    }
                    if pipe.reset {
                        connection.pipes[1 - end].reset = true;
                        connection.pipes[1 - end].wake();
                    }
                    connection.pipes[end].wake();
                }
            }
            let is_over = !connection.held[0] && !connection.held[1] && connection.syn.is_none();
            if !is_over {
                self.connections.insert(id, connection);
            }
        }
    }
}

/// A simulated network. Clones share it.
#[derive(Clone)]
pub struct Net(Arc<Mutex<World>>);

impl Net {
    /// A network without hosts.
    pub fn new(seed: u64, link: Link) -> Net {
        Net(Arc::new(Mutex::new(World {
            now: Duration::ZERO,
            seed,
            link,
            slow: BTreeMap::new(),
            cut: BTreeSet::new(),
            refused: BTreeSet::new(),
            windows: BTreeMap::new(),
            dark: BTreeSet::new(),
            doors: BTreeMap::new(),
            connections: BTreeMap::new(),
            due: BTreeMap::new(),
            next: 0,
            ports: 1024,
        })))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something as a host.
    pub fn scope<T>(&self, host: IpAddr, what: impl FnOnce() -> T) -> T {
        struct Leave(Option<Host>);
        impl Drop for Leave {
            fn drop(&mut self) {
                HERE.with(|here| *here.borrow_mut() = self.0.take());
            }
        }
        let host = Host { net: self.clone(), address: host };
        let _leave = Leave(HERE.with(|here| here.replace(Some(host))));
        what()
    }

    /// It is `now`, and what was to arrive at a host by then does.
    pub fn deliver(&self, host: IpAddr, now: Duration) {
        let mut world = self.world();
        world.now = now;
        world.deliver(host);
    }

    /// Nothing goes from one host to another any more, until [`Net::mend`].
    pub fn cut(&self, from: IpAddr, to: IpAddr) {
        self.world().cut.insert((from, to));
    }

    /// So many octets may be on their way to a host on each of its connections, or wait there to be read.
    pub fn narrow(&self, host: IpAddr, window: usize) {
        self.world().windows.insert(host, window);
    }

    /// New connections from one host to another are refused at once, as by a packet filter that rejects.
    pub fn refuse(&self, from: IpAddr, to: IpAddr) {
        self.world().refused.insert((from, to));
    }

    /// All links are as they were made.
    pub fn mend(&self) {
        let mut world = self.world();
        world.cut.clear();
        world.refused.clear();
        world.slow.clear();
        world.windows.clear();
    }

    /// What goes from one host to another is treated like this.
    pub fn slow(&self, from: IpAddr, to: IpAddr, link: Link) {
        self.world().slow.insert((from, to), link);
    }

    /// A host's process ends: its doors close. If the host itself is still there the others hear of it; else they hear of it when it is
    /// back ([`Net::back`]).
    pub fn down(&self, host: IpAddr, is_there: bool) {
        let mut world = self.world();
        world.doors.retain(|door, _| door.ip() != host);
        match is_there {
            true => world.dark.remove(&host),
            false => world.dark.insert(host),
        };
        let ids: Vec<u64> = world.connections.keys().copied().collect();
        for id in ids {
            for end in 0..2 {
                let Some(connection) = world.connections.get_mut(&id) else { continue };
                if connection.ends[end].ip() == host {
                    connection.held[end] = false;
                    if is_there {
                        world.send(id, end, Piece::Reset);
                    }
                }
            }
        }
    }

    /// A host that lost power is back: whoever still has a connection to what ran there before hears that it is gone.
    pub fn back(&self, host: IpAddr) {
        self.down(host, true);
    }

    /// A connection breaks, which `choice` says.
    pub fn reset_one(&self, choice: u64) {
        let mut world = self.world();
        let chosen = world.connections.values_mut().filter(|c| c.established == Some(true));
        let count = chosen.count() as u64;
        if count == 0 {
            return;
        }
        let mut chosen = world.connections.values_mut().filter(|c| c.established == Some(true));
        if let Some(connection) = chosen.nth((choice % count) as usize) {
            for pipe in &mut connection.pipes {
                pipe.reset = true;
                pipe.wake();
            }
        }
    }
}

/// A host of a simulated network.
#[derive(Clone)]
pub struct Host {
    net: Net,
    address: IpAddr,
}

impl Host {
    pub(super) async fn connect(&self, to: SocketAddr) -> io::Result<Stream> {
        let id = {
            let mut world = self.net.world();
            world.next += 1;
            world.ports = world.ports.checked_add(1).unwrap_or(1024);
            let (id, port) = (world.next, world.ports);
            let at = world.arrival(self.address, to.ip());
            world.expect(to.ip(), at, id);
            let syn = Some(at);
            let connection = Connection {
                ends: [(self.address, port).into(), to],
                pipes: Default::default(),
                established: None,
                connecting: None,
                syn,
                answer: None,
                held: [true, false],
            };
            world.connections.insert(id, Box::new(connection));
            id
        };
        let stream = Stream { net: self.net.clone(), id, end: 0 };
        std::future::poll_fn(|cx| {
            let mut world = self.net.world();
            let Some(connection) = world.connections.get_mut(&id) else {
                return Poll::Ready(Err(reset()));
            };
            match connection.established {
                Some(true) => Poll::Ready(Ok(())),
                Some(false) => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
                None => {
                    connection.connecting = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await?;
        Ok(stream)
    }

    pub(super) fn listen(&self, address: SocketAddr) -> io::Result<Listener> {
        let mut world = self.net.world();
        if world.doors.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        world.doors.insert(address, Door::default());
        Ok(Listener { net: self.net.clone(), address })
    }
}

/// Where simulated connections come in.
pub struct Listener {
    net: Net,
    address: SocketAddr,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Listener({})", self.address)
    }
}

impl Listener {
    pub(super) async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        let (id, from) = std::future::poll_fn(|cx| {
            let mut world = self.net.world();
            let Some(door) = world.doors.get_mut(&self.address) else { return Poll::Pending };
            match door.waiting.pop_front() {
                Some(next) => Poll::Ready(next),
                None => {
                    door.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        Ok((Stream { net: self.net.clone(), id, end: 1 }, from))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.net.world().doors.remove(&self.address);
    }
}

/// An end of a simulated connection.
pub struct Stream {
    net: Net,
    id: u64,
    end: usize,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream({}.{})", self.id, self.end)
    }
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut world = self.net.world();
        let Some(connection) = world.connections.get_mut(&self.id) else { return Poll::Ready(Err(reset())) };
        let pipe = &mut connection.pipes[self.end];
        if pipe.reset {
            return Poll::Ready(Err(reset()));
        }
        if pipe.arrived.is_empty() {
            if pipe.ended {
                return Poll::Ready(Ok(()));
            }
            pipe.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (first, _) = pipe.arrived.as_slices();
        let count = first.len().min(buf.remaining());
        buf.put_slice(&first[..count]);
        pipe.arrived.drain(..count);
        pipe.unread -= count;
        pipe.writer.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut world = self.net.world();
        let Some(connection) = world.connections.get(&self.id) else { return Poll::Ready(Err(reset())) };
        let to = connection.ends[1 - self.end].ip();
        let window = world.windows.get(&to).copied().unwrap_or(WINDOW);
        let Some(connection) = world.connections.get_mut(&self.id) else { return Poll::Ready(Err(reset())) };
        let pipe = &mut connection.pipes[1 - self.end];
        if pipe.reset {
            return Poll::Ready(Err(reset()));
        }
        let count = buf.len().min(window.saturating_sub(pipe.unread));
        if count == 0 && !buf.is_empty() {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        pipe.unread += count;
        world.send(self.id, self.end, Piece::Octets(buf[..count].to_vec()));
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.net.world().send(self.id, self.end, Piece::End);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut world = self.net.world();
        if let Some(connection) = world.connections.get_mut(&self.id) {
            connection.held[self.end] = false;
        }
        world.send(self.id, self.end, Piece::End);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// What came of octets that were sent from one host to another while the time went on: after how many milliseconds they arrived.
    fn sent(prepare: impl Fn(&Net, u64)) -> Option<u64> {
        let net = Net::new(1, Link { delay: (5 * MS, 5 * MS), loses: 0 });
        let (client, server) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.unwrap();
        let arrived = Arc::new(Mutex::new(None));
        let door: SocketAddr = (server, 25).into();
        let tell = arrived.clone();
        runtime.spawn(net.scope(server, || {
            let host = here().unwrap();
            async move {
                let listener = host.listen(door).unwrap();
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut octets = Vec::new();
                if stream.read_to_end(&mut octets).await.is_ok() {
                    *tell.lock().unwrap() = Some(octets);
                }
            }
        }));
        runtime.spawn(net.scope(client, || {
            let host = here().unwrap();
            async move {
                let mut stream = host.connect(door).await.unwrap();
                stream.write_all(&[7; 100_000]).await.unwrap();
                stream.write_all(&[8; 100_000]).await.unwrap();
            }
        }));
        for ms in 0..2000 {
            prepare(&net, ms);
            [client, server].into_iter().for_each(|host| net.deliver(host, MS * ms as u32));
            runtime.block_on(async { tokio::time::sleep(MS).await });
            if let Some(octets) = arrived.lock().unwrap().take() {
                assert_eq!(octets, [[7; 100_000], [8; 100_000]].concat());
                return Some(ms);
            }
        }
        None
    }

    #[test]
    fn octets_arrive_whole_and_in_order_once_the_link_lets_them() {
        let (client, server) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        // There, back, and there with the octets.
        assert!((15..25).contains(&sent(|_, _| {}).unwrap()));
        let cut = sent(|net, ms| match ms {
            12 => net.cut(client, server),
            700 => net.mend(),
            _ => {}
        });
        assert!((700..1100).contains(&cut.unwrap()), "{cut:?}");
        let other_way = sent(|net, ms| {
            if ms == 12 {
                net.cut(server, client)
            }
        });
        assert!(other_way.unwrap() < 25, "the other way is open");
        let killed = |when| {
            sent(move |net, ms| {
                if ms == when {
                    net.down(client, true)
                }
            })
        };
        assert_eq!(killed(8), None, "it was reset before anything was sent");
        assert_eq!(killed(12), Some(15), "what a process has sent arrives though it ends");
        assert_eq!(
            sent(|net, ms| if ms == 12 {
                net.down(client, false)
            }),
            Some(15),
            "nor does a loss of power take back what is on its way"
        );
    }
}
