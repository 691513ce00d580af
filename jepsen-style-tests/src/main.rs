//! The command: break a running cluster, judge what happened, and show it. Exit status: 0 valid, 1 invalid, 2 usage, 3 unknown.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Termination};
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use jepsen_style_tests::folder::{self, Options};
use jepsen_style_tests::history::History;
use jepsen_style_tests::nemesis::{self, Needs, Nemesis};
use jepsen_style_tests::random::Random;
use jepsen_style_tests::verdict::{Answer, Judgement};
use jepsen_style_tests::workload::{self, Workload};
use jepsen_style_tests::{checkers, hosts, nodes, report, run, scratch, tools, verdict};

/// Breaks a cluster of three nodes under load, and judges from outside whether it kept its promises.
#[derive(Parser)]
#[command(name = "jepsen-style-tests", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One run: load, faults, healing, verdict, report
    Run(Run),
    /// Show workloads, nemeses and checkers
    List,
    /// Judge a run again from its folder, and write its report anew
    Judge {
        /// The folder
        folder: PathBuf,
    },
    /// Waits until its standard input ends, and takes away what a run has left
    #[command(hide = true)]
    CleanUp {
        /// The process id of the run
        run: String,
    },
    /// Run after run with other seeds, workloads and nemeses, until the time is over or a promise is broken; unknown if one of them was
    Soak(Soak),
}

#[derive(Args)]
struct Soak {
    /// For how long; the last run is gone through to its end
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// What the senders do in each run; another thing in each if not given
    #[arg(long)]
    workload: Option<String>,
    /// What is broken in each run, as for `run`; other things in each if not given
    #[arg(long)]
    nemesis: Option<String>,
    /// What chances are taken from; the time if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Where to keep the folders of the runs
    #[arg(long, default_value = "target/runs")]
    dir: PathBuf,
    /// Append a line for each run to this file
    #[arg(long)]
    ledger: Option<PathBuf>,
}

#[derive(Args)]
struct Run {
    /// What the senders do
    #[arg(long, default_value = "steady")]
    workload: String,
    /// What is broken: names separated by commas, or `all` that can be had here, or `none`
    #[arg(long, default_value = "kill-leader")]
    nemesis: String,
    /// How long things are broken
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// What chances are taken from; the time if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Where to keep the folder of the run
    #[arg(long, default_value = "target/runs")]
    dir: PathBuf,
    /// All nodes on loopback, as where no namespaces can be made
    #[arg(long)]
    loopback: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Command::List => list(),
        Command::CleanUp { run } => {
            scratch::clean_up(&run);
            ExitCode::SUCCESS
        }
        Command::Judge { folder } => match folder::load(&folder) {
            Ok((options, history)) => conclude(&options, &history, &folder).report(),
            Err(why) => usage(&why),
        },
        Command::Run(Run { workload, nemesis, seconds, seed, dir, loopback }) => {
            let (Some(workload), Some(nemeses)) = (workload::named(&workload), chosen(&nemesis)) else {
                return usage("no such workload or nemesis; `list` shows them");
            };
            if !hosts::is_inside() && !build() {
                return usage("the program could not be built");
            }
            if !hosts::is_inside()
                && let Err(e) = scratch::clean_up_after_us()
            {
                return usage(&format!("nobody would clean up: {e}"));
            }
            let binary = nodes::binary();
            if !loopback && let Some(status) = hosts::seclude() {
                return status;
            }
            let (nemeses, others): (Vec<_>, Vec<_>) = nemeses.into_iter().partition(run::is_possible);
            if let Some(needy) = others.first().filter(|_| nemesis != "all") {
                return usage(&format!("{} takes {}, which cannot be had here", needy.name, needs(needy)));
            }
            // What cannot be delivered fills such a disk by itself.
            let (nemeses, filled): (Vec<_>, Vec<_>) =
                nemeses.into_iter().partition(|n| !workload.is_away || !n.needs.has_small_disks());
            if let Some(needy) = filled.first().filter(|_| nemesis != "all") {
                return usage(&format!(
                    "{} takes small disks, which {} alone would fill",
                    needy.name, workload.name
                ));
            }
            for needy in &filled {
                eprintln!(
                    "left out: {} takes small disks, which {} alone would fill",
                    needy.name, workload.name
                );
            }
            for needy in &others {
                eprintln!("left out: {} takes {}, which cannot be had here", needy.name, needs(needy));
            }
            eprintln!("three nodes of {}", binary.display());
            if workload.by_postfix && !(hosts::is_root() && tools::is_installed("postfix")) {
                return usage("postfix takes root and Postfix, which cannot be had here");
            }
            let seed = seed.unwrap_or_else(seed_of_now);
            let names = nemeses.iter().map(|nemesis| nemesis.name.to_string()).collect();
            let options = Options { workload: workload.name.into(), nemeses: names, seconds, seed, loopback };
            one(&options, workload, &nemeses, &dir).report()
        }
        Command::Soak(soak) => soak.until_broken(),
    }
}

