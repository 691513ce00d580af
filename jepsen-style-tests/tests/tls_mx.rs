//! TLS to an MX under the default policy: DANE and MTA-STS are used wherever they are published, and what they forbid waits. In a
//! network of its own, since an MX listens on port 25 and a policy's host on 443. DNS is Knot, the customers are Postfix with a
//! certificate and one without TLS, the policy's host is OpenSSL.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::Outcome;
use jepsen_style_tests::knot::{Knot, certificate, key_digest};
use jepsen_style_tests::network;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::postfix::Postfix;
use jepsen_style_tests::sender::{Client, message};
use jepsen_style_tests::tools::{program, wait_for};

/// Nodes that take mail for all zones, and ask this name server.
fn start(nodes: &mut Nodes, knot: &Knot, anchor: &Knot, dnssec: &str) {
    for id in 1..=3 {
        let file = nodes.config(id);
        let text = std::fs::read_to_string(&file).unwrap();
        let ca = format!("[delivery]\nca = \"{}\"\n", nodes.dir().join("pki/ca.crt").display());
        let text =
            text.split("\n[dns]").next().unwrap().replace(&ca, "[delivery]\n").replace("[delivery]\n", &ca);
        let dns = format!(
            "\n[dns]\nservers = [\"{}\"]\ntrust_anchor = \"{}\"\ndnssec = \"{dnssec}\"\n",
            knot.address(),
            anchor.anchor().display()
        );
        std::fs::write(&file, text + &dns).unwrap();
        nodes.start(id);
    }
    nodes.wait_accepting();
    for zone in [".signed.test", ".plain.test", ".forged.test"] {
        let output = nodes.ask(&["route", "set", zone, "--mx"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Sends a message to each of these domains.
fn send(nodes: &Nodes, domains: &[&str]) {
    let mut client = Client::connect(1, &nodes.smtp(1)).unwrap();
    for domain in domains {
        let recipient = format!("r@{domain}");
        let sent = client.transact(domain, &[&recipient], &message(domain, 900));
        assert_eq!(sent.outcome, Outcome::Ok, "{domain}");
    }
}

/// The log lines of all nodes.
fn log(nodes: &Nodes) -> String {
    (1..=3).map(|id| nodes.maillog(id)).collect()
}

/// The message for a domain waits, and this is why.
fn wait_deferred(nodes: &Nodes, domain: &str, reason: &str) {
    let mut last = String::new();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("the reason", Duration::from_secs(30), || {
            let output = nodes.ask(&["queue", "list", "--json", "--to-domain", domain]);
            last = String::from_utf8_lossy(&output.stdout).into_owned();
            last.contains(reason)
        });
    }));
    assert!(done.is_ok(), "{domain}: wanted {reason}; the queue says {last}");
}

/// The message for a domain went over TLS as this word says, or without TLS.
fn wait_sent(nodes: &Nodes, domain: &str, host: &str, word: Option<&str>) {
    let mut all = String::new();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("the message to go", Duration::from_secs(30), || {
            all = log(nodes);
            all.lines().any(|line| line.contains(&format!("to=<r@{domain}>")) && line.contains("status=sent"))
        });
    }));
    assert!(
        done.is_ok(),
        "{domain}: {}",
        all.lines().filter(|l| l.contains(domain)).collect::<Vec<_>>().join("\n")
    );
    let sessions: Vec<&str> =
        all.lines().filter(|l| l.contains(&format!(" established to {host}["))).collect();
    match word {
        Some(word) => assert!(
            sessions.iter().any(|line| line.contains(&format!("{word} TLS connection"))),
            "{domain}: {sessions:?}"
        ),
        None => assert!(sessions.is_empty(), "{domain}: {sessions:?}"),
    }
}

/// OpenSSL as the host of MTA-STS policies; it ends with this value.
struct PolicyHost(Child);

impl Drop for PolicyHost {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn policy_host(nodes: &Nodes, policy: &str) -> Option<PolicyHost> {
    let openssl = program("openssl")?;
    let dir = nodes.dir().join("policy");
    std::fs::create_dir_all(dir.join(".well-known")).unwrap();
    std::fs::write(dir.join(".well-known/mta-sts.txt"), policy).unwrap();
    let pki = nodes.dir().join("pki");
    let child = Command::new(openssl)
        .args(["s_server", "-quiet", "-accept", "127.0.0.3:443", "-WWW", "-cert"])
        .arg(pki.join("policies.crt"))
        .arg("-key")
        .arg(pki.join("policies.key"))
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the policy's host", Duration::from_secs(10), || {
        std::net::TcpStream::connect("127.0.0.3:443").is_ok()
    });
    Some(PolicyHost(child))
}

