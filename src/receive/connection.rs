//! One client's connection: reads lines and data, asks the session what to answer, and does what it says.
//!
//! Bounded: a line, 256 KiB of a message's octets beside what is being replicated, the time a client may be silent. A client
//! that dies before the reply to its data leaves nothing queued; its pieces are withdrawn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::Instrument;

use super::intake::{Intake, Verdict, reply};
use super::policy::{self, Network, Refusal, Right};
use super::session::{Action, Session, Settings, Transaction, World};
use super::trace::{self, Trace};
use crate::clock;
use crate::maillog::{MailLog, Service, clean};
use crate::pki;
use crate::queue::command::PieceRef;
use crate::queue::message::{Envelope, MessageId, Recipient};
use crate::smtp::command::LINE_BYTES_MAX;
use crate::smtp::data::Decoder;
use crate::smtp::reply::Reply;

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
/// Shaking hands and sending replies.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// What all sessions of a listener share.
pub struct Shared {
    /// The session's settings.
    pub settings: Arc<Settings>,
    /// Networks that may relay.
    pub relay_networks: Vec<Network>,
    /// Load balancers, whose connections begin with a PROXY header.
    pub proxy_from: Vec<Network>,
    /// For STARTTLS, if there is a certificate.
    pub tls: Option<TlsAcceptor>,
    /// Whether TLS begins with the first octet.
    pub implicit_tls: bool,
    /// Where messages go.
    pub intake: Arc<Intake>,
    /// The log.
    pub log: Arc<MailLog>,
    /// How long a client may be silent.
    pub idle_timeout: Duration,
    /// True once the node is going down.
    pub draining: watch::Receiver<bool>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection and what is known of its client.
struct Client {
    stream: Box<dyn Stream>,
    buffer: BytesMut,
    peer: SocketAddr,
    /// Whether the peer's network may give it rights; not that of a load balancer which does not say for whom it speaks.
    is_named: bool,
    /// The session's number in the log.
    number: u64,
    tls: Option<String>,
}

struct Here<'a> {
    shared: &'a Shared,
    peer: SocketAddr,
    is_named: bool,
}

impl World for Here<'_> {
    fn recipient(&self, domain: &str) -> Result<Right, Refusal> {
        // Asked before the look, and judged after it: meanwhile a route may come, and this process be stopped.
        let complete = self.shared.intake.routes_complete_as_of();
        let routed = {
            let queue = self.shared.intake.queue();
            queue.route(domain).is_some_and(|(name, entry)| name != "*" && entry.route.is_some())
        };
        let networks = if self.is_named { self.shared.relay_networks.as_slice() } else { &[] };
        policy::recipient(self.peer.ip(), networks, routed, Intake::is_recent(complete))
    }

    fn not_accepting(&self) -> Option<Reply> {
        self.shared.intake.not_accepting().map(|(_, reply)| reply)
    }
}

/// Why a connection ended, for the debug log; none of it is an error of ours.
type Ended = Result<(), String>;

/// Serves one client to the end. `is_named` is false for a load balancer that speaks for nobody: its own address gives it no rights.
pub async fn serve(
    shared: Arc<Shared>,
    stream: holdfast_cluster::net::Stream,
    peer: SocketAddr,
    is_named: bool,
    number: u64,
) {
    let who = format!("unknown[{}]", peer.ip());
    shared.log.line(number, Service::Smtpd, format!("connect from {who}"));
    if let Err(e) = stream.set_nodelay() {
        tracing::debug!(error = %e, "TCP_NODELAY");
    }
    let client =
        Client { stream: Box::new(stream), buffer: BytesMut::new(), peer, is_named, number, tls: None };
    match converse(&shared, client).await {
        Ok(()) => {}
        Err(why) => {
            tracing::debug!(%peer, why, "session ended");
            shared.log.line(number, Service::Smtpd, format!("lost connection from {who}"));
        }
    }
    shared.log.line(number, Service::Smtpd, format!("disconnect from {who}"));
}

