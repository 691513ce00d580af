//! A message that is coming in: read off its connection, cut into pieces that are replicated while more comes, bounded in memory, and
//! judged at its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::connection::{Client, Shared};
use super::intake::{Intake, Verdict, reply};
use super::session::Transaction;
use super::trace::{self, Trace};
use crate::clock;
use crate::queue::command::PieceRef;
use crate::queue::message::MessageId;
use crate::smtp::reply::Reply;
use crate::smtp::{chunk, data};

/// Octets of a message in one entry; a longer one goes in pieces.
const PIECE_BYTES: usize = holdfast_cluster::BODY_BYTES_MAX;
/// Pieces of one message that are being replicated at the same time.
const PIECES_IN_FLIGHT_MAX: usize = 4;
/// What a session takes from the memory for messages at a time.
const MEMORY_STEP_BYTES: usize = 32 << 10;
/// How long a message waits for memory without getting on before it is refused with 452. Not for each step of it: messages that
/// hold some and wait for more would keep each other waiting for as many times as there are steps.
const MEMORY_WAIT: Duration = Duration::from_secs(10);
/// More `Received` headers than this mean a loop (RFC 5321 §6.3).
const HOPS_MAX: usize = 100;
/// A client that sends data more slowly than this, after the time it may be silent, is let go.
const BYTES_PER_SECOND_MIN: u64 = 1024;

/// Whether so many octets since then are fewer than a client has to send.
pub(super) fn is_too_slow(began: Instant, octets: u64, idle_timeout: Duration) -> bool {
    let patience = idle_timeout + Duration::from_secs(octets / BYTES_PER_SECOND_MIN);
    clock::now().saturating_duration_since(began) > patience
}

/// Memory that a message under way holds, in steps.
#[derive(Default)]
struct Held {
    permits: Vec<OwnedSemaphorePermit>,
    /// How long it has waited for them since it last got a piece replicated.
    waited: Duration,
}

impl Held {
    fn bytes(&self) -> usize {
        self.permits.len() * MEMORY_STEP_BYTES
    }

    /// Gives back what is more than needed.
    fn shrink_to(&mut self, bytes: usize) {
        self.permits.truncate(bytes.div_ceil(MEMORY_STEP_BYTES));
    }
}

/// How its end is told.
enum Framing {
    /// By a line with nothing but a dot.
    Dot(data::Decoder),
    /// By counting.
    Chunks(chunk::Reader),
}

impl Framing {
    fn read(&mut self, buffer: &mut BytesMut, out: &mut Vec<u8>) -> bool {
        let (is_over, used) = match self {
            Framing::Dot(decoder) => decoder.read(buffer, out),
            Framing::Chunks(reader) => reader.read(buffer, out),
        };
        drop(buffer.split_to(used));
        is_over
    }

    fn has_bare_line_end(&self) -> bool {
        match self {
            Framing::Dot(decoder) => decoder.has_bare_line_end(),
            Framing::Chunks(reader) => reader.has_bare_line_end(),
        }
    }

    fn has_nul(&self) -> bool {
        match self {
            Framing::Dot(decoder) => decoder.has_nul(),
            Framing::Chunks(reader) => reader.has_nul(),
        }
    }
}

/// What came of it.
pub(super) enum Received {
    /// More chunks come.
    Part,
    Whole {
        id: MessageId,
        body: Bytes,
        pieces: Vec<PieceRef>,
        size: u64,
        message_id: String,
    },
    Refused(Reply),
}

/// A message that is coming in. One that is dropped before the queue was asked to accept it leaves nothing behind.
pub(super) struct Incoming {
    intake: Arc<Intake>,
    began: Instant,
    framing: Framing,
    /// Given when the first octets are replicated, since an id must not be old when it is proposed.
    id: Option<MessageId>,
    /// The trace header, once the id is known.
    header: Box<dyn Fn(MessageId) -> String + Send>,
    /// Octets that are not yet in a piece.
    octets: Vec<u8>,
    /// Octets of the message so far, the trace header included once it stands.
    size: u64,
    header_bytes: u64,
    /// Pieces that were sent to be replicated.
    seq: u32,
    pieces: Vec<PieceRef>,
    refused: Option<Reply>,
    held: Held,
    hops: usize,
    message_id: Option<String>,
}

