//! A disk in memory that lies as disks do: a crash keeps any subset of the unsynced 4 KiB blocks and of the
//! unsynced directory entries, a sync may fail once, space may run out, bits may flip, a write may be lost or go elsewhere. Deterministic by
//! its seed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{Disk, DiskFile};
use crate::limits::BLOCK_BYTES;
use crate::sync::{Mutex, MutexGuard, lock};

const BLOCK: usize = BLOCK_BYTES as usize;

#[derive(Clone, Default)]
struct Node {
    /// What a crash cannot take.
    synced: Vec<u8>,
    /// What the running system sees.
    seen: Vec<u8>,
    /// Blocks in which the two may differ.
    dirty: std::collections::BTreeSet<usize>,
    /// Syncs that failed.
    errors: u64,
}

#[derive(Default)]
struct State {
    files: BTreeMap<u64, Node>,
    /// Name to file, as the running system sees it and as a crash leaves it.
    names: BTreeMap<String, u64>,
    synced_names: BTreeMap<String, u64>,
    next: u64,
    seed: u64,
    /// Operations until the next one of them fails, by kind.
    fail_sync_in: Option<u64>,
    fail_write_in: Option<u64>,
    /// Until the next operation of any kind that changes something fails, once.
    fail_in: Option<u64>,
    /// Operations that change something, so far.
    steps: u64,
    /// After this many more writes or syncs the power is off: everything fails and nothing more is kept.
    power_off_in: Option<u64>,
    /// After this many more writes one is not what it says.
    lie_in: Option<(u64, WriteLie)>,
    /// Bits that were flipped, and writes that were not what they said.
    lies: u64,
    capacity_bytes: u64,
    /// So many more refusals, and others have made room.
    relents_in: Option<u32>,
    syncs: u64,
    writes: u64,
    /// Shortest and longest time of a sync.
    sync_takes: (Duration, Duration),
    /// What is looked for in what is synced: see [`SimDisk::watch`].
    mark: Vec<u8>,
    /// By file, where such marks stand on the medium.
    marks: BTreeMap<u64, BTreeMap<usize, u64>>,
}

