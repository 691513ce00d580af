//! The node file: parsed once, checked whole, refused with file, line and remedy. After this nothing is a string that still
//! has to be believed.
#![expect(
    clippy::disallowed_methods,
    reason = "this is the edge to the node file and the key files it names"
)]

mod quantity;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_cluster::{Member, Placement};
use serde::{Deserialize, Serialize};

pub use quantity::{Size, Span};

use crate::queue::apply::ACCEPT_TIMEOUT_MAX_MS;
use crate::queue::command::TlsMin;
use crate::receive::policy::Network;
use crate::smtp::address::{Mailbox, is_domain};

/// A setting that is wrong: where, what, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{file}{line}: {what}")]
pub struct ConfigError {
    file: String,
    line: Line,
    what: String,
}

#[derive(Debug)]
struct Line(Option<usize>);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, ":{line}"))
    }
}

/// The node file as it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node.
    pub node: Node,
    /// The cluster and its peers.
    pub cluster: Cluster,
    /// Taking mail.
    pub smtp: Smtp,
    /// Operators' access.
    pub admin: Admin,
    /// The queue.
    #[serde(default)]
    pub queue: Queue,
    /// Delivery.
    #[serde(default)]
    pub delivery: Delivery,
    /// Looking names up.
    #[serde(default)]
    pub dns: Dns,
    /// The data directory's files.
    #[serde(default)]
    pub storage: Storage,
    /// The mail log.
    #[serde(default)]
    pub log: Log,
}

/// `[node]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The node's id, 1 to 255; never used again once removed.
    pub id: u64,
    /// Its name in the log.
    pub name: String,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Where it stands.
    pub placement: Place,
}

/// Labels of a placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Datacenter.
    pub datacenter: String,
    /// Power feed.
    pub power: String,
    /// Network.
    pub network: String,
}

/// `[cluster]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// The cluster's id, written by `init`.
    pub id: String,
    /// Where to listen for peers.
    pub listen: SocketAddr,
    /// All initial members, this node included.
    pub peers: Vec<Peer>,
    /// The cluster's authority.
    pub ca: PathBuf,
    /// This node's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Shortest election timeout.
    #[serde(default = "defaults::election_min")]
    pub election_min: Span,
    /// Longest election timeout; the lease of a leader is three quarters of it.
    #[serde(default = "defaults::election_max")]
    pub election_max: Span,
    /// Heartbeat interval.
    #[serde(default = "defaults::heartbeat")]
    pub heartbeat: Span,
}

/// A peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its id.
    pub id: u64,
    /// Where peers reach it.
    pub address: String,
    /// Where operators reach it.
    pub admin: String,
    /// Where it stands.
    pub placement: Place,
}

/// `[smtp]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smtp {
    /// The public listeners.
    pub listen: Vec<SocketAddr>,
    /// Our name in greetings and headers.
    pub hostname: String,
    /// Where `<Postmaster>` goes.
    pub postmaster: String,
    /// Largest message.
    #[serde(default = "defaults::max_message_bytes")]
    pub max_message_bytes: Size,
    /// Networks that may send anywhere.
    #[serde(default)]
    pub relay_networks: Vec<String>,
    /// Certificate for STARTTLS.
    #[serde(default)]
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    #[serde(default)]
    pub tls_key: Option<PathBuf>,
    /// How long a client may be silent.
    #[serde(default = "defaults::idle_timeout")]
    pub idle_timeout: Span,
    /// Sessions at the same time.
    #[serde(default = "defaults::max_sessions")]
    pub max_sessions: usize,
    /// Sessions at the same time from one address.
    #[serde(default = "defaults::max_sessions_per_client")]
    pub max_sessions_per_client: usize,
    /// Memory for messages that are being received.
    #[serde(default = "defaults::receive_memory")]
    pub receive_memory: Size,
    /// Further listeners.
    #[serde(default)]
    pub listener: Vec<Listener>,
}

/// `[[smtp.listener]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// Its name in messages.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// How TLS is used.
    #[serde(default)]
    pub tls: ListenerTls,
    /// The oldest TLS version that it takes.
    #[serde(default)]
    pub tls_min: TlsMin,
    /// Load balancers: connections from these networks begin with a PROXY header, which says who the client is.
    #[serde(default)]
    pub proxy_from: Vec<String>,
    /// Networks that may send anywhere through it.
    #[serde(default)]
    pub relay_networks: Vec<String>,
    /// Its own certificate.
    #[serde(default)]
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    #[serde(default)]
    pub tls_key: Option<PathBuf>,
}

