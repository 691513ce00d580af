//! P1, P9: mail that waits leaves memory, and neither a kill of all nodes at once nor a lost, garbled or strange index on each of
//! them loses a message or hands one off twice.

use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

#[test]
fn p1_p9_mail_that_waits_survives_all_nodes_and_all_indexes() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::start_all(away.address());
    let mut history = Vec::new();
    for id in 1..=3 {
        let mut client = Client::connect(id, &nodes.smtp(id)).unwrap();
        for n in 0..40 {
            let name = format!("node{id}waits{n:02}");
            let recipients = ["r", "s", "t"];
            history.push(client.transact(&name, &recipients[..1 + n % 3], &message(&name, 900)));
        }
    }
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    wait_for("the mail to leave memory on all nodes", Duration::from_secs(30), || {
        let Some(status) = nodes.status() else { return false };
        let ready = |n: &serde_json::Value| n["index"] == "ready";
        status["queue"]["messages"] == 120
            // Each probe of the destination changes a message, which is in memory again for a while.
            && status["queue"]["young"].as_u64() < Some(10)
            && status["nodes"].as_array().is_some_and(|nodes| nodes.iter().all(ready))
    });
    (1..=3).for_each(|id| nodes.kill(id));
    let index = |id: u64| nodes.data(id).join("index");
    let strange = std::fs::read(index(1).join("db")).expect("the index has a file");
    std::fs::remove_dir_all(index(1)).expect("it is there");
    std::fs::write(index(2).join("db"), vec![0xa5; 300_000]).expect("it is ours");
    std::fs::write(index(3).join("db"), strange).expect("it is ours");
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    let listed = nodes.ask(&["queue", "list", "--json"]);
    assert_eq!(
        String::from_utf8_lossy(&listed.stdout).lines().count(),
        120,
        "the queue is listed from its rows"
    );
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(40));
    let verdict = judge(&history, &customer.taken());
    verdict.assert_good();
    assert_eq!(
        customer.count(),
        history.iter().map(|s| s.recipients.len()).sum::<usize>(),
        "none is handed off twice"
    );
    wait_for("the indexes to be folded again", Duration::from_secs(20), || {
        let nodes = nodes.status().and_then(|s| s["nodes"].as_array().cloned()).unwrap_or_default();
        nodes.len() == 3 && nodes.iter().all(|n| n["index"] == "ready")
    });
}
