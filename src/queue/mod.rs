//! Pure. The replicated queue: what a message is, the commands that change it, and the state that every node computes from
//! them alone. Knows no Raft, no socket and no wall clock; time is cluster time, which commands carry.

pub mod apply;
pub mod bounce;
pub mod command;
mod invariants;
pub mod level;
pub mod message;
mod messages;
pub mod retry;
mod tables;
mod traces;

pub use apply::{Change, Queue};
pub use command::Command;
pub use message::{Message, MessageId};
pub use messages::{Page, Totals};
pub use tables::RouteEntry;
pub use traces::ids_in;
