//! What is to be said of a run: whether a promise was broken, and if not, whether enough happened for that to mean something.

use serde::{Deserialize, Serialize};

use crate::checkers::{Offence, offences};
use crate::conditions::{Condition, conditions, oks_of};
use crate::history::{History, Outcome};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::{forged, is_refused};
    use crate::history::{Custody, Sample, What};

    fn both(a: &str, b: &str) -> Vec<String> {
        vec![a.to_string(), b.to_string()]
    }

    fn whole() -> Vec<(u64, What)> {
        let lead = |leader| What::Sample(Sample { leader: Some(leader), ..Sample::default() });
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
            (350, forged::sent("owed", Outcome::Unknown, &["r"])),
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
        for missing in [0, 5, 7, 8, 9, 10, 11] {
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
        let asked = ["kill-leader".to_string(), "pause-two".into()];
        assert_eq!(judge(&forged::history(whole()), &asked).answer, Answer::Unknown, "one was not there");
        let named = |nemesis: &str, extra: Vec<(u64, What)>| {
            let mut events = whole();
            for (_, what) in &mut events {
                if let What::Fault(fault) = what {
                    fault.nemesis = nemesis.into();
                }
            }
            events.extend(extra);
            events.sort_by_key(|(at, _)| *at);
            judge(&forged::history(events), &[]).answer
        };
        for (nemesis, code) in [("kill-two", 451), ("pause-two", 421), ("fill-disk", 452)] {
            let refused = |code| vec![(345, forged::sent("x", Outcome::Fail(code), &["r"]))];
            assert_eq!(named(nemesis, refused(code)), Answer::Valid, "{nemesis}");
            assert_eq!(named(nemesis, vec![]), Answer::Unknown, "nobody was refused under {nemesis}");
            assert_eq!(
                named(nemesis, refused(550)),
                Answer::Invalid,
                "{nemesis} refuses for now, not for good"
            );
        }
        let repaired = || (345, What::Repaired { node: 1 });
        let snapshot = |bodies| (900, What::Snapshot { node: 2, bodies });
        let waiting = |queued| (345, What::Sample(Sample { queued: Some(queued), ..Sample::default() }));
        assert_eq!(named("flip-bits", vec![]), Answer::Unknown, "nothing was repaired");
        for (at, node, whose) in [(345, 2, "another node"), (10, 1, "before it"), (351, 1, "another fault's")]
        {
            assert_eq!(named("flip-bits", vec![(at, What::Repaired { node })]), Answer::Unknown, "{whose}");
        }
        assert_eq!(named("flip-bits", vec![repaired()]), Answer::Valid);
        assert_eq!(named("flip-bits", vec![repaired(), waiting(50), snapshot(0)]), Answer::Unknown);
        assert_eq!(named("flip-bits", vec![repaired(), waiting(50), snapshot(7)]), Answer::Valid);
        assert_eq!(named("wall-clock", vec![]), Answer::Unknown, "no clock was seen to be wrong");
        assert_eq!(named("wall-clock", vec![(345, What::WrongClock { node: 2 })]), Answer::Valid);
        let held = |node| {
            let custody = Custody {
                id: "id-m".into(),
                nodes: vec![node, 3],
                power: both("A", "B"),
                network: both("1", "2"),
            };
            vec![
                (15, What::Custody(custody)),
                (20, What::Away { nodes: vec![1] }),
                (340, What::Away { nodes: vec![] }),
            ]
        };
        assert_eq!(named("replace-node", held(2)), Answer::Unknown, "nobody new held anything");
        assert_eq!(named("replace-node", held(4)), Answer::Valid);
        let with = |extra| [held(4), vec![waiting(50)], extra].concat();
        assert_eq!(
            named("replace-node", with(vec![])),
            Answer::Unknown,
            "mail waited, and nobody sent it any"
        );
        assert_eq!(named("replace-node", with(vec![snapshot(3)])), Answer::Valid);
        let late = |nemesis: &str| {
            let mut events = whole();
            for (at, what) in &mut events {
                match what {
                    What::Fault(fault) => fault.nemesis = nemesis.into(),
                    What::Sent { .. } if *at == 320 => *at = 351,
                    _ => {}
                }
            }
            events.extend([(345, forged::sent("x", Outcome::Fail(451), &["r"]))]);
            events.sort_by_key(|(at, _)| *at);
            // Longer than what is brief.
            events.iter_mut().for_each(|(at, _)| *at *= 10);
            judge(&forged::history(events), &[]).answer
        };
        assert_eq!(late("kill-two"), Answer::Valid, "nobody could be acknowledged sooner");
        assert_eq!(late("loss"), Answer::Unknown, "nobody was acknowledged while it lasted");
        // What was acknowledged for a recipient whom nobody takes, or who takes it without a word.
        let acknowledged = |recipient: &str, extra: Vec<(u64, What)>| {
            let custody = Custody {
                id: "id-y".into(),
                nodes: vec![1, 2],
                power: both("A", "B"),
                network: both("1", "2"),
            };
            let notice = crate::history::Notice {
                name: "y".into(),
                id: "<y@n>".into(),
                recipients: vec![recipient.into()],
            };
            let end = match is_refused(recipient) {
                true => What::Notice(notice),
                false => forged::taken("y", recipient),
            };
            let own = vec![
                (30, What::Custody(custody)),
                (330, forged::sent("y", Outcome::Ok, &[recipient])),
                (346, end),
            ];
            named("loss", [own, extra].concat())
        };
        assert_eq!(acknowledged("bounce-y", vec![]), Answer::Valid);
        assert_eq!(acknowledged("drop-y", vec![]), Answer::Unknown, "no hand-off was ambiguous");
        let unanswered = What::Unanswered { recipient: "drop-y".into() };
        assert_eq!(acknowledged("drop-y", vec![(340, unanswered)]), Answer::Valid);
        assert_eq!(named("pause-leader", vec![]), Answer::Valid);
        let mut idle = whole();
        idle.retain(|(_, what)| !matches!(what, What::Sent { sent, .. } if sent.outcome == Outcome::Unknown));
        for (at, what) in &mut idle {
            match what {
                What::Fault(fault) => fault.nemesis = "pause-leader".into(),
                What::Sent { dot, .. } => *dot = Some(*at - 1),
                _ => {}
            }
        }
        assert_eq!(judge(&forged::history(idle), &[]).answer, Answer::Unknown, "it owed nobody a reply");
        let deferred = || (344, forged::sent("x", Outcome::Fail(451), &["defer-x"]));
        let named_deferred = |mut extra: Vec<(u64, What)>| {
            extra.push(deferred());
            named("kill-follower", extra)
        };
        assert_eq!(named("kill-follower", held(2)), Answer::Valid, "all of it goes at once");
        assert_eq!(named_deferred(held(2)), Answer::Unknown, "who was away held nothing");
        assert_eq!(named_deferred(held(1)), Answer::Valid);
        let mut calm = whole();
        let is_owed =
            |what: &What| matches!(what, What::Sent { sent, .. } if sent.outcome == Outcome::Unknown);
        calm.retain(|(_, what)| !matches!(what, What::Fault(_)) && !is_owed(what));
        let asked = ["kill-leader".to_string()];
        assert_eq!(judge(&forged::history(calm), &asked).answer, Answer::Unknown, "nothing was broken");
        let mut lost = whole();
        lost.remove(4);
        assert_eq!(judge(&forged::history(lost), &[]).answer, Answer::Invalid);
    }
}
