//! Opening a directory: the state of the log from its bytes alone.
//!
//! Segments are read in order of their ids and their records replayed in order. What a crash left is judged by
//! [`recovery::verdict`]; intents are carried out again. Nothing is changed before the whole log was read and found
//! sound, but for the zeroing of a torn tail.
//!
//! | found | then |
//! | --- | --- |
//! | a batch that was never synced | cut off |
//! | a body whose octets are wrong, under a header that is right | opened; the body is [`Log::lost`](super::Log::lost) until somebody brings it |
//! | anything else that is wrong | [`OpenError::Lost`], untouched; [`salvage`] keeps the bodies and voids the rest |

use std::collections::{BTreeMap, BTreeSet};

use super::recovery::{self, Found, Scan, Verdict};
use super::segment::{create, slot_of};
use super::state::{LogState, RowPlace, Segment, Slot};
use super::superblock::{Contents, Superblock};
use super::writer::Written;
use super::{Identity, Recovered, RecoveredCheckpoint};
use crate::clock;
use crate::codec::{self, CheckpointEnd, Gone, Intent, Reset, SegmentHead, TablePart, Vote};
use crate::disk::{Disk, DiskFile};
use crate::erase::{overwrite, plan};
use crate::error::{Damage, OpenError};
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN};
use crate::position::{Location, LogIndex, LogPosition, SegmentId};
use crate::record::{self, Invalid, Kind, Record, VERSION};

/// Starts are counted from here if their number is lost: 14 bits of it go into message ids.
const BOOTS_UNKNOWN: u64 = 1 << 13;
/// What cannot be read is looked for in steps of so many octets.
const UNREADABLE_STEP: usize = BLOCK_BYTES as usize;

pub(super) struct Opened {
    pub(super) state: LogState,
    pub(super) superblock: Superblock,
    pub(super) active: SegmentId,
    pub(super) next_slot: u32,
    pub(super) unused_slots: Vec<u32>,
    pub(super) written: Written,
    pub(super) synced: (SegmentId, u32),
    pub(super) recovered: Recovered,
    /// What the active segment is to begin with.
    pub(super) first: Vec<Record>,
}

/// What is wrong with a directory that is only looked at, and what it holds.
#[derive(Debug, Default)]
pub struct Survey {
    /// Segments in use.
    pub segments: usize,
    /// Records that were read.
    pub records: u64,
    /// Entries above the floor.
    pub entries: u64,
    /// Bodies that are not erased, and their octets.
    pub bodies: (u64, u64),
    /// Rows of the newest complete checkpoint.
    pub rows: u64,
    /// Whether the tail is torn, as after a kill: harmless, cut at the next start.
    pub torn_tail: bool,
    /// Bodies whose octets are not those that were written: a node fetches those that it needs from the others.
    pub lost_bodies: u64,
}

/// Reads a directory and verifies every record without changing a byte.
///
/// # Errors
/// What a start would refuse with.
pub fn survey(disk: &dyn Disk) -> Result<Survey, OpenError> {
    let Some(superblock) = Superblock::load(disk)? else {
        return Err(OpenError::Damaged {
            at: disk.name(),
            why: "no superblock: not a data directory".into(),
        });
    };
    let mut state = LogState::default();
    let scanned = scan_all(disk, &superblock, &mut state)?;
    scanned.check(disk)?;
    let lost_bodies = scanned.lost.len() as u64;
    let records = scanned.records.len() as u64;
    let torn_tail = scanned.cut.is_some();
    replay(scanned, &mut state)?;
    Ok(Survey {
        segments: state.segments.len(),
        records,
        entries: state.slots.len() as u64,
        bodies: (
            state.bodies.len() as u64,
            state.bodies.values().filter_map(|(_, l)| l.map(|l| l.body_bytes as u64)).sum(),
        ),
        torn_tail,
        lost_bodies,
        rows: state.rows.len() as u64,
    })
}

