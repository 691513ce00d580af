//! P10: a sender is told of a recipient who cannot be reached, in one notice, and of no other: no message lives as long as its lifetime here.

use std::collections::{BTreeMap, BTreeSet};

use super::{Offence, is_refused};
use crate::history::{History, Outcome};

pub(super) fn check(history: &History) -> Vec<Offence> {
    let mut offences = Vec::new();
    let refused: BTreeSet<&str> = history
        .sent()
        .filter(|(_, sent)| matches!(sent.outcome, Outcome::Fail(_)))
        .map(|(_, sent)| sent.name.as_str())
        .collect();
    let mut ids: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for (at, notice) in history.notices() {
        for recipient in &notice.recipients {
            let whom = || format!("{}/{recipient}", notice.name);
            if refused.contains(notice.name.as_str()) {
                let what = "a notice about mail that its sender was told is not taken";
                offences.push(Offence::new("P10", whom(), at, what));
            }
            if !is_refused(recipient) {
                let what = "given up, though nobody refused it and its time had not come";
                offences.push(Offence::new("P10", whom(), at, what));
            }
            let ids = ids.entry((&notice.name, recipient)).or_default();
            if ids.insert(&notice.id) && ids.len() > 1 {
                offences.push(Offence::new(
                    "P10",
                    whom(),
                    at,
                    "its sender was told again, in another notice",
                ));
            }
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, sent, told};
    use crate::history::{Notice, What};

    #[test]
    fn one_notice_for_each_failure() {
        let notice = |name: &str, id: &str, recipient: &str| {
            What::Notice(Notice { name: name.into(), id: id.into(), recipients: vec![recipient.into()] })
        };
        let forged = history([
            (1, notice("m", "a", "bounce1")),
            // A second copy of the same is P4's.
            (2, notice("m", "a", "bounce1")),
            (3, notice("m", "b", "bounce1")),
            (4, notice("n", "c", "r")),
            (5, sent("o", Outcome::Fail(451), &["bounce2"])),
            (6, notice("o", "d", "bounce2")),
        ]);
        assert_eq!(told(&check(&forged)), [("P10", "m/bounce1"), ("P10", "n/r"), ("P10", "o/bounce2")]);
    }
}
