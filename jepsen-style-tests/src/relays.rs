//! Links that can be cut where no machine can be made for each node: all of them run on loopback, and each is reached by the others through a
//! listener of the harness, which hands on what comes. What is cut waits in it, as it would in a network that sends again what was lost.
//! Who calls is asked of proc_pid_fd(5).

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::links::{Links, Unavailable};
use crate::nodes::Nodes;
use crate::random::Random;
use crate::replacement::member_field;
use crate::tools::lock;

/// How far above the port where it is called a node listens.
const BEHIND: u16 = 3;
/// How long a call may wait: nodes give up a connection that is not made by then.
const CALL: Duration = Duration::from_secs(2);
/// How often a connection looks at what became of its link.
const LOOK: Duration = Duration::from_millis(20);
/// What a packet that was lost takes longer: it is sent again (RFC 6298 §2, as Linux has it).
const SENT_AGAIN: Duration = Duration::from_millis(200);

/// What becomes of what one node sends another.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Waits,
    Resets,
}

struct Fates {
    of: BTreeMap<(u64, u64), Fate>,
    /// So many of a hundred pieces are lost at first.
    loses: u64,
    random: Random,
}

/// What all threads share.
struct Shared {
    fates: Mutex<Fates>,
    has_ended: AtomicBool,
    /// Which node has the other end of a connection to one of our ports, by that end's port and ours.
    who: Box<dyn Fn(u16, u16) -> Option<u64> + Send + Sync>,
}

/// The listeners.
pub(crate) struct Relays {
    shared: Arc<Shared>,
    ports: Vec<u16>,
}

/// A node, where its peers call it, and where it listens.
type Listener = (u64, u16, u16);

/// A node's file, in which it listens elsewhere than where its peers call it.
pub(crate) fn behind(id: u64, text: &str) -> String {
    let Some((host, port)) = called(id, text) else { return text.into() };
    let listens = |port: u16| format!("\nlisten = \"{host}:{port}\"\n");
    text.replace(&listens(port), &listens(port + BEHIND))
}

/// Where a node's peers call it.
fn called(id: u64, text: &str) -> Option<(&str, u16)> {
    let (host, port) = member_field(text, id, "address")?.rsplit_once(':')?;
    Some((host, port.parse().ok()?))
}

impl Relays {
    /// Between nodes on loopback whose files are as [`behind`] makes them.
    ///
    /// # Errors
    /// If a port is taken.
    pub(crate) fn start(nodes: &Nodes, seed: u64) -> std::io::Result<Relays> {
        let listener = |id: u64| {
            let text = std::fs::read_to_string(nodes.config(id))?;
            let (_, port) =
                called(id, &text).ok_or_else(|| std::io::Error::other("a file that names no peer"))?;
            Ok((id, port, port + BEHIND))
        };
        let listeners = (1..=3).map(listener).collect::<std::io::Result<Vec<Listener>>>()?;
        let dir = nodes.dir().to_path_buf();
        Relays::with(&listeners, seed, Box::new(move |port, own| caller(&dir, port, own)))
    }

    fn with(
        listeners: &[Listener],
        seed: u64,
        who: Box<dyn Fn(u16, u16) -> Option<u64> + Send + Sync>,
    ) -> std::io::Result<Relays> {
        let fates = Mutex::new(Fates { of: BTreeMap::new(), loses: 0, random: Random::new(seed) });
        let shared = Arc::new(Shared { fates, has_ended: AtomicBool::new(false), who });
        let mut ports = Vec::new();
        for (id, port, target) in listeners.iter().copied() {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
            let port = listener.local_addr()?.port();
            ports.push(port);
            let shared = shared.clone();
            std::thread::spawn(move || {
                for call in listener.incoming().flatten() {
                    if shared.has_ended() {
                        return;
                    }
                    let shared = shared.clone();
                    std::thread::spawn(move || shared.hand_on(call, port, id, target));
                }
            });
        }
        Ok(Relays { shared, ports })
    }

    fn set(&self, from: u64, to: u64, fate: Fate) {
        lock(&self.shared.fates).of.insert((from, to), fate);
    }
}

impl Links for Relays {
    fn cut(&self, from: u64, to: u64) -> Result<(), Unavailable> {
        self.set(from, to, Fate::Waits);
        Ok(())
    }

