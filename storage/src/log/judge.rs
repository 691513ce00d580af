//! Reading all segments and judging what is wrong in them: what a crash left, what is damaged, and what was dealt with before.

use std::collections::BTreeMap;

use super::fold::decode;
use super::recovery::{self, Found, Scan, Verdict};
use super::state::{LogState, Segment};
use super::superblock::{Contents, Ends};
use crate::codec::{self, Intent, Reset, SegmentHead, Vote};
use crate::disk::{Disk, DiskFile};
use crate::erase::plan;
use crate::error::{Damage, OpenError};
use crate::limits::BLOCK_BYTES;
use crate::position::{LogIndex, SegmentId};
use crate::record::{Invalid, Kind, VERSION};
use crate::seal::Keyring;

/// What cannot be read is looked for in steps of so many octets.
const UNREADABLE_STEP: usize = BLOCK_BYTES as usize;

/// All records of all segments in order, judged.
pub(super) struct Scanned {
    pub(super) records: Vec<Found>,
    /// Where the log ends: the newest segment and its next free block.
    pub(super) end: (SegmentId, u32),
    /// Known to be synced up to here.
    pub(super) mark: (SegmentId, u32),
    /// A torn or ambiguous tail to be zeroed.
    pub(super) cut: Option<(SegmentId, u32)>,
    pub(super) ambiguous: bool,
    /// Ranges under an intent that a crash left unerased, or may have: those of the newest intents, whatever is read there. If
    /// their sync failed the zeros may stand in the page cache alone.
    pub(super) redo: BTreeMap<SegmentId, Vec<plan::Range>>,
    /// What is lost of what counts.
    pub(super) damage: Damage,
    /// Ranges that hold nothing that can be read.
    pub(super) holes: Vec<(SegmentId, u32, u32)>,
    /// Records among the above whose bodies are not what was written, nor erased on purpose.
    pub(super) lost: Vec<LogIndex>,
}

impl Scanned {
    /// Whether the log can be opened as it is.
    pub(super) fn check(&self, disk: &dyn Disk) -> Result<(), OpenError> {
        if self.damage.count == 0 {
            return Ok(());
        }
        let mut damage = self.left();
        damage.places.iter_mut().for_each(|place| *place = format!("{}: {place}", disk.name()));
        Err(OpenError::Lost(Box::new(damage)))
    }

    /// The damage, with what is left to say of vote and entries.
    pub(super) fn left(&self) -> Damage {
        let mut left = self.damage.clone();
        for found in &self.records {
            match found.kind {
                Kind::Vote => left.vote = codec::decode::<Vote>("vote", &found.head).ok().or(left.vote),
                Kind::Entry => left.last = left.last.max(Some(found.at)),
                Kind::Floor => {
                    left.last = left.last.max(Some(found.at));
                    left.committed = left.committed.max(Some(found.at));
                }
                Kind::Committed => left.committed = left.committed.max(Some(found.at)),
                Kind::Reset => {
                    let Ok(reset) = codec::decode::<Reset>("reset", &found.head) else { continue };
                    left.vote = reset.vote.or(left.vote);
                    left.last = left.last.max(reset.last);
                }
                _ => {}
            }
        }
        left
    }
}

/// Reads a segment's file as far as it can be read; what cannot is zeros, and named.
pub(super) fn read_segment(file: &dyn DiskFile, size: u64) -> (Vec<u8>, Vec<(u32, u32)>) {
    let mut bytes = vec![0; size as usize];
    if file.read_at(&mut bytes, 0).is_ok() {
        return (bytes, Vec::new());
    }
    let mut unreadable: Vec<(u32, u32)> = Vec::new();
    for (n, part) in bytes.chunks_mut(UNREADABLE_STEP).enumerate() {
        let from = (n * UNREADABLE_STEP) as u32;
        if file.read_at(part, from as u64).is_err() {
            part.fill(0);
            match unreadable.last_mut() {
                Some((_, to)) if *to == from => *to = from + part.len() as u32,
                _ => unreadable.push((from, from + part.len() as u32)),
            }
        }
    }
    (bytes, unreadable)
}

