//! Simulation: whole nodes, with the product's own wiring, in one thread of one process. Disks, links, clocks, customers and clients are
//! simulated; what time it is and who goes on is decided by one seed. A run has a time of faults and a time of healing, after which all
//! must be well; see [`judge`] for what that means.
//!
//! What it is made of: a [`host::Host`] is a machine with a disk, on which a process runs, is killed, stopped or loses power; a
//! [`world::World`] is some of those and the network between them, and moves time on; [`relay`] is the process that is a node;
//! [`mail`] keeps what clients sent and were told and what customers took; [`clients`] and [`customers`] are those; [`nemesis`]
//! breaks things by chance, and [`schedules`] are those that are worth being met each time.
#![expect(clippy::disallowed_methods, reason = "the test reads its environment and runs itself")]

mod clients;
mod customers;
mod handoffs;
mod hold;
mod host;
mod judge;
mod mail;
mod nemesis;
mod relay;
mod schedules;
mod succession;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use world::World;

use crate::clock;

/// What happens to a world under load.
type Script = Box<dyn FnOnce(&mut World) -> Result<(), String> + Send>;

/// Runs to the end: load, whatever the script says, healing, judgement.
fn run(seed: u64, script: Script) -> Result<judge::Summary, String> {
    let began = Instant::now();
    let mut world = World::new(seed);
    world.boot_all();
    world.wait_until(Duration::from_secs(60), "a leader and routes", relay::is_ready)?;
    clients::start(&mut world);
    script(&mut world)?;
    clients::stop(&world);
    world.heal();
    world.wait_until(Duration::from_secs(300), "an empty queue everywhere", judge::is_settled)?;
    clients::probe(&mut world)?;
    world.wait_until(Duration::from_secs(30), "an empty queue everywhere", judge::is_settled)?;
    // What was settled last is erased.
    world.go_on(Duration::from_secs(15))?;
    let summary = judge::judge(&world)?.took(world.now(), began.elapsed(), world.trace());
    let counts = summary.counts().into_iter().map(|(what, count)| (what.to_string(), count));
    let counts: Vec<String> =
        counts.chain(world.faults.clone()).map(|(what, count)| format!("{what}={count}")).collect();
    println!("counts {}", counts.join(" "));
    Ok(summary)
}

/// The same on a thread of its own: all that is random there follows from the seed.
fn play(
    seed: u64,
    script: impl FnOnce(&mut World) -> Result<(), String> + Send + 'static,
) -> Result<judge::Summary, String> {
    if std::env::var_os("HOLDFAST_SIM_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_env("HOLDFAST_SIM_LOG");
        let log = tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false);
        // Another schedule of this process may have been first.
        drop(log.try_init());
    }
    let run = move || {
        holdfast_seeded::follow(seed);
        world::note_panics();
        run(seed, Box::new(script))
    };
    std::thread::spawn(run).join().unwrap_or_else(|_| Err("it panicked".into()))
}

/// From now on this thread and those that it starts run on one core: they take turns, and nobody is to be woken on another.
fn stay_on(core: usize) {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    if let Err(e) = rustix::thread::sched_setaffinity(None, &cores) {
        eprintln!("core {core}: {e}; this takes longer");
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs a seed in a process of its own, on one core. Whether all was well, and what it said of the seed.
fn run_apart(seed: u64, faults: Duration, core: usize) -> (bool, String) {
    let ran = std::process::Command::new(std::env::current_exe().expect("this is a program"))
        .args(["--nocapture", "--exact", "sim::p1_whatever_is_broken_no_mail_is_lost"])
        .env("HOLDFAST_SEED", seed.to_string())
        .env("HOLDFAST_SECONDS", faults.as_secs().to_string())
        .env("HOLDFAST_CORE", core.to_string())
        .output()
        .expect("it starts once more");
    let text = String::from_utf8_lossy(&ran.stdout) + String::from_utf8_lossy(&ran.stderr);
    let own = ["counts ", "seed "].iter().filter_map(|word| text.find(word)).min().unwrap_or(0);
    let lines: Vec<&str> = text[own..].lines().take(if ran.status.success() { 2 } else { 3 }).collect();
    (ran.status.success(), lines.join("\n"))
}

/// What counts of several seeds are together: a line of `what=count` of each.
fn add_up(totals: &mut BTreeMap<String, u64>, said: &str) {
    let lines = said.lines().filter_map(|line| line.strip_prefix("counts "));
    for (what, count) in lines.flat_map(|line| line.split(' ')).filter_map(|word| word.split_once('=')) {
        *totals.entry(what.to_string()).or_default() += count.parse::<u64>().unwrap_or(0);
    }
}

/// Runs seeds on all cores. How many of them were not well.
fn run_seeds(seeds: std::ops::Range<u64>, faults: Duration) -> u64 {
    let began = Instant::now();
    let (next, bad) = (AtomicU64::new(seeds.start), AtomicU64::new(0));
    let totals = Mutex::new(BTreeMap::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for core in 0..cores {
            let (next, bad, totals) = (&next, &bad, &totals);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let (is_well, said) = run_apart(seed, faults, core);
                    said.lines()
                        .filter(|line| !line.starts_with("counts "))
                        .for_each(|line| println!("{line}"));
                    add_up(&mut world::lock(totals), &said);
                    bad.fetch_add(u64::from(!is_well), Ordering::Relaxed);
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap_or_default();
    let simulated_s = totals.get("simulated_ms").copied().unwrap_or(0) / 1000;
    let speed = simulated_s as f64 / began.elapsed().as_secs_f64() / cores as f64;
    println!(
        "all of them: {totals:?}; {simulated_s} simulated seconds, {speed:.0} for each second of a core"
    );
    bad.into_inner()
}

/// P1, P2, P3, P6 and P7 of whole nodes, whatever breaks. `HOLDFAST_SEEDS` is how many seeds are run, `HOLDFAST_SEED` is one alone,
/// `HOLDFAST_SECONDS` how long faults last in each.
#[test]
fn p1_whatever_is_broken_no_mail_is_lost() {
    let faults = Duration::from_secs(number("HOLDFAST_SECONDS").unwrap_or(60));
    let Some(seed) = number("HOLDFAST_SEED") else {
        // New ones each day, so that time finds what today does not.
        let days = clock::unix_s() / 86_400;
        let first = days * 1_000_000;
        let seeds = number("HOLDFAST_SEEDS").unwrap_or(12);
        assert_eq!(run_seeds(first..first + seeds, faults), 0, "seeds that were not well: see above");
        return;
    };
    if let Some(core) = number("HOLDFAST_CORE") {
        stay_on(core as usize);
    }
    match play(seed, move |world| nemesis::torment(world, faults)) {
        Ok(summary) => println!("seed {seed}: {summary}"),
        Err(why) => panic!(
            "seed {seed}: {why}\nagain: HOLDFAST_SEED={seed} HOLDFAST_SECONDS={} cargo nextest run --no-capture -p holdfast \
             -E 'test(p1_whatever_is_broken)'",
            faults.as_secs()
        ),
    }
}

/// What a seed does it does again: whoever looks for a failure's cause sees it as often as he likes.
#[test]
fn a_seed_is_a_schedule() {
    let run = || {
        let (is_well, said) = run_apart(7, Duration::from_secs(15), 0);
        assert!(is_well, "{said}");
        let trace = said.split("trace ").nth(1).and_then(|rest| rest.get(..16)).map(str::to_owned);
        trace.expect("it tells its trace")
    };
    assert_eq!(run(), run());
}
