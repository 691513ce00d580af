//! A node: the only file that sees every layer. The order of its start is the order of this file: settings and keys, the log
//! and the cluster, then delivery, operators, and last the doors for mail.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use holdfast_cluster::{Cluster, LogIndex, PeerTls};
use holdfast_storage::disk::Disk;
use holdfast_storage::disk::os::OsDisk;
use holdfast_storage::index::Sealed;
use holdfast_storage::index::spilled::Directory;
use holdfast_storage::{Keyring, Options, ScrubReport, Shelf};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::admin::api::{About, AtRest, Scrub};
use crate::admin::server::{self as admin_server, Admin, Facts};
use crate::config::{Config, ListenerTls, parse_networks};
use crate::deliver::connection::Dialer;
use crate::deliver::leader::{Delivery, Settings as DeliverySettings, Setup};
use crate::deliver::policies::Policies;
use crate::deliver::resolve::Resolve;
use crate::deliver::tls::ClientTls;
use crate::live::Live;
use crate::maillog::{MailLog, Service};
use crate::pki;
use crate::queue::command::TlsMin;
use crate::queue::retry::Backoff;
use crate::queue::{Queue, level};
use crate::receive::connection::Shared;
use crate::receive::intake::Intake;
use crate::receive::listener::{self, Limits};
use crate::receive::session::Settings as SessionSettings;
use crate::reload::Reload;
use crate::schedule;
use crate::smtp::address::Mailbox;
use crate::{at_rest, leaving, room, upgrade};

/// A node may take this long to end after SIGTERM.
const STOP: Duration = Duration::from_secs(25);

/// Exit status after the log has stopped: the disk cannot be trusted.
const EXIT_DISK: i32 = 4;

/// Tells the mail log of erasures, with the time since settlement.
struct Erasures {
    log: Arc<MailLog>,
    queue: Arc<Mutex<Queue>>,
    within: Duration,
}

impl Erasures {
    fn note(&self, erased: &[(LogIndex, Duration)]) {
        let mut lines = Vec::with_capacity(erased.len());
        for (body, lag) in erased {
            let id = self.queue.lock().unwrap_or_else(PoisonError::into_inner).erased(*body);
            let Some(id) = id else { continue };
            if *lag > self.within {
                tracing::error!(%id, lag_s = lag.as_secs(), "erased later than erase_within allows");
            }
            lines.push((Service::Erase, format!("{id}: erased, lag={:.1}", lag.as_secs_f64())));
        }
        if !lines.is_empty() {
            self.log.write(0, &lines);
        }
    }
}

/// Runs a node until it is told to stop.
///
/// # Errors
/// One clear line about what keeps it from running.
pub fn run(file: &Path) -> anyhow::Result<()> {
    let config = Config::load(file)?;
    let (peer_tls, certificates) = pki::peer_tls(&config)?;
    let log = MailLog::open(&config.node.name, &config.log.name, config.log.format, &config.log_output())
        .with_context(|| format!("[log] output = {}", config.log.output))?;
    let log = Arc::new(log);
    let queue = Arc::new(Mutex::new(Queue::default()));
    let disk = OsDisk::open(&config.node.data_dir, config.storage.sync_delay.0)?;
    let keys = at_rest::keyring(&config.storage.key_file)?;
    let shelf = Directory::within(&config.node.data_dir, keys.sealing());
    let index = Sealed { shelf, keys: keys.clone() };
    let name = config.node.name.clone();
    // After a failed fsync nothing may be claimed any more: the process ends at once (ATC'20).
    let end = move |why: &str| {
        eprintln!("holdfast: {name}: ending: {why}");
        std::process::exit(EXIT_DISK);
    };
    let place = Place { disk: Arc::new(disk), index: Box::new(index), keys, end: Arc::new(end) };
    let settings = cluster_settings(&config, peer_tls.clone(), place, &log, &queue);
    let cluster = holdfast_cluster::start(settings, queue.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(file, config, (peer_tls, certificates), log, queue, cluster))
}