pub(super) fn scan_all(
    disk: &dyn Disk,
    keys: &Keyring,
    contents: &Contents,
    ends: &Ends,
    state: &mut LogState,
) -> Result<Scanned, OpenError> {
    let mut scans: Vec<(SegmentId, Scan)> = Vec::new();
    for (id, slot) in &contents.segments {
        let name = super::segment::file_name(*slot);
        let scan = match disk.open(&name) {
            Ok(file) => {
                let (bytes, unreadable) = read_segment(&*file, contents.segment_bytes);
                let mut scan = recovery::scan(&keys.of_segment(*id), &bytes);
                scan.holes.extend(unreadable.into_iter().map(|(from, to)| recovery::Hole {
                    from,
                    to,
                    why: Invalid::Bad("it cannot be read"),
                    by_crash: false,
                    zero_block: false,
                }));
                let mut segment = Segment::new(*slot, file);
                segment.end = scan.end;
                segment.other_key = scan.records.iter().any(|found| found.key != keys.sealing());
                state.segments.insert(*id, segment);
                scan
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Scan::missing(*id, contents.segment_bytes as u32)
            }
            Err(error) => {
                return Err(OpenError::Io { what: format!("opening {}/{name}", disk.name()), error });
            }
        };
        scans.push((*id, scan));
    }
    // A superblock that was made from segments of which none could be told names none.
    let newest = scans.last().map_or(SegmentId(0), |(id, _)| *id);
    let mark = scans.iter().map(|(_, scan)| recovery::highest_mark(&scan.records)).max().unwrap_or_default();
    let mark = mark.max(ends.last_key_value().map(|(id, end)| (*id, *end)).unwrap_or_default());
    // Not to be taken for a torn tail.
    for (id, scan) in &scans {
        scan.check_key()?;
        if let Some(Invalid::Newer(found)) =
            scan.holes.iter().map(|h| &h.why).find(|why| matches!(why, Invalid::Newer(_)))
        {
            let what = format!("segment {id}");
            return Err(OpenError::NewerFormat { what, found: *found, known: VERSION });
        }
    }
    let whole = end_is_whole(&scans)?;
    let short = short_ends(&scans)?;
    let cut = cut_tail(&mut scans, mark)?;
    // What stands in a tail that was cut says nothing: an intent there was never synced, so nothing was erased on its strength.
    let intents = intents_of(&scans)?;
    let again = newest_intents(&scans)?;
    // What stands before a reset is void but for its bodies: what is wrong there was dealt with.
    let mut counts_from = SegmentId(0);
    for found in scans.iter().flat_map(|(_, scan)| &scan.records).filter(|f| f.kind == Kind::Reset) {
        if decode::<Reset>("reset", found)?.void_but.is_some() {
            counts_from = counts_from.max(found.location.segment);
        }
    }
    let mut scanned = Scanned {
        records: Vec::new(),
        end: (newest, 0),
        mark,
        cut: cut.map(|(at, _)| at),
        ambiguous: cut.is_some_and(|(_, verdict)| verdict == Verdict::Ambiguous),
        redo: BTreeMap::new(),
        damage: Damage { end_is_whole: whole, ..Damage::default() },
        holes: Vec::new(),
        lost: Vec::new(),
    };
    scanned.damage.end_is_whole &= !scanned.ambiguous;
    let none = Vec::new();
    for (id, scan) in scans {
        let erased = intents.get(&id).unwrap_or(&none);
        for hole in &scan.holes {
            scanned.holes.push((id, hole.from, hole.to));
            if id >= counts_from {
                let at = format!("segment {id} offset {}{}", hole.from, missing_entries(&scan.records, hole));
                scanned.damage.note(at, &hole.why);
            }
        }
        if let Some((end, why)) = short.get(&id).filter(|_| id >= counts_from) {
            scanned.damage.note(format!("segment {id} offset {end}"), why);
        }
        if let Some(end) =
            ends.get(&id).filter(|end| id >= counts_from && scan.end < **end && scan.holes.is_empty())
        {
            let why = format!("its records end here, and it was synced up to {end}");
            scanned.damage.note(format!("segment {id} offset {}", scan.end), why);
            // Nothing tells whether what is missing was written before what is there.
            scanned.damage.end_is_whole = false;
        }
        for found in &scan.records {
            let range = (found.location.body_offset() as u32, found.location.body_bytes);
            let may_be_left =
                !found.body_zeroed || again.get(&id).is_some_and(|list| plan::covers(list, range));
            if range.1 > 0 && may_be_left && plan::covers(erased, range) {
                scanned.redo.entry(id).or_default().push(range);
            }
            if !found.body_intact && !plan::covers(erased, range) {
                scanned.lost.push(found.at.index);
            }
        }
        if let Some(segment) = state.segments.get_mut(&id) {
            segment.end = scan.end;
            segment.erased = erased.clone();
        }
        scanned.end = (id, scan.end);
        scanned.records.extend(scan.records);
    }
    Ok(scanned)
}

