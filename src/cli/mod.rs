//! The command line. Exit status: 0 done, 1 failed, 2 usage, 3 outcome unknown.

pub(crate) mod init;
mod print;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use holdfast_cluster::owners;
use holdfast_storage::OpenError;
use serde_json::Value;

use crate::admin::api::{NewMember, Request, Selector, Waiting};
use crate::admin::client::{Client, Refused};
use crate::config::{Config, Span};
use crate::queue::Queue;
use crate::{at_rest, demo, node};

/// A mail relay whose queue is a replicated log: a message is acknowledged when two nodes hold it, and erased when it was
/// handed off.
#[derive(Parser)]
#[command(name = "holdfast", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the whole story on this machine: three nodes, a customer, real mail, a leader killed and restarted
    Demo(demo::Options),
    /// Write node files and certificates for a new cluster
    Init(init::Options),
    /// Run a node in the foreground
    Run {
        /// The node file
        #[arg(long, env = "HOLDFAST_CONFIG")]
        config: PathBuf,
    },
    /// Check a node file and print the effective settings
    Check {
        /// The node file
        #[arg(long, env = "HOLDFAST_CONFIG")]
        config: PathBuf,
    },
    /// Show the cluster, its leader, its nodes and the queue
    Status {
        /// Exit with 1 if mail is not being accepted or a node is unhealthy
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        access: Access,
    },
    /// Say where a domain's mail goes
    #[command(subcommand)]
    Route(RouteCommand),
    /// Look at the queue and act on it, as mailq, postqueue and postsuper do
    #[command(subcommand)]
    Queue(QueueCommand),
    /// Bring nodes in, take them out, hand leadership over
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Make certificates of the cluster
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Look at a data directory without changing it
    #[command(subcommand)]
    Store(StoreCommand),
    /// A customer's server for the demonstration
    #[command(hide = true)]
    DemoCustomer(demo::customer::Options),
}

