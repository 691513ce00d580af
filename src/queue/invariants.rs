//! Pure. What is always true of the queue, checked after every step in tests and debug builds.
//!
//! * P1: a message in the queue has a pending recipient; a settled one is not in the queue.
//! * P3: each body belongs to one message or one set of pieces, so that erasing one takes nothing from another.
//! * An id is in the queue or in the window, never in both.

use super::apply::Queue;
use super::message::Message;

impl Queue {
    /// The cheap part, after every command.
    pub(super) fn check_touched(&self) {
        self.messages.newest().into_iter().for_each(|message| self.check_message(message));
    }

    fn check_message(&self, message: &Message) {
        let id = message.id;
        assert!(message.pending().next().is_some(), "{id} has nobody left to deliver to");
        assert!(!self.tables.window.contains_key(&id), "{id} is queued and settled at once");
    }

    /// All of it.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        use super::Totals;
        let mut seen = std::collections::BTreeSet::new();
        let pieces = self.tables.pieces.values().flat_map(|p| p.parts.values().map(|(index, _)| *index));
        pieces.for_each(|index| assert!(seen.insert(index), "body {index} belongs to two"));
        let mut totals = Totals::default();
        let each = self.messages.all().each(|message| {
            for index in &message.bodies {
                assert!(seen.insert(*index), "body {index} belongs to two");
            }
            self.check_message(message);
            totals.messages += 1;
            totals.bytes += message.size;
            totals.deferred += message.is_deferred() as usize;
        });
        assert!(each.is_ok(), "a row is unreadable");
        assert_eq!(self.totals(), totals);
        let parts = self.tables.pieces.values().flat_map(|p| p.parts.values());
        assert_eq!(self.piece_bytes, parts.map(|(_, p)| p.bytes as u64).sum::<u64>());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use holdfast_cluster::{Bytes, LogIndex, LogPosition, Machine, ReadError, Rows, Step, Term};
    use proptest::prelude::*;

    use super::*;
    use crate::queue::Change;
    use crate::queue::command::{Answer, Command, Fate, Notice, Outcome, PieceRef};
    use crate::queue::message::{Envelope, MessageId, Recipient, Tick};
    use crate::smtp::address::{Mailbox, ReversePath};