/// Which entries a hole has taken, for people: by index a message is found in the mail log.
fn missing_entries(records: &[Found], hole: &recovery::Hole) -> String {
    let entries = || records.iter().filter(|f| f.kind == Kind::Entry);
    let before = entries().rfind(|f| f.location.offset < hole.from).map(|f| f.at.index.0);
    let behind = entries().find(|f| f.location.offset >= hole.to).map(|f| f.at.index.0);
    match (before, behind) {
        (Some(a), Some(b)) if b == a + 2 => format!(", entry {}", a + 1),
        (Some(a), Some(b)) if b > a + 2 => format!(", entries {} to {}", a + 1, b - 1),
        (Some(a), Some(b)) => format!(", between the entries {a} and {b}"),
        (Some(a), None) => format!(", behind entry {a}"),
        (None, Some(b)) => format!(", before entry {b}"),
        (None, None) => String::new(),
    }
}

/// Ranges that intents name, by segment.
fn intents_of(scans: &[(SegmentId, Scan)]) -> Result<BTreeMap<SegmentId, Vec<plan::Range>>, OpenError> {
    let mut intents: BTreeMap<SegmentId, Vec<plan::Range>> = BTreeMap::new();
    for found in scans.iter().flat_map(|(_, scan)| &scan.records).filter(|f| f.kind == Kind::Intent) {
        let intent: Intent = decode("intent", found)?;
        intents.entry(intent.segment).or_default().extend(intent.ranges);
    }
    intents.values_mut().for_each(plan::merge);
    Ok(intents)
}

/// Where a tail begins, and what it is.
type Cut = ((SegmentId, u32), Verdict);

/// Takes what a crash may have left behind the end of the newest segment out of its scan.
fn cut_tail(scans: &mut [(SegmentId, Scan)], mark: (SegmentId, u32)) -> Result<Option<Cut>, OpenError> {
    let intents = intents_of(scans)?;
    let Some((id, scan)) = scans.last_mut() else { return Ok(None) };
    let none = Vec::new();
    let erased = intents.get(id).unwrap_or(&none);
    let covered = |f: &Found| plan::covers(erased, (f.location.body_offset() as u32, f.location.body_bytes));
    // A body that is neither what was written nor erased on purpose is as bad as a header.
    let bodies = scan.records.iter().filter(|f| !f.body_intact && !covered(f));
    let bodies = bodies.map(|f| (f.location.offset, f.zero_block, "the body's CRC is wrong".to_string()));
    // A segment is zeroed before its first batch: what stands there instead was not left by a crash.
    let holes = scan.holes.iter().filter(|h| h.by_crash && (h.from > 0 || h.zero_block));
    let holes = holes.map(|h| (h.from, h.zero_block, h.why.to_string()));
    // The tail begins at the first bad place behind which no batch begins.
    let tail = bodies.chain(holes).filter(|(from, _, _)| scan.last_batch <= *from).min();
    let Some((offset, zero_block, why)) = tail else { return Ok(None) };
    let verdict = recovery::verdict(true, (*id, offset), mark, zero_block, false);
    if verdict == Verdict::Damaged {
        return Ok(None);
    }
    tracing::warn!(segment = id.0, offset, why, "the tail of the log was cut off");
    scan.records.retain(|f| f.location.offset < offset);
    // A file that is short, or cannot be read, was not made so by a crash.
    scan.holes.retain(|h| h.from < offset || !h.by_crash || h.from == 0 && !h.zero_block);
    let end = scan.records.last().map_or(0, Found::end);
    scan.end = end.next_multiple_of(BLOCK_BYTES as usize) as u32;
    Ok(Some(((*id, end as u32), verdict)))
}

/// The ranges of the last round of erasing, unless it is said to be over: nothing tells that it was synced. Each round before it was, or there
/// would be no other.
fn newest_intents(scans: &[(SegmentId, Scan)]) -> Result<BTreeMap<SegmentId, Vec<plan::Range>>, OpenError> {
    let mut ranges: BTreeMap<SegmentId, Vec<plan::Range>> = BTreeMap::new();
    for found in scans.iter().rev().flat_map(|(_, scan)| scan.records.iter().rev()) {
        match found.kind {
            Kind::Intent => {
                let intent: Intent = decode("intent", found)?;
                if intent.ranges.is_empty() {
                    break;
                }
                ranges.entry(intent.segment).or_default().extend(intent.ranges);
            }
            // The intents of a round follow each other, whatever a new batch or segment opens with between them.
            Kind::Entry | Kind::Body | Kind::Row | Kind::Gone | Kind::Table | Kind::CheckpointEnd
                if !ranges.is_empty() =>
            {
                break;
            }
            _ => {}
        }
    }
    ranges.values_mut().for_each(plan::merge);
    Ok(ranges)
}

