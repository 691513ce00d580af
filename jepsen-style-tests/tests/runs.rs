//! The command itself: runs end with the exit status of their verdict, and a promise that was broken is not missed.

use std::path::Path;
use std::process::{Command, Output};
use std::time::SystemTime;

use jepsen_style_tests::checkers::NAME;
use jepsen_style_tests::folder::Options;
use jepsen_style_tests::history::{Event, Fault, History, Outcome, Sent, What, digest};
use jepsen_style_tests::nemesis;

fn command(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_jepsen-style-tests")).args(words).output().unwrap()
}

fn text(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

/// What the nodes of a run wrote of refusals, and of what was wrong with them: the folder is gone with the test.
fn refusals(folder: Option<&Path>) -> String {
    let mut all = String::new();
    for (node, kind) in [1, 2, 3].into_iter().flat_map(|node| [(node, "stderr"), (node, "maillog")]) {
        let Some(file) = folder.map(|folder| folder.join(format!("node-{node}.{kind}"))) else { continue };
        let octets = std::fs::read(file).unwrap_or_default();
        let lines = String::from_utf8_lossy(&octets).into_owned();
        let tells =
            |line: &&str| ["WARN", "ERROR", "reject: ", "refused"].iter().any(|word| line.contains(word));
        let mut told: Vec<&str> = lines.lines().filter(tells).collect();
        told.drain(..told.len().saturating_sub(60));
        all += &format!("--- node {node}, {kind}\n{}\n", told.join("\n"));
    }
    all
}

/// A short run of a workload under nemeses; its verdict is valid, and its folder can be judged again.
fn valid(workload: &str, nemeses: &str, seconds: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    let run = ["run", "--workload", workload, "--nemesis", nemeses, "--seconds", seconds, "--dir", &path];
    let output = command(&[&run, more].concat());
    let (told, how) = (text(&output.stdout), text(&output.stderr));
    let folder = std::fs::read_dir(dir.path()).unwrap().next().map(|folder| folder.unwrap().path());
    let why = if output.status.success() { String::new() } else { refusals(folder.as_deref()) };
    assert_eq!(output.status.code(), Some(0), "{told}\n{how}\n{why}");
    println!("{told}{how}");
    let folder = folder.unwrap();
    let report = std::fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(report.contains("Valid: no promise was broken") && report.matches("<svg").count() == 6);
    let again = command(&["judge", &folder.display().to_string()]);
    assert_eq!((again.status.code(), text(&again.stdout)), (Some(0), told));
}

/// Each day a third of all nemeses, so that every one has its turn.
#[test]
fn mixed_mail_under_nemeses_of_the_day_breaks_no_promise() {
    const TURNS: u64 = 3;
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let day = since_1970.as_secs() / 86_400;
    let names = nemesis::all().zip(0..).filter(|(_, n)| (n + day).is_multiple_of(TURNS));
    let names: Vec<&str> = names.map(|(nemesis, _)| nemesis.name).collect();
    valid("mixed", &names.join(","), "20", &[]);
}

#[test]
fn bursts_while_leaders_die_break_no_promise() {
    valid("bursts", "kill-leader,pause-leader,restart,transfer", "20", &[]);
}

/// Without machines for the nodes too.
#[test]
fn links_on_loopback_are_cut_as_well_and_that_breaks_no_promise() {
    valid("steady", "isolate-leader,one-way,reset", "10", &["--loopback"]);
}

/// A folder as a run leaves it, with this history.
fn forge(folder: &Path, events: Vec<Event>) {
    let options =
        Options { workload: "steady".into(), nemeses: Vec::new(), seconds: 1, seed: 1, loopback: false };
    std::fs::write(folder.join("options.json"), serde_json::to_string(&options).unwrap()).unwrap();
    let mut written = Vec::new();
    History { events }.write(&mut written).unwrap();
    std::fs::write(folder.join("history.jsonl"), written).unwrap();
}

#[test]
fn the_exit_status_is_the_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().display().to_string();
    let octets = format!("{NAME}m\r\n\r\n");
    let sent = |outcome| {
        let (bytes, digest) = (octets.len(), digest(octets.as_bytes()));
        let (name, recipients) = ("m".to_string(), vec!["r".to_string()]);
        let sent = Sent { name, recipients, node: 1, outcome, id: None, bytes, digest };
        Event { at: 900, what: What::Sent { began: 800, dot: Some(810), sent } }
    };
    forge(dir.path(), vec![sent(Outcome::Ok)]);
    let output = command(&["judge", &folder]);
    assert_eq!(output.status.code(), Some(1), "acknowledged, and nobody has it");
    assert!(text(&output.stdout).contains("m/r  acknowledged by node 1, and gone"));
    // Refused, while its node was in trouble: no promise is broken, and nothing is shown.
    let fault = Fault {
        number: 1,
        nemesis: "kill-leader".into(),
        begins: true,
        nodes: vec![1],
        what: "killed".into(),
    };
    forge(dir.path(), vec![Event { at: 1, what: What::Fault(fault) }, sent(Outcome::Fail(451))]);
    let output = command(&["judge", &folder]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stdout).contains("not seen: messages were acknowledged"));
    std::fs::write(dir.path().join("history.jsonl"), "{}\n").unwrap();
    let output = command(&["judge", &folder]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("history.jsonl: line 1: "), "{}", text(&output.stderr));
    assert_eq!(command(&["run", "--workload", "none-such"]).status.code(), Some(2));
    assert_eq!(command(&["run", "--nemesis", "none-such"]).status.code(), Some(2));
    let listed = text(&command(&["list"]).stdout);
    assert!(["kill-leader", "steady", "P10"].iter().all(|word| listed.contains(word)), "{listed}");
}
