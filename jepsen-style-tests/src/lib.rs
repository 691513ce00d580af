//! Judges a running cluster from outside: real processes, real disks, real sockets. No product crate is linked, so a wrong
//! belief of the product's cannot be shared by its tests.
//!
//! `nodes` runs the cluster, `sender` is a strict client, `customer` a scripted destination; `history` is what happened and
//! `checkers` what it means. A test breaks something and asks the checkers.

pub mod checkers;
pub mod customer;
pub mod disk;
pub mod history;
pub mod hosts;
pub mod kept;
pub mod knot;
pub mod nemesis;
pub mod network;
pub mod nodes;
pub mod plot;
pub mod postfix;
pub mod random;
pub mod report;
pub mod run;
pub mod sender;
pub mod tools;
pub mod verdict;
pub mod workload;
