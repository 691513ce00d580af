//! Pure. What nodes say to each other, byte by byte.
//!
//! A frame is its length (u32, little-endian, without itself), then a kind (1 byte), then the message. Valid if and only if
//! the length is at most 64 MiB and the message decodes wholly. The first frame of a connection is a [`Hello`]. Messages
//! are bincode, but for the octets of entries and bodies, which follow raw.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use holdfast_storage::codec::{Vote, decode, encode};
use holdfast_storage::{Entry, LogIndex, LogPosition, Term};

use crate::limits::FRAME_BYTES_MAX;
use crate::types::{StoredMembership, position};

/// Version of what nodes say.
pub(crate) const PROTOCOL: u32 = 3;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) enum Purpose {
    /// A stream of appends.
    Append,
    /// Requests with answers in any order.
    Request,
}

/// The first frame.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) struct Hello {
    pub(crate) protocol: u32,
    pub(crate) cluster: String,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) purpose: Purpose,
}

/// The head of an append; its entries' octets follow raw, head and body of each in turn.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) struct AppendHead {
    pub(crate) vote: Vote,
    pub(crate) previous: Option<LogPosition>,
    pub(crate) commit: Option<LogPosition>,
    pub(crate) entries: Vec<(LogPosition, u32, u32)>,
}

/// The answer to an append.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) enum AppendAnswer {
    Durable(Option<LogPosition>),
    Conflict(LogPosition),
    HigherVote(Vote),
}

/// What a node says of its own past.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) enum Past {
    /// Nothing was ever written here.
    Pristine,
    /// It agreed to a first formation and has no log.
    Prepared,
    /// It has a log; these are the members it knows.
    Formed(Vec<u64>),
}

/// A request. Octets of a body follow raw where noted.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) enum Request {
    PreVote(VoteRequest),
    Vote(VoteRequest),
    TransferLeader {
        from: Vote,
        to: u64,
        last: Option<LogPosition>,
    },
    /// A proposal: `command` octets, then the body, follow.
    Propose {
        command: u32,
        term: Option<Term>,
        placed: bool,
        left_ms: u64,
    },
    Past,
    Prepare,
    Body(LogIndex),
    /// Length and CRC-32 of the body of a committed entry. Answered only by a node that has applied it and lacks nothing itself: that
    /// the body is gone means then that it was erased on purpose.
    Digest(LogIndex),
    /// A [`crate::snapshot::Part`] follows. They come in the order of their numbers, from 0, before the snapshot itself.
    SnapshotPart {
        last: Option<LogPosition>,
        number: u32,
    },
    /// A snapshot of which so many parts were sent.
    Snapshot {
        vote: Vote,
        last: Option<LogPosition>,
        parts: u32,
    },
    Status,
    /// What does the node that is asked know of the one that asks?
    Seen,
    /// Who are the members, as far as the node that is asked knows?
    Members,
    /// How many entries has the leader applied? See [`crate::read_index`].
    ReadIndex,
}

/// What a node knows of itself and of the one that asked; see [`crate::repair`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub(crate) struct Seen {
    /// Its own vote.
    pub(crate) vote: Option<Vote>,
    /// Whether it leads.
    pub(crate) leads: bool,
    /// The last position that it knows to be committed.
    pub(crate) committed: Option<LogPosition>,
    /// The last position that it has, durable.
    pub(crate) has: Option<LogPosition>,
    /// The highest index of which it lost the body.
    pub(crate) lost: Option<LogIndex>,
    /// The last position that it has, or up to where it may have had one.
    pub(crate) last: Option<LogPosition>,
    /// As leader: up to where the one that asked has acknowledged entries.
    pub(crate) matched: Option<LogPosition>,
}

