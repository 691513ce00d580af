//! Pure. Which waiting records go into the next batch, and what bytes it is.
//!
//! A batch begins on a block boundary with a `Mark` and is padded with zeros to the next one. Records keep the order in
//! which they were handed over.

use std::collections::VecDeque;

use crate::codec::{self, Mark};
use crate::limits::{BATCH_BYTES_MAX, BLOCK_BYTES};
use crate::position::{Location, SegmentId};
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
    let mark = Record::of(Kind::Mark, codec::encode(&Mark { synced }));
    if mark.stored_bytes(keys) <= room {
        for record in std::iter::once(mark).chain(opening) {
            record::write(bytes, &record, keys, start + bytes.len() as u32);
        }
    }
    while let Some((record, _)) = waiting.front() {
        if bytes.len() + record.stored_bytes(keys) > room {
            break;
        }
        let (record, tag) = waiting.pop_front().expect("there is a front");
        let location = Location {
            segment: keys.segment(),
            offset: start + bytes.len() as u32,
            head_bytes: record.stored_head_bytes(keys) as u32,
            body_bytes: record.body.len() as u32,
        };
        record::write(bytes, &record, keys, location.offset);
        placed.push(Placed { record, location, tag });
    }
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    let end = start + bytes.len() as u32;
    Batch { placed, end }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::LogPosition;
    use crate::seal::Keyring;

    fn record(body: usize) -> Record {
        Record {
            kind: Kind::Entry,
            at: LogPosition::default(),
            head: Default::default(),
            body: vec![7; body].into(),
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
