//! The PROXY protocol, versions 1 and 2: who the client is that a load balancer speaks for. Only peers that the listener names
//! (`proxy_from`) are asked, and from these a connection without a header is closed: its client is not known, and a guess would
//! give it the load balancer's rights.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ppp::HeaderResult;
use ppp::v1::Addresses as V1;
use ppp::v2::{Addresses as V2, Command, Protocol};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// How long a load balancer may take to send the header; it comes with the connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// How a header of version 2 begins.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest line of version 1, CR LF included.
const LINE_BYTES_MAX: usize = 107;
/// Longest rest of version 2: addresses, and what a load balancer adds to them.
const REST_BYTES_MAX: usize = 4096;

/// Reads a header and no octet more, since TLS may follow. The client's address; `None` where the load balancer speaks for nobody,
/// as in its health checks.
///
/// # Errors
/// Why there is no header that can be read.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, String> {
    let header = timeout(PATIENCE, octets(stream)).await.map_err(|_| "no PROXY header in time")??;
    parse(&header)
}

async fn octets(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, String> {
    let lost = |e: std::io::Error| format!("in the PROXY header: {e}");
    let mut header = vec![0; SIGNATURE.len()];
    stream.read_exact(&mut header).await.map_err(lost)?;
    if header == SIGNATURE {
        let mut fixed = [0; 4];
        stream.read_exact(&mut fixed).await.map_err(lost)?;
        let rest = u16::from_be_bytes([fixed[2], fixed[3]]) as usize;
        if rest > REST_BYTES_MAX {
            return Err(format!("a PROXY header of {rest} octets is too long"));
        }
        header.extend_from_slice(&fixed);
        let from = header.len();
        header.resize(from + rest, 0);
        stream.read_exact(&mut header[from..]).await.map_err(lost)?;
        return Ok(header);
    }
    while header.starts_with(b"PROXY ") && header.len() < LINE_BYTES_MAX && !header.ends_with(b"\r\n") {
        header.push(stream.read_u8().await.map_err(lost)?);
    }
    Ok(header)
}

fn parse(header: &[u8]) -> Result<Option<SocketAddr>, String> {
    let at = |ip: IpAddr, port| Ok(Some(SocketAddr::new(ip, port)));
    match HeaderResult::parse(header) {
        HeaderResult::V1(Ok(header)) => match header.addresses {
            V1::Tcp4(a) => at(a.source_address.into(), a.source_port),
            V1::Tcp6(a) => at(a.source_address.into(), a.source_port),
            V1::Unknown => Ok(None),
        },
        HeaderResult::V2(Ok(header)) => match (header.command, header.protocol, header.addresses) {
            (Command::Local, _, _) => Ok(None),
            (_, Protocol::Stream, V2::IPv4(a)) => at(a.source_address.into(), a.source_port),
            (_, Protocol::Stream, V2::IPv6(a)) => at(a.source_address.into(), a.source_port),
            _ => Err("the PROXY header names no client over TCP".into()),
        },
        HeaderResult::V1(Err(e)) => Err(format!("not a PROXY header: {e}")),
        HeaderResult::V2(Err(e)) => Err(format!("not a PROXY header: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(octets: &[u8]) -> (Result<Option<SocketAddr>, String>, usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut stream = octets;
        let read = runtime.block_on(read(&mut stream));
        (read, octets.len() - stream.len())
    }

    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = (rest.len() as u16).to_be_bytes();
        [SIGNATURE.as_slice(), &[command, family], &length, rest].concat()
    }

    #[test]
    fn headers() {
        let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0, 25];
        let mut v6 = [0u8; 36];
        v6[..16].copy_from_slice(&"2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
        v6[32..34].copy_from_slice(&12345u16.to_be_bytes());
        for (header, expected) in [
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 25\r\n".to_vec(), Some("192.0.2.7:12345")),
            (b"PROXY TCP6 2001:db8::7 ::1 12345 25\r\n".to_vec(), Some("[2001:db8::7]:12345")),
            (b"PROXY UNKNOWN\r\n".to_vec(), Some("nobody")),
            (v2(0x21, 0x11, &v4), Some("192.0.2.7:12345")),
            (v2(0x21, 0x11, &[v4.as_slice(), &[1, 0, 2, 9, 9]].concat()), Some("192.0.2.7:12345")),
            (v2(0x21, 0x21, &v6), Some("[2001:db8::7]:12345")),
            (v2(0x20, 0x00, &[]), Some("nobody")),
            (v2(0x21, 0x12, &v4), None),
            (v2(0x21, 0x00, &[]), None),
            (v2(0x21, 0x11, &[0; 5000]), None),
            (b"EHLO client.example\r\n".to_vec(), None),
            (b"PROXY TCP4 192.0.2.7\r\n".to_vec(), None),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 25\n".to_vec(), None),
            ([b"PROXY TCP4 ".as_slice(), &[b'1'; 200]].concat(), None),
            (b"".to_vec(), None),
        ] {
            let whole = [header.as_slice(), b"EHLO x\r\n"].concat();
            let (read, used) = run(&whole);
            let text = String::from_utf8_lossy(&header).into_owned();
            let said = read.as_ref().ok().map(|a| a.map_or("nobody".into(), |a| a.to_string()));
            assert_eq!(said.as_deref(), expected, "{text:?}: {read:?}");
            if expected.is_some() {
                assert_eq!(used, header.len(), "{text:?}: no octet more");
            }
        }
    }

    proptest! {
        /// P8: no octets from a load balancer stop a node.
        #[test]
        fn p8_any_octets_are_a_header_or_are_not(octets in proptest::collection::vec(any::<u8>(), 0..300), start in 0..3) {
            let start: &[u8] = [b"".as_slice(), b"PROXY ", SIGNATURE][start as usize];
            drop(run(&[start, &octets].concat()));
        }
    }
}
