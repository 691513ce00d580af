//! What lies between nodes, each direction apart, and how it is broken: [`Hosts`](crate::hosts::Hosts) have packets, and
//! relays connections.

/// What was promised to be there is not.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct Unavailable {
    /// What was tried.
    pub(crate) what: String,
    /// What came of it.
    pub(crate) why: String,
}

/// Links between nodes.
pub trait Links {
    /// What one node sends another does not arrive. The sender hears nothing of it.
    ///
    /// # Errors
    /// If it cannot be done.
    fn cut(&self, from: u64, to: u64) -> Result<(), Unavailable>;

    /// So many of a hundred packets between nodes do not arrive, and have to be sent again.
    ///
    /// # Errors
    /// If it cannot be done.
    fn lose(&self, percent: u64) -> Result<(), Unavailable>;

    /// Connections from one node to another end.
    ///
    /// # Errors
    /// If it cannot be done.
    fn reset(&self, from: u64, to: u64) -> Result<(), Unavailable>;

    /// All links are well again.
    ///
    /// # Errors
    /// If it cannot be done.
    fn mend(&self) -> Result<(), Unavailable>;
}
