//! P1: a node whose disk died is replaced by another one under a new id, while mail flows, and the new one counts: what was taken
//! before it came survives the loss of a node that was there from the start.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent};
use jepsen_style_tests::nodes::{Nodes, holdfast};
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};

/// Ports of a node: for mail, for peers and for operators.
fn ports(nodes: &Nodes, id: u64) -> [u16; 3] {
    let own = nodes.smtp(1).rsplit_once(':').unwrap().1.parse::<u16>().unwrap() - 1 + id as u16;
    [own, own + 10, own + 20]
}

/// Writes the file and the certificate of a new node; its peers are those of node 1's file and itself.
fn prepare(nodes: &Nodes, id: u64) {
    let pki = nodes.dir().join("pki").display().to_string();
    let made = holdfast(&["pki", "node", &id.to_string(), "--host", "127.0.0.1", "--dir", &pki]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let text = std::fs::read_to_string(nodes.config(1)).unwrap();
    let [_, peer, admin] = ports(nodes, id);
    let placement = "{ datacenter = \"dc1\", power = \"D\", network = \"4\" }";
    let mut peers = true;
    let mut lines = Vec::new();
    for line in text.lines() {
        let line = line.replace("node-1", &format!("node-{id}"));
        lines.push(match line.split(" = ").next().unwrap_or_default() {
            "id" if line == "id = 1" => format!("id = {id}"),
            "placement" => format!("placement = {placement}"),
            _ if peers && line == "]" => {
                peers = false;
                format!(
                    "  {{ id = {id}, address = \"127.0.0.1:{peer}\", admin = \"127.0.0.1:{admin}\", placement = {placement} }},\n]"
                )
            }
            "listen" if line.contains('[') => format!("listen = [\"{}\"]", nodes.smtp(id)),
            "listen" => {
                let [_, old_peer, old_admin] = ports(nodes, 1);
                line.replace(&format!(":{old_peer}"), &format!(":{peer}"))
                    .replace(&format!(":{old_admin}"), &format!(":{admin}"))
            }
            _ => line,
        });
    }
    std::fs::write(nodes.config(id), lines.join("\n") + "\n").unwrap();
}

/// `cluster add`, with the ports of [`ports`].
fn add(nodes: &Nodes, id: u64, more: &[&str]) -> std::process::Output {
    let [_, peer, admin] = ports(nodes, id).map(|port| format!("127.0.0.1:{port}"));
    let id = id.to_string();
    let mut args = vec!["cluster", "add", &id, "--address", &peer, "--admin", &admin];
    args.extend(["--power", "D", "--network", "4"]);
    args.extend(more);
    nodes.ask(&args)
}

fn refused(output: &std::process::Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains(why), "wanted {why}: {said}");
}

fn members(nodes: &Nodes) -> Vec<(u64, String)> {
    let status = nodes.status().unwrap();
    let member = |node: &serde_json::Value| {
        (node["id"].as_u64().unwrap(), node["role"].as_str().unwrap_or_default().to_string())
    };
    status["nodes"].as_array().unwrap().iter().map(member).collect()
}

