//! Pure. Which messages octets were part of that no record tells any more: each message begins with the trace header of this relay,
//! which has its id.

use memchr::memmem;

use super::message::MessageId;

/// A trace header is no longer.
const HEADER_BYTES_MAX: usize = 2048;
const BEGINS: &[u8] = b"Received: from ";
const OURS: &[u8] = b" (Holdfast) with ";

/// The ids in those trace headers that begin a message, not in those of relays before this one.
pub fn ids_in(octets: &[u8]) -> Vec<MessageId> {
    let begins = memmem::find_iter(octets, BEGINS).filter(|at| *at == 0 || octets[at - 1] != b'\n');
    begins.filter_map(|at| id_of(&octets[at..octets.len().min(at + HEADER_BYTES_MAX)])).collect()
}

fn id_of(header: &[u8]) -> Option<MessageId> {
    let header = &header[..memmem::find(header, b"; ").unwrap_or(header.len())];
    let ours = &header[memmem::find(header, OURS)? + OURS.len()..];
    let id = ours.split(|octet| octet.is_ascii_whitespace()).nth(2)?;
    MessageId::parse(std::str::from_utf8(id).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_where_messages_begin() {
        let [a, b, c] = [1 << 70, 2, 3].map(MessageId);
        let ours = |id| {
            format!(
                "Received: from c.example ([192.0.2.1])\r\n\tby mx.example (Holdfast) with ESMTPS id {id}\r\n\tfor <u@d.example>; Thu"
            )
        };
        let others = "Received: from x.example\r\n\tby y.example (Postfix) with ESMTP id 4XyZ; Thu";
        let octets = [
            "\x01\x02",
            &ours(a),
            "\r\n",
            &ours(b),
            "\r\n\r\nbody\0\0",
            others,
            "\r\n\0",
            &ours(c).replace("\r\n\tfor", "; \r\n"),
        ];
        // The second one came with the first message, from another cluster.
        assert_eq!(ids_in(octets.concat().as_bytes()), [a, c]);
        assert_eq!(ids_in(ours(b).as_bytes()), [b]);
        let cut = ours(a);
        assert!((0..cut.len()).all(|end| ids_in(&cut.as_bytes()[..end]).iter().all(|id| *id == a)));
    }
}
