//! Every schedule of one message between a sender, two leaders in turn and a customer, by exhaustion (stateright): acknowledgement, withdrawal and
//! delivery, with leaders that die, are paused, or hand over at any moment.
//!
//! What is decided is decided by the product's own code: the queue's `apply`, `admit` and `open`, the rule of placement, the lease. What is
//! modelled is what they stand on: a log of which a prefix is committed, proposals that may be late, and time.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test may panic, and time is made up")]

use std::time::{Duration, Instant};

use holdfast::queue::command::{Answer, Fate, Notice, Outcome};
use holdfast::queue::message::{Envelope, Recipient, Tick};
use holdfast::queue::{Command, MessageId, Queue};
use holdfast::smtp::address::{Mailbox, ReversePath};
use holdfast_cluster::lease::Lease;
use holdfast_cluster::placement::{Placement, is_placed};
use holdfast_cluster::{LogIndex, LogPosition, Machine, Term};
use stateright::{Checker, Model, Property};

/// For so many ticks a follower keeps its promise to a leader it has heard.
const PROMISE: u8 = 4;
/// Leaders in turn.
const TERMS: u8 = 3;
/// Hand-offs after which a schedule is not followed any further.
const TAKEN_MAX: u8 = 4;

/// An entry of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Entry {
    /// A leader's own first one.
    First,
    Accept {
        again: bool,
    },
    Withdraw,
    Delivered,
    Failed,
}

/// What a leader has in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hand {
    Nothing,
    /// A transaction is open, before its final dot.
    Open,
    /// The customer has answered the dot: taken, or refused for good.
    Answered {
        taken: bool,
    },
}

/// A leader, as it sees itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Leader {
    term: u8,
    hand: Hand,
    /// It has begun to deliver the message.
    has_opened: bool,
    /// Ticks since it sent what a quorum answered.
    silent: u8,
}

/// The node that talks to the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Receiver {
    Idle,
    /// It waits for what becomes of this proposal.
    Asked(Entry),
    /// It has answered the sender.
    Said(Reply),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reply {
    Acknowledged,
    /// 451: nothing is kept.
    NotKept,
    /// None: the sender knows nothing.
    HungUp,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// Committed entries with their terms.
    log: Vec<(u8, Entry)>,
    /// What stands in the leader's log behind them.
    tail: Vec<(u8, Entry)>,
    leader: Leader,
    /// One before it that has not heard of its successor.
    old: Option<Leader>,
    /// Proposals on their way to a leader.
    network: Vec<Entry>,
    receiver: Receiver,
    /// Whether the third node, which has a power feed of its own, has the body.
    third_has_it: bool,
    taken: u8,
    /// Hand-offs of which the result was lost with a leader or a connection.
    lost_results: u8,
    /// A leader sent a final dot while another one could.
    two_at_once: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Send,
    /// The proposal reaches the leader.
    Arrive(usize),
    /// It reached nobody, and nobody will ever hear of it.
    NotTaken,
    /// The receiver hears what became of its proposal.
    Hear,
    /// It has waited long enough.
    GiveUp,
    Commit,
    Place,
    Open,
    /// The final dot, and the customer's answer to it; none if the connection is lost behind it.
    Dot {
        by_old: bool,
        answer: Option<bool>,
    },
    Settle,
    Tick,
    Heartbeat,
    /// Another node leads; so much of the tail is in its log. The one before is dead, or paused.
    Elect {
        keep: usize,
        is_dead: bool,
    },
    Transfer,
}

fn id() -> MessageId {
    MessageId::new(Tick(1_000_000), 1, 1, 1)
}

fn command(term: u8, entry: Entry) -> Option<Command> {
    let mailbox = |text: &str| Mailbox::parse(text).unwrap();
    let envelope = |from: Option<&str>, to| Envelope {
        sender: ReversePath(from.map(mailbox)),
        recipients: vec![Recipient::new(mailbox(to), false)],
        eight_bit: false,
        arrival_unix_s: 0,
        confidential: false,
    };
    let outcome = |fate| vec![Outcome { id: id(), recipient: 0, fate, reply: "so".into() }];
    match entry {
        Entry::First => None,
        Entry::Accept { .. } => {
            let envelope = envelope(Some("s@o.example"), "r@d.example");
            Some(Command::Accept { id: id(), envelope, size: 9, pieces: Vec::new() })
        }
        Entry::Withdraw => Some(Command::Withdraw { id: id() }),
        Entry::Delivered => Some(Command::Settle { outcomes: outcome(Fate::Delivered), notice: None }),
        Entry::Failed => {
            // Each leader gives its notice an id of its own.
            let id = MessageId::new(Tick(1_000_001), u64::from(term), 1, 1);
            let notice = Some(Notice { id, envelope: envelope(None, "s@o.example") });
            Some(Command::Settle { outcomes: outcome(Fate::Failed), notice })
        }
    }
}

