//! Pure. What a segment's bytes say after a crash, and the verdict on a bad record.
//!
//! One batch is in flight at a time, so a crash leaves at most one damaged batch, at the end of the newest segment, and
//! nothing valid after it. Everything else is damage.

use bytes::Bytes;

use crate::codec;
use crate::limits::BLOCK_BYTES;
use crate::position::{Location, LogPosition, SegmentId};
use crate::record::{self, Invalid, Kind};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A row's head begins with its key.
pub(crate) const ROW_KEY_BYTES: usize = size_of::<u128>();

/// A record that was found.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) kind: Kind,
    pub(crate) at: LogPosition,
    pub(crate) location: Location,
    /// The head of a kind that is folded from it; of a row the key alone, of an entry nothing: a log can be larger than memory.
    pub(crate) head: Bytes,
    /// CRC-32 of the whole head.
    pub(crate) head_crc: u32,
    /// Whether the body's octets are what was written.
    pub(crate) body_intact: bool,
    /// Whether they are all zeros.
    pub(crate) body_zeroed: bool,
    /// If the body is not intact: whether a block of zeros lies in the record.
    pub(crate) zero_block: bool,
}

impl Found {
    /// End of the record, on the alignment of records.
    pub(crate) fn end(&self) -> usize {
        let l = self.location;
        l.offset as usize + record::stored_bytes(l.head_bytes as usize, l.body_bytes as usize)
    }
}

/// The first place that is not a record and not the end.
#[derive(Clone, Debug)]
pub(crate) struct Bad {
    pub(crate) offset: u32,
    pub(crate) why: Invalid,
    /// Whether a block of zeros lies between here and the last octet that is not zero.
    pub(crate) zero_block: bool,
}

/// What a segment holds.
pub(crate) struct Scan {
    pub(crate) records: Vec<Found>,
    /// End of the last valid record, on a block boundary.
    pub(crate) end: u32,
    pub(crate) bad: Option<Bad>,
    /// Offset of the last batch that begins with a valid mark.
    pub(crate) last_batch: u32,
}

/// What to do about the end of a segment's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The records end cleanly.
    Clean,
    /// A batch whose sync never finished: cut it off, nobody was told of it.
    Torn,
    /// Damaged after the last known sync, and not visibly torn. It may have been acknowledged.
    Ambiguous,
    /// Damage to synced bytes.
    Damaged,
}

/// The verdict on the first bad record at `bad`, given how far the log is known to have been synced (`mark`).
pub fn verdict(
    newest_segment: bool,
    bad: (SegmentId, u32),
    mark: (SegmentId, u32),
    zero_block: bool,
    valid_after: bool,
) -> Verdict {
    if !newest_segment || bad < mark || valid_after {
        Verdict::Damaged
    } else if zero_block {
        Verdict::Torn
    } else {
        Verdict::Ambiguous
    }
}