/// The customers: Postfix with STARTTLS on 127.0.0.1, one in the clear on 127.0.0.2.
fn customers(nodes: &Nodes) -> Option<(Postfix, Customer, String)> {
    let pki = nodes.dir().join("pki");
    certificate(&pki, "mx", &["good.plain.test".into(), "good.signed.test".into()])?;
    let (cert, key) = (pki.join("mx.crt"), pki.join("mx.key"));
    let postfix = Postfix::start_as_customer(25, &cert.display().to_string(), &key.display().to_string())?;
    Some((postfix, Customer::start_at("127.0.0.2:25"), key_digest(&cert)?))
}

/// Hosts with every kind of TLSA record, and a domain `m-HOST` for each.
fn dane_records(digest: &str) -> String {
    let wrong = "0".repeat(64);
    let mut text = String::new();
    for (host, address, tlsa) in [
        ("good", 1, format!("3 1 1 {digest}")),
        ("wrong", 1, format!("3 1 1 {wrong}")),
        ("pkix", 1, format!("1 1 1 {digest}")),
        ("clear", 2, format!("3 1 1 {digest}")),
        ("pkixclear", 2, format!("1 1 1 {digest}")),
        ("none", 1, String::new()),
        ("noneclear", 2, String::new()),
        ("lost", 1, String::new()),
    ] {
        text += &format!("{host} A 127.0.0.{address}\nm-{host} MX 10 {host}\n");
        if !tlsa.is_empty() {
            text += &format!("_25._tcp.{host} TLSA {tlsa}\n");
        }
    }
    // Its TLSA records are in a zone that is signed and does not answer.
    text += &format!("_tcp.lost NS nowhere\n_tcp.lost DS 1 13 2 {}\n", "1".repeat(64));
    // An MX elsewhere, whatever zone this is.
    text + "m-away MX 10 wrong.signed.test.\nm-near MX 10 good.signed.test.\nm-lured MX 10 good.forged.test.\n"
}

#[test]
fn dane_is_used_wherever_it_is_published() {
    if !network::is_own("dane_is_used_wherever_it_is_published") {
        return;
    }
    let mut nodes = Nodes::prepare(|_, text| text);
    let Some((postfix, in_the_clear, digest)) = customers(&nodes) else { return };
    let Some(knot) = Knot::start(&dane_records(&digest)) else { return };
    start(&mut nodes, &knot, &knot, "auto");
    let waits = [
        ("m-wrong.signed.test", "no TLSA record matches the certificate"),
        ("m-away.plain.test", "no TLSA record matches the certificate"),
        ("m-clear.signed.test", "TLS is required, but clear.signed.test does not offer it"),
        ("m-pkixclear.signed.test", "TLS is required, but pkixclear.signed.test does not offer it"),
        ("m-lost.signed.test", "4.7.5 TLSA of lost.signed.test"),
        ("m-good.forged.test", "4.4.3 MX of m-good.forged.test"),
        // The MX is proven, and the addresses of its host are forged.
        ("m-lured.signed.test", "4.4.3 host good.forged.test"),
    ];
    send(&nodes, &waits.map(|(domain, _)| domain));
    for (domain, reason) in waits {
        wait_deferred(&nodes, domain, reason);
    }
    assert!(!postfix.maillog().contains("status=sent"), "{}", postfix.maillog());
    assert_eq!(in_the_clear.count(), 0);
    for (domain, host, word) in [
        ("m-near.plain.test", "good.signed.test", Some("Trusted")),
        ("m-good.signed.test", "good.signed.test", Some("Verified")),
        ("m-pkix.signed.test", "pkix.signed.test", Some("Untrusted")),
        ("m-none.signed.test", "none.signed.test", Some("Untrusted")),
        ("m-noneclear.signed.test", "noneclear.signed.test", None),
        ("m-wrong.plain.test", "wrong.plain.test", Some("Untrusted")),
        ("m-clear.plain.test", "clear.plain.test", None),
    ] {
        send(&nodes, &[domain]);
        wait_sent(&nodes, domain, host, word);
    }
}

