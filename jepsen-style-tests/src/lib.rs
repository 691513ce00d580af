//! Judges a running cluster from outside: real processes, real disks, real sockets. No product crate is linked, so a wrong
//! belief of the product's cannot be shared by its tests.
//!
//! `run` is a whole run of the command, `nemesis` what it breaks, `workload` what senders do, `verdict` and `report` what comes of it.
//! `nodes` runs the cluster, `sender` is a strict client, `customer` a scripted destination; `history` is what happened and
//! `checkers` what it means. A test breaks something and asks the checkers.

pub mod cgroup;
pub mod checkers;
pub mod conditions;
pub mod customer;
mod damage;
pub mod disk;
mod evidence;
pub mod exim;
pub mod folder;
pub mod history;
pub mod hosts;
pub mod kept;
pub mod knot;
pub mod links;
pub mod nemesis;
pub mod network;
pub mod nodes;
pub mod plot;
pub mod postfix;
pub mod random;
pub mod record;
mod relayed;
mod relays;
mod replacement;
pub mod report;
pub mod run;
pub mod scratch;
pub mod sender;
mod tls;
pub mod tools;
pub mod verdict;
mod watcher;
pub mod wires;
pub mod workload;