/// Under `cargo run` the program that is tested is built as well: only this one was. In a test it has been.
fn build() -> bool {
    let (Some(cargo), None) = (std::env::var_os("CARGO"), std::env::var_os("NEXTEST")) else { return true };
    let is_release = std::env::current_exe().is_ok_and(|own| own.iter().any(|part| part == "release"));
    let profile = if is_release { "release" } else { "dev" };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let mut command = std::process::Command::new(cargo);
    command.args(["build", "--quiet", "--bin", "holdfast", "--profile", profile]).current_dir(root);
    command.status().is_ok_and(|status| status.success())
}

/// The exit status of an answer.
struct Status(Answer);

impl Termination for Status {
    fn report(self) -> ExitCode {
        ExitCode::from(self.0 as u8)
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("{why}");
    ExitCode::from(2)
}

fn seed_of_now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_millis() as u64 % 1_000_000_000)
}

/// Nemeses by their names.
fn chosen(names: &str) -> Option<Vec<Nemesis>> {
    match names {
        "none" => Some(Vec::new()),
        "all" => Some(nemesis::all().collect()),
        names => names.split(',').map(nemesis::named).collect(),
    }
}

/// What a nemesis takes, in words.
fn needs(nemesis: &Nemesis) -> &'static str {
    match nemesis.needs {
        Needs::Nothing | Needs::Links => "nothing",
        Needs::SmallDisks => "namespaces",
        Needs::Wires => "namespaces and tap devices",
        Needs::Strace => "strace",
        Needs::Faketime => "libfaketime",
        Needs::Root => "root, for disks on loop devices and control groups",
    }
}

fn list() -> ExitCode {
    println!("workloads");
    workload::ALL.iter().for_each(|w| println!("  {:<17} {}", w.name, w.about));
    println!("nemeses");
    for nemesis in nemesis::all() {
        println!("  {:<17} {} (takes {})", nemesis.name, nemesis.about, needs(&nemesis));
    }
    println!("checkers");
    checkers::ALL.iter().for_each(|(name, about, _)| println!("  {name:<17} {about}"));
    ExitCode::SUCCESS
}

fn one(options: &Options, workload: Workload, nemeses: &[Nemesis], dir: &Path) -> Status {
    let folder = dir.join(format!("{}-{}", workload.name, options.seed));
    // One of the same seed is another run: what was said of that is not said of this.
    ["verdict.json", "report.html"].iter().for_each(|name| drop(std::fs::remove_file(folder.join(name))));
    let history = run::run(options, workload, nemeses, &folder);
    conclude(options, &history, &folder)
}

/// Judges, writes verdict and report to the run's folder, and says the most of it.
fn conclude(options: &Options, history: &History, folder: &Path) -> Status {
    let judgement = verdict::judge(history, &options.nemeses);
    let text = serde_json::to_string_pretty(&judgement).unwrap_or_default();
    let report = folder.join("report.html");
    let written = std::fs::write(folder.join("verdict.json"), text)
        .and_then(|()| std::fs::write(&report, report::page(options, history, &judgement)));
    for offence in judgement.offences.iter().take(20) {
        println!("{:<4} {:>8} ms  {}  {}", offence.promise, offence.at, offence.whom, offence.what);
    }
    for condition in judgement.conditions.iter().filter(|condition| !condition.is_met) {
        println!("not seen: {}", condition.what);
    }
    println!("{}", report::summary(&judgement));
    let word = match judgement.answer {
        Answer::Valid => "valid",
        Answer::Invalid => "invalid",
        Answer::Unknown => "unknown",
    };
    match written {
        Ok(()) => println!("{word}: {}", report.display()),
        Err(e) => println!("{word}; the report could not be written: {e}"),
    }
    Status(judgement.answer)
}

