//! Pure. The one place where structured fields become bytes on disk: bincode 2, little-endian, variable-length
//! integers. The encodings are a promise; `testdata/golden.txt` holds vectors that a test compares.

use bincode::{Decode, Encode, config};

use crate::limits::HEAD_BYTES_MAX;
use crate::position::{LogIndex, LogPosition, SegmentId, Term};

/// A field that did not decode. The record's CRC was right, so this is a version skew or a bug, never rot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} does not decode: {why}")]
pub struct CodecError {
    /// What was being decoded.
    pub what: &'static str,
    /// The decoder's words.
    pub why: String,
}

fn configuration() -> impl config::Config {
    config::standard().with_limit::<{ 64 << 20 }>()
}

/// Encodes `value`. The types of this workspace have no encoding that fails.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    bincode::encode_to_vec(value, configuration())
        .expect("encoding into a Vec has no failing case for our types")
}

/// Decodes all of `bytes` as a `T`.
///
/// # Errors
/// If the bytes are no `T`, are too long, or something follows.
pub fn decode<T: Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, CodecError> {
    whole(what, bytes, bincode::decode_from_slice(bytes, configuration()))
}

fn whole<T>(
    what: &'static str,
    bytes: &[u8],
    decoded: Result<(T, usize), bincode::error::DecodeError>,
) -> Result<T, CodecError> {
    match decoded {
        Ok((value, used)) if used == bytes.len() => Ok(value),
        Ok((_, used)) => {
            Err(CodecError { what, why: format!("{} bytes follow its end", bytes.len() - used) })
        }
        Err(e) => Err(CodecError { what, why: e.to_string() }),
    }
}

/// Decodes all of `bytes`, which come from this node's own log or from a peer that proved who it is, and may be far larger than a
/// message: the small tables grow with the rate of mail.
///
/// # Errors
/// As [`decode`].
pub fn decode_large<T: Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, CodecError> {
    let configuration = config::standard().with_limit::<{ 8 << 30 }>();
    whole(what, bytes, bincode::decode_from_slice(bytes, configuration))
}

/// Opens every segment. Valid if and only if it is the segment's first record.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct SegmentHead {
    /// The cluster's id as `init` wrote it.
    pub cluster: String,
    /// The node's id.
    pub node: u64,
    /// Segment before this one, and the offset at which its records end.
    pub previous: Option<(SegmentId, u32)>,
}

/// Opens every batch, and closes the log after some idleness.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Mark {
    /// Everything in the log before this position was synced when the mark was written.
    pub synced: (SegmentId, u32),
}

/// A vote as Raft needs it on disk (Raft §5.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub struct Vote {
    /// The term voted in.
    pub term: Term,
    /// Whom this node voted for.
    pub node: u64,
    /// True once that node is known to lead the term.
    pub committed: bool,
}

/// Ranges (offset, length) of a segment whose octets are about to be, or were, overwritten with zeros. One without ranges says that all
/// before it were, and that this is durable.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Intent {
    /// The segment that is named. The intent lives as long as it does.
    pub segment: SegmentId,
    /// Disjoint ranges in rising order.
    pub ranges: Vec<(u32, u32)>,
}

impl Intent {
    /// What says that a round is over.
    pub(crate) fn none() -> Intent {
        Intent { segment: SegmentId::default(), ranges: Vec::new() }
    }
}

/// Keys whose spilled rows are no longer part of the state.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Gone {
    /// The keys.
    pub keys: Vec<u128>,
}

/// What a node that lost something may have promised, and what still counts of its log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub struct Reset {
    /// The vote from here on: no lower one is ever given again.
    pub vote: Option<Vote>,
    /// The node may have acknowledged entries up to here: it neither campaigns nor votes for a shorter log before its own is as long.
    pub last: Option<LogPosition>,
    /// Everything before this record is void, but for bodies of entries up to this index.
    pub void_but: Option<LogIndex>,
}

/// A part of the small tables.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct TablePart {
    /// Number of the part from 0.
    pub part: u32,
    /// Octets of this part.
    pub bytes: Vec<u8>,
}

/// Completes a checkpoint: rows and tables since the one before become the state at `applied`.
///
/// Checkpoints are numbered; a row, tombstone or table part carries its checkpoint's number as index. The newest number
/// with an end counts; records with a higher number, or one that is declared void, were cut short by a crash.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct CheckpointEnd {
    /// The state's position: entries up to here are folded into it.
    pub applied: LogPosition,
    /// Parts of the tables.
    pub parts: u32,
    /// Numbers of checkpoints that were cut short and of which records may still stand in the log.
    pub void: Vec<u64>,
}

/// Largest piece of the small tables that goes into one record.
pub const TABLE_PART_BYTES: usize = HEAD_BYTES_MAX / 4;

#[cfg(test)]
mod tests {
    use super::*;

    /// What stands in a data directory is read by every later version: these octets are never to change.
    fn holds<T: Encode + Decode<()> + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
        let golden = include_str!("../testdata/golden.txt")
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let octets = encode(value);
        let hex: String = octets.iter().map(|octet| format!("{octet:02x}")).collect();
        assert_eq!(Some(&hex[..]), golden, "{name}");
        assert_eq!(&decode::<T>("sample", &octets).expect("what was encoded"), value);
    }

    #[test]
    fn golden_heads() {
        let at = |term, index| LogPosition { term: Term(term), index: LogIndex(index) };
        let vote = Vote { term: Term(300), node: 2, committed: true };
        holds("first-segment-head", &SegmentHead { cluster: "example".into(), node: 3, previous: None });
        let previous = Some((SegmentId(70_000), 4096));
        holds("segment-head", &SegmentHead { cluster: "example".into(), node: 3, previous });
        holds("mark", &Mark { synced: (SegmentId(9), 8192) });
        holds("vote", &vote);
        holds("intent", &Intent { segment: SegmentId(9), ranges: vec![(64, 9000), (70_000, 1 << 20)] });
        holds("end-of-a-round", &Intent::none());
        holds("tombstones", &Gone { keys: vec![1, 1 << 79] });
        holds(
            "reset",
            &Reset { vote: Some(vote), last: Some(at(300, 1 << 33)), void_but: Some(LogIndex(251)) },
        );
        holds("doubt", &Reset { last: Some(at(1, 250)), ..Reset::default() });
        holds("table", &TablePart { part: 2, bytes: b"octets".to_vec() });
        holds("checkpoint", &CheckpointEnd { applied: at(7, 70_000), parts: 3, void: vec![4, 300] });
    }
}
