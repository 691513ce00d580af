//! Work that may block, beside the async runtime.

use std::io;

/// Does something that may block on a thread of its own; in a simulated host, where nothing happens by itself, at once.
///
/// # Errors
/// If it panicked, or the runtime is shutting down.
pub async fn blocking<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> Result<T, io::Error> {
    #[cfg(feature = "sim")]
    if crate::net::sim::is_simulated() {
        return Ok(what());
    }
    tokio::task::spawn_blocking(what).await.map_err(io::Error::other)
}