impl Incoming {
    /// One that comes after `DATA`.
    pub(super) fn data(shared: &Shared, client: &Client, transaction: &Transaction) -> Incoming {
        Incoming::new(shared, client, transaction, Framing::Dot(data::Decoder::default()))
    }

    /// One that comes in chunks.
    pub(super) fn chunks(shared: &Shared, client: &Client, transaction: &Transaction) -> Incoming {
        Incoming::new(shared, client, transaction, Framing::Chunks(chunk::Reader::default()))
    }

    fn new(shared: &Shared, client: &Client, transaction: &Transaction, framing: Framing) -> Incoming {
        let only = match &transaction.recipients[..] {
            [(one, _)] => Some(one.to_string()),
            _ => None,
        };
        let (settings, tls, address) = (shared.settings.clone(), client.tls.clone(), client.peer.ip());
        let helo = transaction.helo.clone();
        let header = move |id| {
            trace::received(&Trace {
                helo: &helo.0,
                client: address,
                hostname: &settings.hostname,
                extended: helo.1,
                tls: tls.as_deref(),
                id,
                recipient: only.as_deref(),
                date: &clock::rfc5322(clock::unix_s()),
            })
        };
        let declared = transaction.size.unwrap_or(0).min(PIECE_BYTES as u64) as usize;
        Incoming {
            intake: shared.intake.clone(),
            began: clock::now(),
            framing,
            id: None,
            header: Box::new(header),
            octets: Vec::with_capacity(declared + 512),
            size: 0,
            header_bytes: 0,
            seq: 0,
            pieces: Vec::new(),
            refused: None,
            held: Held::default(),
            hops: 0,
            message_id: None,
        }
    }

    /// Gives the message its id, and puts the trace header before its first octets.
    fn begin(&mut self, shared: &Shared) -> MessageId {
        if let Some(id) = self.id {
            return id;
        }
        let id = shared.intake.new_id();
        let header = (self.header)(id);
        self.header_bytes = header.len() as u64;
        self.size += self.header_bytes;
        self.octets.splice(0..0, header.bytes());
        self.id = Some(id);
        id
    }

    /// Whether it has come more slowly than a message may; what it holds others wait for.
    pub(super) fn is_too_slow(&self, idle_timeout: Duration) -> bool {
        is_too_slow(self.began, self.size, idle_timeout)
    }

    /// Reads the next chunk, of so many octets; the message ends with the last one.
    ///
    /// # Errors
    /// If the client is gone or too slow.
    pub(super) async fn chunk(
        &mut self,
        shared: &Shared,
        client: &mut Client,
        octets: u64,
        last: bool,
    ) -> Result<Received, String> {
        if let Framing::Chunks(reader) = &mut self.framing {
            reader.begin(octets);
        }
        self.receive(shared, client, last).await
    }

    /// Reads up to the end of the data, or of the chunk.
    ///
    /// # Errors
    /// If the client is gone or too slow.
    pub(super) async fn receive(
        &mut self,
        shared: &Shared,
        client: &mut Client,
        last: bool,
    ) -> Result<Received, String> {
        let mut in_flight = FuturesOrdered::new();
        loop {
            if self.is_too_slow(shared.idle_timeout) {
                return Err("data comes too slowly".into());
            }
            let before = self.octets.len();
            let is_over = self.framing.read(&mut client.buffer, &mut self.octets);
            self.size += (self.octets.len() - before) as u64;
            self.limit(shared, &mut in_flight).await;
            if is_over && last || self.octets.len() > PIECE_BYTES {
                self.look();
                self.begin(shared); // the trace header counts before the message is cut
            }
            while self.octets.len() > PIECE_BYTES && self.refused.is_none() {
                if in_flight.len() >= PIECES_IN_FLIGHT_MAX {
                    let sent = in_flight.next().await.expect("not empty");
                    self.note_piece(sent);
                    continue;
                }
                let id = self.begin(shared);
                let rest = self.octets.split_off(PIECE_BYTES);
                let piece = Bytes::from(std::mem::replace(&mut self.octets, rest));
                in_flight.push_back(shared.intake.piece(id, self.seq, piece));
                self.seq += 1;
            }
            if is_over {
                break;
            }
            tokio::select! {
                biased;
                Some(sent) = in_flight.next(), if !in_flight.is_empty() => self.note_piece(sent),
                more = timeout(shared.idle_timeout, client.fill()) => {
                    more.map_err(|_| "silent within data")??;
                }
            }
        }
        if last {
            self.judge();
            let id = self.begin(shared);
            if self.refused.is_none() && self.seq > 0 {
                let rest = Bytes::from(std::mem::take(&mut self.octets));
                in_flight.push_back(shared.intake.piece(id, self.seq, rest));
                self.seq += 1;
            }
        }
        while let Some(sent) = in_flight.next().await {
            self.note_piece(sent);
        }
        if let Some(reply) = self.refused.take() {
            return Ok(Received::Refused(reply));
        }
        if !last {
            self.held.shrink_to(self.octets.len()); // it may be long until the next one
            return Ok(Received::Part);
        }
        Ok(Received::Whole {
            id: self.begin(shared),
            body: std::mem::take(&mut self.octets).into(),
            pieces: std::mem::take(&mut self.pieces),
            size: self.size,
            message_id: self.message_id.take().unwrap_or_default(),
        })
    }

