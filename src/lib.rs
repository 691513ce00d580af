//! Holdfast: a mail relay whose queue is a replicated log.
//!
//! A message is acknowledged only when it is on stable storage on at least two nodes that share neither power nor network, and
//! erased from every node once its destination has taken it. `docs/architecture.md` has the map; the order of the modules
//! here is the order in which they may know each other: smtp, queue, schedule, receive, deliver, admin, node.

pub mod admin;
pub mod at_rest;
pub mod cli;
pub mod clock;
pub mod config;
pub mod deliver;
pub mod demo;
pub mod leaving;
pub mod live;
pub mod maillog;
pub mod node;
pub mod pki;
pub mod queue;
pub mod receive;
pub mod reload;
pub mod room;
pub mod schedule;
pub mod smtp;
pub mod upgrade;

#[cfg(test)]
mod sim;
#[cfg(test)]
mod tidy;
