//! The whole story on one machine: three node processes, a customer's server, real mail, the leader killed with SIGKILL half
//! way and restarted, then a table of what was accepted, handed off, lost, duplicated and erased.
//!
//! Everything runs as a user would run it, by this program's own command line, on free ports of the loopback address.
#![expect(
    clippy::disallowed_methods,
    reason = "the demonstration starts processes, binds free ports and reads files"
)]

pub mod customer;
mod processes;
mod sender;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::clock;
use processes::{Customer, Nodes};
use sender::{Outcome, Sent};

/// How long and how much.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Messages to send
    #[arg(long, default_value_t = 1500)]
    messages: usize,
    /// Messages a second, over all nodes
    #[arg(long, default_value_t = 150)]
    rate: u32,
    /// Octets of most messages; some are shorter, some eight times as long, one is larger than a piece
    #[arg(long, default_value_t = 4096)]
    size: usize,
    /// Keep files and logs in this directory
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Clients of each node.
const CLIENTS_PER_NODE: usize = 4;
/// The first hand-off after which the customer must have everything.
const DRAIN: Duration = Duration::from_secs(40);
/// The erasure time of the demonstration's nodes.
const ERASE_WITHIN: Duration = Duration::from_secs(5);

fn say(json: bool, text: &str) {
    if !json {
        println!("{text}");
    }
}

/// Runs the demonstration. Exit status 1 if a property failed.
///
/// # Errors
/// If it could not be set up.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if options.messages < 30 || options.rate == 0 || !(200..=10 << 20).contains(&options.size) {
        bail!("--messages must be at least 30, --rate at least 1, --size 200 to 10485760");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(story(options))
}