/// The queue after these entries, and what it answered to each.
fn fold(entries: &[(u8, Entry)]) -> (Queue, Vec<Option<Answer>>) {
    let mut queue = Queue::default();
    let answers = (1..).zip(entries).map(|(index, (term, entry))| {
        let at = LogPosition { term: Term(u64::from(*term)), index: LogIndex(index) };
        let applied = queue.apply(at, &command(*term, *entry)?.encode(), 9).unwrap();
        Answer::decode(&applied.outcome)
    });
    let answers = answers.collect();
    (queue, answers)
}

impl State {
    /// The queue as the leader has it, with what it alone knows.
    fn leaders_queue(&self) -> Queue {
        let (mut queue, _) = fold(&self.log);
        queue.begin_journal();
        if self.leader.has_opened {
            queue.open(id());
        }
        for (term, entry) in &self.tail {
            if (*term, *entry) == (self.leader.term, Entry::Withdraw) {
                // It was admitted before.
                drop(queue.admit(&command(*term, *entry).unwrap().encode()));
            }
        }
        queue
    }

    fn is_ready(&self) -> bool {
        self.log.contains(&(self.leader.term, Entry::First))
    }

    fn is_placed(&self) -> bool {
        let node = |power: &str, network: &str| Placement {
            datacenter: "dc".into(),
            power: power.into(),
            network: network.into(),
        };
        // A quorum may be the two that share a power feed.
        let mut nodes = vec![node("A", "1"), node("A", "2")];
        nodes.extend(self.third_has_it.then(|| node("B", "3")));
        is_placed(&nodes)
    }

    /// The term in which the message came into the queue, if it is there.
    fn accepted_in(&self) -> Option<u8> {
        fold(&self.log).0.message(id()).map(|message| message.accepted.0 as u8)
    }

    fn may_open(&self) -> bool {
        let settles = |entry: &Entry| matches!(entry, Entry::Delivered | Entry::Failed);
        let is_under_way = self.tail.iter().any(|(_, entry)| settles(entry));
        // A message of an earlier term is scheduled always, one of its own once it is placed.
        let is_due = self.accepted_in().is_some_and(|term| term != self.leader.term || self.is_placed());
        self.is_ready()
            && self.leader.hand == Hand::Nothing
            && !is_under_way
            && is_due
            && self.leader.permits()
            && self.leaders_queue().open(id()).is_some()
    }

    /// What was asked, once its answer can be heard.
    fn heard(&self) -> Option<Answer> {
        let Receiver::Asked(asked) = self.receiver else { return None };
        let (_, answers) = fold(&self.log);
        let at = self.log.iter().rposition(|(_, entry)| *entry == asked)?;
        let answer = answers[at].clone()?;
        // A receipt comes with the placement.
        (answer != Answer::Accepted || self.is_placed()).then_some(answer)
    }

    fn hear(&mut self, answer: &Answer) {
        let Receiver::Asked(asked) = self.receiver else { return };
        self.receiver = match (asked, answer) {
            (Entry::Accept { .. }, Answer::Accepted) => Receiver::Said(Reply::Acknowledged),
            (_, Answer::Withdrawn) => Receiver::Said(Reply::NotKept),
            (Entry::Withdraw, Answer::Stands) => {
                self.network.push(Entry::Accept { again: true });
                Receiver::Asked(Entry::Accept { again: true })
            }
            _ => Receiver::Said(Reply::HungUp),
        };
    }

    /// A new leader, which has so much of the old one's tail.
    fn elect(&mut self, keep: usize) {
        self.tail.truncate(keep);
        let term = self.leader.term + 1;
        self.tail.push((term, Entry::First));
        self.leader = Leader { term, hand: Hand::Nothing, has_opened: false, silent: 0 };
    }

