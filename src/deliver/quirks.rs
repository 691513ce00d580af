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

/// Hosts that answered `BDAT` as a command they do not know, though they offered CHUNKING.
#[derive(Debug, Default)]
pub struct Quirks {
    without_chunks: Mutex<BTreeMap<SocketAddr, Instant>>,
}

impl Quirks {
    fn without_chunks(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Instant>> {
        self.without_chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It offered chunks and does not know them.
    pub fn takes_no_chunks(&self, host: SocketAddr, now: Instant) {
        let mut hosts = self.without_chunks();
        hosts.retain(|_, since| now.saturating_duration_since(*since) < REMEMBERED);
        let oldest = hosts.iter().min_by_key(|(_, since)| **since).map(|(host, _)| *host);
        if let Some(oldest) = oldest.filter(|_| hosts.len() >= HOSTS_MAX) {
            hosts.remove(&oldest);
        }
        hosts.insert(host, now);
    }

    /// Whether what it offers is to be believed.
    pub fn may_take_chunks(&self, host: SocketAddr, now: Instant) -> bool {
        let since = self.without_chunks().get(&host).copied();
        since.is_none_or(|since| now.saturating_duration_since(since) >= REMEMBERED)
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
        assert!(quirks.may_take_chunks(host(25), now));
        quirks.takes_no_chunks(host(25), now);
        assert!(!quirks.may_take_chunks(host(25), now + REMEMBERED - Duration::from_millis(1)));
        assert!(quirks.may_take_chunks(host(25), now + REMEMBERED));
        assert!(quirks.may_take_chunks(host(26), now));
        for n in 0..HOSTS_MAX as u16 {
            quirks.takes_no_chunks(host(1000 + n), now + Duration::from_millis(1 + u64::from(n)));
        }
        assert_eq!(quirks.without_chunks().len(), HOSTS_MAX);
        assert!(quirks.may_take_chunks(host(25), now + Duration::from_secs(2)), "the oldest went");
        quirks.takes_no_chunks(host(25), now + 2 * REMEMBERED);
        assert_eq!(quirks.without_chunks().len(), 1, "nobody is remembered for good");
    }
}