async fn converse(shared: &Shared, mut client: Client) -> Ended {
    let acceptor = shared.tls.as_ref();
    if shared.implicit_tls {
        client = client.encrypt(shared, acceptor.ok_or("no certificate")?).await?;
    }
    let (mut session, greeting) = Session::new(shared.settings.clone(), shared.implicit_tls);
    client.send(&[greeting]).await?;
    let mut draining = shared.draining.clone();
    let mut replies = Vec::new();
    loop {
        let line = match client.take_line() {
            Some(line) => line,
            None => {
                // Replies to pipelined commands go out together (RFC 2920 §3.2).
                client.send(&std::mem::take(&mut replies)).await?;
                tokio::select! {
                    biased;
                    () = async { drop(draining.wait_for(|down| *down).await) } => {
                        let text = format!("{} Service shutting down", shared.settings.hostname);
                        return client.send(&[Reply::new(421, "4.3.2", &text)]).await;
                    }
                    more = timeout(shared.idle_timeout, client.fill()) => match more {
                        Ok(more) => more?,
                        Err(_) => {
                            let text = format!("{} Error: timeout exceeded", shared.settings.hostname);
                            return client.send(&[Reply::new(421, "4.4.2", &text)]).await;
                        }
                    },
                }
                continue;
            }
        };
        let (reply, action) = match &line {
            Line::Whole(line) => {
                session.line(line, &Here { shared, peer: client.peer, is_named: client.is_named })
            }
            Line::TooLong => session.bad_line("Error: line too long"),
            Line::BareLf => session.bad_line("Error: a line must end with CR LF"),
        };
        if reply.code() >= 400
            && let Line::Whole(line) = &line
        {
            log_refusal(shared, &client, &session, line, &reply);
        }
        replies.push(reply);
        match action {
            Action::Continue => {}
            Action::Close => return client.send(&replies).await,
            Action::StartTls => {
                client.send(&std::mem::take(&mut replies)).await?;
                client.buffer.clear(); // what was sent before the handshake is forgotten (RFC 3207 §4.2)
                client = client.encrypt(shared, acceptor.ok_or("no certificate")?).await?;
                session = session.encrypted();
            }
            Action::Data(transaction) => {
                client.send(&std::mem::take(&mut replies)).await?;
                match data(shared, &mut client, transaction).await? {
                    Some(reply) => {
                        if reply.code() >= 500 {
                            session.note_error();
                        }
                        replies.push(reply);
                    }
                    None => return Ok(()), // nothing can be said: close
                }
            }
        }
    }
}

fn log_refusal(shared: &Shared, client: &Client, session: &Session, line: &[u8], reply: &Reply) {
    let verb: String = line.iter().take_while(|b| b.is_ascii_alphabetic()).map(|b| *b as char).collect();
    let verb = verb.to_ascii_uppercase();
    if !matches!(verb.as_str(), "RCPT" | "MAIL" | "DATA") {
        return;
    }
    let argument = String::from_utf8_lossy(line);
    let to = argument.split_once('<').and_then(|(_, r)| r.split_once('>')).map_or("", |(path, _)| path);
    let (from, to) = match verb.as_str() {
        "MAIL" => (to.to_string(), String::new()),
        _ => (session.sender().to_string(), to.to_string()),
    };
    let text = format!(
        "NOQUEUE: reject: {verb} from unknown[{}]: {} {}; from=<{}> to=<{}> proto={} helo=<{}>",
        client.peer.ip(),
        reply.code(),
        clean(reply.text()),
        clean(&from),
        clean(&to),
        if session.is_encrypted() { "ESMTPS" } else { "ESMTP" },
        clean(session.helo()),
    );
    shared.log.line(client.number, Service::Smtpd, text);
}

enum Line {
    Whole(Bytes),
    TooLong,
    BareLf,
}

impl Client {
    async fn fill(&mut self) -> Ended {
        self.buffer.reserve(16 << 10);
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err("closed by the client".into()),
            Ok(_) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }

