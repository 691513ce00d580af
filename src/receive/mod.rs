//! Taking mail. `session`, `policy` and `trace` decide (pure); `listener`, `connection` and `intake` act. Knows the queue's
//! commands, and nothing of delivery.

pub mod connection;
mod incoming;
pub mod intake;
pub mod listener;
pub mod policy;
mod proxy;
pub mod session;
pub mod trace;
