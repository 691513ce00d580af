//! Judges a running cluster from outside: real processes, real disks, real sockets. No product crate is linked, so a wrong
//! belief of the product's cannot be shared by its tests.
//!
//! `nodes` runs the cluster, `sender` is a strict client, `customer` a scripted destination; `history` is what happened and
//! `checker` what it means. A test breaks something and asks the checker.

pub mod checker;
pub mod customer;
pub mod disk;
pub mod history;
pub mod kept;
pub mod knot;
pub mod network;
pub mod nodes;
pub mod postfix;
pub mod sender;
pub mod tools;