    /// Whether a hand-off took place that no committed entry tells of, nor one that `keep` of the tail will.
    fn loses_result(&self, keep: usize) -> bool {
        let told = |entries: &[(u8, Entry)]| entries.iter().any(|(_, entry)| *entry == Entry::Delivered);
        let in_hand = self.leader.hand == Hand::Answered { taken: true };
        in_hand || told(&self.tail) && !told(&self.tail[..keep])
    }
}

impl Leader {
    fn permits(&self) -> bool {
        let (heard, unit) = (Instant::now(), Duration::from_millis(100));
        let term = Term(u64::from(self.term));
        let lease = Lease { term, quorum_heard: heard, promise: unit * u32::from(PROMISE) };
        lease.permit(heard + unit * u32::from(self.silent)).is_some()
    }
}

/// One message.
struct Schedules;

impl Model for Schedules {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            log: vec![(1, Entry::First)],
            tail: Vec::new(),
            leader: Leader { term: 1, hand: Hand::Nothing, has_opened: false, silent: 0 },
            old: None,
            network: Vec::new(),
            receiver: Receiver::Idle,
            third_has_it: false,
            taken: 0,
            lost_results: 0,
            two_at_once: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let mut may = |condition: bool, action| actions.extend(condition.then_some(action));
        may(state.receiver == Receiver::Idle, Action::Send);
        (0..state.network.len()).for_each(|n| may(true, Action::Arrive(n)));
        if let Receiver::Asked(asked) = state.receiver {
            may(state.network.contains(&asked), Action::NotTaken);
            may(true, Action::GiveUp);
            may(state.heard().is_some(), Action::Hear);
        }
        may(!state.tail.is_empty(), Action::Commit);
        may(!state.third_has_it && state.accepted_in().is_some(), Action::Place);
        may(state.may_open(), Action::Open);
        let may_dot =
            |leader: &Leader| leader.hand == Hand::Open && leader.permits() && state.taken < TAKEN_MAX;
        for answer in [Some(true), Some(false), None] {
            may(may_dot(&state.leader), Action::Dot { by_old: false, answer });
            may(state.old.as_ref().is_some_and(may_dot), Action::Dot { by_old: true, answer });
        }
        may(matches!(state.leader.hand, Hand::Answered { .. }), Action::Settle);
        may(state.leader.silent < PROMISE, Action::Tick);
        may(state.leader.silent > 0, Action::Heartbeat);
        if state.leader.term < TERMS {
            // Nobody is elected before a quorum's promise has passed.
            for keep in 0..=state.tail.len() {
                let is_free = state.leader.silent >= PROMISE;
                may(is_free, Action::Elect { keep, is_dead: true });
                may(is_free && state.old.is_none(), Action::Elect { keep, is_dead: false });
            }
            may(state.leader.hand == Hand::Nothing && state.is_ready(), Action::Transfer);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Send => {
                state.network.push(Entry::Accept { again: false });
                state.receiver = Receiver::Asked(Entry::Accept { again: false });
            }
            Action::Arrive(n) => {
                let entry = state.network.remove(n);
                let term = state.leader.term;
                match state.leaders_queue().admit(&command(term, entry)?.encode()) {
                    Ok(()) => state.tail.push((term, entry)),
                    Err(refusal) if state.receiver == Receiver::Asked(entry) => {
                        state.hear(&Answer::decode(&refusal.outcome)?);
                    }
                    Err(_) => {}
                }
            }
            Action::NotTaken => {
                let Receiver::Asked(asked) = state.receiver else { return None };
                state.network.retain(|entry| *entry != asked);
                state.receiver = Receiver::Said(match asked {
                    Entry::Accept { again: false } => Reply::NotKept,
                    _ => Reply::HungUp,
                });
            }
            Action::Hear => state.hear(&last.heard()?),
            Action::GiveUp => {
                state.receiver = match state.receiver {
                    Receiver::Asked(Entry::Accept { again: false }) => {
                        state.network.push(Entry::Withdraw);
                        Receiver::Asked(Entry::Withdraw)
                    }
                    _ => Receiver::Said(Reply::HungUp),
                };
            }
            Action::Commit => {
                let entry = state.tail.remove(0);
                state.log.push(entry);
                state.leader.has_opened &= state.accepted_in().is_some();
            }
            Action::Place => state.third_has_it = true,
            Action::Open => (state.leader.hand, state.leader.has_opened) = (Hand::Open, true),
            Action::Dot { by_old, answer } => {
                state.taken += u8::from(answer != Some(false));
                state.two_at_once |= by_old;
                state.lost_results += u8::from(answer.is_none() || by_old && answer == Some(true));
                let leader = if by_old { state.old.as_mut()? } else { &mut state.leader };
                leader.hand = match answer {
                    Some(taken) if !by_old => Hand::Answered { taken },
                    // It learns that it leads no more when it proposes the result.
                    _ => Hand::Nothing,
                };
            }
            Action::Settle => {
                let Hand::Answered { taken } = state.leader.hand else { return None };
                let entry = if taken { Entry::Delivered } else { Entry::Failed };
                state.tail.push((state.leader.term, entry));
                state.leader.hand = Hand::Nothing;
            }
            Action::Tick => {
                state.leader.silent += 1;
                if let Some(old) = &mut state.old {
                    old.silent = (old.silent + 1).min(PROMISE);
                }
            }
            Action::Heartbeat => state.leader.silent = 0,
            Action::Elect { keep, is_dead } => {
                state.lost_results += u8::from(state.loses_result(keep));
                if !is_dead {
                    state.old = Some(state.leader);
                }
                state.elect(keep);
            }
            Action::Transfer => state.elect(state.tail.len()),
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("P1: what was acknowledged waits until it is settled", |_, state: &State| {
                let (queue, _) = fold(&state.log);
                let settled = state.log.iter().any(|(_, e)| matches!(e, Entry::Delivered | Entry::Failed));
                state.receiver != Receiver::Said(Reply::Acknowledged)
                    || queue.contains(id())
                    || settled && (state.taken > 0 || !queue.ids(None, 9).is_empty())
            }),
            Property::always("P2: what was acknowledged is placed", |_, state: &State| {
                // Told without the rule: the first two share a power feed.
                state.receiver != Receiver::Said(Reply::Acknowledged) || state.third_has_it
            }),
            Property::always("P4: a copy more only for each result that was lost", |_, state: &State| {
                state.taken <= 1 + state.lost_results
            }),
            Property::always("P4: an old leader sends no final dot", |_, state: &State| !state.two_at_once),
            Property::always("P7: what was refused is never delivered", |_, state: &State| {
                state.receiver != Receiver::Said(Reply::NotKept) || state.taken == 0
            }),
            Property::always("P7: what was refused does not wait", |_, state: &State| {
                let is_in_tail = |entry| state.tail.iter().any(|(_, e)| *e == entry);
                let (queue, _) = fold(&state.log);
                state.receiver != Receiver::Said(Reply::NotKept)
                    || !queue.contains(id())
                    || is_in_tail(Entry::Withdraw)
            }),
            Property::always("P10: one notice", |_, state: &State| {
                let (queue, _) = fold(&state.log);
                queue.ids(None, 9).iter().filter(|other| **other != id()).count() <= 1
            }),
            // What makes the above worth something.
            Property::sometimes(
                "a copy is taken twice, since a leader died behind its final dot",
                |_, state: &State| state.taken == 2 && state.lost_results == 1 && state.leader.term == 2,
            ),
            Property::sometimes(
                "a withdrawal is committed before the message it is about",
                |_, state: &State| {
                    let at = |wanted: Entry| state.log.iter().position(|(_, entry)| *entry == wanted);
                    at(Entry::Withdraw)
                        .is_some_and(|w| at(Entry::Accept { again: false }).is_some_and(|a| w < a))
                },
            ),
            Property::sometimes(
                "a withdrawal meets a message that is under way, and it is acknowledged",
                |_, state: &State| {
                    state.log.iter().any(|(_, entry)| *entry == Entry::Accept { again: true })
                        && state.receiver == Receiver::Said(Reply::Acknowledged)
                },
            ),
            Property::sometimes("a failure is told and its leader dies at once", |_, state: &State| {
                let (queue, _) = fold(&state.log);
                state.leader.term == 2 && queue.ids(None, 9).iter().any(|other| *other != id())
            }),
            Property::sometimes("a paused leader comes back with a transaction open", |_, state: &State| {
                state.old.is_some_and(|old| old.hand == Hand::Open)
            }),
        ]
    }
}

#[test]
fn p1_p4_p7_no_schedule_of_one_message_breaks_a_promise() {
    let checker = Schedules.checker().threads(2).spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
    assert!(checker.unique_state_count() > 10_000, "the model stands still");
}
