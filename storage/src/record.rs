//! Pure. The record: a fixed header, a structured head, a raw body.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..4 | magic `HFR1` |
//! | 4 | format version, 1 |
//! | 5 | kind |
//! | 6 | feature level that a reader must know: 1 if it is sealed, 0 otherwise |
//! | 7 | zero |
//! | 8..12 | length of the head as it stands here |
//! | 12..16 | length of the body |
//! | 16..24 | term (0 where the kind has none) |
//! | 24..32 | index (0 where the kind has none); of a mark: the octets of its batch without the padding, or 0 |
//! | 32..40 | segment id |
//! | 40..44 | offset of this header in the segment |
//! | 44..48 | CRC-32 of the head as it stands here |
//! | 48..52 | CRC-32 of the body as it stands here |
//! | 52..56 | key id, 0 for none |
//! | 56..60 | zero |
//! | 60..64 | CRC-32 of bytes 0..60 |
//!
//! All integers are little-endian. Head and body follow; the next record begins at the next multiple of 8. A header is
//! valid if and only if magic and CRC are right, the lengths are within bounds, and segment and offset are those
//! of the place it was read from: a stale, misdirected or copied block fails. Head and body have a CRC each, since
//! a body may have been erased while the head stays. With an at-rest key both are sealed: [`crate::seal`].

use std::borrow::Cow;

use bytes::Bytes;

use crate::limits::{BODY_BYTES_MAX, HEAD_BYTES_MAX};
use crate::position::{LogIndex, LogPosition, SegmentId, Term};
use crate::seal::{BOUND_BYTES, KeyId, SEALED_BYTES, SegmentKeys};

/// Length of the header.
pub const HEADER_BYTES: usize = 64;
/// The format version that this program writes, and the newest it reads.
pub const VERSION: u8 = 1;
const MAGIC: [u8; 4] = *b"HFR1";
const ALIGN: usize = 8;
/// The feature level of a sealed record.
const SEALED_LEVEL: u8 = 1;

/// What a record is for. Numbers are a promise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// First record of a segment.
    SegmentHead = 1,
    /// First record of a batch: how far the log was synced, and as its index how many octets the batch has from here to the end of its
    /// last record. A log of before that was written has 0: it is not known.
    Mark = 2,
    /// A vote.
    Vote = 3,
    /// The last position known to be committed.
    Committed = 4,
    /// An entry of the replicated log.
    Entry = 5,
    /// Entries from this index on are void.
    Truncate = 6,
    /// Entries up to this position are no longer asked for.
    Floor = 7,
    /// Ranges that are being erased.
    Intent = 8,
    /// The state of one message, spilled at a checkpoint.
    Row = 9,
    /// Keys whose rows are void.
    Gone = 10,
    /// Part of the small tables.
    Table = 11,
    /// Completes a checkpoint.
    CheckpointEnd = 12,
    /// A body fetched from another node, under the index of the entry that brought it.
    Body = 13,
    /// What this node may have lost, and how much of what stands before it still counts.
    Reset = 14,
}

impl Kind {
    fn parse(byte: u8) -> Option<Kind> {
        use Kind::*;
        [
            SegmentHead,
            Mark,
            Vote,
            Committed,
            Entry,
            Truncate,
            Floor,
            Intent,
            Row,
            Gone,
            Table,
            CheckpointEnd,
            Body,
            Reset,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// A record before it has a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: Kind,
    /// Term and index, zero where the kind has none.
    pub at: LogPosition,
    /// Structured part.
    pub head: Bytes,
    /// Raw part.
    pub body: Bytes,
}

impl Record {
    /// A record without term, index and body.
    pub fn of(kind: Kind, head: Vec<u8>) -> Record {
        Record { kind, at: LogPosition::default(), head: head.into(), body: Bytes::new() }
    }

    /// Octets that the record takes in a segment of which these are the keys, alignment included.
    pub fn stored_bytes(&self, keys: &SegmentKeys) -> usize {
        stored_bytes(self.stored_head_bytes(keys), self.body.len())
    }

    /// Octets that its head takes there.
    pub(crate) fn stored_head_bytes(&self, keys: &SegmentKeys) -> usize {
        self.head.len() + keys.sealing().map_or(0, |_| SEALED_BYTES)
    }
}

/// A header that was found valid at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the record is.
    pub kind: Kind,
    /// Term and index.
    pub at: LogPosition,
    /// Length of the head as it is stored.
    pub head_bytes: u32,
    /// Length of the body.
    pub body_bytes: u32,
    /// The key that it is sealed with.
    pub key: Option<KeyId>,
    stored_head_crc: u32,
    stored_body_crc: u32,
    bound: [u8; BOUND_BYTES],
}

/// A head that was read and opened.
pub(crate) struct Head<'a> {
    pub(crate) text: Cow<'a, [u8]>,
    /// CRC-32 of the head and of the body as they were handed over: what copies in other places are compared by.
    pub(crate) head_crc: u32,
    pub(crate) body_crc: u32,
}

