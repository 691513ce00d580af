//! Pure. May we say 250: which nodes hold an entry, and do they share power or network.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};
use holdfast_storage::LogIndex;

/// Where a node stands.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Encode, Decode)]
pub struct Placement {
    /// Label of the datacenter.
    pub datacenter: String,
    /// Label of the power feed.
    pub power: String,
    /// Label of the network.
    pub network: String,
}

/// A member of the cluster, as the Raft membership carries it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub struct Member {
    /// Where its peers reach it, `HOST:PORT`.
    pub address: String,
    /// Where operators reach it, `HOST:PORT`.
    pub admin: String,
    /// Where it stands.
    pub placement: Placement,
}

/// How many different labels of each kind a message must be durable under before its 250.
pub const LABELS_MIN: usize = 2;

/// Whether these nodes stand on at least two power labels and two network labels (P2).
pub fn is_placed<'a>(nodes: impl IntoIterator<Item = &'a Placement>) -> bool {
    let (mut powers, mut networks) = (BTreeSet::new(), BTreeSet::new());
    for placement in nodes {
        powers.insert(&placement.power);
        networks.insert(&placement.network);
    }
    powers.len() >= LABELS_MIN && networks.len() >= LABELS_MIN
}

/// How far the log is placed: the highest index that is committed and durable on nodes that satisfy [`is_placed`], and
/// those nodes. `durable` tells for each node the last index it has synced.
pub fn frontier(
    durable: &BTreeMap<u64, LogIndex>,
    members: &BTreeMap<u64, Member>,
    committed: LogIndex,
) -> Option<(LogIndex, Vec<u64>)> {
    let mut candidates: Vec<LogIndex> = durable.values().map(|i| (*i).min(committed)).collect();
    candidates.sort_unstable();
    candidates.dedup();
    candidates.into_iter().rev().find_map(|index| {
        let nodes: Vec<u64> = durable
            .iter()
            .filter(|(id, i)| **i >= index && members.contains_key(id))
            .map(|(id, _)| *id)
            .collect();
        is_placed(nodes.iter().map(|id| &members[id].placement)).then_some((index, nodes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `id power network durable` per line of `testdata/placement.txt` and checks what is said of them.
    #[test]
    fn p2_placement_table() {
        for case in include_str!("../testdata/placement.txt").split("\n\n") {
            let (mut durable, mut members, mut committed, mut expected) =
                (BTreeMap::new(), BTreeMap::new(), 0, None);
            for line in case.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
                let words: Vec<&str> = line.split_whitespace().collect();
                match words[..] {
                    ["node", id, power, network, index] => {
                        let id: u64 = id.parse().unwrap();
                        let placement = Placement {
                            datacenter: "dc".into(),
                            power: power.into(),
                            network: network.into(),
                        };
                        members.insert(id, Member { placement, ..Member::default() });
                        durable.insert(id, LogIndex(index.parse().unwrap()));
                    }
                    ["committed", index] => committed = index.parse().unwrap(),
                    ["placed", "none"] => expected = Some(None),
                    ["placed", index, nodes] => {
                        let nodes = nodes.split('+').map(|n| n.parse().unwrap()).collect::<Vec<u64>>();
                        expected = Some(Some((LogIndex(index.parse().unwrap()), nodes)));
                    }
                    _ => panic!("{line}"),
                }
            }
            let Some(expected) = expected else { continue };
            assert_eq!(frontier(&durable, &members, LogIndex(committed)), expected, "{case}");
        }
    }
}
