//! SIGHUP: the node file and all certificates are read again. Either all of it can be used and takes effect, or nothing changes and
//! the reason is said. Sessions and connections that are open go on as they began.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use holdfast_cluster::PeerTls;
use tokio_rustls::TlsAcceptor;

use crate::admin::server::{Admin, Facts};
use crate::config::Config;
use crate::live::Live;
use crate::maillog::MailLog;
use crate::node::{Doors, delivery_setup};
use crate::pki;
use crate::receive::connection::Shared;

/// Settings that take effect at a reload, by the beginning of their names. All others wait for the next start.
const RELOADABLE: [&str; 18] = [
    "admin.ca",
    "admin.cert",
    "admin.key",
    "cluster.ca",
    "cluster.cert",
    "cluster.key",
    "delivery.",
    "dns.",
    "log.",
    "queue.lifetime",
    "smtp.hostname",
    "smtp.idle_timeout",
    "smtp.listener",
    "smtp.max_message_bytes",
    "smtp.postmaster",
    "smtp.relay_networks",
    "smtp.tls_cert",
    "smtp.tls_key",
];

/// What a running node can exchange.
pub struct Reload {
    /// The node file.
    pub file: PathBuf,
    /// What it said when it was last read.
    pub config: Config,
    /// This node among its peers.
    pub peer_tls: PeerTls,
    /// TLS for operators.
    pub admin_tls: Arc<Live<TlsAcceptor>>,
    /// What operators see.
    pub admin: Arc<Admin>,
    /// The mail log.
    pub log: Arc<MailLog>,
    /// Makes what sessions share.
    pub doors: Doors,
    /// What they share now, by listener.
    pub listeners: BTreeMap<SocketAddr, Arc<Live<Shared>>>,
}

impl Reload {
    /// Reads everything again; the settings that changed and wait for the next start.
    ///
    /// # Errors
    /// What cannot be used. Nothing has changed.
    pub fn run(&mut self) -> anyhow::Result<Vec<String>> {
        let new = Config::load(&self.file)?;
        if (&new.cluster.id, new.node.id) != (&self.config.cluster.id, self.config.node.id) {
            anyhow::bail!("{}: [node] id and [cluster] id cannot change", self.file.display());
        }
        // First all that can fail.
        let (peer_tls, certificates) = pki::peer_tls(&new)?;
        let admin_tls = pki::admin_tls(&new)?;
        let shared = self.doors.open(&new)?;
        let setup = delivery_setup(&new, self.admin.delivery.setup().resolve.policies())?;
        self.log
            .reopen(&new.log.name, new.log.format, &new.log_output())
            .with_context(|| format!("[log] output = {}", new.log.output))?;
        self.peer_tls.replace_by(&peer_tls);
        self.admin_tls.set(admin_tls);
        let mut effective = self.config.clone();
        effective.queue.lifetime = new.queue.lifetime;
        self.admin.facts.set(Facts { config_hash: effective.hash(), certificates });
        self.admin.delivery.set_up(setup);
        let mut waiting = waiting(&self.config, &new);
        let mut shared: BTreeMap<SocketAddr, Shared> = shared.into_iter().collect();
        for (address, listener) in &self.listeners {
            match shared.remove(address) {
                Some(shared) => listener.set(shared),
                None => waiting.push(format!("listener {address}, gone from the file")),
            }
        }
        waiting.extend(shared.keys().map(|address| format!("listener {address}, new in the file")));
        // What waits for the next start is said again at the next reload.
        Ok(waiting)
    }
}

/// Settings that differ and are not reloadable.
fn waiting(old: &Config, new: &Config) -> Vec<String> {
    let (old, new) = (settings(old), settings(new));
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let differs = names.into_iter().filter(|name| old.get(*name) != new.get(*name));
    let waits = differs.filter(|name| !RELOADABLE.iter().any(|known| name.starts_with(known)));
    waits.cloned().collect()
}

/// Every setting by its name.
fn settings(config: &Config) -> BTreeMap<String, toml::Value> {
    let sections: toml::Table = toml::from_str(&config.effective()).unwrap_or_default();
    let mut all = BTreeMap::new();
    for (section, keys) in sections {
        if let toml::Value::Table(keys) = keys {
            all.extend(keys.into_iter().map(|(key, value)| (format!("{section}.{key}"), value)));
        }
    }
    all
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a node file of the test's own")]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_the_next_start_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let load = |text: &str| {
            let file = dir.path().join("node.toml");
            std::fs::write(&file, text).unwrap();
            Config::load(&file).unwrap()
        };
        let reference = include_str!("../config/reference.toml");
        let old = load(reference);
        let new = load(
            &reference
                .replace("erase_within = \"10s\"", "erase_within = \"5s\"")
                .replace("lifetime = \"15d\"", "lifetime = \"3d\"")
                .replace("max_sessions = 2000", "max_sessions = 20")
                .replace("retry_min = \"1m\"", "retry_min = \"2m\""),
        );
        assert_eq!(waiting(&old, &new), ["queue.erase_within", "smtp.max_sessions"]);
        assert_eq!(waiting(&old, &old), [""; 0]);
        let known = settings(&old);
        for name in RELOADABLE {
            assert!(known.keys().any(|key| key.starts_with(name)), "{name} is no setting");
        }
    }
}
