//! The `PolicyFetch` edge: MTA-STS policies of domains, fetched over HTTPS (RFC 8461 §3.3) and kept in memory for as long as they
//! count. When one is fetched decides [`super::mta_sts`].
#![expect(clippy::disallowed_methods, reason = "this is the PolicyFetch edge")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use hickory_resolver::proto::rr::{RData, RecordType};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::answer::Nothing;
use super::dns::Dns;
use super::mta_sts::{Announced, Kept, POLICY_BYTES_MAX, Policy, fetch, record_id};
use super::tls::{ClientTls, Trust};
use crate::clock;
use crate::queue::command::TlsMin;

/// Memory for policies, octets; beyond it those go that end first.
const WEIGHT_MAX: usize = 16 << 20;
/// A policy is here within this time or not at all.
const FETCH_TIMEOUT: Duration = Duration::from_secs(20);
/// Addresses of a policy's host that are tried.
const ADDRESSES_MAX: usize = 4;
/// Policies that are fetched at the same time.
const FETCHES_MAX: usize = 64;

/// Policies that are known.
pub struct Policies {
    began: Instant,
    kept: Mutex<BTreeMap<String, Kept>>,
    /// Whoever fetches a domain's policy holds its lock; the others that want it wait and then find it.
    fetching: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    room: Semaphore,
}

impl Default for Policies {
    fn default() -> Policies {
        Policies {
            began: clock::now(),
            kept: Mutex::default(),
            fetching: Mutex::default(),
            room: Semaphore::new(FETCHES_MAX),
        }
    }
}

impl Policies {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        clock::now().duration_since(self.began)
    }

    /// A domain's policy, if there is one that counts. It is fetched if need be.
    pub(super) async fn of(&self, domain: &str, dns: &Dns, tls: &ClientTls) -> Option<Policy> {
        let announced = announced(domain, dns).await;
        let due = || fetch(self.kept().get(domain), &announced, self.now());
        if due().is_some() {
            let lock = {
                let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
                fetching.retain(|_, lock| Arc::strong_count(lock) > 1);
                fetching.entry(domain.to_owned()).or_default().clone()
            };
            let knows = self.kept().get(domain).is_some_and(|kept| kept.valid(self.now()).is_some());
            // Who has one that counts waits for nobody.
            let turn = if knows { lock.try_lock().ok() } else { Some(lock.lock().await) };
            if turn.is_some()
                && let Some(id) = due()
            {
                self.renew(domain, &id, dns, tls).await;
            }
        }
        self.kept().get(domain)?.valid(self.now()).cloned()
    }

    /// Fetches a policy, and keeps it or that it could not be fetched.
    async fn renew(&self, domain: &str, id: &str, dns: &Dns, tls: &ClientTls) {
        let fetched = timeout(FETCH_TIMEOUT, async {
            let _room = self.room.acquire().await?;
            get(domain, dns, tls).await
        });
        let fetched = fetched.await.unwrap_or_else(|_| Err(anyhow::anyhow!("timed out")));
        let now = self.now();
        let mut kept = self.kept();
        let entry = match fetched {
            Ok(policy) => Kept::after_fetch(id, policy, now),
            Err(why) => {
                tracing::warn!(domain, why = format!("{why:#}"), "no MTA-STS policy could be fetched");
                Kept::after_failure(kept.get(domain), id, now)
            }
        };
        kept.insert(domain.to_owned(), entry);
        make_room(&mut kept, WEIGHT_MAX);
    }
}

/// Lets go of what ends first until the rest fits.
fn make_room(kept: &mut BTreeMap<String, Kept>, weight_max: usize) {
    let weight = |(domain, kept): (&String, &Kept)| {
        domain.len() + kept.id.len() + 128 + kept.policy.as_ref().map_or(0, Policy::weight)
    };
    let ends = |kept: &Kept| {
        kept.fetched + Duration::from_secs(kept.policy.as_ref().map_or(0, |policy| policy.max_age_s))
    };
    let mut total: usize = kept.iter().map(weight).sum();
    while total > weight_max {
        let Some(first) = kept.iter().min_by_key(|(_, kept)| ends(kept)).map(|(domain, _)| domain.clone())
        else {
            return;
        };
        if let Some(entry) = kept.remove_entry(&first) {
            total -= weight((&entry.0, &entry.1));
        }
    }
}

