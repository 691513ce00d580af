//! Pure. The one header that is put on top of a message (RFC 5321 §4.4, RFC 3848).

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::queue::MessageId;

/// What the trace header says.
#[derive(Clone, Debug)]
pub struct Trace<'a> {
    /// The name in EHLO or HELO.
    pub helo: &'a str,
    /// The client's address.
    pub client: IpAddr,
    /// Our name.
    pub hostname: &'a str,
    /// Whether EHLO was used.
    pub extended: bool,
    /// Protocol and cipher of the TLS session, if there is one.
    pub tls: Option<&'a str>,
    /// The message's id.
    pub id: MessageId,
    /// The recipient, if there is just one (RFC 5321 §4.4: more than one would tell who else was addressed).
    pub recipient: Option<&'a str>,
    /// RFC 5322 date.
    pub date: &'a str,
}

/// The `Received` header, CR LF included.
pub fn received(t: &Trace<'_>) -> String {
    let with = match (t.extended, t.tls.is_some()) {
        (true, true) => "ESMTPS",
        (true, false) => "ESMTP",
        (false, _) => "SMTP",
    };
    let literal = match t.client {
        IpAddr::V4(v4) => format!("[{v4}]"),
        IpAddr::V6(v6) => format!("[IPv6:{v6}]"),
    };
    let mut header = format!("Received: from {} ({literal})\r\n", t.helo);
    if let Some(tls) = t.tls {
        write!(header, "\t(using {tls})\r\n").expect("writing to a String does not fail");
    }
    write!(header, "\tby {} (Holdfast) with {with} id {}", t.hostname, t.id)
        .expect("writing to a String does not fail");
    if let Some(recipient) = t.recipient {
        write!(header, "\r\n\tfor <{recipient}>").expect("writing to a String does not fail");
    }
    write!(header, "; {}\r\n", t.date).expect("writing to a String does not fail");
    header
}

/// Counts `Received` headers in the first octets of a message; too many mean a loop (RFC 5321 §6.3).
pub fn hops(message: &[u8]) -> usize {
    let mut count = 0;
    for line in message.split(|b| *b == b'\n') {
        if line.is_empty() || line == b"\r" {
            break;
        }
        if line.get(..9).is_some_and(|name| name.eq_ignore_ascii_case(b"received:")) {
            count += 1;
        }
    }
    count
}

/// The `Message-ID` in the first octets of a message, for the log.
pub fn message_id(message: &[u8]) -> String {
    for line in message.split(|b| *b == b'\n') {
        if line.is_empty() || line == b"\r" {
            break;
        }
        if line.get(..11).is_some_and(|name| name.eq_ignore_ascii_case(b"message-id:")) {
            let printable = line[11..].iter().filter(|b| b.is_ascii_graphic());
            return printable.take(200).map(|b| *b as char).collect();
        }
    }
    "<>".into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::message::Tick;

    #[test]
    fn the_trace_header_names_the_recipient_only_if_there_is_one() {
        let mut t = Trace {
            helo: "c.example",
            client: "192.0.2.1".parse().unwrap(),
            hostname: "mx.example",
            extended: true,
            tls: Some("TLSv1.3 with cipher TLS13_AES_256_GCM_SHA384"),
            id: MessageId::new(Tick(1), 1, 1, 1),
            recipient: Some("u@d.example"),
            date: "Thu, 1 Jan 1970 00:00:00 +0000",
        };
        let one = received(&t);
        assert_eq!(crate::queue::ids_in(one.as_bytes()), [t.id]);
        assert!(one.contains("with ESMTPS id 000000") && one.contains("\r\n\tfor <u@d.example>; Thu"));
        assert!(one.split_inclusive("\r\n").all(|l| l.len() <= 100 && l.ends_with("\r\n")));
        (t.recipient, t.tls, t.extended) = (None, None, false);
        assert!(!received(&t).contains("for <") && received(&t).contains("with SMTP id"));
    }

    #[test]
    fn hops_and_message_ids_are_read_from_the_header_only() {
        let message = b"Received: a\r\nRECEIVED: b\r\nMessage-Id: <x@y>\r\n\r\nReceived: c\r\n";
        assert_eq!((hops(message), message_id(message).as_str()), (2, "<x@y>"));
    }
}
