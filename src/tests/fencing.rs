//! Who may send a final dot, by exhaustion (stateright): three nodes with logs, clocks and promises. At any moment of a transaction its leader is
//! paused, dies or hands over; voters restart and have forgotten what they promised; a new leader has results in its log that it has not applied.
//!
//! Whether a node may deliver and from when it may vote is decided by the product's own functions. What is modelled is what they stand on: consensus,
//! of which a majority of two is enough, and time, which all clocks tell alike.

#![expect(clippy::disallowed_methods, reason = "time is made up")]

use std::time::{Duration, Instant};

use holdfast_cluster::Term;
use holdfast_cluster::lease::{Lease, votes_from};
use stateright::{Checker, Model, Property};

/// Nodes.
const NODES: usize = 3;
/// For so many ticks a follower keeps its promise to a leader that it has heard.
const PROMISE: u8 = 2;
/// A tick.
const TICK: Duration = Duration::from_millis(100);
/// Terms after which a schedule is not followed any further.
const TERMS: u8 = 3;
/// Copies after which it is not.
const COPIES: u8 = 2;
/// Crashes, pauses and transfers together.
const TROUBLES: u8 = 2;

/// What an entry says of the one message, which has waited since before the first term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Said {
    /// Nothing: it is its leader's first one.
    Nothing,
    /// The customer has it.
    Delivered,
}

/// An entry of a log: whose term, and what.
type Entry = (u8, Said);

/// How far a node is with its transaction, and in which term it began it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hand {
    Empty,
    /// Before the final dot.
    Open(u8),
    /// The customer has the final dot.
    PastDot(u8),
    /// The customer's 250 was read.
    Answered(u8),
}

/// What a leader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Reign {
    /// To whom it hands over, if it does.
    hands_to: Option<usize>,
    /// For each node: ticks since the newest message was sent that it answered, at most [`PROMISE`].
    silent: [u8; NODES],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    /// The newest term that it has voted in or followed.
    term: u8,
    log: Vec<Entry>,
    /// How many entries it has applied.
    applied: usize,
    reign: Option<Reign>,
    hand: Hand,
    /// For how many ticks it keeps what it promised.
    promised: u8,
    /// Ticks since it started, at most [`PROMISE`].
    age: u8,
    is_paused: bool,
}

impl Node {
    fn leads(&self) -> Option<u8> {
        self.reign.map(|_| self.term)
    }

    /// What the product says.
    fn permit(&self) -> Option<u8> {
        let (reign, then) = (self.reign?, Instant::now());
        // With itself one other is a quorum.
        let silent = reign.silent.iter().min().copied().unwrap_or(PROMISE);
        let term = |term: u8| Term(u64::from(term));
        let lease = Lease {
            leads: Some(term(self.term)),
            applied: self.log[..self.applied].last().map(|(of, _)| term(*of)),
            handed_over: term(if reign.hands_to.is_some() { self.term } else { 0 }),
            votes: true,
            quorum_heard: Some(then),
            promise: TICK * u32::from(PROMISE),
        };
        lease.permit(then + TICK * u32::from(silent)).map(|permit| permit.term().0 as u8)
    }

    /// What the product says.
    fn remembers(&self) -> bool {
        let began = Instant::now();
        began + TICK * u32::from(self.age) >= votes_from(began, TICK * u32::from(PROMISE))
    }

    /// Whether it is not yet bound to any leader any more.
    fn is_free(&self) -> bool {
        self.promised == 0 && !self.is_paused
    }

    fn has_result(&self) -> bool {
        self.log.iter().any(|(_, said)| *said == Said::Delivered)
    }

    /// Whether a result stands in its log that it found there when it was elected.
    fn found_result(&self) -> bool {
        self.log.contains(&(self.term, Said::Nothing))
            && self.log.iter().any(|(term, said)| *term < self.term && *said == Said::Delivered)
    }

    fn knows_result(&self) -> bool {
        self.log[..self.applied].iter().any(|(_, said)| *said == Said::Delivered)
    }

    /// Where its log ends, as candidates are compared.
    fn end(&self) -> (u8, usize) {
        (self.log.last().map_or(0, |(term, _)| *term), self.log.len())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    nodes: [Node; NODES],
    copies: u8,
    troubles: u8,
    /// Nodes that crashed behind their final dot.
    crashed_past_dot: u8,
    /// A final dot was sent though somebody else had the right to, or by one in whose log the result stood before it led.
    wrong_dot: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Tick,
    /// A follower hears its leader, and says so.
    Heartbeat(usize, usize),
    /// It gets all that its leader has, and says so.
    Append(usize, usize),
    /// A candidate, and who votes for it. Whoever is handed leadership is voted for whatever was promised.
    Elect(usize, usize, bool),
    HandOver(usize, usize),
    Open(usize),
    Dot(usize),
    Reply(usize),
    Settle(usize),
    Restart(usize),
    Pause(usize),
    Wake(usize),
}

impl State {
    fn newest_leader(&self) -> Option<usize> {
        let leaders = (0..NODES).filter(|n| self.nodes[*n].reign.is_some() && !self.nodes[*n].is_paused);
        leaders.max_by_key(|n| self.nodes[*n].term)
    }

