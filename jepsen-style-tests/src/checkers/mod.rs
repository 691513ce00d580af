//! What a history means. Each checker is a function of the history and returns the offending messages.

use std::collections::BTreeMap;

use crate::history::{Outcome, Sent, Taken};

/// The field that names a message.
pub const NAME: &str = "X-Test-Name: ";

/// The verdict on a history.
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

/// The name that octets carry.
pub fn name_of(octets: &[u8]) -> Option<String> {
    let at = octets.windows(NAME.len()).position(|w| w == NAME.as_bytes())? + NAME.len();
    let end = octets[at..].iter().position(|b| *b == b'\r')?;
    String::from_utf8(octets[at..at + end].to_vec()).ok()
}

/// Judges a history in which everything that was acknowledged should have been delivered by now.
pub fn judge(sent: &[Sent], taken: &[Taken]) -> Verdict {
    let mut verdict = Verdict::default();
    let known: BTreeMap<&str, &Sent> = sent.iter().map(|s| (s.name.as_str(), s)).collect();
    let mut times: BTreeMap<(String, String), usize> = BTreeMap::new();
    for copy in taken {
        let name = name_of(&copy.octets).unwrap_or_default();
        let label = format!("{name}/{}", copy.recipient);
        match known.get(name.as_str()) {
            None => verdict.unexpected.push(label.clone()),
            Some(s) => {
                if matches!(s.outcome, Outcome::Fail(_)) || !s.recipients.contains(&copy.recipient) {
                    verdict.unexpected.push(label.clone());
                }
                if !is_behind_one_header(&copy.octets, &s.octets) {
                    verdict.altered.push(label.clone());
                }
            }
        }
        *times.entry((name, copy.recipient.clone())).or_default() += 1;
    }
    for s in sent.iter().filter(|s| s.outcome == Outcome::Ok) {
        for recipient in &s.recipients {
            if !times.contains_key(&(s.name.clone(), recipient.clone())) {
                verdict.lost.push(format!("{}/{recipient} (node {})", s.name, s.node));
            }
        }
    }
    verdict.duplicated = times
        .into_iter()
        .filter(|(_, times)| *times > 1)
        .map(|((name, recipient), times)| (format!("{name}/{recipient}"), times))
        .collect();
    verdict
}

/// P7: the octets received, behind one added Received header.
pub fn is_behind_one_header(got: &[u8], sent: &[u8]) -> bool {
    let Some(header) = got.strip_suffix(sent) else { return false };
    let Ok(header) = std::str::from_utf8(header) else { return false };
    let mut lines = header.split("\r\n");
    let first = lines.next().is_some_and(|l| l.starts_with("Received: from "));
    let rest: Vec<&str> = lines.collect();
    let Some((last, folded)) = rest.split_last() else { return false };
    first && last.is_empty() && folded.iter().all(|l| l.starts_with('\t'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(name: &str, outcome: Outcome) -> Sent {
        let octets = format!("{NAME}{name}\r\n\r\nbody\r\n").into_bytes();
        let at = std::time::Instant::now();
        Sent { name: name.into(), recipients: vec!["r".into()], node: 1, outcome, octets, at }
    }

    fn taken(name: &str) -> Taken {
        let octets = format!("Received: from a\r\n\tby b\r\n{NAME}{name}\r\n\r\nbody\r\n").into_bytes();
        Taken { recipient: "r".into(), octets }
    }

    /// The judge is judged on a forged history with one offence of each kind.
    #[test]
    fn a_forged_history_is_seen_through() {
        let mut altered = taken("altered");
        altered.octets.extend_from_slice(b"more");
        let history = [
            sent("good", Outcome::Ok),
            sent("lost", Outcome::Ok),
            sent("refused", Outcome::Fail(451)),
            sent("twice", Outcome::Ok),
            sent("altered", Outcome::Ok),
            sent("unknown", Outcome::Unknown),
            sent("unknown-and-taken", Outcome::Unknown),
        ];
        let copies = [
            taken("good"),
            taken("refused"),
            taken("twice"),
            taken("twice"),
            altered,
            taken("unknown-and-taken"),
            taken("never-sent"),
        ];
        let verdict = judge(&history, &copies);
        assert_eq!(verdict.lost, ["lost/r (node 1)"]);
        assert_eq!(verdict.unexpected, ["refused/r", "never-sent/r"]);
        assert_eq!(verdict.duplicated, [("twice/r".to_string(), 2)]);
        assert_eq!(verdict.altered, ["altered/r"]);
    }
}
