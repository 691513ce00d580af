//! The `Resolver` edge: from a host or a domain to addresses (RFC 5321 §5.1, RFC 7505), by hickory.

use std::net::{IpAddr, SocketAddr};

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::{RData, RecordType};

use super::route::Way;
use crate::clock;

/// Hosts that are tried for one delivery at the most.
const HOSTS_MAX: usize = 10;
/// Addresses of one host that are tried at the most.
const ADDRESSES_MAX: usize = 5;

/// A host to try, by its name and one address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// Its name, for TLS and the log.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
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
    resolver: Option<TokioResolver>,
}

impl Default for Resolve {
    fn default() -> Resolve {
        Resolve::new()
    }
}

impl Resolve {
    /// With the system's settings. Without any, only address literals and `localhost` are found.
    pub fn new() -> Resolve {
        let resolver = TokioResolver::builder_tokio().and_then(|builder| builder.build());
        if let Err(e) = &resolver {
            tracing::warn!(error = %e, "no name server is configured");
        }
        Resolve { resolver: resolver.ok() }
    }

    /// The hosts of a way in the order in which they are tried.
    ///
    /// # Errors
    /// [`NoHost`] says whether that may change.
    pub async fn hosts(&self, way: &Way) -> Result<Vec<Host>, NoHost> {
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
                None => self.mx(domain).await?,
            },
        };
        let mut hosts = Vec::new();
        let mut last = NoHost::Later("4.4.3 no host".into());
        for (name, port) in named.into_iter().take(HOSTS_MAX) {
            match self.addresses(&name).await {
                Ok(addresses) => hosts.extend(
                    addresses
                        .into_iter()
                        .take(ADDRESSES_MAX)
                        .map(|address| Host { name: name.clone(), address: SocketAddr::new(address, port) }),
                ),
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
        let resolver = self.resolver.as_ref().ok_or("4.4.3 no name server is configured")?;
        let found = resolver.lookup_ip(name).await.map_err(|e| format!("4.4.3 host {name}: {e}"))?;
        let addresses: Vec<IpAddr> = found.iter().collect();
        if addresses.is_empty() { Err(format!("4.4.3 host {name} has no address")) } else { Ok(addresses) }
    }

    /// MX hosts by preference, equals in any order; the domain itself if it has none (RFC 5321 §5.1).
    async fn mx(&self, domain: &str) -> Result<Vec<(String, u16)>, NoHost> {
        let Some(resolver) = &self.resolver else {
            return Err(NoHost::Later("4.4.3 no name server is configured".into()));
        };
        let found = match resolver.lookup(domain, RecordType::MX).await {
            Ok(found) => found,
            Err(e) if e.is_nx_domain() => {
                return Err(NoHost::Failed(format!("5.1.2 domain {domain} does not exist")));
            }
            Err(e) if e.is_no_records_found() => return Ok(vec![(domain.into(), 25)]),
            Err(e) => return Err(NoHost::Later(format!("4.4.3 MX of {domain}: {e}"))),
        };
        let mut hosts: Vec<(u16, u32, String)> = found
            .answers()
            .iter()
            .filter_map(|record| match &record.data {
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
