//! P3: a message that died is unreadable within the erasure time on each node that lives, and on one that returns before it serves.

use super::Offence;
use crate::history::{History, What};

/// The erasure time with which nodes are tested, in milliseconds.
pub const ERASE_WITHIN: u64 = 3_000;

/// How much later than that a node may say so: the clocks are the nodes' own, and a sync may take its time.
const SLACK: u64 = 1_000;

pub(super) fn check(history: &History) -> Vec<Offence> {
    let windows = history.windows();
    let mut offences = Vec::new();
    for event in &history.events {
        match &event.what {
            What::Searched { node, found } => offences.extend(found.iter().map(|name| {
                let what = format!("can be read in the files of node {node}, long after the last hand-off");
                Offence::new("P3", name, event.at, what)
            })),
            What::Erased { id, node, lag } if *lag > ERASE_WITHIN + SLACK => {
                // A node that was away or hindered is late by that much, and one that returned by the time that it takes to begin.
                let since = event.at.saturating_sub(lag + ERASE_WITHIN);
                if !windows.iter().any(|w| w.overlaps(since, event.at)) {
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
    use crate::checkers::forged::{fault, history, told};

    #[test]
    fn what_died_is_unreadable_in_time() {
        let erased = |id: &str, lag| What::Erased { id: id.into(), node: 2, lag };
        let forged = history([
            (10_000, erased("in-time", 2_900)),
            (11_000, erased("late", 9_000)),
            (50_000, fault(1, true, &[2])),
            (60_000, fault(1, false, &[2])),
            (62_000, erased("late-and-excused", 9_000)),
            (90_000, What::Searched { node: 3, found: vec!["m".into()] }),
        ]);
        assert_eq!(told(&check(&forged)), [("P3", "late"), ("P3", "m")]);
    }
}
