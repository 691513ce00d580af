//! Pure. What a segment's bytes say after a crash, and the verdict on a bad record.
//!
//! One batch is in flight at a time, so a crash leaves at most one damaged batch, at the end of the newest segment, and
//! nothing valid after it. Everything else is damage.

use bytes::Bytes;

use crate::codec;
use crate::error::OpenError;
use crate::limits::BLOCK_BYTES;
use crate::position::{Location, LogPosition, SegmentId};
use crate::record::{self, Invalid, Kind};
use crate::seal::{KeyId, SegmentKeys};

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
    /// The key that it is sealed with.
    pub(crate) key: Option<KeyId>,
    /// CRC-32 of the whole head and of the body, as they were handed over.
    pub(crate) head_crc: u32,
    pub(crate) body_crc: u32,
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

/// A place that is not a record and not the end.
#[derive(Clone, Debug)]
pub(crate) struct Hole {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) why: Invalid,
    /// Whether a crash can have left it: not a file that is gone, nor one that cannot be read.
    pub(crate) by_crash: bool,
    /// Whether a block of zeros lies between here and the last octet that is not zero.
    pub(crate) zero_block: bool,
}

/// What a segment holds.
pub(crate) struct Scan {
    pub(crate) segment: SegmentId,
    pub(crate) records: Vec<Found>,
    /// End of the last valid record, on a block boundary.
    pub(crate) end: u32,
    /// In rising order.
    pub(crate) holes: Vec<Hole>,
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

impl Scan {
    /// Nothing is wrong with what the right key would open.
    pub(crate) fn check_key(&self) -> Result<(), OpenError> {
        let without = self.holes.iter().find_map(|hole| match hole.why {
            Invalid::NoKey(key) => Some((hole.from, key)),
            _ => None,
        });
        match without {
            Some((offset, key)) => Err(OpenError::NoKey { segment: self.segment, offset, key }),
            None => Ok(()),
        }
    }

    /// Where the window begins that follows one of `base..to` in a segment that ends at `end`: the last batch may go on behind it, and is
    /// read with the next one.
    pub(crate) fn next_window(&self, base: u32, to: u32, end: u32) -> u32 {
        let next = if to < end && self.last_batch > base { self.last_batch } else { to };
        next.next_multiple_of(BLOCK_BYTES as u32).min(end.max(to))
    }

