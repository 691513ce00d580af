//! Operators' access: `api` is what is said over the wire, `server` answers on a node, `client` asks from the command line,
//! `metrics` is what a monitoring system reads.

pub mod api;
pub mod client;
pub mod metrics;
pub mod server;
