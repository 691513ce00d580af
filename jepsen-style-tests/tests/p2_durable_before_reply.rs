//! P2, seen from outside with strace: on two nodes of different labels the fdatasync that covers the entry ends before the 250
//! leaves the receiving node.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{program, wait_for};

/// A system call that ended: when, and what strace wrote.
struct Call {
    at: f64,
    text: String,
}

/// Reads `strace -f -ttt -T`: joins unfinished calls with their ends, and gives the time of the end.
fn calls(text: &str) -> Vec<Call> {
    let mut unfinished: Vec<(String, String)> = Vec::new();
    let mut calls = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(pid), Some(at)) = (words.next(), words.next()) else { continue };
        let Ok(at) = at.parse::<f64>() else { continue };
        let Some((_, rest)) = line.split_once(&format!("{at:.6} ")) else { continue };
        if let Some(begun) = rest.strip_suffix(" <unfinished ...>") {
            unfinished.push((pid.into(), begun.into()));
        } else if rest.starts_with("<... ") {
            if let Some(n) = unfinished.iter().position(|(p, _)| p == pid) {
                let (_, begun) = unfinished.swap_remove(n);
                calls.push(Call { at, text: format!("{begun} {rest}") });
            }
        } else {
            // The line's time is that of the beginning; -T adds the duration in angle brackets.
            let took = rest.rsplit_once('<').and_then(|(_, t)| t.trim_end_matches('>').parse::<f64>().ok());
            calls.push(Call { at: at + took.unwrap_or(0.0), text: rest.into() });
        }
    }
    calls.sort_by(|a, b| a.at.total_cmp(&b.at));
    calls
}

#[test]
fn p2_two_nodes_have_synced_before_the_250() {
    let Some(strace) = program("strace") else { return };
    let customer = Customer::start();
    customer.set_down(true);
    let nodes = Nodes::start_all(customer.address());
    let file = |id: u64| nodes.dir().join(format!("strace-{id}"));
    let mut tracers: Vec<Child> = (1..=3u64)
        .map(|id| {
            Command::new(&strace)
                .args([
                    "-f",
                    "-ttt",
                    "-T",
                    "-s",
                    "2000",
                    "-e",
                    "trace=pwrite64,fdatasync,sendto,write,writev",
                    "-o",
                ])
                .arg(file(id))
                .args(["-p", &nodes.pid(id).unwrap().to_string()])
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    wait_for("strace to see the nodes work", Duration::from_secs(10), || {
        (1..=3).all(|id| std::fs::metadata(file(id)).is_ok_and(|m| m.len() > 0))
    });
    let mut client = Client::connect(2, &nodes.smtp(2)).unwrap();
    let names: Vec<String> = (0..20).map(|n| format!("strace-{n:03}")).collect();
    for name in &names {
        let sent = client.transact(name, &["r"], &message(name, 600));
        assert_eq!(sent.outcome, Outcome::Ok);
    }
    for tracer in &mut tracers {
        // On SIGINT it detaches and ends; the node runs on.
        drop(Command::new("kill").args(["-INT", &tracer.id().to_string()]).status());
        drop(tracer.wait());
    }
    let traces: Vec<Vec<Call>> =
        (1..=3).map(|id| calls(&String::from_utf8_lossy(&std::fs::read(file(id)).unwrap()))).collect();
    let oks: Vec<f64> =
        traces[1].iter().filter(|c| c.text.contains("250 2.0.0 Ok: queued")).map(|c| c.at).collect();
    assert_eq!(oks.len(), names.len(), "each 250 was seen leaving");
    for (name, ok) in names.iter().zip(oks) {
        let synced = traces.iter().filter(|trace| synced_at(trace, name).is_some_and(|at| at < ok)).count();
        assert!(synced >= 2, "{name}: {synced} nodes had synced when the 250 left");
    }
}

/// When the first sync ended of the file to which the message was written, after it was written.
fn synced_at(trace: &[Call], name: &str) -> Option<f64> {
    let write = trace.iter().position(|c| c.text.starts_with("pwrite64(") && c.text.contains(name))?;
    let fd = trace[write].text["pwrite64(".len()..].split(',').next()?;
    let sync = format!("fdatasync({fd}");
    trace[write..].iter().find(|c| c.text.starts_with(&sync) && c.text.contains("= 0")).map(|c| c.at)
}
