//! The `Resolver` edge: from a host or a domain to addresses (RFC 5321 §5.1, RFC 7505), by hickory; and to TLSA records that are
//! secure (RFC 7672).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::dnssec::TrustAnchors;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

use super::dane::{Anchors, Tlsa};
use super::route::Way;
use crate::clock;
use crate::config::{Dns, name_server};
use crate::queue::command::TlsPolicy;

/// Hosts that are tried for one delivery at the most.
const HOSTS_MAX: usize = 10;
/// Addresses of one host that are tried at the most.
const ADDRESSES_MAX: usize = 5;
/// Aliases that are followed for one name.
const ALIASES_MAX: usize = 8;
/// Said where nothing can be looked up.
const NO_SERVER: &str = "4.4.3 no name server is configured";

/// A host to try, by its name and one address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// Its name, for TLS and the log.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// The name that its certificate must have if WebPKI is to vouch for it.
    pub verified_as: String,
    /// What its TLSA records vouch for, if that was asked.
    pub anchors: Option<Arc<Anchors>>,
}

/// Why there is nothing to connect to. Texts begin with an enhanced status code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoHost {
    /// May be better later.
    Later(String),
    /// The domain says that it takes no mail, or does not exist.
    Failed(String),
}

/// Finds hosts.
pub struct Resolve {
    plain: Option<TokioResolver>,
    /// Checks signatures (RFC 4035) and says of each record whether it is secure.
    validating: Option<TokioResolver>,
}

/// Records of one name and type.
#[derive(Debug, PartialEq)]
struct Found {
    /// Whose they are: the name that was asked for, or what it is an alias of.
    owner: String,
    records: Vec<RData>,
    /// Whether each of them, and each alias on the way, is signed up to the trust anchor.
    secure: bool,
}

