//! P5: while one node is in trouble, the clients of the others see delay, never an error; and whatever is broken, nobody refuses for good what
//! may be taken later: senders give that up.

use super::Offence;
use crate::history::{History, Outcome, What};

/// How long after its mending a node may still be in trouble, in milliseconds: it starts, catches up, opens its doors.
const RETURN: u64 = 10_000;

pub(super) fn check(history: &History) -> Vec<Offence> {
    let windows = history.windows();
    let mut offences = Vec::new();
    for event in &history.events {
        let What::Sent { began, sent, .. } = &event.what else { continue };
        let how = match sent.outcome {
            Outcome::Ok => continue,
            Outcome::Fail(0) => "cut off before its final dot".to_string(),
            Outcome::Fail(code @ 500..) => {
                let what = format!("refused for good with {code} by node {}", sent.node);
                offences.push(Offence::new("P5", &sent.name, event.at, what));
                continue;
            }
            Outcome::Fail(code) => format!("refused with {code}"),
            Outcome::Unknown => "left without a reply".to_string(),
        };
        let own = windows.iter().filter(|w| w.fault.nodes.contains(&sent.node));
        let is_its_own = own.into_iter().any(|w| w.overlaps(began.saturating_sub(RETURN), event.at));
        let now = windows.iter().filter(|w| w.overlaps(*began, event.at));
        let mut troubled: Vec<u64> = now.flat_map(|w| &w.fault.nodes).copied().collect();
        troubled.sort_unstable();
        troubled.dedup();
        // Where more than one node is in trouble no promise is made.
        if troubled.len() <= 1 && !is_its_own {
            let what = match troubled.first() {
                Some(other) => format!("{how} by node {}, and only node {other} was in trouble", sent.node),
                None => format!("{how} by node {}, and nothing was broken", sent.node),
            };
            offences.push(Offence::new("P5", &sent.name, event.at, what));
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{fault, history, sent, told};

    #[test]
    fn a_leaders_death_is_a_delay() {
        let other = |name: &str, outcome| match sent(name, outcome, &["r"]) {
            What::Sent { sent, .. } => {
                let began = 20_100;
                What::Sent { began, dot: None, sent: crate::history::Sent { node: 2, ..sent } }
            }
            what => what,
        };
        let at_the_victim = |name: &str| match sent(name, Outcome::Unknown, &["r"]) {
            What::Sent { sent, .. } => What::Sent { began: 20_100, dot: None, sent },
            what => what,
        };
        let early = |name: &str| sent(name, Outcome::Fail(451), &["r"]);
        let one = history([
            (100, early("calm")),
            (20_000, fault(1, true, &[1])),
            (20_200, at_the_victim("the victims")),
            (20_300, other("the survivors", Outcome::Fail(451))),
            (20_400, other("delayed", Outcome::Ok)),
            (21_000, fault(1, false, &[1])),
        ]);
        assert_eq!(told(&check(&one)), [("P5", "calm"), ("P5", "the survivors")]);
        // One after the other is not two at a time.
        let in_turn = history([
            (10_000, fault(1, true, &[1])),
            (14_000, fault(1, false, &[1])),
            (19_000, fault(2, true, &[3])),
            (20_300, other("in turn", Outcome::Fail(451))),
        ]);
        assert_eq!(told(&check(&in_turn)), [("P5", "in turn")]);
        let two = history([
            (20_000, fault(1, true, &[1, 3])),
            (20_300, other("no quorum", Outcome::Fail(451))),
            (20_400, other("given up", Outcome::Fail(550))),
        ]);
        assert_eq!(told(&check(&two)), [("P5", "given up")]);
    }
}
