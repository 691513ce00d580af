//! P8: nothing that clients or destinations send ends a node or makes it outgrow its memory.

use std::collections::BTreeMap;

use super::Offence;
use crate::history::{History, What};

/// What a node's process may take under these workloads, in octets: their messages are 10 MB at the most, and some dozens are on their
/// way at a time.
pub const RESIDENT_MAX: u64 = 768 << 20;

pub(super) fn check(history: &History) -> Vec<Offence> {
    let mut offences = Vec::new();
    let mut largest: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for event in &history.events {
        match &event.what {
            What::Ended { node, status } => {
                let status = status.map_or("a signal".to_string(), |s| format!("status {s}"));
                let what = format!("ended by itself, or badly, with {status}");
                offences.push(Offence::new("P8", format!("node {node}"), event.at, what));
            }
            What::Panicked { node, what } => {
                offences.push(Offence::new("P8", format!("node {node}"), event.at, what));
            }
            What::Sample(sample) => {
                for (node, octets) in sample.resident.iter().chain(&sample.peak) {
                    let seen = largest.entry(*node).or_default();
                    *seen = (*seen).max((*octets, event.at));
                }
            }
            _ => {}
        }
    }
    for (node, (resident, at)) in largest {
        if resident > RESIDENT_MAX {
            let what =
                format!("took {} MiB of memory, and {} are the bound", resident >> 20, RESIDENT_MAX >> 20);
            offences.push(Offence::new("P8", format!("node {node}"), at, what));
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, told};
    use crate::history::Sample;

    #[test]
    fn nodes_stay_alive_and_small() {
        let sample =
            |node, resident| What::Sample(Sample { resident: vec![(node, resident)], ..Sample::default() });
        let forged = history([
            (1, sample(1, RESIDENT_MAX)),
            (2, sample(2, RESIDENT_MAX + 1)),
            (3, sample(2, 5)),
            (4, What::Ended { node: 3, status: Some(4) }),
            (5, What::Panicked { node: 1, what: "thread 'x' panicked at".into() }),
            (6, What::Sample(Sample { peak: vec![(3, RESIDENT_MAX + 1)], ..Sample::default() })),
        ]);
        let found = check(&forged);
        let nodes = [("P8", "node 3"), ("P8", "node 1"), ("P8", "node 2"), ("P8", "node 3")];
        assert_eq!(told(&found), nodes);
        assert_eq!((found[2].at, found[3].at), (2, 6));
    }
}
