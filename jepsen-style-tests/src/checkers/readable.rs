//! P3: a message that died is unreadable within the erasure time on each node that lives, and on one that returns before it serves.

use std::collections::BTreeSet;

use super::Offence;
use crate::history::{History, Outcome, What};

/// The erasure time with which nodes are tested, in milliseconds.
pub const ERASE_WITHIN: u64 = 3_000;

/// How much later than that a node may say so: the clocks are the nodes' own, and a sync may take its time.
const SLACK: u64 = 1_000;

/// Messages that are longer than this come in pieces, which wait ten minutes for the rest if their node dies in between.
const PIECE: usize = 256 << 10;

pub(super) fn check(history: &History) -> Vec<Offence> {
    let windows = history.windows();
    let taken: BTreeSet<&str> = history.taken().filter_map(|(_, taken)| taken.name.as_deref()).collect();
    // Pieces of a large message that was broken off wait for the rest of it.
    let pieces: BTreeSet<&str> = history
        .sent()
        .filter(|(_, sent)| sent.outcome != Outcome::Ok && sent.bytes > PIECE)
        .map(|(_, sent)| sent.name.as_str())
        .filter(|name| !taken.contains(name))
        .collect();
    let mut offences = Vec::new();
    for event in &history.events {
        match &event.what {
            What::Searched { node, found } => {
                let found = found.iter().filter(|name| !pieces.contains(name.as_str()));
                offences.extend(found.map(|name| {
                    let what =
                        format!("can be read in the files of node {node}, long after the last hand-off");
                    Offence::new("P3", name, event.at, what)
                }));
            }
            What::Erased { id, node, lag } if *lag > ERASE_WITHIN + SLACK => {
                // A node that was away or hindered is late by that much, and one that returned by the time that it takes to begin.
                let since = event.at.saturating_sub(lag + ERASE_WITHIN);
                let own = windows.iter().filter(|w| w.fault.nodes.contains(node));
                if !own.into_iter().any(|w| w.overlaps(since, event.at)) {
                    let what = format!("overwritten on node {node} {lag} ms after it died");
                    offences.push(Offence::new("P3", id, event.at, what));
                }
            }
            _ => {}
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{fault, history, sent, taken, told};
    use crate::history::Sent;

    #[test]
    fn what_died_is_unreadable_in_time() {
        let erased = |id: &str, lag| What::Erased { id: id.into(), node: 2, lag };
        let broken_off = |name: &str, bytes| match sent(name, Outcome::Unknown, &["r"]) {
            What::Sent { began, dot, sent } => What::Sent { began, dot, sent: Sent { bytes, ..sent } },
            what => what,
        };
        let forged = history([
            (10_000, erased("in-time", 2_900)),
            (11_000, erased("late", 9_000)),
            (50_000, fault(1, true, &[2])),
            (60_000, fault(1, false, &[2])),
            (62_000, erased("late-and-excused", 9_000)),
            (70_000, broken_off("pieces", PIECE + 1)),
            (70_001, broken_off("short", 900)),
            (70_002, broken_off("handed-off", PIECE + 1)),
            (71_000, taken("handed-off", "r")),
            (
                90_000,
                What::Searched {
                    node: 3,
                    found: ["m", "pieces", "short", "handed-off"].map(String::from).into(),
                },
            ),
        ]);
        assert_eq!(
            told(&check(&forged)),
            [("P3", "late"), ("P3", "m"), ("P3", "short"), ("P3", "handed-off")]
        );
    }
}