/// How a listener uses TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ListenerTls {
    /// Offered.
    #[default]
    Opportunistic,
    /// Mail only after STARTTLS.
    Require,
    /// From the first octet.
    Implicit,
}

/// `[admin]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Where operators are served.
    pub listen: SocketAddr,
    /// The authority of operators.
    pub ca: PathBuf,
    /// Certificate that operators see.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// `[queue]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// How long mail waits for its destination, in cluster time.
    pub lifetime: Span,
    /// Within this time of settlement no octet of a body is readable.
    pub erase_within: Span,
    /// After this time without quorum or placement a message is taken back.
    pub accept_timeout: Span,
}

/// `[delivery]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Delivery {
    /// Source addresses, one for each family at the most; empty lets the system choose.
    pub bind: Vec<std::net::IpAddr>,
    /// Our name in EHLO; `[smtp] hostname` if empty.
    pub helo: String,
    /// Pause after the first failure of a message.
    pub retry_min: Span,
    /// Longest pause of a message.
    pub retry_max: Span,
    /// Pause after the first failure to reach a destination.
    pub probe_min: Span,
    /// Longest pause between attempts to reach a destination.
    pub probe_max: Span,
    /// Connections to one destination at the same time.
    pub max_connections_per_destination: usize,
    /// Connections in all.
    pub max_connections: usize,
    /// How long to wait for a connection.
    pub connect_timeout: Span,
    /// How long to wait for the reply to the final dot; others wait half as long.
    pub reply_timeout: Span,
    /// A file of certificates of authorities that count beside the public ones; empty for none.
    pub ca: PathBuf,
}

/// `[dns]`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dns {
    /// Name servers, `ADDRESS` or `ADDRESS:PORT`; empty for those of the machine.
    pub servers: Vec<String>,
    /// A file of DNSKEY records that DNSSEC begins with; empty for the keys of the root that are built in.
    pub trust_anchor: PathBuf,
    /// Whether proofs are wanted where no route asks for them.
    pub dnssec: Dnssec,
    /// Zones that are the operator's own and not signed, though DNSSEC proves that they do not exist (RFC 7646).
    pub unsigned_zones: Vec<String>,
}

/// What DNSSEC is for mail whose route does not ask for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dnssec {
    /// What fails its proof is not believed, unless the name servers give no proofs at all.
    #[default]
    Auto,
    /// What fails its proof is not believed.
    Always,
    /// No proof is wanted.
    Off,
}

/// `[storage]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// Size of a segment file; counts when the data directory is created.
    pub segment_bytes: Size,
    /// New mail is refused while less than this is free; the rest is kept for draining.
    pub reserve_bytes: Size,
    /// Entries kept for a follower that is behind; beyond it the follower gets a snapshot.
    pub keep_entries: u64,
    /// Checkpoints of the queue are at least this often; a message that is there at two of them leaves memory.
    pub young_horizon: Span,
    /// How fast what is held is read again in search of rot, octets a second; 0 turns that off.
    pub scrub_rate: Size,
    /// The file with the at-rest keys; none if empty.
    pub key_file: PathBuf,
    /// Added to each sync, to measure what a slower disk would give.
    pub sync_delay: Span,
}

/// `[log]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `postfix` or `json`.
    pub format: LogFormat,
    /// The name in each line.
    pub name: String,
    /// `stderr`, `syslog` or a file.
    pub output: String,
}

/// Form of the log's lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// As Postfix writes them.
    #[default]
    Postfix,
    /// One object a line.
    Json,
}

/// Where the log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogOutput {
    /// Standard error.
    Stderr,
    /// The machine's syslog, facility mail.
    Syslog,
    /// A file, appended to.
    File(PathBuf),
}

mod defaults {
    use super::{Size, Span};
    use std::time::Duration;

    pub(super) fn election_min() -> Span {
        Span(Duration::from_millis(400))
    }
    pub(super) fn election_max() -> Span {
        Span(Duration::from_millis(800))
    }
    pub(super) fn heartbeat() -> Span {
        Span(Duration::from_millis(100))
    }
    pub(super) fn max_message_bytes() -> Size {
        Size(50 << 20)
    }
    pub(super) fn idle_timeout() -> Span {
        Span(Duration::from_secs(300))
    }
    pub(super) fn max_sessions() -> usize {
        2000
    }
    pub(super) fn max_sessions_per_client() -> usize {
        200
    }
    pub(super) fn receive_memory() -> Size {
        Size(256 << 20)
    }
}

