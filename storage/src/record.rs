//! Pure. The record: a fixed header, a structured head, a raw body.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..4 | magic `HFR1` |
//! | 4 | format version, 1 |
//! | 5 | kind |
//! | 6 | feature level that a reader must know |
//! | 7 | zero |
//! | 8..12 | length of the head |
//! | 12..16 | length of the body |
//! | 16..24 | term (0 where the kind has none) |
//! | 24..32 | index (0 where the kind has none) |
//! | 32..40 | segment id |
//! | 40..44 | offset of this header in the segment |
//! | 44..48 | CRC-32 of the head |
//! | 48..52 | CRC-32 of the body |
//! | 52..56 | key id, 0 for none |
//! | 56..60 | zero |
//! | 60..64 | CRC-32 of bytes 0..60 |
//!
//! All integers are little-endian. Head and body follow; the next record begins at the next multiple of 8. A header is
//! valid if and only if magic and CRC are right, the lengths are within bounds, and segment and offset are those
//! of the place it was read from: a stale, misdirected or copied block fails. Head and body have a CRC each, since
//! a body may have been erased while the head stays.

use bytes::Bytes;

use crate::limits::{BODY_BYTES_MAX, HEAD_BYTES_MAX};
use crate::position::{LogIndex, LogPosition, SegmentId, Term};

/// Length of the header.
pub const HEADER_BYTES: usize = 64;
/// The format version that this program writes, and the newest it reads.
pub const VERSION: u8 = 1;
const MAGIC: [u8; 4] = *b"HFR1";
const ALIGN: usize = 8;

/// What a record is for. Numbers are a promise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// First record of a segment.
    SegmentHead = 1,
    /// First record of a batch: how far the log was synced.
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

    /// Octets that the record takes in a segment, alignment included.
    pub fn stored_bytes(&self) -> usize {
        stored_bytes(self.head.len(), self.body.len())
    }
}

/// A header that was found valid at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the record is.
    pub kind: Kind,
    /// Term and index.
    pub at: LogPosition,
    /// Length of the head.
    pub head_bytes: u32,
    /// Length of the body.
    pub body_bytes: u32,
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
}

/// Octets that a record with these lengths takes, alignment included.
pub fn stored_bytes(head_bytes: usize, body_bytes: usize) -> usize {
    (HEADER_BYTES + head_bytes + body_bytes).next_multiple_of(ALIGN)
}

/// Writes `record` for its place to the end of `out`, which is where the record will stand in the file.
pub fn write(out: &mut Vec<u8>, record: &Record, segment: SegmentId, offset: u32) {
    debug_assert!(record.head.len() <= HEAD_BYTES_MAX && record.body.len() <= BODY_BYTES_MAX);
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[VERSION, record.kind as u8, 0, 0]);
    out.extend_from_slice(&(record.head.len() as u32).to_le_bytes());
    out.extend_from_slice(&(record.body.len() as u32).to_le_bytes());
    out.extend_from_slice(&record.at.term.0.to_le_bytes());
    out.extend_from_slice(&record.at.index.0.to_le_bytes());
    out.extend_from_slice(&segment.0.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&record.head).to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&record.body).to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    let crc = crc32fast::hash(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&record.head);
    out.extend_from_slice(&record.body);
    out.resize(start + record.stored_bytes(), 0);
}

/// The segment that a file's first header says it holds, if that header is valid there.
pub(crate) fn segment_of(bytes: &[u8]) -> Option<SegmentId> {
    let header = bytes.first_chunk::<HEADER_BYTES>()?;
    let segment = SegmentId(u64_at(header, 32));
    read_header(bytes, segment, 0).ok().filter(|h| h.kind == Kind::Mark).map(|_| segment)
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
    if header[4] > VERSION || header[6] > 0 {
        return Err(Invalid::Newer(header[4]));
    }
    if u64_at(header, 32) != segment.0 || u32_at(header, 40) != offset {
        return Err(Invalid::Bad("the header belongs to another place"));
    }
    let kind = Kind::parse(header[5]).ok_or(Invalid::Bad("unknown kind"))?;
    let (head_bytes, body_bytes) = (u32_at(header, 8), u32_at(header, 12));
    if head_bytes as usize > HEAD_BYTES_MAX || body_bytes as usize > BODY_BYTES_MAX {
        return Err(Invalid::Bad("a length is out of bounds"));
    }
    Ok(Header {
        kind,
        at: LogPosition { term: Term(u64_at(header, 16)), index: LogIndex(u64_at(header, 24)) },
        head_bytes,
        body_bytes,
        head_crc: u32_at(header, 44),
        body_crc: u32_at(header, 48),
    })
}

impl Header {
    /// Octets of the whole record, alignment included.
    pub fn stored_bytes(&self) -> usize {
        stored_bytes(self.head_bytes as usize, self.body_bytes as usize)
    }

    /// True if `head` is the head that was written.
    pub fn head_matches(&self, head: &[u8]) -> bool {
        crc32fast::hash(head) == self.head_crc
    }

    /// True if `body` is the body that was written.
    pub fn body_matches(&self, body: &[u8]) -> bool {
        crc32fast::hash(body) == self.body_crc
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

    fn sample() -> Record {
        Record {
            kind: Kind::Entry,
            at: LogPosition { term: Term(3), index: LogIndex(7) },
            head: Bytes::from_static(b"head"),
            body: Bytes::from_static(b"body!"),
        }
    }

    #[test]
    fn a_record_reads_back_at_its_own_place_only() {
        let mut out = Vec::new();
        write(&mut out, &sample(), SegmentId(9), 4096);
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
        write(&mut out, &sample(), SegmentId(9), 0);
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
        write(&mut out, &sample(), SegmentId(2), 4096);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, include_str!("../testdata/record-v1.hex").trim());
    }
}