fn text(name: &Name) -> String {
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

enum Nothing {
    /// The name does not exist.
    NoName,
    /// The name has none of this type.
    NoRecords,
    Failed(String),
}

impl Resolve {
    /// With the name servers of the settings, or else those of the machine. Without any, only address literals and `localhost` are
    /// found.
    ///
    /// # Errors
    /// If the trust anchor cannot be read.
    pub fn new(settings: &Dns) -> anyhow::Result<Resolve> {
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
        let anchors = match &settings.trust_anchor {
            path if path.as_os_str().is_empty() => TrustAnchors::default(),
            path => {
                TrustAnchors::from_file(path).with_context(|| format!("trust_anchor = {}", path.display()))?
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
        Ok(Resolve { plain, validating })
    }

    /// The hosts of a way in the order in which they are tried. Under the policy `dane` those that have secure, usable TLSA
    /// records, with these.
    ///
    /// # Errors
    /// [`NoHost`] says whether that may change.
    pub async fn hosts(&self, way: &Way, policy: TlsPolicy) -> Result<Vec<Host>, NoHost> {
        let dane = policy == TlsPolicy::Dane;
        let named = match way {
            Way::Hosts(hosts) => hosts.clone(),
            Way::Mx(domain) => match domain.strip_prefix('[').and_then(|d| d.strip_suffix(']')) {
                Some(literal) => {
                    let literal = literal
                        .get(..5)
                        .filter(|t| t.eq_ignore_ascii_case("ipv6:"))
                        .map_or(literal, |_| &literal[5..]);
                    vec![(literal.to_string(), 25)]
                }
                None => self.mx(domain, dane).await?,
            },
        };
        // The name of an MX is worth no more than the answer it came in: if that is not secure, the certificate must be the domain's.
        let secure_mx = match way {
            Way::Mx(domain) if policy == TlsPolicy::Verify => {
                self.lookup(domain, RecordType::MX, true).await.is_ok_and(|found| found.secure)
            }
            _ => true,
        };
        let next_hop = match way {
            Way::Mx(domain) => Some(domain.as_str()),
            Way::Hosts(_) => None,
        };
        let mut hosts = Vec::new();
        let mut last = NoHost::Later("4.4.3 no host".into());
        for (name, port) in named.into_iter().take(HOSTS_MAX) {
            let found = if dane {
                self.with_anchors(&name, port, next_hop).await
            } else {
                self.addresses(&name).await.map(|addresses| (addresses, None))
            };
            match found {
                Ok((addresses, anchors)) => {
                    hosts.extend(addresses.into_iter().take(ADDRESSES_MAX).map(|address| Host {
                        name: name.clone(),
                        address: SocketAddr::new(address, port),
                        verified_as: next_hop.filter(|_| !secure_mx).unwrap_or(&name).to_owned(),
                        anchors: anchors.clone(),
                    }));
                }
                Err(why) => last = NoHost::Later(why),
            }
        }
        if hosts.is_empty() { Err(last) } else { Ok(hosts) }
    }

    async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        if let Ok(address) = name.parse() {
            return Ok(vec![address]);
        }
        if name == "localhost" {
            return Ok(vec![IpAddr::from([127, 0, 0, 1])]);
        }
        let resolver = self.plain.as_ref().ok_or(NO_SERVER)?;
        let found = resolver.lookup_ip(name).await.map_err(|e| format!("4.4.3 host {name}: {e}"))?;
        let addresses: Vec<IpAddr> = found.iter().collect();
        if addresses.is_empty() { Err(format!("4.4.3 host {name} has no address")) } else { Ok(addresses) }
    }

    /// A host's addresses and TLSA records, all of them secure (RFC 7672 §2.2). If its name is an alias and the whole way is secure,
    /// the records of what it stands for come first, those of the alias second.
    async fn with_anchors(
        &self,
        name: &str,
        port: u16,
        next_hop: Option<&str>,
    ) -> Result<(Vec<IpAddr>, Option<Arc<Anchors>>), String> {
        if name.parse::<IpAddr>().is_ok() {
            return Err(format!("4.7.5 {name} is no name, and DANE needs one"));
        }
        let mut addresses = Vec::new();
        let mut names = Vec::new();
        let mut failed = None;
        for kind in [RecordType::AAAA, RecordType::A] {
            let found = match self.lookup(name, kind, true).await {
                Ok(found) => found,
                Err(Nothing::NoRecords) => continue,
                Err(Nothing::NoName) => return Err(format!("4.4.3 host {name} does not exist")),
                // Perhaps the other family is there, and its addresses are secure or not used.
                Err(Nothing::Failed(why)) => {
                    failed = Some(format!("4.4.3 host {name}: {why}"));
                    continue;
                }
            };
            if !found.secure {
                return Err(format!("4.7.5 the addresses of {name} are not secured by DNSSEC"));
            }
            for data in found.records {
                let address = match data {
                    RData::A(a) => IpAddr::V4(a.0),
                    RData::AAAA(a) => IpAddr::V6(a.0),
                    _ => continue,
                };
                addresses.push(address);
            }
            if !names.contains(&found.owner) {
                names.push(found.owner);
            }
        }
        if addresses.is_empty() {
            return Err(failed.unwrap_or_else(|| format!("4.4.3 host {name} has no address")));
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
        for base in &names {
            let found = match self.lookup(&format!("_{port}._tcp.{base}"), RecordType::TLSA, true).await {
                Ok(found) if found.secure => found,
                Ok(_) | Err(Nothing::NoName | Nothing::NoRecords) => continue,
                // A failed lookup is no proof that there is none.
                Err(Nothing::Failed(why)) => return Err(format!("4.7.5 TLSA of {base}: {why}")),
            };
            let tlsa = |data| match data {
                RData::TLSA(tlsa) => Some(Tlsa {
                    usage: tlsa.cert_usage.into(),
                    selector: tlsa.selector.into(),
                    matching: tlsa.matching.into(),
                    data: tlsa.cert_data,
                }),
                _ => None,
            };
            let records = found.records.into_iter().filter_map(tlsa).collect();
            let mut vouched: Vec<String> = vec![base.clone(), name.to_owned()];
            vouched.extend(next_hop.map(Into::into));
            return match Anchors::new(records, vouched) {
                Some(anchors) => Ok((addresses, Some(Arc::new(anchors)))),
                None => Err(format!("4.7.5 {base} has no usable TLSA record")),
            };
        }
        Err(format!("4.7.5 {name} has no secure TLSA record for port {port}"))
    }

    async fn lookup(&self, name: &str, kind: RecordType, validate: bool) -> Result<Found, Nothing> {
        let resolver = if validate { &self.validating } else { &self.plain };
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

    /// MX hosts by preference, equals in any order; the domain itself if it has none (RFC 5321 §5.1).
    async fn mx(&self, domain: &str, strict: bool) -> Result<Vec<(String, u16)>, NoHost> {
        let found = match self.lookup(domain, RecordType::MX, strict).await {
            Ok(found) => found,
            // Under `dane` nothing is believed that is not proven, and hickory does not say whether a denial was.
            Err(Nothing::NoName) if strict => {
                return Err(NoHost::Later(format!("4.1.2 domain {domain} does not exist")));
            }
            Err(Nothing::NoName) => {
                return Err(NoHost::Failed(format!("5.1.2 domain {domain} does not exist")));
            }
            Err(Nothing::NoRecords) => return Ok(vec![(domain.into(), 25)]),
            Err(Nothing::Failed(why)) => return Err(NoHost::Later(format!("4.4.3 MX of {domain}: {why}"))),
        };
        if strict && !found.secure {
            return Err(NoHost::Later(format!("4.7.5 the MX of {domain} is not secured by DNSSEC")));
        }
        let mut hosts: Vec<(u16, u32, String)> = found
            .records
            .iter()
            .filter_map(|data| match data {
                RData::MX(mx) => {
                    let name = mx.exchange.to_ascii().trim_end_matches('.').to_ascii_lowercase();
                    Some((mx.preference, clock::random(), name))
                }
                _ => None,
            })
            .collect();
        // `0 .` alone says that the domain takes no mail (RFC 7505 §3); beside others it is ignored.
        if !hosts.is_empty() && hosts.iter().all(|(_, _, name)| name.is_empty()) {
            return Err(NoHost::Failed(format!("5.1.10 domain {domain} takes no mail: null MX")));
        }
        hosts.retain(|(_, _, name)| !name.is_empty());
        hosts.sort();
        if hosts.is_empty() {
            return Ok(vec![(domain.into(), 25)]);
        }
        Ok(hosts.into_iter().map(|(_, _, name)| (name, 25)).collect())
    }
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
}
