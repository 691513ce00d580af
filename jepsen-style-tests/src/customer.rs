//! A scripted destination: how it behaves is chosen by the recipient's local part, as in KumoMTA's tests.
//!
//! | local part begins with | behaviour |
//! | --- | --- |
//! | `bounce` | 550 at RCPT |
//! | `defer` | 450 at RCPT for the first two tries |
//! | `late` | 451 after the dot for the first try |
//! | `no` | 554 after the dot |
//! | `drop` | closes after the dot without a reply, once |
//! | `reset` | the same, with a reset (RST) |
//! | `stall` | takes it, and says so some seconds later |
//! | `slow` | reads it slowly |
//! | anything else | takes it |
//!
//! Every other connection is offered CHUNKING (RFC 3030).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::history::Taken;
use crate::tools::lock;

/// How long one that stalls waits with its reply to the final dot.
const STALL: Duration = Duration::from_secs(4);
/// A slow one reads so many octets, and then nothing for so long; in all it does not take longer than some seconds.
const SIP: usize = 4096;
const PAUSE: Duration = Duration::from_millis(20);
const SIPS_MAX: usize = 150;

/// What it does about chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// It offers to take them, and does.
    Taken,
    /// It does not offer it.
    NotOffered,
    /// It offers to take them, and knows no such command.
    Unknown,
}

#[derive(Default)]
struct Shared {
    chunks: Mutex<Option<Chunks>>,
    taken: Mutex<Vec<(Instant, Taken)>>,
    unanswered: Mutex<Vec<(Instant, String)>>,
    tries: Mutex<BTreeMap<String, usize>>,
    down: AtomicBool,
    connections: AtomicUsize,
    commands: Mutex<Vec<String>>,
}

/// A customer's server on a port of its own.
pub struct Customer {
    address: String,
    shared: Arc<Shared>,
}

impl Customer {
    /// Starts it.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start() -> Customer {
        Customer::start_at("127.0.0.1:0")
    }

    /// Starts it at an address.
    ///
    /// # Panics
    /// If that is not free.
    pub fn start_at(address: &str) -> Customer {
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let shared = Arc::new(Shared::default());
        let for_thread = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = for_thread.clone();
                if shared.down.load(Ordering::SeqCst) {
                    continue; // closed at once, without a greeting
                }
                let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                let every_other = if number.is_multiple_of(2) { Chunks::Taken } else { Chunks::NotOffered };
                let chunks = lock(&shared.chunks).unwrap_or(every_other);
                std::thread::spawn(move || drop(serve(stream, &shared, chunks)));
            }
        });
        Customer { address, shared }
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// While down it closes every connection at once.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
    }

    /// What it does about chunks on each connection from now on.
    pub fn set_chunks(&self, chunks: Chunks) {
        *lock(&self.shared.chunks) = Some(chunks);
    }

    /// Copies taken so far.
    pub fn taken(&self) -> Vec<Taken> {
        lock(&self.shared.taken).iter().map(|(_, taken)| taken.clone()).collect()
    }

    /// Copies taken since this was last asked, with when; they are not told again.
    pub fn drain(&self) -> Vec<(Instant, Taken)> {
        std::mem::take(&mut *lock(&self.shared.taken))
    }

    /// First recipients of copies that were here whole and to which nothing was said, with when; they are not told again.
    pub(crate) fn drain_unanswered(&self) -> Vec<(Instant, String)> {
        std::mem::take(&mut *lock(&self.shared.unanswered))
    }

    /// How many copies were taken.
    pub fn count(&self) -> usize {
        lock(&self.shared.taken).len()
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// All command lines so far.
    pub fn commands(&self) -> Vec<String> {
        lock(&self.shared.commands).clone()
    }
}

fn tried(shared: &Shared, recipient: &str) -> usize {
    let mut tries = lock(&shared.tries);
    let count = tries.entry(recipient.into()).or_default();
    *count += 1;
    *count
}

