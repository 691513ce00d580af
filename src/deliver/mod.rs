//! Handing mail on. `fate` decides what a reply means and `dane` what a certificate is worth (pure); the rest acts: `route` and `resolve` find hosts, `connection`
//! speaks SMTP to one, `transaction` hands over one message, `outcome` turns the result into log lines, notices and
//! settlements, `leader` runs it all while this node leads.

pub mod connection;
mod dane;
pub mod fate;
pub mod leader;
mod outcome;
pub mod resolve;
pub mod route;
mod settle;
pub mod tls;
mod transaction;
