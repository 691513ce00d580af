//! A TLS policy that is not met defers with its reason and never downgrades; one that is met is. DNS is Knot, the customer is
//! Postfix with a certificate of nobody's and TLS 1.2.

use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::knot::{Knot, key_digest};
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::postfix::Postfix;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::wait_for;

/// A message for `test.example` waits; why.
fn wait_deferred(nodes: &Nodes, reason: &str) {
    let mut last = String::new();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("the reason", Duration::from_secs(20), || {
            last = String::from_utf8_lossy(&nodes.ask(&["queue", "list"]).stdout).into_owned();
            last.contains(reason)
        });
    }));
    assert!(done.is_ok(), "wanted {reason}; the queue says {last}");
}

#[test]
fn a_tls_policy_is_met_or_mail_waits() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    drop(taken);
    let in_the_clear = Customer::start();
    let clear_port = in_the_clear.address().rsplit_once(':').unwrap().1.to_string();
    let mut nodes = Nodes::prepare(|_, text| text);
    let certificate = nodes.dir().join("pki/node-1.crt");
    let Some(digest) = key_digest(&certificate) else { return };
    let key = nodes.dir().join("pki/node-1.key").display().to_string();
    let records = format!(
        "good A 127.0.0.1\n_{port}._tcp.good TLSA 3 1 1 {digest}\n\
         alias CNAME good\n\
         wrong A 127.0.0.1\n_{port}._tcp.wrong TLSA 3 1 1 {}\n\
         pkix A 127.0.0.1\n_{port}._tcp.pkix TLSA 1 1 1 {digest}\n\
         none A 127.0.0.1\n\
         clear A 127.0.0.1\n_{clear_port}._tcp.clear TLSA 3 1 1 {digest}\n",
        "0".repeat(64)
    );
    let Some(knot) = Knot::start(&records) else { return };
    let Some(postfix) = Postfix::start_as_customer(port, &certificate.display().to_string(), &key) else {
        return;
    };
    for id in 1..=3 {
        let file = nodes.config(id);
        let mut text = std::fs::read_to_string(&file).unwrap();
        let anchor = knot.anchor();
        text += &format!(
            "\n[dns]\nservers = [\"{}\"]\ntrust_anchor = \"{}\"\n",
            knot.address(),
            anchor.display()
        );
        std::fs::write(&file, text).unwrap();
        nodes.start(id);
    }
    nodes.wait_accepting();
    let route = |to: &str, more: &[&str]| {
        let mut args = vec!["route", "set", "test.example", "--to", to];
        args.extend(more);
        let output = nodes.ask(&args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let at = |name: &str| format!("{name}.test:{port}");
    let mut sent = 0;
    let mut send = || {
        sent += 1;
        let name = format!("policy{sent}");
        let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
        assert_eq!(client.transact(&name, &["r"], &message(&name, 900)).outcome, Outcome::Ok);
    };

    route(&at("wrong.signed"), &["--tls", "dane"]);
    send();
    wait_deferred(&nodes, "no TLSA record matches the certificate");
    for (host, reason) in [
        ("none.signed", "none.signed.test has no secure TLSA record"),
        ("pkix.signed", "pkix.signed.test has no usable TLSA record"),
        ("good.plain", "good.plain.test"),
        ("missing.signed", "host missing.signed.test: it does not exist"),
    ] {
        route(&at(host), &["--tls", "dane"]);
        wait_deferred(&nodes, reason);
    }
    route(&format!("clear.signed.test:{clear_port}"), &["--tls", "dane"]);
    wait_deferred(&nodes, "TLS is required, but clear.signed.test does not offer it");
    route(&format!("127.0.0.1:{port}"), &["--tls", "dane"]);
    wait_deferred(&nodes, "127.0.0.1 is no name, and DANE needs one");
    route(&at("good.signed"), &["--tls", "verify"]);
    wait_deferred(&nodes, "invalid peer certificate");
    route(&at("good.signed"), &["--tls", "require", "--tls-min", "1.3"]);
    wait_deferred(&nodes, "TLS handshake");
    wait_for("the feature level of pinned keys", Duration::from_secs(20), || {
        nodes.status().is_some_and(|status| status["feature_level"].as_u64() >= Some(3))
    });
    let wrong_pin = "0".repeat(64);
    route(&at("good.signed"), &["--tls", "verify", "--pin", &wrong_pin]);
    wait_deferred(&nodes, "no pinned key matches the certificate");
    assert!(!postfix.maillog().contains("status=sent"), "{}", postfix.maillog());
    assert_eq!(in_the_clear.count(), 0);

    // Each policy that is met: DANE by the host's own name and by an alias, any certificate, a pinned key; TLS 1.2.
    let pins = format!("{wrong_pin},{digest}");
    for (host, policy, trust) in [
        ("good.signed", &["--tls", "dane"][..], "Verified"),
        ("alias.signed", &["--tls", "dane"], "Verified"),
        ("good.signed", &["--tls", "require"], "Untrusted"),
        ("good.signed", &["--tls", "verify", "--pin", &pins], "Verified"),
    ] {
        route(&at(host), policy);
        send();
        nodes.wait_drained(Duration::from_secs(20));
        let line = format!("{trust} TLS connection established to {host}.test");
        assert!((1..=3).any(|id| nodes.maillog(id).contains(&line)), "{policy:?} {host}");
    }
    assert_eq!(postfix.maillog().matches("status=sent").count(), 5);
}
