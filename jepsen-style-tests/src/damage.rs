//! Damage to the files of a node that does not run: what disks, cables and administrators do to them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::random::Random;

/// How each record's header begins.
const MAGIC: &[u8] = b"HFR1";
/// Octets at a file's beginning that say which segment it is.
const HEADER: usize = 64;
/// What disks write at once.
const BLOCK: usize = 4096;
/// The longest stretch of garbage.
const GARBAGE_MAX: u64 = 256 << 10;

/// A way to damage files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// A segment file ends early.
    CutShort,
    /// A segment file is not there any more.
    Removed,
    /// Octets that nobody wrote stand from a record on.
    Garbage,
    /// Two blocks with records in them stand in each other's place.
    Misdirected,
    /// Two segment files stand in each other's place.
    Swapped,
    /// Both copies of the superblock are garbage.
    Superblock,
}

/// All of them.
pub(crate) const ALL: [Damage; 6] = [
    Damage::CutShort,
    Damage::Removed,
    Damage::Garbage,
    Damage::Misdirected,
    Damage::Swapped,
    Damage::Superblock,
];

impl Damage {
    /// Does it to a data directory, and says what and where. Nothing if there is nothing to do it to.
    ///
    /// # Errors
    /// If the files cannot be read or written.
    pub(crate) fn inflict(self, data: &Path, random: &mut Random) -> std::io::Result<Option<String>> {
        let all = segments(data)?;
        if self == Damage::Superblock {
            let path = data.join("superblock");
            let length = std::fs::metadata(&path)?.len() as usize;
            std::fs::write(path, vec![0xee; length])?;
            return Ok(Some("both copies in superblock are garbage".into()));
        }
        let Some(path) = (!all.is_empty()).then(|| random.pick(&all)) else { return Ok(None) };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut octets = std::fs::read(path)?;
        let headers = headers(&octets);
        let what = match self {
            Damage::CutShort => {
                let Some(at) = (!headers.is_empty()).then(|| *random.pick(&headers)) else { return Ok(None) };
                octets.truncate(at + random.within(1, 100) as usize);
                std::fs::write(path, &octets)?;
                format!("{name} ends after {} octets", octets.len())
            }
            Damage::Removed => {
                std::fs::remove_file(path)?;
                format!("{name} is gone")
            }
            Damage::Garbage => {
                let Some(at) = (!headers.is_empty()).then(|| *random.pick(&headers)) else { return Ok(None) };
                let end = octets.len().min(at + random.within(1, GARBAGE_MAX) as usize);
                octets[at..end].fill(0x5a);
                std::fs::write(path, &octets)?;
                format!("garbage in {name} from {at} to {end}")
            }
            Damage::Misdirected => {
                let blocks: BTreeSet<usize> = headers.iter().map(|at| at / BLOCK * BLOCK).collect();
                let blocks: Vec<usize> =
                    blocks.into_iter().filter(|block| block + BLOCK <= octets.len()).collect();
                if blocks.len() < 2 {
                    return Ok(None);
                }
                let one = random.within(0, blocks.len() as u64 - 1) as usize;
                let (one, other) =
                    (blocks[one], blocks[random.within(one as u64 + 1, blocks.len() as u64) as usize]);
                let (before, from_other) = octets.split_at_mut(other);
                before[one..one + BLOCK].swap_with_slice(&mut from_other[..BLOCK]);
                std::fs::write(path, &octets)?;
                format!("blocks of {name} at {one} and {other} are exchanged")
            }
            Damage::Swapped => {
                let others: Vec<&PathBuf> = all.iter().filter(|other| *other != path).collect();
                let Some(other) = (!others.is_empty()).then(|| *random.pick(&others)) else {
                    return Ok(None);
                };
                let theirs = std::fs::read(other)?;
                std::fs::write(other, &octets)?;
                std::fs::write(path, theirs)?;
                let other = other.file_name().unwrap_or_default().to_string_lossy();
                format!("{name} and {other} are exchanged")
            }
            Damage::Superblock => unreachable!("done above"),
        };
        Ok(Some(what))
    }
}

/// Flips a bit in one to three places of a node's segment files, where something was written, the first of them in the header of a
/// record. Says where.
///
/// # Errors
/// If the files cannot be read or written.
pub(crate) fn flip_bits(data: &Path, random: &mut Random) -> std::io::Result<Vec<String>> {
    let all = segments(data)?;
    let mut done = BTreeSet::new();
    for n in 0..random.within(1, 4) {
        let Some(path) = (!all.is_empty()).then(|| random.pick(&all)) else { break };
        let mut octets = std::fs::read(path)?;
        let Some(written) = octets.iter().rposition(|octet| *octet != 0) else { continue };
        let headers = headers(&octets);
        let at = match n {
            0 if !headers.is_empty() => random.pick(&headers) + random.within(4, 60) as usize,
            _ => random.within(0, written as u64 + 1) as usize,
        };
        octets[at] ^= 1 << random.within(0, 8);
        std::fs::write(path, &octets)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        done.insert(format!("{name} at {at}"));
    }
    Ok(done.into_iter().collect())
}

/// What stood in segment files at a time.
pub(crate) struct OldCopy(Vec<(PathBuf, Vec<u8>)>);

