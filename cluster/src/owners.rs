//! Whose the octets were that damage took from a log: names for people, from what is left of its directory.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage::disk::Disk;
use holdfast_storage::log::remains::{Remnant, remains};
use holdfast_storage::{Damage, Keyring};

use crate::machine::Machine;

/// Names in [`Damage::owners`] whatever the newest checkpoint says to need a body that is nowhere here, and whatever the machine can tell from octets
/// that are no record any more. Something that was settled since that checkpoint may be among them. Reads the directory twice.
pub fn name(damage: &mut Damage, disk: &dyn Disk, keys: &Keyring, machine: &dyn Machine) {
    let mut bodies = BTreeSet::new();
    let mut owners = BTreeSet::new();
    // By key: the newest checkpoint that has something to say of it, and what.
    let mut rows: BTreeMap<u128, (u64, Option<String>)> = BTreeMap::new();
    let looked = remains(disk, keys, &mut |remnant| match remnant {
        Remnant::Body(index) => drop(bodies.insert(index)),
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
