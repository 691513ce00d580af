//! From a host or a domain to addresses (RFC 5321 §5.1, RFC 7505), and what TLS each host gets: its TLSA records (RFC 7672) and its
//! domain's MTA-STS policy are looked up here and weighed in [`super::need`].

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hickory_resolver::proto::rr::{RData, RecordType};

use super::answer::{Found, Nothing, text};
use super::dane::{self, Anchors};
use super::dns::Dns;
use super::need::{Candidate, Need, Tlsa, need};
use super::policies::Policies;
use super::route::{Target, Way};
use super::tls::ClientTls;
use crate::clock;
use crate::config;
use crate::queue::command::TlsPolicy;

/// Hosts that are tried for one delivery at the most.
const HOSTS_MAX: usize = 10;
/// Addresses of one host that are tried at the most.
const ADDRESSES_MAX: usize = 5;

/// A host to try, by its name and one address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// Its name, for the log.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// What TLS it gets.
    pub need: Need,
    /// Whether DNSSEC proves that it is where the mail belongs. True of the host of a route.
    pub is_proven: bool,
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
    dns: Dns,
    tls: ClientTls,
    policies: Arc<Policies>,
}

/// Where the mail of a way goes.
struct Hops {
    /// Names and ports in order.
    hosts: Vec<(String, u16)>,
    /// Whether DNSSEC proves that the mail belongs there.
    are_proven: bool,
}

impl Resolve {
    /// With the name servers of the settings. Policies that are known stay so with `policies`.
    ///
    /// # Errors
    /// If the trust anchor cannot be read.
    pub fn new(settings: &config::Dns, tls: ClientTls, policies: Arc<Policies>) -> anyhow::Result<Resolve> {
        Ok(Resolve { dns: Dns::new(settings)?, tls, policies })
    }

    /// The policies that are known.
    pub fn policies(&self) -> Arc<Policies> {
        self.policies.clone()
    }

