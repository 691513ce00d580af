//! A message has two recipients; one is settled; the segment with that settlement is used again; the index is lost on all nodes: the
//! settled one is not delivered again.

use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

#[test]
fn p4_who_is_settled_stays_settled_when_all_but_the_log_is_gone() {
    let customer = Customer::start();
    // Each later try is an hour away: only what is said here happens.
    let mut nodes = Nodes::start_with(|_, text| {
        text.replace("segment_bytes = \"8MiB\"", "segment_bytes = \"4MiB\"\nkeep_entries = 50")
            .replace("retry_min = \"1s\"\nretry_max = \"2s\"", "retry_min = \"1h\"\nretry_max = \"2h\"")
    });
    nodes.route("test.example", customer.address());
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    let sent = client.transact("both", &["late-settled", "defer-other"], &message("both", 900));
    assert_eq!(sent.outcome, Outcome::Ok);
    // The first try is in vain for both, and a checkpoint has the message so.
    wait_for("the first try", Duration::from_secs(20), || {
        let listed = nodes.ask(&["queue", "list", "--json"]);
        String::from_utf8_lossy(&listed.stdout).matches("\"attempts\":1").count() == 2
    });
    std::thread::sleep(Duration::from_secs(2));
    assert!(nodes.ask(&["queue", "retry", "--all"]).status.success());
    wait_for("one to be settled and the other to wait", Duration::from_secs(20), || {
        let listed = nodes.ask(&["queue", "list", "--json"]);
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        text.contains("\"state\":\"delivered\"") && text.contains("\"state\":\"deferred\"")
    });
    let copies = |recipient: &str| customer.taken().iter().filter(|t| t.recipient == recipient).count();
    assert_eq!((copies("late-settled"), copies("defer-other")), (1, 0));
    // Enough traffic for every segment of that time to be given back, on all nodes.
    for n in 0..150 {
        let name = format!("passes{n:03}");
        assert_eq!(client.transact(&name, &["r"], &message(&name, 100_000)).outcome, Outcome::Ok);
    }
    wait_for("the floor to have passed on all nodes", Duration::from_secs(40), || {
        let status = nodes.status().unwrap_or_default();
        let all = status["nodes"].as_array().cloned().unwrap_or_default();
        all.len() == 3 && all.iter().all(|n| n["floor_index"].as_u64() > Some(100))
    });
    (1..=3).for_each(|id| nodes.kill(id));
    for id in 1..=3 {
        std::fs::remove_dir_all(nodes.data(id).join("index")).unwrap();
        nodes.start(id);
    }
    nodes.wait_accepting();
    // The new leader tries at once; later tries are asked for.
    wait_for("the other to be tried", Duration::from_secs(20), || {
        nodes.ask(&["queue", "retry", "--all"]);
        nodes.queued() == Some(0)
    });
    assert_eq!((copies("late-settled"), copies("defer-other")), (1, 1));
}