/// See Raft §5.2; `transfer` marks an election that a leader asked for.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) struct VoteRequest {
    pub(crate) vote: Vote,
    pub(crate) last: Option<LogPosition>,
    pub(crate) transfer: bool,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(crate) enum Answer {
    Vote {
        vote: Vote,
        granted: bool,
        last: Option<LogPosition>,
    },
    Done,
    /// Applied at a position, placed on these nodes if that was asked. The outcome follows raw.
    Proposed {
        at: LogPosition,
        nodes: Vec<u64>,
    },
    /// The machine refused the command; the outcome follows raw.
    Refused,
    NotLeader(Option<u64>),
    /// The proposal may or may not come to pass.
    Unknown,
    Past(Past),
    /// The body follows raw.
    Body,
    BodyGone,
    Digest(u32, u32),
    /// It was here, and other octets stand in its place.
    BodyDamaged,
    Snapshot(Vote),
    /// A report in bincode follows raw.
    Status,
    Seen(Seen),
    Failed(String),
    /// An earlier snapshot is still being installed.
    Installing,
    /// Those that vote, and where their peers reach them, by the membership of this position.
    Members(Known),
    /// So many entries; none from whoever does not lead for certain.
    Applied(Option<u64>),
}

/// A membership that a node knows.
#[derive(Clone, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub(crate) struct Known {
    pub(crate) at: Option<LogPosition>,
    pub(crate) voters: BTreeMap<u64, String>,
}

impl Known {
    /// Nothing if no membership was ever agreed on.
    pub(crate) fn of(membership: &StoredMembership) -> Option<Known> {
        let voters = membership.voter_ids().filter_map(|id| {
            let node = membership.get_node(&id)?;
            Some((id, node.address.clone()))
        });
        let at = membership.log_id().as_ref().map(position)?;
        Some(Known { at: Some(at), voters: voters.collect() })
    }
}

/// A frame that is not one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadFrame(pub(crate) String);

/// Puts a frame of structured `head` and raw octets to the end of `out`.
pub(crate) fn put<T: Encode>(out: &mut BytesMut, id: u64, head: &T, raw: &[&[u8]]) {
    let head = encode(head);
    let raw_bytes: usize = raw.iter().map(|r| r.len()).sum();
    let bytes = 8 + 4 + head.len() + raw_bytes;
    out.reserve(4 + bytes);
    out.put_u32_le(bytes as u32);
    out.put_u64_le(id);
    out.put_u32_le(head.len() as u32);
    out.extend_from_slice(&head);
    raw.iter().for_each(|r| out.extend_from_slice(r));
}

/// A frame as it was read: its number, the structured head, the raw octets.
pub(crate) struct Frame {
    pub(crate) id: u64,
    head: Bytes,
    pub(crate) raw: Bytes,
}

impl Frame {
    pub(crate) fn head<T: Decode<()>>(&self, what: &'static str) -> Result<T, BadFrame> {
        decode(what, &self.head).map_err(|e| BadFrame(e.to_string()))
    }
}

/// Takes a whole frame off `bytes`, or tells that more is needed.
pub(crate) fn take(bytes: &mut BytesMut) -> Result<Option<Frame>, BadFrame> {
    let Some(length) = bytes.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*length) as usize;
    if !(12..=FRAME_BYTES_MAX).contains(&length) {
        return Err(BadFrame(format!("a frame of {length} bytes")));
    }
    if bytes.len() < 4 + length {
        bytes.reserve(4 + length - bytes.len());
        return Ok(None);
    }
    bytes.advance(4);
    let mut frame = bytes.split_to(length).freeze();
    let id = frame.get_u64_le();
    let head_bytes = frame.get_u32_le() as usize;
    if head_bytes > frame.len() {
        return Err(BadFrame("the head is longer than its frame".into()));
    }
    let head = frame.split_to(head_bytes);
    Ok(Some(Frame { id, head, raw: frame }))
}

