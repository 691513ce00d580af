//! Pure. What is always true of the queue, checked after every step in tests and debug builds.
//!
//! * P1: a message in the queue has a pending recipient; a settled one is not in the queue.
//! * P3: each body belongs to one message or one set of pieces, so that erasing one takes nothing from another.
//! * An id is in the queue or in the window, never in both.

use super::apply::Queue;

impl Queue {
    /// The cheap part, after every command.
    pub(super) fn check_touched(&self) {
        if let Some((id, message)) = self.messages.last_key_value() {
            assert!(message.pending().next().is_some(), "{id} has nobody left to deliver to");
            assert!(!self.tables.window.contains_key(id), "{id} is queued and settled at once");
        }
    }

    /// All of it.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let mut seen = std::collections::BTreeSet::new();
        let pieces = self.tables.pieces.values().flat_map(|p| p.parts.values().map(|(index, _)| *index));
        for index in self.messages.values().flat_map(|m| m.bodies.iter().copied()).chain(pieces) {
            assert!(seen.insert(index), "body {index} belongs to two");
        }
        for (id, message) in &self.messages {
            assert!(message.pending().next().is_some(), "{id} has nobody left to deliver to");
            assert!(!self.tables.window.contains_key(id), "{id} is queued and settled at once");
        }
        assert_eq!(self.bytes, self.messages.values().map(|m| m.size).sum::<u64>());
        let parts = self.tables.pieces.values().flat_map(|p| p.parts.values());
        assert_eq!(self.piece_bytes, parts.map(|(_, p)| p.bytes as u64).sum::<u64>());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use holdfast_cluster::{Bytes, LogIndex, LogPosition, Machine, Term};
    use proptest::prelude::*;

    use super::*;
    use crate::queue::command::{Answer, Command, Fate, Notice, Outcome, PieceRef};
    use crate::queue::message::{Envelope, MessageId, Recipient, Tick};
    use crate::smtp::address::{Mailbox, ReversePath};

    fn envelope(recipients: usize) -> Envelope {
        let recipients =
            (0..recipients).map(|n| Recipient::new(Mailbox::parse(&format!("r{n}@d.example")).unwrap()));
        let sender = ReversePath(Some(Mailbox::parse("s@o.example").unwrap()));
        Envelope {
            sender,
            recipients: recipients.collect(),
            eight_bit: false,
            arrival_unix_s: 0,
            confidential: false,
        }
    }

    fn id(n: u16) -> MessageId {
        MessageId::new(Tick(1_000_000), 1, 1, n)
    }

    struct World {
        queue: Queue,
        index: u64,
        term: u64,
        /// Bodies that a node would still hold.
        bodies: std::collections::BTreeSet<LogIndex>,
    }

    impl World {
        fn new() -> World {
            World { queue: Queue::default(), index: 0, term: 1, bodies: Default::default() }
        }

        fn apply(&mut self, command: Command, body_bytes: u32) -> Answer {
            self.index += 1;
            let at = LogPosition { term: Term(self.term), index: LogIndex(self.index) };
            if body_bytes > 0 {
                self.bodies.insert(at.index);
            }
            let applied = self.queue.apply(at, &command.encode(), body_bytes);
            self.bodies.retain(|index| !applied.erase.contains(index));
            self.queue.check();
            assert_eq!(self.bodies, self.queue.live_bodies(), "every body is live or erased");
            Answer::decode(&applied.outcome).unwrap()
        }

        fn accept(&mut self, n: u16, recipients: usize) -> Answer {
            let command =
                Command::Accept { id: id(n), envelope: envelope(recipients), size: 9, pieces: vec![] };
            self.apply(command, 9)
        }

        fn settle(&mut self, n: u16, recipient: u16, fate: Fate, notice: Option<u16>) -> Answer {
            let outcome = Outcome { id: id(n), recipient, fate, reply: "x".into() };
            let notice = notice.map(|n| Notice { id: id(n), envelope: envelope(1) });
            let body = if notice.is_some() { 5 } else { 0 };
            self.apply(Command::Settle { outcomes: vec![outcome], notice }, body)
        }
    }

