//! P6: no 250 while two of three nodes can do nothing for the third.

use super::Offence;
use crate::history::{History, Outcome, What};

pub(super) fn check(history: &History) -> Vec<Offence> {
    // From when on how many were away.
    let mut spans: Vec<(u64, &[u64])> = vec![(0, &[])];
    for event in &history.events {
        if let What::Away { nodes } = &event.what {
            spans.push((event.at, nodes));
        }
    }
    let mut offences = Vec::new();
    for event in &history.events {
        let What::Sent { dot: Some(dot), sent, .. } = &event.what else { continue };
        // The same nodes from before the final dot until after the reply.
        let last = spans.partition_point(|(from, _)| *from < *dot).saturating_sub(1);
        let until = spans.get(last + 1).map_or(u64::MAX, |(from, _)| *from);
        let away = spans[last].1;
        if sent.outcome == Outcome::Ok && away.len() >= 2 && event.at < until {
            let what = format!("acknowledged by node {} while nodes {away:?} were away", sent.node);
            offences.push(Offence::new("P6", &sent.name, event.at, what));
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, sent, told};

    #[test]
    fn one_node_alone_acknowledges_nothing() {
        let with_dot = |name: &str, outcome, at| match sent(name, outcome, &["r"]) {
            What::Sent { sent, .. } => What::Sent { began: at, dot: Some(at), sent },
            what => what,
        };
        let forged = history([
            (1_000, What::Away { nodes: vec![2] }),
            (2_000, with_dot("one is away", Outcome::Ok, 1_900)),
            (3_000, What::Away { nodes: vec![2, 3] }),
            (3_100, with_dot("the dot came before", Outcome::Ok, 2_950)),
            (3_200, with_dot("a lie", Outcome::Ok, 3_100)),
            (3_300, with_dot("refused", Outcome::Fail(451), 3_100)),
            (4_000, What::Away { nodes: vec![2] }),
            (4_100, with_dot("one is back", Outcome::Ok, 3_900)),
            (5_000, What::Away { nodes: vec![] }),
        ]);
        assert_eq!(told(&check(&forged)), [("P6", "a lie")]);
    }
}
