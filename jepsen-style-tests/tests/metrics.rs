//! What a monitoring system reads, with curl: over mutual TLS, to nobody without a certificate.

use std::path::Path;
use std::process::{Command, Output};

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::knot::certificate;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::program;

/// Asks node 1 for a path, with this certificate if any.
fn get(curl: &Path, nodes: &Nodes, path: &str, identity: Option<(&str, &str)>) -> Output {
    let pki = nodes.dir().join("pki");
    let port = nodes.smtp(1).rsplit_once(':').unwrap().1.parse::<u16>().unwrap() + 20;
    let mut command = Command::new(curl);
    command
        .args(["--silent", "--show-error", "--fail", "--max-time", "10", "--cacert"])
        .arg(pki.join("ca.crt"));
    if let Some((cert, key)) = identity {
        command.arg("--cert").arg(pki.join(cert)).arg("--key").arg(pki.join(key));
    }
    command.arg(format!("https://127.0.0.1:{port}{path}"));
    command.output().unwrap()
}

#[test]
fn a_monitoring_system_reads_a_nodes_metrics() {
    let Some(curl) = program("curl") else { return };
    let customer = Customer::start();
    let mut nodes = Nodes::prepare(|_, text| text);
    let pki = nodes.dir().join("pki");
    // A certificate for one purpose, which has an operator's authority and none of its rights.
    let Some(()) = certificate(&pki, "monitoring", &["monitoring.example".into()]) else { return };
    (1..=3).for_each(|id| nodes.start(id));
    nodes.wait_accepting();
    customer.set_down(true);
    nodes.route("test.example", customer.address());
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    assert_eq!(client.transact("one", &["r"], &message("one", 900)).outcome, Outcome::Ok);
    let monitoring = Some(("monitoring.crt", "monitoring.key"));
    let output = get(&curl, &nodes, "/metrics", monitoring);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let value = |name: &str| {
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
    };
    assert_eq!(value("holdfast_accepting "), 1.0);
    assert_eq!(value("holdfast_queue_messages "), 1.0);
    assert!(value("holdfast_queue_bytes ") >= 900.0);
    assert!(value("holdfast_log_last_index ") > 1.0);
    assert!(value("holdfast_disk_free_bytes ") > 1e6);
    for setting in ["[cluster] cert", "[smtp] tls_cert", "[admin] cert"] {
        let name = format!("holdfast_certificate_expiry_timestamp_seconds{{setting=\"{setting}\"");
        assert!(value(&name) > 1.8e9, "{setting}");
    }
    assert_eq!(get(&curl, &nodes, "/status", monitoring).status.code(), Some(22), "404");
    assert!(!get(&curl, &nodes, "/metrics", None).status.success(), "without a certificate");
    let own = pki.join("monitoring.pem");
    let both =
        [pki.join("monitoring.crt"), pki.join("monitoring.key")].map(|p| std::fs::read_to_string(p).unwrap());
    std::fs::write(&own, both.concat()).unwrap();
    let refused = nodes.ask(&["queue", "list", "--identity", &own.display().to_string()]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && why.contains("not an operator's"), "{why}");
}