/// Walks the records of a segment's bytes.
pub(crate) fn scan(id: SegmentId, bytes: &[u8]) -> Scan {
    let mut records: Vec<Found> = Vec::new();
    let mut at = 0usize;
    let mut bad = None;
    let last_written = bytes.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
    while at < bytes.len() {
        // The rest of a batch's last block is zeros, perhaps too few for a header; the next batch begins at the next block.
        let block_end = at.next_multiple_of(BLOCK).min(bytes.len());
        if at < block_end && bytes[at..block_end].iter().all(|b| *b == 0) {
            at = block_end;
            continue;
        }
        let header = match record::read_header(&bytes[at..], id, at as u32) {
            Ok(header) => header,
            Err(Invalid::Empty) if last_written <= at => break,
            Err(why) => {
                bad = Some((at, why, at + record::HEADER_BYTES));
                break;
            }
        };
        let head_at = at + record::HEADER_BYTES;
        let body_at = head_at + header.head_bytes as usize;
        let Some(body) = bytes.get(body_at..body_at + header.body_bytes as usize) else {
            bad = Some((at, Invalid::Bad("the segment ends within a record"), bytes.len()));
            break;
        };
        let head = &bytes[head_at..body_at];
        if !header.head_matches(head) {
            bad = Some((at, Invalid::Bad("the head's CRC is wrong"), at + header.stored_bytes()));
            break;
        }
        let body_intact = header.body_matches(body);
        let end = at + header.stored_bytes();
        records.push(Found {
            kind: header.kind,
            at: header.at,
            location: Location {
                segment: id,
                offset: at as u32,
                head_bytes: header.head_bytes,
                body_bytes: header.body_bytes,
            },
            head: Bytes::copy_from_slice(match header.kind {
                Kind::Entry | Kind::Body => &[],
                Kind::Row => &head[..head.len().min(ROW_KEY_BYTES)],
                _ => head,
            }),
            head_crc: header.head_crc,
            body_intact,
            body_zeroed: body.iter().all(|b| *b == 0),
            zero_block: !body_intact && has_zero_block(bytes, at, end),
        });
        at = end;
    }
    let end = records.last().map_or(0, Found::end).next_multiple_of(BLOCK) as u32;
    // A block that a crash took may be the last that was written, so the whole of the bad record is looked at.
    let bad = bad.map(|(offset, why, to)| Bad {
        offset: offset as u32,
        zero_block: has_zero_block(bytes, offset, last_written.max(to)),
        why,
    });
    let last_batch = (0..bytes.len())
        .step_by(BLOCK)
        .rev()
        .find(|o| matches!(record::read_header(&bytes[*o..], id, *o as u32), Ok(h) if h.kind == Kind::Mark))
        .unwrap_or(0) as u32;
    Scan { records, end, bad, last_batch }
}

fn has_zero_block(bytes: &[u8], from: usize, to: usize) -> bool {
    let to = to.next_multiple_of(BLOCK).min(bytes.len());
    bytes[from / BLOCK * BLOCK..to].chunks(BLOCK).any(|block| block.iter().all(|b| *b == 0))
}

/// The highest position that any mark among `records` declares synced.
pub(crate) fn highest_mark(records: &[Found]) -> (SegmentId, u32) {
    records
        .iter()
        .filter(|r| r.kind == Kind::Mark)
        .filter_map(|r| codec::decode::<codec::Mark>("mark", &r.head).ok())
        .map(|mark| mark.synced)
        .max()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record with a long head of which a crash kept the first block alone is torn, not ambiguous.
    #[test]
    fn p9_a_long_head_cut_short_is_torn() {
        let mut bytes = Vec::new();
        let record = record::Record::of(Kind::Table, vec![7; 3 * BLOCK]);
        record::write(&mut bytes, &record, SegmentId(1), 0);
        bytes.resize(8 * BLOCK, 0);
        for keep in 1..=3 {
            let mut torn = bytes.clone();
            torn[keep * BLOCK..].fill(0);
            let bad = scan(SegmentId(1), &torn).bad.unwrap();
            assert!(bad.zero_block, "{keep} blocks kept");
        }
    }

    /// The table of the verdict. A reader of it should be able to say why each line must be so.
    #[test]
    fn p9_verdict_table() {
        let (seg, mark) = (SegmentId(3), (SegmentId(3), 8192));
        let table = [
            // newest, bad at, zero block, valid after
            (true, 8192, true, false, Verdict::Torn),
            (true, 8192, false, false, Verdict::Ambiguous),
            (true, 8192, true, true, Verdict::Damaged),
            (true, 4096, true, false, Verdict::Damaged),
            (false, 8192, true, false, Verdict::Damaged),
        ];
        for (newest, at, zero, after, expected) in table {
            assert_eq!(
                verdict(newest, (seg, at), mark, zero, after),
                expected,
                "bad at {at}, newest {newest}"
            );
        }
    }
}