/// How to reach the cluster.
#[derive(Args, Clone)]
struct Access {
    /// The file of any node
    #[arg(long, env = "HOLDFAST_CONFIG")]
    config: PathBuf,
    /// The operator's certificate and key [default: pki/operator.pem beside the node file]
    #[arg(long, env = "HOLDFAST_IDENTITY")]
    identity: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum RouteCommand {
    /// Send a domain's mail to hosts, or to its MX
    Set {
        /// The domain; .example.com for its subdomains, * for all others
        domain: String,
        /// HOST[:PORT], looked up as an address and never as MX; several with commas, tried in order
        #[arg(long, required_unless_present = "mx", conflicts_with = "mx", value_delimiter = ',')]
        to: Vec<String>,
        /// Use the domain's MX
        #[arg(long)]
        mx: bool,
        /// none, opportunistic, require, verify or dane
        #[arg(long, default_value = "opportunistic")]
        tls: String,
        /// The oldest TLS version to use, 1.2 or 1.3
        #[arg(long, default_value = "1.2")]
        tls_min: String,
        /// With --tls verify: SHA-256 of the host's public key in hexadecimal, as in a TLSA record 3 1 1; instead of the public
        /// authorities. Several with commas: the key in use and the next one
        #[arg(long, value_delimiter = ',', requires = "to")]
        pin: Vec<String>,
        /// How long mail waits, such as 15d
        #[arg(long)]
        lifetime: Option<String>,
        #[command(flatten)]
        access: Access,
    },
    /// List the routes
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Remove a route; refused while mail waits for it, unless you say what becomes of that
    Remove {
        /// The domain
        domain: String,
        /// Hold mail that waits: nothing is tried and nothing expires until there is a route again
        #[arg(long, conflicts_with = "bounce")]
        hold: bool,
        /// Return mail that waits to its senders
        #[arg(long)]
        bounce: bool,
        #[command(flatten)]
        access: Access,
    },
}

/// Which messages.
#[derive(Args, Clone)]
struct Which {
    /// The message with this id
    #[arg(long = "id", value_name = "ID")]
    named: Option<String>,
    /// Messages with a recipient of this domain
    #[arg(long)]
    to_domain: Option<String>,
    /// Messages from this address
    #[arg(long)]
    from: Option<String>,
    /// Messages older than this, such as 2h
    #[arg(long)]
    older_than: Option<String>,
    /// Messages in this state: active, deferred or held
    #[arg(long)]
    state: Option<String>,
    /// All messages
    #[arg(long)]
    all: bool,
}

impl Which {
    fn selector(&self, id: Option<&String>) -> anyhow::Result<Selector> {
        Ok(Selector {
            id: id.or(self.named.as_ref()).cloned(),
            to_domain: self.to_domain.clone(),
            from: self.from.clone(),
            older_than_ms: self.older_than.as_deref().map(span_ms).transpose()?,
            state: self.state.clone(),
            all: self.all,
        })
    }
}

#[derive(Subcommand)]
enum QueueCommand {
    /// List messages, oldest first
    List {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        access: Access,
    },
    /// Show one message
    Show {
        /// Its id
        id: String,
        #[command(flatten)]
        access: Access,
    },
    /// Try messages that wait, now
    Retry {
        /// A message's id
        id: Option<String>,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        access: Access,
    },
    /// Remove messages without telling their senders
    Remove {
        /// A message's id
        id: Option<String>,
        #[command(flatten)]
        which: Which,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Only count them
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        access: Access,
    },
}

#[derive(Subcommand)]
enum ClusterCommand {
    /// Bring a new node in: it runs, its data directory is empty, and its id was never used
    Add {
        /// Its id: higher than that of any member
        id: u64,
        /// Where its peers reach it, HOST:PORT
        #[arg(long)]
        address: String,
        /// Where operators reach it, HOST:PORT
        #[arg(long)]
        admin: String,
        /// Label of its power feed
        #[arg(long)]
        power: String,
        /// Label of its network
        #[arg(long)]
        network: String,
        /// Label of its datacenter [default: the leader's]
        #[arg(long)]
        datacenter: Option<String>,
        /// Also if too few nodes would answer to take mail
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        access: Access,
    },
    /// Take a node out. What it holds stays on its disk
    Remove {
        /// Its id
        id: u64,
        /// Also if too few nodes would answer to take mail
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        access: Access,
    },
    /// Hand leadership over
    Transfer {
        /// To this node [default: the one whose log is freshest]
        #[arg(long)]
        to: Option<u64>,
        #[command(flatten)]
        access: Access,
    },
}

#[derive(Subcommand)]
enum PkiCommand {
    /// Write node-ID.crt and node-ID.key for a new node, signed by ca.key
    Node {
        /// The node's id
        id: u64,
        /// The host that it runs on
        #[arg(long)]
        host: String,
        /// The directory with ca.crt and ca.key
        #[arg(long, default_value = "pki")]
        dir: PathBuf,
    },
}

#[derive(Subcommand)]
enum StoreCommand {
    /// Read a data directory and verify every record
    Check {
        /// The data directory
        dir: PathBuf,
        /// The file with its at-rest keys
        #[arg(long)]
        key_file: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print each record of a data directory, without any body
    Dump {
        /// The data directory
        dir: PathBuf,
        /// The file with its at-rest keys
        #[arg(long)]
        key_file: Option<PathBuf>,
        /// Print JSON, one object a line
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG").unwrap_or_else(|_| {
        tracing_subscriber::EnvFilter::new("holdfast=info,warn,openraft=error,hickory_net=off")
    });
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("holdfast: {e:#}");
            let unknown = e.downcast_ref::<Refused>().is_some_and(|refused| refused.0.unknown);
            ExitCode::from(if unknown { 3 } else { 1 })
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { config } => node::run(&config)?,
        Command::Check { config } => print!("{}", Config::load(&config)?.effective()),
        Command::Init(options) => init::run(&options)?,
        Command::Demo(options) => return demo::run(&options),
        Command::DemoCustomer(options) => demo::customer::run(&options)?,
        Command::Store(StoreCommand::Check { dir, key_file, json }) => {
            store_check(&dir, &key_file.unwrap_or_default(), json)?
        }
        Command::Store(StoreCommand::Dump { dir, key_file, json }) => {
            store_dump(&dir, &key_file.unwrap_or_default(), json)?
        }
        Command::Status { check, access } => {
            // The leader's view, if there is a leader: a node that was away may not have caught up yet.
            let status = ask(&access, &Request::Status, true)?.pop().context("no status")?;
            print::status(&status, access.json);
            let nodes = status["nodes"].as_array().map_or(&[][..], Vec::as_slice);
            let good = status["accepting"] == true && nodes.iter().all(|n| n["healthy"] == true);
            return Ok(ExitCode::from(u8::from(check && !good)));
        }
        Command::Route(command) => route(command)?,
        Command::Queue(command) => queue(command)?,
        Command::Cluster(command) => cluster(command)?,
        Command::Pki(PkiCommand::Node { id, host, dir }) => {
            if !(1..=255).contains(&id) {
                anyhow::bail!("{id}: a node's id is 1 to 255");
            }
            crate::pki::Authority::open(&dir)?.node(&dir, id, &host)?;
            println!("wrote {0}/node-{id}.crt and {0}/node-{id}.key", dir.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn span_ms(text: &str) -> anyhow::Result<u64> {
    Span::parse(text)
        .map(Span::ms)
        .with_context(|| format!("`{text}` is not of the form 10s, 5m, 12h or 15d"))
}

fn client(access: &Access) -> anyhow::Result<Client> {
    let config = Config::load(&access.config)?;
    let beside = || access.config.parent().map(|dir| dir.join("pki/operator.pem")).unwrap_or_default();
    Client::new(&config, &access.identity.clone().unwrap_or_else(beside))
}

/// Asks a node, or the leader, and gathers the items.
fn ask(access: &Access, request: &Request, leader: bool) -> anyhow::Result<Vec<Value>> {
    let mut items = Vec::new();
    ask_each(access, request, leader, &mut |item| items.push(item))?;
    Ok(items)
}

fn ask_each(
    access: &Access,
    request: &Request,
    leader: bool,
    each: &mut dyn FnMut(Value),
) -> anyhow::Result<()> {
    let client = client(access)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if leader { client.ask_leader(request, each).await } else { client.ask(request, each).await }
    })
}

fn route(command: RouteCommand) -> anyhow::Result<()> {
    match command {
        RouteCommand::Set { domain, to, tls, tls_min, pin, lifetime, access, .. } => {
            let to = to.iter().map(|host| host_and_port(host)).collect::<anyhow::Result<_>>()?;
            let lifetime_ms = lifetime.as_deref().map(span_ms).transpose()?;
            let tls_min = serde_json::from_value(Value::from(tls_min.as_str()))
                .with_context(|| format!("--tls-min {tls_min}: must be 1.2 or 1.3"))?;
            ask(&access, &Request::RouteSet { domain, to, tls, tls_min, lifetime_ms, pins: pin }, false)?;
        }
        RouteCommand::List { access } => {
            ask_each(&access, &Request::RouteList, false, &mut |item| print::route(&item, access.json))?;
        }
        RouteCommand::Remove { domain, hold, bounce, access } => {
            let waiting = match (hold, bounce) {
                (true, _) => Waiting::Hold,
                (_, true) => Waiting::Bounce,
                _ => Waiting::Refuse,
            };
            print::removed_route(
                &ask(&access, &Request::RouteRemove { domain, waiting }, true)?,
                access.json,
            );
        }
    }
    Ok(())
}

/// `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT`; the port is 25 unless said.
fn host_and_port(text: &str) -> anyhow::Result<(String, u16)> {
    let bad = || format!("`{text}` is not HOST[:PORT] or [IPV6][:PORT]");
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').with_context(bad)?;
            host.parse::<std::net::Ipv6Addr>().with_context(bad)?;
            (host, port.strip_prefix(':').or((port.is_empty()).then_some("25")).with_context(bad)?)
        }
        None => text.rsplit_once(':').unwrap_or((text, "25")),
    };
    let host_is_good = host.parse::<std::net::IpAddr>().is_ok() || crate::smtp::address::is_domain(host);
    if !host_is_good {
        anyhow::bail!(bad());
    }
    Ok((host.into(), port.parse().ok().filter(|p| *p > 0).with_context(bad)?))
}

