//! The DNS edge, by hickory: records of one name and type, by way of its aliases, and whether DNSSEC proves them (RFC 4035). What
//! they mean for mail stands in [`super::resolve`].
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
use hickory_resolver::proto::dnssec::TrustAnchors;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

use crate::clock;
use crate::config::{Dns as Settings, Dnssec, name_server};

/// Aliases that are followed for one name.
const ALIASES_MAX: usize = 8;
/// For so long it is known whether these name servers give proofs.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// Records of one name and type.
#[derive(Debug, PartialEq)]
pub(super) struct Found {
    /// Whose they are: the name that was asked for, or what it is an alias of.
    pub(super) owner: String,
    pub(super) records: Vec<RData>,
    /// Whether each of them, and each alias on the way, is signed up to the trust anchor.
    pub(super) secure: bool,
}

/// Why there are none.
#[derive(Debug, PartialEq)]
pub(super) enum Nothing {
    /// The name does not exist.
    NoName,
    /// The name has none of this type.
    NoRecords,
    /// It could not be found out, or what was found out is not to be believed.
    Failed(String),
}

pub(super) fn text(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// Finds the records of `name` in an answer, by way of its aliases. Whatever else stands in it counts for nothing, however well it
/// is signed: it may be somebody else's.
fn follow(answers: &[Record], name: &str, kind: RecordType) -> Option<Found> {
    let mut owner = name.trim_end_matches('.').to_ascii_lowercase();
    let mut secure = true;
    for _ in 0..ALIASES_MAX {
        let of = |kind| answers.iter().filter(move |r| r.record_type() == kind);
        let own: Vec<&Record> = of(kind).filter(|r| text(&r.name) == owner).collect();
        if !own.is_empty() {
            secure &= own.iter().all(|r| r.proof.is_secure());
            return Some(Found { owner, records: own.iter().map(|r| r.data.clone()).collect(), secure });
        }
        let alias = of(RecordType::CNAME).find(|r| text(&r.name) == owner)?;
        let RData::CNAME(to) = &alias.data else { return None };
        secure &= alias.proof.is_secure();
        owner = text(&to.0);
    }
    None
}

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
    policy: Dnssec,
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
        let validating = builder().and_then(|mut builder| {
            // What the machine's hosts file says is not signed.
            builder.options_mut().use_hosts_file = ResolveHosts::Never;
            builder.with_trust_anchor(Arc::new(anchors)).build().ok()
        });
        Ok(Dns { plain, validating, policy: settings.dnssec, anchor, gives_proofs: Mutex::default() })
    }

    /// Looks up without a proof: nothing that is found is secure.
    pub(super) async fn plainly(&self, name: &str, kind: RecordType) -> Result<Found, Nothing> {
        let found = look_up(self.plain.as_ref(), name, kind).await?;
        Ok(Found { secure: false, ..found })
    }

    /// Looks up with a proof, or with a proof that there is none to be had. What fails it is not believed.
    pub(super) async fn strictly(&self, name: &str, kind: RecordType) -> Result<Found, Nothing> {
        look_up(self.validating.as_ref(), name, kind).await
    }

    /// Looks up with as much proof as these name servers give.
    pub(super) async fn carefully(&self, name: &str, kind: RecordType) -> Result<Found, Nothing> {
        if self.policy == Dnssec::Off {
            return self.plainly(name, kind).await;
        }
        match self.strictly(name, kind).await {
            Err(Nothing::Failed(_)) if self.policy == Dnssec::Auto && self.gives_no_proofs().await => {
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

    /// Whether these name servers answer, and do not pass on what proofs are made of: some strip it, and no record of the zone in
    /// which trust begins is secure then. Name servers that do not answer say nothing of it.
    async fn gives_no_proofs(&self) -> bool {
        let before = *self.gives_proofs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((since, gives)) = before
            && clock::now().duration_since(since) < KNOWN_FOR
        {
            return !gives;
        }
        let gives = self.strictly(&self.anchor, RecordType::SOA).await.is_ok_and(|found| found.secure);
        if !gives && self.plainly(&self.anchor, RecordType::SOA).await.is_err() {
            return false;
        }
        *self.gives_proofs.lock().unwrap_or_else(PoisonError::into_inner) = Some((clock::now(), gives));
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

async fn look_up(resolver: Option<&TokioResolver>, name: &str, kind: RecordType) -> Result<Found, Nothing> {
    let Some(resolver) = resolver else {
        return Err(Nothing::Failed("no name server is configured".into()));
    };
    // A name is whole as it stands: no search list is tried.
    let found = match resolver.lookup(format!("{}.", name.trim_end_matches('.')), kind).await {
        Ok(found) => found,
        Err(e) if e.is_nx_domain() => return Err(Nothing::NoName),
        Err(e) if e.is_no_records_found() => return Err(Nothing::NoRecords),
        Err(e) => return Err(Nothing::Failed(e.to_string())),
    };
    follow(found.answers(), name, kind).ok_or(Nothing::NoRecords)
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::dnssec::Proof;
    use hickory_resolver::proto::rr::rdata::{A, CNAME};

    use super::*;

    fn record(owner: &str, data: RData, proof: Proof) -> Record {
        let mut record = Record::from_rdata(Name::from_ascii(owner).unwrap(), 60, data);
        record.proof = proof;
        record
    }

    fn a(last: u8) -> RData {
        RData::A(A::new(192, 0, 2, last))
    }

    fn alias(to: &str) -> RData {
        RData::CNAME(CNAME(Name::from_ascii(to).unwrap()))
    }

    /// An answer may hold records of somebody who signs as well as anybody.
    #[test]
    fn only_records_of_the_name_that_was_asked_for_count() {
        use Proof::{Indeterminate, Insecure, Secure};
        let evil = || record("mx.evil.example.", a(66), Secure);
        let found = |answers: &[Record]| {
            follow(answers, "MX.victim.example", RecordType::A).map(|f| (f.owner, f.records.len(), f.secure))
        };
        let own = |proof| record("mx.victim.example.", a(1), proof);
        let owner = || "mx.victim.example".to_string();
        assert_eq!(found(&[evil(), own(Secure), evil()]), Some((owner(), 1, true)));
        assert_eq!(found(&[evil()]), None);
        assert_eq!(found(&[evil(), own(Insecure)]), Some((owner(), 1, false)));
        assert_eq!(found(&[own(Secure), own(Indeterminate)]), Some((owner(), 2, false)));
        let to = |name: &str, proof| record("mx.victim.example.", alias(name), proof);
        let host = |proof| record("host.example.", a(2), proof);
        let other = || "host.example".to_string();
        assert_eq!(found(&[host(Secure), to("host.example.", Secure), evil()]), Some((other(), 1, true)));
        assert_eq!(found(&[host(Secure), to("host.example.", Insecure)]), Some((other(), 1, false)));
        assert_eq!(found(&[to("mx.victim.example.", Secure)]), None, "an alias of itself");
    }

    #[test]
    fn trust_begins_in_the_zone_of_the_first_key() {
        let zone = |text: &str| first_zone(text);
        assert_eq!(zone("; ours\n\n$TTL 60\ntest. 60 IN DNSKEY 257 3 13 abc\n").as_deref(), Some("test."));
        assert_eq!(zone(". IN DNSKEY 257 3 8 abc").as_deref(), Some("."));
        assert_eq!(zone("\n ; nothing\n"), None);
    }
}
