//! Pure. Which waiting records go into the next batch, and what bytes it is.
//!
//! A batch begins on a block boundary with a `Mark`, which says how long it is, and is padded with zeros to the next one. Records keep
//! the order in which they were handed over.

use std::collections::VecDeque;

use bytes::Bytes;

use super::recovery::Found;
use crate::codec::{self, Mark};
use crate::limits::{BATCH_BYTES_MAX, BLOCK_BYTES};
use crate::position::{Location, LogIndex, LogPosition, SegmentId};
use crate::record::{self, Kind, Record};
use crate::seal::SegmentKeys;

/// A record's place in a batch that was laid out.
pub(crate) struct Placed<T> {
    pub(crate) record: Record,
    pub(crate) location: Location,
    pub(crate) tag: T,
}

/// The bytes of a batch.
pub(crate) struct Batch<T> {
    pub(crate) placed: Vec<Placed<T>>,
    /// Where the next batch begins.
    pub(crate) end: u32,
}

/// Lays out as many of the `waiting` records as fit at `start` of the keys' segment, which has `segment_bytes`, after the `opening`
/// records. `bytes` receives what is to be written at `start`. Nothing is placed if not even the first one fits.
pub(crate) fn lay_out<T>(
    bytes: &mut Vec<u8>,
    opening: Vec<Record>,
    waiting: &mut VecDeque<(Record, T)>,
    synced: (SegmentId, u32),
    keys: &SegmentKeys,
    start: u32,
    segment_bytes: u64,
) -> Batch<T> {
    debug_assert!((start as u64).is_multiple_of(BLOCK_BYTES));
    bytes.clear();
    let room = (segment_bytes - start as u64).min(BATCH_BYTES_MAX as u64) as usize;
    let mut placed = Vec::new();
    let mut mark = Record::of(Kind::Mark, codec::encode(&Mark { synced }));
    let before = opening.iter().map(|record| record.stored_bytes(keys));
    let mut length = mark.stored_bytes(keys) + before.sum::<usize>();
    while let Some((record, _)) = waiting.front() {
        let stored_bytes = record.stored_bytes(keys);
        if length + stored_bytes > room {
            break;
        }
        let (record, tag) = waiting.pop_front().expect("there is a front");
        let location = Location {
            segment: keys.segment(),
            offset: start + length as u32,
            head_bytes: record.stored_head_bytes(keys) as u32,
            body_bytes: record.body.len() as u32,
        };
        placed.push(Placed { record, location, tag });
        length += stored_bytes;
    }
    if length <= room {
        mark.at.index = LogIndex(length as u64);
        let records = std::iter::once(&mark).chain(&opening).chain(placed.iter().map(|p| &p.record));
        for record in records {
            record::write(bytes, record, keys, start + bytes.len() as u32);
        }
        debug_assert_eq!(bytes.len(), length);
    }
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    let end = start + bytes.len() as u32;
    Batch { placed, end }
}

/// The mark of the batch that is cut at `from`, the last one of `records`, and where it stands: its batch ends there now. Nothing if the batch was
/// no longer. Of what is cut no octet may be written over before this is durable: zeros that were no padding would be a loss.
pub(crate) fn cut_mark(records: &[Found], keys: SegmentKeys, from: u32) -> Option<(u32, Vec<u8>)> {
    let found = records.iter().rfind(|f| f.kind == Kind::Mark && f.location.segment == keys.segment())?;
    let offset = found.location.offset;
    let length = LogIndex((from - offset) as u64);
    if found.at.index <= length {
        return None;
    }
    let at = LogPosition { index: length, ..found.at };
    let mark = Record { kind: Kind::Mark, at, head: found.head.clone(), body: Bytes::new() };
    let mut bytes = Vec::new();
    record::write(&mut bytes, &mark, &keys.sealing_with(found.key), offset);
    Some((offset, bytes))
}

#[cfg(test)]
mod tests {
    use super::super::recovery;
    use super::*;
    use crate::seal::{KEY_BYTES, Keyring};

    fn record(body: usize) -> Record {
        Record {
            kind: Kind::Entry,
            at: LogPosition::default(),
            head: Default::default(),
            body: vec![7; body].into(),
        }
    }

    /// A batch that is cut ends there and is damaged nowhere, whichever key its mark is sealed with and whichever seals now.
    #[test]
    fn p9_a_batch_that_was_cut_is_whole() {
        let ring = |keys: &[u8]| {
            let keys: Vec<_> = keys.iter().map(|key| [*key; KEY_BYTES]).collect();
            if keys.is_empty() { Keyring::default() } else { Keyring::new(&keys).expect("keys") }
        };
        for (then, now) in [(ring(&[]), ring(&[])), (ring(&[]), ring(&[1])), (ring(&[1]), ring(&[2, 1]))] {
            let keys = then.of_segment(SegmentId(1));
            let mut waiting: VecDeque<_> = [6000, 6000].map(|bytes| (record(bytes), ())).into();
            let mut bytes = Vec::new();
            let batch = lay_out(&mut bytes, Vec::new(), &mut waiting, Default::default(), &keys, 0, 1 << 20);
            let cut = batch.placed[1].location.offset;
            bytes[cut as usize..].fill(0);
            let keys = now.of_segment(SegmentId(1));
            let torn = recovery::scan(&keys, &bytes);
            assert_eq!((torn.records.len(), torn.holes.len(), torn.holes[0].from), (2, 1, cut));
            let (at, mark) =
                cut_mark(&torn.records, now.of_segment(SegmentId(1)), cut).expect("it was longer");
            bytes[at as usize..][..mark.len()].copy_from_slice(&mark);
            let whole = recovery::scan(&keys, &bytes);
            assert_eq!((whole.records.len(), whole.holes.len()), (2, 0));
            assert_eq!(cut_mark(&whole.records, now.of_segment(SegmentId(1)), cut), None);
        }
    }

    #[test]
    fn a_batch_is_whole_blocks_in_order_and_leaves_what_does_not_fit() {
        let mut waiting: VecDeque<_> = (0..3).map(|n| (record(6000), n)).collect();
        let mut bytes = Vec::new();
        let keys = Keyring::default().of_segment(SegmentId(1));
        let batch = lay_out(&mut bytes, Vec::new(), &mut waiting, Default::default(), &keys, 4096, 4096 * 4);
        assert_eq!(batch.placed.iter().map(|p| p.tag).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(waiting.len(), 1);
        assert_eq!((bytes.len(), batch.end), (3 * 4096, 4 * 4096));
    }
}
