//! What a history means. Each checker is a function of the history that returns what offends against one promise; `src/docs/properties.md`
//! has the promises P1 to P10.

mod custody;
mod damage;
mod errors;
mod expiry;
mod limits;
mod lost;
mod octets;
mod quorum;
mod readable;
mod repeated;

pub use limits::RESIDENT_MAX;
pub use readable::ERASE_WITHIN;

use serde::{Deserialize, Serialize};

use crate::history::{Event, History, Sent, Taken, What};

/// The field that names a message.
pub const NAME: &str = "X-Test-Name: ";

/// Local parts that begin like this are refused by the customer for good.
pub const REFUSED: [&str; 2] = ["bounce", "no"];

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offence {
    /// Which promise, `P1` to `P10`.
    pub promise: String,
    /// The message, with its recipient where one is meant; or the node.
    pub whom: String,
    /// What happened to it.
    pub what: String,
    /// When, in milliseconds from the beginning.
    pub at: u64,
}

impl Offence {
    fn new(promise: &str, whom: impl Into<String>, at: u64, what: impl Into<String>) -> Offence {
        Offence { promise: promise.into(), whom: whom.into(), what: what.into(), at }
    }
}

/// A function that looks for one kind of offence.
pub type Checker = fn(&History) -> Vec<Offence>;

/// A checker for each promise.
pub const ALL: [(&str, &str, Checker); 10] = [
    ("P1", "nothing that was acknowledged is lost", lost::check),
    ("P2", "two nodes of two power and two network labels had it at the 250", custody::check),
    ("P3", "what was handed off is unreadable in time", readable::check),
    ("P4", "handed off once, and again only if something broke in between", repeated::check),
    ("P5", "clients of surviving nodes see delay, never an error", errors::check),
    ("P6", "no 250 while two nodes are away", quorum::check),
    ("P7", "the octets are those that were sent, and nothing refused is delivered", octets::check),
    ("P8", "no node ends by itself or outgrows its memory", limits::check),
    ("P9", "damage to one node mends itself", damage::check),
    ("P10", "one notice for each failure, and none for anything else", expiry::check),
];

/// All offences, in the order of the promises.
pub fn offences(history: &History) -> Vec<Offence> {
    ALL.iter().flat_map(|(_, _, check)| check(history)).collect()
}

/// The verdict on what was sent and what was taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged, and some recipient never got it (P1).
    pub lost: Vec<String>,
    /// Refused, or never sent, and yet delivered (P7).
    pub unexpected: Vec<String>,
    /// Taken more than once, with how often (P4).
    pub duplicated: Vec<(String, usize)>,
    /// Not the octets that were sent, behind one header (P7).
    pub altered: Vec<String>,
}

impl Verdict {
    /// Panics with the offending messages unless nothing is lost, unexpected or altered.
    pub fn assert_good(&self) {
        assert!(self.lost.is_empty(), "lost: {:?}", self.lost);
        assert!(self.unexpected.is_empty(), "delivered though refused: {:?}", self.unexpected);
        assert!(self.altered.is_empty(), "altered: {:?}", self.altered);
    }

    /// Copies beyond the first of each.
    pub fn extra_copies(&self) -> usize {
        self.duplicated.iter().map(|(_, times)| times - 1).sum()
    }
}

/// Judges what was sent and taken, once everything that was acknowledged should have been delivered.
pub fn judge(sent: &[Sent], taken: &[Taken]) -> Verdict {
    let sent = sent.iter().map(|sent| What::Sent { began: 0, dot: None, sent: sent.clone() });
    let taken = taken.iter().map(|taken| What::Taken(Taken { octets: Vec::new(), ..taken.clone() }));
    let events = sent.chain(taken).map(|what| Event { at: 0, what }).collect();
    let history = History { events };
    let whom = |offences: Vec<Offence>| offences.into_iter().map(|offence| offence.whom).collect();
    Verdict {
        lost: whom(lost::check(&history)),
        unexpected: whom(octets::unexpected(&history)),
        altered: whom(octets::altered(&history)),
        duplicated: repeated::times(&history)
            .into_iter()
            .filter(|(_, times)| times.len() > 1)
            .map(|((name, recipient), times)| (format!("{name}/{recipient}"), times.len()))
            .collect(),
    }
}