/// Where a node's state stands.
pub(crate) struct Place {
    /// Its data directory.
    pub(crate) disk: Arc<dyn Disk>,
    /// Its index.
    pub(crate) index: Box<dyn Shelf>,
    /// What it is sealed with.
    pub(crate) keys: Keyring,
    /// Ends the node: the log or consensus has stopped for good, for this reason.
    pub(crate) end: Arc<dyn Fn(&str) + Send + Sync>,
}

/// What the node's part in the cluster needs, by the settings.
pub(crate) fn cluster_settings(
    config: &Config,
    tls: PeerTls,
    place: Place,
    log: &Arc<MailLog>,
    queue: &Arc<Mutex<Queue>>,
) -> holdfast_cluster::Settings {
    let Place { disk, index, keys, end } = place;
    let erasures = Erasures { log: log.clone(), queue: queue.clone(), within: config.queue.erase_within.0 };
    let failed = end.clone();
    holdfast_cluster::Settings {
        cluster: config.cluster.id.clone(),
        id: config.node.id,
        members: config.members(),
        listen: config.cluster.listen.to_string(),
        tls,
        disk,
        index,
        reserve_bytes: config.storage.reserve_bytes.0,
        log: Options {
            segment_bytes: config.storage.segment_bytes.0,
            move_below_percent: holdfast_storage::limits::MOVE_BELOW_PERCENT,
            scrub_bytes_per_second: config.storage.scrub_rate.0,
            keys,
            on_erased: Arc::new(move |erased| erasures.note(erased)),
            on_failure: Arc::new(move |why| failed(&format!("the log has stopped: {why}"))),
        },
        election_ms: (config.cluster.election_min.ms(), config.cluster.election_max.ms()),
        heartbeat_ms: config.cluster.heartbeat.ms(),
        on_fatal: Box::new(move |why| end(why)),
        keep_entries: config.storage.keep_entries,
        checkpoint_after: config.storage.young_horizon.0,
    }
}

/// What a node does for mail.
pub(crate) struct Relay {
    /// Set when the node goes down.
    draining: watch::Sender<bool>,
    intake: Arc<Intake>,
    delivery: Arc<Delivery>,
    limits: Arc<Limits>,
    doors: Doors,
    moving: [tokio::task::JoinHandle<()>; 2],
}

impl Relay {
    /// Delivers from now on, if this node leads; nobody can hand in anything yet.
    ///
    /// # Errors
    /// If a file that the settings name cannot be read.
    pub(crate) fn new(
        config: &Config,
        log: Arc<MailLog>,
        queue: Arc<Mutex<Queue>>,
        cluster: Cluster,
    ) -> anyhow::Result<Relay> {
        let (draining, drains) = watch::channel(false);
        let intake = Arc::new(Intake::new(
            cluster.clone(),
            queue.clone(),
            cluster.starts(),
            config.queue.accept_timeout.0,
            config.storage.reserve_bytes.0,
            config.smtp.receive_memory.0,
        ));
        let setup = delivery_setup(config, Arc::default())?;
        let delivery = Delivery::new(cluster.clone(), queue.clone(), log.clone(), intake.clone(), setup);
        let delivery = Arc::new(delivery);
        tokio::spawn(delivery.clone().run());
        tell_about(&cluster, &delivery, &intake);
        tokio::spawn(upgrade::run(cluster.clone(), queue.clone()));
        let reserve = config.storage.reserve_bytes.0;
        let room = tokio::spawn(room::run(cluster.clone(), queue, delivery.clone(), reserve));
        let leaving = tokio::spawn(leaving::run(cluster, delivery.clone()));
        let limits = Arc::new(Limits::new(config.smtp.max_sessions, config.smtp.max_sessions_per_client));
        let doors = Doors { log, intake: intake.clone(), drains };
        Ok(Relay { draining, intake, delivery, limits, doors, moving: [room, leaving] })
    }

    /// Opens the doors: mail comes in from now on.
    ///
    /// # Errors
    /// If a certificate cannot be read or an address is taken.
    pub(crate) async fn open(
        &self,
        config: &Config,
    ) -> anyhow::Result<BTreeMap<SocketAddr, Arc<Live<Shared>>>> {
        let mut listeners = BTreeMap::new();
        for (address, shared) in self.doors.open(config)? {
            let listener = listener::bind(address).await.map_err(anyhow::Error::msg)?;
            let shared = Arc::new(Live::new(shared));
            tokio::spawn(listener::run(listener, shared.clone(), self.limits.clone()));
            listeners.insert(address, shared);
        }
        Ok(listeners)
    }

