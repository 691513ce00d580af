//! P1, P3: a follower that missed more than its leader keeps comes back by a snapshot with the bodies of what is still queued,
//! and then counts: the mail survives the loss of another node.

use std::time::Duration;

use jepsen_style_tests::checker::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};

#[test]
fn p1_a_follower_beyond_the_floor_gets_what_is_still_queued() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::prepare(|_, text| text.replace("[storage]", "[storage]\nkeep_entries = 50"));
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    nodes.route("test.example", customer.address());
    let leader = nodes.wait_leader();
    let asleep = (1..=3).find(|id| *id != leader).unwrap();
    nodes.kill(asleep);
    let mut history = Vec::new();
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    for n in 0..600 {
        let name = format!("passed{n:03}");
        history.push(client.transact(&name, &["r"], &message(&name, 800)));
    }
    nodes.wait_drained(Duration::from_secs(30));
    // What follows waits for a destination that is away.
    nodes.route("test.example", away.address());
    for n in 0..20 {
        let name = format!("waiting{n:02}");
        let octets = message(&name, if n == 3 { 600_000 } else { 1200 });
        history.push(client.transact(&name, &["r"], &octets));
    }
    assert!(history.iter().all(|s| s.outcome == Outcome::Ok));
    // A checkpoint comes after ten seconds, and the floor rises behind it.
    let behind = |status: &serde_json::Value| {
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().find(|n| n["id"] == leader).and_then(|n| n["floor_index"].as_u64()).unwrap_or(0)
    };
    wait_for("the floor to pass the sleeper", Duration::from_secs(30), || {
        nodes.status().is_some_and(|s| behind(&s) > 400)
    });
    nodes.start(asleep);
    wait_for("the bodies to be fetched", Duration::from_secs(30), || {
        (0..20).all(|n| files_contain(&nodes.data(asleep), format!("canary-waiting{n:02}-line").as_bytes()))
    });
    assert!(
        !files_contain(&nodes.data(asleep), b"canary-passed599-line"),
        "what has passed is not transferred"
    );
    let last = |id: u64| {
        let status = nodes.status()?;
        let nodes = status["nodes"].as_array()?.clone();
        nodes.iter().find(|n| n["id"] == id)?["last_index"].as_u64()
    };
    wait_for("the sleeper to catch up", Duration::from_secs(20), || {
        last(asleep).is_some() && last(asleep) >= last(leader).map(|i| i.saturating_sub(3))
    });
    // The other two hold it alone now.
    nodes.kill(leader);
    nodes.wait_leader();
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(40));
    judge(&history, &customer.taken()).assert_good();
}
