//! What has to have happened in a run for its verdict to mean something.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::checkers::is_refused;
use crate::history::{Event, History, Outcome, Sent, What, Window};
use crate::replacement::machine_of;
use crate::run::PROBE;

/// How long after its mending a fault still counts as happening, in milliseconds: its consequences come to light.
const AFTERMATH: u64 = 15_000;

/// While these last, nobody can be acknowledged.
const STOPS_ALL: [&str; 4] = ["kill-two", "kill-all", "pause-two", "power-cut-all"];

/// What is over sooner than this, in milliseconds, counts as happening for so long: mail may come in bursts with a second between them.
const BRIEF: u64 = 3_000;

/// Something that has to have happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What.
    pub what: String,
    /// Whether it has.
    pub is_met: bool,
}

/// What had to happen in a run in which these nemeses were asked for, and whether it has.
pub(crate) fn conditions(history: &History, nemeses: &[String]) -> Vec<Condition> {
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
    let custody = has(history, |what| matches!(what, What::Custody(_)));
    expect("the nodes' logs said who holds each message".into(), custody);
    let probed = |node: u64| oks_of(history, &format!("{PROBE}{node}")).next().is_some();
    expect("each node took mail when all was mended".into(), (1..=3).all(probed));
    let windows = history.windows();
    let mut names: BTreeSet<&str> = windows.iter().map(|w| w.fault.nemesis.as_str()).collect();
    names.extend(nemeses.iter().map(String::as_str));
    for name in names {
        let of_it: Vec<&Window> = windows.iter().filter(|w| w.fault.nemesis == name).collect();
        expect(format!("{name} was there"), !of_it.is_empty());
        let until = |w: &Window| match STOPS_ALL.contains(&name) {
            true => w.to + AFTERMATH,
            false => w.to.max(w.from + BRIEF),
        };
        let during = of_it.iter().any(|w| oks.iter().any(|at| (w.from..until(w)).contains(at)));
        expect(
            format!("mail was acknowledged during {name}, or right after if that stops everybody"),
            during,
        );
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
            // A Postfix in between does not say when it sends its final dots.
            "kill-leader" | "pause-leader"
                if has(history, |what| matches!(what, What::Sent { dot: Some(_), .. })) =>
            {
                let owed = of_it.iter().any(|w| owed_a_reply(history, w));
                expect(format!("the leader owed a reply to a final dot when {name} came"), owed);
            }
            // What an old copy lacks may have died meanwhile, so one alone says nothing.
            "flip-bits" | "damage-files" | "old-copy" if name != "old-copy" || of_it.len() >= 3 => {
                let repaired = of_it.iter().any(|w| was_repaired(history, w));
                expect(format!("a node got back what {name} had taken"), repaired);
                if name == "flip-bits" && of_it.iter().any(|w| mail_waited(history, w)) {
                    expect(
                        format!("a snapshot brought mail that waits after {name}"),
                        brought_bodies(history),
                    );
                }
            }
            "replace-node" => {
                if of_it.iter().any(|w| mail_waited(history, w)) {
                    expect(
                        format!("a snapshot brought mail that waits after {name}"),
                        brought_bodies(history),
                    );
                }
                let holds = has(
                    history,
                    |what| matches!(what, What::Custody(custody) if custody.nodes.iter().any(|id| machine_of(*id) != *id)),
                );
                expect("a node that came in another's place held mail".into(), holds);
            }
            "wall-clock" => {
                let wrong = has(history, |what| matches!(what, What::WrongClock { .. }));
                expect("a node wrote down times that cannot be".into(), wrong);
            }
            // Of mail that goes at once there need be none.
            "kill-follower" | "pause-follower" if has_deferred(history) && goes(history, &windows) => {
                let went = windows.iter().any(|w| went_without(history, w));
                expect("a node was away while mail that it held was handed off".into(), went);
            }
            _ => {}
        }
    }
    // What a sender asked for that was acknowledged, and what has to come of it.
    let acknowledged = |is_it: fn(&str) -> bool| {
        let mut oks = history.sent().filter(|(_, sent)| sent.outcome == Outcome::Ok);
        oks.any(|(_, sent)| sent.recipients.iter().any(|recipient| is_it(recipient)))
    };
    if acknowledged(is_refused) {
        let told = has(history, |what| matches!(what, What::Notice(_)));
        expect("a sender was told of a recipient whom nobody takes".into(), told);
    }
    if acknowledged(|recipient| recipient.starts_with("drop") || recipient.starts_with("reset")) {
        let was = has(history, |what| matches!(what, What::Unanswered { .. }));
        expect("a customer had a copy whole and did not say so".into(), was);
    }
    conditions
}