/// Puts an append with its entries.
pub(crate) fn put_append(
    out: &mut BytesMut,
    vote: Vote,
    previous: Option<LogPosition>,
    commit: Option<LogPosition>,
    entries: &[Entry],
) {
    let lengths = entries.iter().map(|e| (e.at, e.head.len() as u32, e.body.len() as u32)).collect();
    let head = AppendHead { vote, previous, commit, entries: lengths };
    let raw: Vec<&[u8]> = entries.iter().flat_map(|e| [&e.head[..], &e.body[..]]).collect();
    put(out, 0, &head, &raw);
}

/// The entries of an append: each follows the one before, and the first what it says was before. Consensus takes that for granted, and an
/// entry after a gap would pass for another one. Small bodies are copied out, so that they do not pin the buffer they came in.
pub(crate) fn entries(head: &AppendHead, mut raw: Bytes) -> Result<Vec<Entry>, BadFrame> {
    let mut entries = Vec::with_capacity(head.entries.len().min(4096));
    let next = head.previous.map_or(0, |at| at.index.0 + 1);
    for (next, (at, head_bytes, body_bytes)) in (next..).zip(&head.entries) {
        if at.index.0 != next {
            return Err(BadFrame(format!("entry {} is sent where entry {next} is due", at.index.0)));
        }
        let (head_bytes, body_bytes) = (*head_bytes as usize, *body_bytes as usize);
        if head_bytes + body_bytes > raw.len() {
            return Err(BadFrame("an entry is longer than its frame".into()));
        }
        let head = Bytes::copy_from_slice(&raw.split_to(head_bytes));
        let body = Bytes::copy_from_slice(&raw.split_to(body_bytes));
        entries.push(Entry { at: *at, head, body });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_any_split_and_nonsense_is_refused() {
        let entry = Entry {
            at: LogPosition { term: Term(2), index: LogIndex(5) },
            head: Bytes::from_static(b"head"),
            body: Bytes::from_static(b"body"),
        };
        let mut whole = BytesMut::new();
        let previous = LogPosition { index: LogIndex(4), ..entry.at };
        put_append(&mut whole, Vote::default(), Some(previous), Some(entry.at), std::slice::from_ref(&entry));
        for split in 0..whole.len() {
            let mut part = BytesMut::from(&whole[..split]);
            assert!(take(&mut part).unwrap().is_none(), "{split}");
            part.extend_from_slice(&whole[split..]);
            let frame = take(&mut part).unwrap().unwrap();
            let head: AppendHead = frame.head("append").unwrap();
            assert_eq!(entries(&head, frame.raw).unwrap(), std::slice::from_ref(&entry));
        }
        let mut nonsense = BytesMut::from(&b"GET / HTTP/1.1\r\n\r\n"[..]);
        assert!(take(&mut nonsense).is_err());
    }
    /// P1: an entry behind a gap would stand in the follower's log for another one.
    #[test]
    fn p1_entries_behind_a_gap_are_not_taken() {
        let at = |index| LogPosition { term: Term(2), index: LogIndex(index) };
        let taken = |previous: Option<u64>, indices: &[u64]| {
            let entry = |index| Entry { at: at(index), head: Bytes::new(), body: Bytes::new() };
            let all: Vec<Entry> = indices.iter().copied().map(entry).collect();
            let mut out = BytesMut::new();
            put_append(&mut out, Vote::default(), previous.map(at), None, &all);
            let frame = take(&mut out).unwrap().unwrap();
            entries(&frame.head("append").unwrap(), frame.raw).map(|entries| entries.len())
        };
        assert_eq!(taken(Some(895), &[896, 897]), Ok(2));
        assert_eq!(taken(None, &[0, 1]), Ok(2));
        assert_eq!(taken(Some(895), &[]), Ok(0));
        for (previous, indices) in [(Some(895), &[901, 902][..]), (Some(895), &[896, 898]), (None, &[1])] {
            assert!(taken(previous, indices).is_err(), "{previous:?} {indices:?}");
        }
    }
}