    fn may_elect(&self, candidate: usize, voter: usize, transfer: bool) -> bool {
        let (c, v) = (&self.nodes[candidate], &self.nodes[voter]);
        let is_told = self
            .nodes
            .iter()
            .any(|n| n.reign.is_some_and(|r| r.hands_to == Some(candidate)) && n.term == c.term);
        let is_bound = !c.is_free() || !v.is_free();
        candidate != voter
            && c.term.max(v.term) < TERMS
            && !c.is_paused
            && !v.is_paused
            && c.reign.is_none()
            && if transfer { is_told } else { !is_bound && v.reign.is_none() }
            && c.remembers()
            && v.remembers()
            && c.end() >= v.end()
    }

    fn elect(&mut self, candidate: usize, voter: usize) {
        let term = self.nodes[candidate].term.max(self.nodes[voter].term) + 1;
        for n in [candidate, voter] {
            self.nodes[n].term = term;
            self.nodes[n].reign = None;
        }
        self.nodes[candidate].reign = Some(Reign { hands_to: None, silent: [PROMISE; NODES] });
        self.nodes[candidate].log.push((term, Said::Nothing));
    }

    fn hear(&mut self, leader: usize, follower: usize) {
        let term = self.nodes[leader].term;
        let f = &mut self.nodes[follower];
        (f.term, f.reign, f.promised) = (term, None, PROMISE);
        if let Some(reign) = &mut self.nodes[leader].reign {
            reign.silent[follower] = 0;
        }
    }