    /// The hosts for a target in the order in which they are tried, without those that its TLS policy forbids.
    ///
    /// # Errors
    /// [`NoHost`] says whether that may change.
    pub async fn hosts(&self, target: &Target) -> Result<Vec<Host>, NoHost> {
        let domain = match &target.way {
            Way::Mx(domain) if !domain.starts_with('[') => Some(domain.as_str()),
            _ => None,
        };
        let hops = match &target.way {
            Way::Hosts(hosts) => Hops { hosts: hosts.clone(), are_proven: true },
            Way::Mx(domain) => match domain.strip_prefix('[').and_then(|d| d.strip_suffix(']')) {
                Some(literal) => {
                    let literal = literal
                        .get(..5)
                        .filter(|t| t.eq_ignore_ascii_case("ipv6:"))
                        .map_or(literal, |_| &literal[5..]);
                    Hops { hosts: vec![(literal.to_string(), 25)], are_proven: true }
                }
                None => self.mx(domain, target.tls).await?,
            },
        };
        let sts = match (target.tls, domain) {
            (TlsPolicy::Opportunistic | TlsPolicy::Verify, Some(domain)) => {
                self.policies.of(domain, &self.dns, &self.tls).await
            }
            _ => None,
        };
        let mut hosts = Vec::new();
        let mut last = NoHost::Later("4.4.3 no host".into());
        for (name, port) in hops.hosts.into_iter().take(HOSTS_MAX) {
            let found = match (target.tls, domain) {
                (TlsPolicy::Dane, _) | (TlsPolicy::Opportunistic, Some(_)) => {
                    self.with_tlsa(&name, port, domain, target.tls).await
                }
                _ => self.addresses(&name).await.map(|addresses| (addresses, Tlsa::None(String::new()))),
            };
            let usable = found.and_then(|(addresses, tlsa)| {
                let is_proven = hops.are_proven;
                let pins = &target.pins;
                let candidate =
                    Candidate { name: &name, domain, is_proven, tlsa: &tlsa, pins, sts: sts.as_ref() };
                Ok((addresses, need(target.tls, candidate)?))
            });
            match usable {
                Ok((addresses, need)) => {
                    hosts.extend(addresses.into_iter().take(ADDRESSES_MAX).map(|address| Host {
                        name: name.clone(),
                        address: SocketAddr::new(address, port),
                        need: need.clone(),
                        is_proven: hops.are_proven,
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
        self.dns.addresses(name).await.map_err(|why| format!("4.4.3 host {name}: {why}"))
    }

    /// Looks up with the proof that a policy takes.
    async fn look_up(&self, name: &str, kind: RecordType, policy: TlsPolicy) -> Result<Found, Nothing> {
        match policy {
            TlsPolicy::Dane => self.dns.strictly(name, kind).await,
            TlsPolicy::Opportunistic | TlsPolicy::Verify => self.dns.carefully(name, kind).await,
            TlsPolicy::None | TlsPolicy::Require => self.dns.plainly(name, kind).await,
        }
    }

    /// A host's addresses and its TLSA records, which are looked for only if what stands at its name is secure (RFC 7672 §2.2.2). If
    /// its name is an alias and the whole way is secure, the records of what it stands for come first, those of the alias second.
    /// The machine's hosts file is not asked: what it says is not signed, and a stranger's word must not pass for it.
    async fn with_tlsa(
        &self,
        name: &str,
        port: u16,
        domain: Option<&str>,
        policy: TlsPolicy,
    ) -> Result<(Vec<IpAddr>, Tlsa), String> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok((vec![address], Tlsa::None(format!("4.7.5 {name} is no name, and DANE needs one"))));
        }
        let mut families: Vec<Vec<IpAddr>> = Vec::new();
        let mut names = Vec::new();
        let (mut failed, mut is_secure, mut begins_secure) = (None, true, true);
        let (v6, v4) = tokio::join!(
            self.look_up(name, RecordType::AAAA, policy),
            self.look_up(name, RecordType::A, policy)
        );
        for found in [v6, v4] {
            let found = match found {
                Ok(found) => found,
                Err(Nothing::NoRecords) => continue,
                Err(Nothing::NoName) => {
                    failed = Some("it does not exist".to_string());
                    continue;
                }
                // Perhaps the other family is there.
                Err(Nothing::Failed(why)) => {
                    failed = Some(why);
                    continue;
                }
            };
            is_secure &= found.secure;
            begins_secure &= found.begins_secure;
            let address = |data: &RData| match data {
                RData::A(a) => Some(IpAddr::V4(a.0)),
                RData::AAAA(a) => Some(IpAddr::V6(a.0)),
                _ => None,
            };
            families.push(found.records.iter().filter_map(address).collect());
            if !names.contains(&found.owner) {
                names.push(found.owner);
            }
        }
        let addresses = by_turns(families);
        if addresses.is_empty() {
            return Err(format!(
                "4.4.3 host {name}: {}",
                failed.unwrap_or_else(|| "it has no address".into())
            ));
        }
        if !is_secure && begins_secure {
            // It is a secure alias of what is not: only its own records can be (RFC 7672 §2.2.3).
            names.clear();
        } else if !is_secure {
            let why = format!("4.7.5 the addresses of {name} are not secured by DNSSEC");
            return Ok((addresses, Tlsa::None(why)));
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
        for base in &names {
            let found = match self.dns.strictly(&format!("_{port}._tcp.{base}"), RecordType::TLSA).await {
                Ok(found) if found.secure => found,
                Ok(_) | Err(Nothing::NoName | Nothing::NoRecords) => continue,
                // A failed lookup is no proof that there is none (RFC 7672 §2.1.1).
                Err(Nothing::Failed(why)) => {
                    return Ok((addresses, Tlsa::Unknown(format!("4.7.5 TLSA of {base}: {why}"))));
                }
            };
            let tlsa = |data| match data {
                RData::TLSA(tlsa) => Some(dane::Tlsa {
                    usage: tlsa.cert_usage.into(),
                    selector: tlsa.selector.into(),
                    matching: tlsa.matching.into(),
                    data: tlsa.cert_data,
                }),
                _ => None,
            };
            let records = found.records.into_iter().filter_map(tlsa).collect();
            let mut vouched: Vec<String> = vec![base.clone(), name.to_owned()];
            vouched.extend(domain.map(Into::into));
            let tlsa = match Anchors::new(records, vouched) {
                Some(anchors) => Tlsa::Usable(Arc::new(anchors)),
                None => Tlsa::Unusable(format!("4.7.5 {base} has no usable TLSA record")),
            };
            return Ok((addresses, tlsa));
        }
        Ok((addresses, Tlsa::None(format!("4.7.5 {name} has no secure TLSA record for port {port}"))))
    }

    /// MX hosts by preference, equals in any order; the domain itself if it has none (RFC 5321 §5.1).
    async fn mx(&self, domain: &str, policy: TlsPolicy) -> Result<Hops, NoHost> {
        let strict = policy == TlsPolicy::Dane;
        let found = match self.look_up(domain, RecordType::MX, policy).await {
            Ok(found) => found,
            // Under `dane` nothing is believed that is not proven, and hickory does not say whether a denial was.
            Err(Nothing::NoName) if strict => {
                return Err(NoHost::Later(format!("4.1.2 domain {domain} does not exist")));
            }
            Err(Nothing::NoName) => {
                return Err(NoHost::Failed(format!("5.1.2 domain {domain} does not exist")));
            }
            // The domain itself is the host that was asked for, however it is known that it has no MX.
            Err(Nothing::NoRecords) => {
                return Ok(Hops { hosts: vec![(domain.into(), 25)], are_proven: true });
            }
            Err(Nothing::Failed(why)) => return Err(NoHost::Later(format!("4.4.3 MX of {domain}: {why}"))),
        };
        let are_proven = found.secure;
        let mut hosts: Vec<(u16, u32, String)> = found
            .records
            .iter()
            .filter_map(|data| match data {
                RData::MX(mx) => Some((mx.preference, clock::random(), text(&mx.exchange))),
                _ => None,
            })
            .collect();
        // `0 .` alone says that the domain takes no mail (RFC 7505 §3); beside others it is ignored.
        if !hosts.is_empty() && hosts.iter().all(|(_, _, name)| name.is_empty()) {
            if strict && !are_proven {
                return Err(NoHost::Later(format!("4.7.5 the MX of {domain} is not secured by DNSSEC")));
            }
            return Err(NoHost::Failed(format!("5.1.10 domain {domain} takes no mail: null MX")));
        }
        hosts.retain(|(_, _, name)| !name.is_empty());
        hosts.sort();
        if hosts.is_empty() {
            return Ok(Hops { hosts: vec![(domain.into(), 25)], are_proven: true });
        }
        Ok(Hops { hosts: hosts.into_iter().map(|(_, _, name)| (name, 25)).collect(), are_proven })
    }
}

/// Addresses of several families, one of each by turns: of those that are tried none is left out because another has many.
fn by_turns(families: Vec<Vec<IpAddr>>) -> Vec<IpAddr> {
    let mut families: Vec<_> = families.into_iter().map(Vec::into_iter).collect();
    let mut all = Vec::new();
    loop {
        let before = all.len();
        all.extend(families.iter_mut().filter_map(Iterator::next));
        if all.len() == before {
            return all;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_family_of_addresses_is_left_out() {
        let family = |v6: bool, count: u8| -> Vec<IpAddr> {
            let one = |n| {
                if v6 { IpAddr::from([0, 0, 0, 0, 0, 0, 0, n as u16]) } else { IpAddr::from([10, 0, 0, n]) }
            };
            (1..=count).map(one).collect()
        };
        let all = by_turns(vec![family(true, 9), family(false, 2)]);
        assert_eq!(all.len(), 11);
        assert_eq!(all.iter().take(ADDRESSES_MAX).filter(|a| a.is_ipv4()).count(), 2);
        assert!(by_turns(Vec::new()).is_empty());
    }
}
