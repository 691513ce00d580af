//! The DNS edge, by hickory: records of one name and type, and whether DNSSEC proves them (RFC 4035), as [`super::answer`] judges it.
//! What they mean for mail stands in [`super::resolve`].
//!
//! A careful look-up wants a proof where there can be one. One that fails its proof is not believed, unless no proof is to be had
//! from these name servers at all, not even of the zone in which trust begins: then, by setting, mail goes on as if there were no
//! DNSSEC.
#![expect(clippy::disallowed_methods, reason = "the trust anchor is a file")]

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::dnssec::TrustAnchors;
use hickory_resolver::proto::rr::{Name, RecordType};

use super::answer::{Denial, Found, Nothing, denial, denied, follow};
use crate::clock;
use crate::config::{Dns as Settings, Dnssec, name_server};

/// Labels of a name that are looked at for the zone that it is in.
const LABELS_MAX: usize = 12;
/// For so long it is known whether these name servers give proofs.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// The zone of the first key in a file of trust anchors: the first word of the first line that holds any.
fn first_zone(anchors: &str) -> Option<String> {
    let lines = anchors.lines().map(|line| line.split(';').next().unwrap_or_default().trim());
    let line = lines.into_iter().find(|line| !line.is_empty() && !line.starts_with('$'))?;
    line.split_whitespace().next().map(Into::into)
}

/// Looks names up.
pub(super) struct Dns {
    plain: Option<TokioResolver>,
    /// Checks signatures and says of each record whether it is secure.
    validating: Option<TokioResolver>,
    /// The same, without a memory.
    probing: Option<TokioResolver>,
    policy: Dnssec,
    /// Zones of which no proof is wanted, and what is below them.
    unsigned: Vec<String>,
    /// Where trust begins.
    anchor: String,
    /// Whether these name servers gave a proof of that when last asked.
    gives_proofs: Mutex<Option<(Instant, bool)>>,
}

