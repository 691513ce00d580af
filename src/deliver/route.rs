//! Pure. Which destination a recipient's domain has: its route, or the MX of the domain.

use crate::queue::Queue;
use crate::queue::command::TlsPolicy;
use crate::schedule::Key;

/// Where mail goes next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// What it is called in the scheduler.
    pub key: Key,
    /// Hosts of a route, or the domain whose MX is asked for.
    pub way: Way,
    /// How TLS is used.
    pub tls: TlsPolicy,
}

/// How hosts are found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Way {
    /// Configured hosts with ports, in order.
    Hosts(Vec<(String, u16)>),
    /// The MX of a domain.
    Mx(String),
}

/// The destination of a domain.
pub fn target(queue: &Queue, domain: &str) -> Target {
    let route = queue.route(domain);
    let tls = route.map_or(TlsPolicy::default(), |r| r.tls);
    let way = match route {
        Some(route) if !route.hosts.is_empty() => Way::Hosts(route.hosts.clone()),
        _ => Way::Mx(domain.into()),
    };
    let hosts = match &way {
        Way::Hosts(hosts) => hosts.iter().map(|(h, p)| format!("{h}:{p}")).collect::<Vec<_>>().join(","),
        Way::Mx(domain) => format!("mx:{domain}"),
    };
    Target { key: format!("{hosts}/{}", tls.word()), way, tls }
}