    /// The queue is asked to accept it: that decides what becomes of its pieces.
    pub(super) fn handed_on(&mut self) {
        self.seq = 0;
    }

    fn note_piece(&mut self, sent: Result<PieceRef, Verdict>) {
        match sent {
            Ok(piece) => self.pieces.push(piece),
            Err(verdict) => {
                self.refused = self.refused.take().or(reply(&verdict, self.id.unwrap_or(MessageId(0))))
            }
        }
    }

    /// Looks at the header in the first octets: how often it was relayed, and its id for the log.
    fn look(&mut self) {
        if self.message_id.is_none() {
            let window = &self.octets[..self.octets.len().min(PIECE_BYTES)];
            self.hops = trace::hops(window);
            self.message_id = Some(trace::message_id(window));
        }
    }

    /// Refuses what is too big or finds no memory; the rest of the data is then read and dropped.
    /// Pieces count until they are replicated.
    async fn limit<Sent>(&mut self, shared: &Shared, in_flight: &mut FuturesOrdered<Sent>)
    where
        Sent: Future<Output = Result<PieceRef, Verdict>>,
    {
        if self.size - self.header_bytes > shared.settings.message_bytes_max {
            self.refuse(552, "5.3.4", "Error: message too big");
        }
        loop {
            if self.refused.is_some() {
                self.octets.clear();
            }
            let needed = self.octets.len().min(2 * PIECE_BYTES) + in_flight.len() * PIECE_BYTES;
            self.held.shrink_to(needed);
            if self.held.bytes() >= needed || self.refused.is_some() {
                return;
            }
            let step = shared.intake.memory().acquire_many_owned((MEMORY_STEP_BYTES >> 10) as u32);
            let (since, patience) = (clock::now(), MEMORY_WAIT.saturating_sub(self.held.waited));
            let before = in_flight.len();
            // Own pieces go on meanwhile: what they hold may be what is waited for.
            tokio::select! {
                biased;
                Some(sent) = in_flight.next(), if !in_flight.is_empty() => self.note_piece(sent),
                step = timeout(patience, step) => match step {
                    Ok(Ok(permit)) => self.held.permits.push(permit),
                    _ => self.refuse(452, "4.3.1", "Error: no room, try again later"),
                },
            }
            // One that gets pieces replicated goes on; it gives back what it holds and waits anew.
            self.held.waited = match in_flight.len() < before {
                true => Duration::ZERO,
                false => self.held.waited + clock::now().duration_since(since),
            };
        }
    }

    fn refuse(&mut self, code: u16, enhanced: &str, text: &str) {
        self.refused.get_or_insert(Reply::new(code, enhanced, text));
    }

    fn judge(&mut self) {
        self.look();
        if self.framing.has_bare_line_end() {
            self.refuse(550, "5.6.0", "Error: a bare CR or LF in the message");
        } else if self.framing.has_nul() {
            self.refuse(550, "5.6.0", "Error: a NUL in the message");
        } else if self.hops > HOPS_MAX {
            self.refuse(554, "5.4.6", "Error: too many hops");
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(id) = self.id.filter(|_| self.seq > 0) {
            let intake = self.intake.clone();
            tokio::spawn(async move { intake.abandon(id).await });
        }
    }
}