    /// Takes a line off the buffer. Only CR LF ends one; a line that is too long is dropped up to its end.
    fn take_line(&mut self) -> Option<Line> {
        match memchr::memchr(b'\n', &self.buffer) {
            Some(end) => {
                let line = self.buffer.split_to(end + 1).freeze();
                Some(match line.strip_suffix(b"\r\n") {
                    _ if line.len() > LINE_BYTES_MAX => Line::TooLong,
                    Some(text) => Line::Whole(line.slice_ref(text)),
                    None => Line::BareLf,
                })
            }
            None if self.buffer.len() > LINE_BYTES_MAX => {
                // Keep one octet more than a line may have, so that its end is still seen as that of a long line.
                let excess = self.buffer.len() - LINE_BYTES_MAX;
                drop(self.buffer.split_to(excess - 1));
                None
            }
            None => None,
        }
    }

    async fn send(&mut self, replies: &[Reply]) -> Ended {
        if replies.is_empty() {
            return Ok(());
        }
        let mut out = String::new();
        replies.iter().for_each(|reply| reply.write(&mut out));
        let sent = async {
            self.stream.write_all(out.as_bytes()).await?;
            self.stream.flush().await
        };
        timeout(HANDSHAKE, sent).await.map_err(|_| "the client reads no replies")?.map_err(|e| e.to_string())
    }

