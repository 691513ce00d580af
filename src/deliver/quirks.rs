//! What hosts offer and cannot do: found out once, and not asked of them again for a while. Bounded; it is a convenience, and forgotten when
//! this node starts or reads its settings again.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A host may have been mended after this long.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// Hosts that are remembered; the oldest goes when there are more.
const HOSTS_MAX: usize = 1000;

/// What became of the chunks that hosts offered to take (CHUNKING).
#[derive(Debug, Default)]
pub struct Quirks {
    chunks: Mutex<BTreeMap<SocketAddr, (bool, Instant)>>,
}

impl Quirks {
    fn chunks(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, (bool, Instant)>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It took a chunk, or does not know the command.
    pub fn note_chunks(&self, host: SocketAddr, takes_them: bool, now: Instant) {
        let mut hosts = self.chunks();
        hosts.retain(|_, (_, since)| now.saturating_duration_since(*since) < REMEMBERED);
        let oldest = hosts.iter().min_by_key(|(_, (_, since))| *since).map(|(host, _)| *host);
        if let Some(oldest) = oldest.filter(|_| hosts.len() >= HOSTS_MAX) {
            hosts.remove(&oldest);
        }
        hosts.insert(host, (takes_them, now));
    }

    /// Whether it takes chunks, if it was found out.
    pub fn takes_chunks(&self, host: SocketAddr, now: Instant) -> Option<bool> {
        let (takes_them, since) = self.chunks().get(&host).copied()?;
        (now.saturating_duration_since(since) < REMEMBERED).then_some(takes_them)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn what_a_host_cannot_do_is_remembered_for_a_day() {
        let (quirks, now) = (Quirks::default(), clock::now());
        let host = |n: u16| SocketAddr::from(([192, 0, 2, 1], n));
        assert_eq!(quirks.takes_chunks(host(25), now), None);
        quirks.note_chunks(host(25), false, now);
        assert_eq!(quirks.takes_chunks(host(25), now + REMEMBERED - Duration::from_millis(1)), Some(false));
        assert_eq!(quirks.takes_chunks(host(25), now + REMEMBERED), None);
        assert_eq!(quirks.takes_chunks(host(26), now), None);
        for n in 0..HOSTS_MAX as u16 {
            quirks.note_chunks(host(1000 + n), true, now + Duration::from_millis(1 + u64::from(n)));
        }
        assert_eq!(quirks.chunks().len(), HOSTS_MAX);
        assert_eq!(quirks.takes_chunks(host(25), now), None, "the oldest went");
        assert_eq!(quirks.takes_chunks(host(1000), now), Some(true));
        quirks.note_chunks(host(25), false, now + 2 * REMEMBERED);
        assert_eq!(quirks.chunks().len(), 1, "nobody is remembered for good");
    }
}
