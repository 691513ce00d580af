//! Listening for clients, within bounds: so many sessions in all and from one address; who comes beyond gets 421.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_cluster::net::{Listener, Stream};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tracing::Instrument;

use super::connection::{Shared, serve};
use super::proxy;
use crate::live::Live;
use crate::maillog::{Service, clean};

/// Sessions at the same time.
pub struct Limits {
    total: Arc<Semaphore>,
    per_client: usize,
    clients: Mutex<BTreeMap<IpAddr, usize>>,
    numbers: AtomicU64,
}

impl Limits {
    /// Bounds over all listeners of a node.
    pub fn new(total: usize, per_client: usize) -> Limits {
        Limits {
            total: Arc::new(Semaphore::new(total)),
            per_client,
            clients: Mutex::default(),
            numbers: AtomicU64::new(1),
        }
    }

    /// How many sessions there are.
    pub fn sessions(&self) -> usize {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    fn enter(&self, address: IpAddr) -> bool {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(address).or_default();
        if *count >= self.per_client {
            return false;
        }
        *count += 1;
        true
    }

    fn leave(&self, address: IpAddr) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&address);
            }
        }
    }
}

/// Opens a listener.
///
/// # Errors
/// The system's answer, with the setting that names the address.
pub async fn bind(address: SocketAddr) -> Result<Listener, String> {
    Listener::bind(&address.to_string())
        .await
        .map_err(|e| format!("[smtp] listener {address}: {e}; is another process listening there?"))
}

/// Serves clients until the node goes down.
pub async fn run(listener: Listener, shared: Arc<Live<Shared>>, limits: Arc<Limits>) {
    let mut draining = shared.get().draining.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = draining.wait_for(|down| *down) => return,
        };
        let (mut stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!(error = %e, "accepting a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let number = limits.numbers.fetch_add(1, Ordering::Relaxed);
        let (shared, limits) = (shared.get(), limits.clone());
        let Ok(permit) = limits.total.clone().try_acquire_owned() else {
            tokio::spawn(async move { turn_away(&shared, stream, peer, number).await });
            continue;
        };
        tokio::spawn(async move {
            let client = match shared.proxy_from.iter().any(|network| network.contains(peer.ip())) {
                false => Ok(Some(peer)),
                true => proxy::read(&mut stream).await,
            };
            let is_named = matches!(client, Ok(Some(_)));
            match client.map(|client| client.unwrap_or(peer)) {
                Ok(client) if limits.enter(client.ip()) => {
                    let span = tracing::info_span!("session", number, %client);
                    serve(shared, stream, client, is_named, number).instrument(span).await;
                    limits.leave(client.ip());
                }
                Ok(client) => turn_away(&shared, stream, client, number).await,
                Err(why) => {
                    let line =
                        format!("NOQUEUE: reject: CONNECT from unknown[{}]: {}", peer.ip(), clean(&why));
                    shared.log.line(number, Service::Smtpd, line);
                }
            }
            drop(permit);
        });
    }
}

/// Tells a client that there are too many.
async fn turn_away(shared: &Shared, mut stream: Stream, client: SocketAddr, number: u64) {
    let hostname = &shared.settings.hostname;
    let text = format!("421 4.7.0 {hostname} Error: too many connections\r\n");
    let line =
        format!("NOQUEUE: reject: CONNECT from unknown[{}]: 421 4.7.0 too many connections", client.ip());
    shared.log.line(number, Service::Smtpd, line);
    drop(tokio::time::timeout(Duration::from_secs(5), stream.write_all(text.as_bytes())).await);
}
