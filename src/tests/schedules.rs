//! Every schedule of one message between a sender, two or three leaders in turn and a customer, by exhaustion (stateright): acknowledgement, withdrawal and
//! delivery, with leaders that die, are paused, or hand over at any moment. What nodes know of who leads, and voters that restart: see `fencing`.
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
const PROMISE: u8 = 2;

/// An entry of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Entry {
    /// A leader's own first one.
    First,
    Accept {
        again: bool,
    },
    Withdraw,
    /// The recipient of this number has it.
    Delivered(u8),
    /// It was refused for good.
    Failed(u8),
}

/// What a leader has in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hand {
    Nothing,
    /// A transaction for a recipient is open, before its final dot.
    Open(u8),
    /// The customer has the final dot, and has taken the copy or not.
    PastDot {
        recipient: u8,
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
    hands_over: bool,
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
    /// One before it: it was paused, or has handed over.
    old: Option<Leader>,
    /// Proposals on their way to a leader.
    network: Vec<Entry>,
    receiver: Receiver,
    /// Whether the third node, which has a power feed of its own, has the body.
    third_has_it: bool,
    /// How often each recipient's copy was taken.
    taken: Vec<u8>,
    /// Of each, hand-offs of which the result was lost with a leader or a connection.
    lost_results: Vec<u8>,
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
    Open(u8),
    /// The final dot, upon which the customer takes the copy or refuses it.
    Dot {
        by_old: bool,
        taken: bool,
    },
    /// The customer's answer is read and its result proposed, unless the connection is lost before.
    Settle {
        by_old: bool,
        is_lost: bool,
    },
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

fn command(recipients: u8, term: u8, entry: Entry) -> Option<Command> {
    let mailbox = |text: &str| Mailbox::parse(text).unwrap();
    let envelope = |from: Option<&str>, to: &[String]| Envelope {
        sender: ReversePath(from.map(mailbox)),
        recipients: to.iter().map(|to| Recipient::new(mailbox(to), false)).collect(),
        eight_bit: false,
        arrival_unix_s: 0,
        confidential: false,
    };
    let outcome = |recipient: u8, fate| {
        vec![Outcome { id: id(), recipient: recipient.into(), fate, reply: "so".into() }]
    };
    match entry {
        Entry::First => None,
        Entry::Accept { .. } => {
            let to: Vec<String> = (0..recipients).map(|n| format!("r{n}@d.example")).collect();
            let envelope = envelope(Some("s@o.example"), &to);
            Some(Command::Accept { id: id(), envelope, size: 9, pieces: Vec::new() })
        }
        Entry::Withdraw => Some(Command::Withdraw { id: id() }),
        Entry::Delivered(n) => Some(Command::Settle { outcomes: outcome(n, Fate::Delivered), notice: None }),
        Entry::Failed(n) => {
            // Each leader gives its notice an id of its own.
            let id = MessageId::new(Tick(1_000_001), u64::from(term), 1, n.into());
            let notice = Some(Notice { id, envelope: envelope(None, &["s@o.example".into()]) });
            Some(Command::Settle { outcomes: outcome(n, Fate::Failed), notice })
        }
    }
}

/// The queue after these entries, and what it answered to each.
fn fold(recipients: u8, entries: &[(u8, Entry)]) -> (Queue, Vec<Option<Answer>>) {
    let mut queue = Queue::default();
    let answers = (1..).zip(entries).map(|(index, (term, entry))| {
        let at = LogPosition { term: Term(u64::from(*term)), index: LogIndex(index) };
        let applied = queue.apply(at, &command(recipients, *term, *entry)?.encode(), 9).unwrap();
        Answer::decode(&applied.outcome)
    });
    let answers = answers.collect();
    (queue, answers)
}

impl State {
    fn recipients(&self) -> u8 {
        self.taken.len() as u8
    }

    fn fold(&self) -> (Queue, Vec<Option<Answer>>) {
        fold(self.recipients(), &self.log)
    }

    /// Whether a recipient's copy is still to be handed off.
    fn is_waiting(&self, recipient: u8) -> bool {
        let message = self.fold().0.message(id());
        message.is_some_and(|m| m.pending().any(|n| n == u16::from(recipient)))
    }

    /// Whether a recipient has it, or the sender is told that he has not.
    fn is_settled(&self, recipient: u8) -> bool {
        let stands = |wanted| self.log.iter().any(|(_, entry)| *entry == wanted);
        let is_told = stands(Entry::Failed(recipient)) && self.notices() > 0;
        stands(Entry::Delivered(recipient)) && self.taken[usize::from(recipient)] > 0 || is_told
    }

    /// Notices that wait.
    fn notices(&self) -> usize {
        self.fold().0.ids(None, 9).iter().filter(|other| **other != id()).count()
    }

    /// The queue as the leader has it, with what it alone knows.
    fn leaders_queue(&self) -> Queue {
        let (mut queue, _) = self.fold();
        queue.begin_journal();
        if self.leader.has_opened {
            queue.open(id());
        }
        for (term, entry) in &self.tail {
            if (*term, *entry) == (self.leader.term, Entry::Withdraw) {
                // It was admitted before.
                drop(queue.admit(&command(self.recipients(), *term, *entry).unwrap().encode()));
            }
        }
        queue
    }

    /// The term of the last entry that the leader has applied.
    fn applied(&self) -> Option<u8> {
        self.log.last().map(|(term, _)| *term)
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
        self.fold().0.message(id()).map(|message| message.accepted.0 as u8)
    }

    fn may_open(&self, recipient: u8) -> bool {
        let results = [Entry::Delivered(recipient), Entry::Failed(recipient)];
        let is_under_way = self.tail.iter().any(|(_, entry)| results.contains(entry));
        // A message of an earlier term is scheduled always, one of its own once it is placed.
        let is_due = self.accepted_in().is_some_and(|term| term != self.leader.term || self.is_placed());
        self.leader.hand == Hand::Nothing
            && !is_under_way
            && is_due
            && self.leader.permits(self.applied())
            && self.leaders_queue().open(id()).is_some_and(|m| m.pending().any(|n| n == u16::from(recipient)))
    }

    /// What was asked, once its answer can be heard.
    fn heard(&self) -> Option<Answer> {
        let Receiver::Asked(asked) = self.receiver else { return None };
        let (_, answers) = self.fold();
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
        self.leader = Leader { term, ..Leader::FIRST };
    }

    /// Whether a hand-off took place that no committed entry tells of, nor one that `keep` of the tail will.
    fn loses_result(&self, recipient: u8, keep: usize) -> bool {
        let told = |entries: &[(u8, Entry)]| entries.iter().any(|(_, e)| *e == Entry::Delivered(recipient));
        let in_hand = self.leader.hand == Hand::PastDot { recipient, taken: true };
        in_hand || told(&self.tail) && !told(&self.tail[..keep])
    }
}

impl Leader {
    const FIRST: Leader =
        Leader { term: 1, hand: Hand::Nothing, has_opened: false, silent: 0, hands_over: false };

    fn permits(&self, applied: Option<u8>) -> bool {
        let (heard, unit) = (Instant::now(), Duration::from_millis(100));
        let term = |term: u8| Term(u64::from(term));
        let lease = Lease {
            leads: Some(term(self.term)),
            applied: applied.map(term),
            handed_over: term(if self.hands_over { self.term } else { 0 }),
            votes: true,
            quorum_heard: Some(heard),
            promise: unit * u32::from(PROMISE),
        };
        lease.permit(heard + unit * u32::from(self.silent)).is_some()
    }
}

/// One message.
struct Schedules {
    recipients: u8,
    /// Leaders in turn.
    terms: u8,
    /// Hand-offs of a copy after which a schedule is not followed any further.
    taken_max: u8,
}

impl Model for Schedules {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            log: vec![(1, Entry::First)],
            tail: Vec::new(),
            leader: Leader::FIRST,
            old: None,
            network: Vec::new(),
            receiver: Receiver::Idle,
            third_has_it: false,
            taken: vec![0; self.recipients.into()],
            lost_results: vec![0; self.recipients.into()],
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
        (0..self.recipients).for_each(|n| may(state.may_open(n), Action::Open(n)));
        let is_bounded = state.taken.iter().all(|taken| *taken < self.taken_max);
        let leaders =
            [(false, Some(state.leader), state.applied()), (true, state.old, state.old.map(|old| old.term))];
        for (by_old, leader, applied) in leaders {
            let Some(leader) = leader else { continue };
            for yes in [true, false] {
                let may_dot = matches!(leader.hand, Hand::Open(_)) && leader.permits(applied) && is_bounded;
                may(may_dot, Action::Dot { by_old, taken: yes });
                // What the old one had in hand is lost as it is.
                let is_past = matches!(leader.hand, Hand::PastDot { .. });
                may(is_past && !(by_old && yes), Action::Settle { by_old, is_lost: yes });
            }
        }
        may(state.leader.silent < PROMISE, Action::Tick);
        may(state.leader.silent > 0, Action::Heartbeat);
        if state.leader.term < self.terms {
            // Nobody is elected before a quorum's promise has passed.
            for keep in 0..=state.tail.len() {
                let is_free = state.leader.silent >= PROMISE;
                may(is_free, Action::Elect { keep, is_dead: true });
                may(is_free && state.old.is_none(), Action::Elect { keep, is_dead: false });
            }
            // Whatever is open.
            may(state.old.is_none() && state.applied() == Some(state.leader.term), Action::Transfer);
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
                match state.leaders_queue().admit(&command(self.recipients, term, entry)?.encode()) {
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
            Action::Open(n) => (state.leader.hand, state.leader.has_opened) = (Hand::Open(n), true),
            Action::Dot { by_old, taken } => {
                let leader = if by_old { state.old.as_mut()? } else { &mut state.leader };
                let Hand::Open(recipient) = leader.hand else { return None };
                leader.hand = Hand::PastDot { recipient, taken };
                state.taken[usize::from(recipient)] += u8::from(taken);
                state.two_at_once |= by_old;
            }
            Action::Settle { by_old, is_lost } => {
                let leader = if by_old { state.old.as_mut()? } else { &mut state.leader };
                let Hand::PastDot { recipient, taken } = leader.hand else { return None };
                leader.hand = Hand::Nothing;
                // What the old one had in hand was lost when another was elected.
                state.lost_results[usize::from(recipient)] += u8::from(is_lost && taken && !by_old);
                let entry = if taken { Entry::Delivered(recipient) } else { Entry::Failed(recipient) };
                // That it was taken is a fact, which any leader commits; that it was refused counts in the term alone in which it was.
                if !is_lost && (taken || !by_old) {
                    state.tail.push((state.leader.term, entry));
                }
            }
            Action::Tick => {
                state.leader.silent += 1;
                if let Some(old) = &mut state.old {
                    old.silent = (old.silent + 1).min(PROMISE);
                }
            }
            Action::Heartbeat => state.leader.silent = 0,
            Action::Elect { keep, is_dead } => {
                for n in 0..self.recipients {
                    state.lost_results[usize::from(n)] += u8::from(state.loses_result(n, keep));
                }
                if !is_dead {
                    state.old = Some(state.leader);
                }
                state.elect(keep);
            }
            Action::Transfer => {
                for n in 0..self.recipients {
                    state.lost_results[usize::from(n)] += u8::from(state.loses_result(n, state.tail.len()));
                }
                state.old = Some(Leader { hands_over: true, ..state.leader });
                state.elect(state.tail.len());
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(
                "P1: what was acknowledged waits until it is settled",
                |model: &Self, state: &State| {
                    state.receiver != Receiver::Said(Reply::Acknowledged)
                        || (0..model.recipients).all(|n| state.is_waiting(n) || state.is_settled(n))
                },
            ),
            Property::always("P2: what was acknowledged is placed", |_, state: &State| {
                // Told without the rule: the first two share a power feed.
                state.receiver != Receiver::Said(Reply::Acknowledged) || state.third_has_it
            }),
            Property::always("P4: a copy more only for each result that was lost", |_, state: &State| {
                state.taken.iter().zip(&state.lost_results).all(|(taken, lost)| *taken <= 1 + lost)
            }),
            Property::always("P4: an old leader sends no final dot", |_, state: &State| !state.two_at_once),
            Property::always("P7: what was refused is never delivered", |_, state: &State| {
                state.receiver != Receiver::Said(Reply::NotKept)
                    || state.taken.iter().all(|taken| *taken == 0)
            }),
            Property::always("P7: what was refused does not wait", |_, state: &State| {
                let is_in_tail = state.tail.iter().any(|(_, entry)| *entry == Entry::Withdraw);
                state.receiver != Receiver::Said(Reply::NotKept)
                    || !state.fold().0.contains(id())
                    || is_in_tail
            }),
            Property::always("P10: one notice for each failure", |_, state: &State| {
                let told = |n| state.log.iter().any(|(_, entry)| *entry == Entry::Failed(n));
                state.notices() <= (0..state.recipients()).filter(|n| told(*n)).count()
            }),
            // What makes the above worth something.
            Property::sometimes(
                "a copy is taken twice, since a leader died behind its final dot",
                |_, state: &State| {
                    state.taken[0] == 2 && state.lost_results[0] == 1 && state.leader.term == 2
                },
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
                state.leader.term == 2 && state.notices() > 0
            }),
            Property::sometimes("a paused leader comes back with a transaction open", |_, state: &State| {
                state.old.is_some_and(|old| matches!(old.hand, Hand::Open(_)) && !old.hands_over)
            }),
            Property::sometimes(
                "leadership is handed over with a transaction past its dot",
                |_, state: &State| {
                    state.old.is_some_and(|old| matches!(old.hand, Hand::PastDot { .. }) && old.hands_over)
                },
            ),
            Property::sometimes(
                "a copy was taken, its leader died, and a withdrawal at the next one finds that the message stands",
                |_, state: &State| {
                    state.taken[0] == 1
                        && state.lost_results[0] == 1
                        && state.old.is_none()
                        && state.log.contains(&(state.leader.term, Entry::Withdraw))
                        && state.receiver == Receiver::Asked(Entry::Accept { again: true })
                        && state.is_waiting(0)
                },
            ),
        ];
        if self.recipients > 1 {
            properties.push(Property::sometimes(
                "one of two has it, the placement never came, and the sender hears nothing",
                |_, state: &State| {
                    state.is_settled(0)
                        && state.is_waiting(1)
                        && !state.third_has_it
                        && state.receiver == Receiver::Said(Reply::HungUp)
                },
            ));
        }
        properties
    }
}

/// Goes through all of them; no promise is broken, and whatever is worth seeing was seen.
fn check(model: Schedules) {
    let (recipients, terms) = (model.recipients, model.terms);
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!("{recipients} recipients, {terms} terms: {} states", checker.unique_state_count());
    checker.assert_properties();
}

#[test]
fn p1_p4_p7_no_schedule_of_one_message_breaks_a_promise() {
    check(Schedules { recipients: 1, terms: 3, taken_max: 4 });
}

/// One of them may be settled when a placement, a leader or a reply is lost.
#[test]
fn p1_p4_p10_no_schedule_of_two_recipients_breaks_a_promise() {
    check(Schedules { recipients: 2, terms: 2, taken_max: 2 });
}