fn queue(command: QueueCommand) -> anyhow::Result<()> {
    match command {
        QueueCommand::List { which, access } => {
            let request = Request::QueueList(which.selector(None)?);
            ask_each(&access, &request, true, &mut |item| print::message(&item, access.json))?;
        }
        QueueCommand::Show { id, access } => {
            let selector = Selector { id: Some(id.clone()), ..Selector::default() };
            let found = ask(&access, &Request::QueueList(selector), true)?;
            let message = found.first().with_context(|| format!("{id}: no such message"))?;
            print::message(message, access.json);
        }
        QueueCommand::Retry { id, which, access } => {
            let request = Request::QueueRetry(which.selector(id.as_ref())?);
            let answer = ask(&access, &request, true)?;
            print::count(&answer, "retried", access.json);
        }
        QueueCommand::Remove { id, which, yes, dry_run, access } => {
            let selector = which.selector(id.as_ref())?;
            let request = |dry_run| Request::QueueRemove { selector: selector.clone(), dry_run };
            let found = ask(&access, &request(true), true)?;
            let count = found.first().and_then(|a| a["removed"].as_u64()).unwrap_or(0);
            if dry_run || count == 0 {
                print::count(&found, "removed", access.json);
                return Ok(());
            }
            if !yes && !print::confirm(&format!("Remove {count} messages without telling their senders?")) {
                anyhow::bail!("nothing was removed");
            }
            print::count(&ask(&access, &request(false), true)?, "removed", access.json);
        }
    }
    Ok(())
}