/// Some name servers strip what proofs are made of. Mail goes on, unless the operator wants it to wait.
#[test]
fn a_name_server_without_signatures_stops_mail_only_if_told_to() {
    if !network::is_own("a_name_server_without_signatures_stops_mail_only_if_told_to") {
        return;
    }
    let mut nodes = Nodes::prepare(|_, text| text);
    let Some((postfix, _in_the_clear, digest)) = customers(&nodes) else { return };
    let records = dane_records(&digest);
    let Some(signing) = Knot::start(&records) else { return };
    let Some(stripped) = Knot::start_stripped(&records) else { return };
    start(&mut nodes, &stripped, &signing, "always");
    send(&nodes, &["m-wrong.signed.test"]);
    wait_deferred(&nodes, "m-wrong.signed.test", "4.4.3 MX of m-wrong.signed.test");
    assert!(!postfix.maillog().contains("status=sent"));
    (1..=3).for_each(|id| nodes.kill(id));
    start(&mut nodes, &stripped, &signing, "auto");
    wait_sent(&nodes, "m-wrong.signed.test", "wrong.signed.test", Some("Untrusted"));
    let said = "the name servers give no DNSSEC proof";
    assert!((1..=3).any(|id| nodes.stderr(id).contains(said)));
}

#[test]
fn an_mta_sts_policy_is_enforced() {
    if !network::is_own("an_mta_sts_policy_is_enforced") {
        return;
    }
    let mut nodes = Nodes::prepare(|_, text| text);
    let Some((postfix, in_the_clear, _)) = customers(&nodes) else { return };
    let mut records =
        String::from("good A 127.0.0.1\nbad A 127.0.0.1\nother A 127.0.0.1\nclear A 127.0.0.2\n");
    let mut names = Vec::new();
    for (domain, mx, host) in [
        ("m-good", "good", 3),
        ("m-bad", "bad", 3),
        ("m-other", "other", 3),
        ("m-clear", "clear", 3),
        ("m-down", "other", 9),
    ] {
        records += &format!(
            "{domain} MX 10 {mx}\n_mta-sts.{domain} TXT \"v=STSv1; id=1;\"\nmta-sts.{domain} A 127.0.0.{host}\n"
        );
        names.push(format!("mta-sts.{domain}.plain.test"));
    }
    records += "m-none MX 10 other\n";
    let Some(knot) = Knot::start(&records) else { return };
    let Some(()) = certificate(&nodes.dir().join("pki"), "policies", &names) else { return };
    let policy = "version: STSv1\r\nmode: enforce\r\nmx: good.plain.test\r\nmx: bad.plain.test\r\nmx: cl*.plain.test\r\n\
                  mx: clear.plain.test\r\nmax_age: 86400\r\n";
    let Some(host) = policy_host(&nodes, policy) else { return };
    start(&mut nodes, &knot, &knot, "auto");
    let waits = [
        ("m-bad.plain.test", "invalid peer certificate"),
        ("m-other.plain.test", "other.plain.test is not among the MX hosts of its domain's MTA-STS policy"),
        ("m-clear.plain.test", "TLS is required, but clear.plain.test does not offer it"),
    ];
    send(&nodes, &waits.map(|(domain, _)| domain));
    for (domain, reason) in waits {
        wait_deferred(&nodes, domain, reason);
    }
    assert!(!postfix.maillog().contains("status=sent"), "{}", postfix.maillog());
    assert_eq!(in_the_clear.count(), 0);
    for (domain, host, word) in [
        ("m-good.plain.test", "good.plain.test", "Verified"),
        ("m-none.plain.test", "other.plain.test", "Untrusted"),
        ("m-down.plain.test", "other.plain.test", "Untrusted"),
    ] {
        send(&nodes, &[domain]);
        wait_sent(&nodes, domain, host, Some(word));
    }
    // What is known counts on when the policy cannot be fetched any more.
    drop(host);
    send(&nodes, &["m-good.plain.test"]);
    wait_deferred(&nodes, "m-bad.plain.test", "invalid peer certificate");
    wait_for("both to go", Duration::from_secs(20), || {
        log(&nodes).matches("to=<r@m-good.plain.test>").count() >= 2
    });
    let all = log(&nodes);
    let verified = all.matches("Verified TLS connection established to good.plain.test").count();
    assert!(verified >= 1 && !all.contains("Untrusted TLS connection established to good.plain.test"));
}
