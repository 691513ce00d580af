//! Pure. A message in the queue, and the states of its recipients.
//!
//! | state | next | by |
//! | --- | --- | --- |
//! | pending | delivered | the destination's 2yz to end-of-data |
//! | pending | failed | a 5yz, with a notice to the sender in the same entry |
//! | pending | expired | the lifetime in cluster time, with a notice |
//! | pending | removed | an operator |
//! | any other | none | a recipient settles once; later results for it are ignored |
//!
//! A message whose last recipient settles leaves the queue in that entry, and its bodies are erased. A crash at any point
//! leaves a recipient pending or settled, nothing between.

use std::fmt;

use bincode::{Decode, Encode};
use holdfast_cluster::LogIndex;

use crate::smtp::address::{Mailbox, ReversePath};

/// Cluster time in milliseconds since the cluster was formed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Encode, Decode)]
pub struct Tick(pub u64);

/// A message's id: 80 bits, of which the highest 42 are the tick of its birth, then node (8), start of the node (14) and a
/// count (16). Sorts by time; unique over nodes and restarts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct MessageId(pub u128);

const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

impl MessageId {
    /// Bits of the parts below the tick.
    const BELOW_TICK: u32 = 38;

    /// An id born at `tick` on a node.
    pub fn new(tick: Tick, node: u64, start: u64, count: u16) -> MessageId {
        let low = (node as u128 & 0xff) << 30 | (start as u128 & 0x3fff) << 16 | count as u128;
        MessageId((tick.0 as u128 & ((1 << 42) - 1)) << Self::BELOW_TICK | low)
    }

    /// The tick of its birth.
    pub fn born(self) -> Tick {
        Tick((self.0 >> Self::BELOW_TICK) as u64)
    }

    /// Reads an id as [`fmt::Display`] writes it; lower case is accepted.
    pub fn parse(text: &str) -> Option<MessageId> {
        if text.len() != 16 {
            return None;
        }
        text.bytes()
            .try_fold(0u128, |number, byte| {
                let digit = DIGITS.iter().position(|d| *d == byte.to_ascii_uppercase())?;
                Some(number << 5 | digit as u128)
            })
            .map(MessageId)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: [u8; 16] = std::array::from_fn(|n| DIGITS[(self.0 >> (75 - 5 * n)) as usize & 31]);
        f.write_str(std::str::from_utf8(&text).expect("digits are ASCII"))
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a recipient's story stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub enum State {
    /// Not yet taken by its destination.
    Pending,
    /// Handed off.
    Delivered,
    /// Refused for good; the sender was told.
    Failed,
    /// Older than the lifetime; the sender was told.
    Expired,
    /// Removed by an operator; nobody was told.
    Removed,
}

/// A recipient.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Recipient {
    /// Its address.
    pub address: Mailbox,
    /// Its state.
    pub state: State,
    /// How often delivery was tried and put off.
    pub attempts: u32,
    /// The last reply or failure.
    pub last_reply: String,
    /// Whether it was taken wherever it may go, as from a listed network or as a notice of ours. Any other was taken for its
    /// route's sake, and is held if that is gone: its domain's MX may well be us.
    pub anywhere: bool,
}

impl Recipient {
    /// A recipient that nothing was done for.
    pub fn new(address: Mailbox, anywhere: bool) -> Recipient {
        Recipient { address, state: State::Pending, attempts: 0, last_reply: String::new(), anywhere }
    }
}

/// What travels with a message beside its octets.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Envelope {
    /// Where it came from.
    pub sender: ReversePath,
    /// Whom it is for.
    pub recipients: Vec<Recipient>,
    /// Whether `BODY=8BITMIME` was declared.
    pub eight_bit: bool,
    /// When it was accepted, wall clock, seconds since 1970; for people only.
    pub arrival_unix_s: u64,
    /// Whether it came in under a policy that keeps its text out of notices.
    pub confidential: bool,
}

/// A message in the queue.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Message {
    /// Its id.
    pub id: MessageId,
    /// Its envelope.
    pub envelope: Envelope,
    /// Octets, trace header included.
    pub size: u64,
    /// Entry that accepted it, and its term.
    pub accepted: (u64, LogIndex),
    /// Entries whose bodies are its octets, in order.
    pub bodies: Vec<LogIndex>,
}

impl Message {
    /// Numbers of the recipients that are not settled.
    pub fn pending(&self) -> impl Iterator<Item = u16> + '_ {
        let numbered = self.envelope.recipients.iter().enumerate();
        numbered.filter(|(_, r)| r.state == State::Pending).map(|(n, _)| n as u16)
    }

    /// Whether it was tried and put off, as Postfix uses the word.
    pub fn is_deferred(&self) -> bool {
        self.pending().any(|n| self.envelope.recipients[n as usize].attempts > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_by_time_and_read_back() {
        let a = MessageId::new(Tick(1000), 3, 7, 65535);
        let b = MessageId::new(Tick(1001), 1, 0, 0);
        assert!(a < b && a.to_string() < b.to_string());
        assert_eq!((a.born(), MessageId::parse(&a.to_string())), (Tick(1000), Some(a)));
        assert!(a.to_string().bytes().all(|b| b.is_ascii_alphanumeric()) && a.to_string().len() == 16);
        assert_eq!(MessageId::parse("short"), None);
        assert_eq!(MessageId::parse("UUUUUUUUUUUUUUUU"), None, "U is no digit");
    }
}