pub(super) fn open(disk: &dyn Disk, identity: &Identity, segment_bytes: u64) -> Result<Opened, OpenError> {
    let superblock = match Superblock::load(disk)? {
        Some(superblock) => superblock,
        None => create_directory(disk, identity, segment_bytes)?,
    };
    check_owner(disk, identity, &superblock.contents)?;
    let mut state = LogState::default();
    let scanned = scan_all(disk, &superblock, &mut state)?;
    scanned.check(disk)?;
    if let Some((id, from)) = scanned.cut {
        let file = &state.segments[&id].file;
        let size = superblock.contents.segment_bytes;
        super::segment::zero_from(&**file, from as u64, size).map_err(io("cutting a torn tail"))?;
    }
    // What was read may stand in the page cache alone: after a kill between write and sync, or after a failed sync, which
    // leaves pages clean that were never written. It is written again and synced before anybody is told of it.
    for (id, segment) in state.segments.range(scanned.mark.0..) {
        let from = if *id == scanned.mark.0 { scanned.mark.1 as u64 / BLOCK_BYTES * BLOCK_BYTES } else { 0 };
        let end = if *id == scanned.end.0 { scanned.end.1 } else { segment.end } as u64;
        if from < end {
            let mut bytes = vec![0; (end - from) as usize];
            let again = segment
                .file
                .read_at(&mut bytes, from)
                .and_then(|()| segment.file.write_at(&bytes, from))
                .and_then(|()| segment.file.sync_data());
            again.map_err(io("syncing the tail again"))?;
        }
    }
    finish(disk, superblock, state, scanned)
}

