//! P1: whoever read 250 finds the message with each recipient, or its sender was told of the failure, or it still waits.

use std::collections::BTreeSet;

use super::{Offence, is_refused};
use crate::history::{History, Outcome, What};

pub(super) fn check(history: &History) -> Vec<Offence> {
    let taken: BTreeSet<(&str, &str)> = history
        .taken()
        .filter_map(|(_, taken)| Some((taken.name.as_deref()?, taken.recipient.as_str())))
        .collect();
    let told: BTreeSet<(&str, &str)> = history
        .notices()
        .flat_map(|(_, notice)| notice.recipients.iter().map(|r| (notice.name.as_str(), r.as_str())))
        .collect();
    let left: BTreeSet<&str> = history
        .events
        .iter()
        .filter_map(|event| match &event.what {
            What::Left { names } => Some(names.iter().map(String::as_str)),
            _ => None,
        })
        .flatten()
        .collect();
    let mut offences = Vec::new();
    for (at, sent) in history.sent().filter(|(_, sent)| sent.outcome == Outcome::Ok) {
        for recipient in &sent.recipients {
            let copy = (sent.name.as_str(), recipient.as_str());
            if taken.contains(&copy) || told.contains(&copy) || left.contains(sent.name.as_str()) {
                continue;
            }
            let what = match is_refused(recipient) {
                true => format!("acknowledged by node {}, refused, and its sender was never told", sent.node),
                false => format!("acknowledged by node {}, and gone", sent.node),
            };
            offences.push(Offence::new("P1", format!("{}/{recipient}", sent.name), at, what));
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, sent, taken, told};
    use crate::history::Notice;

    #[test]
    fn what_was_acknowledged_is_somewhere() {
        let notice = Notice { name: "told".into(), id: "n".into(), recipients: vec!["bounce".into()] };
        let forged = history([
            (1, sent("half", Outcome::Ok, &["r", "s"])),
            (2, sent("told", Outcome::Ok, &["bounce"])),
            (3, sent("untold", Outcome::Ok, &["bounce"])),
            (4, sent("waits", Outcome::Ok, &["r"])),
            (5, sent("refused", Outcome::Fail(452), &["r"])),
            (6, sent("unknown", Outcome::Unknown, &["r"])),
            (7, taken("half", "r")),
            (8, What::Notice(notice)),
            (9, What::Left { names: vec!["waits".into()] }),
        ]);
        let found = check(&forged);
        assert_eq!(told(&found), [("P1", "half/s"), ("P1", "untold/bounce")]);
        assert!(found[0].what.contains("node 1") && found[0].at == 1);
    }
}