#[test]
fn p1_a_dead_node_is_replaced_under_a_new_id_while_mail_flows() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::start_with(|_, text| text.replace("[storage]", "[storage]\nkeep_entries = 50"));
    nodes.route("test.example", away.address());
    let mut history: Vec<Sent> = Vec::new();
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    for n in 0..40 {
        let name = format!("before{n:02}");
        history.push(client.transact(&name, &["r"], &message(&name, 3000)));
    }
    drop(client);
    // Its disk is gone. It never comes back under its id, not even empty.
    let dead = nodes.wait_leader();
    let [staying, other] = [1, 2, 3].into_iter().filter(|id| *id != dead).collect::<Vec<_>>()[..] else {
        panic!()
    };
    nodes.kill(dead);
    std::fs::remove_dir_all(nodes.data(dead)).unwrap();
    let follows = if nodes.wait_leader() == other { staying } else { other };
    refused(&nodes.ask(&["cluster", "remove", &follows.to_string()]), "quorum is 2");
    refused(&add(&nodes, 2, &[]), "node 2 is a member already");
    refused(&add(&nodes, 4, &[]), "first take out the nodes that do not answer");

    // Mail flows on one of the nodes that are left, from here to the end.
    let stop = Arc::new(AtomicBool::new(false));
    let flow = {
        let (stop, address) = (stop.clone(), nodes.smtp(staying));
        std::thread::spawn(move || {
            let mut sent = Vec::new();
            let mut client = Client::connect(staying, &address).unwrap();
            while !stop.load(Ordering::SeqCst) {
                let name = format!("flow{:05}", sent.len());
                sent.push(client.transact(&name, &["r"], &message(&name, 600)));
                std::thread::sleep(Duration::from_millis(5));
            }
            sent
        })
    };
    let removed = nodes.ask(&["cluster", "remove", &dead.to_string()]);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    refused(&add(&nodes, 4, &[]), "start it with an empty data directory first");
    prepare(&nodes, 4);
    nodes.start(4);
    wait_for("the new node to wait", Duration::from_secs(20), || {
        nodes.stderr(4).contains("waiting for `holdfast cluster add 4`")
    });
    let added = add(&nodes, 4, &[]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    assert!(String::from_utf8_lossy(&added.stdout).contains("node 4 is a member"));
    refused(&add(&nodes, 4, &[]), "node 4 is a member already");
    let now = members(&nodes);
    assert_eq!(now.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [staying, other, 4]);
    assert!(now.iter().all(|(_, role)| role == "leader" || role == "follower"), "{now:?}");
    wait_for("the new node to have what waits", Duration::from_secs(20), || {
        (0..40).all(|n| files_contain(&nodes.data(4), format!("canary-before{n:02}-line").as_bytes()))
    });
    stop.store(true, Ordering::SeqCst);
    history.extend(flow.join().unwrap());
    assert!(history.iter().all(|sent| sent.outcome == Outcome::Ok), "mail flowed all the time");
    assert!(history.len() > 80, "{}", history.len());

    // The new node leads if it is told to, and without one of those that were there before.
    let moved = nodes.ask(&["cluster", "transfer", "--to", "4"]);
    assert_eq!(
        String::from_utf8_lossy(&moved.stdout).trim(),
        "node 4 leads",
        "{}",
        String::from_utf8_lossy(&moved.stderr)
    );
    refused(&nodes.ask(&["cluster", "remove", "4"]), "node 4 leads");
    nodes.kill(other);
    nodes.wait_accepting();
    // A node knows its peers from the log, whatever its file says.
    nodes.kill(staying);
    nodes.start(staying);
    nodes.wait_accepting();
    let mut client = Client::connect(staying, &nodes.smtp(staying)).unwrap();
    history.push(client.transact("after", &["r"], &message("after", 600)));
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(60));
    judge(&history, &customer.taken()).assert_good();
}