/// Opens what is left of a damaged log: its bodies up to an index, and nothing else. A segment of its own begins behind it, with
/// `reset` as its first record; until that is durable the log is as damaged as it was. Octets that nobody can say
/// the meaning of are overwritten.
pub(super) fn salvage(
    disk: &dyn Disk,
    identity: &Identity,
    segment_bytes: u64,
    reset: &Reset,
) -> Result<Opened, OpenError> {
    let mut superblock = match Superblock::load(disk) {
        Ok(Some(superblock)) => superblock,
        Ok(None) | Err(OpenError::Lost(_)) => rebuild_superblock(disk, identity, segment_bytes)?,
        Err(e) => return Err(e),
    };
    check_owner(disk, identity, &superblock.contents)?;
    let mut state = LogState::default();
    let mut scanned = scan_all(disk, &superblock, &mut state)?;
    let size = superblock.contents.segment_bytes;
    let holes = std::mem::take(&mut scanned.holes);
    for (id, from, to) in holes.into_iter().chain(scanned.cut.map(|(id, from)| (id, from, size as u32))) {
        // They may be octets of mail.
        let Some(segment) = state.segments.get(&id) else { continue };
        overwrite(&*segment.file, &[(from, to - from)]).map_err(io("overwriting what cannot be read"))?;
    }
    let slots = disk.list().map_err(io("listing the directory"))?;
    let slots = slots.iter().filter_map(|name| slot_of(name));
    let slot =
        slots.chain(superblock.contents.segments.iter().map(|(_, slot)| *slot)).max().map_or(0, |s| s + 1);
    let file = create(disk, slot, size).map_err(io("creating a segment"))?;
    let contents = &mut superblock.contents;
    contents.segments.retain(|(id, _)| state.segments.contains_key(id));
    contents.newest =
        SegmentId(contents.newest.0.max(contents.segments.last().map_or(0, |(id, _)| id.0)) + 1);
    let newest = contents.newest;
    contents.segments.push((newest, slot));
    state.segments.insert(newest, Segment::new(slot, file));
    scanned.end = (newest, 0);
    scanned.ambiguous = false;
    scanned.records.push(Found::of_reset(newest, reset));
    let mut opened = finish(disk, superblock, state, scanned)?;
    opened.first.push(Record::of(Kind::Reset, codec::encode(reset)));
    Ok(opened)
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> OpenError {
    move |error| OpenError::Io { what: what.into(), error }
}

fn check_owner(disk: &dyn Disk, identity: &Identity, found: &Contents) -> Result<(), OpenError> {
    if found.cluster == identity.cluster && found.node == identity.node {
        return Ok(());
    }
    Err(OpenError::WrongIdentity {
        dir: disk.name(),
        cluster: identity.cluster.clone(),
        node: identity.node,
        found_cluster: found.cluster.clone(),
        found_node: found.node,
    })
}

fn finish(
    disk: &dyn Disk,
    mut superblock: Superblock,
    mut state: LogState,
    mut scanned: Scanned,
) -> Result<Opened, OpenError> {
    let redo = std::mem::take(&mut scanned.redo);
    for (id, ranges) in &redo {
        overwrite(&*state.segments[id].file, ranges).map_err(io("erasing again after a crash"))?;
    }
    let ambiguous_tail = scanned.ambiguous;
    let synced = scanned.end;
    let mut damage = scanned.left();
    let (written, mut recovered) = match replay(scanned, &mut state) {
        // Records that are right one by one and do not fit together: something between them is gone.
        Err(OpenError::Damaged { at, why }) => {
            damage.note(at, why);
            return Err(OpenError::Lost(Box::new(damage)));
        }
        replayed => replayed?,
    };
    superblock.contents.boots += 1;
    superblock.store().map_err(io("writing the superblock"))?;
    recovered.boots = superblock.contents.boots;
    recovered.ambiguous_tail = ambiguous_tail;
    state.check();
    let slots: BTreeSet<u32> = superblock.contents.segments.iter().map(|(_, slot)| *slot).collect();
    let on_disk: Vec<u32> =
        disk.list().map_err(io("listing the directory"))?.iter().filter_map(|name| slot_of(name)).collect();
    let next_slot = on_disk.iter().chain(&slots).max().map_or(0, |s| s + 1);
    let unused_slots = on_disk.into_iter().filter(|slot| !slots.contains(slot)).collect();
    let active = synced.0;
    let first = Vec::new();
    Ok(Opened { state, superblock, active, next_slot, unused_slots, written, synced, recovered, first })
}

/// A superblock from what the segments say of themselves. One that had been given back may be among them; a salvage voids it.
fn rebuild_superblock(
    disk: &dyn Disk,
    identity: &Identity,
    segment_bytes: u64,
) -> Result<Superblock, OpenError> {
    let mut segments = BTreeMap::new();
    for slot in disk.list().map_err(io("listing the directory"))?.iter().filter_map(|name| slot_of(name)) {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        let file = disk.open(&super::segment::file_name(slot)).map_err(io("opening a segment"))?;
        if file.read_at(&mut bytes, 0).is_err() {
            continue;
        }
        let Some(id) = record::segment_of(&bytes) else { continue };
        let Some(head) = recovery::scan(id, &bytes).records.into_iter().find(|f| f.kind == Kind::SegmentHead)
        else {
            continue;
        };
        let head: SegmentHead = decode("segment head", &head)?;
        if head.cluster != identity.cluster || head.node != identity.node {
            return Err(OpenError::WrongIdentity {
                dir: disk.name(),
                cluster: identity.cluster.clone(),
                node: identity.node,
                found_cluster: head.cluster,
                found_node: head.node,
            });
        }
        segments.insert(id, slot);
    }
    let newest = segments.last_key_value().map_or(SegmentId(0), |(id, _)| *id);
    let contents = Contents {
        sequence: 0,
        cluster: identity.cluster.clone(),
        node: identity.node,
        // Message ids carry the number of the start: one that was never used, as far as anybody can tell.
        boots: BOOTS_UNKNOWN + clock::random() % BOOTS_UNKNOWN,
        segment_bytes: segment_bytes
            .clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
            .next_multiple_of(BLOCK_BYTES),
        segments: segments.into_iter().collect(),
        newest,
    };
    Superblock::replace(disk, contents).map_err(io("writing a new superblock"))
}

fn create_directory(
    disk: &dyn Disk,
    identity: &Identity,
    segment_bytes: u64,
) -> Result<Superblock, OpenError> {
    let io = |error| OpenError::Io { what: format!("creating a data directory in {}", disk.name()), error };
    // A start that was cut short before the superblock stood leaves segment 0, all zeros, and nothing else. Whatever holds
    // an octet is somebody's log.
    for name in disk.list().map_err(io)?.into_iter().filter(|name| slot_of(name).is_some()) {
        if slot_of(&name) != Some(0) || !is_zero(disk, &name).map_err(io)? {
            let mut damage = Damage::default();
            damage.note(disk.name(), format!("{name} stands here without a superblock"));
            return Err(OpenError::Lost(Box::new(damage)));
        }
        disk.remove(&name).map_err(io)?;
    }
    let segment_bytes =
        segment_bytes.clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX).next_multiple_of(BLOCK_BYTES);
    create(disk, 0, segment_bytes).map_err(io)?;
    let contents = Contents {
        sequence: 0,
        cluster: identity.cluster.clone(),
        node: identity.node,
        boots: 0,
        segment_bytes,
        segments: vec![(SegmentId(1), 0)],
        newest: SegmentId(1),
    };
    Superblock::create(disk, contents).map_err(io)
}

