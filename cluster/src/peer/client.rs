//! Asking a peer: one connection, many requests in flight, answers in any order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::frame::{self, Answer, Frame, Hello, PROTOCOL, Purpose, Request};
use super::tls::{PeerTls, node_name};
use crate::contact::Contact;
use crate::limits::{CONNECT, REQUESTS_IN_FLIGHT_MAX, UNACKNOWLEDGED};
use crate::net::{self, Stream};
use crate::transfer::Transfers;

/// Who speaks, and how it proves it.
pub(crate) struct Local {
    pub(crate) cluster: String,
    pub(crate) id: u64,
    pub(crate) tls: PeerTls,
    /// Snapshots that this node sends.
    pub(crate) transfers: Arc<Transfers>,
    /// What was heard of other members.
    pub(crate) contact: Mutex<Contact>,
}

impl Local {
    /// What was heard of other members.
    pub(crate) fn contact(&self) -> MutexGuard<'_, Contact> {
        self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AskError {
    /// The request was certainly not sent.
    #[error("not reached: {0}")]
    NotSent(String),
    /// It may have arrived.
    #[error("no answer: {0}")]
    NoAnswer(String),
}

/// Reads frames; what is half read stays for the next call, so a read may be cancelled.
pub(crate) struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
}

impl<R: tokio::io::AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(stream: R) -> FrameReader<R> {
        FrameReader { stream, buffer: BytesMut::with_capacity(64 << 10) }
    }

    pub(crate) async fn next(&mut self) -> Result<Frame, String> {
        loop {
            if let Some(frame) = frame::take(&mut self.buffer).map_err(|e| e.to_string())? {
                return Ok(frame);
            }
            self.buffer.reserve(64 << 10);
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => return Err("connection closed".into()),
                Ok(_) => {}
                Err(e) => return Err(e.to_string()),
            }
        }
    }
}

pub(crate) type Reader = FrameReader<ReadHalf<TlsStream<Stream>>>;
pub(crate) type Writer = WriteHalf<TlsStream<Stream>>;
pub(crate) type Connection = (Reader, Writer);

/// Opens a connection to node `to` for a purpose.
pub(crate) async fn connect(
    local: &Local,
    to: u64,
    address: &str,
    purpose: Purpose,
) -> Result<Connection, String> {
    let open = async {
        let stream = net::connect(address).await.map_err(|e| format!("{address}: {e}"))?;
        stream.set_nodelay().map_err(|e| e.to_string())?;
        stream.set_user_timeout(UNACKNOWLEDGED).map_err(|e| e.to_string())?;
        let name = ServerName::try_from(node_name(to)).map_err(|e| e.to_string())?;
        let connector = TlsConnector::from(local.tls.client());
        let stream = connector.connect(name, stream).await.map_err(|e| format!("{address}: TLS: {e}"))?;
        let (reader, mut writer) = tokio::io::split(stream);
        let hello = Hello { protocol: PROTOCOL, cluster: local.cluster.clone(), from: local.id, to, purpose };
        let mut bytes = BytesMut::new();
        frame::put(&mut bytes, 0, &hello, &[]);
        writer.write_all(&bytes).await.map_err(|e| format!("{address}: {e}"))?;
        writer.flush().await.map_err(|e| format!("{address}: {e}"))?;
        Ok((FrameReader::new(reader), writer))
    };
    timeout(CONNECT, open).await.unwrap_or_else(|_| Err(format!("{address}: connecting timed out")))
}

struct Asked {
    request: Request,
    raw: Vec<Bytes>,
    answer: oneshot::Sender<Result<(Answer, Bytes), AskError>>,
}

/// A peer that can be asked. Clones share the connection.
#[derive(Clone)]
pub(crate) struct Peer {
    asked: mpsc::Sender<Asked>,
}

impl Peer {
    /// A peer at an address. The connection is opened when first needed, and again after it broke. Must be called within
    /// the runtime on which it shall live.
    pub(crate) fn new(local: Arc<Local>, id: u64, address: String) -> Peer {
        let (asked, requests) = mpsc::channel(REQUESTS_IN_FLIGHT_MAX);
        tokio::spawn(run(local, id, address, requests));
        Peer { asked }
    }

    /// Asks and waits for the answer and the raw octets behind it.
    pub(crate) async fn ask(
        &self,
        request: Request,
        raw: Vec<Bytes>,
        patience: Duration,
    ) -> Result<(Answer, Bytes), AskError> {
        let (answer, answered) = oneshot::channel();
        let wait = async {
            if self.asked.send(Asked { request, raw, answer }).await.is_err() {
                return Err(AskError::NotSent("shutting down".into()));
            }
            answered.await.unwrap_or_else(|_| Err(AskError::NoAnswer("connection closed".into())))
        };
        timeout(patience, wait).await.unwrap_or_else(|_| Err(AskError::NoAnswer("timed out".into())))
    }
}

/// Owns the connection to one peer.
async fn run(local: Arc<Local>, id: u64, address: String, mut requests: mpsc::Receiver<Asked>) {
    while let Some(first) = requests.recv().await {
        if first.answer.is_closed() {
            continue;
        }
        match connect(&local, id, &address, Purpose::Request).await {
            Ok(connection) => converse(connection, first, &mut requests).await,
            Err(why) => {
                // Whoever waits meanwhile would only wait for the same refusal.
                let refuse = |asked: Asked| drop(asked.answer.send(Err(AskError::NotSent(why.clone()))));
                refuse(first);
                while let Ok(asked) = requests.try_recv() {
                    refuse(asked);
                }
            }
        }
    }
}

async fn converse(connection: Connection, first: Asked, requests: &mut mpsc::Receiver<Asked>) {
    let (mut reader, mut writer) = connection;
    let mut waiting = BTreeMap::new();
    let mut next_id = 0u64;
    let mut out = BytesMut::new();
    let mut todo = Some(first);
    let why = loop {
        while let Some(asked) = todo.take() {
            next_id += 1;
            let raw: Vec<&[u8]> = asked.raw.iter().map(|b| &b[..]).collect();
            frame::put(&mut out, next_id, &asked.request, &raw);
            waiting.insert(next_id, asked.answer);
            if out.len() < (1 << 20) && waiting.len() < REQUESTS_IN_FLIGHT_MAX {
                todo = requests.try_recv().ok();
            }
        }
        if !out.is_empty() {
            let sent = async {
                writer.write_all(&out).await?;
                writer.flush().await
            };
            match timeout(crate::limits::REQUEST, sent).await {
                Ok(Ok(())) => out.clear(),
                Ok(Err(e)) => break e.to_string(),
                Err(_) => break "sending made no progress".into(),
            }
        }
        waiting.retain(|_, answer: &mut oneshot::Sender<_>| !answer.is_closed());
        tokio::select! {
            biased;
            frame = reader.next() => match frame {
                Ok(frame) => {
                    let answer = frame.head::<Answer>("answer");
                    if let Some(tell) = waiting.remove(&frame.id) {
                        let answer = answer.map(|a| (a, frame.raw)).map_err(|e| AskError::NoAnswer(e.to_string()));
                        drop(tell.send(answer));
                    }
                }
                Err(why) => break why,
            },
            asked = requests.recv(), if waiting.len() < REQUESTS_IN_FLIGHT_MAX => match asked {
                Some(asked) => todo = Some(asked),
                None => break "shutting down".into(),
            },
        }
    };
    for tell in waiting.into_values() {
        drop(tell.send(Err(AskError::NoAnswer(why.clone()))));
    }
}
