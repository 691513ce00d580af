//! What happened, kept so that it can be judged.

use std::time::Instant;

/// What a sender knows of its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It read 250.
    Ok,
    /// It read a 4yz or 5yz: the message must never be delivered.
    Fail(u16),
    /// The connection ended after the final dot, or where it cannot be told: neither of the two.
    Unknown,
}

/// A message that was sent.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Names the message and each of its copies together with the recipient.
    pub name: String,
    /// Local parts of the recipients.
    pub recipients: Vec<String>,
    /// The node it was sent to.
    pub node: u64,
    /// What the sender knows.
    pub outcome: Outcome,
    /// Octets between DATA and the final dot, before stuffing.
    pub octets: Vec<u8>,
    /// When the reply came.
    pub at: Instant,
}

/// A copy that a customer took with 250.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Local part of the recipient.
    pub recipient: String,
    /// Octets as they arrived, unstuffed.
    pub octets: Vec<u8>,
}
