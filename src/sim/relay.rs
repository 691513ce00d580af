//! The process that is a node, in simulation: the product's own wiring, with the simulated disk, index and network below it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use holdfast_cluster::{Bytes, Cluster, Fence, PeerTls};
use holdfast_storage::Keyring;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::index::sim::SimShelf;
use tokio::sync::mpsc;

use super::customers;
use super::world::{World, lock};
use crate::cli::init;
use crate::clock;
use crate::config::{Config, LogFormat, LogOutput, Size, Span};
use crate::maillog::MailLog;
use crate::node::{Place, Relay, cluster_settings};
use crate::pki;
use crate::queue::Queue;
use crate::queue::command::{Command, Route, RouteChange, TlsPolicy};

/// Nodes of the cluster.
pub(super) const NODES: u64 = 3;
/// Octets of each disk that are kept for draining.
pub(super) const RESERVE_BYTES: u64 = 16 << 20;

/// Where node `id` is.
pub(super) fn address(id: u64) -> IpAddr {
    IpAddr::from([10, 0, 0, id as u8])
}

/// The node that is there, if any is.
pub(super) fn number(address: IpAddr) -> Option<u64> {
    (1..=NODES).find(|id| self::address(*id) == address)
}

/// What a running node shows.
#[derive(Clone)]
pub(super) struct Running {
    pub(super) cluster: Cluster,
    pub(super) queue: Arc<Mutex<Queue>>,
}

/// What an operator may have a node do.
pub(super) enum Order {
    /// As after SIGTERM.
    Stop,
    /// If it leads, it hands over to this one, whatever is open.
    HandOver(u64),
    /// As after `cluster transfer`.
    Transfer(u64),
}

/// What becomes of a node's process.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) running: Option<Running>,
    pub(super) orders: Option<mpsc::UnboundedSender<Order>>,
    /// Why it ended by itself.
    pub(super) ended: Option<String>,
    /// It was told to stop, and has done what it does before it ends.
    pub(super) has_stopped: bool,
}

pub(super) type Shown = Arc<Mutex<Seen>>;

/// The settings and certificates of all nodes.
pub(super) struct Files {
    configs: BTreeMap<u64, (Config, PeerTls)>,
    _dir: tempfile::TempDir,
}

impl Files {
    pub(super) fn new() -> Files {
        let dir = tempfile::tempdir().unwrap();
        let label = |id: u64| char::from(b'A' + id as u8 - 1);
        let node = (1..=NODES).map(|id| format!("{id}={},power={},network={id}", address(id), label(id)));
        init::run(&init::Options {
            dir: dir.path().join("cluster"),
            nodes: NODES,
            base_port: 2500,
            datacenter: "dc1".into(),
            host: "127.0.0.1".into(),
            node: node.collect(),
            smtp_port: 25,
        })
        .unwrap();
        let configs = (1..=NODES).map(|id| {
            let mut config = Config::load(&dir.path().join(format!("cluster/node-{id}.toml"))).unwrap();
            let (tls, _) = pki::peer_tls(&config).unwrap();
            config.smtp.relay_networks = vec!["10.0.0.0/16".into()];
            config.delivery.bind = vec![address(id)];
            config.delivery.retry_min = Span(Duration::from_secs(1));
            config.delivery.retry_max = Span(Duration::from_secs(8));
            config.delivery.probe_max = Span(Duration::from_secs(8));
            config.storage.segment_bytes = Size(4 << 20);
            config.storage.reserve_bytes = Size(RESERVE_BYTES);
            config.storage.young_horizon = Span(Duration::from_secs(3));
            config.storage.keep_entries = 200;
            config.storage.scrub_rate = Size(1 << 20);
            (id, (config, tls))
        });
        Files { configs: configs.collect(), _dir: dir }
    }

    /// Runs node `id`.
    pub(super) fn main(
        &self,
        id: u64,
        disk: SimDisk,
        shelf: SimShelf,
        shown: Shown,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (config, tls) = self.configs[&id].clone();
        async move {
            let queue = Arc::new(Mutex::new(Queue::default()));
            let log = MailLog::open(
                "sim",
                "holdfast",
                LogFormat::Postfix,
                &LogOutput::File(Path::new("/dev/null").into()),
            );
            let log = Arc::new(log.unwrap());
            let end = {
                let shown = shown.clone();
                move |why: &str| lock(&shown).ended = Some(why.to_owned())
            };
            let place = Place {
                disk: Arc::new(disk),
                index: Box::new(shelf),
                keys: Keyring::default(),
                end: Arc::new(end),
            };
            let settings = cluster_settings(&config, tls, place, &log, &queue);
            let (tell, told) = tokio::sync::oneshot::channel();
            tokio::spawn(holdfast_cluster::run(settings, queue.clone(), |started| drop(tell.send(started))));
            let cluster = match told.await {
                Ok(Ok(cluster)) => cluster,
                Ok(Err(e)) => return lock(&shown).ended = Some(e.to_string()),
                Err(_) => return lock(&shown).ended = Some("it did not start".into()),
            };
            let relay = Relay::new(&config, log, queue.clone(), cluster.clone()).unwrap();
            if let Err(e) = relay.open(&config).await {
                return lock(&shown).ended = Some(e.to_string());
            }
            tokio::spawn(routes(cluster.clone()));
            let (orders, mut given) = mpsc::unbounded_channel();
            {
                let mut shown = lock(&shown);
                shown.orders = Some(orders);
                shown.running = Some(Running { cluster: cluster.clone(), queue });
            }
            while let Some(order) = given.recv().await {
                match order {
                    Order::HandOver(to) => {
                        cluster.hand_over(Some(to), Duration::from_secs(5)).await;
                    }
                    Order::Transfer(to) => {
                        relay.hand_over(to, Duration::from_secs(10)).await;
                    }
                    Order::Stop => {
                        relay.stop(&cluster).await;
                        lock(&shown).has_stopped = true;
                    }
                }
            }
            std::future::pending::<()>().await;
        }
    }
}

/// An operator sets the routes, as soon as somebody leads.
async fn routes(cluster: Cluster) {
    for (domain, host) in customers::DOMAINS.iter().zip(1..) {
        let address: SocketAddr = (customers::address(host), 25).into();
        let route = Route {
            hosts: vec![(address.ip().to_string(), address.port())],
            tls: TlsPolicy::None,
            ..Route::default()
        };
        let change = RouteChange::Set(route);
        let command = Command::Route { domain: (*domain).into(), change, only_if: None };
        loop {
            let deadline = clock::after(Duration::from_secs(5));
            let command = command.encode().into();
            if cluster.leader().is_none()
                || cluster.propose(command, Bytes::new(), Fence::Any, false, deadline).await.is_err()
            {
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
            break;
        }
    }
}

/// Whether somebody leads and all nodes know all routes.
pub(super) fn is_ready(world: &World) -> bool {
    world.running().len() as u64 == NODES
        && world.running().values().all(|node| lock(&node.queue).routes().len() == customers::DOMAINS.len())
}