    /// Of a file that is not there.
    pub(crate) fn missing(segment: SegmentId, segment_bytes: u32) -> Scan {
        let why = Invalid::Bad("its file is missing");
        let hole = Hole { from: 0, to: segment_bytes, why, by_crash: false, zero_block: false };
        Scan { segment, records: Vec::new(), end: 0, holes: vec![hole], last_batch: 0 }
    }
}

impl Found {
    /// A reset that stands nowhere yet.
    pub(crate) fn of_reset(segment: SegmentId, reset: &codec::Reset) -> Found {
        Found {
            kind: Kind::Reset,
            at: LogPosition::default(),
            location: Location { segment, offset: 0, head_bytes: 0, body_bytes: 0 },
            head: codec::encode(reset).into(),
            key: None,
            head_crc: 0,
            body_crc: 0,
            body_intact: true,
            body_zeroed: true,
            zero_block: false,
        }
    }
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

/// Walks the records of a segment's bytes. Behind a place that is no record it goes on with the next record whose place is known,
/// or with the next batch: each begins on a block with a mark that is bound to its place.
pub(crate) fn scan(keys: &SegmentKeys, bytes: &[u8]) -> Scan {
    scan_part(keys, 0, bytes)
}

/// The same of a part of a segment that begins at `base`, where a batch begins.
pub(crate) fn scan_part(keys: &SegmentKeys, base: u32, bytes: &[u8]) -> Scan {
    let id = keys.segment();
    let place = |at: usize| base + at as u32;
    let mut records: Vec<Found> = Vec::new();
    let mut at = 0usize;
    let mut holes = Vec::new();
    let last_written = bytes.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
    // Where the records of the batch end that is being read, as its mark says.
    let mut batch_end = 0;
    // A block that a crash took may be the last that was written, so the whole of a bad record is looked at.
    let hole = |from: usize, to: usize, why| Hole {
        from: place(from),
        to: place(to.min(bytes.len())),
        zero_block: has_zero_block(bytes, from, to),
        by_crash: true,
        why,
    };
    while at < bytes.len() {
        // The rest of a batch's last block is zeros, perhaps too few for a header; the next batch begins at the next block. Zeros
        // where its records are yet to come are no padding, but a block that was lost.
        let block_end = at.next_multiple_of(BLOCK).min(bytes.len());
        if at >= batch_end && at < block_end && bytes[at..block_end].iter().all(|b| *b == 0) {
            at = block_end;
            continue;
        }
        let found = match record::read_header(&bytes[at..], id, place(at)) {
            Err(Invalid::Empty) if last_written <= at && batch_end <= at => break,
            Err(why) => Err((why, at + record::HEADER_BYTES)),
            Ok(header) => {
                let head_at = at + record::HEADER_BYTES;
                let body_at = head_at + header.head_bytes as usize;
                match bytes.get(body_at..body_at + header.body_bytes as usize) {
                    Some(body) => Ok((header, &bytes[head_at..body_at], body)),
                    None => Err((Invalid::Bad("the segment ends within a record"), bytes.len())),
                }
            }
        };
        let (header, head, body) = match found {
            Ok(found) => found,
            Err((why, to)) => {
                let Some(next) = next_batch(id, base, bytes, at + 1) else {
                    holes.push(hole(at, to.max(last_written).max(batch_end), why));
                    break;
                };
                // A build that knows of no lengths has cut this batch and gone on behind it.
                let is_cut = at < batch_end && bytes[at..next].iter().all(|b| *b == 0);
                if is_cut && batch_length(id, base, bytes, next) == Some(0) {
                    at = next;
                    continue;
                }
                holes.push(hole(at, next, why));
                at = next;
                continue;
            }
        };
        let end = at + header.stored_bytes();
        let head = match header.open_head(head, keys) {
            Ok(head) => head,
            Err(why) => {
                let mut hole = hole(at, end, why);
                // What a crash cut short may have lost any block up to the last octet that was written.
                hole.zero_block |= has_zero_block(bytes, at, end.max(last_written));
                holes.push(hole);
                at = end;
                continue;
            }
        };
        if header.kind == Kind::Mark {
            batch_end = at.saturating_add(header.at.index.0 as usize).min(bytes.len());
        }
        let body_intact = header.body_matches(body);
        records.push(Found {
            kind: header.kind,
            at: header.at,
            location: Location {
                segment: id,
                offset: place(at),
                head_bytes: header.head_bytes,
                body_bytes: header.body_bytes,
            },
            head: Bytes::copy_from_slice(match header.kind {
                Kind::Entry | Kind::Body => &[],
                Kind::Row => &head.text[..head.text.len().min(ROW_KEY_BYTES)],
                _ => &head.text,
            }),
            key: header.key,
            head_crc: head.head_crc,
            body_crc: head.body_crc,
            body_intact,
            body_zeroed: body.iter().all(|b| *b == 0),
            zero_block: !body_intact && has_zero_block(bytes, at, end),
        });
        at = end;
    }
    let end = records.last().map_or(base as usize, Found::end).next_multiple_of(BLOCK) as u32;
    let last_batch = (0..bytes.len()).step_by(BLOCK).rev().find(|o| begins_batch(id, base, bytes, *o));
    let last_batch = place(last_batch.unwrap_or(0));
    Scan { segment: id, records, end, holes, last_batch }
}

fn begins_batch(id: SegmentId, base: u32, bytes: &[u8], at: usize) -> bool {
    batch_length(id, base, bytes, at).is_some()
}

/// How long the batch is that begins here, 0 if its mark does not say; nothing if none begins.
fn batch_length(id: SegmentId, base: u32, bytes: &[u8], at: usize) -> Option<u64> {
    let header = record::read_header(&bytes[at..], id, base + at as u32).ok()?;
    (header.kind == Kind::Mark).then_some(header.at.index.0)
}

/// Where the first batch at or behind an offset begins.
fn next_batch(id: SegmentId, base: u32, bytes: &[u8], from: usize) -> Option<usize> {
    (from.next_multiple_of(BLOCK)..bytes.len()).step_by(BLOCK).find(|o| begins_batch(id, base, bytes, *o))
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
    use super::super::batch;
    use super::*;
    use crate::position::LogIndex;
    use crate::record::Record;
    use crate::seal::{KEY_BYTES, Keyring};

    fn plain() -> SegmentKeys {
        Keyring::default().of_segment(SegmentId(1))
    }

    /// Behind a hole the scan goes on, and calls nothing a record that is none.
    #[test]
    fn p9_a_hole_hides_nothing_behind_it() {
        let keys = plain();
        let mut bytes = Vec::new();
        for n in 0..6u8 {
            // A batch: a mark and two records, up to the next block.
            for record in [
                record::Record::of(Kind::Mark, vec![n; 20]),
                record::Record::of(Kind::Table, vec![n; 700]),
                record::Record::of(Kind::Table, vec![n; 5000]),
            ] {
                let offset = bytes.len() as u32;
                record::write(&mut bytes, &record, &keys, offset);
            }
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        }
        bytes.resize(bytes.len() + 4 * BLOCK, 0);
        let whole = scan(&keys, &bytes);
        assert!(whole.holes.is_empty() && whole.records.len() == 18);
        for victim in 0..18 {
            let l = whole.records[victim].location;
            for at in [0, 40, record::HEADER_BYTES, record::HEADER_BYTES + l.head_bytes as usize - 1] {
                let mut bad = bytes.clone();
                bad[l.offset as usize + at] ^= 0x40;
                let scanned = scan(&keys, &bad);
                let header = at < record::HEADER_BYTES;
                // With its header a record takes those of its batch that follow with it.
                let lost = if header { 3 - victim % 3 } else { 1 };
                assert_eq!(scanned.records.len(), 18 - lost, "record {victim}, octet {at}");
                assert_eq!(scanned.holes.len(), 1, "record {victim}, octet {at}");
                assert_eq!(scanned.holes[0].from, l.offset);
            }
        }
    }

    /// Whichever block of a batch reads as zeros: each record that stood in it is found without its body, or lies in a hole.
    #[test]
    fn p9_a_block_of_zeros_takes_no_record_without_a_word() {
        for keys in [plain(), Keyring::new(&[[3; KEY_BYTES]]).expect("one key").of_segment(SegmentId(1))] {
            // So many octets before the last record that it begins at each place of a block.
            for filling in (0..BLOCK).step_by(8) {
                let (mut log, mut bytes, mut placed) = (Vec::new(), Vec::new(), Vec::new());
                for _ in 0..2 {
                    let entry =
                        |body| Record { body: vec![7; body].into(), ..Record::of(Kind::Entry, vec![1; 20]) };
                    let records = [entry(5000), entry(filling), Record::of(Kind::Vote, vec![1; 9])];
                    let mut waiting = records.into_iter().map(|record| (record, ())).collect();
                    let start = log.len() as u32;
                    let laid = batch::lay_out(
                        &mut bytes,
                        vec![],
                        &mut waiting,
                        (SegmentId(1), 0),
                        &keys,
                        start,
                        1 << 20,
                    );
                    placed.extend(laid.placed.into_iter().map(|p| p.location.offset));
                    log.extend_from_slice(&bytes);
                }
                for block in (0..log.len()).step_by(BLOCK) {
                    let mut bad = log.clone();
                    bad[block..block + BLOCK].fill(0);
                    let scan = scan(&keys, &bad);
                    let is_told = |at: &u32| {
                        scan.records.iter().any(|f| f.location.offset == *at)
                            || scan
                                .holes
                                .iter()
                                .any(|hole| (hole.from..hole.to).contains(at) && hole.zero_block)
                    };
                    assert!(placed.iter().all(is_told), "filling {filling}, block {block}");
                }
            }
        }
    }

    /// A build that knows of no lengths has cut a batch short and written on, and its log is read by one that knows of them.
    #[test]
    fn p9_what_an_older_build_cut_is_no_damage() {
        let keys = plain();
        let batch = |start: u32, length: Option<u64>| {
            let mut bytes = Vec::new();
            let mut mark = Record::of(Kind::Mark, vec![1; 20]);
            mark.at.index = LogIndex(length.unwrap_or(0));
            for record in [mark, Record::of(Kind::Table, vec![7; 700])] {
                let offset = start + bytes.len() as u32;
                record::write(&mut bytes, &record, &keys, offset);
            }
            bytes.resize(BLOCK, 0);
            bytes
        };
        let long = Some(2 * BLOCK as u64);
        let scanned =
            |second| scan(&keys, &[batch(0, long), vec![0; BLOCK], batch(2 * BLOCK as u32, second)].concat());
        assert_eq!((scanned(None).records.len(), scanned(None).holes.len()), (4, 0));
        assert_eq!((scanned(Some(800)).records.len(), scanned(Some(800)).holes.len()), (4, 1));
    }

    /// A record with a long head of which a crash kept the first block alone is torn, not ambiguous.
    #[test]
    fn p9_a_long_head_cut_short_is_torn() {
        let mut bytes = Vec::new();
        let record = record::Record::of(Kind::Table, vec![7; 3 * BLOCK]);
        record::write(&mut bytes, &record, &plain(), 0);
        bytes.resize(8 * BLOCK, 0);
        for keep in 1..=3 {
            let mut torn = bytes.clone();
            torn[keep * BLOCK..].fill(0);
            let holes = scan(&plain(), &torn).holes;
            assert!(holes[0].zero_block, "{keep} blocks kept");
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