    fn envelope(recipients: usize) -> Envelope {
        let recipients = (0..recipients)
            .map(|n| Recipient::new(Mailbox::parse(&format!("r{n}@d.example")).unwrap(), false));
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

    /// Rows as a log would have them.
    #[derive(Clone, Default)]
    struct Checkpointed(Arc<Mutex<BTreeMap<u128, Bytes>>>);

    impl Checkpointed {
        fn write(&self, rows: Vec<(u128, Vec<u8>)>, gone: Vec<u128>) {
            let mut all = self.0.lock().unwrap();
            all.extend(rows.into_iter().map(|(key, row)| (key, row.into())));
            gone.iter().for_each(|key| drop(all.remove(key)));
        }
    }

    impl Rows for Checkpointed {
        fn contains(&self, key: u128) -> bool {
            self.0.lock().unwrap().contains_key(&key)
        }

        fn get(&self, key: u128) -> Result<Option<Bytes>, ReadError> {
            Ok(self.0.lock().unwrap().get(&key).cloned())
        }

        fn read(&self, keys: &[u128]) -> Result<Vec<(u128, Bytes)>, ReadError> {
            let all = self.0.lock().unwrap();
            Ok(keys.iter().filter_map(|key| Some((*key, all.get(key)?.clone()))).collect())
        }

        fn keys(&self, after: Option<u128>, max: usize) -> Vec<u128> {
            let from = after.map_or(0, |after| after + 1);
            self.0.lock().unwrap().range(from..).take(max).map(|(key, _)| *key).collect()
        }
    }

    fn all(queue: &Queue) -> BTreeMap<MessageId, Message> {
        let mut found = BTreeMap::new();
        queue.messages.all().each(|m| drop(found.insert(m.id, m.clone()))).unwrap();
        found
    }

    /// A state's rows, and the bodies that it needs.
    fn read(steps: holdfast_cluster::Steps) -> (Vec<(u128, Vec<u8>)>, std::collections::BTreeSet<LogIndex>) {
        let steps: Vec<Step> = steps.map(|step| step.unwrap()).collect();
        let bodies = steps.iter().flat_map(|step| step.bodies.iter().copied()).collect();
        (steps.into_iter().flat_map(|step| step.rows).collect(), bodies)
    }

    fn restore(queue: &mut Queue, tables: &[u8]) {
        let reading = queue.reading();
        queue.restore(reading(tables).unwrap());
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
            let applied = self.queue.apply(at, &command.encode(), body_bytes).unwrap();
            self.bodies.retain(|index| !applied.erase.contains(index));
            self.queue.check();
            assert_eq!(self.bodies, read(self.queue.whole().steps).1, "every body is live or erased");
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
        let route = crate::queue::command::Route { hosts: vec![("h".into(), 25)], ..Default::default() };
        for domain in ["*", "a.example", ".b.example"] {
            let change = crate::queue::command::RouteChange::Set(route.clone());
            w.apply(Command::Route { domain: domain.into(), change, only_if: None }, 0);
        }
        let name = |domain| w.queue.route(domain).map(|(name, _)| name.to_string());
        assert_eq!(name("a.example").as_deref(), Some("a.example"));
        assert_eq!(name("x.b.example").as_deref(), Some(".b.example"));
        assert_eq!(name("b.example").as_deref(), Some("*"));
    }

    /// Who acts on what he saw does not undo what another did since.
    #[test]
    fn a_change_to_a_route_counts_only_if_the_route_is_still_that() {
        use crate::queue::command::RouteChange::{Hold, Remove};
        let mut w = World::new();
        let route = |w: &mut World, change, only_if| {
            w.apply(Command::Route { domain: "a.example".into(), change, only_if }, 0)
        };
        let made_by = |w: &World| w.queue.routes().get("a.example").map(|entry| entry.made_by);
        assert_eq!(route(&mut w, Remove, Some(LogIndex(1))), Answer::Changed, "there is none");
        assert_eq!(route(&mut w, Hold, None), Answer::Done);
        let first = made_by(&w);
        assert_eq!(route(&mut w, Hold, None), Answer::Done);
        assert_eq!(route(&mut w, Remove, first), Answer::Changed);
        let second = made_by(&w);
        assert!(second.is_some() && second != first);
        assert_eq!(route(&mut w, Remove, second), Answer::Done);
        assert_eq!(made_by(&w), None);
    }

    /// What older versions cannot read is not written before all members can, and is read back once it is.
    #[test]
    fn pinned_keys_wait_for_the_clusters_level() {
        use crate::queue::command::{Route, RouteChange};
        let mut w = World::new();
        let route = Route { hosts: vec![("h".into(), 25)], pins: vec![[7; 32]], ..Route::default() };
        let set = |route: &Route| Command::Route {
            domain: "a.example".into(),
            change: RouteChange::Set(route.clone()),
            only_if: None,
        };
        let plain = Route { pins: Vec::new(), ..route.clone() };
        assert_eq!((set(&plain).encode()[0], set(&route).encode()[0]), (2, 3));
        assert!(
            w.queue.admit(&set(&route).encode()).is_err() && w.queue.admit(&set(&plain).encode()).is_ok()
        );
        assert_eq!(w.apply(set(&route), 0), Answer::LevelTooLow);
        assert!(w.queue.routes().is_empty());
        let level = crate::queue::level::PINS;
        assert_eq!(w.apply(Command::Level { level }, 0), Answer::Done);
        assert!(w.queue.admit(&set(&route).encode()).is_ok());
        assert_eq!(w.apply(set(&route), 0), Answer::Done);
        assert_eq!(w.queue.routes()["a.example"].route, Some(route));
        assert_eq!(w.apply(Command::Level { level: 2 }, 0), Answer::Done);
        assert_eq!(w.queue.level(), level, "it never falls");
    }

    /// What another version wrote is not skipped: accepted mail would be missing here and nowhere else.
    #[test]
    fn p1_a_command_of_another_version_stops_the_node() {
        let mut queue = Queue::default();
        let mut command = Command::Tick { now: Tick(1) }.encode();
        let at = LogPosition { term: Term(1), index: LogIndex(1) };
        assert!(queue.apply(at, &command, 0).is_ok());
        command[0] = crate::queue::level::NEWEST + 1;
        assert!(queue.apply(at, &command, 0).is_err());
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

    /// The schedule of a spilled message: written by one checkpoint, let go of at the next, back in memory when it changes.
    #[test]
    fn p1_a_message_that_outlives_two_checkpoints_leaves_memory_and_not_the_queue() {
        let mut w = World::new();
        let rows = Checkpointed::default();
        w.queue.attach(Arc::new(rows.clone()));
        let checkpoint = |w: &mut World| {
            let delta = w.queue.delta();
            rows.write(delta.rows, delta.gone);
            w.queue.checkpointed()
        };
        w.accept(1, 2);
        assert_eq!((checkpoint(&mut w), w.queue.messages.young()), (vec![], 1));
        assert_eq!((checkpoint(&mut w), w.queue.messages.young()), (vec![id(1).0], 0));
        assert_eq!(w.queue.message(id(1)).unwrap().pending().count(), 2);
        w.settle(1, 0, Fate::Deferred, None);
        assert_eq!((w.queue.messages.young(), w.queue.totals().deferred), (1, 1));
        checkpoint(&mut w);
        checkpoint(&mut w);
        assert_eq!(w.queue.messages.young(), 0);
        w.settle(1, 0, Fate::Delivered, None);
        w.settle(1, 1, Fate::Delivered, None);
        assert!(
            w.queue.message(id(1)).is_none() && rows.contains(id(1).0),
            "its row is masked until the next checkpoint"
        );
        assert_eq!(w.accept(1, 2), Answer::Accepted, "and it is known as settled");
        assert_eq!(w.queue.totals(), Default::default());
        checkpoint(&mut w);
        assert!(!rows.contains(id(1).0));
    }

    proptest! {
        /// A leader hears of each message once, from its survey or from the journal, whatever comes between the steps; and again of one
        /// that a connection lets go of.
        #[test]
        fn p1_a_survey_and_the_journal_tell_of_each_message(steps in prop::collection::vec((0u16..40, 0u8..4), 1..80)) {
            let mut w = World::new();
            for n in 0..10 {
                w.accept(n * 4, 1);
            }
            w.queue.begin_journal();
            let mut told: BTreeMap<MessageId, usize> = BTreeMap::new();
            let mut let_go: BTreeMap<MessageId, usize> = BTreeMap::new();
            let tell = |told: &mut BTreeMap<MessageId, usize>, id| *told.entry(id).or_default() += 1;
            for (n, what) in steps.into_iter().chain((0..60).map(|_| (0, 2))) {
                match what {
                    0 => drop(w.accept(n, 1)),
                    // In the hands of a connection until now, so that what was told of it before does not count.
                    1 if w.queue.contains(id(n)) => {
                        told.insert(id(n), 0);
                        w.queue.reschedule(id(n));
                        *let_go.entry(id(n)).or_default() += 1;
                    }
                    2 => {
                        let page = w.queue.survey(3).map(|page| page.read()).unwrap_or_default();
                        page.iter().for_each(|message| tell(&mut told, message.id));
                    }
                    _ => {}
                }
                for change in w.queue.take_journal() {
                    if let Change::Added(id) = change {
                        tell(&mut told, id);
                    }
                }
            }
            for id in all(&w.queue).into_keys() {
                prop_assert_eq!(told.get(&id), Some(&1), "{} was let go of {:?} times", id, let_go.get(&id));
            }
        }

        /// A queue that spills, restarts and moves by snapshot at any point is the queue that keeps everything in memory.
        #[test]
        fn p1_a_queue_that_spills_is_the_same_queue(steps in prop::collection::vec((0u16..12, 0u8..12), 1..120)) {
            let mut plain = World::new();
            let mut w = World::new();
            let mut rows = Checkpointed::default();
            let empty = w.queue.tables.encode();
            w.queue.attach(Arc::new(rows.clone()));
            let mut under_way = None;
            // The newest complete checkpoint's tables and body indexes, and the commands since.
            let mut base = (empty, 0, w.bodies.clone());
            let mut since: Vec<(Command, u32)> = Vec::new();
            for (n, what) in steps {
                let command = |what: u8| {
                    let outcome = |recipient, fate| Outcome { id: id(n), recipient, fate, reply: "x".into() };
                    let settle = |o, notice| Command::Settle { outcomes: vec![o], notice };
                    Some(match what {
                        0..=2 => {
                            let envelope = envelope(1 + n as usize % 3);
                            (Command::Accept { id: id(n), envelope, size: 9, pieces: vec![] }, 9)
                        }
                        3 => (settle(outcome(n % 3, Fate::Delivered), None), 0),
                        4 => (settle(outcome(0, Fate::Deferred), None), 0),
                        5 => {
                            let notice = Notice { id: id(100 + n), envelope: envelope(1) };
                            (settle(outcome(0, Fate::Failed), Some(notice)), 5)
                        }
                        6 => (Command::Withdraw { id: id(n) }, 0),
                        _ => return None,
                    })
                };
                match (command(what), what) {
                    (Some((command, bytes)), _) => {
                        let answer = plain.apply(command.clone(), bytes);
                        prop_assert_eq!(w.apply(command.clone(), bytes), answer);
                        since.push((command, bytes));
                    }
                    // A checkpoint is begun, or the one under way is complete.
                    (None, 7..=9) => match under_way.take() {
                        None => {
                            let done = since.len();
                            under_way = Some((w.queue.delta(), done, w.index, w.bodies.clone()));
                        }
                        Some((delta, done, index, bodies)) => {
                            rows.write(delta.rows, delta.gone);
                            base = (delta.tables, index, bodies);
                            since.drain(..done);
                            // The machine hears of it later.
                            prop_assert_eq!(all(&w.queue), all(&plain.queue), "the rows are there, the news is not");
                            w.queue.checkpointed();
                        }
                    },
                    // A restart: the newest complete checkpoint, and what came since once more.
                    (None, 10) => {
                        under_way = None;
                        w.queue = Queue::default();
                        w.queue.attach(Arc::new(rows.clone()));
                        restore(&mut w.queue, &base.0);
                        (w.index, w.bodies) = (base.1, base.2.clone());
                        for (command, bytes) in &since {
                            w.apply(command.clone(), *bytes);
                        }
                    }
                    // A snapshot goes to another node, which has rows of its own, and writes it as a checkpoint.
                    (None, _) => {
                        under_way = None;
                        let whole = w.queue.whole();
                        let (found, _) = read(whole.steps);
                        let own = Checkpointed::default();
                        own.write(vec![(id(n).0, vec![1]), (id(500).0, vec![2])], vec![]);
                        w.queue = Queue::default();
                        w.queue.attach(Arc::new(own.clone()));
                        own.0.lock().unwrap().clear();
                        own.write(found, vec![]);
                        restore(&mut w.queue, &whole.tables);
                        base = (whole.tables, w.index, w.bodies.clone());
                        rows = own;
                        since.clear();
                    }
                }
                w.queue.check();
                prop_assert_eq!(all(&w.queue), all(&plain.queue));
                let page: Vec<MessageId> = w.queue.page(None, 100).read().iter().map(|m| m.id).collect();
                prop_assert_eq!(page, plain.queue.ids(None, 100));
                prop_assert_eq!(&w.queue.tables, &plain.queue.tables);
                let step: Vec<MessageId> = plain.queue.ids(Some(id(3)), 4);
                prop_assert_eq!(w.queue.ids(Some(id(3)), 4), step);
            }
        }
    }
}
