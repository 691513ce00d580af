//! P6, and room to delete: a full disk refuses new mail with 452, stops no node, and drains and erases what it holds.

use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::disk::SmallDisk;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{files_contain, wait_for};

fn no_room(nodes: &Nodes) -> bool {
    let status = nodes.status().unwrap_or_default();
    status["accepting"] == false && status["why_not"].as_str().is_some_and(|why| why.contains("no room"))
}

/// Disks that are really full: first by the queue itself, then to the last block by somebody else's file.
#[test]
fn p6_full_disks_refuse_and_drain() {
    let disks: Vec<SmallDisk> = (0..3).filter_map(|_| SmallDisk::new(192)).collect();
    if disks.len() < 3 {
        return;
    }
    let customer = Customer::start();
    customer.set_down(true);
    let mut nodes = Nodes::start_with(|id, text| {
        let own = disks[id as usize - 1].path().join("data");
        text.replace(&format!("data_dir = \"data/node-{id}\""), &format!("data_dir = \"{}\"", own.display()))
            .replace("reserve_bytes = \"16MiB\"", "reserve_bytes = \"48MiB\"")
    });
    nodes.route("test.example", customer.address());
    let mut history = Vec::new();
    let mut refused = 0;
    let mut clients: Vec<Client> = (1..=3).map(|id| Client::connect(id, &nodes.smtp(id)).unwrap()).collect();
    for n in 0..6000 {
        let name = format!("fills{n:04}");
        let sent = clients[n % 3].transact(&name, &["r"], &message(&name, 100_000));
        match sent.outcome {
            Outcome::Ok => {
                history.push(sent);
                refused = 0;
            }
            Outcome::Fail(452) => refused += 1,
            other => panic!("message {n}: {other:?}"),
        }
        // In a row, by all three nodes; and for good: while a spare segment is being made there is less room for a moment.
        if refused > 30 && no_room(&nodes) {
            break;
        }
    }
    assert!(refused > 30 && history.len() > 300, "{refused} refused after {} were taken", history.len());
    // Somebody else takes the rest, on every disk.
    let fillers: Vec<_> = disks.iter().map(SmallDisk::fill).collect();
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(60));
    assert!((1..=3).all(|id| nodes.is_running(id)), "no node ended");
    judge(&history, &customer.taken()).assert_good();
    wait_for("the bodies to be erased", Duration::from_secs(20), || {
        nodes.status().is_some_and(|s| {
            s["nodes"].as_array().is_some_and(|nodes| nodes.iter().all(|n| n["live_body_bytes"] == 0))
        })
    });
    // The segments that were drained are room again, with or without the filler.
    fillers.iter().for_each(|filler| std::fs::remove_file(filler).unwrap());
    nodes.wait_accepting();
    let sent = clients[0].transact("again", &["r"], &message("again", 1000));
    assert_eq!(sent.outcome, Outcome::Ok, "mail is taken again without an operator");
    history.push(sent);
    nodes.wait_drained(Duration::from_secs(20));
    judge(&history, &customer.taken()).assert_good();
    drop(nodes);
}

/// Room to delete: while there is too little of it new mail gets 452, and what is queued is still delivered and erased.
#[test]
fn p6_without_room_new_mail_is_refused_and_draining_goes_on() {
    let customer = Customer::start();
    customer.set_down(true);
    let mut nodes = Nodes::start_all(customer.address());
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    let history = vec![client.transact("queued", &["r"], &message("queued", 1000))];
    assert_eq!(history[0].outcome, Outcome::Ok);
    // Without room no node takes a body that it does not have yet.
    wait_for("all nodes to have it", Duration::from_secs(20), || {
        (1..=3).all(|id| files_contain(&nodes.data(id), b"canary-queued-line"))
    });
    for id in 1..=3 {
        nodes.kill(id);
        let file = nodes.config(id);
        let text = std::fs::read_to_string(&file).unwrap();
        // More than any disk has: to the node its disk is as good as full.
        let text = text.replace("reserve_bytes = \"16MiB\"", "reserve_bytes = \"1048576GiB\"");
        std::fs::write(&file, text).unwrap();
        nodes.start(id);
    }
    wait_for("the nodes to be back", Duration::from_secs(30), || nodes.leader().is_some());
    wait_for("the log to be applied", Duration::from_secs(20), || nodes.queued() == Some(1));
    let status = nodes.status().unwrap();
    assert_eq!(status["accepting"], false);
    assert!(status["why_not"].as_str().unwrap().contains("no room"), "{status}");
    let mut client = Client::connect(2, &nodes.smtp(2)).unwrap();
    let refused = client.transact("refused", &["r"], &message("refused", 1000));
    assert_eq!(refused.outcome, Outcome::Fail(452));
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(30));
    judge(&history, &customer.taken()).assert_good();
}

