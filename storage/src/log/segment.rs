//! Segment files: zeroed before use, reused afterwards, and the room that is left.
//!
//! A file is `segment-NNNNNN`; the superblock says which segment stands in it. Files that it does not name are spare.
//! Zeroing is synced before a file enters the pool, so that a torn batch shows as blocks of zeros (`recovery`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Inner;
use super::state::Segment;
use crate::codec::Reset;
use crate::disk::{Disk, DiskFile};
use crate::limits::POOL_SEGMENTS_MAX;
use crate::position::{LogIndex, SegmentId};
use crate::sync::lock;

/// Room on the disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// Free on the file system, plus spare segments.
    pub free_bytes: u64,
    /// Held by segments in use.
    pub held_bytes: u64,
    /// Octets of live bodies among them.
    pub live_body_bytes: u64,
    /// Held by all of them but the one that is being written.
    pub sealed_bytes: u64,
    /// Octets of live bodies and current rows in those.
    pub sealed_live_bytes: u64,
    /// Held by segments in which records stand that the present at-rest key did not seal.
    pub other_key_bytes: u64,
    /// The last entry that is kept in one of them.
    pub other_key_upto: Option<LogIndex>,
    /// Size of a segment.
    pub segment_bytes: u64,
}

pub(super) fn file_name(slot: u32) -> String {
    format!("segment-{slot:06}")
}

pub(super) fn slot_of(name: &str) -> Option<u32> {
    name.strip_prefix("segment-")?.parse().ok()
}

/// Overwrites a file with zeros and syncs it.
pub(crate) fn zero(file: &dyn DiskFile, bytes: u64) -> std::io::Result<()> {
    zero_from(file, 0, bytes)
}

/// Overwrites a file with zeros from an offset on and syncs it.
pub(super) fn zero_from(file: &dyn DiskFile, from: u64, bytes: u64) -> std::io::Result<()> {
    file.write_zeros(from, bytes)?;
    file.sync_data()
}