async fn story(options: &Options) -> anyhow::Result<ExitCode> {
    let quiet = options.json;
    let temporary = std::env::temp_dir().join(format!("holdfast-demo-{}", std::process::id()));
    let dir = options.keep.clone().unwrap_or(temporary);
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let began = clock::now();
    say(quiet, &format!("starting three nodes and a customer's server in {}", dir.display()));
    let mut nodes = Nodes::prepare(&dir, ERASE_WITHIN)?;
    let mut customer = Customer::start(&dir).await?;
    for id in 1..=3 {
        nodes.start(id)?;
    }
    let leader = nodes.wait_for_leader(Duration::from_secs(20)).await?;
    nodes.route("demo.example", &customer.address)?;
    say(quiet, &format!("  formed in {:.1} s; node {leader} leads", began.elapsed().as_secs_f64()));

    let plan = sender::plan(options.messages, options.size);
    let history: Arc<Mutex<Vec<Sent>>> = Arc::default();
    say(quiet, &format!("sending {} messages at {}/s to all three nodes", plan.len(), options.rate));
    let mut clients = Vec::new();
    let mut shares: Vec<Vec<sender::Mail>> = vec![Vec::new(); 3 * CLIENTS_PER_NODE];
    for (n, mail) in plan.into_iter().enumerate() {
        let count = shares.len();
        shares[n % count].push(mail);
    }
    let start = clock::now();
    for (n, share) in shares.into_iter().enumerate() {
        let (address, history) = (nodes.smtp(1 + n as u64 % 3), history.clone());
        let node = 1 + n as u64 % 3;
        let starttls = n % 2 == 1;
        let interval = Duration::from_secs_f64(3.0 * CLIENTS_PER_NODE as f64 / options.rate as f64);
        let offset = interval.mul_f64(n as f64 / (3.0 * CLIENTS_PER_NODE as f64));
        clients.push(tokio::spawn(async move {
            tokio::time::sleep(offset).await;
            sender::run(node, address, starttls, share, interval, history).await;
        }));
    }
    let taken = || lock(&history).iter().filter(|s| s.outcome == Outcome::Accepted).count();
    let mut killed: Option<(u64, Instant)> = None;
    let mut restarted = false;
    let mut next_word = Duration::ZERO;
    while clients.iter().any(|c| !c.is_finished()) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if killed.is_none() && lock(&history).len() * 2 >= options.messages {
            let victim = nodes.wait_for_leader(Duration::from_secs(5)).await?;
            nodes.kill(victim)?;
            killed = Some((victim, clock::now()));
            say(quiet, &format!("  SIGKILL to node {victim}, the leader"));
        }
        if let Some((victim, at)) = killed
            && !restarted
            && at.elapsed() > Duration::from_secs(3)
        {
            nodes.start(victim)?;
            restarted = true;
            say(quiet, &format!("  node {victim} restarted"));
        }
        if start.elapsed() > next_word {
            next_word += Duration::from_secs(2);
            say(
                quiet,
                &format!(
                    "  {:>3} s  accepted {}, handed off {}",
                    start.elapsed().as_secs(),
                    taken(),
                    customer.count()
                ),
            );
        }
        if start.elapsed() > Duration::from_secs(300) {
            bail!("the clients did not finish in five minutes");
        }
    }
    let Some((victim, killed_at)) = killed else { bail!("too few messages to kill a leader half way") };
    if !restarted {
        nodes.start(victim)?;
    }
    let history = std::mem::take(&mut *lock(&history));
    say(quiet, "draining");
    let accepted: BTreeSet<String> = history
        .iter()
        .filter(|s| s.outcome == Outcome::Accepted)
        .flat_map(|s| s.copies.iter().cloned())
        .collect();
    let deadline = clock::after(DRAIN);
    while clock::now() < deadline && !accepted.iter().all(|copy| customer.has(copy)) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    while clock::now() < deadline && nodes.queued()? > 0 {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    say(quiet, &format!("waiting for erasure (at most {} s)", ERASE_WITHIN.as_secs()));
    let deadline = clock::after(ERASE_WITHIN + Duration::from_secs(3));
    let mut readable = readable_bodies(&dir)?;
    while readable > 0 && clock::now() < deadline {
        tokio::time::sleep(Duration::from_millis(500)).await;
        readable = readable_bodies(&dir)?;
    }
    let got = customer.stop().await?;
    let result = judge(&history, &accepted, &got, readable, victim, killed_at);
    nodes.stop().await;
    let good = result["lost"] == 0 && result["bodies_readable_after_erasure"] == 0 && result["altered"] == 0;
    match options.json {
        true => println!("{result}"),
        false => print_table(&result, good, began.elapsed()),
    }
    if options.keep.is_none() {
        if good {
            std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        } else {
            say(quiet, &format!("files and logs are kept in {}", dir.display()));
        }
    }
    Ok(ExitCode::from(u8::from(!good)))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bodies of which an octet pattern is still readable in any data directory.
fn readable_bodies(dir: &Path) -> anyhow::Result<usize> {
    let mut found = BTreeSet::new();
    for node in 1..=3 {
        let data = dir.join(format!("data/node-{node}"));
        for entry in std::fs::read_dir(&data).with_context(|| format!("reading {}", data.display()))? {
            let path = entry?.path();
            if !path.is_file() {
                continue;
            }
            let octets = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            for at in memchr::memmem::find_iter(&octets, sender::CANARY.as_bytes()) {
                let after = &octets[at + sender::CANARY.len()..];
                found.insert(after.get(..8).unwrap_or(after).to_vec());
            }
        }
    }
    Ok(found.len())
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

fn judge(
    history: &[Sent],
    accepted: &BTreeSet<String>,
    got: &BTreeMap<String, customer::Copy>,
    readable: usize,
    victim: u64,
    killed_at: Instant,
) -> Value {
    let lost = accepted.iter().filter(|copy| !got.contains_key(*copy)).count();
    let duplicated: u64 = got.values().map(|c| c.times - 1).sum();
    let altered = got.values().filter(|c| !c.intact).count();
    let mut latency: Vec<u64> =
        history.iter().filter(|s| s.outcome == Outcome::Accepted).map(|s| s.reply_us).collect();
    latency.sort_unstable();
    let next_250 = history
        .iter()
        .filter(|s| s.outcome == Outcome::Accepted && s.node != victim && s.begun > killed_at)
        .map(|s| s.ended)
        .min()
        .map(|at| at.duration_since(killed_at).as_millis() as u64);
    let per_node: Vec<Value> = (1..=3)
        .map(|node| {
            let count = |outcome| history.iter().filter(|s| s.node == node && s.outcome == outcome).count();
            json!({
                "node": node, "accepted": count(Outcome::Accepted), "refused": count(Outcome::Refused),
                "failed": count(Outcome::Failed), "killed": node == victim,
            })
        })
        .collect();
    json!({
        "sent": history.len(), "accepted": history.iter().filter(|s| s.outcome == Outcome::Accepted).count(),
        "copies_accepted": accepted.len(), "copies_handed_off": got.len(), "lost": lost, "duplicated": duplicated,
        "altered": altered, "nodes": per_node, "killed": victim, "kill_to_next_250_ms": next_250,
        "reply_p50_us": percentile(&latency, 50), "reply_p99_us": percentile(&latency, 99),
        "bodies_readable_after_erasure": readable,
    })
}

fn print_table(result: &Value, good: bool, took: Duration) {
    let number = |name: &str| result[name].as_u64().map_or("-".into(), |n| n.to_string());
    let ms =
        |name: &str| result[name].as_u64().map_or("-".into(), |us| format!("{:.1} ms", us as f64 / 1000.0));
    println!();
    println!("{:<44}{:>10}", "messages accepted (250)", number("accepted"));
    println!("{:<44}{:>10}", "  their copies, one a recipient", number("copies_accepted"));
    println!("{:<44}{:>10}", "copies handed off to the customer", number("copies_handed_off"));
    println!("{:<44}{:>10}", "lost", number("lost"));
    println!("{:<44}{:>10}", "altered", number("altered"));
    println!("{:<44}{:>10}", "duplicated", number("duplicated"));
    for node in result["nodes"].as_array().into_iter().flatten() {
        let killed = if node["killed"] == true { ", killed" } else { "" };
        let text = format!("node {}{killed}: accepted / refused / failed", node["node"]);
        println!(
            "{text:<44}{:>10}",
            format!("{} / {} / {}", node["accepted"], node["refused"], node["failed"])
        );
    }
    println!(
        "{:<44}{:>10}",
        "from the kill to the next 250 elsewhere",
        number("kill_to_next_250_ms") + " ms"
    );
    println!("{:<44}{:>10}", "final reply, p50", ms("reply_p50_us"));
    println!("{:<44}{:>10}", "final reply, p99", ms("reply_p99_us"));
    let readable = number("bodies_readable_after_erasure");
    println!("{:<44}{:>10}", "bodies readable in any data directory", readable);
    println!();
    println!(
        "{} in {:.0} s",
        if good { "nothing lost, everything erased" } else { "FAILED" },
        took.as_secs_f64()
    );
}
