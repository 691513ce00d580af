//! P1, P10: a route that is removed loses no mail and bounces none by accident. Mail that waits for it keeps it in place, is held,
//! or is returned, as the operator says.

use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

fn send(nodes: &Nodes, names: &[&str]) -> Vec<Sent> {
    let mut client = Client::connect(2, &nodes.smtp(2)).unwrap();
    let sent: Vec<Sent> =
        names.iter().map(|name| client.transact(name, &["r", "s"], &message(name, 900))).collect();
    assert!(sent.iter().all(|s| s.outcome == Outcome::Ok), "{sent:?}");
    sent
}

fn states(nodes: &Nodes) -> Vec<String> {
    let listed = nodes.ask(&["queue", "list", "--json"]).stdout;
    let lines = String::from_utf8(listed).unwrap();
    let state = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["state"].to_string();
    lines.lines().map(state).collect()
}

fn held(nodes: &Nodes) -> Option<u64> {
    nodes.status()?["queue"]["held"].as_u64()
}

#[test]
fn p10_a_removed_route_holds_or_returns_mail_and_loses_none() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    // Held mail outlives this.
    let mut nodes = Nodes::start_with(|_, text| text.replace("[queue]", "[queue]\nlifetime = \"8s\""));
    nodes.route("test.example", away.address());
    nodes.route("client.test.example", customer.address());
    // Another domain has the same destination.
    nodes.route("other.example", away.address());
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    for line in ["MAIL FROM:<sender@client.test.example>\r\n", "RCPT TO:<o@other.example>\r\n", "DATA\r\n"] {
        assert!(client.say(line).unwrap() < 400);
    }
    assert_eq!(client.say("Subject: other\r\n\r\ntext\r\n.\r\n").unwrap(), 250);
    let history = send(&nodes, &["one", "two", "three"]);

    let refused = nodes.ask(&["route", "remove", "test.example"]);
    assert_eq!(refused.status.code(), Some(1));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("3 messages wait") && why.contains("--hold") && why.contains("--bounce"), "{why}");

    let removed = nodes.ask(&["route", "remove", "test.example", "--hold"]);
    assert_eq!(String::from_utf8_lossy(&removed.stdout).trim(), "3 messages are held");
    wait_for("the mail to be held", Duration::from_secs(10), || held(&nodes) == Some(3));
    assert_eq!(states(&nodes).iter().filter(|state| *state == "\"held\"").count(), 3);
    away.set_down(false);
    wait_for("the other domain's mail", Duration::from_secs(10), || nodes.queued() == Some(3));
    let mut client = Client::connect(3, &nodes.smtp(3)).unwrap();
    assert_eq!(client.say("MAIL FROM:<>\r\n").unwrap(), 250);
    assert_eq!(client.say("RCPT TO:<r@test.example>\r\n").unwrap(), 550, "it has no route any more");
    let listed = nodes.ask(&["route", "list"]).stdout;
    assert!(String::from_utf8_lossy(&listed).contains("test.example  removed, its mail is held"));

    // The next leader holds it as well, for longer than its lifetime.
    let leader = nodes.wait_leader();
    nodes.kill(leader);
    nodes.wait_leader();
    nodes.start(leader);
    std::thread::sleep(Duration::from_secs(9));
    wait_for("the new leader to hold it", Duration::from_secs(10), || held(&nodes) == Some(3));
    assert_eq!(customer.count(), 0, "nothing was returned");
    assert_eq!(away.count(), 1, "nothing that is held went where the other domain's mail goes");
    away.set_down(true);

    // A node that is alone, without a leader, still knows what is held.
    let leader = nodes.wait_leader();
    let down = [leader, leader % 3 + 1];
    down.iter().for_each(|id| nodes.kill(*id));
    wait_for("the node that is left to miss the others", Duration::from_secs(20), || {
        nodes.status().is_some_and(|status| status["stale"] == true && status["leader"].is_null())
    });
    assert_eq!(held(&nodes), Some(3));
    down.iter().for_each(|id| nodes.start(*id));
    nodes.wait_accepting();

    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(20));
    judge(&history, &customer.taken()).assert_good();
    assert_eq!(customer.count(), 6);

    nodes.route("test.example", away.address());
    send(&nodes, &["four", "five"]);
    let returned = nodes.ask(&["route", "remove", "test.example", "--bounce"]);
    assert_eq!(
        String::from_utf8_lossy(&returned.stdout).trim(),
        "4 recipients returned to their senders",
        "{}",
        String::from_utf8_lossy(&returned.stderr)
    );
    nodes.wait_drained(Duration::from_secs(20));
    let notices = customer.taken();
    let notices: Vec<_> = notices.iter().filter(|taken| taken.recipient == "sender").collect();
    assert_eq!(notices.len(), 2, "one for each message");
    for notice in notices {
        let text = String::from_utf8_lossy(&notice.octets);
        assert!(text.contains("Status: 5.4.4") && text.contains("no longer taken here"), "{text}");
    }
    let listed = nodes.ask(&["route", "list", "--json"]).stdout;
    assert_eq!(String::from_utf8_lossy(&listed).lines().count(), 2, "nothing of the route is left");
}
