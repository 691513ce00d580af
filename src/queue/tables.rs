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
    use super::*;

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