/// Whether a file holds nothing but zeros, however long it is.
fn is_zero(disk: &dyn Disk, name: &str) -> std::io::Result<bool> {
    let file = disk.open(name)?;
    let mut block = vec![0; BLOCK_BYTES as usize];
    for n in 0.. {
        match file.read_at(&mut block, n * BLOCK_BYTES) {
            Ok(()) if block.iter().any(|b| *b != 0) => return Ok(false),
            Ok(()) => {}
            // Shorter than a block: a file that was being created.
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(true),
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// All records of all segments in order, judged.
struct Scanned {
    records: Vec<Found>,
    /// Where the log ends: the newest segment and its next free block.
    end: (SegmentId, u32),
    /// Known to be synced up to here.
    mark: (SegmentId, u32),
    /// A torn or ambiguous tail to be zeroed.
    cut: Option<(SegmentId, u32)>,
    ambiguous: bool,
    /// Ranges under an intent that a crash left unerased.
    redo: BTreeMap<SegmentId, Vec<plan::Range>>,
    /// What is lost of what counts.
    damage: Damage,
    /// Ranges that hold nothing that can be read.
    holes: Vec<(SegmentId, u32, u32)>,
    /// Records among the above whose bodies are not what was written, nor erased on purpose.
    lost: Vec<LogIndex>,
}

impl Scanned {
    /// Whether the log can be opened as it is.
    fn check(&self, disk: &dyn Disk) -> Result<(), OpenError> {
        if self.damage.count == 0 {
            return Ok(());
        }
        let mut damage = self.left();
        damage.places.iter_mut().for_each(|place| *place = format!("{}: {place}", disk.name()));
        Err(OpenError::Lost(Box::new(damage)))
    }

    /// The damage, with what is left to say of vote and entries.
    fn left(&self) -> Damage {
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
fn read_segment(file: &dyn DiskFile, size: u64) -> (Vec<u8>, Vec<(u32, u32)>) {
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

fn scan_all(disk: &dyn Disk, superblock: &Superblock, state: &mut LogState) -> Result<Scanned, OpenError> {
    let contents = &superblock.contents;
    let mut scans: Vec<(SegmentId, Scan)> = Vec::new();
    for (id, slot) in &contents.segments {
        let name = super::segment::file_name(*slot);
        let scan = match disk.open(&name) {
            Ok(file) => {
                let (bytes, unreadable) = read_segment(&*file, contents.segment_bytes);
                let mut scan = recovery::scan(*id, &bytes);
                scan.holes.extend(unreadable.into_iter().map(|(from, to)| recovery::Hole {
                    from,
                    to,
                    why: Invalid::Bad("it cannot be read"),
                    by_crash: false,
                    zero_block: false,
                }));
                let mut segment = Segment::new(*slot, file);
                segment.end = scan.end;
                state.segments.insert(*id, segment);
                scan
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Scan::missing(contents.segment_bytes as u32)
            }
            Err(error) => {
                return Err(OpenError::Io { what: format!("opening {}/{name}", disk.name()), error });
            }
        };
        scans.push((*id, scan));
    }
    let Some(newest) = scans.last().map(|(id, _)| *id) else {
        return Err(OpenError::Damaged { at: disk.name(), why: "the superblock names no segment".into() });
    };
    let mark = scans.iter().map(|(_, scan)| recovery::highest_mark(&scan.records)).max().unwrap_or_default();
    let mut intents: BTreeMap<SegmentId, Vec<plan::Range>> = BTreeMap::new();
    for found in scans.iter().flat_map(|(_, scan)| &scan.records).filter(|f| f.kind == Kind::Intent) {
        let intent: Intent = decode("intent", found)?;
        intents.entry(intent.segment).or_default().extend(intent.ranges);
    }
    intents.values_mut().for_each(plan::merge);
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
        cut: None,
        ambiguous: false,
        redo: BTreeMap::new(),
        damage: Damage { end_is_whole: end_is_whole(&scans), ..Damage::default() },
        holes: Vec::new(),
        lost: Vec::new(),
    };
    let none = Vec::new();
    let ends = short_ends(&scans)?;
    for (id, mut scan) in scans {
        let erased = intents.get(&id).unwrap_or(&none);
        let covered =
            |f: &Found| plan::covers(erased, (f.location.body_offset() as u32, f.location.body_bytes));
        if let Some(Invalid::Newer(found)) =
            scan.holes.iter().map(|h| &h.why).find(|why| matches!(why, Invalid::Newer(_)))
        {
            let what = format!("segment {id}");
            return Err(OpenError::NewerFormat { what, found: *found, known: VERSION });
        }
        if id == newest {
            // A body that is neither what was written nor erased on purpose is as bad as a header.
            let bodies = scan.records.iter().filter(|f| !f.body_intact && !covered(f));
            let bodies =
                bodies.map(|f| (f.location.offset, f.zero_block, "the body's CRC is wrong".to_string()));
            let holes = scan.holes.iter().filter(|h| h.by_crash);
            let holes = holes.map(|h| (h.from, h.zero_block, h.why.to_string()));
            // The tail begins at the first bad place behind which no batch begins.
            let tail = bodies.chain(holes).filter(|(from, _, _)| scan.last_batch <= *from).min();
            if let Some((offset, zero_block, why)) = tail {
                let verdict = recovery::verdict(true, (id, offset), mark, zero_block, false);
                if verdict != Verdict::Damaged {
                    scanned.ambiguous = verdict == Verdict::Ambiguous;
                    tracing::warn!(segment = id.0, offset, why, "the tail of the log was cut off");
                    scan.records.retain(|f| f.location.offset < offset);
                    // A file that is short, or cannot be read, was not made so by a crash.
                    scan.holes.retain(|h| h.from < offset || !h.by_crash);
                    let end = scan.records.last().map_or(0, Found::end);
                    scan.end = end.next_multiple_of(BLOCK_BYTES as usize) as u32;
                    scanned.cut = Some((id, end as u32));
                }
            }
        }
        for hole in &scan.holes {
            scanned.holes.push((id, hole.from, hole.to));
            if id >= counts_from {
                scanned.damage.note(format!("segment {id} offset {}", hole.from), &hole.why);
            }
        }
        if let Some((end, why)) = ends.get(&id).filter(|_| id >= counts_from) {
            scanned.damage.note(format!("segment {id} offset {end}"), why);
        }
        for found in &scan.records {
            let range = (found.location.body_offset() as u32, found.location.body_bytes);
            if range.1 > 0 && !found.body_zeroed && plan::covers(erased, range) {
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

/// Whether the last records that were written are all there: the newest segment that holds any has its head, which is followed by
/// the vote, and no hole.
fn end_is_whole(scans: &[(SegmentId, Scan)]) -> bool {
    let written =
        scans.iter().rev().map(|(_, scan)| scan).find(|s| !s.records.is_empty() || !s.holes.is_empty());
    written.is_some_and(|scan| {
        scan.holes.is_empty() && scan.records.iter().take(2).any(|f| f.kind == Kind::SegmentHead)
    })
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

fn decode<T: bincode::Decode<()>>(what: &'static str, found: &Found) -> Result<T, OpenError> {
    codec::decode(what, &found.head)
        .map_err(|e| OpenError::Damaged { at: found.location.to_string(), why: e.to_string() })
}

/// Rows, tombstones and tables as they are found, by checkpoint.
#[derive(Default)]
struct Checkpoints {
    rows: Vec<(u64, u128, RowPlace)>,
    gone: Vec<(u64, u128, SegmentId)>,
    tables: BTreeMap<u64, BTreeMap<u32, (Vec<u8>, SegmentId)>>,
    ends: BTreeMap<u64, (CheckpointEnd, SegmentId)>,
}

/// Where a body stands, and the CRC-32 of what was written.
#[derive(Clone, Copy)]
struct Place {
    location: Location,
    crc: u32,
}

impl Place {
    /// Whether two places hold the same octets, as far as their records say.
    fn is_same(&self, other: &Place) -> bool {
        (self.location.body_bytes, self.crc) == (other.location.body_bytes, other.crc)
    }
}

/// Replays the records in order.
fn replay(scanned: Scanned, state: &mut LogState) -> Result<(Written, Recovered), OpenError> {
    let mut written = Written::default();
    let mut checkpoints = Checkpoints::default();
    let mut log: BTreeMap<LogIndex, (LogPosition, Place)> = BTreeMap::new();
    let mut bodies: BTreeMap<LogIndex, Place> = BTreeMap::new();
    let mut lost: BTreeMap<LogIndex, Place> = BTreeMap::new();
    let mut dead: Vec<(LogIndex, Location)> = Vec::new();
    let mut pristine = true;
    for found in scanned.records {
        let (index, location) = (found.at.index, found.location);
        let segment = location.segment;
        let erased = {
            let s = &state.segments[&segment];
            let range = (location.body_offset() as u32, location.body_bytes);
            location.body_bytes == 0 || plan::covers(&s.erased, range)
        };
        pristine &= matches!(found.kind, Kind::SegmentHead | Kind::Mark | Kind::Truncate);
        match found.kind {
            Kind::SegmentHead | Kind::Mark => {}
            Kind::Vote => written.vote = Some(decode::<Vote>("vote", &found)?),
            Kind::Committed => written.committed = Some(found.at),
            Kind::Floor => {
                written.floor = written.floor.max(Some(found.at));
                written.next = written.next.max(index.0 + 1);
            }
            Kind::Truncate => {
                written.next = written.next.min(index.0);
                for (index, (_, own)) in log.split_off(&index) {
                    // A body that was fetched under this index is another one, and stays; its own that was fetched goes.
                    for all in [&mut bodies, &mut lost] {
                        if all.get(&index).is_some_and(|body| body.is_same(&own)) {
                            dead.extend(all.remove(&index).map(|body| (index, body.location)));
                        }
                    }
                }
            }
            Kind::Entry | Kind::Body => {
                let place = Place { location, crc: found.body_crc };
                if found.kind == Kind::Entry {
                    log.insert(index, (found.at, place));
                    written.next = index.0 + 1;
                }
                if !erased {
                    let older = bodies.remove(&index).or(lost.remove(&index));
                    dead.extend(older.map(|older| (index, older.location)));
                    let found_in = if found.body_intact { &mut bodies } else { &mut lost };
                    found_in.insert(index, place);
                }
            }
            Kind::Reset => {
                let reset: Reset = decode("reset", &found)?;
                state.doubt = state.doubt.max(reset.last);
                if let Some(kept) = reset.void_but {
                    let void =
                        bodies.split_off(&LogIndex(kept.0 + 1)).into_iter().chain(std::mem::take(&mut lost));
                    dead.extend(void.map(|(index, body)| (index, body.location)));
                    (checkpoints, log, written) = Default::default();
                    state.reset = Some(segment);
                }
                written.vote = reset.vote.or(written.vote);
            }
            Kind::Intent => {
                let intent: Intent = decode("intent", &found)?;
                if let Some(s) = state.segments.get_mut(&segment) {
                    s.intents_for.insert(intent.segment);
                }
            }
            Kind::Row => {
                let Some(key) = found.head.first_chunk() else {
                    let why = "a row without a key".into();
                    return Err(OpenError::Damaged { at: location.to_string(), why });
                };
                let place = RowPlace { location, crc: found.head_crc };
                checkpoints.rows.push((index.0, u128::from_le_bytes(*key), place));
            }
            Kind::Gone => {
                let gone: Gone = decode("tombstones", &found)?;
                checkpoints.gone.extend(gone.keys.into_iter().map(|key| (index.0, key, segment)));
            }
            Kind::Table => {
                let part: TablePart = decode("table", &found)?;
                let parts = checkpoints.tables.entry(index.0).or_default();
                parts.insert(part.part, (part.bytes, segment));
            }
            Kind::CheckpointEnd => {
                checkpoints.ends.insert(index.0, (decode("checkpoint", &found)?, segment));
            }
        }
    }
    // Entries that stand above the floor; those below left their bodies at most.
    let floor = written.floor.map_or(0, |f| f.index.0 + 1);
    let start = if written.floor.is_some() { floor } else { log.keys().next().map_or(0, |i| i.0) };
    state.first = start;
    for (expected, (index, (at, place))) in (start..).zip(log.split_off(&LogIndex(start))) {
        if index.0 != expected {
            let why = format!("entry {expected} is missing, {index} follows");
            return Err(OpenError::Damaged { at: place.location.to_string(), why });
        }
        if index.0 >= written.next {
            break;
        }
        state.next_ticket += 1;
        let ticket = state.next_ticket;
        state.slots.push_back(Slot { term: at.term, ticket, location: None, cached: None });
        let head_only = Location { body_bytes: 0, ..place.location };
        state.entry_written(index, ticket, head_only);
        if let Some(slot) = state.slot_mut(index) {
            slot.location = Some(place.location);
        }
        if let Some(body) = bodies.get(&index).filter(|body| body.is_same(&place)) {
            state.bodies.insert(index, (ticket, None));
            state.body_written(index, ticket, body.location);
        }
    }
    for (index, Place { location, .. }) in bodies {
        if !state.bodies.contains_key(&index) {
            state.next_ticket += 1;
            let ticket = state.next_ticket;
            state.bodies.insert(index, (ticket, None));
            state.body_written(index, ticket, location);
        }
    }
    for (index, Place { location, crc }) in lost {
        state.body_lost(index, location, crc);
    }
    for (index, location) in dead {
        // Counted as live until it is overwritten, like any dying body.
        state.body_written(index, 0, location);
    }
    state.floor = written.floor;
    state.vote = written.vote;
    state.committed = written.committed;
    let checkpoint = fold_checkpoints(checkpoints, state)?;
    let recovered = Recovered {
        boots: 0,
        pristine,
        vote: written.vote,
        committed: written.committed,
        checkpoint,
        ambiguous_tail: false,
        doubt: state.doubt,
    };
    Ok((written, recovered))
}

/// The state at the newest complete checkpoint.
fn fold_checkpoints(
    found: Checkpoints,
    state: &mut LogState,
) -> Result<Option<RecoveredCheckpoint>, OpenError> {
    let Checkpoints { rows, gone, mut tables, ends } = found;
    let newest = ends.last_key_value().map(|(number, (end, segment))| (*number, end.clone(), *segment));
    let declared: BTreeSet<u64> = newest.iter().flat_map(|(_, end, _)| end.void.iter().copied()).collect();
    let limit = newest.as_ref().map_or(0, |(number, _, _)| *number);
    let counts = |number: u64| number <= limit && !declared.contains(&number);
    let mut highest = limit;
    let mut current: BTreeMap<u128, (u64, RowPlace)> = BTreeMap::new();
    for (number, key, place) in rows {
        highest = highest.max(number);
        state.row_written(key, number, place.location.segment);
        if !counts(number) {
            state.void.insert(number);
        } else if current.get(&key).is_none_or(|(n, _)| *n <= number) {
            current.insert(key, (number, place));
        }
    }
    let mut void_keys = Vec::new();
    for (number, key, segment) in gone {
        highest = highest.max(number);
        if let Some(s) = state.segments.get_mut(&segment) {
            s.checkpoints.insert(number);
        }
        if counts(number) {
            current.remove(&key);
            void_keys.push((key, segment));
        } else {
            state.void.insert(number);
        }
    }
    for (number, parts) in &tables {
        highest = highest.max(*number);
        if !counts(*number) {
            state.void.insert(*number);
        }
        for (_, segment) in parts.values() {
            if let Some(s) = state.segments.get_mut(segment) {
                s.checkpoints.insert(*number);
            }
        }
    }
    state.checkpoint = highest;
    let Some((number, end, end_segment)) = newest else { return Ok(None) };
    let parts = tables.remove(&number).unwrap_or_default();
    if parts.len() != end.parts as usize {
        let why = format!("checkpoint {number} has {} of {} table parts", parts.len(), end.parts);
        return Err(OpenError::Damaged { at: format!("segment {end_segment}"), why });
    }
    let mut places: Vec<SegmentId> = parts.values().map(|(_, segment)| *segment).collect();
    places.push(end_segment);
    let mut bytes = Vec::new();
    parts.values().for_each(|(part, _)| bytes.extend_from_slice(part));
    let row_places: Vec<(u128, RowPlace)> = current.into_iter().map(|(k, (_, place))| (k, place)).collect();
    state.checkpoint_complete(&row_places, &void_keys, places);
    Ok(Some(RecoveredCheckpoint { applied: end.applied, tables: bytes.into() }))
}