    fn append(&mut self, leader: usize, follower: usize) {
        self.hear(leader, follower);
        let (log, known) = (self.nodes[leader].log.clone(), self.nodes[leader].applied);
        // With the leader itself it is on two of three.
        self.nodes[leader].applied = log.len();
        let f = &mut self.nodes[follower];
        (f.log, f.applied) = (log, f.applied.max(known));
    }
}

struct Fencing;

impl Model for Fencing {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let follower = Node {
            term: 1,
            log: vec![(1, Said::Nothing)],
            applied: 1,
            reign: None,
            hand: Hand::Empty,
            promised: PROMISE,
            age: PROMISE,
            is_paused: false,
        };
        let reign = Some(Reign { hands_to: None, silent: [PROMISE, 0, 0] });
        let leader = Node { reign, promised: 0, ..follower.clone() };
        let nodes = [leader, follower.clone(), follower];
        vec![State { nodes, copies: 0, troubles: 0, crashed_past_dot: 0, wrong_dot: false }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let mut may = |condition: bool, action| actions.extend(condition.then_some(action));
        may(true, Action::Tick);
        for n in 0..NODES {
            let node = &state.nodes[n];
            let is_awake = !node.is_paused;
            let has_trouble = state.troubles < TROUBLES;
            for other in 0..NODES {
                let takes =
                    other != n && !state.nodes[other].is_paused && state.nodes[other].term <= node.term;
                let can_send = is_awake && node.reign.is_some() && takes;
                may(can_send && state.nodes[other].log != node.log, Action::Append(n, other));
                may(can_send, Action::Heartbeat(n, other));
                may(state.may_elect(n, other, false), Action::Elect(n, other, false));
                may(state.may_elect(n, other, true), Action::Elect(n, other, true));
                let can_hand = node.reign.is_some_and(|r| r.hands_to.is_none()) && other != n;
                may(is_awake && can_hand && has_trouble, Action::HandOver(n, other));
            }
            let permit = node.permit().filter(|_| is_awake);
            // Nor while a result of its own term is under way.
            let is_waiting = !node.knows_result() && !node.log.contains(&(node.term, Said::Delivered));
            may(permit.is_some() && node.hand == Hand::Empty && is_waiting, Action::Open(n));
            let may_dot = matches!(node.hand, Hand::Open(term) if permit == Some(term));
            may(may_dot && state.copies < COPIES, Action::Dot(n));
            may(is_awake && matches!(node.hand, Hand::PastDot(_)), Action::Reply(n));
            let can_settle = state.newest_leader().is_some() && matches!(node.hand, Hand::Answered(_));
            may(is_awake && can_settle, Action::Settle(n));
            may(is_awake && has_trouble, Action::Restart(n));
            may(is_awake && has_trouble && node.reign.is_some(), Action::Pause(n));
            may(!is_awake, Action::Wake(n));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => {
                for node in &mut state.nodes {
                    node.promised = node.promised.saturating_sub(1);
                    node.age = (node.age + 1).min(PROMISE);
                    if let Some(reign) = &mut node.reign {
                        reign.silent = reign.silent.map(|ticks| (ticks + 1).min(PROMISE));
                    }
                }
            }
            Action::Heartbeat(leader, follower) => state.hear(leader, follower),
            Action::Append(leader, follower) => state.append(leader, follower),
            Action::Elect(candidate, voter, _) => state.elect(candidate, voter),
            Action::HandOver(n, to) => {
                state.nodes[n].reign.as_mut()?.hands_to = Some(to);
                state.troubles += 1;
            }
            Action::Open(n) => state.nodes[n].hand = Hand::Open(state.nodes[n].term),
            Action::Dot(n) => {
                let Hand::Open(term) = last.nodes[n].hand else { return None };
                let is_others = (0..NODES).any(|other| other != n && last.nodes[other].permit().is_some());
                state.wrong_dot |= is_others || last.nodes[n].found_result();
                state.copies += 1;
                state.nodes[n].hand = Hand::PastDot(term);
            }
            Action::Reply(n) => {
                let Hand::PastDot(term) = last.nodes[n].hand else { return None };
                state.nodes[n].hand = Hand::Answered(term);
            }
            Action::Settle(n) => {
                // A fact, whoever leads.
                let leader = &mut state.nodes[last.newest_leader()?];
                if !leader.has_result() {
                    leader.log.push((leader.term, Said::Delivered));
                }
                state.nodes[n].hand = Hand::Empty;
            }
            Action::Restart(n) => {
                let node = &mut state.nodes[n];
                let was_past = matches!(node.hand, Hand::PastDot(_) | Hand::Answered(_));
                (node.reign, node.hand, node.promised, node.age) = (None, Hand::Empty, 0, 0);
                state.crashed_past_dot += u8::from(was_past);
                state.troubles += 1;
            }
            Action::Pause(n) => {
                state.nodes[n].is_paused = true;
                state.troubles += 1;
            }
            Action::Wake(n) => state.nodes[n].is_paused = false,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("P4: at most one node may deliver", |_, state: &State| {
                state.nodes.iter().filter(|node| node.permit().is_some()).count() <= 1
            }),
            Property::always(
                "P4: no final dot without the sole right to it, none by who found the result in its log",
                |_, state: &State| !state.wrong_dot,
            ),
            // What makes the above worth something.
            Property::sometimes(
                "a copy is taken twice, since a leader crashed behind its final dot and nothing else happened",
                |_, state: &State| state.copies == 2 && state.troubles == 1 && state.crashed_past_dot == 1,
            ),
            Property::sometimes(
                "nothing but its youth keeps a restarted voter from electing another leader inside the old one's lease",
                |_, state: &State| {
                    let is_held = state.nodes.iter().any(|node| node.permit().is_some());
                    let would = |c: usize, v: usize| {
                        let (candidate, voter) = (&state.nodes[c], &state.nodes[v]);
                        let is_free = candidate.is_free() && voter.is_free() && candidate.remembers();
                        c != v
                            && is_free
                            && !voter.remembers()
                            && candidate.reign.is_none()
                            && voter.reign.is_none()
                    };
                    is_held && (0..NODES).any(|c| (0..NODES).any(|v| would(c, v)))
                },
            ),
            Property::sometimes(
                "another one leads while who handed over is past its final dot",
                |_, state: &State| {
                    let leader = state.newest_leader();
                    state.nodes.iter().any(|node| matches!(node.hand, Hand::PastDot(term) if node.leads().is_none() && term == 1))
                    && leader.is_some_and(|n| state.nodes[n].term == 2)
                    && state.nodes.iter().all(|node| !node.is_paused)
                },
            ),
            Property::sometimes(
                "a leader has a result in its log that it has not applied",
                |_, state: &State| {
                    state.nodes.iter().any(|n| {
                        n.reign.is_some()
                            && n.has_result()
                            && !n.knows_result()
                            && n.log.last() == Some(&(n.term, Said::Nothing))
                    })
                },
            ),
            Property::sometimes(
                "a paused leader wakes behind its final dot, and may deliver no more",
                |_, state: &State| {
                    let woke = |n: &Node| !n.is_paused && n.reign.is_some() && n.permit().is_none();
                    state.troubles == 1
                        && state.nodes.iter().any(|n| woke(n) && matches!(n.hand, Hand::PastDot(_)))
                        && state.nodes.iter().any(|n| n.permit().is_some())
                },
            ),
        ]
    }
}

/// Goes through all of them; no promise is broken, and whatever is worth seeing was seen.
#[test]
fn p4_no_schedule_of_leaders_lets_two_deliver() {
    let checker = Fencing.checker().threads(2).spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
}
