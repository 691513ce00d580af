//! Pure. The commands of the replicated queue, and their bytes: a feature level (1 byte, see `level`), then bincode. What is written
//! here is read by every later version.

use bincode::{Decode, Encode};
use holdfast_cluster::LogIndex;
use holdfast_storage::codec::{CodecError, decode, encode};
use serde::{Deserialize, Serialize};

use super::level;
use super::message::{Envelope, MessageId, Tick};

/// Most recipients of one message (RFC 5321 §4.5.3.1.8 asks for at least 100).
pub const RECIPIENTS_MAX: usize = 1000;

/// A piece of a large message, as the accepting entry names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct PieceRef {
    /// Its length in octets.
    pub bytes: u32,
    /// CRC-32 of its octets.
    pub digest: u32,
}

/// How a recipient's attempt ended.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum Fate {
    /// The destination took it.
    Delivered,
    /// Refused for good.
    Failed,
    /// Put off.
    Deferred,
    /// Too old.
    Expired,
    /// An operator's word.
    Removed,
}

/// What became of one recipient.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Outcome {
    /// The message.
    pub id: MessageId,
    /// Number of the recipient.
    pub recipient: u16,
    /// What became of it.
    pub fate: Fate,
    /// The destination's words, or ours.
    pub reply: String,
}

/// A notice to a sender. Its octets are the body of the same entry. It counts only if the entry settles somebody.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Notice {
    /// Its own id.
    pub id: MessageId,
    /// Its envelope: from the null reverse-path to the sender.
    pub envelope: Envelope,
}

/// Where a domain's mail goes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Route {
    /// Hosts with ports, tried in order; empty for the domain's MX.
    pub hosts: Vec<(String, u16)>,
    /// How TLS is used.
    pub tls: TlsPolicy,
    /// The oldest TLS version that is used.
    pub tls_min: TlsMin,
    /// Its own lifetime in milliseconds.
    pub lifetime_ms: Option<u64>,
    /// Under [`TlsPolicy::Verify`]: SHA-256 of the public keys (SubjectPublicKeyInfo) of which the hosts must have one, instead of a
    /// certificate that WebPKI vouches for. Needs the feature level [`level::PINS`].
    pub pins: Vec<[u8; 32]>,
}

/// What becomes of a domain's entry in the table of routes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RouteChange {
    /// Its mail goes there from now on.
    Set(Route),
    /// Its mail is held until there is a route again.
    Hold,
    /// There is none any more.
    Remove,
}

/// The oldest version of TLS that is used. Older ones than 1.2 are not to be used (RFC 8996).
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Encode, Decode, Serialize, Deserialize,
)]
pub enum TlsMin {
    /// TLS 1.2.
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    Tls13,
}

/// How TLS is used on the way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Encode, Decode)]
pub enum TlsPolicy {
    /// Never.
    None,
    /// If offered; in the clear otherwise.
    #[default]
    Opportunistic,
    /// Always, with any certificate; deferred otherwise.
    Require,
    /// Always, with a certificate for the host's name; deferred otherwise.
    Verify,
    /// Always, with a certificate that secure TLSA records of the host vouch for (RFC 7672); deferred otherwise.
    Dane,
}

impl TlsPolicy {
    /// The word of the command line.
    pub fn word(self) -> &'static str {
        match self {
            TlsPolicy::None => "none",
            TlsPolicy::Opportunistic => "opportunistic",
            TlsPolicy::Require => "require",
            TlsPolicy::Verify => "verify",
            TlsPolicy::Dane => "dane",
        }
    }

    /// Reads the word of the command line.
    pub fn parse(word: &str) -> Option<TlsPolicy> {
        const ALL: [TlsPolicy; 5] = [
            TlsPolicy::None,
            TlsPolicy::Opportunistic,
            TlsPolicy::Require,
            TlsPolicy::Verify,
            TlsPolicy::Dane,
        ];
        ALL.into_iter().find(|policy| policy.word() == word)
    }
}

/// A change to the queue.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum Command {
    /// Takes a message. Its octets are this entry's body, or the pieces.
    Accept {
        /// Its id.
        id: MessageId,
        /// Its envelope.
        envelope: Envelope,
        /// Octets in all.
        size: u64,
        /// The pieces in order; empty if the body is here.
        pieces: Vec<PieceRef>,
    },
    /// A piece of a message that is not accepted yet; its octets are this entry's body.
    Piece {
        /// The message.
        id: MessageId,
        /// Number of the piece from 0.
        seq: u32,
        /// What the body is.
        piece: PieceRef,
    },
    /// Takes a message back, or makes sure that it never comes.
    Withdraw {
        /// The message.
        id: MessageId,
    },
    /// What became of recipients.
    Settle {
        /// One for each recipient.
        outcomes: Vec<Outcome>,
        /// A notice caused by them; its octets are this entry's body.
        notice: Option<Notice>,
    },
    /// Cluster time goes on.
    Tick {
        /// What it is now, at least.
        now: Tick,
    },
    /// Changes a route.
    Route {
        /// The domain, `.domain` for its subdomains, or `*`.
        domain: String,
        /// What becomes of it.
        change: RouteChange,
        /// Counts only if the entry is still the one that this log entry made.
        only_if: Option<LogIndex>,
    },
    /// From here on the cluster uses what a feature level brings: all members know it.
    Level {
        /// The level.
        level: u8,
    },
}

/// What came of a command; the outcome of a proposal.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum Answer {
    /// Done, or was done before.
    Done,
    /// The message is in the queue, or has been.
    Accepted,
    /// The message was taken back: it is certainly not kept.
    Withdrawn,
    /// The message cannot be taken back: it stands, and may be under way.
    Stands,
    /// The id is older than what the queue remembers: nothing can be said of it.
    TooOld,
    /// The pieces are not what the entry names.
    PiecesMissing,
    /// No more room for pieces of messages that are not accepted yet.
    NoRoom,
    /// The command does not decode.
    Malformed,
    /// The route was changed by somebody else meanwhile.
    Changed,
    /// The cluster's feature level does not allow it yet: some members run an older version.
    LevelTooLow,
}

impl Command {
    /// The feature level that a reader must know.
    pub fn level(&self) -> u8 {
        match self {
            Command::Route { change, .. } => level::of_change(change),
            Command::Level { level } => *level,
            _ => level::OLDEST,
        }
    }

    /// The command's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.level()];
        bytes.extend_from_slice(&encode(self));
        bytes
    }

    /// Reads a command.
    ///
    /// # Errors
    /// If the bytes are none, or of a later feature level.
    pub fn decode(bytes: &[u8]) -> Result<Command, CodecError> {
        match bytes.split_first() {
            Some((level, rest)) if level::is_known(*level) => decode("command", rest),
            _ => Err(CodecError { what: "command", why: "unknown feature level".into() }),
        }
    }
}

impl Answer {
    /// The answer's bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads an answer; one that does not decode says nothing about the message.
    pub fn decode(bytes: &[u8]) -> Option<Answer> {
        decode("answer", bytes).ok()
    }
}
