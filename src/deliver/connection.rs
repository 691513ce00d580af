//! The `Dialer` edge: a connection to a destination, greeted and ready for transactions.
//!
//! Where TLS is used only if it is offered, a failed or stalled handshake is tried once more in the clear; where it is needed, mail waits.
//! What was said before the handshake is forgotten (RFC 3207 §4.2).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use holdfast_cluster::net;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::need::Need;
use super::quirks::Quirks;
use super::resolve::Host;
use super::tls::{ClientTls, Trust};
use crate::clock;
use crate::pki;
use crate::queue::command::TlsMin;
use crate::smtp::reply::Received;

/// How connections are made.
#[derive(Clone)]
pub struct Dialer {
    /// Source addresses, at most one of each family.
    pub bind: Vec<IpAddr>,
    /// Our name in EHLO.
    pub helo: String,
    /// How long to wait for a connection.
    pub connect_timeout: Duration,
    /// How long to wait for the reply to the final dot; others are waited for half as long.
    pub reply_timeout: Duration,
    /// TLS.
    pub tls: ClientTls,
    /// What is known of hosts.
    pub quirks: Arc<Quirks>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection to a destination.
pub struct Connection {
    stream: Box<dyn Stream>,
    buffer: BytesMut,
    /// The host.
    pub host: Host,
    /// Whether PIPELINING was offered.
    pub pipelining: bool,
    /// Whether 8BITMIME was offered.
    pub eight_bit: bool,
    /// Whether SIZE was offered.
    pub size: bool,
    /// Whether CHUNKING was offered. Not all who offer it mean it: see [`Connection::takes_chunks`].
    pub chunking: bool,
    starttls: bool,
    quirks: Arc<Quirks>,
    /// Protocol and cipher, if encrypted.
    pub tls: Option<String>,
}

/// Longest reason, characters.
const REASON_CHARS_MAX: usize = 400;

/// Why there is no connection, or no longer one. Begins with an enhanced status code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Broken(pub String);

fn broken(status: &str, why: impl std::fmt::Display) -> Broken {
    // Our own texts hold no parenthesis, which would end a status in the log; a peer's greeting has no say in their length.
    let text = format!("{status} {why}").replace('(', "[").replace(')', "]");
    Broken(text.chars().take(REASON_CHARS_MAX).collect())
}

impl Dialer {
    /// The addresses from which connections come, one of each family: that which is set, or what the system would choose for a
    /// destination far away. Sends nothing.
    pub fn egress(&self) -> Vec<IpAddr> {
        // Addresses that are reserved for documentation (RFC 5737, RFC 3849): a route to anywhere is one to them.
        let far = [("0.0.0.0:0", "192.0.2.1:25"), ("[::]:0", "[2001:db8::1]:25")];
        let each = far.into_iter().filter_map(|(any, far)| {
            let far: std::net::SocketAddr = far.parse().ok()?;
            self.source(far.ip()).or_else(|| {
                let socket = std::net::UdpSocket::bind(any).ok()?;
                socket.connect(far).ok()?;
                Some(socket.local_addr().ok()?.ip())
            })
        });
        each.collect()
    }

    /// The address that is set for destinations of this one's family.
    fn source(&self, destination: IpAddr) -> Option<IpAddr> {
        self.bind.iter().find(|a| a.is_ipv4() == destination.is_ipv4()).copied()
    }

    /// Connects, greets and encrypts as the host needs it.
    ///
    /// # Errors
    /// [`Broken`] with the reason, which is never a reason to give mail up.
    pub async fn open(&self, host: &Host, oldest: TlsMin) -> Result<Connection, Broken> {
        let connection = self.greet(host).await?;
        match &host.need {
            Need::Clear => Ok(connection),
            Need::IfOffered if !connection.starttls => Ok(connection),
            Need::IfOffered => match connection.encrypt(&Trust::Any, oldest, self).await {
                Err(why) => {
                    tracing::info!(host = host.name, why = why.0, "TLS failed; once more in the clear");
                    self.greet(host).await
                }
                encrypted => encrypted,
            },
            Need::Always(_) if !connection.starttls => {
                Err(broken("4.7.4", format!("TLS is required, but {} does not offer it", host.name)))
            }
            Need::Always(trust) => connection.encrypt(trust, oldest, self).await,
        }
    }