/// Whether a node that a fault was done to had back what it had lost before the fault was over.
fn was_repaired(history: &History, window: &Window) -> bool {
    let during = history.events.iter().filter(|event| (window.from..=window.to).contains(&event.at));
    let mut nodes = during.filter_map(|event| match event.what {
        What::Repaired { node } => Some(node),
        _ => None,
    });
    nodes.any(|node| window.fault.nodes.contains(&node))
}

/// Whether a snapshot had bodies with it.
fn brought_bodies(history: &History) -> bool {
    has(history, |what| matches!(what, What::Snapshot { bodies, .. } if *bodies > 0))
}

/// Whether such a thing happened.
fn has(history: &History, is_it: impl Fn(&What) -> bool) -> bool {
    history.events.iter().any(|event| is_it(&event.what))
}

/// Whether a node was killed or stopped between a sender's final dot and the reply, which the killed one never sent.
fn owed_a_reply(history: &History, window: &Window) -> bool {
    let is_killed = window.fault.nemesis.starts_with("kill");
    history.events.iter().any(|event| match &event.what {
        What::Sent { dot: Some(dot), sent, .. } => {
            let is_open = *dot <= window.from && window.from <= event.at;
            let was_silent = sent.outcome == Outcome::Unknown || !is_killed;
            is_open && was_silent && window.fault.nodes.contains(&sent.node)
        }
        _ => false,
    })
}

/// Whether mail was seen to wait for all of a fault and for a while after it.
fn mail_waited(history: &History, window: &Window) -> bool {
    const ENOUGH: u64 = 20;
    let during = window.from..window.to + AFTERMATH;
    let mut queued = history.events.iter().filter(|event| during.contains(&event.at)).filter_map(|event| {
        match &event.what {
            What::Sample(sample) => sample.queued,
            _ => None,
        }
    });
    queued.next().is_some_and(|first| first >= ENOUGH) && queued.all(|queued| queued >= ENOUGH)
}

/// Whether there was mail that a customer puts off at first.
fn has_deferred(history: &History) -> bool {
    history.sent().any(|(_, sent)| sent.recipients.iter().any(|recipient| recipient.starts_with("defer")))
}

/// Whether any mail was handed off while something was broken: customers may be away until the end.
fn goes(history: &History, windows: &[Window]) -> bool {
    history.taken().any(|(at, _)| windows.iter().any(|w| (w.from..w.to).contains(&at)))
}

/// Whether a node could do nothing for the others while mail was handed off that it held when a fault began: it is to erase that later.
fn went_without(history: &History, window: &Window) -> bool {
    let away: BTreeSet<u64> = history
        .events
        .iter()
        .filter(|event| (window.from..=window.to).contains(&event.at))
        .filter_map(|event| match &event.what {
            What::Away { nodes } => Some(nodes.iter().copied()),
            _ => None,
        })
        .flatten()
        .collect();
    // Until they are let go, not until all is well.
    let is_over = |event: &&Event| {
        event.at > window.from && matches!(&event.what, What::Away { nodes } if nodes.is_empty())
    };
    let until = history.events.iter().find(is_over).map_or(window.to, |event| event.at.min(window.to));
    let during = |(at, _): &(u64, _)| (window.from..until).contains(at);
    let handed_off: BTreeSet<&str> =
        history.taken().filter(during).filter_map(|(_, taken)| taken.name.as_deref()).collect();
    let sent = history.sent().filter(|(_, sent)| handed_off.contains(sent.name.as_str()));
    let ids: BTreeSet<&str> = sent.filter_map(|(_, sent)| sent.id.as_deref()).collect();
    history.events.iter().filter(|event| event.at <= window.from).any(|event| match &event.what {
        What::Custody(custody) => {
            ids.contains(custody.id.as_str())
                && custody.nodes.iter().any(|id| away.contains(&machine_of(*id)))
        }
        _ => false,
    })
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
pub(crate) fn oks_of<'a>(history: &'a History, name: &str) -> impl Iterator<Item = u64> + use<'a> {
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