/// The name that octets carry.
pub fn name_of(octets: &[u8]) -> Option<String> {
    let at = octets.windows(NAME.len()).position(|w| w == NAME.as_bytes())? + NAME.len();
    let end = octets[at..].iter().position(|b| *b == b'\r')?;
    String::from_utf8(octets[at..at + end].to_vec()).ok()
}

/// Whether a customer refuses a recipient for good.
pub(crate) fn is_refused(recipient: &str) -> bool {
    REFUSED.iter().any(|word| recipient.starts_with(word))
}

#[cfg(test)]
pub(crate) mod forged {
    //! Histories that never happened.

    use super::*;
    use crate::history::{Fault, Outcome, digest};

    pub(crate) fn octets(name: &str) -> Vec<u8> {
        format!("{NAME}{name}\r\n\r\nbody\r\n").into_bytes()
    }

    /// For the recipients `r` and `s`, unless others are given.
    pub(crate) fn sent(name: &str, outcome: Outcome, recipients: &[&str]) -> What {
        let octets = octets(name);
        let recipients = recipients.iter().map(|r| r.to_string()).collect();
        let (id, bytes, digest) = (Some(format!("id-{name}")), octets.len(), digest(&octets));
        let sent = Sent { name: name.into(), recipients, node: 1, outcome, id, bytes, digest };
        What::Sent { began: 0, dot: Some(0), sent }
    }

    pub(crate) fn taken(name: &str, recipient: &str) -> What {
        let octets = [b"Received: from a\r\n\tby b\r\n".to_vec(), octets(name)].concat();
        What::Taken(Taken::new(recipient.into(), octets))
    }

    pub(crate) fn fault(number: u64, begins: bool, nodes: &[u64]) -> What {
        let (nemesis, what) = ("kill-leader".into(), "killed".into());
        What::Fault(Fault { number, nemesis, begins, nodes: nodes.into(), what })
    }

    pub(crate) fn history(events: impl IntoIterator<Item = (u64, What)>) -> History {
        History { events: events.into_iter().map(|(at, what)| Event { at, what }).collect() }
    }

    /// Of each offence promise and whom.
    pub(crate) fn told(offences: &[Offence]) -> Vec<(&str, &str)> {
        offences.iter().map(|o| (o.promise.as_str(), o.whom.as_str())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::forged::{history, sent, taken};
    use super::*;
    use crate::history::Outcome;

    /// The judge is judged on a forged history with one offence of each kind.
    #[test]
    fn a_forged_history_is_seen_through() {
        let messages = [
            ("good", Outcome::Ok),
            ("lost", Outcome::Ok),
            ("refused", Outcome::Fail(451)),
            ("twice", Outcome::Ok),
            ("altered", Outcome::Ok),
            ("unknown", Outcome::Unknown),
            ("unknown-and-taken", Outcome::Unknown),
        ];
        let all = |what: What| match what {
            What::Sent { sent, .. } => sent,
            _ => unreachable!("it was sent"),
        };
        let messages: Vec<Sent> =
            messages.into_iter().map(|(name, outcome)| all(sent(name, outcome, &["r"]))).collect();
        let copy = |name: &str| match taken(name, "r") {
            What::Taken(taken) => taken,
            _ => unreachable!("it was taken"),
        };
        let altered = Taken { digest: Some(1), ..copy("altered") };
        let copies = [
            copy("good"),
            copy("refused"),
            copy("twice"),
            copy("twice"),
            altered,
            copy("unknown-and-taken"),
            copy("never-sent"),
        ];
        let verdict = judge(&messages, &copies);
        assert_eq!(verdict.lost, ["lost/r"]);
        assert_eq!(verdict.unexpected, ["refused/r", "never-sent/r"]);
        assert_eq!(verdict.duplicated, [("twice/r".to_string(), 2)]);
        assert_eq!(verdict.altered, ["altered/r"]);
    }

    #[test]
    fn a_good_history_offends_nobody() {
        let custody = crate::history::Custody {
            id: "id-m".into(),
            nodes: vec![1, 2],
            power: vec!["A".into(), "B".into()],
            network: vec!["1".into(), "2".into()],
        };
        let good = history([
            (5, What::Custody(custody)),
            (6, sent("m", Outcome::Ok, &["r"])),
            (9, taken("m", "r")),
            (20, What::Healed { took: Some(3) }),
            (30, What::Searched { node: 1, found: vec![] }),
        ]);
        assert_eq!(offences(&good), []);
    }
}
