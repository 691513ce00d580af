//! P3: each canary is in the files of at least two nodes while its message waits, and in no file of any node after the drain
//! and the erasure time. A node that was down meanwhile erases before it serves.

use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};

#[test]
fn p3_canaries_wait_on_two_nodes_and_are_gone_from_all() {
    let customer = Customer::start();
    customer.set_down(true);
    let mut nodes = Nodes::start_all(customer.address());
    let mut history = Vec::new();
    for n in 0..12 {
        let node = 1 + n % 3;
        let mut client = Client::connect(node, &nodes.smtp(node)).unwrap();
        let name = format!("canary{n:02}");
        // One of them is larger than a piece.
        let octets = message(&name, if n == 5 { 900_000 } else { 2000 });
        let sent = client.transact(&name, &["r"], &octets);
        assert_eq!(sent.outcome, Outcome::Ok);
        history.push(sent);
    }
    let canary = |s: &jepsen_style_tests::history::Sent| format!("canary-{}-line", s.name).into_bytes();
    for sent in &history {
        let holders = (1..=3).filter(|id| files_contain(&nodes.data(*id), &canary(sent))).count();
        assert!(holders >= 2, "{} waits on {holders} nodes", sent.name);
    }
    // One follower misses the settlements.
    let leader = nodes.wait_leader();
    let asleep = (1..=3).find(|id| *id != leader).unwrap();
    nodes.kill(asleep);
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(40));
    judge(&history, &customer.taken()).assert_good();
    let awake: Vec<u64> = (1..=3).filter(|id| *id != asleep).collect();
    wait_for("erasure on the living nodes", Duration::from_secs(4), || {
        history.iter().all(|s| awake.iter().all(|id| !files_contain(&nodes.data(*id), &canary(s))))
    });
    assert!(
        history.iter().any(|s| files_contain(&nodes.data(asleep), &canary(s))),
        "the sleeper still has them"
    );
    nodes.start(asleep);
    wait_for("erasure on the node that was down", Duration::from_secs(15), || {
        history.iter().all(|s| !files_contain(&nodes.data(asleep), &canary(s)))
    });
    for s in &history {
        let lines = (1..=3).map(|id| nodes.maillog(id)).collect::<String>();
        assert!(lines.contains(": durable, nodes="), "custody is in the log");
        assert!(lines.contains(": erased, lag="), "{} and its end", s.name);
    }
}

/// All nodes are killed while mail waits; it is delivered after they are back, from the log alone.
#[test]
fn p1_all_nodes_killed_while_mail_waits() {
    let customer = Customer::start();
    customer.set_down(true);
    let mut nodes = Nodes::start_all(customer.address());
    let mut history = Vec::new();
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    for n in 0..30 {
        let name = format!("w{n:02}");
        let sent =
            client.transact(&name, &["r1", "r2"], &message(&name, if n == 7 { 700_000 } else { 1500 }));
        assert_eq!(sent.outcome, Outcome::Ok);
        history.push(sent);
    }
    (1..=3).for_each(|id| nodes.kill(id));
    for id in 1..=3 {
        let output =
            jepsen_style_tests::nodes::holdfast(&["store", "check", &nodes.data(id).display().to_string()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        nodes.start(id);
    }
    nodes.wait_accepting();
    assert_eq!(nodes.queued(), Some(30));
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(40));
    let verdict = judge(&history, &customer.taken());
    verdict.assert_good();
    assert_eq!(verdict.duplicated, [], "without a crash in a transaction each copy is taken once");
}
