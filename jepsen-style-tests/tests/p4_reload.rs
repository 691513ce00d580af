//! SIGHUP: settings and certificates are read again, no session and no node ends, and a file that cannot be used changes nothing.

use std::process::Command;
use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::nodes::{Nodes, holdfast};
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{program, wait_for};

/// Sends SIGHUP and waits for what the node says to it.
fn hang_up(nodes: &Nodes, id: u64, said: &str) {
    let before = nodes.stderr(id).matches(said).count();
    let pid = nodes.pid(id).unwrap().to_string();
    assert!(Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
    wait_for(said, Duration::from_secs(10), || nodes.stderr(id).matches(said).count() > before);
}

const READ: &str = "settings and certificates were read again";

/// The serial number of the certificate that clients see.
fn serial(nodes: &Nodes, openssl: &std::path::Path, id: u64) -> String {
    let script = format!(
        "{0} s_client -connect {1} -starttls smtp </dev/null 2>/dev/null | {0} x509 -noout -serial",
        openssl.display(),
        nodes.smtp(id)
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let serial = String::from_utf8(output.stdout).unwrap();
    assert!(serial.starts_with("serial="), "{serial}");
    serial
}

#[test]
fn p4_a_hangup_signal_reads_settings_again_and_ends_nothing() {
    let Some(openssl) = program("openssl") else { return };
    let customer = Customer::start();
    let mut nodes = Nodes::start_all(customer.address());
    let leader = nodes.wait_leader();
    let id = leader % 3 + 1;
    let mut open = Client::connect(id, &nodes.smtp(id)).unwrap();
    let refused = |nodes: &Nodes| {
        let mut client = Client::connect(id, &nodes.smtp(id)).unwrap();
        assert_eq!(client.say("MAIL FROM:<a@b.example>\r\n").unwrap(), 250);
        client.say("RCPT TO:<u@elsewhere.example>\r\n").unwrap() == 550
    };
    wait_for("a refusal for good", Duration::from_secs(5), || refused(&nodes));

    // The authority of another `init` is no authority here: nothing changes.
    let strange = nodes.dir().join("strange");
    let made = holdfast(&["init", &strange.display().to_string(), "--base-port", "20000"]);
    assert!(made.status.success());
    let before = serial(&nodes, &openssl, id);
    let file = nodes.config(id);
    let good = std::fs::read_to_string(&file).unwrap();
    let relaying = good.replace("[smtp]\n", "[smtp]\nrelay_networks = [\"127.0.0.0/8\"]\n");
    assert_ne!(relaying, good);
    for bad in [
        relaying.clone() + "\n[nonsense]\n",
        relaying.replace("key = \"pki/", "key = \"strange/pki/"),
        relaying.replace(&format!("output = \"node-{id}.maillog\""), "output = \"no/such/dir/log\""),
    ] {
        std::fs::write(&file, bad).unwrap();
        hang_up(&nodes, id, "settings stay as they were");
        assert!(refused(&nodes));
        assert_eq!(serial(&nodes, &openssl, id), before);
    }

    // A certificate for mail, a network that may relay, a lifetime, a log that was moved away; and a port, which has to wait.
    let fresh = relaying
        .replace("tls_cert = \"pki/", "tls_cert = \"strange/pki/")
        .replace("tls_key = \"pki/", "tls_key = \"strange/pki/")
        .replace("[queue]", "[queue]\nlifetime = \"3d\"")
        .replace("erase_within = \"3s\"", "erase_within = \"4s\"");
    std::fs::write(&file, fresh).unwrap();
    let log = nodes.dir().join(format!("node-{id}.maillog"));
    std::fs::rename(&log, nodes.dir().join("old.maillog")).unwrap();
    hang_up(&nodes, id, "waiting for the next start: queue.erase_within");
    assert!(!refused(&nodes));
    assert_ne!(serial(&nodes, &openssl, id), before);
    assert!(nodes.maillog(id).contains("connect from"), "the log goes on in a file of its own");

    // The session that was open goes on under what it began with.
    let sent = open.transact("after", &["r"], &message("after", 1000));
    assert_eq!(sent.outcome, Outcome::Ok);

    // A renewed certificate among the peers serves new connections: the node is reached by one that starts anew.
    hang_up(&nodes, leader, READ);
    let other = (1..=3).find(|n| *n != id && *n != leader).unwrap();
    nodes.kill(other);
    nodes.start(other);
    wait_for("all nodes to be healthy", Duration::from_secs(30), || {
        let status = nodes.status();
        let all = status.as_ref().and_then(|s| s["nodes"].as_array());
        all.is_some_and(|nodes| nodes.iter().all(|n| n["healthy"] == true))
    });
    assert!((1..=3).all(|n| nodes.is_running(n)));
    nodes.wait_drained(Duration::from_secs(20));
    assert_eq!(customer.count(), 1);
}

/// Operators see from which address each node delivers.
#[test]
fn egress_addresses_are_published() {
    let customer = Customer::start();
    let nodes = Nodes::start_with(|id, text| {
        text.replace("[delivery]", &format!("[delivery]\nbind = [\"127.0.0.{id}\"]"))
    });
    nodes.route("test.example", customer.address());
    let status = nodes.status().unwrap();
    for node in status["nodes"].as_array().unwrap() {
        let id = node["id"].as_u64().unwrap();
        // The other family is the system's choice, if the machine has it.
        assert_eq!(node["egress"][0], format!("127.0.0.{id}"), "{status}");
        assert_eq!(node["accepting"], true, "{status}");
    }
    let table = nodes.ask(&["status"]).stdout;
    assert!(String::from_utf8_lossy(&table).contains("127.0.0.3"));
}
