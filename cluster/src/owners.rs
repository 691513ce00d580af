//! Whose the octets were that damage took from a log: names for people, from what is left of its directory.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage::disk::Disk;
use holdfast_storage::log::remains::{Remnant, remains};
use holdfast_storage::{Damage, Keyring, LogIndex};

use crate::machine::Machine;

/// Names in [`Damage::owners`] whatever the newest checkpoint says to need a body that is nowhere here, and whatever the machine can tell from octets
/// that are no record any more. Something that was settled since that checkpoint may be among them, and what has an
/// older, overwritten copy left is not. Reads the directory twice.
pub fn name(damage: &mut Damage, disk: &dyn Disk, keys: &Keyring, machine: &dyn Machine) {
    let mut bodies = BTreeSet::new();
    let mut owners = BTreeSet::new();
    // By key: the newest checkpoint that has something to say of it, and what.
    let mut rows: BTreeMap<u128, (u64, Option<String>)> = BTreeMap::new();
    let looked = remains(disk, keys, &mut |remnant| match remnant {
        Remnant::Body(index) => drop(bodies.insert(index)),
        Remnant::Void(upto) => drop(bodies.split_off(&LogIndex(upto.0 + 1))),
        Remnant::Hole(octets) => owners.extend(machine.owners_in(octets)),
        Remnant::Row { .. } | Remnant::Gone { .. } => {}
    });
    let looked = looked.and_then(|()| {
        remains(disk, keys, &mut |remnant| {
            let (key, checkpoint, owner) = match remnant {
                Remnant::Gone { checkpoint: 0, key } => (key, u64::MAX, None),
                Remnant::Gone { checkpoint, key } => (key, checkpoint, None),
                Remnant::Row { checkpoint, key, row } => {
                    let needs = machine.row_owner(&row);
                    let lacking = needs.filter(|(needed, _)| needed.iter().any(|b| !bodies.contains(b)));
                    (key, checkpoint, lacking.map(|(_, owner)| owner))
                }
                Remnant::Void(_) => return rows.clear(),
                Remnant::Body(_) | Remnant::Hole(_) => return,
            };
            if rows.get(&key).is_none_or(|(newest, _)| *newest <= checkpoint) {
                rows.insert(key, (checkpoint, owner));
            }
        })
    });
    if let Err(error) = looked {
        tracing::warn!(%error, "whose the damaged octets were cannot be told");
    }
    owners.extend(rows.into_values().filter_map(|(_, owner)| owner));
    damage.owners = owners.into_iter().collect();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use holdfast_storage::disk::sim::SimDisk;
    use holdfast_storage::{Bytes, Checkpoint, Completion, Entry, OpenError};

    use super::*;
    use crate::contract::{Counter, at, open};

    fn wait(done: impl FnOnce(Completion)) {
        let (tell, told) = channel();
        done(Box::new(move |result| drop(tell.send(result))));
        told.recv().unwrap().unwrap();
    }

    /// P9: of five messages one came after the checkpoint, of which octets alone tell; of one the checkpoint alone does. One that is whole is
    /// not named, nor is one that is gone, nor one whose body was erased on purpose.
    #[test]
    fn p9_what_is_left_names_whose_the_lost_octets_were() {
        let disk = SimDisk::new(7);
        let (log, _) = open(&disk).unwrap();
        let append = |index: u64, times: usize| {
            let body = Bytes::from(format!("body-{index} ").repeat(times));
            wait(|done| {
                log.append(vec![Entry { at: at(index), head: Bytes::from_static(b"h"), body }], done)
            });
        };
        (0..5).for_each(|index| append(index, 900));
        let row = |index: u64| (index as u128, index.to_le_bytes().to_vec());
        let made =
            Checkpoint { applied: at(4), rows: (0..5).map(row).collect(), gone: vec![], tables: vec![] };
        wait(|done| log.checkpoint(made, done));
        log.erase(LogIndex(3));
        let made = Checkpoint { applied: at(4), rows: vec![], gone: vec![4], tables: vec![] };
        wait(|done| log.checkpoint(made, done));
        (5..7).for_each(|index| append(index, 900));
        while log.erase_backlog() > 0 {
            std::thread::yield_now();
        }
        drop(log);
        let name = "segment-000000";
        let place = |needle: &str| {
            let octets = disk.contents(name);
            octets.windows(needle.len()).position(|w| w == needle.as_bytes()).unwrap() as u64
        };
        // Header and body of 1 and 4, the header alone of 5.
        for (needle, octets) in [("body-1 ", 7000), ("body-4 ", 7000), ("body-5 ", 30)] {
            let from = place(needle) - 40;
            (0..octets).for_each(|octet| disk.flip(name, from + octet, 1));
        }
        let Err(OpenError::Lost(mut damage)) = open(&disk) else { panic!("damage is not noticed") };
        super::name(&mut damage, &disk, &Keyring::default(), &Counter::default());
        assert_eq!(damage.owners, ["body-5", "row 1"], "{damage}");
        assert!(damage.to_string().ends_with("it may have taken body-5, row 1"), "{damage}");
    }
}
