//! What must be true: at every step of simulated time, and at the end.
//!
//! At every step no two nodes may deliver, no term has two leaders, nobody hands mail off after its successor has ([`super::succession`]),
//! and whoever reads a 250 finds the message on two disks (see [`super::mail::Ledger::answered`]). At the end each acknowledged message was taken or its sender told, for each recipient; none that
//! was refused was taken; none was altered; nothing of what was settled is on any disk; the nodes agree.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::host::Host;
use super::mail::{Ledger, Told, is_long, marked};
use super::relay::{NODES, Shown};
use super::world::{World, lock};

/// What is watched from step to step.
#[derive(Default)]
pub(super) struct Watch {
    /// Changes of leadership.
    pub(super) reigns: u64,
}

impl Watch {
    pub(super) fn look(
        &mut self,
        shown: &BTreeMap<u64, Shown>,
        nodes: &BTreeMap<u64, Host>,
        ledger: &mut Ledger,
    ) -> Result<(), String> {
        let (mut may_deliver, now) = (Vec::new(), ledger.now);
        for (id, shown) in shown {
            let seen = lock(shown);
            let Some(running) = &seen.running else { continue };
            let look =
                || (running.cluster.permit().map(|p| p.term().0), running.cluster.leading().map(|t| t.0));
            let Some((permit, leads)) = nodes[id].within(now, look) else { continue };
            may_deliver.extend(permit.map(|term| (*id, term)));
            if let Some(term) = leads {
                let is_new =
                    ledger.succession.leads(*id, term).map_err(|why| format!("at {now:?}: {why}"))?;
                self.reigns += u64::from(is_new);
            }
        }
        match may_deliver.as_slice() {
            [] | [_] => Ok(()),
            several => Err(format!("at {now:?}: several nodes may deliver: {several:?} (node, term)")),
        }
    }
}

/// Whether all nodes serve and no mail is left anywhere.
pub(super) fn is_settled(world: &World) -> bool {
    let running = world.running();
    running.len() as u64 == NODES && running.values().all(|node| lock(&node.queue).totals().messages == 0)
}

/// How things stand, for whoever looks for a failure's cause.
pub(super) fn standing(world: &World) -> String {
    let mut text = String::new();
    for (id, node) in world.running() {
        let (totals, routes) = {
            let queue = lock(&node.queue);
            (queue.totals(), queue.routes().len())
        };
        let host = &world.nodes[&id];
        let leader = host.within(world.now(), || (node.cluster.leader(), node.cluster.leading()));
        text += &format!("node {id}: {totals:?}, {routes} routes, leader and own term {leader:?}; ");
    }
    let down = world.nodes.iter().filter(|(_, host)| !host.is_up()).map(|(id, _)| *id);
    text + &format!("down: {:?}", down.collect::<Vec<u64>>())
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    pub(crate) unknown: u64,
    pub(crate) taken: u64,
    pub(crate) noticed: u64,
    pub(crate) repeated: u64,
    /// Repetitions that customers had asked for: they took it, and did not say so.
    pub(crate) ambiguous: u64,
    /// What happened, in a number.
    pub(crate) trace: u64,
    pub(crate) simulated: Duration,
    pub(crate) real: Duration,
}

impl Summary {
    /// For adding up.
    pub(crate) fn counts(&self) -> [(&'static str, u64); 7] {
        [
            ("accepted", self.accepted),
            ("refused", self.refused),
            ("unknown", self.unknown),
            ("taken", self.taken),
            ("noticed", self.noticed),
            ("repeated", self.repeated),
            ("simulated_ms", self.simulated.as_millis() as u64),
        ]
    }

    pub(crate) fn took(self, simulated: Duration, real: Duration, trace: u64) -> Summary {
        Summary { simulated, real, trace, ..self }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary {
            accepted,
            refused,
            unknown,
            taken,
            noticed,
            repeated,
            ambiguous,
            trace,
            simulated,
            real,
        } = self;
        let (simulated, real) = (simulated.as_secs_f64(), real.as_secs_f64());
        write!(
            f,
            "{accepted} accepted, {refused} refused, {unknown} unknown; {taken} taken, {noticed} noticed, {repeated} repeated where {ambiguous} had no answer; \
             trace {trace:016x}, {simulated:.0} s in {real:.1} s, {:.0} times as fast",
            simulated / real
        )
    }
}

/// The verdict on a run that has healed.
pub(super) fn judge(world: &World) -> Result<Summary, String> {
    let ledger = lock(&world.ledger);
    let mut summary = Summary { ambiguous: ledger.ambiguous, ..Summary::default() };
    for (number, mail) in &ledger.mails {
        match mail.told {
            Told::Accepted => summary.accepted += 1,
            Told::Refused => summary.refused += 1,
            Told::Nothing => summary.unknown += 1,
        }
        let settled = |r: &String| u32::from(mail.taken[r] > 0) + u32::from(mail.noticed[r] > 0);
        let settled: Vec<u32> = mail.taken.keys().map(settled).collect();
        let wrong = match mail.told {
            _ if settled.contains(&2) => Some("was taken, and its sender told that it failed"),
            Told::Accepted if settled.contains(&0) => Some("was acknowledged and is lost"),
            Told::Refused if settled.contains(&1) => Some("was refused and taken"),
            Told::Nothing if settled.contains(&0) && settled.contains(&1) => Some("was half accepted"),
            _ => None,
        };
        if let Some(wrong) = wrong {
            return Err(format!("message {number} {wrong}: {mail:?}"));
        }
        summary.taken += mail.taken.values().filter(|count| **count > 0).count() as u64;
        summary.noticed += mail.noticed.values().filter(|count| **count > 0).count() as u64;
        let counts = mail.taken.values().chain(mail.noticed.values());
        summary.repeated += counts.map(|count| u64::from(count.saturating_sub(1))).sum::<u64>();
    }
    let running = world.running();
    let waiting_pieces: u64 = running.values().map(|node| lock(&node.queue).piece_bytes).sum();
    for (id, node) in &world.nodes {
        let mut left = node.disk.marks();
        // Pieces of a long message that was never accepted wait for its client to go on.
        if waiting_pieces > 0 {
            left.retain(|(mark, _, _)| {
                let number = marked(*mark);
                let is_accepted = ledger.mails.get(&number).is_none_or(|mail| mail.told == Told::Accepted);
                is_accepted || !is_long(number)
            });
        }
        if !left.is_empty() {
            if let Some(dir) = std::env::var_os("HOLDFAST_SIM_DUMP") {
                world.dump(*id, std::path::Path::new(&dir));
            }
            return Err(format!(
                "on the disk of node {id} are octets of messages (mark, file, offset): {left:x?}"
            ));
        }
    }
    let mut routes = None;
    for (id, node) in &running {
        let queue = lock(&node.queue);
        queue.check();
        let own = format!("{:?}", queue.routes());
        if routes.get_or_insert_with(|| own.clone()) != &own {
            return Err(format!("node {id} has other routes"));
        }
    }
    Ok(summary)
}