/// Why bytes are no valid record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Nothing was written here: all zeros.
    #[error("empty")]
    Empty,
    /// Not a record, or a damaged one.
    #[error("{0}")]
    Bad(&'static str),
    /// Written by a newer version.
    #[error("format version {0}")]
    Newer(u8),
    /// Sealed with a key that is not at hand.
    #[error("sealed with the at-rest key {0}")]
    NoKey(KeyId),
}

/// Octets that a record with these lengths takes, alignment included.
pub fn stored_bytes(head_bytes: usize, body_bytes: usize) -> usize {
    (HEADER_BYTES + head_bytes + body_bytes).next_multiple_of(ALIGN)
}

/// Writes `record` for its place in the keys' segment to the end of `out`, which is where the record will stand in the file.
pub fn write(out: &mut Vec<u8>, record: &Record, keys: &SegmentKeys, offset: u32) {
    debug_assert!(record.head.len() <= HEAD_BYTES_MAX && record.body.len() <= BODY_BYTES_MAX);
    let start = out.len();
    let key = keys.sealing();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[VERSION, record.kind as u8, if key.is_some() { SEALED_LEVEL } else { 0 }, 0]);
    out.extend_from_slice(&(record.stored_head_bytes(keys) as u32).to_le_bytes());
    out.extend_from_slice(&(record.body.len() as u32).to_le_bytes());
    out.extend_from_slice(&record.at.term.0.to_le_bytes());
    out.extend_from_slice(&record.at.index.0.to_le_bytes());
    out.extend_from_slice(&keys.segment().0.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    let bound = *out[start..].first_chunk::<BOUND_BYTES>().expect("so much was written");
    out.resize(start + HEADER_BYTES, 0);
    match key {
        Some(key) => keys.seal(key, &bound, &record.head, &record.body, out),
        None => {
            out.extend_from_slice(&record.head);
            out.extend_from_slice(&record.body);
        }
    }
    let (header, stored) = out[start..].split_at_mut(HEADER_BYTES);
    let (head, body) = stored.split_at(record.stored_head_bytes(keys));
    header[44..48].copy_from_slice(&crc32fast::hash(head).to_le_bytes());
    header[48..52].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    header[52..56].copy_from_slice(&key.map_or(0, |key| key.0).to_le_bytes());
    let crc = crc32fast::hash(&header[..60]);
    header[60..].copy_from_slice(&crc.to_le_bytes());
    out.resize(start + record.stored_bytes(keys), 0);
}

/// The segment that a file's first header says it holds, if that header is valid there.
///
/// # Errors
/// [`Invalid::Newer`] if it is of a version that only a newer program can read.
pub(crate) fn segment_of(bytes: &[u8]) -> Result<Option<SegmentId>, Invalid> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let segment = SegmentId(u64_at(header, 32));
    match read_header(bytes, segment, 0) {
        Ok(header) => Ok((header.kind == Kind::Mark).then_some(segment)),
        Err(newer @ Invalid::Newer(_)) => Err(newer),
        Err(_) => Ok(None),
    }
}

/// Reads the header that should stand at `offset` of `segment`.
///
/// # Errors
/// [`Invalid`] if the bytes are no header for this place.
pub fn read_header(bytes: &[u8], segment: SegmentId, offset: u32) -> Result<Header, Invalid> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(Invalid::Bad("the segment ends within a header"));
    };
    if header.iter().all(|b| *b == 0) {
        return Err(Invalid::Empty);
    }
    if header[..4] != MAGIC {
        return Err(Invalid::Bad("no magic"));
    }
    if u32_at(header, 60) != crc32fast::hash(&header[..60]) {
        return Err(Invalid::Bad("the header's CRC is wrong"));
    }
    let key = Some(KeyId(u32_at(header, 52))).filter(|key| key.0 != 0);
    if header[4] > VERSION || header[6] > SEALED_LEVEL || key.is_some() != (header[6] == SEALED_LEVEL) {
        return Err(Invalid::Newer(header[4]));
    }
    if u64_at(header, 32) != segment.0 || u32_at(header, 40) != offset {
        return Err(Invalid::Bad("the header belongs to another place"));
    }
    let kind = Kind::parse(header[5]).ok_or(Invalid::Bad("unknown kind"))?;
    let (head_bytes, body_bytes) = (u32_at(header, 8), u32_at(header, 12));
    let head_bytes_max = HEAD_BYTES_MAX + key.map_or(0, |_| SEALED_BYTES);
    if head_bytes as usize > head_bytes_max || body_bytes as usize > BODY_BYTES_MAX {
        return Err(Invalid::Bad("a length is out of bounds"));
    }
    Ok(Header {
        kind,
        at: LogPosition { term: Term(u64_at(header, 16)), index: LogIndex(u64_at(header, 24)) },
        head_bytes,
        body_bytes,
        key,
        stored_head_crc: u32_at(header, 44),
        stored_body_crc: u32_at(header, 48),
        bound: *header.first_chunk().expect("a header is longer"),
    })
}

