//! Pure. What operators' programs and nodes say to each other: one JSON object a line over mutual TLS; a request, then any
//! number of items, then an end.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::queue::command::TlsMin;

/// Longest line.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// The name that the certificate of an operator carries.
pub const OPERATOR_NAME: &str = "operator.holdfast.internal";

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How the cluster is.
    Status,
    /// Sets a route.
    RouteSet {
        /// The domain, `.domain` or `*`.
        domain: String,
        /// Hosts with ports; empty for the MX.
        to: Vec<(String, u16)>,
        /// Word of the TLS policy.
        tls: String,
        /// The oldest TLS version, `1.2` or `1.3`.
        tls_min: TlsMin,
        /// Own lifetime.
        lifetime_ms: Option<u64>,
        /// SHA-256 of pinned keys, in hexadecimal.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pins: Vec<String>,
    },
    /// Lists routes.
    RouteList,
    /// Removes a route.
    RouteRemove {
        /// The domain.
        domain: String,
        /// What becomes of mail that waits for it.
        waiting: Waiting,
    },
    /// Lists messages.
    QueueList(Selector),
    /// Tries what waits, now.
    QueueRetry(Selector),
    /// Removes messages without a notice.
    QueueRemove {
        /// Which.
        selector: Selector,
        /// Only counts.
        dry_run: bool,
    },
    /// Brings a node into the cluster.
    ClusterAdd(NewMember),
    /// Takes a node out of the cluster.
    ClusterRemove {
        /// Its id.
        id: u64,
        /// Also if too few nodes answer then.
        force: bool,
    },
    /// Hands leadership over.
    ClusterTransfer {
        /// To this node; to the one whose log is freshest if not said.
        to: Option<u64>,
    },
}

/// A node that is to come in.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct NewMember {
    /// Its id, which was never used.
    pub id: u64,
    /// Where its peers reach it, `HOST:PORT`.
    pub address: String,
    /// Where operators reach it, `HOST:PORT`.
    pub admin: String,
    /// Label of its datacenter; the leader's if not said.
    pub datacenter: Option<String>,
    /// Label of its power feed.
    pub power: String,
    /// Label of its network.
    pub network: String,
    /// Also if too few nodes answer then.
    pub force: bool,
}

/// What becomes of mail whose route is removed.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Waiting {
    /// If there is any the route stays.
    #[default]
    Refuse,
    /// It is held until there is a route again.
    Hold,
    /// It is returned to its senders.
    Bounce,
}

/// Which messages.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Selector {
    /// This one.
    pub id: Option<String>,
    /// With a recipient of this domain.
    pub to_domain: Option<String>,
    /// From this address.
    pub from: Option<String>,
    /// Older than this.
    pub older_than_ms: Option<u64>,
    /// In this state.
    pub state: Option<String>,
    /// Every one.
    pub all: bool,
}

/// What a node says of its part in mail.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct About {
    /// The addresses from which it delivers when it leads.
    pub egress: Vec<IpAddr>,
    /// Why it takes no mail, if so.
    pub why_not: Option<String>,
    /// How far its search for rot has come.
    #[serde(default)]
    pub scrub: Option<Scrub>,
    /// What its log is sealed with.
    #[serde(default)]
    pub at_rest: Option<AtRest>,
    /// The newest feature level that it knows; see [`crate::queue::level`].
    #[serde(default)]
    pub level: u8,
    /// If it leads: how many messages are held, and how many of them were tried before.
    #[serde(default)]
    pub held: Option<(usize, usize)>,
}

/// What a node's log is sealed with; see `[storage] key_file`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct AtRest {
    /// The id of the key that seals, if there is one.
    pub key: Option<String>,
    /// Octets of segments that hold something which that key did not seal.
    pub other_key_bytes: u64,
}

/// A node's search for rot in what it holds; see `[storage] scrub_rate`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Scrub {
    /// Times that everything was read since its start.
    pub passes: u64,
    /// How much of this pass is done.
    pub percent: u64,
    /// Octets read since its start.
    pub bytes: u64,
    /// Damaged places found since its start.
    pub damaged: u64,
    /// Bodies that are still to be fetched from other nodes.
    pub to_mend: u64,
    /// How long the last whole pass took.
    pub last_pass_s: Option<u64>,
}

/// A line of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Something that was asked for.
    Item(serde_json::Value),
    /// Nothing follows.
    End {
        /// Why it failed, if it did.
        error: Option<Failure>,
    },
}

/// Why a request failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// For people.
    pub text: String,
    /// The outcome is unknown: exit status 3.
    pub unknown: bool,
}