    async fn greet(&self, host: &Host) -> Result<Connection, Broken> {
        let lost = |e: std::io::Error| broken("4.4.1", format!("connect to {}: {e}", host.address));
        let connect = net::connect_from(self.source(host.address.ip()), host.address);
        let stream = timeout(self.connect_timeout, connect)
            .await
            .map_err(|_| broken("4.4.1", format!("connect to {}: timed out", host.address)))?
            .map_err(lost)?;
        stream.set_nodelay().map_err(lost)?;
        let mut connection = Connection {
            stream: Box::new(stream),
            buffer: BytesMut::new(),
            host: host.clone(),
            pipelining: false,
            eight_bit: false,
            size: false,
            chunking: false,
            starttls: false,
            quirks: self.quirks.clone(),
            tls: None,
        };
        let greeting = connection.reply(self.reply_timeout / 2).await?;
        if greeting.code != 220 {
            return Err(broken("4.4.2", format!("{} greeted with {}", host.name, greeting.one_line())));
        }
        connection.ehlo(self).await?;
        Ok(connection)
    }
}

impl Connection {
    async fn ehlo(&mut self, dialer: &Dialer) -> Result<(), Broken> {
        self.send(format!("EHLO {}\r\n", dialer.helo).as_bytes()).await?;
        let reply = self.reply(dialer.reply_timeout / 2).await?;
        (self.pipelining, self.eight_bit, self.size) = (false, false, false);
        (self.chunking, self.starttls) = (false, false);
        if reply.code != 250 {
            self.send(format!("HELO {}\r\n", dialer.helo).as_bytes()).await?;
            let reply = self.reply(dialer.reply_timeout / 2).await?;
            return match reply.code {
                250 => Ok(()),
                _ => Err(broken(
                    "4.4.2",
                    format!("{} answered HELO with {}", self.host.name, reply.one_line()),
                )),
            };
        }
        for line in reply.lines.iter().skip(1) {
            match line.split(' ').next().unwrap_or("").to_ascii_uppercase().as_str() {
                "PIPELINING" => self.pipelining = true,
                "8BITMIME" => self.eight_bit = true,
                "SIZE" => self.size = true,
                "CHUNKING" => self.chunking = true,
                "STARTTLS" => self.starttls = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the host takes the chunks that it offers to take, if that was found out.
    pub fn takes_chunks(&self) -> Option<bool> {
        self.quirks.takes_chunks(self.host.address, clock::now())
    }

    /// That is found out.
    pub fn note_chunks(&self, takes_them: bool) {
        self.quirks.note_chunks(self.host.address, takes_them, clock::now());
    }

    async fn encrypt(mut self, trust: &Trust, oldest: TlsMin, dialer: &Dialer) -> Result<Connection, Broken> {
        self.send(b"STARTTLS\r\n").await?;
        let reply = self.reply(dialer.reply_timeout / 2).await?;
        if reply.code != 220 {
            return Err(broken("4.7.4", format!("STARTTLS was answered with {}", reply.one_line())));
        }
        let config = dialer.tls.config(trust, oldest).map_err(|e| broken("4.7.5", format!("TLS: {e}")))?;
        let name = match trust {
            Trust::Anchors(anchors) => anchors.name(),
            Trust::WebPki(name) => name,
            Trust::Any => self.host.name.as_str(),
        };
        let name = ServerName::try_from(name.to_owned())
            .unwrap_or_else(|_| ServerName::from(self.host.address.ip()));
        let handshake = TlsConnector::from(config).connect(name, self.stream);
        let stream = timeout(dialer.connect_timeout, handshake)
            .await
            .map_err(|_| broken("4.7.5", "TLS handshake timed out"))?
            .map_err(|e| broken("4.7.5", format!("TLS handshake: {e}")))?;
        let tls = Some(pki::session_text(stream.get_ref().1));
        // Octets that came in the clear after the 220 are forgotten with the buffer.
        let mut connection = Connection { stream: Box::new(stream), buffer: BytesMut::new(), tls, ..self };
        connection.ehlo(dialer).await?;
        Ok(connection)
    }

    /// Sends octets. A destination that takes none for three minutes is given up (RFC 5321 §4.5.3.2.5).
    pub async fn send(&mut self, octets: &[u8]) -> Result<(), Broken> {
        let sent = async {
            self.stream.write_all(octets).await?;
            self.stream.flush().await
        };
        match timeout(Duration::from_secs(180), sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(broken("4.4.2", format!("lost connection with {}: {e}", self.host.name))),
            Err(_) => Err(broken("4.4.2", format!("{} takes no data", self.host.name))),
        }
    }

    /// Waits for a reply.
    pub async fn reply(&mut self, patience: Duration) -> Result<Received, Broken> {
        let read = async {
            loop {
                match Received::take(&self.buffer) {
                    Ok(Some((reply, used))) => {
                        self.buffer.advance(used);
                        return Ok(reply);
                    }
                    Ok(None) => {}
                    Err(e) => return Err(broken("4.5.0", format!("{}: {e}", self.host.name))),
                }
                self.buffer.reserve(4096);
                match self.stream.read_buf(&mut self.buffer).await {
                    Ok(0) => {
                        return Err(broken("4.4.2", format!("{} closed the connection", self.host.name)));
                    }
                    Ok(_) => {}
                    Err(e) => {
                        return Err(broken("4.4.2", format!("lost connection with {}: {e}", self.host.name)));
                    }
                }
            }
        };
        let waited = timeout(patience, read).await;
        waited.unwrap_or_else(|_| Err(broken("4.4.2", "timed out waiting for a reply")))
    }

    /// Waits until the destination says something or closes, which a destination that is not spoken to should not.
    pub async fn spoken_to(&mut self) {
        self.buffer.reserve(512);
        drop(self.stream.read_buf(&mut self.buffer).await);
    }

    /// Says goodbye.
    pub async fn quit(mut self) {
        if self.send(b"QUIT\r\n").await.is_ok() {
            drop(self.reply(Duration::from_secs(5)).await);
        }
    }
}
