//! Pure. Feature levels: which versions can read what is written to the replicated log and to checkpoints.
//!
//! Each command, row and table begins with the level that its reader must know, and that is the lowest which can say it: what needs
//! nothing new is read by older versions. What does need something new is refused until the cluster's level allows it, and that
//! rises, by an entry of its own, once every member knows the higher level. So a cluster can be upgraded node by node, and back
//! again until the level has risen. A node that meets a level it does not know stops; it skips nothing.
//!
//! | level | what came with it |
//! | --- | --- |
//! | 2 | all that is not named below |
//! | 3 | pinned keys of routes; the cluster's level itself |

use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};

use super::command::{Route, RouteChange, TlsMin, TlsPolicy};

/// The oldest level that is read, and the level of a cluster that was never raised.
pub const OLDEST: u8 = 2;
/// The newest level that this version knows.
pub const NEWEST: u8 = 3;
/// The level that routes with pinned keys need.
pub const PINS: u8 = 3;

/// Whether this version reads what was written at a level.
pub fn is_known(level: u8) -> bool {
    (OLDEST..=NEWEST).contains(&level)
}

/// A route of level 2.
#[derive(Clone, Encode, Decode)]
pub(super) struct Unpinned {
    hosts: Vec<(String, u16)>,
    tls: TlsPolicy,
    tls_min: TlsMin,
    lifetime_ms: Option<u64>,
}

impl From<Unpinned> for Route {
    fn from(route: Unpinned) -> Route {
        let Unpinned { hosts, tls, tls_min, lifetime_ms } = route;
        Route { hosts, tls, tls_min, lifetime_ms, pins: Vec::new() }
    }
}

/// A change as it is written. The order is a promise.
#[derive(Encode, Decode)]
enum Written {
    Set(Unpinned),
    Hold,
    Remove,
    SetPinned(Unpinned, Vec<[u8; 32]>),
}

/// What level 2 has of a route, and its pinned keys.
pub(super) fn split(route: &Route) -> (Unpinned, Vec<[u8; 32]>) {
    let Route { hosts, tls, tls_min, lifetime_ms, pins } = route.clone();
    (Unpinned { hosts, tls, tls_min, lifetime_ms }, pins)
}

impl Encode for RouteChange {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        let written = match self {
            RouteChange::Set(route) => match split(route) {
                (route, pins) if pins.is_empty() => Written::Set(route),
                (route, pins) => Written::SetPinned(route, pins),
            },
            RouteChange::Hold => Written::Hold,
            RouteChange::Remove => Written::Remove,
        };
        written.encode(encoder)
    }
}

impl<Context> Decode<Context> for RouteChange {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<RouteChange, DecodeError> {
        Ok(match Written::decode(decoder)? {
            Written::Set(route) => RouteChange::Set(route.into()),
            Written::Hold => RouteChange::Hold,
            Written::Remove => RouteChange::Remove,
            Written::SetPinned(route, pins) => RouteChange::Set(Route { pins, ..route.into() }),
        })
    }
}

bincode::impl_borrow_decode!(RouteChange);

/// The level that a change needs.
pub fn of_change(change: &RouteChange) -> u8 {
    match change {
        RouteChange::Set(route) if !route.pins.is_empty() => PINS,
        RouteChange::Set(_) | RouteChange::Hold | RouteChange::Remove => OLDEST,
    }
}