/// P9: one of the nodes that were there from the start loses its whole log after another was replaced. Its file still names the one that is
/// gone; it asks those that are members now.
#[test]
fn p9_a_damaged_node_asks_who_is_a_member_now() {
    let (customer, away) = (Customer::start(), Customer::start());
    away.set_down(true);
    let mut nodes = Nodes::start_with(|_, text| text);
    nodes.route("test.example", away.address());
    let leader = nodes.wait_leader();
    let [gone, damaged] = [1, 2, 3].into_iter().filter(|id| *id != leader).collect::<Vec<_>>()[..] else {
        panic!()
    };
    let mut client = Client::connect(leader, &nodes.smtp(leader)).unwrap();
    let mut history: Vec<Sent> =
        (0..20).map(|n| client.transact(&format!("m{n}"), &["r"], &message(&format!("m{n}"), 600))).collect();
    nodes.kill(gone);
    prepare(&nodes, 4);
    nodes.start(4);
    let removed = nodes.ask(&["cluster", "remove", &gone.to_string()]);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    let added = add(&nodes, 4, &[]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));

    nodes.kill(damaged);
    for entry in std::fs::read_dir(nodes.data(damaged)).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("segment-") {
            let octets = vec![0x5a; entry.metadata().unwrap().len() as usize];
            std::fs::write(entry.path(), octets).unwrap();
        }
    }
    nodes.start(damaged);
    wait_for("the damaged node to be whole", Duration::from_secs(30), || {
        let status = nodes.status().unwrap_or_default();
        let found =
            status["nodes"].as_array().and_then(|all| all.iter().find(|n| n["id"] == damaged).cloned());
        found.is_some_and(|node| node["healthy"] == true)
    });
    // It counts again, and knows the one that came: the two of them are enough.
    nodes.kill(leader);
    nodes.wait_accepting();
    let mut client = Client::connect(damaged, &nodes.smtp(damaged)).unwrap();
    history.push(client.transact("after", &["r"], &message("after", 600)));
    assert!(history.iter().all(|sent| sent.outcome == Outcome::Ok), "{history:?}");
    nodes.route("test.example", customer.address());
    nodes.wait_drained(Duration::from_secs(60));
    judge(&history, &customer.taken()).assert_good();
}

/// P1: while a node is away others come and go, and the one that leads now it has never heard of. It comes back all the same, and counts.
#[test]
fn p1_a_node_that_was_away_follows_a_leader_that_it_never_knew() {
    let customer = Customer::start();
    let mut nodes = Nodes::start_with(|_, text| text.replace("[storage]", "[storage]\nkeep_entries = 50"));
    nodes.route("test.example", customer.address());
    let leader = nodes.wait_leader();
    let [goes, away] = [1, 2, 3].into_iter().filter(|id| *id != leader).collect::<Vec<_>>()[..] else {
        panic!()
    };
    nodes.kill(away);
    prepare(&nodes, 4);
    nodes.start(4);
    // A node that is away makes a fourth one needed at once.
    refused(&add(&nodes, 4, &[]), "all would depend on it at once");
    let added = add(&nodes, 4, &["--force"]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    let removed = nodes.ask(&["cluster", "remove", &goes.to_string()]);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    nodes.kill(goes);
    let moved = nodes.ask(&["cluster", "transfer", "--to", "4"]);
    assert!(moved.status.success(), "{}", String::from_utf8_lossy(&moved.stderr));
    // The new leader keeps nothing from before it came, and little of what comes now.
    let mut history = Vec::new();
    let mut client = Client::connect(4, &nodes.smtp(4)).unwrap();
    for n in 0..200 {
        let name = format!("meanwhile{n:03}");
        history.push(client.transact(&name, &["r"], &message(&name, 600)));
    }
    nodes.wait_drained(Duration::from_secs(20));
    nodes.start(away);
    wait_for("the node that was away to follow", Duration::from_secs(30), || {
        let status = nodes.status().unwrap_or_default();
        let found = status["nodes"]
            .as_array()
            .and_then(|nodes| nodes.iter().find(|node| node["id"] == away).cloned());
        let last = |node: &serde_json::Value| node["last_index"].as_u64();
        let leads =
            status["nodes"].as_array().and_then(|nodes| nodes.iter().find(|node| node["id"] == 4).cloned());
        found.is_some_and(|found| {
            last(&found).is_some() && last(&found) >= leads.as_ref().and_then(last).map(|i| i - 5)
        })
    });
    assert!(nodes.stderr(away).contains("the bodies of a snapshot are here"), "it came back by a snapshot");
    nodes.kill(leader);
    nodes.wait_accepting();
    let mut client = Client::connect(away, &nodes.smtp(away)).unwrap();
    history.push(client.transact("after", &["r"], &message("after", 600)));
    nodes.wait_drained(Duration::from_secs(20));
    let refused: Vec<_> =
        history.iter().filter(|sent| sent.outcome != Outcome::Ok).map(|s| (&s.name, &s.outcome)).collect();
    assert!(refused.is_empty(), "{refused:?}");
    judge(&history, &customer.taken()).assert_good();
}