    async fn encrypt(self, shared: &Shared, acceptor: &TlsAcceptor) -> Result<Client, String> {
        let handshake = timeout(HANDSHAKE, acceptor.accept(self.stream)).await;
        let stream = handshake.map_err(|_| "TLS handshake timed out")?.map_err(|e| format!("TLS: {e}"))?;
        let tls = pki::session_text(stream.get_ref().1);
        let text = format!("Anonymous TLS connection established from unknown[{}]: {tls}", self.peer.ip());
        shared.log.line(self.number, Service::Smtpd, text);
        Ok(Client { stream: Box::new(stream), buffer: BytesMut::new(), tls: Some(tls), ..self })
    }
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

/// Reads a message's data to its end and has it accepted. The reply, or `None` if nothing can be said.
async fn data(
    shared: &Shared,
    client: &mut Client,
    transaction: Transaction,
) -> Result<Option<Reply>, String> {
    let mut message = Incoming::new(shared, client, &transaction);
    let result = message.receive(shared, client).await;
    let Incoming { seq, id, .. } = message;
    let abandon = || {
        if let Some(id) = id.filter(|_| seq > 0) {
            let intake = shared.intake.clone();
            tokio::spawn(async move { intake.abandon(id).await });
        }
    };
    match result {
        Ok(Received::Refused(reply)) => {
            abandon();
            let text = format!(
                "NOQUEUE: reject: END-OF-MESSAGE from unknown[{}]: {} {}; from=<{}> proto=ESMTP helo=<{}>",
                client.peer.ip(),
                reply.code(),
                clean(reply.text()),
                transaction.sender,
                clean(&transaction.helo.0)
            );
            shared.log.line(client.number, Service::Smtpd, text);
            Ok(Some(reply))
        }
        Ok(Received::Whole { id, body, pieces, size, message_id }) => {
            let recipients: Vec<Recipient> = transaction
                .recipients
                .iter()
                .map(|(to, right)| Recipient::new(to.clone(), *right == Right::Anywhere))
                .collect();
            let count = recipients.len();
            let envelope = Envelope {
                sender: transaction.sender.clone(),
                recipients,
                eight_bit: transaction.eight_bit,
                arrival_unix_s: clock::unix_s(),
                confidential: shared.settings.require_tls,
            };
            let span = tracing::debug_span!("accept", %id);
            let verdict = shared.intake.accept(id, envelope, size, body, pieces).instrument(span).await;
            if verdict == Verdict::NoRoom {
                abandon(); // its pieces take room
            }
            if let Verdict::Accepted(receipt) = &verdict {
                let join = |label: fn(&holdfast_cluster::Member) -> &str| {
                    let mut labels: Vec<&str> = receipt.nodes().iter().map(|(_, m)| label(m)).collect();
                    labels.dedup();
                    labels.join("+")
                };
                let ids: Vec<String> = receipt.nodes().iter().map(|(n, _)| n.to_string()).collect();
                let lines = [
                    (Service::Smtpd, format!("{id}: client=unknown[{}]", client.peer.ip())),
                    (Service::Cleanup, format!("{id}: message-id={message_id}")),
                    (
                        Service::Qmgr,
                        format!(
                            "{id}: from=<{}>, size={size}, nrcpt={count} (queue active)",
                            transaction.sender
                        ),
                    ),
                    (
                        Service::Cluster,
                        format!(
                            "{id}: durable, nodes={}, power={}, network={}, index={}",
                            ids.join("+"),
                            join(|m| &m.placement.power),
                            join(|m| &m.placement.network),
                            receipt.index()
                        ),
                    ),
                ];
                shared.log.write(client.number, &lines);
            } else {
                let said = reply(&verdict, id)
                    .map_or("closed without a reply".into(), |r| format!("{} {}", r.code(), clean(r.text())));
                let text = format!(
                    "NOQUEUE: reject: END-OF-MESSAGE from unknown[{}]: {said}; from=<{}> proto=ESMTP helo=<{}>",
                    client.peer.ip(),
                    transaction.sender,
                    clean(&transaction.helo.0)
                );
                shared.log.line(client.number, Service::Smtpd, text);
            }
            Ok(reply(&verdict, id))
        }
        Err(why) => {
            abandon();
            Err(why)
        }
    }
}

enum Received {
    Whole { id: MessageId, body: Bytes, pieces: Vec<PieceRef>, size: u64, message_id: String },
    Refused(Reply),
}

/// A message that is coming in.
struct Incoming {
    /// Given when the first octets are replicated, since an id must not be old when it is proposed.
    id: Option<MessageId>,
    /// The trace header, once the id is known.
    header: Box<dyn Fn(MessageId) -> String + Send>,
    decoder: Decoder,
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
    fn new(shared: &Shared, client: &Client, transaction: &Transaction) -> Incoming {
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
            id: None,
            header: Box::new(header),
            decoder: Decoder::default(),
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

    async fn receive(&mut self, shared: &Shared, client: &mut Client) -> Result<Received, String> {
        let mut in_flight = FuturesOrdered::new();
        let began = clock::now();
        loop {
            if clock::now().saturating_duration_since(began)
                > shared.idle_timeout + Duration::from_secs(self.size / BYTES_PER_SECOND_MIN)
            {
                return Err("data comes too slowly".into());
            }
            let before = self.octets.len();
            let (done, used) = self.decoder.read(&client.buffer, &mut self.octets);
            drop(client.buffer.split_to(used));
            self.size += (self.octets.len() - before) as u64;
            self.limit(shared, &mut in_flight).await;
            if done || self.octets.len() > PIECE_BYTES {
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
            if done {
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
        self.judge();
        let id = self.begin(shared);
        let size = self.size;
        if self.refused.is_none() && self.seq > 0 {
            let last = Bytes::from(std::mem::take(&mut self.octets));
            in_flight.push_back(shared.intake.piece(id, self.seq, last));
            self.seq += 1;
        }
        while let Some(sent) = in_flight.next().await {
            self.note_piece(sent);
        }
        if let Some(reply) = self.refused.take() {
            return Ok(Received::Refused(reply));
        }
        Ok(Received::Whole {
            id,
            body: std::mem::take(&mut self.octets).into(),
            pieces: std::mem::take(&mut self.pieces),
            size,
            message_id: self.message_id.take().unwrap_or_default(),
        })
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
        if self.decoder.has_bare_line_end() {
            self.refuse(550, "5.6.0", "Error: a bare CR or LF in the message");
        } else if self.decoder.has_nul() {
            self.refuse(550, "5.6.0", "Error: a NUL in the message");
        } else if self.hops > HOPS_MAX {
            self.refuse(554, "5.4.6", "Error: too many hops");
        }
    }
}
