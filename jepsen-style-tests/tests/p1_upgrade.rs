//! Data directories of earlier formats, kept as they were written: a node of today opens them, and their mail is delivered.
//!
//! | archive | written by |
//! | --- | --- |
//! | `kept/feature-2.tar.gz` | feature level 2, the first that was kept |

use std::process::Command;
use std::time::Duration;

use jepsen_style_tests::checkers::judge;
use jepsen_style_tests::customer::Customer;
use jepsen_style_tests::history::{Outcome, Sent, digest};
use jepsen_style_tests::kept::{BASE_PORT, MESSAGES, archive, octets, tar};
use jepsen_style_tests::network;
use jepsen_style_tests::nodes::Nodes;
use jepsen_style_tests::tools::wait_for;

/// Every message that waits in a kept directory is there, and is delivered once its customer is back.
#[test]
fn p1_directories_of_earlier_formats_open_and_lose_nothing() {
    if !network::is_own("p1_directories_of_earlier_formats_open_and_lose_nothing") {
        return;
    }
    for feature in ["feature-2"] {
        let mut nodes = Nodes::prepare_at(BASE_PORT, |_, text| text);
        let aside = tempfile::tempdir().unwrap();
        tar("xzf", &archive(feature), aside.path(), &[]);
        let cluster = |file: &str| {
            let id =
                file.lines().skip_while(|line| *line != "[cluster]").find(|line| line.starts_with("id ="));
            id.unwrap().to_string()
        };
        let kept = cluster(&std::fs::read_to_string(aside.path().join("node-1.toml")).unwrap());
        for id in 1..=3 {
            let file = nodes.config(id);
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, text.replace(&cluster(&text), &kept)).unwrap();
            std::fs::create_dir_all(nodes.data(id).parent().unwrap()).unwrap();
            let moved = Command::new("mv")
                .arg(aside.path().join(format!("data/node-{id}")))
                .arg(nodes.data(id))
                .status();
            assert!(moved.is_ok_and(|status| status.success()));
            nodes.start(id);
        }
        nodes.wait_accepting();
        wait_for("the queue", Duration::from_secs(20), || nodes.queued() == Some(MESSAGES as u64 + 1));
        let routes = String::from_utf8_lossy(&nodes.ask(&["route", "list"]).stdout).into_owned();
        assert!(
            routes.contains("other.example  to mail.other.example:2525  tls opportunistic"),
            "{feature}: {routes}"
        );
        let customer = Customer::start();
        nodes.route("test.example", customer.address());
        nodes.wait_drained(Duration::from_secs(40));
        let history: Vec<Sent> = (0..=MESSAGES)
            .map(|n| {
                let (name, octets) = octets(n);
                let recipients = if n == MESSAGES { vec!["r1"] } else { vec!["r1", "r2"] };
                let recipients = recipients.into_iter().map(str::to_string).collect();
                let (bytes, digest) = (octets.len(), digest(&octets));
                Sent { name, recipients, node: 1, outcome: Outcome::Ok, id: None, bytes, digest }
            })
            .collect();
        judge(&history, &customer.taken()).assert_good();
        // All members are of today: what came since may be used, and survives another start of all.
        wait_for("the newest feature level", Duration::from_secs(20), || {
            nodes.status().is_some_and(|status| status["feature_level"].as_u64() >= Some(3))
        });
        let pin = "ab".repeat(32);
        let pinned =
            ["route", "set", "pinned.example", "--to", "192.0.2.7", "--tls", "verify", "--pin", &pin];
        assert!(nodes.ask(&pinned).status.success());
        std::thread::sleep(Duration::from_secs(1)); // a checkpoint
        for id in 1..=3 {
            nodes.kill(id);
            nodes.start(id);
        }
        nodes.wait_accepting();
        let routes = String::from_utf8_lossy(&nodes.ask(&["route", "list"]).stdout).into_owned();
        assert!(routes.contains(&pin) && routes.contains("mail.other.example:2525"), "{feature}: {routes}");
    }
}