impl Dns {
    /// With the name servers of the settings, or else those of the machine. Without any, nothing is found.
    ///
    /// # Errors
    /// If the trust anchor cannot be read.
    pub(super) fn new(settings: &Settings) -> anyhow::Result<Dns> {
        let builder = || {
            if settings.servers.is_empty() {
                return TokioResolver::builder_tokio().ok();
            }
            let server = |address: SocketAddr| {
                let mut server = NameServerConfig::udp_and_tcp(address.ip());
                server.connections.iter_mut().for_each(|c| c.port = address.port());
                server
            };
            let servers = settings.servers.iter().filter_map(|text| name_server(text)).map(server);
            let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
            Some(TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()))
        };
        let (anchors, anchor) = match &settings.trust_anchor {
            path if path.as_os_str().is_empty() => (TrustAnchors::default(), ".".into()),
            path => {
                let name = || format!("trust_anchor = {}", path.display());
                let text = std::fs::read_to_string(path).with_context(name)?;
                let anchors = text.parse::<TrustAnchors>().with_context(name)?;
                (anchors, first_zone(&text).unwrap_or_else(|| ".".into()))
            }
        };
        let plain = builder().and_then(|builder| builder.build().ok());
        if plain.is_none() {
            tracing::warn!("no name server is configured");
        }
        let anchors = Arc::new(anchors);
        let validating = |cache: bool| {
            let mut builder = builder()?;
            let options = builder.options_mut();
            // What the machine's hosts file says is not signed.
            options.use_hosts_file = ResolveHosts::Never;
            if !cache {
                options.cache_size = 0;
            }
            builder.with_trust_anchor(anchors.clone()).build().ok()
        };
        let unsigned = settings.unsigned_zones.iter();
        Ok(Dns {
            plain,
            validating: validating(true),
            probing: validating(false),
            policy: settings.dnssec,
            unsigned: unsigned.map(|zone| zone.trim_end_matches('.').to_ascii_lowercase()).collect(),
            anchor,
            gives_proofs: Mutex::default(),
        })
    }

    /// Looks up without a proof: nothing that is found is secure.
    pub(super) async fn plainly(&self, name: &str, kind: RecordType) -> Result<Found, Nothing> {
        let Some(resolver) = &self.plain else { return Err(no_server()) };
        match resolver.lookup(whole(name), kind).await {
            Ok(found) => {
                let found = follow(found.answers(), name, kind).ok_or(Nothing::NoRecords)?;
                Ok(Found { secure: false, begins_secure: false, ..found })
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(answer))) => Err(denied(&answer)),
            Err(e) => Err(Nothing::Failed(e.to_string())),
        }
    }

    /// Looks up with a proof, or with a proof that there is none to be had. What fails it is not believed.
    pub(super) async fn strictly(&self, name: &str, kind: RecordType) -> Result<Found, Nothing> {
        let Some(resolver) = &self.validating else { return Err(no_server()) };
        let unproven = || Err(Nothing::Failed("nothing proves that there is none".into()));
        match resolver.lookup(whole(name), kind).await {
            Ok(found) => follow(found.answers(), name, kind).map_or_else(unproven, Ok),
            Err(NetError::Dns(DnsError::NoRecordsFound(answer))) => match denial(&answer) {
                Denial::Proven | Denial::Unsigned => Err(denied(&answer)),
                Denial::Foreign => unproven(),
                Denial::Bare if is_unsigned(resolver, answer.query.name().clone()).await => {
                    Err(denied(&answer))
                }
                Denial::Bare => unproven(),
            },
            // The zone is signed in a way that proves no denial (RFC 9276 §3.2), which is itself proven.
            Err(NetError::Dns(DnsError::Nsec { proof, .. })) if proof.is_insecure() => {
                self.plainly(name, kind).await
            }
            Err(e) => Err(Nothing::Failed(e.to_string())),
        }
    }

    /// Looks up with as much proof as these name servers give.
    pub(super) async fn carefully(&self, name: &str, kind: RecordType) -> Result<Found, Nothing> {
        let within = |zone: &String| {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            name == *zone || name.strip_suffix(zone.as_str()).is_some_and(|rest| rest.ends_with('.'))
        };
        if self.policy == Dnssec::Off || self.unsigned.iter().any(within) {
            return self.plainly(name, kind).await;
        }
        let is_auto = self.policy == Dnssec::Auto;
        if is_auto && self.known() == Some(false) {
            return self.plainly(name, kind).await;
        }
        match self.strictly(name, kind).await {
            Err(Nothing::Failed(_)) if is_auto && self.gives_no_proofs().await => {
                self.plainly(name, kind).await
            }
            found => found,
        }
    }

    /// A name's addresses, by the machine's hosts file too.
    pub(super) async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        let resolver = self.plain.as_ref().ok_or("no name server is configured")?;
        let found = resolver.lookup_ip(name).await.map_err(|e| e.to_string())?;
        let addresses: Vec<IpAddr> = found.iter().collect();
        if addresses.is_empty() { Err("has no address".into()) } else { Ok(addresses) }
    }

    /// Whether these name servers give proofs, if that was asked not long ago.
    fn known(&self) -> Option<bool> {
        let (since, gives) = (*self.gives_proofs.lock().unwrap_or_else(PoisonError::into_inner))?;
        (clock::now().duration_since(since) < KNOWN_FOR).then_some(gives)
    }

    /// Whether these name servers answer, and do not pass on what proofs are made of: some strip it, and no record of the zone in
    /// which trust begins is secure then. Name servers that do not answer say nothing of it.
    async fn gives_no_proofs(&self) -> bool {
        if let Some(gives) = self.known() {
            return !gives;
        }
        let (Some(probing), Some(plain)) = (&self.probing, &self.plain) else { return false };
        let found = probing.lookup(whole(&self.anchor), RecordType::SOA).await;
        let own = found.ok().and_then(|found| follow(found.answers(), &self.anchor, RecordType::SOA));
        let gives = own.is_some_and(|found| found.secure);
        if !gives {
            // Any answer is one, also that the name servers know nothing of that zone.
            match plain.lookup(whole(&self.anchor), RecordType::SOA).await {
                Ok(_) | Err(NetError::Dns(_)) => {}
                Err(_) => return false,
            }
        }
        let now = Some((clock::now(), gives));
        let before =
            std::mem::replace(&mut *self.gives_proofs.lock().unwrap_or_else(PoisonError::into_inner), now);
        if !gives && before.is_none_or(|(_, gave)| gave) {
            tracing::warn!(
                zone = self.anchor,
                "the name servers give no DNSSEC proof of the zone in which trust begins: mail goes on without DANE where its \
                 route does not ask for it; see [dns] dnssec"
            );
        }
        !gives
    }
}

fn no_server() -> Nothing {
    Nothing::Failed("no name server is configured".into())
}

/// A name is whole as it stands: no search list is tried.
fn whole(name: &str) -> String {
    format!("{}.", name.trim_end_matches('.'))
}

/// Whether the zone of a name is proven to be unsigned: the SOA above it is.
async fn is_unsigned(resolver: &TokioResolver, mut name: Name) -> bool {
    for _ in 0..LABELS_MAX {
        match resolver.lookup(whole(&name.to_ascii()), RecordType::SOA).await {
            Ok(found) => {
                let mut own = found.answers().iter().filter(|r| r.record_type() == RecordType::SOA);
                if let Some(own) = own.find(|r| r.name == name) {
                    return own.proof.is_insecure();
                }
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(answer))) => match denial(&answer) {
                Denial::Unsigned => return true,
                Denial::Proven | Denial::Foreign => return false,
                Denial::Bare => {}
            },
            Err(_) => return false,
        }
        if name.is_root() {
            return false;
        }
        name = name.base_name();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_begins_in_the_zone_of_the_first_key() {
        let zone = |text: &str| first_zone(text);
        assert_eq!(zone("; ours\n\n$TTL 60\ntest. 60 IN DNSKEY 257 3 13 abc\n").as_deref(), Some("test."));
        assert_eq!(zone(". IN DNSKEY 257 3 8 abc").as_deref(), Some("."));
        assert_eq!(zone("\n ; nothing\n"), None);
    }
}
