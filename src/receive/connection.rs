//! One client's connection: reads lines and data, asks the session what to answer, and does what it says.
//!
//! Bounded: a line, 256 KiB of a message's octets beside what is being replicated, the time a client may be silent. A client
//! that dies before the reply to its data leaves nothing queued; its pieces are withdrawn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::Instrument;

use super::incoming::{Incoming, Received, is_too_slow};
use super::intake::{Intake, Verdict, reply};
use super::policy::{self, Network, Refusal, Right};
use super::session::{Action, Session, Settings, Transaction, World};
use crate::clock;
use crate::maillog::{MailLog, Service, clean};
use crate::pki;
use crate::queue::message::{Envelope, Recipient};
use crate::smtp::command::LINE_BYTES_MAX;
use crate::smtp::reply::Reply;

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
pub(super) struct Client {
    stream: Box<dyn Stream>,
    pub(super) buffer: BytesMut,
    pub(super) peer: SocketAddr,
    /// Whether the peer's network may give it rights; not that of a load balancer which does not say for whom it speaks.
    is_named: bool,
    /// The session's number in the log.
    number: u64,
    pub(super) tls: Option<String>,
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
pub(super) type Ended = Result<(), String>;

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
    let mut message: Option<(Incoming, Transaction)> = None;
    loop {
        let is_slow = message.as_ref().is_some_and(|(incoming, _)| incoming.is_too_slow(shared.idle_timeout));
        let line = match client.take_line() {
            _ if is_slow => return Err("chunks come too slowly".into()),
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
            Line::TooLong(line) => session.bad_line(line, "Error: line too long"),
            Line::BareLf(line) => session.bad_line(line, "Error: a line must end with CR LF"),
        };
        if reply.code() >= 400
            && let Line::Whole(line) = &line
        {
            log_refusal(shared, &client, &session, line, &reply);
        }
        if !session.expects_chunks() && !matches!(action, Action::Chunk { .. }) {
            message = None; // what came of it is withdrawn
        }
        let said = match action {
            Action::Continue => Some(reply),
            Action::Close => {
                replies.push(reply);
                return client.send(&replies).await;
            }
            Action::StartTls => {
                replies.push(reply);
                client.send(&std::mem::take(&mut replies)).await?;
                client.buffer.clear(); // what was sent before the handshake is forgotten (RFC 3207 §4.2)
                client = client.encrypt(shared, acceptor.ok_or("no certificate")?).await?;
                session = session.encrypted();
                continue;
            }
            Action::Data(transaction) => {
                replies.push(reply);
                client.send(&std::mem::take(&mut replies)).await?;
                let mut incoming = Incoming::data(shared, &client, &transaction);
                let received = incoming.receive(shared, &mut client, true).await?;
                let said = conclude(shared, &mut client, &transaction, incoming, received).await;
                note_error(&mut session, said)
            }
            Action::Chunk { transaction, octets, last } => {
                match last {
                    // What was said to a message before this one waits for nothing.
                    true => client.send(&std::mem::take(&mut replies)).await?,
                    false => client.send_before(octets, &mut replies).await?,
                }
                let begun = transaction.map(|of| (Incoming::chunks(shared, &client, &of), of));
                let (mut incoming, of) = begun.or(message.take()).ok_or("a chunk of no message")?;
                match incoming.chunk(shared, &mut client, octets, last).await? {
                    Received::Part => {
                        message = Some((incoming, of));
                        Some(reply)
                    }
                    received => {
                        session.chunk_refused(); // if it was the last one, that is over as well
                        let said = conclude(shared, &mut client, &of, incoming, received).await;
                        note_error(&mut session, said)
                    }
                }
            }
            Action::Discard(octets) => {
                client.send_before(octets, &mut replies).await?;
                client.discard(octets, shared.idle_timeout).await?;
                Some(reply)
            }
        };
        match said {
            Some(reply) => replies.push(reply),
            None => return Ok(()), // nothing can be said: close
        }
    }
}

/// What is said to a message, which counts as an error of the session if it was refused for good.
fn note_error(session: &mut Session, said: Option<Reply>) -> Option<Reply> {
    if said.as_ref().is_some_and(|reply| reply.code() >= 500) {
        session.note_error();
    }
    said
}

fn log_refusal(shared: &Shared, client: &Client, session: &Session, line: &[u8], reply: &Reply) {
    let verb: String = line.iter().take_while(|b| b.is_ascii_alphabetic()).map(|b| *b as char).collect();
    let verb = verb.to_ascii_uppercase();
    let is_told = match verb.as_str() {
        "RCPT" | "MAIL" | "DATA" => true,
        "BDAT" => !matches!(reply.code(), 503 | 530),
        _ => false,
    };
    if !is_told {
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
    TooLong(Bytes),
    BareLf(Bytes),
}

impl Client {
    pub(super) async fn fill(&mut self) -> Ended {
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
                    _ if line.len() > LINE_BYTES_MAX => Line::TooLong(line),
                    Some(text) => Line::Whole(line.slice_ref(text)),
                    None => Line::BareLf(line),
                })
            }
            None if self.buffer.len() > LINE_BYTES_MAX => {
                // Keep one octet more than a line may have, so that its end is still seen as that of a long line; and its verb.
                let (excess, verb) =
                    (self.buffer.len() - LINE_BYTES_MAX, [0, 1, 2, 3].map(|n| self.buffer[n]));
                drop(self.buffer.split_to(excess - 1));
                self.buffer[..verb.len()].copy_from_slice(&verb);
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

    /// Sends what is to be said before a chunk of so many octets is waited for, unless all of it is here.
    async fn send_before(&mut self, octets: u64, replies: &mut Vec<Reply>) -> Ended {
        match self.buffer.len() as u64 >= octets {
            true => Ok(()),
            false => self.send(&std::mem::take(replies)).await,
        }
    }

    /// Reads so many octets and forgets them.
    async fn discard(&mut self, octets: u64, idle_timeout: Duration) -> Ended {
        let (mut left, began) = (octets, clock::now());
        loop {
            let here = usize::try_from(left).map_or(self.buffer.len(), |left| left.min(self.buffer.len()));
            drop(self.buffer.split_to(here));
            left -= here as u64;
            if left == 0 {
                return Ok(());
            }
            if is_too_slow(began, octets - left, idle_timeout) {
                return Err("a chunk comes too slowly".into());
            }
            timeout(idle_timeout, self.fill()).await.map_err(|_| "silent within a chunk")??;
        }
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

/// Has a message accepted that is here, or refused. The reply, or `None` if nothing can be said.
async fn conclude(
    shared: &Shared,
    client: &mut Client,
    transaction: &Transaction,
    mut incoming: Incoming,
    received: Received,
) -> Option<Reply> {
    match received {
        Received::Part => None,
        Received::Refused(reply) => {
            let text = format!(
                "NOQUEUE: reject: END-OF-MESSAGE from unknown[{}]: {} {}; from=<{}> proto=ESMTP helo=<{}>",
                client.peer.ip(),
                reply.code(),
                clean(reply.text()),
                transaction.sender,
                clean(&transaction.helo.0)
            );
            shared.log.line(client.number, Service::Smtpd, text);
            Some(reply)
        }
        Received::Whole { id, body, pieces, size, message_id } => {
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
            if verdict != Verdict::NoRoom {
                incoming.handed_on(); // else its pieces take room, and are withdrawn
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
            reply(&verdict, id)
        }
    }
}
