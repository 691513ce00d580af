//! Pure. SMTP on the wire, both directions: addresses, commands, replies, message data. Knows no queue and no socket.

pub mod address;
pub mod chunk;
pub mod command;
pub mod data;
pub mod reply;
