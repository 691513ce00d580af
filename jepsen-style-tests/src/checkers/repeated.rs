//! P4: each copy is handed off once; once more at the most for each break in between.

use std::collections::BTreeMap;

use super::Offence;
use crate::history::History;

/// How long after a fault's end a hand-off may still be repeated for its sake, in milliseconds: a node that was paused finds out
/// what became of its connections.
const AFTERMATH: u64 = 5_000;

/// What takes no result of a hand-off away.
const HARMLESS: [&str; 3] = ["transfer", "customer-away", "fill-disk"];

/// When each copy was taken: by name and recipient.
pub(super) fn times(history: &History) -> BTreeMap<(String, String), Vec<u64>> {
    let mut times: BTreeMap<(String, String), Vec<u64>> = BTreeMap::new();
    for (at, taken) in history.taken() {
        let name = taken.name.clone().unwrap_or_default();
        times.entry((name, taken.recipient.clone())).or_default().push(at);
    }
    times
}

pub(super) fn check(history: &History) -> Vec<Offence> {
    let mut windows = history.windows();
    windows.retain(|w| !HARMLESS.contains(&w.fault.nemesis.as_str()));
    let mut offences = Vec::new();
    for ((name, recipient), times) in times(history) {
        let (first, last) = (times[0], times[times.len() - 1]);
        let breaks = windows.iter().filter(|w| w.overlaps(first.saturating_sub(AFTERMATH), last)).count();
        if breaks > 0 && times.len() > 1 + breaks {
            let what = format!("taken {} times, and {breaks} times something was broken", times.len());
            offences.push(Offence::new("P4", format!("{name}/{recipient}"), last, what));
        }
        for pair in times.windows(2) {
            let (first, again) = (pair[0], pair[1]);
            let between =
                windows.iter().filter(|w| w.overlaps(first.saturating_sub(AFTERMATH), again)).count();
            if between == 0 {
                let what = format!("taken again {} ms later, and nothing was broken", again - first);
                offences.push(Offence::new("P4", format!("{name}/{recipient}"), again, what));
            }
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{fault, history, taken, told};

    #[test]
    fn a_second_copy_needs_a_reason() {
        let forged = history([
            (1_000, taken("calm", "r")),
            (1_000, taken("calm", "s")),
            (1_900, taken("calm", "r")),
            (20_000, fault(1, true, &[1])),
            (20_500, taken("stormy", "r")),
            (21_000, fault(1, false, &[1])),
            (22_000, taken("stormy", "r")),
            (22_001, taken("stormy", "r")),
            (90_000, taken("later", "r")),
            (90_001, taken("later", "r")),
        ]);
        assert_eq!(told(&check(&forged)), [("P4", "calm/r"), ("P4", "later/r"), ("P4", "stormy/r")]);
    }
}
