//! Pure. What a checkpoint holds beside the messages, and the bytes of both. The first byte is the feature level.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use holdfast_cluster::LogIndex;
use holdfast_storage::codec::{decode_large, encode};

use super::apply::Pieces;
use super::command::Route;
use super::level::{self, Unpinned};
use super::message::{Message, MessageId, Tick};

/// What stands under a domain in the table of routes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteEntry {
    /// The route. `None` if it was removed and mail that waited for it is held.
    pub route: Option<Route>,
    /// Since when it is so.
    pub since: Tick,
    /// The log entry that made it so.
    pub made_by: LogIndex,
}

/// The small tables.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Tables {
    /// The feature level to which the cluster was raised; see [`Tables::level`].
    pub(super) raised_to: u8,
    /// Cluster time.
    pub(super) now: Tick,
    /// Ids that left the queue not long ago; true if withdrawn.
    pub(super) window: BTreeMap<MessageId, bool>,
    pub(super) routes: BTreeMap<String, RouteEntry>,
    pub(super) pieces: BTreeMap<MessageId, Pieces>,
}

/// A [`RouteEntry`] as it is written; pinned keys stand apart.
#[derive(Encode, Decode)]
struct WrittenEntry {
    route: Option<Unpinned>,
    since: Tick,
    made_by: LogIndex,
}

/// What level 2 has of the tables, in this order: time, window, routes, pieces.
type Level2 = (Tick, BTreeMap<MessageId, bool>, BTreeMap<String, WrittenEntry>, BTreeMap<MessageId, Pieces>);
/// Level 3: the same, then the cluster's level and the pinned keys by domain.
type Level3 = (Level2, u8, BTreeMap<String, Vec<[u8; 32]>>);

fn at_level<T: Encode>(level: u8, value: &T) -> Vec<u8> {
    let mut bytes = vec![level];
    bytes.extend_from_slice(&encode(value));
    bytes
}

fn of_level(what: &'static str, bytes: &[u8]) -> Result<u8, String> {
    let level = bytes.first().copied().unwrap_or(0);
    match level::is_known(level) {
        true => Ok(level),
        false => Err(format!("{what}: unknown feature level {level}; run the version that wrote it")),
    }
}

fn read<T: Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, String> {
    decode_large(what, &bytes[1..]).map_err(|e| e.to_string())
}

