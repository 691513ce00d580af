//! Clients of the demonstration: they send mail at a steady rate, half of them within TLS, and note what they were told.
//! A client of a killed node connects again until it is back; it never repeats a message, so that each has one outcome.
#![expect(clippy::disallowed_methods, reason = "the demonstration is a client like any other")]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::clock;
use crate::deliver::tls::{ClientTls, Trust};
use crate::queue::command::TlsMin;
use crate::smtp::data::Encoder;

/// Stands in every body, followed by eight characters that name the message.
pub(super) const CANARY: &str = "holdfast-demo-canary:";

/// A message to send.
#[derive(Clone, Debug)]
pub(super) struct Mail {
    name: String,
    recipients: usize,
    body: Vec<u8>,
}

/// What the client was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// 250.
    Accepted,
    /// 4yz or 5yz.
    Refused,
    /// The connection was lost before an answer.
    Failed,
}

/// A message that was sent.
pub(super) struct Sent {
    pub(super) node: u64,
    pub(super) outcome: Outcome,
    /// One for each recipient, as the customer names them.
    pub(super) copies: Vec<String>,
    pub(super) begun: Instant,
    pub(super) ended: Instant,
    /// From the final dot to the reply.
    pub(super) reply_us: u64,
}

/// Messages of a few sizes for a few recipients.
pub(super) fn plan(count: usize, size: usize) -> Vec<Mail> {
    (0..count)
        .map(|n| {
            let name = format!("m{n:07}");
            let bytes = match n {
                7 => 700_000,
                _ if n % 10 == 3 => 200,
                _ if n % 50 == 9 => size * 8,
                _ => size,
            };
            let mut body =
                format!("X-Demo-Name: {name}\r\nSubject: message {n}\r\n\r\n{CANARY}{name}\r\n").into_bytes();
            while body.len() < bytes {
                let line = format!(".{CANARY}{name} {:>60}\r\n", body.len());
                body.extend_from_slice(line.as_bytes());
            }
            let sum = format!("X-Demo-Sum: {:08x}\r\n", crc32fast::hash(&body));
            Mail {
                recipients: 1 + usize::from(n % 8 == 5) * 2,
                body: [sum.into_bytes(), body].concat(),
                name,
            }
        })
        .collect()
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

type Connection = BufReader<Box<dyn Stream>>;

async fn command(c: &mut Connection, line: &str) -> std::io::Result<u16> {
    c.write_all(line.as_bytes()).await?;
    c.flush().await?;
    reply(c).await
}

async fn reply(c: &mut Connection) -> std::io::Result<u16> {
    loop {
        let mut line = String::new();
        if c.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if line.as_bytes().get(3) != Some(&b'-') {
            let code = line.get(..3).and_then(|code| code.parse().ok());
            return code.ok_or_else(|| std::io::Error::other("not a reply"));
        }
    }
}

async fn connect(address: &str, starttls: bool) -> std::io::Result<Connection> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut c: Connection = BufReader::new(Box::new(stream));
    reply(&mut c).await?;
    command(&mut c, "EHLO client.demo.example\r\n").await?;
    if starttls {
        command(&mut c, "STARTTLS\r\n").await?;
        let tls = ClientTls::new(Vec::new()).and_then(|tls| tls.config(&Trust::Any, TlsMin::default()));
        let tls = tls.map_err(std::io::Error::other)?;
        let name = ServerName::try_from("localhost").map_err(std::io::Error::other)?;
        let stream = TlsConnector::from(tls).connect(name, c.into_inner()).await?;
        c = BufReader::new(Box::new(stream));
        command(&mut c, "EHLO client.demo.example\r\n").await?;
    }
    Ok(c)
}

/// Sends one message; the reply to its data and how long that took.
async fn send(c: &mut Connection, mail: &Mail) -> std::io::Result<(u16, Duration)> {
    let mut code = command(c, "MAIL FROM:<sender@client.demo.example>\r\n").await?;
    for n in 0..mail.recipients {
        if code < 400 {
            code = command(c, &format!("RCPT TO:<r{n}@demo.example>\r\n")).await?;
        }
    }
    if code < 400 {
        code = command(c, "DATA\r\n").await?;
    }
    if code >= 400 {
        command(c, "RSET\r\n").await?;
        return Ok((code, Duration::ZERO));
    }
    let mut wire = Vec::with_capacity(mail.body.len() + 1000);
    let mut encoder = Encoder::default();
    encoder.write(&mail.body, &mut wire);
    c.write_all(&wire).await?;
    let dot = clock::now();
    let code = command(c, ".\r\n").await?;
    Ok((code, dot.elapsed()))
}

/// Sends a client's share to one node.
pub(super) async fn run(
    node: u64,
    address: String,
    starttls: bool,
    share: Vec<Mail>,
    interval: Duration,
    history: Arc<Mutex<Vec<Sent>>>,
) {
    let mut connection: Option<Connection> = None;
    let mut next = clock::now();
    for mail in share {
        tokio::time::sleep_until(next.into()).await;
        next += interval;
        while connection.is_none() {
            match connect(&address, starttls).await {
                Ok(c) => connection = Some(c),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
        let Some(c) = &mut connection else { continue };
        let begun = clock::now();
        let (outcome, reply) = match send(c, &mail).await {
            Ok((250, reply)) => (Outcome::Accepted, reply),
            Ok((_, reply)) => (Outcome::Refused, reply),
            Err(_) => {
                connection = None;
                (Outcome::Failed, Duration::ZERO)
            }
        };
        let copies = (0..mail.recipients).map(|n| format!("{}/r{n}", mail.name)).collect();
        let sent =
            Sent { node, outcome, copies, begun, ended: clock::now(), reply_us: reply.as_micros() as u64 };
        history.lock().unwrap_or_else(PoisonError::into_inner).push(sent);
    }
}
