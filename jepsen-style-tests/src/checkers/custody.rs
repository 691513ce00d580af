//! P2: when the sender read 250, nodes on two power feeds and two networks had the message on stable storage. A node says so in its
//! mail log before it answers.

use std::collections::{BTreeMap, BTreeSet};

use super::Offence;
use crate::history::{Custody, History, Outcome, What};

/// What a placement needs of each: nodes, labels of power, labels of network.
const PLACEMENTS: usize = 2;

pub(super) fn check(history: &History) -> Vec<Offence> {
    let told: BTreeMap<&str, &Custody> = history
        .events
        .iter()
        .filter_map(|event| match &event.what {
            What::Custody(custody) => Some((custody.id.as_str(), custody)),
            _ => None,
        })
        .collect();
    let mut offences = Vec::new();
    for (at, sent) in history.sent().filter(|(_, sent)| sent.outcome == Outcome::Ok) {
        let Some(id) = &sent.id else {
            offences.push(Offence::new("P2", &sent.name, at, "acknowledged without an id"));
            continue;
        };
        let what = match told.get(id.as_str()) {
            None => "acknowledged, and no node's log says who holds it".to_string(),
            Some(custody) if is_enough(custody) => continue,
            Some(custody) => format!(
                "acknowledged with nodes {:?}, power {:?}, network {:?}",
                custody.nodes, custody.power, custody.network
            ),
        };
        offences.push(Offence::new("P2", &sent.name, at, what));
    }
    offences
}

fn is_enough(custody: &Custody) -> bool {
    fn different<T: Ord>(all: &[T]) -> usize {
        all.iter().collect::<BTreeSet<_>>().len()
    }
    let Custody { nodes, power, network, .. } = custody;
    different(nodes) >= PLACEMENTS && different(power) >= PLACEMENTS && different(network) >= PLACEMENTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, sent, told};
    use crate::history::Sent;

    #[test]
    fn two_nodes_of_two_feeds_have_it() {
        let custody = |name: &str, nodes: &[u64], power: &[&str], network: &[&str]| {
            let words = |all: &[&str]| all.iter().map(|w| w.to_string()).collect();
            let id = format!("id-{name}");
            What::Custody(Custody { id, nodes: nodes.into(), power: words(power), network: words(network) })
        };
        let without_id = |what| match what {
            What::Sent { began, dot, sent } => What::Sent { began, dot, sent: Sent { id: None, ..sent } },
            what => what,
        };
        let names = ["good", "one-node", "one-feed", "one-network", "silent"];
        let forged = history(
            [
                (1, custody("good", &[1, 3], &["A", "C"], &["1", "3"])),
                (2, custody("one-node", &[1], &["A"], &["1"])),
                (3, custody("one-feed", &[1, 2], &["A", "A"], &["1", "2"])),
                (4, custody("one-network", &[1, 2], &["A", "B"], &["1", "1"])),
            ]
            .into_iter()
            .chain(names.map(|name| (9, sent(name, Outcome::Ok, &["r"]))))
            .chain([(10, sent("refused", Outcome::Fail(451), &["r"]))])
            .chain([(11, without_id(sent("nameless", Outcome::Ok, &["r"])))]),
        );
        let expected = ["one-node", "one-feed", "one-network", "silent", "nameless"].map(|whom| ("P2", whom));
        assert_eq!(told(&check(&forged)), expected);
    }
}