const fn seconds(n: u64) -> Span {
    Span(Duration::from_secs(n))
}

impl Default for Queue {
    fn default() -> Queue {
        Queue { lifetime: seconds(15 * 86_400), erase_within: seconds(10), accept_timeout: seconds(30) }
    }
}

impl Default for Delivery {
    fn default() -> Delivery {
        Delivery {
            bind: Vec::new(),
            helo: String::new(),
            retry_min: seconds(60),
            retry_max: seconds(3600),
            probe_min: seconds(1),
            probe_max: seconds(60),
            max_connections_per_destination: 20,
            max_connections: 500,
            connect_timeout: seconds(30),
            reply_timeout: seconds(600),
            ca: PathBuf::new(),
        }
    }
}

impl Default for Storage {
    fn default() -> Storage {
        Storage {
            segment_bytes: Size(64 << 20),
            reserve_bytes: Size(512 << 20),
            keep_entries: 500_000,
            young_horizon: seconds(10),
            scrub_rate: Size(4 << 20),
            key_file: PathBuf::new(),
            sync_delay: seconds(0),
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log { format: LogFormat::Postfix, name: "holdfast".into(), output: "stderr".into() }
    }
}

impl Config {
    /// Reads and checks a node file.
    ///
    /// # Errors
    /// [`ConfigError`] names file, line and remedy.
    pub fn load(file: &Path) -> Result<Config, ConfigError> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(|e| ConfigError {
            file: name.clone(),
            line: Line(None),
            what: e.to_string(),
        })?;
        let base = file.parent().unwrap_or(Path::new("."));
        Config::parse(&name, &text, base)
    }

    fn parse(name: &str, text: &str, base: &Path) -> Result<Config, ConfigError> {
        let error =
            |line: Option<usize>, what: String| ConfigError { file: name.into(), line: Line(line), what };
        let line_at = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let mut config: Config = toml::from_str(text)
            .map_err(|e| error(e.span().map(|s| line_at(s.start)), e.message().to_string()))?;
        let located = |(key, what): (&str, String)| {
            // A contradiction is told at the line of the first of its keys.
            let word = key.rsplit('.').next().unwrap_or(key);
            let at = text.lines().position(|l| l.trim_start().trim_start_matches("[[").starts_with(word));
            error(at.map(|n| n + 1), format!("{key}: {what}"))
        };
        config.check().map_err(located)?;
        for path in config.paths() {
            if path.is_relative() {
                *path = base.join(&*path);
            }
        }
        if config.log.output != "stderr" && Path::new(&config.log.output).is_relative() {
            config.log.output = base.join(&config.log.output).display().to_string();
        }
        Ok(config)
    }

    fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let Config { node, cluster, smtp, admin, delivery, dns, storage, .. } = self;
        let own = [
            &mut node.data_dir,
            &mut cluster.ca,
            &mut cluster.cert,
            &mut cluster.key,
            &mut admin.ca,
            &mut admin.cert,
            &mut admin.key,
        ];
        let tls = smtp.tls_cert.iter_mut().chain(&mut smtp.tls_key);
        let listeners = smtp.listener.iter_mut().flat_map(|l| l.tls_cert.iter_mut().chain(&mut l.tls_key));
        let optional = [&mut dns.trust_anchor, &mut delivery.ca, &mut storage.key_file];
        let optional = optional.into_iter().filter(|path| !path.as_os_str().is_empty());
        own.into_iter().chain(tls).chain(listeners).chain(optional)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let Config { node, cluster, smtp, queue, delivery, dns, storage, .. } = self;
        let bad = |key, what: &str| Err((key, what.to_string()));
        if !(1..=255).contains(&node.id) {
            return bad("node.id", "must be 1 to 255");
        }
        if node.name.is_empty() || !node.name.bytes().all(|b| b.is_ascii_graphic()) {
            return bad("node.name", "must be a word without spaces");
        }
        let mut ids = BTreeMap::new();
        for peer in &cluster.peers {
            if ids.insert(peer.id, peer).is_some() {
                return bad("cluster.peers", &format!("node {} is listed twice", peer.id));
            }
            if !(1..=255).contains(&peer.id) {
                return bad("cluster.peers", "an id must be 1 to 255");
            }
        }
        let Some(own) = ids.get(&node.id) else {
            return bad("cluster.peers", &format!("this node ({}) is missing; list all members", node.id));
        };
        if own.placement != node.placement {
            let what = "differs from this node's own entry in cluster.peers; make them equal";
            return bad("node.placement", what);
        }
        let placements: Vec<Placement> = cluster.peers.iter().map(|p| p.placement.clone().into()).collect();
        if cluster.peers.len() > 1 && !holdfast_cluster::placement::is_placed(&placements) {
            let what = "all nodes share a power or a network label: no message could ever be acknowledged. Give the \
                        labels that are true of the machines";
            return bad("cluster.peers", what);
        }
        if cluster.election_min.ms() < 2 * cluster.heartbeat.ms() {
            return bad("election_min", "must be at least twice the heartbeat");
        }
        if cluster.election_max <= cluster.election_min {
            return bad("election_max", "must be more than election_min");
        }
        if !is_domain(&smtp.hostname) {
            return bad("smtp.hostname", "must be a host name");
        }
        if Mailbox::parse(&smtp.postmaster).is_err() {
            return bad("smtp.postmaster", "must be an address such as postmaster@example.org");
        }
        if smtp.listen.is_empty() && smtp.listener.is_empty() {
            return bad("smtp.listen", "at least one listener is needed");
        }
        if smtp.tls_cert.is_some() != smtp.tls_key.is_some() {
            return bad("smtp.tls_cert", "tls_cert and tls_key go together");
        }
        if !(64 << 10..=1 << 30).contains(&smtp.max_message_bytes.0) {
            return bad("smtp.max_message_bytes", "must be 64KiB to 1GiB");
        }
        if smtp.receive_memory.0 < 4 << 20 {
            return bad("smtp.receive_memory", "must be at least 4MiB");
        }
        networks("smtp.relay_networks", &smtp.relay_networks)?;
        for listener in &smtp.listener {
            networks("listener.relay_networks", &listener.relay_networks)?;
            networks("listener.proxy_from", &listener.proxy_from)?;
            let own = listener.tls_cert.is_some();
            if own != listener.tls_key.is_some() {
                return bad("listener.tls_cert", "tls_cert and tls_key go together");
            }
            if listener.tls != ListenerTls::Opportunistic && !own && smtp.tls_cert.is_none() {
                return bad("listener.tls", "require and implicit need tls_cert and tls_key");
            }
        }
        if !(1000..=ACCEPT_TIMEOUT_MAX_MS).contains(&queue.accept_timeout.ms()) {
            return bad("queue.accept_timeout", "must be 1s to 1m");
        }
        if queue.erase_within.ms() < 1000 {
            return bad("queue.erase_within", "must be at least 1s");
        }
        if delivery.retry_min.ms() == 0 || delivery.probe_min.ms() == 0 {
            return bad("delivery.retry_min", "retry_min and probe_min must not be zero");
        }
        if delivery.max_connections_per_destination == 0 || delivery.max_connections == 0 {
            return bad("delivery.max_connections", "must not be zero");
        }
        if let Some(text) = dns.servers.iter().find(|text| name_server(text).is_none()) {
            return bad("dns.servers", &format!("`{text}` is not ADDRESS or ADDRESS:PORT"));
        }
        let is_zone = |zone: &String| is_domain(zone.trim_end_matches('.'));
        if let Some(zone) = dns.unsigned_zones.iter().find(|zone| !is_zone(zone)) {
            return bad("dns.unsigned_zones", &format!("`{zone}` is not a domain"));
        }
        if !(4 << 20..=1 << 30).contains(&storage.segment_bytes.0) {
            return bad("storage.segment_bytes", "must be 4MiB to 1GiB");
        }
        if !(100..=600_000).contains(&storage.young_horizon.ms()) {
            return bad("storage.young_horizon", "must be 100ms to 10m");
        }
        Ok(())
    }

    /// The members as the cluster layer wants them.
    pub fn members(&self) -> BTreeMap<u64, Member> {
        let member = |p: &Peer| Member {
            address: p.address.clone(),
            admin: p.admin.clone(),
            placement: p.placement.clone().into(),
        };
        self.cluster.peers.iter().map(|p| (p.id, member(p))).collect()
    }

    /// Where the log goes.
    pub fn log_output(&self) -> LogOutput {
        match self.log.output.as_str() {
            "stderr" => LogOutput::Stderr,
            "syslog" => LogOutput::Syslog,
            path => LogOutput::File(path.into()),
        }
    }

    /// The effective settings, as TOML.
    pub fn effective(&self) -> String {
        toml::to_string(self).expect("every setting has a form in TOML")
    }

    /// A hash of the settings that all nodes should share.
    pub fn hash(&self) -> String {
        let shared = (&self.cluster.id, &self.queue, &self.cluster.peers);
        let text = serde_json::to_string(&shared).expect("settings have a form in JSON");
        format!("{:08x}", crc32fast::hash(text.as_bytes()))
    }
}

