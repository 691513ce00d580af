//! The `Peers` edge: nodes talking to nodes over mutual TLS.
//!
//! A connection is opened for one purpose and says so in its first frame: appends (a stream of their own, so that a large
//! batch never delays a vote), or requests. Each side checks that the other's certificate names the node it claims to be.

pub(crate) mod client;
pub(crate) mod frame;
pub(crate) mod network;
pub(crate) mod server;
pub(crate) mod tls;
