//! The `Net` edge: TCP, for peers, clients and destinations alike; with the feature `sim`, within a simulated host, the simulated network
//! of its world (`net::sim`).
#![expect(clippy::disallowed_methods, reason = "this is the Net edge")]

#[cfg(feature = "sim")]
pub mod sim;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// The system's.
    Tcp(TcpStream),
    /// A simulated one.
    #[cfg(feature = "sim")]
    Sim(sim::Stream),
}

/// Connects to `HOST:PORT`.
///
/// # Errors
/// The system's answer.
pub async fn connect(address: &str) -> io::Result<Stream> {
    #[cfg(feature = "sim")]
    if let Some(host) = sim::here() {
        let address = address.parse().map_err(|_| io::ErrorKind::AddrNotAvailable)?;
        return host.connect(address).await.map(Stream::Sim);
    }
    Ok(Stream::Tcp(TcpStream::connect(address).await?))
}

/// Connects to an address, from `source` if that is given.
///
/// # Errors
/// The system's answer.
pub async fn connect_from(source: Option<IpAddr>, address: SocketAddr) -> io::Result<Stream> {
    #[cfg(feature = "sim")]
    if let Some(host) = sim::here() {
        return host.connect(address).await.map(Stream::Sim);
    }
    let socket = match address.ip() {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    if let Some(source) = source {
        socket.bind((source, 0).into())?;
    }
    Ok(Stream::Tcp(socket.connect(address).await?))
}

impl Stream {
    /// Small writes go at once.
    ///
    /// # Errors
    /// The system's answer.
    pub fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.set_nodelay(true),
            #[cfg(feature = "sim")]
            Stream::Sim(_) => Ok(()),
        }
    }

    /// The connection ends once something that was sent has waited for the other system's acknowledgement for so long
    /// (`TCP_USER_TIMEOUT`, RFC 5482, whole milliseconds). Otherwise it is sent again at times twice as far apart each, up to two minutes, and
    /// the connection stands still for about as long after a cut as during it. Simulated connections end by their world's rules.
    ///
    /// # Errors
    /// The system's answer.
    pub fn set_user_timeout(&self, unacknowledged: Duration) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => {
                let millis = unacknowledged.as_millis().try_into().unwrap_or(u32::MAX);
                Ok(rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?)
            }
            #[cfg(feature = "sim")]
            Stream::Sim(_) => Ok(()),
        }
    }
}

/// Where connections come in.
#[derive(Debug)]
pub enum Listener {
    /// The system's.
    Tcp(TcpListener),
    /// A simulated one.
    #[cfg(feature = "sim")]
    Sim(sim::Listener),
}

impl Listener {
    /// Listens at `HOST:PORT`.
    ///
    /// # Errors
    /// The system's answer.
    pub async fn bind(address: &str) -> io::Result<Listener> {
        #[cfg(feature = "sim")]
        if let Some(host) = sim::here() {
            let address = address.parse().map_err(|_| io::ErrorKind::AddrNotAvailable)?;
            return host.listen(address).map(Listener::Sim);
        }
        Ok(Listener::Tcp(TcpListener::bind(address).await?))
    }

    /// The next connection, and from where it comes.
    ///
    /// # Errors
    /// The system's answer; the next call may go better.
    pub async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        match self {
            Listener::Tcp(listener) => listener.accept().await.map(|(s, from)| (Stream::Tcp(s), from)),
            #[cfg(feature = "sim")]
            Listener::Sim(listener) => listener.accept().await.map(|(s, from)| (Stream::Sim(s), from)),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(feature = "sim")]
            Stream::Sim(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(feature = "sim")]
            Stream::Sim(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(feature = "sim")]
            Stream::Sim(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(feature = "sim")]
            Stream::Sim(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
