//! P7: what arrives is what was sent, behind one header; what was refused, or never sent, does not arrive.

use std::collections::BTreeMap;

use super::Offence;
use crate::history::{History, Outcome, Sent, Taken};

pub(super) fn check(history: &History) -> Vec<Offence> {
    [unexpected(history), altered(history)].concat()
}

fn known(history: &History) -> BTreeMap<&str, &Sent> {
    history.sent().map(|(_, sent)| (sent.name.as_str(), sent)).collect()
}

fn label(taken: &Taken) -> String {
    format!("{}/{}", taken.name.as_deref().unwrap_or_default(), taken.recipient)
}

/// Copies that nobody may have.
pub(super) fn unexpected(history: &History) -> Vec<Offence> {
    let known = known(history);
    let mut offences = Vec::new();
    for (at, taken) in history.taken() {
        let what = match taken.name.as_deref().and_then(|name| known.get(name)) {
            None => "delivered, and nobody had sent it".to_string(),
            Some(sent) if !sent.recipients.contains(&taken.recipient) => {
                "delivered to somebody for whom it was not".to_string()
            }
            Some(Sent { outcome: Outcome::Fail(code), .. }) => {
                format!("refused with {code}, and delivered")
            }
            Some(_) => continue,
        };
        offences.push(Offence::new("P7", label(taken), at, what));
    }
    offences
}

/// Copies with other octets than those that were sent.
pub(super) fn altered(history: &History) -> Vec<Offence> {
    let known = known(history);
    let mut offences = Vec::new();
    for (at, taken) in history.taken() {
        let Some(sent) = taken.name.as_deref().and_then(|name| known.get(name)) else { continue };
        if taken.digest != Some(sent.digest) {
            let what = match taken.digest {
                None => "not behind one header",
                Some(_) => "not the octets that were sent",
            };
            offences.push(Offence::new("P7", label(taken), at, what));
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged::{history, sent, taken, told};
    use crate::history::What;

    #[test]
    fn strange_copies_are_named() {
        let headless = Taken::new("r".into(), crate::checkers::forged::octets("headless"));
        let forged = history([
            (1, sent("good", Outcome::Ok, &["r"])),
            (2, sent("refused-late", Outcome::Fail(451), &["r"])),
            (3, sent("headless", Outcome::Unknown, &["r"])),
            (4, taken("good", "r")),
            (5, taken("good", "somebody")),
            (6, taken("refused-late", "r")),
            (7, taken("never-sent", "r")),
            (8, What::Taken(headless)),
        ]);
        let expected =
            [("P7", "good/somebody"), ("P7", "refused-late/r"), ("P7", "never-sent/r"), ("P7", "headless/r")];
        assert_eq!(told(&check(&forged)), expected);
    }
}