    #[test]
    fn p1_a_message_leaves_with_its_last_recipient_and_never_comes_back() {
        let mut w = World::new();
        assert_eq!(w.accept(1, 2), Answer::Accepted);
        w.settle(1, 0, Fate::Delivered, None);
        assert!(w.queue.message(id(1)).is_some());
        w.settle(1, 1, Fate::Delivered, None);
        assert!(w.queue.message(id(1)).is_none());
        assert_eq!(w.accept(1, 2), Answer::Accepted, "proposed again, it counts as taken");
        assert!(w.queue.message(id(1)).is_none(), "and is not queued a second time");
    }

    #[test]
    fn p6_withdrawn_before_or_after_the_accept_it_never_comes() {
        let mut w = World::new();
        assert_eq!(w.apply(Command::Withdraw { id: id(1) }, 0), Answer::Withdrawn);
        assert_eq!(w.accept(1, 1), Answer::Withdrawn, "a late Accept meets the tombstone");
        w.accept(2, 1);
        assert_eq!(w.apply(Command::Withdraw { id: id(2) }, 0), Answer::Withdrawn);
        w.accept(3, 1);
        w.term = 2;
        assert_eq!(
            w.apply(Command::Withdraw { id: id(3) }, 0),
            Answer::Stands,
            "another term's leader may deliver it"
        );
        w.accept(4, 2);
        w.settle(4, 0, Fate::Delivered, None);
        assert_eq!(w.apply(Command::Withdraw { id: id(4) }, 0), Answer::Stands, "it was started");
    }

    #[test]
    fn p7_what_is_being_withdrawn_is_not_opened_and_what_is_opened_not_withdrawn() {
        let mut w = World::new();
        w.queue.begin_journal();
        w.accept(1, 1);
        w.accept(2, 1);
        assert!(w.queue.open(id(1)).is_some());
        assert!(w.queue.admit(&Command::Withdraw { id: id(1) }.encode()).is_err());
        assert!(w.queue.admit(&Command::Withdraw { id: id(2) }.encode()).is_ok());
        assert!(w.queue.open(id(2)).is_none());
    }

    #[test]
    fn p10_a_notice_is_neither_lost_nor_doubled() {
        let mut w = World::new();
        w.accept(1, 1);
        w.settle(1, 0, Fate::Failed, Some(50));
        assert!(w.queue.message(id(50)).is_some());
        w.settle(1, 0, Fate::Failed, Some(51));
        assert!(w.queue.message(id(51)).is_none(), "the same failure told again makes no second notice");
    }

    /// A message that was accepted, handed off and forgotten is not said to be "certainly not kept".
    #[test]
    fn p6_a_withdrawal_of_what_is_forgotten_says_nothing() {
        let mut w = World::new();
        w.accept(1, 1);
        w.settle(1, 0, Fate::Delivered, None);
        w.apply(Command::Tick { now: Tick(1_000_001 + crate::queue::apply::WINDOW_MS) }, 0);
        assert_eq!(w.apply(Command::Withdraw { id: id(1) }, 0), Answer::TooOld);
    }

    #[test]
    fn a_route_is_known_by_its_name_and_not_by_its_value() {
        let mut w = World::new();
        let route = crate::queue::command::Route {
            hosts: vec![("h".into(), 25)],
            tls: Default::default(),
            lifetime_ms: None,
        };
        for domain in ["*", "a.example", ".b.example"] {
            w.apply(Command::Route { domain: domain.into(), route: Some(route.clone()) }, 0);
        }
        let name = |domain| w.queue.route_entry(domain).map(|(name, _)| name.to_string());
        assert_eq!(name("a.example").as_deref(), Some("a.example"));
        assert_eq!(name("x.b.example").as_deref(), Some(".b.example"));
        assert_eq!(name("b.example").as_deref(), Some("*"));
    }