async fn announced(domain: &str, dns: &Dns) -> Announced {
    let found = match dns.carefully(&format!("_mta-sts.{domain}"), RecordType::TXT).await {
        Ok(found) => found,
        Err(Nothing::NoName | Nothing::NoRecords) => return Announced::Nothing,
        Err(Nothing::Failed(why)) => {
            tracing::debug!(domain, why, "whether there is an MTA-STS policy could not be looked up");
            return Announced::Nothing;
        }
    };
    let text = |data: &RData| match data {
        RData::TXT(txt) => Some(String::from_utf8_lossy(&txt.txt_data.concat()).into_owned()),
        _ => None,
    };
    let records: Vec<String> = found.records.iter().filter_map(text).collect();
    record_id(&records).map_or(Announced::Nothing, Announced::Id)
}

/// Fetches a policy: from a host whose certificate a public authority vouches for, without following it elsewhere.
async fn get(domain: &str, dns: &Dns, tls: &ClientTls) -> anyhow::Result<Policy> {
    let host = format!("mta-sts.{domain}");
    let addresses = dns.addresses(&host).await.map_err(|why| anyhow::anyhow!("host {host}: {why}"))?;
    let mut stream = Err(anyhow::anyhow!("host {host} has no address"));
    for address in addresses.into_iter().take(ADDRESSES_MAX) {
        let address = SocketAddr::new(address, 443);
        match timeout(FETCH_TIMEOUT / 4, TcpStream::connect(address)).await {
            Ok(Ok(connected)) => {
                stream = Ok(connected);
                break;
            }
            Ok(Err(e)) => stream = Err(anyhow::anyhow!("connect to {address}: {e}")),
            Err(_) => stream = Err(anyhow::anyhow!("connect to {address}: timed out")),
        }
    }
    let config = tls.config(&Trust::WebPki(host.clone()), TlsMin::default())?;
    let name = ServerName::try_from(host.clone())?;
    let stream = TlsConnector::from(config).connect(name, stream?).await.context("TLS handshake")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/.well-known/mta-sts.txt")
        .header(HOST, &host)
        .header(USER_AGENT, concat!("holdfast/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())?;
    let ask = async {
        let answer = sender.send_request(request).await?;
        // A redirection is not followed (RFC 8461 §3.3).
        ensure!(answer.status() == 200, "HTTP status {}", answer.status());
        let kind = answer.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        ensure!(kind == "text/plain", "its content type is `{}`", kind.escape_default());
        let body = Limited::new(answer.into_body(), POLICY_BYTES_MAX).collect().await;
        let body = body.map_err(|e| anyhow::anyhow!("{e}"))?.to_bytes();
        let Ok(text) = std::str::from_utf8(&body) else { bail!("it is no text") };
        Policy::parse(text).map_err(anyhow::Error::msg)
    };
    let mut ask = std::pin::pin!(ask);
    tokio::select! {
        policy = &mut ask => policy,
        // What came before the connection ended may be all of it: many hosts end TLS without saying so.
        ended = connection => {
            let policy = ask.await;
            policy.or_else(|why| ended.map_err(anyhow::Error::from).and(Err(why)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mta_sts::Mode;
    use super::*;

    #[test]
    fn memory_is_bounded() {
        let mut kept = BTreeMap::new();
        for n in 0..1000_u64 {
            let policy = Policy { mode: Mode::Enforce, mx: vec!["mx.example".into()], max_age_s: 1000 + n };
            kept.insert(format!("{n}.example"), Kept::after_fetch("1", policy, Duration::ZERO));
            make_room(&mut kept, 10_000);
        }
        assert!((20..60).contains(&kept.len()), "{}", kept.len());
        assert!(kept.contains_key("999.example") && !kept.contains_key("0.example"));
    }
}