/// Whether the disk was full.
pub(super) fn is_want_of_room(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

pub(super) fn create(disk: &dyn Disk, slot: u32, bytes: u64) -> std::io::Result<Arc<dyn DiskFile>> {
    let file = disk.create(&file_name(slot))?;
    zero(&*file, bytes)?;
    disk.sync_dir()?;
    Ok(file)
}

impl Inner {
    /// A zeroed file for a new segment: from the pool, or made now if the pool is empty.
    pub(super) fn take_segment_file(&self) -> std::io::Result<(u32, Arc<dyn DiskFile>)> {
        if let Some(spare) = lock(&self.pool).pop() {
            self.wake.notify_all();
            return Ok(spare);
        }
        self.create_segment_file()
    }

    fn create_segment_file(&self) -> std::io::Result<(u32, Arc<dyn DiskFile>)> {
        let slot = {
            let mut next = lock(&self.next_slot);
            *next += 1;
            *next - 1
        };
        let made = create(&*self.disk, slot, self.segment_bytes);
        if made.is_err() {
            // A file that could not be filled only takes room.
            if let Err(e) = self.disk.remove(&file_name(slot)) {
                tracing::warn!(slot, error = %e, "could not remove an unfinished segment file");
            }
        }
        Ok((slot, made?))
    }

    /// A segment's file by a descriptor of its own.
    pub(crate) fn open_segment_file(&self, slot: u32) -> std::io::Result<Arc<dyn DiskFile>> {
        self.disk.open(&file_name(slot))
    }

    /// Keeps one zeroed file ready. Want of room is not an error here.
    pub(crate) fn fill_pool(&self) {
        if !lock(&self.pool).is_empty() {
            return;
        }
        // A file that finds no room is not even begun: it would take the last blocks from others for a while.
        let free = self.disk.free_bytes().unwrap_or(u64::MAX);
        let made = if free < 2 * self.segment_bytes {
            Err(std::io::ErrorKind::StorageFull.into())
        } else {
            self.create_segment_file()
        };
        match made {
            Ok(spare) => {
                lock(&self.pool).push(spare);
                self.lacks_spare.store(false, Ordering::Relaxed);
            }
            Err(e) if !self.lacks_spare.swap(true, Ordering::Relaxed) => {
                tracing::warn!(error = %e, "no room for a spare segment");
            }
            Err(_) => {}
        }
    }

    /// Takes a file back: zeroes it for the pool, or removes it if the pool is full. What is `in_the_clear` where all else is sealed is
    /// overwritten before its blocks go.
    pub(crate) fn give_back(
        &self,
        slot: u32,
        file: Arc<dyn DiskFile>,
        in_the_clear: bool,
    ) -> std::io::Result<()> {
        let is_wanted = lock(&self.pool).len() < POOL_SEGMENTS_MAX;
        let mut is_whole = true;
        if is_wanted || in_the_clear {
            match zero(&*file, self.segment_bytes) {
                // One that was cut short while it was made, and there is no room for the rest; what it has is zeros now.
                Err(e) if is_want_of_room(&e) => {
                    file.sync_data()?;
                    is_whole = false;
                }
                zeroed => zeroed?,
            }
        }
        if is_wanted && is_whole {
            lock(&self.pool).push((slot, file));
            return Ok(());
        }
        self.disk.remove(&file_name(slot))?;
        self.disk.sync_dir()
    }

    /// Reopens and zeroes files that no segment stands in, found at the start.
    pub(crate) fn adopt(&self, slots: Vec<u32>) -> std::io::Result<()> {
        for slot in slots {
            let file = self.disk.open(&file_name(slot))?;
            // It may be one that was to be overwritten when the power went.
            self.give_back(slot, file, self.options.keys.sealing().is_some())?;
        }
        Ok(())
    }

    /// Whether the writer is to go on in another segment: records stand in this one that the present key did not seal, and there is room.
    pub(crate) fn is_to_be_left(&self, active: SegmentId) -> bool {
        self.state().segments.get(&active).is_some_and(|segment| segment.other_key) && self.has_spare_room()
    }

    /// Whether a segment can be opened, and another one.
    fn has_spare_room(&self) -> bool {
        self.free_bytes() >= 2 * self.segment_bytes
    }

    /// Octets that can be written before a segment cannot be opened, but for what settlements and erasure are left with.
    pub(crate) fn room_to_move(&self) -> u64 {
        let left = {
            let state = self.state();
            state.segments.last_key_value().map_or(0, |(_, s)| self.segment_bytes - s.end as u64)
        };
        let spare = self.free_bytes() / self.segment_bytes * self.segment_bytes;
        (left + spare).saturating_sub(self.segment_bytes / 16)
    }

    /// Writes both copies of the superblock again if one of them is not what was written; whether that was so.
    pub(crate) fn mend_superblock(&self) -> std::io::Result<bool> {
        let mut superblock = self.superblock();
        match superblock.is_whole() {
            true => Ok(false),
            false => superblock.store().map(|()| true),
        }
    }

    /// Writes to the superblock how far the log is synced, if that is further than it says.
    pub(crate) fn note_end(&self) -> std::io::Result<()> {
        let (segment, offset) = self.state().synced;
        let mut superblock = self.superblock();
        // Given back meanwhile, if it is not there.
        let is_used = superblock.contents.segments.iter().any(|(id, _)| *id == segment);
        if !is_used || superblock.ends.get(&segment).is_some_and(|end| *end >= offset) {
            return Ok(());
        }
        superblock.ends.insert(segment, offset);
        superblock.store()
    }

    /// What the superblock said was still to be done is done, if it is that.
    pub(crate) fn end_pending(&self, is_that: impl Fn(&Reset) -> bool) -> std::io::Result<()> {
        let mut superblock = self.superblock();
        match superblock.contents.pending.take_if(|pending| is_that(pending)) {
            Some(_) => superblock.store(),
            None => Ok(()),
        }
    }

    /// Takes a segment that holds nothing live out of the superblock, durably, and out of memory.
    pub(crate) fn retire(&self, id: SegmentId) -> std::io::Result<Option<Segment>> {
        let (segment, offset) = self.state().synced;
        let mut superblock = self.superblock();
        superblock.contents.segments.retain(|(other, _)| *other != id);
        superblock.ends.remove(&id);
        // What made it idle stands before this end: a log that lost it, and has lost the segment, is not taken for an older one.
        if superblock.contents.segments.iter().any(|(other, _)| *other == segment) {
            let end = superblock.ends.entry(segment).or_default();
            *end = offset.max(*end);
        }
        superblock.store()?;
        drop(superblock);
        Ok(self.state().remove_segment(id))
    }

    pub(super) fn free_bytes(&self) -> u64 {
        let spare = lock(&self.pool).len() as u64 * self.segment_bytes;
        self.disk.free_bytes().unwrap_or(0) + spare
    }

    pub(super) fn space(&self) -> SpaceReport {
        let free_bytes = self.free_bytes();
        let state = self.state();
        let sealed = state.segments.values().rev().skip(1);
        SpaceReport {
            sealed_bytes: sealed.clone().count() as u64 * self.segment_bytes,
            sealed_live_bytes: sealed.map(|s| s.live_bytes).sum(),
            free_bytes,
            held_bytes: state.segments.len() as u64 * self.segment_bytes,
            live_body_bytes: state.segments.values().map(|s| s.live_body_bytes).sum(),
            other_key_bytes: state.segments.values().filter(|s| s.other_key).count() as u64
                * self.segment_bytes,
            other_key_upto: state.other_key_upto(),
            segment_bytes: self.segment_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::superblock::Superblock;
    use super::super::{Entry, open_for_test as open};
    use crate::disk::sim::SimDisk;
    use crate::position::{LogIndex, LogPosition, Term};

    /// A segment goes on the strength of what stands at the log's end. If the disk has lost that, the superblock knows how far it went.
    #[test]
    fn p9_whoever_gives_a_segment_back_says_how_far_the_log_is() {
        let disk = SimDisk::new(1);
        let log = open(&disk);
        for index in 0..30 {
            let (tell, told) = std::sync::mpsc::channel();
            let at = LogPosition { term: Term(1), index: LogIndex(index) };
            let entry = Entry { at, head: "head".into(), body: vec![b'x'; 200_000].into() };
            log.append(vec![entry], Box::new(move |done| drop(tell.send(done))));
            told.recv().expect("an answer").expect("a sound disk");
        }
        let (first, synced) = {
            let state = log.inner.state();
            (*state.segments.keys().next().expect("there is one"), state.synced)
        };
        assert!(first < synced.0);
        log.inner.retire(first).expect("a sound disk");
        let superblock = Superblock::load(&disk).expect("readable").expect("there");
        assert!(superblock.ends.get(&synced.0) >= Some(&synced.1), "{:?} and {synced:?}", superblock.ends);
        assert!(!superblock.ends.contains_key(&first));
    }
}
