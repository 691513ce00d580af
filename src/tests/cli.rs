//! The command line as scripts see it: exit statuses, messages, and that nothing is overwritten.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test may panic and read files")]

use std::process::{Command, Output};

fn holdfast(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_holdfast")).args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn usage_errors_exit_with_2_and_help_with_0() {
    assert_eq!(holdfast(&["frobnicate"]).status.code(), Some(2));
    assert_eq!(holdfast(&["route", "set", "a.example"]).status.code(), Some(2));
    for args in [&["--help"][..], &["queue", "--help"], &["demo", "--help"], &["route", "set", "--help"]] {
        let output = holdfast(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
    }
    assert!(said(&holdfast(&["--help"])).contains("demo"));
}

#[test]
fn init_writes_and_never_overwrites_and_check_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c").display().to_string();
    let output = holdfast(&["init", &path]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let key = std::fs::metadata(dir.path().join("c/pki/ca.key")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777, 0o600);
    let again = holdfast(&["init", &path]);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("refusing to overwrite"), "{}", said(&again));
    for id in 1..=3 {
        let output = holdfast(&["check", "--config", &format!("{path}/node-{id}.toml")]);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        assert!(said(&output).contains("lifetime = \"15d\""));
    }
}

#[test]
fn init_for_hosts_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c").display().to_string();
    let nodes: Vec<String> =
        (1..=3).map(|n| format!("{n}=mx{n}.example.org,power=P{n},network=N{n}")).collect();
    let mut args = vec!["init", &path, "--datacenter", "fra"];
    nodes.iter().for_each(|n| args.extend(["--node", n]));
    let output = holdfast(&args);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let text = std::fs::read_to_string(format!("{path}/node-2.toml")).unwrap();
    assert!(text.contains("mx2.example.org:2510") && text.contains("power = \"P2\""), "{text}");
    assert_eq!(holdfast(&["init", &path, "--node", "1=x"]).status.code(), Some(1));
}

#[test]
fn a_bad_node_file_is_named_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c").display().to_string();
    holdfast(&["init", &path]);
    let file = format!("{path}/node-1.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}\n[queue]\nlifetme = \"1d\"\n")).unwrap();
    let output = holdfast(&["run", "--config", &file]);
    assert_eq!(output.status.code(), Some(1));
    let line = text.lines().count() + 3;
    assert!(said(&output).contains(&format!("node-1.toml:{line}: ")), "{}", said(&output));
    assert!(said(&output).contains("lifetme"), "{}", said(&output));
}

#[test]
fn without_a_cluster_commands_fail_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c").display().to_string();
    holdfast(&["init", &path, "--base-port", "20000"]);
    let output = holdfast(&["status", "--config", &format!("{path}/node-1.toml")]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_eq!(holdfast(&["store", "check", "/nonexistent"]).status.code(), Some(1));
}