fn node(nodes: &Nodes, id: u64, field: &str) -> Option<u64> {
    let status = nodes.status()?;
    status["nodes"].as_array()?.iter().find(|n| n["id"] == id)?[field].as_u64()
}

/// One small disk among large ones: while it is full its node neither ends nor leads, the others take mail, and what is settled
/// meanwhile is settled on it as well, for which it needs no room.
#[test]
fn p6_one_full_disk_stops_nobody() {
    let Some(disk) = SmallDisk::new(192) else { return };
    let customer = Customer::start();
    customer.set_down(true);
    let small = 2;
    let mut nodes = Nodes::start_with(|id, text| {
        let text = text.replace("reserve_bytes = \"16MiB\"", "reserve_bytes = \"48MiB\"");
        let own = disk.path().join("data");
        match id == small {
            true => text.replace("data_dir = \"data/node-2\"", &format!("data_dir = \"{}\"", own.display())),
            false => text,
        }
    });
    nodes.route("test.example", customer.address());
    // The small one leads: whoever else does goes until it is its turn.
    for _ in 0..20 {
        let leader = nodes.wait_leader();
        if leader == small {
            break;
        }
        nodes.kill(leader);
        nodes.wait_leader();
        nodes.start(leader);
    }
    assert_eq!(nodes.wait_leader(), small);
    let mut history = Vec::new();
    let mut send = |nodes: &Nodes, name: String, bytes: usize| {
        let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
        history.push(client.transact(&name, &["r"], &message(&name, bytes)));
        history.last().unwrap().outcome.clone()
    };
    for n in 0..40 {
        assert_eq!(send(&nodes, format!("before{n:02}"), 50_000), Outcome::Ok);
    }
    let filler = disk.fill();
    wait_for("leadership to move", Duration::from_secs(30), || {
        nodes.leader().is_some_and(|leader| leader != small)
    });
    nodes.wait_accepting();
    for n in 0..300 {
        assert_eq!(send(&nodes, format!("while{n:03}"), 200_000), Outcome::Ok, "message {n}");
    }
    assert!(nodes.is_running(small), "it goes on: {}", nodes.stderr(small));
    assert!(
        node(&nodes, small, "last_index") < node(&nodes, nodes.wait_leader(), "last_index"),
        "there is no room on it for what came since"
    );
    let mut at_it = Client::connect(small, &nodes.smtp(small)).unwrap();
    assert_eq!(at_it.transact("refused", &["r"], &message("refused", 900)).outcome, Outcome::Fail(452));
    // What is settled needs no room: it comes as entries without bodies.
    customer.set_down(false);
    nodes.wait_drained(Duration::from_secs(60));
    wait_for("the full one to catch up", Duration::from_secs(40), || {
        node(&nodes, small, "last_index").is_some()
            && node(&nodes, small, "last_index") >= node(&nodes, 1, "last_index")
            && node(&nodes, small, "live_body_bytes") == Some(0)
    });
    assert!(nodes.is_running(small));
    judge(&history, &customer.taken()).assert_good();
    std::fs::remove_file(filler).unwrap();
    wait_for("it to take mail again", Duration::from_secs(20), || {
        let mut client = Client::connect(small, &nodes.smtp(small)).unwrap();
        client.transact("again", &["r"], &message("again", 900)).outcome == Outcome::Ok
    });
    drop(nodes);
}
