//! P3 on the medium: with an at-rest key no octet of a message stands in any file in the clear. Nodes get their key one by one while mail
//! waits, each its own; what was there before is sealed anew in the background. A node without its key says which one it lacks.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::{Nodes, holdfast};
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};
use serde_json::Value;

fn send(nodes: &Nodes, names: std::ops::Range<usize>, history: &mut Vec<Sent>) {
    for n in names {
        let node = 1 + n as u64 % 3;
        let name = format!("canary{n:02}");
        let mut client = None;
        // One that was started a moment ago opens its doors last.
        wait_for("a node to open its doors", Duration::from_secs(20), || {
            client = Client::connect(node, &nodes.smtp(node)).ok();
            client.is_some()
        });
        let mut client = client.unwrap();
        // One of them is larger than a piece.
        let sent = client.transact(
            &name,
            &[&format!("to-{name}")],
            &message(&name, if n % 10 == 5 { 600_000 } else { 3000 }),
        );
        assert_eq!(sent.outcome, Outcome::Ok);
        history.push(sent);
    }
}

/// How many of these have a line, or their recipient's address, in the files of a node.
fn readable(nodes: &Nodes, id: u64, history: &[Sent]) -> usize {
    let texts = |s: &Sent| [format!("canary-{}-line", s.name), format!("to-{}@", s.name)];
    let stands = |s: &&Sent| texts(s).iter().any(|text| files_contain(&nodes.data(id), text.as_bytes()));
    history.iter().filter(stands).count()
}

fn at_rest(nodes: &Nodes, id: u64) -> Option<Value> {
    let status = nodes.status()?;
    status["nodes"].as_array()?.iter().find(|n| n["id"] == id).map(|n| n["at_rest"].clone())
}

#[test]
fn p3_with_an_at_rest_key_no_file_has_mail_in_the_clear() {
    let customer = Customer::start();
    customer.set_down(true);
    let mut nodes = Nodes::start_all(customer.address());
    let mut history = Vec::new();
    send(&nodes, 0..20, &mut history);
    wait_for("all of it to stand somewhere", Duration::from_secs(10), || {
        (1..=3).map(|id| readable(&nodes, id, &history)).sum::<usize>() >= 40
    });
    for id in 1..=3 {
        assert_eq!(nodes.stop(id), Some(0));
        let key = nodes.dir().join(format!("at-rest-{id}.key"));
        std::fs::write(&key, format!("# of node {id}\n{}\n", format!("{id:02x}").repeat(32))).unwrap();
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
        let text = std::fs::read_to_string(nodes.config(id)).unwrap();
        let keyed = text.replace("[storage]", &format!("[storage]\nkey_file = \"{}\"", key.display()));
        std::fs::write(nodes.config(id), keyed).unwrap();
        nodes.start(id);
        nodes.wait_accepting();
    }
    send(&nodes, 20..40, &mut history);
    wait_for("all to be sealed anew", Duration::from_secs(40), || {
        (1..=3).all(|id| at_rest(&nodes, id).is_some_and(|said| said["other_key_bytes"] == 0))
    });
    let keys: Vec<Value> =
        (1..=3).filter_map(|id| at_rest(&nodes, id)).map(|said| said["key"].clone()).collect();
    assert!(keys.iter().all(Value::is_string) && keys[0] != keys[1] && keys[1] != keys[2], "{keys:?}");
    wait_for("what was there in the clear to be overwritten", Duration::from_secs(10), || {
        (1..=3).all(|id| readable(&nodes, id, &history) == 0)
    });
    let leader = nodes.wait_leader();
    nodes.kill(leader);
    // Without its key it is refused, by the tools too, and comes to no harm.
    let data = nodes.data(leader).display().to_string();
    let check = holdfast(&["store", "check", &data]);
    let key = keys[leader as usize - 1].as_str().unwrap();
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(!check.status.success() && said.contains(&format!("the at-rest key {key}")), "{said}");
    let key_file = nodes.dir().join(format!("at-rest-{leader}.key")).display().to_string();
    let check = holdfast(&["store", "check", &data, "--key-file", &key_file]);
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    nodes.start(leader);
    nodes.wait_accepting();
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(40));
    judge(&history, &customer.taken()).assert_good();
}
