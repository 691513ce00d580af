//! What is to be said of a run: whether a promise was broken, and if not, whether enough happened for that to mean something.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::checkers::{Offence, offences};
use crate::history::{History, Outcome, Sent, What, Window};
use crate::run::PROBE;

/// How long after its mending a fault still counts as happening, in milliseconds: its consequences come to light.
const AFTERMATH: u64 = 15_000;

/// The three answers, with the exit status of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// No promise was broken, and all that was to be seen was seen.
    Valid = 0,
    /// A promise was broken.
    Invalid = 1,
    /// No promise was broken, but something that was to be seen was not.
    Unknown = 3,
}

/// Something that has to have happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What.
    pub what: String,
    /// Whether it has.
    pub is_met: bool,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// In one word.
    pub answer: Answer,
    /// Promises that were broken.
    pub offences: Vec<Offence>,
    /// What had to happen.
    pub conditions: Vec<Condition>,
    /// Messages that were acknowledged.
    pub acknowledged: usize,
    /// Messages that were refused, or cut off before the final dot.
    pub refused: usize,
    /// Messages without a reply.
    pub unknown: usize,
    /// Copies that were taken.
    pub copies: usize,
    /// Copies beyond the first of each.
    pub repeated: usize,
    /// Notices.
    pub notices: usize,
    /// Faults.
    pub faults: usize,
    /// From each death of a leader to the next 250, in milliseconds, sorted.
    pub until_next_250: Vec<u64>,
}

/// Judges the history of a run in which these nemeses were asked for.
pub fn judge(history: &History, nemeses: &[String]) -> Judgement {
    let offences = offences(history);
    let conditions = conditions(history, nemeses);
    let count = |wanted: fn(&Outcome) -> bool| history.sent().filter(|(_, s)| wanted(&s.outcome)).count();
    let answer = match (offences.is_empty(), conditions.iter().all(|c| c.is_met)) {
        (false, _) => Answer::Invalid,
        (true, true) => Answer::Valid,
        (true, false) => Answer::Unknown,
    };
    let copies = history.taken().count();
    let mut different: Vec<_> = history.taken().map(|(_, t)| (&t.name, &t.recipient)).collect();
    different.sort_unstable();
    different.dedup();
    Judgement {
        answer,
        offences,
        conditions,
        acknowledged: count(|o| *o == Outcome::Ok),
        refused: count(|o| matches!(o, Outcome::Fail(_))),
        unknown: count(|o| *o == Outcome::Unknown),
        copies,
        repeated: copies - different.len(),
        notices: history.notices().count(),
        faults: history.windows().len(),
        until_next_250: until_next_250(history),
    }
}

/// From each time that the leader was killed to the next 250 of a message that was begun afterwards or was open.
fn until_next_250(history: &History) -> Vec<u64> {
    let oks: Vec<u64> = oks_of(history, "").collect();
    let kills = history.windows().into_iter().filter(|w| w.fault.nemesis == "kill-leader");
    let mut times: Vec<u64> = kills
        .filter_map(|w| oks.get(oks.partition_point(|at| *at <= w.from)).map(|at| at - w.from))
        .collect();
    times.sort_unstable();
    times
}

fn conditions(history: &History, nemeses: &[String]) -> Vec<Condition> {
    let mut conditions = Vec::new();
    let mut expect = |what: String, is_met| conditions.push(Condition { what, is_met });
    let oks: Vec<u64> = oks_of(history, "").collect();
    expect("messages were acknowledged".into(), !oks.is_empty());
    let left = history.events.iter().find_map(|event| match &event.what {
        What::Left { names } => Some(names.len()),
        _ => None,
    });
    expect("the queue was empty at the end".into(), left == Some(0));
    let searched = history.events.iter().filter(|event| matches!(event.what, What::Searched { .. })).count();
    expect("the files of all nodes were searched for what was erased".into(), searched == 3);
    let custody = history.events.iter().any(|event| matches!(event.what, What::Custody(_)));
    expect("the nodes' logs said who holds each message".into(), custody);
    let probed = |node: u64| oks_of(history, &format!("{PROBE}{node}")).next().is_some();
    expect("each node took mail when all was mended".into(), (1..=3).all(probed));
    let windows = history.windows();
    let mut names: BTreeSet<&str> = windows.iter().map(|w| w.fault.nemesis.as_str()).collect();
    names.extend(nemeses.iter().map(String::as_str));
    for name in names {
        let of_it: Vec<&Window> = windows.iter().filter(|w| w.fault.nemesis == name).collect();
        expect(format!("{name} was there"), !of_it.is_empty());
        let during = of_it.iter().any(|w| oks.iter().any(|at| (w.from..w.to + AFTERMATH).contains(at)));
        expect(format!("mail was acknowledged during or after {name}"), during);
        if ["kill-leader", "pause-leader", "isolate-leader", "transfer"].contains(&name) {
            let led = of_it.iter().any(|w| has_new_leader(history, w));
            expect(format!("somebody else led after {name}"), led);
        }
        let refused = |is_it: fn(u16) -> bool| of_it.iter().any(|w| was_refused(history, w, is_it));
        match name {
            "fill-disk" => expect("mail was refused for want of room".into(), refused(|code| code == 452)),
            "kill-two" | "pause-two" => {
                let refused = refused(|code| (400..500).contains(&code) && code != 452);
                expect(format!("mail was refused for want of a second node after {name}"), refused);
            }
            _ => {}
        }
    }
    conditions
}