/// How many runs in a row a soak draws that cannot be had before it ends.
const REFUSED: u32 = 20;

impl Soak {
    /// Each run is a process of its own: what one has left behind, and the time it began, are not the next one's.
    fn until_broken(&self) -> ExitCode {
        let own = std::env::current_exe().expect("a program knows where it stands");
        let mut random = Random::new(self.seed.unwrap_or_else(seed_of_now));
        let until = Instant::now() + Duration::from_secs(self.seconds);
        let (mut runs, mut acknowledged, mut refused) = (0, 0, 0);
        let mut worst = Answer::Valid;
        while Instant::now() < until {
            let Drawn { workload, nemeses, seconds, seed } = self.draw(&mut random);
            let dir_words = self.dir.display().to_string();
            let words = ["run", "--workload", &workload, "--nemesis", &nemeses, "--seconds", &seconds];
            let status = std::process::Command::new(&own)
                .args(words)
                .args(["--seed", &seed, "--dir", &dir_words])
                .status();
            let code = status.ok().and_then(|status| status.code()).unwrap_or(1);
            if code == 2 {
                // What was drawn cannot be had here; what was asked for may never be.
                refused += 1;
                if refused == REFUSED {
                    return ExitCode::from(2);
                }
                continue;
            }
            refused = 0;
            let folder = self.dir.join(format!("{workload}-{seed}"));
            let text = std::fs::read(folder.join("verdict.json")).unwrap_or_default();
            let Ok(judgement) = serde_json::from_slice::<Judgement>(&text) else {
                eprintln!("{}: no verdict", folder.display());
                return ExitCode::FAILURE;
            };
            runs += 1;
            acknowledged += judgement.acknowledged;
            println!("{runs} runs, {acknowledged} messages acknowledged\n");
            if let Some(ledger) = &self.ledger {
                let line = line(&words[1..], &seed, &judgement);
                let file = std::fs::OpenOptions::new().create(true).append(true).open(ledger);
                let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()));
                if let Err(e) = written {
                    return usage(&format!("{}: {e}", ledger.display()));
                }
            }
            match judgement.answer {
                Answer::Invalid => return Status(Answer::Invalid).report(),
                Answer::Unknown => worst = Answer::Unknown,
                Answer::Valid => {}
            }
        }
        Status(if runs == 0 { Answer::Unknown } else { worst }).report()
    }

    /// What the next run is of: what was asked for, and chance where nothing was.
    fn draw(&self, random: &mut Random) -> Drawn {
        let workload = random.pick(&workload::ALL).name.to_string();
        let all: Vec<Nemesis> = nemesis::all().collect();
        let some: Vec<&str> = (0..random.within(1, 6)).map(|_| random.pick(&all).name).collect();
        let nemeses = if random.percent(30) { "all".to_string() } else { some.join(",") };
        Drawn {
            workload: self.workload.clone().unwrap_or(workload),
            nemeses: self.nemesis.clone().unwrap_or(nemeses),
            seconds: random.within(20, 120).to_string(),
            seed: random.within(0, 1_000_000_000).to_string(),
        }
    }
}

/// One run of a soak.
struct Drawn {
    workload: String,
    nemeses: String,
    seconds: String,
    seed: String,
}

/// A line of the ledger's table.
fn line(words: &[&str], seed: &str, j: &Judgement) -> String {
    let answer = format!("{:?}", j.answer).to_lowercase();
    let kills = j.until_next_250.len();
    let half = report::part(&j.until_next_250, 50).map_or("-".into(), |ms| ms.to_string());
    let last = j.until_next_250.last().map_or("-".into(), |ms| ms.to_string());
    format!(
        "| `{} --seed {seed}` | {} | {} | {} | {} | {} | {kills} | {half} | {last} | {answer} |\n",
        words.join(" "),
        j.acknowledged,
        j.refused,
        j.unknown,
        j.repeated,
        j.faults
    )
}