    fn lose(&self, percent: u64) -> Result<(), Unavailable> {
        lock(&self.shared.fates).loses = percent;
        Ok(())
    }

    fn reset(&self, from: u64, to: u64) -> Result<(), Unavailable> {
        self.set(from, to, Fate::Resets);
        Ok(())
    }

    fn mend(&self) -> Result<(), Unavailable> {
        let mut fates = lock(&self.shared.fates);
        fates.of.clear();
        fates.loses = 0;
        Ok(())
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        // Whoever waits for a call gets one.
        for port in &self.ports {
            drop(TcpStream::connect((Ipv4Addr::LOCALHOST, *port)));
        }
    }
}

impl Shared {
    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// One connection, both ways, until an end of it closes or is reset.
    fn hand_on(self: &Arc<Shared>, call: TcpStream, own: u16, to: u64, target: u16) {
        // Only nodes call here: one that is not recognised calls again.
        let port = call.peer_addr().map_or(0, |peer| peer.port());
        let Some(from) = (self.who)(port, own) else { return };
        let called = Instant::now();
        // Who had to wait for so long has given up, and called again.
        if !self.passes(from, to) || called.elapsed() > CALL {
            return;
        }
        let Ok(other) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { return };
        let (Ok(call_again), Ok(other_again)) = (call.try_clone(), other.try_clone()) else { return };
        let back = self.clone();
        let back = std::thread::spawn(move || back.pump(other_again, call_again, to, from));
        self.pump(call, other, from, to);
        drop(back.join());
    }

    /// Hands on what one end sends the other.
    fn pump(&self, mut from: TcpStream, mut to: TcpStream, sender: u64, receiver: u64) {
        let mut piece = [0; 16 << 10];
        if [&from, &to].iter().all(|end| end.set_nodelay(true).is_ok())
            && from.set_read_timeout(Some(LOOK)).is_ok()
        {
            loop {
                let count = match from.read(&mut piece) {
                    Ok(count) => count,
                    Err(e) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&e.kind()) => {
                        if self.has_ended() || self.fate(sender, receiver) == Some(Fate::Resets) {
                            break;
                        }
                        continue;
                    }
                    Err(_) => 0,
                };
                // Nor is the end of a connection heard of through a link that is cut.
                if !self.passes(sender, receiver) || count == 0 {
                    break;
                }
                if to.write_all(&piece[..count]).is_err() {
                    self.passes(receiver, sender);
                    break;
                }
            }
        }
        for end in [from, to] {
            drop(end.shutdown(Shutdown::Both));
        }
    }

    fn fate(&self, from: u64, to: u64) -> Option<Fate> {
        lock(&self.fates).of.get(&(from, to)).copied()
    }

    /// Waits until the link lets a piece pass. False if its connection is reset.
    fn passes(&self, from: u64, to: u64) -> bool {
        let is_lost = {
            let mut fates = lock(&self.fates);
            let loses = fates.loses;
            loses > 0 && fates.random.percent(loses)
        };
        if is_lost {
            std::thread::sleep(SENT_AGAIN);
        }
        loop {
            match self.fate(from, to) {
                None => return true,
                Some(Fate::Resets) => return false,
                Some(Fate::Waits) if self.has_ended() => return false,
                Some(Fate::Waits) => std::thread::sleep(LOOK),
            }
        }
    }
}

/// The node that has the end `port` of a connection to our port `own`.
fn caller(dir: &Path, port: u16, own: u16) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let inode = inode(&text, port, own)?;
    let socket = PathBuf::from(format!("socket:[{inode}]"));
    let processes = std::fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    processes.filter(|process| has_open(process, &socket)).find_map(|process| {
        let words = std::fs::read(process.join("cmdline")).ok()?;
        let words: Vec<&[u8]> = words.split(|octet| *octet == 0).collect();
        words.iter().find_map(|word| {
            let file = Path::new(std::str::from_utf8(word).ok()?).strip_prefix(dir).ok()?;
            file.to_str()?.strip_prefix("node-")?.strip_suffix(".toml")?.parse().ok()
        })
    })
}