/// Whether a sender read such a reply after a fault began and before the next one did.
fn was_refused(history: &History, window: &Window, is_it: fn(u16) -> bool) -> bool {
    let during = window.from..until_next(history, window);
    history
        .sent()
        .any(|(at, sent)| during.contains(&at) && matches!(sent.outcome, Outcome::Fail(code) if is_it(code)))
}

/// When the next fault began, or what came of this one has come.
fn until_next(history: &History, window: &Window) -> u64 {
    let next = history.windows().iter().map(|w| w.from).filter(|from| *from > window.from).min();
    next.unwrap_or(u64::MAX).min(window.to + AFTERMATH)
}

/// When messages whose names begin like this were acknowledged.
fn oks_of<'a>(history: &'a History, name: &str) -> impl Iterator<Item = u64> + use<'a> {
    let name = name.to_string();
    let is_it = move |sent: &Sent| sent.outcome == Outcome::Ok && sent.name.starts_with(&name);
    history.sent().filter(move |(_, sent)| is_it(sent)).map(|(at, _)| at)
}

/// Whether another node is seen to lead after a fault began than before, and before the next fault began.
fn has_new_leader(history: &History, window: &Window) -> bool {
    let until = until_next(history, window);
    let mut before = None;
    for event in &history.events {
        let What::Sample(sample) = &event.what else { continue };
        let Some(leader) = sample.leader else { continue };
        if event.at <= window.from {
            before = Some(leader);
        } else if event.at <= until && before.is_some_and(|before| before != leader) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged;
    use crate::history::{Custody, Sample};

    fn whole() -> Vec<(u64, What)> {
        let lead = |leader| What::Sample(Sample { leader: Some(leader), ..Sample::default() });
        let both = |a: &str, b: &str| vec![a.to_string(), b.to_string()];
        let custody =
            Custody { id: "id-m".into(), nodes: vec![1, 2], power: both("A", "B"), network: both("1", "2") };
        let mut events = vec![
            (10, lead(1)),
            (20, forged::fault(1, true, &[1])),
            (30, What::Custody(custody.clone())),
            (320, forged::sent("m", Outcome::Ok, &["r"])),
            (330, forged::taken("m", "r")),
            (340, lead(2)),
            (350, forged::fault(1, false, &[1])),
            (360, What::Left { names: vec![] }),
        ];
        events.extend((1..=3).map(|node| (370, What::Searched { node, found: vec![] })));
        for name in ["probe1", "probe2", "probe3"] {
            let custody = Custody { id: format!("id-{name}"), ..custody.clone() };
            events.push((380, What::Custody(custody)));
            events.extend([(380, forged::sent(name, Outcome::Ok, &["r"])), (390, forged::taken(name, "r"))]);
        }
        events
    }

    #[test]
    fn a_run_counts_only_if_enough_happened() {
        let judgement = judge(&forged::history(whole()), &[]);
        assert_eq!((judgement.answer, &judgement.offences[..]), (Answer::Valid, &[][..]));
        assert_eq!((judgement.acknowledged, judgement.copies, judgement.repeated), (4, 4, 0));
        assert_eq!(judgement.until_next_250, [300]);
        // Without any one of these nobody can say.
        for missing in [0, 5, 7, 8, 9, 10] {
            let mut events = whole();
            events.remove(missing);
            assert_eq!(
                judge(&forged::history(events), &[]).answer,
                Answer::Unknown,
                "without event {missing}"
            );
        }
        let mut without_probe = whole();
        without_probe.truncate(without_probe.len() - 3);
        assert_eq!(
            judge(&forged::history(without_probe), &[]).answer,
            Answer::Unknown,
            "node 3 took nothing"
        );
        let mut next_fault = whole();
        let other = match forged::fault(2, true, &[1]) {
            What::Fault(fault) => What::Fault(crate::history::Fault { nemesis: "loss".into(), ..fault }),
            what => what,
        };
        next_fault.insert(5, (335, other));
        let answer = judge(&forged::history(next_fault), &[]).answer;
        assert_eq!(
            answer,
            Answer::Unknown,
            "who led after the second fault need not have led after the first"
        );
        let both = ["kill-leader".to_string(), "pause-two".into()];
        assert_eq!(judge(&forged::history(whole()), &both).answer, Answer::Unknown, "one was not there");
        for (named, code) in [("kill-two", 451), ("pause-two", 421), ("fill-disk", 452)] {
            let as_named = |refusal: Option<u16>| {
                let mut events = whole();
                for (_, what) in &mut events {
                    if let What::Fault(fault) = what {
                        fault.nemesis = named.into();
                    }
                }
                events.extend(refusal.map(|code| (345, forged::sent("x", Outcome::Fail(code), &["r"]))));
                events.sort_by_key(|(at, _)| *at);
                judge(&forged::history(events), &[]).answer
            };
            assert_eq!(as_named(Some(code)), Answer::Valid, "{named}");
            assert_eq!(as_named(None), Answer::Unknown, "nobody was refused under {named}");
            assert_eq!(as_named(Some(550)), Answer::Unknown, "{named} refuses for now, not for good");
        }
        let mut calm = whole();
        calm.retain(|(_, what)| !matches!(what, What::Fault(_)));
        let asked = ["kill-leader".to_string()];
        assert_eq!(judge(&forged::history(calm), &asked).answer, Answer::Unknown, "nothing was broken");
        let mut lost = whole();
        lost.remove(4);
        assert_eq!(judge(&forged::history(lost), &[]).answer, Answer::Invalid);
    }
}