impl Header {
    /// Octets of the whole record, alignment included.
    pub fn stored_bytes(&self) -> usize {
        stored_bytes(self.head_bytes as usize, self.body_bytes as usize)
    }

    /// True if these octets are those that were written as the head.
    pub fn head_matches(&self, stored: &[u8]) -> bool {
        crc32fast::hash(stored) == self.stored_head_crc
    }

    /// True if these octets are those that were written as the body.
    pub fn body_matches(&self, stored: &[u8]) -> bool {
        crc32fast::hash(stored) == self.stored_body_crc
    }

    /// The head that was handed over, of the one that stands here.
    ///
    /// # Errors
    /// [`Invalid`] if its octets are not those that were written, or there is no key that opens them.
    pub(crate) fn open_head<'a>(&self, stored: &'a [u8], keys: &SegmentKeys) -> Result<Head<'a>, Invalid> {
        if !self.head_matches(stored) {
            return Err(Invalid::Bad("the head's CRC is wrong"));
        }
        let Some(key) = self.key else {
            let (head_crc, body_crc) = (self.stored_head_crc, self.stored_body_crc);
            return Ok(Head { text: Cow::Borrowed(stored), head_crc, body_crc });
        };
        if !keys.opens(key) {
            return Err(Invalid::NoKey(key));
        }
        match keys.open_head(key, &self.bound, stored) {
            Some((head, body_crc)) => {
                Ok(Head { head_crc: crc32fast::hash(&head), text: Cow::Owned(head), body_crc })
            }
            None => Err(Invalid::Bad("the head is not what its key sealed")),
        }
    }

    /// The body that was handed over, of the one that stands here behind this head.
    ///
    /// # Errors
    /// As [`Header::open_head`].
    pub(crate) fn open_body(
        &self,
        stored_head: &[u8],
        stored: Bytes,
        keys: &SegmentKeys,
    ) -> Result<Bytes, Invalid> {
        if !self.body_matches(&stored) {
            return Err(Invalid::Bad("the body's CRC is wrong"));
        }
        let Some(key) = self.key else { return Ok(stored) };
        if !keys.opens(key) {
            return Err(Invalid::NoKey(key));
        }
        let opened = keys.open_body(key, &self.bound, stored_head, &stored);
        opened.map(Bytes::from).ok_or(Invalid::Bad("the body is not what its key sealed"))
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{KEY_BYTES, Keyring};

    fn sample() -> Record {
        Record {
            kind: Kind::Entry,
            at: LogPosition { term: Term(3), index: LogIndex(7) },
            head: Bytes::from_static(b"head"),
            body: Bytes::from_static(b"body!"),
        }
    }

    fn plain(segment: u64) -> SegmentKeys {
        Keyring::default().of_segment(SegmentId(segment))
    }

    fn sealed(key: u8, segment: u64) -> SegmentKeys {
        Keyring::new(&[[key; KEY_BYTES]]).unwrap().of_segment(SegmentId(segment))
    }

    #[test]
    fn a_record_reads_back_at_its_own_place_only() {
        let mut out = Vec::new();
        write(&mut out, &sample(), &plain(9), 4096);
        assert_eq!(out.len(), 80, "64 + 4 + 5, aligned to 8");
        let header = read_header(&out, SegmentId(9), 4096).unwrap();
        assert_eq!((header.kind, header.at), (Kind::Entry, sample().at));
        assert!(header.head_matches(b"head") && header.body_matches(b"body!"));
        assert_eq!(
            read_header(&out, SegmentId(8), 4096),
            Err(Invalid::Bad("the header belongs to another place"))
        );
        assert_eq!(
            read_header(&out, SegmentId(9), 8192),
            Err(Invalid::Bad("the header belongs to another place"))
        );
    }

    #[test]
    fn every_single_flipped_bit_is_noticed() {
        let mut out = Vec::new();
        write(&mut out, &sample(), &plain(9), 0);
        for bit in 0..(HEADER_BYTES + 9) * 8 {
            let mut bad = out.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let noticed = match read_header(&bad, SegmentId(9), 0) {
                Err(_) => true,
                Ok(h) => !h.head_matches(&bad[64..68]) || !h.body_matches(&bad[68..73]),
            };
            assert!(noticed, "bit {bit}");
        }
    }

    /// The bytes of format version 1 are a promise to every data directory ever written.
    #[test]
    fn golden_record() {
        let mut out = Vec::new();
        write(&mut out, &sample(), &plain(2), 4096);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, include_str!("../testdata/record-v1.hex").trim());
    }

    /// Head and body of a record that was written, as its keys open them.
    fn opened(bytes: &[u8], keys: &SegmentKeys, offset: u32) -> Result<(Vec<u8>, Bytes, u32, u32), Invalid> {
        let header = read_header(bytes, keys.segment(), offset)?;
        let (head, rest) = bytes[HEADER_BYTES..].split_at(header.head_bytes as usize);
        let found = header.open_head(head, keys)?;
        let body = Bytes::copy_from_slice(&rest[..header.body_bytes as usize]);
        let body = header.open_body(head, body, keys)?;
        Ok((found.text.into_owned(), body, found.head_crc, found.body_crc))
    }

    #[test]
    fn what_is_sealed_is_opened_by_its_key_at_its_place_alone() {
        let keys = sealed(7, 9);
        let mut out = Vec::new();
        write(&mut out, &sample(), &keys, 4096);
        let crcs = (crc32fast::hash(b"head"), crc32fast::hash(b"body!"));
        let whole = (b"head".to_vec(), Bytes::from_static(b"body!"), crcs.0, crcs.1);
        assert_eq!(opened(&out, &keys, 4096), Ok(whole), "digests are those of what was handed over");
        assert!([&b"head"[..], b"body"].iter().all(|text| out.windows(4).all(|part| part != *text)));
        let key = keys.sealing().unwrap();
        for strange in [sealed(8, 9), plain(9)] {
            assert_eq!(opened(&out, &strange, 4096), Err(Invalid::NoKey(key)));
        }
        let mut again = Vec::new();
        write(&mut again, &sample(), &keys, 4096);
        assert_ne!(out, again, "no nonce twice");
        let rings = [[[8; KEY_BYTES], [7; KEY_BYTES]], [[7; KEY_BYTES], [8; KEY_BYTES]]];
        let rings = rings.map(|keys| Keyring::new(&keys).unwrap().of_segment(SegmentId(9)));
        assert!(rings.iter().all(|keys| opened(&out, keys, 4096).is_ok()), "old keys open");
        let mut plainly = Vec::new();
        write(&mut plainly, &sample(), &plain(9), 4096);
        assert!(opened(&plainly, &keys, 4096).is_ok(), "what was written before there was a key");
    }

    /// Rot is told by the CRCs, as without a key; what somebody who can count CRCs has changed by the tags.
    #[test]
    fn every_flipped_bit_of_a_sealed_record_is_noticed_with_its_crcs_put_right() {
        let keys = sealed(7, 9);
        let mut out = Vec::new();
        write(&mut out, &sample(), &keys, 0);
        let body_at = HEADER_BYTES + 4 + SEALED_BYTES;
        let fields = (4..44).chain(HEADER_BYTES..body_at + 5);
        for bit in fields.flat_map(|octet| octet * 8..octet * 8 + 8) {
            let mut bad = out.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let crc = |part: &[u8]| crc32fast::hash(part).to_le_bytes();
            let (head, body) = (crc(&bad[HEADER_BYTES..body_at]), crc(&bad[body_at..body_at + 5]));
            bad[44..48].copy_from_slice(&head);
            bad[48..52].copy_from_slice(&body);
            let header = crc(&bad[..60]);
            bad[60..64].copy_from_slice(&header);
            // A length may reach further than what stands there.
            bad.resize(1 << 20, 0);
            let lengths = (8..16).contains(&(bit / 8)).then(|| read_header(&bad, SegmentId(9), 0));
            match lengths {
                Some(Ok(h)) if (h.head_bytes + h.body_bytes) as usize + HEADER_BYTES > bad.len() => {}
                _ => assert!(opened(&bad, &keys, 0).is_err(), "bit {bit}"),
            }
        }
    }

    /// The same of a sealed record.
    #[test]
    fn golden_sealed_record() {
        let key: [u8; KEY_BYTES] = std::array::from_fn(|n| n as u8);
        let keys = Keyring::new(&[key]).unwrap().of_segment(SegmentId(2));
        let keys = keys.with_nonce(|| [0xa5; 12]);
        let mut out = Vec::new();
        write(&mut out, &sample(), &keys, 4096);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, include_str!("../testdata/sealed-v1.hex").trim());
    }
}
