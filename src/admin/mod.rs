//! Operators' access: `api` is what is said over the wire, `server` answers on a node, `client` asks from the command line,
//! `metrics` is what a monitoring system reads,
//! `members` changes who belongs to the cluster.

pub mod api;
pub mod client;
mod members;
pub mod metrics;
pub mod server;