impl State {
    fn random(&mut self) -> u64 {
        // splitmix64 (Steele et al., OOPSLA'14).
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|id| self.files.get(id)).map(|n| n.seen.len() as u64).sum()
    }

    /// A block as the running system sees it.
    fn block(&self, id: u64, block: usize) -> Vec<u8> {
        let seen = &self.files[&id].seen;
        let to = ((block + 1) * BLOCK).min(seen.len());
        seen.get(block * BLOCK..to).unwrap_or_default().to_vec()
    }

    /// Brings a block to the medium.
    fn bring(&mut self, id: u64, block: usize, octets: &[u8]) {
        // The file may have become shorter meanwhile.
        if octets.is_empty() {
            return;
        }
        let node = self.files.get_mut(&id).expect("a block has a file");
        let (from, to) = (block * BLOCK, block * BLOCK + octets.len());
        if node.synced.len() < to {
            node.synced.resize(to, 0);
        }
        node.synced[from..to].copy_from_slice(octets);
        if self.mark.is_empty() {
            return;
        }
        // A mark may stand across blocks.
        let over = self.mark.len() + MARK_DIGITS - 1;
        let (from, to) = (from.saturating_sub(over), (to + over).min(node.synced.len()));
        let marks = self.marks.entry(id).or_default();
        while let Some((at, _)) = marks.range(from..to.saturating_sub(over)).next() {
            let at = *at;
            marks.remove(&at);
        }
        let part = &node.synced[from..to];
        let mut at = 0;
        while let Some(next) = part[at..].iter().position(|octet| *octet == self.mark[0]) {
            at += next;
            if let Some(digits) = part[at..].strip_prefix(&self.mark[..]).and_then(|d| d.get(..MARK_DIGITS))
                && let Some(number) =
                    std::str::from_utf8(digits).ok().and_then(|d| u64::from_str_radix(d, 16).ok())
            {
                marks.insert(from + at, number);
            }
            at += 1;
        }
    }

    /// Somebody was refused for want of room, or has seen that there is little.
    fn refuse(&mut self, free: u64) {
        if free < LITTLE {
            self.relents_in = self.relents_in.map(|left| left.saturating_sub(1));
        }
        if self.relents_in == Some(0) {
            self.capacity_bytes = u64::MAX;
        }
    }

    /// Blocks that a sync covered are clean, but for those that were written again meanwhile.
    fn clean(&mut self, id: u64, covered: &[(usize, Vec<u8>)]) {
        for (block, octets) in covered {
            if self.block(id, *block) == *octets {
                self.files.get_mut(&id).expect("a block has a file").dirty.remove(block);
            }
        }
    }

    fn step(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.power_off_in {
            if *left == 0 {
                return Err(io::Error::other("the power is off"));
            }
            *left -= 1;
        }
        self.steps += 1;
        match &mut self.fail_in {
            Some(0) => {
                self.fail_in = None;
                Err(io::Error::other("Input/output error"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// What becomes of a write that is said to have gone well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteLie {
    /// Nothing.
    Lost,
    /// It goes to another block of the same file.
    Misdirected,
}

/// A data directory in memory. Clones share it.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    /// Of the process that has it open.
    is_alive: Arc<AtomicBool>,
}

/// Less room than this is little: somebody waits for it.
const LITTLE: u64 = 16 << 20;

/// Digits of the number behind a mark.
const MARK_DIGITS: usize = 16;

impl SimDisk {
    /// An empty directory; `seed` decides what crashes take.
    pub fn new(seed: u64) -> SimDisk {
        let state = State { seed, capacity_bytes: u64::MAX, ..State::default() };
        SimDisk { state: Arc::new(Mutex::new(state)), is_alive: Arc::new(AtomicBool::new(true)) }
    }

    /// The same directory, for another process.
    pub fn for_process(&self) -> SimDisk {
        SimDisk { state: self.state.clone(), is_alive: Arc::new(AtomicBool::new(true)) }
    }

    /// The process that opened this, or a clone of it, was killed: nothing that it does reaches the directory.
    pub fn fence(&self) {
        self.is_alive.store(false, Ordering::SeqCst);
    }

    /// How long syncs take from now on, at least and at most. Passes only in a simulated process.
    pub fn set_sync_time(&self, least: Duration, most: Duration) {
        self.state().sync_takes = (least, most);
    }

    /// Notes from now on where on the medium `mark` stands with 16 hexadecimal digits behind it.
    pub fn watch(&self, mark: &[u8]) {
        self.state().mark = mark.to_vec();
    }

    /// The numbers behind the marks that stand on the medium, which is what a loss of power leaves: in which file, and where.
    pub fn marks(&self) -> Vec<(u64, String, usize)> {
        let s = self.state();
        let mut marks = Vec::new();
        for (name, id) in &s.synced_names {
            let within = s.marks.get(id).into_iter().flatten();
            marks.extend(within.map(|(at, number)| (*number, name.clone(), *at)));
        }
        marks
    }

    /// Which numbers of a range stand behind marks on the medium.
    pub fn marks_within(&self, range: std::ops::Range<u64>) -> BTreeSet<u64> {
        let s = self.state();
        let files = s.synced_names.values().filter_map(|id| s.marks.get(id));
        files.flat_map(|marks| marks.values()).copied().filter(|number| range.contains(number)).collect()
    }

    /// A change by the process that opened this.
    fn change(&self) -> io::Result<MutexGuard<'_, State>> {
        match self.is_alive.load(Ordering::SeqCst) {
            true => Ok(self.state()),
            false => Err(io::Error::other("the process was killed")),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Loses power: of what was not synced, each block and each name stays or goes by chance.
    pub fn crash(&self) {
        let mut s = self.state();
        let ids: Vec<u64> = s.files.keys().copied().collect();
        for id in ids {
            let dirty = std::mem::take(&mut s.files.get_mut(&id).expect("listed above").dirty);
            for block in dirty {
                if s.random() & 1 == 0 {
                    let octets = s.block(id, block);
                    s.bring(id, block, &octets);
                }
            }
            let node = s.files.get_mut(&id).expect("listed above");
            node.seen.clone_from(&node.synced);
        }
        let mut names = s.synced_names.clone();
        for (name, id) in s.names.clone() {
            if !names.contains_key(&name) && s.random() & 1 == 0 {
                names.insert(name, id);
            }
        }
        let seen = s.names.clone();
        for name in s.synced_names.clone().into_keys() {
            if !seen.contains_key(&name) && s.random() & 1 == 0 {
                names.remove(&name);
            }
        }
        s.names = names.clone();
        s.synced_names = names;
        let State { files, marks, synced_names, .. } = &mut *s;
        files.retain(|id, _| synced_names.values().any(|named| named == id));
        marks.retain(|id, _| files.contains_key(id));
        drop(s);
        self.heal();
    }

    /// The `n`th sync of a segment's file from now fails, and the blocks it covered count as clean although they are not on disk. Each
    /// descriptor that is open is told so once, as Linux does (errseq).
    pub fn fail_sync_in(&self, n: u64) {
        self.state().fail_sync_in = Some(n);
    }

    /// The `n`th write from now fails with ENOSPC, half done.
    pub fn fail_write_in(&self, n: u64) {
        self.state().fail_write_in = Some(n);
    }

    /// After `n` more operations that change something one fails, without having done anything. If that is a sync, what it covered counts
    /// as clean.
    pub fn fail_in(&self, n: u64) {
        self.state().fail_in = Some(n);
    }

    /// After `n` more writes one is not what it says.
    pub fn lie_in(&self, n: u64, lie: WriteLie) {
        self.state().lie_in = Some((n, lie));
    }

    /// A lie that is still to come does not.
    pub fn lie_no_more(&self) {
        self.state().lie_in = None;
    }

    /// Bits that were flipped, and writes that were not what they said, so far.
    pub fn lies(&self) -> u64 {
        self.state().lies
    }

    /// What was still to fail does not.
    pub fn heal(&self) {
        let mut s = self.state();
        s.lie_in = None;
        (s.fail_sync_in, s.fail_write_in, s.fail_in, s.power_off_in) = (None, None, None, None);
    }

    /// Operations that change something, so far.
    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    /// After `n` more writes and syncs nothing works any more until [`SimDisk::crash`].
    pub fn power_off_in(&self, n: u64) {
        self.state().power_off_in = Some(n);
    }

    /// Octets of all files.
    pub fn used_bytes(&self) -> u64 {
        self.state().used()
    }

    /// Bounds the space; what goes beyond is ENOSPC.
    pub fn set_capacity(&self, bytes: u64) {
        let mut s = self.state();
        (s.capacity_bytes, s.relents_in) = (bytes, None);
    }

    /// After so many refusals for want of room, or looks that find little, there is enough of it.
    pub fn relent_in(&self, refusals: u32) {
        self.state().relents_in = Some(refusals);
    }

    /// Writes and syncs so far.
    pub fn operations(&self) -> u64 {
        let s = self.state();
        s.writes + s.syncs
    }

    /// Flips one bit, on the medium and in the cache.
    pub fn flip(&self, name: &str, offset: u64, bit: u8) {
        let mut s = self.state();
        s.lies += 1;
        let id = s.names[name];
        let node = s.files.get_mut(&id).expect("a name has a file");
        node.seen[offset as usize] ^= 1 << bit;
        if let Some(byte) = node.synced.get_mut(offset as usize) {
            *byte ^= 1 << bit;
        }
    }

    /// Cuts a file short, on the medium and in the cache.
    pub fn truncate(&self, name: &str, bytes: u64) {
        let mut s = self.state();
        let id = s.names[name];
        let node = s.files.get_mut(&id).expect("a name has a file");
        node.seen.truncate(bytes as usize);
        node.synced.truncate(bytes as usize);
        let last = bytes as usize / BLOCK;
        node.dirty.retain(|block| *block < last);
    }

    /// Whether `needle` stands in any file, in the cache or on the medium.
    pub fn contains(&self, needle: &[u8]) -> bool {
        let s = self.state();
        s.names.values().filter_map(|id| s.files.get(id)).any(|n| {
            let has = |hay: &[u8]| hay.windows(needle.len()).any(|w| w == needle);
            has(&n.seen) || has(&n.synced)
        })
    }

    /// A file's contents as the running system sees them.
    pub fn contents(&self, name: &str) -> Vec<u8> {
        let s = self.state();
        s.files[&s.names[name]].seen.clone()
    }

    /// A file's contents as a loss of power leaves them, if all goes that can.
    pub fn medium(&self, name: &str) -> Vec<u8> {
        let s = self.state();
        s.files[&s.names[name]].synced.clone()
    }
}

impl Disk for SimDisk {
    fn name(&self) -> String {
        "simulated disk".into()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.state().names.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let s = self.state();
        let id = *s.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        let told = AtomicU64::new(s.files[&id].errors);
        Ok(Arc::new(SimFile { disk: self.clone(), id, told }))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut s = self.change()?;
        s.step()?;
        if s.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        s.next += 1;
        let id = s.next;
        s.files.insert(id, Node::default());
        s.names.insert(name.into(), id);
        Ok(Arc::new(SimFile { disk: self.clone(), id, told: AtomicU64::new(0) }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut s = self.change()?;
        s.step()?;
        s.names.remove(name).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut s = self.change()?;
        s.step()?;
        let id = s.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        s.names.insert(to.into(), id);
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut s = self.change()?;
        s.step()?;
        s.synced_names = s.names.clone();
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let mut s = self.state();
        let free = s.capacity_bytes.saturating_sub(s.used());
        s.refuse(free);
        Ok(free)
    }
}

struct SimFile {
    disk: SimDisk,
    id: u64,
    /// Of how many failed syncs this descriptor was told, or need not be.
    told: AtomicU64,
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let s = self.disk.state();
        let seen = &s.files[&self.id].seen;
        let from = offset as usize;
        let Some(part) = seen.get(from..from + buf.len()) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        buf.copy_from_slice(part);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut s = self.disk.change()?;
        s.step()?;
        s.writes += 1;
        let mut bytes = bytes;
        let mut result = Ok(());
        let end = offset + bytes.len() as u64;
        let grows = end.saturating_sub(s.files[&self.id].seen.len() as u64);
        if grows > 0 && s.used() + grows > s.capacity_bytes {
            s.refuse(0);
            return Err(io::ErrorKind::StorageFull.into());
        }
        if let Some(n) = &mut s.fail_write_in {
            if *n <= 1 {
                s.fail_write_in = None;
                bytes = &bytes[..bytes.len() / 2];
                result = Err(io::ErrorKind::StorageFull.into());
            } else {
                *n -= 1;
            }
        }
        let mut offset = offset;
        match &mut s.lie_in {
            Some((0, lie)) => {
                let lie = *lie;
                (s.lie_in, s.lies) = (None, s.lies + 1);
                if lie == WriteLie::Lost {
                    return result;
                }
                let blocks = (s.files[&self.id].seen.len().saturating_sub(bytes.len()) / BLOCK) as u64;
                offset = s.random() % (blocks + 1) * BLOCK_BYTES;
            }
            Some((n, _)) => *n -= 1,
            None => {}
        }
        let node = s.files.get_mut(&self.id).expect("open files stay");
        let (from, to) = (offset as usize, offset as usize + bytes.len());
        if node.seen.len() < to {
            node.seen.resize(to, 0);
        }
        node.seen[from..to].copy_from_slice(bytes);
        if from < to {
            node.dirty.extend(from / BLOCK..=(to - 1) / BLOCK);
        }
        result
    }

    /// What comes to the medium is what stood there when it began: what is written while it runs waits for the next.
    fn sync_data(&self) -> io::Result<()> {
        let (takes, covers) = {
            let mut s = self.disk.change()?;
            let (least, most) = s.sync_takes;
            let spread = most.saturating_sub(least).as_micros() as u64;
            let takes = if spread > 0 { least + Duration::from_micros(s.random() % spread) } else { least };
            let dirty = s.files[&self.id].dirty.iter();
            (takes, dirty.map(|block| (*block, s.block(self.id, *block))).collect::<Vec<_>>())
        };
        crate::sync::pass(takes);
        let mut s = self.disk.change()?;
        if let Err(e) = s.step() {
            if s.power_off_in.is_none() {
                s.clean(self.id, &covers);
                let node = s.files.get_mut(&self.id).expect("open files stay");
                node.errors += 1;
                self.told.store(node.errors, Ordering::SeqCst);
            }
            return Err(e);
        }
        s.syncs += 1;
        let is_segment = s.names.iter().any(|(name, id)| *id == self.id && name.starts_with("segment-"));
        let fails = match &mut s.fail_sync_in {
            _ if !is_segment => false,
            Some(n) if *n <= 1 => {
                s.fail_sync_in = None;
                true
            }
            Some(n) => {
                *n -= 1;
                false
            }
            None => false,
        };
        s.clean(self.id, &covers);
        let node = s.files.get_mut(&self.id).expect("open files stay");
        if fails {
            node.errors += 1;
            self.told.store(node.errors, Ordering::SeqCst);
            return Err(io::Error::other("Input/output error"));
        }
        node.synced.resize(node.seen.len(), 0);
        let errors = node.errors;
        for (block, octets) in covers {
            // One that another sync has brought since, as it is now, stays.
            if s.files[&self.id].dirty.contains(&block) || s.block(self.id, block) == octets {
                s.bring(self.id, block, &octets);
            }
        }
        match self.told.swap(errors, Ordering::SeqCst) < errors {
            true => Err(io::Error::other("Input/output error")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(feature = "shuttle"))]
    #[test]
    fn a_sync_brings_what_stood_there_when_it_began() {
        use crate::sync::turns::{Crew, thread};
        let disk = SimDisk::new(1);
        let file = disk.create("segment-000000").unwrap();
        file.write_at(b"before", 0).unwrap();
        let hour = Duration::from_secs(3600);
        disk.set_sync_time(hour, hour);
        let start = crate::clock::now();
        let crew = Crew::new(1, move || start, || {});
        crew.scope(|| {
            let again = disk.open("segment-000000").unwrap();
            let sync = thread::Builder::new().name("sync".into()).spawn(move || again.sync_data().unwrap());
            crew.run();
            file.write_at(b"during", 0).unwrap();
            sync.unwrap().join().unwrap();
            assert_eq!(disk.medium("segment-000000"), b"before");
            file.sync_data().unwrap();
            assert_eq!(disk.medium("segment-000000"), b"during");
        });
    }

    #[test]
    fn each_descriptor_is_told_of_a_failed_sync_once() {
        let disk = SimDisk::new(1);
        let one = disk.create("segment-000000").unwrap();
        let other = disk.open("segment-000000").unwrap();
        one.write_at(b"octets", 0).unwrap();
        disk.fail_sync_in(1);
        assert!(other.sync_data().is_err() && other.sync_data().is_ok());
        assert!(one.sync_data().is_err() && one.sync_data().is_ok());
        assert_eq!(disk.medium("segment-000000"), vec![0; 6]);
        assert!(disk.open("segment-000000").unwrap().sync_data().is_ok());
    }
}