impl From<Place> for Placement {
    fn from(place: Place) -> Placement {
        Placement { datacenter: place.datacenter, power: place.power, network: place.network }
    }
}

/// Reads `ADDRESS` or `ADDRESS:PORT` of a name server; the port is 53 unless said.
pub fn name_server(text: &str) -> Option<SocketAddr> {
    let plain = || text.parse().ok().map(|ip: std::net::IpAddr| SocketAddr::new(ip, 53));
    text.parse().ok().or_else(plain)
}

fn networks(key: &'static str, list: &[String]) -> Result<(), (&'static str, String)> {
    for text in list {
        if Network::parse(text).is_none() {
            return Err((
                key,
                format!("`{text}` is not a network such as 10.0.0.0/8, or has bits beyond its mask"),
            ));
        }
    }
    Ok(())
}

/// Reads a list of networks that was checked.
pub fn parse_networks(list: &[String]) -> Vec<Network> {
    list.iter().filter_map(|text| Network::parse(text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFERENCE: &str = include_str!("../config/reference.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse("node.toml", text, Path::new("/etc/holdfast"))
    }

    fn keys(prefix: &str, value: &toml::Value, out: &mut std::collections::BTreeSet<String>) {
        match value {
            toml::Value::Table(table) => {
                table.iter().for_each(|(k, v)| keys(&format!("{prefix}.{k}"), v, out));
            }
            toml::Value::Array(list) if list.first().is_some_and(|v| v.is_table()) => {
                keys(prefix, &list[0], out);
            }
            _ => drop(out.insert(prefix.into())),
        }
    }

    #[test]
    fn the_reference_names_every_setting_with_its_default() {
        let reference = parse(REFERENCE).unwrap();
        let (mut written, mut known) = (Default::default(), Default::default());
        keys("", &toml::from_str::<toml::Value>(REFERENCE).unwrap(), &mut written);
        keys("", &toml::from_str::<toml::Value>(&reference.effective()).unwrap(), &mut known);
        assert_eq!(written, known, "reference.toml and the settings differ");
        // What is left out has the value that the reference shows.
        for section in ["queue", "delivery", "dns", "storage", "log"] {
            let mut table: toml::Table = toml::from_str(REFERENCE).unwrap();
            let shown = table.remove(section).unwrap();
            let without = parse(&toml::to_string(&table).unwrap()).unwrap();
            let effective: toml::Table = toml::from_str(&without.effective()).unwrap();
            assert_eq!(effective[section], shown, "[{section}]");
        }
    }

    #[test]
    fn errors_name_file_line_and_remedy() {
        for (from, to, expected) in [
            ("[queue]", "[queue]\nlifetme = \"1d\"", "lifetme"),
            ("lifetime = \"15d\"", "lifetime = \"soon\"", "is not of the form"),
            (
                "power = \"A\", network = \"1\" }\n\n[cluster]",
                "power = \"Z\", network = \"1\" }\n\n[cluster]",
                "make them equal",
            ),
            ("hostname = \"mx.example.org\"", "hostname = \"not a name\"", "must be a host name"),
            ("\"B\"", "\"A\"", "no message could ever be acknowledged"),
        ] {
            let text = REFERENCE.replace("power = \"C\"", "power = \"B\"").replace(from, to);
            let text = if from == "\"B\"" { text.replace("\"B\"", "\"A\"") } else { text };
            let error = match parse(&text) {
                Err(e) => e.to_string(),
                Ok(_) => panic!("{to} was accepted"),
            };
            assert!(error.contains(expected) && error.starts_with("node.toml:"), "{error}");
        }
    }

    #[test]
    fn the_example_node_files_are_good() {
        for text in [
            include_str!("../config/node-1.toml"),
            include_str!("../config/node-2.toml"),
            include_str!("../config/node-3.toml"),
        ] {
            assert_eq!(parse(text).unwrap().members().len(), 3);
        }
    }
}
