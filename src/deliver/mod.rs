//! Handing mail on. `fate` decides what a reply means, `need` what TLS a host gets, `answer`, `dane` and `mta_sts` what an answer of DNS, a
//! certificate and a policy are worth (pure); the rest acts: `route` and `resolve` find hosts by way of `dns` and `policies`, `connection` speaks SMTP to
//! one (`quirks` has what it offers and cannot do), `transaction` hands over one message, `outcome` turns the result into log lines, notices and settlements, `leader` runs it all
//! while this node leads.

mod answer;
pub mod connection;
mod dane;
mod dns;
pub mod fate;
pub mod leader;
pub mod mta_sts;
pub mod need;
mod outcome;
pub mod policies;
mod quirks;
pub mod resolve;
pub mod route;
mod settle;
pub mod tls;
mod transaction;
