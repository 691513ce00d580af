//! Pure. Who may send what to whom: relaying only for routed domains and listed networks.

use std::net::IpAddr;

/// A network in CIDR notation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    base: u128,
    mask: u128,
    v6: bool,
}

fn bits(address: IpAddr) -> (u128, bool) {
    match address {
        IpAddr::V4(v4) => ((v4.to_bits() as u128) << 96, false),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => ((v4.to_bits() as u128) << 96, false),
            None => (v6.to_bits(), true),
        },
    }
}

impl Network {
    /// Reads `127.0.0.0/8`, `::1/128` or a single address. Bits below the mask must be zero, as they are a typing error
    /// otherwise.
    pub fn parse(text: &str) -> Option<Network> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address.parse().ok()?, Some(length.parse::<u32>().ok()?)),
            None => (text.parse().ok()?, None),
        };
        let (base, v6) = bits(address);
        let longest = if v6 { 128 } else { 32 };
        let length = length.unwrap_or(longest);
        if length > longest {
            return None;
        }
        let mask = if length == 0 { 0 } else { u128::MAX << (128 - length) };
        (base & !mask == 0).then_some(Network { base, mask, v6 })
    }

    /// Whether the address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (address, v6) = bits(address);
        v6 == self.v6 && address & self.mask == self.base
    }
}

/// By what right a recipient is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Right {
    /// Its domain has a route.
    Route,
    /// It has none, and may go anywhere: the client is of a listed network, or the recipient is our postmaster.
    Anywhere,
}

/// Why a recipient is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// 550 5.7.1: its domain has no route, and the client is not of a listed network.
    Relaying,
    /// 451 4.3.0: this node knows of no route, and may not know all yet.
    NotKnown,
}

/// Whether a recipient of `domain` is taken from a client. `routed` says whether the domain itself has a route; the route
/// `*` is for listed networks only, since with it alone everybody could send everywhere; `knows_all`, whether there can be no route that
/// this node does not know.
pub fn recipient(
    client: IpAddr,
    relay_networks: &[Network],
    routed: bool,
    knows_all: bool,
) -> Result<Right, Refusal> {
    if routed {
        Ok(Right::Route)
    } else if relay_networks.iter().any(|network| network.contains(client)) {
        Ok(Right::Anywhere)
    } else if knows_all {
        Err(Refusal::Relaying)
    } else {
        Err(Refusal::NotKnown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let network = Network::parse("10.1.0.0/16").unwrap();
        assert!(network.contains("10.1.255.1".parse().unwrap()));
        assert!(network.contains("::ffff:10.1.0.1".parse().unwrap()), "a mapped address is the same address");
        assert!(!network.contains("10.2.0.1".parse().unwrap()));
        assert!(!network.contains("::1".parse().unwrap()));
        assert!(Network::parse("0.0.0.0/0").unwrap().contains("8.8.8.8".parse().unwrap()));
        for bad in ["10.1.0.0/33", "10.1.2.3/16", "x", "10.0.0.0/8/8"] {
            assert_eq!(Network::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn no_relaying_for_strangers() {
        let stranger = "192.0.2.1".parse().unwrap();
        let friends = [Network::parse("192.0.2.0/30").unwrap()];
        assert_eq!(recipient(stranger, &[], false, true), Err(Refusal::Relaying));
        assert_eq!(recipient(stranger, &[], false, false), Err(Refusal::NotKnown), "there may be a route");
        for knows_all in [false, true] {
            let recipient = |networks: &[Network], routed| recipient(stranger, networks, routed, knows_all);
            assert_eq!(recipient(&[], true), Ok(Right::Route));
            assert_eq!(recipient(&friends, false), Ok(Right::Anywhere));
            assert_eq!(recipient(&friends, true), Ok(Right::Route), "it goes where the route says, or waits");
        }
    }
}
