//! Printing a data directory record by record, without changing a byte of it and without a body.

use std::collections::BTreeMap;

use super::judge::read_segment;
use super::recovery;
use super::segment::file_name;
use super::superblock::Superblock;
use crate::codec::{self, Intent};
use crate::disk::Disk;
use crate::erase::plan;
use crate::error::OpenError;
use crate::position::SegmentId;
use crate::record::Kind;
use crate::seal::Keyring;

/// What became of a record's body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BodyState {
    /// It has none.
    None,
    /// It is what was written.
    Whole,
    /// It was overwritten on purpose.
    Erased,
    /// It is neither.
    Damaged,
}

/// A line of a dump.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// A record.
    Record {
        /// Its segment, and the file of that.
        segment: (SegmentId, String),
        /// Where its header begins.
        offset: u32,
        /// What it is.
        kind: Kind,
        /// Term and index; zero where the kind has none. The index of a mark is the length of its batch.
        at: crate::LogPosition,
        /// Lengths of head and body.
        bytes: (u32, u32),
        /// What became of its body.
        body: BodyState,
    },
    /// Octets that are no record.
    Hole {
        /// The segment, and the file of it.
        segment: (SegmentId, String),
        /// From here.
        from: u32,
        /// To here.
        to: u32,
        /// What is wrong.
        why: String,
    },
}

/// Tells `each` record and hole of a directory, in the order of the log.
///
/// # Errors
/// If the directory has no superblock that can be read, or a record is sealed with a key that is not at hand.
pub fn dump(disk: &dyn Disk, keys: &Keyring, each: &mut dyn FnMut(Line)) -> Result<(), OpenError> {
    let Some(superblock) = Superblock::load(disk)? else {
        return Err(OpenError::Damaged {
            at: disk.name(),
            why: "no superblock: not a data directory".into(),
        });
    };
    let size = superblock.contents.segment_bytes;
    let scan = |id: SegmentId, slot: u32| match disk.open(&file_name(slot)) {
        Ok(file) => recovery::scan(&keys.of_segment(id), &read_segment(&*file, size).0),
        Err(_) => recovery::Scan::missing(id, size as u32),
    };
    let mut erased: BTreeMap<SegmentId, Vec<plan::Range>> = BTreeMap::new();
    for (id, slot) in &superblock.contents.segments {
        let scanned = scan(*id, *slot);
        scanned.check_key()?;
        for found in scanned.records.iter().filter(|found| found.kind == Kind::Intent) {
            let Ok(intent) = codec::decode::<Intent>("intent", &found.head) else { continue };
            erased.entry(intent.segment).or_default().extend(intent.ranges);
        }
    }
    erased.values_mut().for_each(plan::merge);
    let none = Vec::new();
    for (id, slot) in &superblock.contents.segments {
        let scanned = scan(*id, *slot);
        let erased = erased.get(id).unwrap_or(&none);
        let segment = (*id, file_name(*slot));
        let mut holes = scanned.holes.iter().peekable();
        let mut tell_holes = |before: u32, each: &mut dyn FnMut(Line)| {
            while let Some(hole) = holes.next_if(|hole| hole.from < before) {
                let (from, to, why) = (hole.from, hole.to, hole.why.to_string());
                each(Line::Hole { segment: segment.clone(), from, to, why });
            }
        };
        for found in &scanned.records {
            tell_holes(found.location.offset, each);
            let l = found.location;
            let body = match (l.body_bytes, plan::covers(erased, (l.body_offset() as u32, l.body_bytes))) {
                (0, _) => BodyState::None,
                (_, true) => BodyState::Erased,
                _ if found.body_intact => BodyState::Whole,
                _ => BodyState::Damaged,
            };
            let bytes = (l.head_bytes, l.body_bytes);
            each(Line::Record {
                segment: segment.clone(),
                offset: l.offset,
                kind: found.kind,
                at: found.at,
                bytes,
                body,
            });
        }
        tell_holes(u32::MAX, each);
    }
    Ok(())
}