    #[test]
    fn an_id_older_than_the_window_is_refused() {
        let mut w = World::new();
        w.apply(Command::Tick { now: Tick(1_000_001 + crate::queue::apply::WINDOW_MS) }, 0);
        assert_eq!(w.accept(1, 1), Answer::TooOld);
    }

    #[test]
    fn a_slow_client_of_a_large_message_is_no_reason_to_refuse_it() {
        let mut w = World::new();
        let piece = PieceRef { bytes: 10, digest: 1 };
        let tick =
            |windows: u64| Command::Tick { now: Tick(1_000_001 + windows * crate::queue::apply::WINDOW_MS) };
        w.apply(tick(0), 0);
        w.apply(Command::Piece { id: id(1), seq: 0, piece }, 10);
        w.apply(tick(1), 0);
        w.apply(Command::Piece { id: id(1), seq: 1, piece }, 10);
        w.apply(tick(2), 0);
        let accept =
            Command::Accept { id: id(1), envelope: envelope(1), size: 20, pieces: vec![piece, piece] };
        assert_eq!(w.apply(accept, 0), Answer::Accepted);
    }

    #[test]
    fn pieces_must_be_what_the_accept_names() {
        let mut w = World::new();
        let piece = |bytes, digest| PieceRef { bytes, digest };
        let send = |w: &mut World, n: u16, seq, p: PieceRef| {
            w.apply(Command::Piece { id: id(n), seq, piece: p }, p.bytes)
        };
        let accept = |w: &mut World, n: u16, pieces: Vec<PieceRef>| {
            let size = pieces.iter().map(|p| p.bytes as u64).sum();
            w.apply(Command::Accept { id: id(n), envelope: envelope(1), size, pieces }, 0)
        };
        send(&mut w, 1, 0, piece(10, 1));
        send(&mut w, 1, 1, piece(20, 2));
        send(&mut w, 1, 1, piece(20, 2));
        assert_eq!(accept(&mut w, 1, vec![piece(10, 1), piece(20, 2)]), Answer::Accepted);
        send(&mut w, 2, 0, piece(10, 1));
        assert_eq!(accept(&mut w, 2, vec![piece(10, 7)]), Answer::PiecesMissing);
        send(&mut w, 3, 0, piece(10, 1));
        w.apply(Command::Tick { now: Tick(1 + crate::queue::apply::ORPHAN_MS) }, 0);
        assert!(w.queue.tables.pieces.is_empty(), "orphans die by a committed rule");
    }

    proptest! {
        /// A checkpoint at any point, folded from deltas alone, is the same queue.
        #[test]
        fn p1_deltas_fold_to_the_queue(steps in prop::collection::vec((0u16..12, 0u8..6), 1..80)) {
            let mut w = World::new();
            let mut rows: BTreeMap<u128, Bytes> = BTreeMap::new();
            for (n, what) in steps {
                match what {
                    0 | 1 => drop(w.accept(n, 1 + n as usize % 3)),
                    2 => drop(w.settle(n, n % 3, Fate::Delivered, None)),
                    3 => drop(w.settle(n, 0, Fate::Failed, Some(100 + n))),
                    4 => drop(w.apply(Command::Withdraw { id: id(n) }, 0)),
                    _ => {
                        let delta = w.queue.delta();
                        rows.extend(delta.rows.into_iter().map(|(k, v)| (k, v.into())));
                        delta.gone.iter().for_each(|k| drop(rows.remove(k)));
                        let mut folded = Queue::default();
                        folded.restore(&delta.tables, &rows).unwrap();
                        folded.check();
                        prop_assert_eq!(&folded.messages, &w.queue.messages);
                        prop_assert_eq!(&folded.tables, &w.queue.tables);
                    }
                }
            }
        }
    }
}