impl OldCopy {
    /// Of all segment files. The node may run; a file that it takes away meanwhile is left out.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub(crate) fn of(data: &Path) -> std::io::Result<OldCopy> {
        let all = segments(data)?.into_iter();
        Ok(OldCopy(all.filter_map(|path| Some((path.clone(), std::fs::read(path).ok()?))).collect()))
    }

    /// Files that have records which they did not have: they were added to since, or were given to another segment that has some. One that is other
    /// only for what was erased lacks nothing.
    fn grown(&self) -> Vec<&(PathBuf, Vec<u8>)> {
        let has_more = |(path, octets): &&(PathBuf, Vec<u8>)| {
            let now = std::fs::read(path).unwrap_or_default();
            match now.get(..HEADER) == octets.get(..HEADER) {
                true => headers(&now).last() > headers(octets).last(),
                false => headers(&now).len() > 1,
            }
        };
        self.0.iter().filter(has_more).collect()
    }

    /// Whether there is a file to put back of which the node would lack something.
    pub(crate) fn is_old(&self) -> bool {
        !self.grown().is_empty()
    }

    /// Puts one such file back. Says which; nothing if there is none.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn put_back(&self, random: &mut Random) -> std::io::Result<Option<String>> {
        let grown = self.grown();
        let Some((path, octets)) = (!grown.is_empty()).then(|| *random.pick(&grown)) else { return Ok(None) };
        std::fs::write(path, octets)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(Some(format!("{name} is an old copy")))
    }
}

/// Segment files in which something was written, in order.
fn segments(data: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(data)?.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("segment-")));
    found.retain(|path| std::fs::read(path).is_ok_and(|octets| octets.iter().any(|octet| *octet != 0)));
    found.sort();
    Ok(found)
}

/// Where headers of records begin.
fn headers(octets: &[u8]) -> Vec<usize> {
    let last = octets.len().saturating_sub(64);
    (0..last).filter(|at| octets[*at..].starts_with(MAGIC)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    /// Two segments of which the second has no room behind its last record, one that was never written to, and superblocks.
    fn directory() -> Scratch {
        let dir = Scratch::new();
        for (name, records) in [("segment-000001", 40_u8), ("segment-000002", 80), ("segment-000003", 0)] {
            let mut octets = Vec::new();
            for n in 1..=records {
                octets.extend(MAGIC);
                octets.resize(octets.len() + 3000, n);
            }
            octets.resize(300_000, 0);
            std::fs::write(dir.path().join(name), octets).unwrap();
        }
        std::fs::write(dir.path().join("superblock"), [7; 8192]).unwrap();
        std::fs::write(dir.path().join("LOCK"), "").unwrap();
        dir
    }

    fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
        all.sort();
        all.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }

    #[test]
    fn each_kind_of_damage_changes_what_it_says_and_no_more() {
        for damage in ALL {
            for seed in 0..20 {
                let dir = directory();
                let before = files(dir.path());
                let what = damage.inflict(dir.path(), &mut Random::new(seed)).unwrap().unwrap();
                let after = files(dir.path());
                let changed: Vec<&PathBuf> =
                    before.iter().filter(|file| !after.contains(file)).map(|(path, _)| path).collect();
                let expected = if damage == Damage::Swapped { 2 } else { 1 };
                assert_eq!(changed.len(), expected, "{damage:?} {seed}: {what}");
                for path in changed {
                    let name = path.file_name().unwrap().to_string_lossy();
                    assert!(what.contains(&*name), "{name}: {what}");
                    assert_ne!(name, "segment-000003");
                }
            }
        }
        let empty = Scratch::new();
        std::fs::write(empty.path().join("superblock"), [7; 8192]).unwrap();
        for damage in ALL.into_iter().filter(|damage| *damage != Damage::Superblock) {
            assert_eq!(damage.inflict(empty.path(), &mut Random::new(1)).unwrap(), None, "{damage:?}");
        }
    }

    #[test]
    fn bits_flip_where_it_is_said() {
        for seed in 0..20 {
            let dir = directory();
            let before = files(dir.path());
            let said = flip_bits(dir.path(), &mut Random::new(seed)).unwrap();
            assert!(!said.is_empty());
            let after = files(dir.path());
            let bits: u32 = before
                .iter()
                .zip(&after)
                .flat_map(|((_, a), (_, b))| a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()))
                .sum();
            assert!((1..=3).contains(&bits) && bits as usize <= 3, "{seed}: {said:?}");
        }
    }

    #[test]
    fn an_old_copy_is_of_a_file_that_has_changed() {
        let dir = directory();
        let copy = OldCopy::of(dir.path()).unwrap();
        assert_eq!(copy.put_back(&mut Random::new(1)).unwrap(), None);
        // Octets of one were erased since, and another one has records more.
        let (erased, grown) = (dir.path().join("segment-000001"), dir.path().join("segment-000002"));
        let (whole, old) = (std::fs::read(&erased).unwrap(), std::fs::read(&grown).unwrap());
        std::fs::write(&erased, [&whole[..1000], &[0; 500], &whole[1500..]].concat()).unwrap();
        std::fs::write(&grown, [&old[..], MAGIC, &[1; 3000]].concat()).unwrap();
        assert!(copy.is_old());
        let said = copy.put_back(&mut Random::new(1)).unwrap();
        assert_eq!(said.unwrap(), "segment-000002 is an old copy");
        assert!(!copy.is_old(), "what was erased is all that is other now");
        assert_eq!(copy.put_back(&mut Random::new(1)).unwrap(), None);
        assert_eq!(std::fs::read(&grown).unwrap(), old);
    }
}