fn serve(stream: TcpStream, shared: &Shared, chunks: Chunks) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut recipients: Vec<String> = Vec::new();
    let mut parts = Vec::new();
    writer.write_all(b"220 customer.test.example ESMTP\r\n")?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || shared.down.load(Ordering::SeqCst) {
            return Ok(());
        }
        lock(&shared.commands).push(line.trim_end().to_string());
        let verb: String = line.chars().take(4).collect::<String>().to_ascii_uppercase();
        let reply = match verb.as_str() {
            "EHLO" if chunks == Chunks::NotOffered => {
                "250-customer.test.example\r\n250-PIPELINING\r\n250-SIZE 60000000\r\n250 8BITMIME\r\n"
            }
            "EHLO" => {
                "250-customer.test.example\r\n250-PIPELINING\r\n250-SIZE 60000000\r\n250-8BITMIME\r\n250 CHUNKING\r\n"
            }
            "MAIL" | "RSET" => {
                recipients.clear();
                parts.clear();
                "250 2.1.0 ok\r\n"
            }
            "RCPT" => {
                let local = line.split(['<', '@']).nth(1).unwrap_or("").to_string();
                if local.starts_with("bounce") {
                    "550 5.1.1 no such user here\r\n"
                } else if local.starts_with("defer") && tried(shared, &local) <= 2 {
                    "450 4.2.1 not now\r\n"
                } else {
                    recipients.push(local);
                    "250 2.1.5 ok\r\n"
                }
            }
            "DATA" if recipients.is_empty() => "554 5.5.1 no recipients\r\n",
            "DATA" => {
                writer.write_all(b"354 go on\r\n")?;
                let octets = data(&mut slowed(&mut reader, &recipients))?;
                match take(shared, &mut recipients, octets) {
                    Some(reply) => reply,
                    None => return end(reader.get_ref(), &recipients),
                }
            }
            "BDAT" if chunks == Chunks::Taken => {
                let mut words = line.split_whitespace().skip(1);
                let length: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
                // It may be longer than anybody means to send.
                let came = slowed(&mut reader, &recipients).take(length).read_to_end(&mut parts)?;
                if (came as u64) < length {
                    return Ok(());
                }
                match words.next() {
                    _ if recipients.is_empty() => "554 5.5.1 no recipients\r\n",
                    None => "250 2.0.0 go on\r\n",
                    Some(_) => match take(shared, &mut recipients, std::mem::take(&mut parts)) {
                        Some(reply) => reply,
                        None => return end(reader.get_ref(), &recipients),
                    },
                }
            }
            "QUIT" => {
                writer.write_all(b"221 2.0.0 bye\r\n")?;
                return Ok(());
            }
            _ => "500 5.5.2 what?\r\n",
        };
        writer.write_all(reply.as_bytes())?;
    }
}

/// All of a message is here: what is said to it. Nothing if the connection is to end without a word.
fn take(shared: &Shared, recipients: &mut Vec<String>, octets: Vec<u8>) -> Option<&'static str> {
    let first = recipients[0].clone();
    if ["drop", "reset"].iter().any(|kind| first.starts_with(kind)) && tried(shared, &first) <= 1 {
        lock(&shared.unanswered).push((Instant::now(), first));
        return None;
    }
    if first.starts_with("late") && tried(shared, &first) <= 1 {
        Some("451 4.3.0 try again\r\n")
    } else if first.starts_with("no") {
        Some("554 5.7.1 not wanted\r\n")
    } else {
        let mut taken = lock(&shared.taken);
        let now = Instant::now();
        let copies = recipients.drain(..);
        taken.extend(copies.map(|recipient| (now, Taken::new(recipient, octets.clone()))));
        drop(taken);
        if first.starts_with("stall") {
            std::thread::sleep(STALL);
        }
        Some("250 2.0.0 taken\r\n")
    }
}

/// Ends a connection without a word, as the first recipient wants it.
fn end(stream: &TcpStream, recipients: &[String]) -> std::io::Result<()> {
    if recipients.first().is_some_and(|first| first.starts_with("reset")) {
        socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

/// A message for recipients of which the first reads slowly, or does not.
fn slowed<'a>(reader: &'a mut BufReader<TcpStream>, recipients: &[String]) -> Slowed<'a> {
    let is_slow = recipients.first().is_some_and(|first| first.starts_with("slow"));
    Slowed { reader, until_pause: SIP, pauses: if is_slow { SIPS_MAX } else { 0 } }
}

struct Slowed<'a> {
    reader: &'a mut BufReader<TcpStream>,
    until_pause: usize,
    pauses: usize,
}

impl Read for Slowed<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.until_pause == 0 && self.pauses > 0 {
            (self.until_pause, self.pauses) = (SIP, self.pauses - 1);
            std::thread::sleep(PAUSE);
        }
        let most = if self.pauses > 0 { into.len().min(self.until_pause) } else { into.len() };
        let came = self.reader.read(&mut into[..most])?;
        self.until_pause = self.until_pause.saturating_sub(came);
        Ok(came)
    }
}

/// Reads data octet by octet, so that it shares no cleverness with the product: lines end with CR LF, one leading dot goes.
fn data(reader: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut octets = Vec::new();
    let mut line = Vec::new();
    let mut one = [0u8; 1];
    loop {
        reader.read_exact(&mut one)?;
        line.push(one[0]);
        if line.ends_with(b"\r\n") {
            if line == b".\r\n" {
                return Ok(octets);
            }
            octets.extend_from_slice(line.strip_prefix(b".").unwrap_or(&line));
            line.clear();
        }
    }
}