impl Tables {
    /// The cluster's feature level: what needs a higher one is refused.
    pub(super) fn level(&self) -> u8 {
        self.raised_to.max(level::OLDEST)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut routes = BTreeMap::new();
        let mut pins = BTreeMap::new();
        for (domain, RouteEntry { route, since, made_by }) in &self.routes {
            let split = route.as_ref().map(level::split);
            let (route, own) = split.map_or((None, Vec::new()), |(route, own)| (Some(route), own));
            routes.insert(domain, WrittenEntry { route, since: *since, made_by: *made_by });
            if !own.is_empty() {
                pins.insert(domain, own);
            }
        }
        let level2 = (&self.now, &self.window, &routes, &self.pieces);
        match self.level() {
            level::OLDEST => at_level(level::OLDEST, &level2),
            level => at_level(level::NEWEST, &(level2, level, pins)),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Tables, String> {
        const WHAT: &str = "queue tables";
        let ((now, window, routes, pieces), raised_to, mut pins): Level3 = match of_level(WHAT, bytes)? {
            level::OLDEST => (read::<Level2>(WHAT, bytes)?, 0, BTreeMap::new()),
            _ => read(WHAT, bytes)?,
        };
        let routes = routes.into_iter().map(|(domain, WrittenEntry { route, since, made_by })| {
            let pins = pins.remove(&domain).unwrap_or_default();
            let route = route.map(|route| Route { pins, ..route.into() });
            (domain, RouteEntry { route, since, made_by })
        });
        Ok(Tables { now, window, routes: routes.collect(), pieces, raised_to })
    }
}

impl Message {
    /// The message as a row of a checkpoint.
    pub(super) fn row(&self) -> Vec<u8> {
        at_level(level::OLDEST, self)
    }

    pub(super) fn from_row(bytes: &[u8]) -> Result<Message, String> {
        of_level("queue row", bytes)?;
        read("queue row", bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::{Command, Fate, Notice, Outcome, PieceRef, RouteChange, TlsMin, TlsPolicy};
    use super::super::message::{Envelope, Recipient, State};
    use super::*;
    use crate::smtp::address::{Mailbox, ReversePath};

    /// What stands in a data directory is read by every later version: these octets are never to change.
    fn holds(name: &str, octets: &[u8]) {
        let golden = include_str!("testdata/golden.txt")
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let hex: String = octets.iter().map(|octet| format!("{octet:02x}")).collect();
        assert_eq!(Some(&hex[..]), golden, "{name}");
    }

    fn route(pins: Vec<[u8; 32]>) -> Route {
        let hosts = vec![("mail.example".into(), 25), ("192.0.2.1".into(), 2525)];
        Route {
            hosts,
            tls: TlsPolicy::Verify,
            tls_min: TlsMin::Tls13,
            lifetime_ms: Some(1_296_000_000),
            pins,
        }
    }

    fn message() -> Message {
        let mailbox = |text| Mailbox::parse(text).expect("an address");
        let recipient = |text, state| Recipient {
            state,
            attempts: 300,
            last_reply: "451 later".into(),
            ..Recipient::new(mailbox(text), false)
        };
        let envelope = Envelope {
            sender: ReversePath(Some(mailbox("Ann@example.org"))),
            recipients: vec![
                recipient("bob@example.com", State::Pending),
                recipient("eve@example.com", State::Removed),
            ],
            eight_bit: true,
            arrival_unix_s: 1_790_000_000,
            confidential: true,
        };
        let id = MessageId::new(Tick(86_400_000), 3, 5, 7);
        Message {
            id,
            envelope,
            size: 70_000,
            accepted: (300, LogIndex(1 << 33)),
            bodies: vec![LogIndex(8), LogIndex(9)],
        }
    }

    #[test]
    fn golden_commands() {
        let Message { id, envelope, size, .. } = message();
        let piece = PieceRef { bytes: 70_000, digest: 0xdead_beef };
        let fates = [Fate::Delivered, Fate::Failed, Fate::Deferred, Fate::Expired, Fate::Removed];
        let outcomes =
            (0..).zip(fates).map(|(recipient, fate)| Outcome { id, recipient, fate, reply: "250 ok".into() });
        let notice = Notice {
            id: MessageId(id.0 + 1),
            envelope: Envelope { sender: ReversePath(None), ..envelope.clone() },
        };
        let change =
            |change| Command::Route { domain: "example.com".into(), change, only_if: Some(LogIndex(300)) };
        for (name, command) in [
            ("accept", Command::Accept { id, envelope: envelope.clone(), size, pieces: vec![] }),
            ("accept-of-pieces", Command::Accept { id, envelope, size, pieces: vec![piece, piece] }),
            ("piece", Command::Piece { id, seq: 300, piece }),
            ("withdraw", Command::Withdraw { id }),
            ("settle", Command::Settle { outcomes: outcomes.collect(), notice: Some(notice) }),
            ("tick", Command::Tick { now: Tick(1 << 40) }),
            ("route-set", change(RouteChange::Set(route(vec![])))),
            ("route-pinned", change(RouteChange::Set(route(vec![[7; 32]])))),
            ("route-held", change(RouteChange::Hold)),
            ("route-removed", change(RouteChange::Remove)),
            ("level", Command::Level { level: 3 }),
        ] {
            holds(name, &command.encode());
            assert_eq!(Command::decode(&command.encode()).expect("what was encoded"), command);
        }
    }

    #[test]
    fn golden_rows_and_tables() {
        let message = message();
        holds("row", &message.row());
        assert_eq!(Message::from_row(&message.row()).expect("what was encoded"), message);
        let entry = |route| RouteEntry { route, since: Tick(5), made_by: LogIndex(300) };
        let piece = PieceRef { bytes: 70_000, digest: 1 };
        let pieces = Pieces { parts: BTreeMap::from([(0, (LogIndex(300), piece))]), last: Tick(9) };
        let level2 = Tables {
            raised_to: 0,
            now: Tick(1 << 40),
            window: BTreeMap::from([(message.id, true), (MessageId(9), false)]),
            routes: BTreeMap::from([
                ("a.example".into(), entry(Some(route(vec![])))),
                ("*".into(), entry(None)),
            ]),
            pieces: BTreeMap::from([(MessageId(11), pieces)]),
        };
        let mut level3 = level2.clone();
        level3.raised_to = 3;
        level3.routes.insert("b.example".into(), entry(Some(route(vec![[7; 32], [8; 32]]))));
        for (name, tables) in [("tables-2", level2), ("tables-3", level3)] {
            holds(name, &tables.encode());
            assert_eq!(Tables::decode(&tables.encode()).expect("what was encoded"), tables);
        }
    }

    /// P1: what a checkpoint writes at the highest rate of mail is read again: four minutes of ids, at 12,000 messages a second.
    #[test]
    fn p1_a_long_window_is_read_back() {
        let window = (0..3_000_000).map(|n| (MessageId(n), n % 2 == 0)).collect();
        let tables = Tables { window, ..Tables::default() };
        assert!(Tables::decode(&tables.encode()).unwrap() == tables);
    }

    /// Without pinned keys and a raised level the tables are those that level 2 reads; with them they say that it does not.
    #[test]
    fn tables_say_who_can_read_them() {
        let entry = |pins: &[[u8; 32]]| RouteEntry {
            route: Some(Route { hosts: vec![("h".into(), 25)], pins: pins.to_vec(), ..Route::default() }),
            since: Tick(5),
            made_by: LogIndex(7),
        };
        let held = RouteEntry { route: None, ..entry(&[]) };
        let mut tables = Tables { now: Tick(9), ..Tables::default() };
        tables.routes = BTreeMap::from([("a".into(), entry(&[])), ("b".into(), held)]);
        assert_eq!(tables.encode()[0], level::OLDEST);
        assert!(Tables::decode(&tables.encode()).unwrap() == tables);
        tables.raised_to = level::NEWEST;
        tables.routes.insert("c".into(), entry(&[[3; 32], [4; 32]]));
        assert_eq!(tables.encode()[0], level::NEWEST);
        assert!(Tables::decode(&tables.encode()).unwrap() == tables);
        let mut newer = tables.encode();
        newer[0] = level::NEWEST + 1;
        assert!(Tables::decode(&newer).unwrap_err().contains("run the version that wrote it"));
    }
}
