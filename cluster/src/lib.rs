//! Consensus: one Raft group over one log per node. openraft is named in this crate and nowhere else.
//!
//! What this crate promises: what [`Cluster::propose`] reports as applied is committed, and with a [`Receipt`] it is durable
//! on nodes of two power and two network labels; a command's effect is the same on every node; a proposal may be
//! repeated across a leader change, since the machine recognises it.
//!
//! What it must not know: SMTP, addresses, routes, what a command means. Commands, outcomes and bodies are opaque bytes;
//! [`Machine`] is the seam to the layer above.

mod blocking;
mod boot;
pub mod clock;
mod cluster;
mod codec;
mod contact;
mod durability;
pub mod lease;
mod limits;
mod log_store;
mod machine;
mod membership;
pub mod net;
mod others;
pub mod owners;
mod peer;
pub mod placement;
mod proposal;
mod read_index;
mod receipt;
mod repair;
mod retention;
mod snapshot;
mod state_machine;
mod transfer;
mod types;

#[cfg(test)]
mod contract;

pub use blocking::blocking;
pub use boot::{Settings, StartError, run, start};
pub use cluster::{Cluster, FOLLOWER, NodeReport, PlacementWatch, RECOVERING, Report};
pub use holdfast_storage::{Bytes, LogIndex, LogPosition, ReadError, SpaceReport, Term};
pub use lease::FinalDotPermit;
pub use limits::{BODY_BYTES_MAX, COMMAND_BYTES_MAX};
pub use machine::{Applied, ApplyError, Delta, Found, Machine, Reading, Refusal, Rows, Step, Steps, Whole};
pub use membership::ChangeError;
pub use peer::tls::{PeerTls, TlsFault, node_name};
pub use placement::{Member, Placement};
pub use proposal::{Fence, ProposeError, Proposed};
pub use receipt::Receipt;