fn cluster(command: ClusterCommand) -> anyhow::Result<()> {
    match command {
        ClusterCommand::Add { id, address, admin, power, network, datacenter, force, access } => {
            for place in [&address, &admin] {
                host_and_port(place)?;
                if place.ends_with(']') || !place.contains(':') {
                    anyhow::bail!("`{place}` has no port: write HOST:PORT");
                }
            }
            let new = NewMember { id, address, admin, datacenter, power, network, force };
            ask_each(&access, &Request::ClusterAdd(new), true, &mut |item| print::joining(&item, access.json))
        }
        ClusterCommand::Remove { id, force, access } => {
            let answer = ask(&access, &Request::ClusterRemove { id, force }, true)?;
            print::left(&answer, access.json);
            Ok(())
        }
        ClusterCommand::Transfer { to, access } => {
            let answer = ask(&access, &Request::ClusterTransfer { to }, true)?;
            print::leader(&answer, access.json);
            Ok(())
        }
    }
}

fn store_dump(dir: &Path, key_file: &Path, json: bool) -> anyhow::Result<()> {
    let keys = at_rest::keyring(key_file)?;
    let disk = holdfast_storage::disk::os::OsDisk::open_to_read(dir)?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut written = Ok(());
    holdfast_storage::log::dump::dump(&disk, &keys, &mut |line| {
        if written.is_ok() {
            written = print::record(&mut out, &line, json);
        }
    })?;
    match written.and_then(|()| out.flush()) {
        // Whoever reads has read enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn store_check(dir: &Path, key_file: &Path, json: bool) -> anyhow::Result<()> {
    let keys = at_rest::keyring(key_file)?;
    let disk = holdfast_storage::disk::os::OsDisk::open_to_read(dir)?;
    let mut survey = holdfast_storage::log::survey(&disk, &keys);
    if let Err(OpenError::Lost(damage)) = &mut survey {
        owners::name(damage, &disk, &keys, &Queue::default());
    }
    let survey = survey?;
    if json {
        let (bodies, octets) = survey.bodies;
        println!(
            "{}",
            serde_json::json!({
                "segments": survey.segments, "records": survey.records, "entries": survey.entries,
                "bodies": bodies, "body_bytes": octets, "torn_tail": survey.torn_tail,
                "ambiguous_tail": survey.ambiguous_tail, "lost_bodies": survey.lost_bodies,
            })
        );
    } else {
        println!(
            "{}: {} segments, {} records, {} entries above the floor, {} bodies of {} bytes{}",
            if survey.lost_bodies == 0 && !survey.ambiguous_tail { "sound" } else { "damaged" },
            survey.segments,
            survey.records,
            survey.entries,
            survey.bodies.0,
            survey.bodies.1,
            if survey.torn_tail { "; the tail is torn, as after a kill: harmless" } else { "" }
        );
    }
    if survey.ambiguous_tail {
        anyhow::bail!(
            "{}: what was written last is damaged; the node cuts it off and takes no part in elections before it has caught up",
            dir.display()
        );
    }
    if survey.lost_bodies > 0 {
        anyhow::bail!(
            "{}: {} bodies are not what was written; the node fetches those that it needs when it starts",
            dir.display(),
            survey.lost_bodies
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn hosts_of_routes() {
        assert_eq!(host_and_port("mx.example.org").unwrap(), ("mx.example.org".into(), 25));
        assert_eq!(host_and_port("127.0.0.1:2525").unwrap(), ("127.0.0.1".into(), 2525));
        assert_eq!(host_and_port("[2001:db8::1]:25").unwrap(), ("2001:db8::1".into(), 25));
        for bad in ["", "a b", "host:0", "host:x", "[::1", "[x]:25"] {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
    }
}
