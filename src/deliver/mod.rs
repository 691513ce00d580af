//! Handing mail on. `fate` decides what a reply means (pure); the rest acts: `route` and `resolve` find hosts, `connection`
//! speaks SMTP to one, `transaction` hands over one message, `leader` runs it all while this node leads.

pub mod connection;
pub mod fate;
pub mod leader;
pub mod resolve;
pub mod route;
mod settle;
pub mod tls;
mod transaction;