/// Whether the last vote and the last entry that were written are certainly among what is left: the newest segment has its head, which is
/// followed by the vote and by the index of the next entry; that entry is the next after the last one found; and there is no hole
/// from the segment of that one on.
fn end_is_whole(scans: &[(SegmentId, Scan)]) -> Result<bool, OpenError> {
    let Some((_, newest)) = scans.last() else { return Ok(false) };
    if !newest.records.iter().take(2).any(|f| f.kind == Kind::SegmentHead) {
        return Ok(false);
    }
    let mut last: Option<(SegmentId, u64)> = None;
    for (id, found) in scans.iter().flat_map(|(id, scan)| scan.records.iter().map(move |f| (*id, f))) {
        match found.kind {
            Kind::Entry | Kind::Floor => last = last.max(Some((id, found.at.index.0))),
            Kind::Reset if decode::<Reset>("reset", found)?.void_but.is_some() => last = None,
            _ => {}
        }
    }
    let opens_with = newest.records.iter().find(|f| f.kind == Kind::Truncate).map_or(0, |f| f.at.index.0);
    let from = last.map_or(SegmentId(0), |(id, _)| id);
    let holes = scans.iter().filter(|(id, _)| *id >= from).any(|(_, scan)| !scan.holes.is_empty());
    Ok(!holes && last.map_or(0, |(_, index)| index + 1) >= opens_with)
}

/// Each segment's head says where the records of the one before ended. A segment that ends sooner has lost its tail to zeros, which
/// look like an end.
fn short_ends(scans: &[(SegmentId, Scan)]) -> Result<BTreeMap<SegmentId, (u32, String)>, OpenError> {
    let mut short = BTreeMap::new();
    for (id, scan) in scans {
        let Some(head) = scan.records.iter().find(|f| f.kind == Kind::SegmentHead) else { continue };
        let head: SegmentHead = decode("segment head", head)?;
        let Some((before, end)) = head.previous else { continue };
        // One that was given back meanwhile cannot be looked at.
        if let Some((_, scan)) = scans.iter().find(|(other, _)| *other == before)
            && scan.holes.is_empty()
            && scan.end < end
        {
            short.insert(before, (scan.end, format!("segment {id} says that it ended at {end}")));
        }
    }
    Ok(short)
}

#[cfg(test)]
mod tests {
    use super::super::{Entry, open_for_test as open};
    use super::*;
    use crate::codec::Mark;
    use crate::disk::sim::SimDisk;
    use crate::position::{LogPosition, Term};
    use crate::record::{self, Record};

    fn entry(index: u64) -> Entry {
        let at = LogPosition { term: Term(1), index: LogIndex(index) };
        Entry { at, head: "head".into(), body: vec![b'x'; 9000].into() }
    }

    /// The power goes while a batch is written that brings an entry and, behind it, an intent. Of the intent nobody was told.
    #[test]
    fn p9_an_intent_in_a_torn_tail_says_nothing() {
        let disk = SimDisk::new(1);
        let log = open(&disk);
        log.append(vec![entry(0)], Box::new(|_| {}));
        drop(log);
        let log = open(&disk);
        let place = log.inner.state().bodies[&LogIndex(0)].1.expect("it is on disk");
        let (segment, start) = log.inner.state().synced;
        drop(log);
        let mut batch = Vec::new();
        let keys = Keyring::default().of_segment(segment);
        let mut add = |record: Record| {
            let offset = start + batch.len() as u32;
            record::write(&mut batch, &record, &keys, offset);
        };
        add(Record::of(Kind::Mark, codec::encode(&Mark { synced: (segment, start) })));
        let Entry { at, head, body } = entry(1);
        add(Record { kind: Kind::Entry, at, head, body });
        let ranges = vec![(place.body_offset() as u32, place.body_bytes)];
        add(Record::of(Kind::Intent, codec::encode(&Intent { segment, ranges })));
        // Of three blocks the second did not come to the disk.
        let file = disk.open("segment-000000").expect("it is there");
        let (first, last) = (&batch[..4096], &batch[8192..]);
        file.write_at(first, start as u64).expect("a sound disk");
        file.write_at(last, start as u64 + 8192).expect("a sound disk");
        for start in 1..3 {
            let log = open(&disk);
            assert_eq!(log.last().map(|at| at.index), Some(LogIndex(0)));
            let is_there = log.body(LogIndex(0)).is_ok_and(|body| body[..] == [b'x'; 9000]);
            assert!(is_there, "start {start}");
        }
    }
}