/// The socket that is bound to a port of loopback and connected to another one there (proc_net(5)).
fn inode(table: &str, port: u16, to: u16) -> Option<&str> {
    let (local, remote) = (format!("0100007F:{port:04X}"), format!("0100007F:{to:04X}"));
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(1) == Some(&local.as_str()) && fields.get(2) == Some(&remote.as_str());
        fields.get(9).copied().filter(|_| is_it)
    })
}

fn has_open(process: &Path, socket: &Path) -> bool {
    let files = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|open| open == socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relays by which node 1 calls node 2, both ends of a connection, and the listener.
    fn linked() -> (Relays, TcpStream, TcpStream, TcpListener) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let target = listener.local_addr().unwrap().port();
        let relays = Relays::with(&[(2, 0, target)], 7, Box::new(|_, _| Some(1))).unwrap();
        let call = TcpStream::connect((Ipv4Addr::LOCALHOST, relays.ports[0])).unwrap();
        let (taken, _) = listener.accept().unwrap();
        for end in [&call, &taken] {
            end.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        }
        (relays, call, taken, listener)
    }

    fn reads(end: &mut TcpStream) -> Option<u8> {
        let mut octet = [0];
        end.read_exact(&mut octet).ok().map(|()| octet[0])
    }

    #[test]
    fn what_is_cut_waits_in_one_direction() {
        let (relays, mut one, mut two, _listener) = linked();
        one.write_all(&[1]).unwrap();
        assert_eq!(reads(&mut two), Some(1));
        relays.cut(1, 2).unwrap();
        one.write_all(&[2]).unwrap();
        assert_eq!(reads(&mut two), None, "a link that is cut");
        two.write_all(&[3]).unwrap();
        assert_eq!(reads(&mut one), Some(3), "the other direction");
        relays.mend().unwrap();
        assert_eq!(reads(&mut two), Some(2), "what waited comes");
    }

    #[test]
    fn an_end_is_not_heard_of_through_a_link_that_is_cut() {
        let (relays, one, mut two, _listener) = linked();
        relays.cut(1, 2).unwrap();
        drop(one);
        let waited = two.read(&mut [0]).map_err(|e| e.kind());
        assert_eq!(waited, Err(ErrorKind::WouldBlock));
        relays.mend().unwrap();
        assert_eq!(two.read(&mut [0]).ok(), Some(0));
    }

    #[test]
    fn who_is_cut_off_by_its_end_hears_of_it_and_may_call_again() {
        let (relays, mut one, _two, _listener) = linked();
        relays.reset(1, 2).unwrap();
        assert_eq!(one.read(&mut [0]).ok(), Some(0));
        let mut again = TcpStream::connect((Ipv4Addr::LOCALHOST, relays.ports[0])).unwrap();
        again.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(again.read(&mut [0]), Ok(0) | Err(_)), "nor is a new one taken");
        relays.mend().unwrap();
        let mut mended = TcpStream::connect((Ipv4Addr::LOCALHOST, relays.ports[0])).unwrap();
        mended.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert_eq!(mended.read(&mut [0]).map_err(|e| e.kind()), Err(ErrorKind::WouldBlock), "it stands");
    }

    #[test]
    fn what_is_lost_comes_later() {
        let (relays, mut one, mut two, _listener) = linked();
        relays.lose(100).unwrap();
        let began = Instant::now();
        one.write_all(&[1]).unwrap();
        assert_eq!((reads(&mut two), began.elapsed() >= SENT_AGAIN), (Some(1), true));
    }

    #[test]
    fn the_caller_is_whoever_has_its_socket_open() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:5DC1 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 111 1\n   \
                     1: 0100007F:C350 0100007F:5DC1 01 00000000:00000000 00:00000000 00000000     0        0 222 1\n";
        assert_eq!(inode(table, 50_000, 24_001), Some("222"));
        assert_eq!(inode(table, 50_001, 24_001), None);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let call = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (own, called) = (call.local_addr().unwrap().port(), listener.local_addr().unwrap().port());
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let socket = PathBuf::from(format!("socket:[{}]", inode(&table, own, called).unwrap()));
        assert!(has_open(Path::new("/proc/self"), &socket));
        assert_eq!(caller(Path::new("/"), own, called), None, "this process is no node");
    }
}