    /// As an operator asks for it.
    #[cfg(test)]
    pub(crate) async fn hand_over(&self, to: u64, patience: Duration) {
        self.delivery.hand_over(Some(to), patience).await;
    }

    /// Takes nothing new, ends what is under way, and hands leadership over.
    pub(crate) async fn stop(&self, cluster: &Cluster) {
        self.moving.iter().for_each(tokio::task::JoinHandle::abort);
        let stop = async {
            self.draining.send_replace(true);
            self.delivery.drain(STOP / 2).await;
            cluster.hand_over(None, STOP / 4).await;
            // Whoever has sent a message hears what became of it.
            while self.limits.sessions() > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(STOP, stop).await.is_err() {
            tracing::warn!("stopping took too long; what was open is done again by the next leader");
        }
    }
}

async fn serve(
    file: &Path,
    config: Config,
    (peer_tls, certificates): (PeerTls, Vec<pki::Certificate>),
    log: Arc<MailLog>,
    queue: Arc<Mutex<Queue>>,
    cluster: Cluster,
) -> anyhow::Result<()> {
    let relay = Relay::new(&config, log.clone(), queue.clone(), cluster.clone())?;
    let admin = Arc::new(Admin {
        cluster: cluster.clone(),
        queue: queue.clone(),
        delivery: relay.delivery.clone(),
        intake: relay.intake.clone(),
        cluster_id: config.cluster.id.clone(),
        facts: Live::new(Facts { config_hash: config.hash(), certificates }),
    });
    let admin_listener = admin_server::bind(config.admin.listen).await.map_err(anyhow::Error::msg)?;
    let admin_tls = Arc::new(Live::new(pki::admin_tls(&config)?));
    tokio::spawn(admin_server::run(admin_listener, admin_tls.clone(), admin.clone()));
    let listeners = relay.open(&config).await?;
    tracing::info!(node = config.node.id, "serving");
    let file = file.to_path_buf();
    stop_signal(Reload {
        file,
        config,
        peer_tls,
        admin_tls,
        admin,
        log,
        doors: relay.doors.clone(),
        listeners,
    })
    .await?;
    tracing::info!("stopping");
    relay.stop(&cluster).await;
    Ok(())
}

/// Has this node's report say what it does for mail.
fn tell_about(cluster: &Cluster, delivery: &Arc<Delivery>, intake: &Arc<Intake>) {
    // The cluster must not keep alive what holds the cluster.
    let (delivery, intake) = (Arc::downgrade(delivery), Arc::downgrade(intake));
    cluster.tell_about(move |cluster| {
        let (Some(delivery), Some(intake)) = (delivery.upgrade(), intake.upgrade()) else {
            return Vec::new();
        };
        let egress = delivery.setup().dialer.egress();
        let why_not = intake.not_accepting().map(|(why, _)| why);
        let scrub = Some(scrub(&cluster.scrubbed()));
        let (key, other_key_bytes) = cluster.at_rest();
        let at_rest = Some(AtRest { key: key.map(|key| key.to_string()), other_key_bytes });
        let held = delivery.held();
        let about = About { egress, why_not, scrub, at_rest, level: level::NEWEST, held };
        serde_json::to_vec(&about).unwrap_or_default()
    });
}

fn scrub((report, to_mend): &(ScrubReport, usize)) -> Scrub {
    Scrub {
        passes: report.passes,
        percent: report.percent,
        bytes: report.bytes,
        damaged: report.damaged,
        to_mend: *to_mend as u64,
        last_pass_s: report.last_pass.map(|took| took.as_secs()),
    }
}

/// How to deliver, by the settings.
///
/// # Errors
/// If a file that they name cannot be read.
pub(crate) fn delivery_setup(config: &Config, policies: Arc<Policies>) -> anyhow::Result<Setup> {
    let d = &config.delivery;
    let tls = ClientTls::new(pki::more_authorities(config)?).context("[delivery] ca")?;
    let helo = if d.helo.is_empty() { config.smtp.hostname.clone() } else { d.helo.clone() };
    let dialer = Dialer {
        bind: d.bind.clone(),
        helo,
        connect_timeout: d.connect_timeout.0,
        reply_timeout: d.reply_timeout.0,
        tls: tls.clone(),
        quirks: Arc::default(),
    };
    let pace = schedule::Pace {
        connections_initial: 5,
        connections_max: d.max_connections_per_destination,
        probe: Backoff { min_ms: d.probe_min.ms(), max_ms: d.probe_max.ms() },
    };
    let settings = DeliverySettings {
        hostname: config.smtp.hostname.clone(),
        lifetime_ms: config.queue.lifetime.ms(),
        retry: Backoff { min_ms: d.retry_min.ms(), max_ms: d.retry_max.ms() },
        limits: schedule::Limits { connections_max: d.max_connections, pace },
    };
    let resolve = Resolve::new(&config.dns, tls, policies).context("[dns]")?;
    Ok(Setup { dialer, resolve, settings })
}

/// What the listeners for mail have in common.
#[derive(Clone)]
pub struct Doors {
    log: Arc<MailLog>,
    intake: Arc<Intake>,
    drains: watch::Receiver<bool>,
}

impl Doors {
    /// What the sessions of each listener share, by the settings.
    ///
    /// # Errors
    /// If a certificate cannot be read.
    pub(crate) fn open(&self, config: &Config) -> anyhow::Result<Vec<(SocketAddr, Shared)>> {
        let smtp = &config.smtp;
        let Ok(postmaster) = Mailbox::parse(&smtp.postmaster) else { bail!("smtp.postmaster was checked") };
        let door =
            |tls: Option<TlsAcceptor>, mode: ListenerTls, networks: &[String], balancers: &[String]| Shared {
                settings: Arc::new(SessionSettings {
                    hostname: smtp.hostname.clone(),
                    postmaster: postmaster.clone(),
                    message_bytes_max: smtp.max_message_bytes.0,
                    starttls: tls.is_some() && mode != ListenerTls::Implicit,
                    require_tls: mode == ListenerTls::Require,
                }),
                relay_networks: parse_networks(networks),
                proxy_from: parse_networks(balancers),
                tls,
                implicit_tls: mode == ListenerTls::Implicit,
                intake: self.intake.clone(),
                log: self.log.clone(),
                idle_timeout: smtp.idle_timeout.0,
                draining: self.drains.clone(),
            };
        let tls = |cert: &Option<PathBuf>, key: &Option<PathBuf>, oldest| {
            pki::smtp_tls(cert.as_deref(), key.as_deref(), oldest)
        };
        let own_tls = tls(&smtp.tls_cert, &smtp.tls_key, TlsMin::default())?;
        let mut doors = Vec::new();
        for address in &smtp.listen {
            let mode = ListenerTls::Opportunistic;
            doors.push((*address, door(own_tls.clone(), mode, &smtp.relay_networks, &[])));
        }
        for l in &smtp.listener {
            let (cert, key) = match &l.tls_cert {
                Some(_) => (&l.tls_cert, &l.tls_key),
                None => (&smtp.tls_cert, &smtp.tls_key),
            };
            let tls = tls(cert, key, l.tls_min).with_context(|| format!("listener {}", l.name))?;
            doors.push((l.address, door(tls, l.tls, &l.relay_networks, &l.proxy_from)));
        }
        Ok(doors)
    }
}

/// Waits for the end. SIGHUP meanwhile reads the node file and the certificates again.
async fn stop_signal(mut reload: Reload) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => {}
        }
        match reload.run() {
            Ok(waiting) if waiting.is_empty() => tracing::info!("settings and certificates were read again"),
            Ok(waiting) => {
                tracing::warn!(
                    "settings and certificates were read again; changed, and waiting for the next start: {}",
                    waiting.join(", ")
                );
            }
            Err(e) => tracing::error!("settings stay as they were: {e:#}"),
        }
    }
}
