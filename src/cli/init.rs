//! `holdfast init`: node files and certificates for a new cluster, and nothing else.
#![expect(clippy::disallowed_methods, reason = "this is the edge that writes the files of a new cluster")]

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use crate::clock;
use crate::pki::{Authority, write_new};

/// What to write.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Where to write node-1.toml, node-2.toml ... and pki/
    pub dir: PathBuf,
    /// How many nodes, on this host
    #[arg(long, default_value_t = 3, conflicts_with = "node")]
    pub nodes: u64,
    /// Node i listens for SMTP on this plus i, for peers plus 10, for operators plus 20
    #[arg(long, default_value_t = 2500, conflicts_with = "node")]
    pub base_port: u16,
    /// The datacenter's label
    #[arg(long, default_value = "dc1")]
    pub datacenter: String,
    /// The host on which all nodes run
    #[arg(long, default_value = "127.0.0.1", conflicts_with = "node")]
    pub host: String,
    /// A node: ID=HOST,power=P,network=N; once for each node
    #[arg(long)]
    pub node: Vec<String>,
    /// The SMTP port of nodes given with --node
    #[arg(long, default_value_t = 25)]
    pub smtp_port: u16,
}

/// A node to be.
struct Planned {
    id: u64,
    host: String,
    power: String,
    network: String,
    smtp: u16,
    peer: u16,
    admin: u16,
}

fn plan(options: &Options) -> anyhow::Result<Vec<Planned>> {
    if options.node.is_empty() {
        if !(1..=9).contains(&options.nodes) {
            bail!("--nodes must be 1 to 9");
        }
        let label = |n: u64| char::from(b'A' + (n - 1) as u8).to_string();
        let port = |n: u64, plus: u16| -> anyhow::Result<u16> {
            options.base_port.checked_add(plus + n as u16).context("--base-port is too high")
        };
        return (1..=options.nodes)
            .map(|id| {
                Ok(Planned {
                    id,
                    host: options.host.clone(),
                    power: label(id),
                    network: id.to_string(),
                    smtp: port(id, 0)?,
                    peer: port(id, 10)?,
                    admin: port(id, 20)?,
                })
            })
            .collect();
    }
    options
        .node
        .iter()
        .map(|text| {
            let bad = || format!("--node {text}: write ID=HOST,power=P,network=N");
            let (id, rest) = text.split_once('=').with_context(bad)?;
            let id = id.parse().with_context(bad)?;
            let mut words = rest.split(',');
            let host = words.next().filter(|h| !h.is_empty()).with_context(bad)?.to_string();
            let (mut power, mut network) = (None, None);
            for word in words {
                match word.split_once('=') {
                    Some(("power", label)) => power = Some(label.to_string()),
                    Some(("network", label)) => network = Some(label.to_string()),
                    _ => bail!(bad()),
                }
            }
            let power = power.with_context(bad)?;
            let network = network.with_context(bad)?;
            Ok(Planned { id, host, power, network, smtp: options.smtp_port, peer: 2510, admin: 2520 })
        })
        .collect()
}

fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The node file of one of `nodes`.
fn node_file(cluster: &str, datacenter: &str, own: &Planned, nodes: &[Planned], shared_host: bool) -> String {
    let Planned { id, host, .. } = own;
    let placement = |n: &Planned| {
        format!("{{ datacenter = \"{datacenter}\", power = \"{}\", network = \"{}\" }}", n.power, n.network)
    };
    let peers: String = nodes
        .iter()
        .map(|n| {
            format!(
                "  {{ id = {}, address = \"{}\", admin = \"{}\", placement = {} }},\n",
                n.id,
                with_port(&n.host, n.peer),
                with_port(&n.host, n.admin),
                placement(n)
            )
        })
        .collect();
    // On a host of its own a node listens on all addresses; a name is no address to listen on.
    let listen = match host.parse::<std::net::IpAddr>() {
        Ok(_) => host.clone(),
        Err(_) => "0.0.0.0".into(),
    };
    let data_dir = if shared_host { format!("data/node-{id}") } else { "/var/lib/holdfast".into() };
    let hostname = match host.parse::<std::net::IpAddr>() {
        Ok(_) => format!("node-{id}.holdfast.test"),
        Err(_) => host.clone(),
    };
    format!(
        "# Node {id} of cluster {cluster}. Every setting with its meaning: config/reference.toml.\n\n\
         [node]\nid = {id}\nname = \"node-{id}\"\ndata_dir = \"{data_dir}\"\nplacement = {}\n\n\
         [cluster]\nid = \"{cluster}\"\nlisten = \"{}\"\npeers = [\n{peers}]\n\
         ca = \"pki/ca.crt\"\ncert = \"pki/node-{id}.crt\"\nkey = \"pki/node-{id}.key\"\n\n\
         [smtp]\nlisten = [\"{}\"]\nhostname = \"{hostname}\"\npostmaster = \"postmaster@{hostname}\"\n\
         tls_cert = \"pki/node-{id}.crt\"\ntls_key = \"pki/node-{id}.key\"\n\n\
         [admin]\nlisten = \"{}\"\nca = \"pki/ca.crt\"\ncert = \"pki/node-{id}.crt\"\nkey = \"pki/node-{id}.key\"\n",
        placement(own),
        with_port(&listen, own.peer),
        with_port(&listen, own.smtp),
        with_port(&listen, own.admin),
    )
}

/// Writes the files of a new cluster; refuses to overwrite any.
///
/// # Errors
/// If something is in the way or the options contradict each other.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let nodes = plan(options)?;
    let pki = options.dir.join("pki");
    if Path::new(&pki).exists() {
        bail!("{} exists: refusing to overwrite a cluster's certificates", pki.display());
    }
    for n in &nodes {
        let file = options.dir.join(format!("node-{}.toml", n.id));
        if file.exists() {
            bail!("{} exists: refusing to overwrite it", file.display());
        }
    }
    std::fs::create_dir_all(&pki).with_context(|| format!("creating {}", pki.display()))?;
    let cluster = format!("{}-{:08x}", options.datacenter, clock::random());
    let authority = Authority::create(&pki, &cluster)?;
    for n in &nodes {
        authority.node(&pki, n.id, &n.host)?;
    }
    authority.operator(&pki)?;
    for n in &nodes {
        let text = node_file(&cluster, &options.datacenter, n, &nodes, options.node.is_empty());
        write_new(&options.dir.join(format!("node-{}.toml", n.id)), &text, 0o644)?;
    }
    println!("cluster {cluster}: wrote {} node files to {}", nodes.len(), options.dir.display());
    println!("keep {} safe: it signs certificates of new nodes", pki.join("ca.key").display());
    Ok(())
}
