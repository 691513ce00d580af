//! Pure. What a node tells a monitoring system: the text that Prometheus scrapes (exposition format 0.0.4), of this node's own state.
//! It is served at `/metrics` on the operators' port to whoever shows a certificate of their authority.

use std::fmt::Write;

use holdfast_cluster::NodeReport;

use super::api::About;
use crate::pki::Certificate;
use crate::queue::Totals;

/// What is told.
pub struct Sample<'a> {
    /// Why it takes no mail, if so.
    pub why_not: Option<&'a str>,
    /// The node, as the cluster layer sees it.
    pub node: &'a NodeReport,
    /// The node, as its other layers see it.
    pub about: &'a About,
    /// The queue, which is the same on all nodes but for what they have still to apply.
    pub totals: Totals,
    /// Age of the oldest message, ms.
    pub oldest_ms: u64,
    /// Messages that are held, and how many of these count as deferred; only the leader counts them.
    pub held: Option<(usize, usize)>,
    /// Its certificates.
    pub certificates: &'a [Certificate],
}

/// A line's labels and value.
type Series = (String, f64);

fn family(out: &mut String, name: &str, help: &str, series: &[Series]) {
    if series.is_empty() {
        return;
    }
    // Writing to a String does not fail.
    let _ = writeln!(out, "# HELP holdfast_{name} {help}\n# TYPE holdfast_{name} gauge");
    for (labels, value) in series {
        let _ = writeln!(out, "holdfast_{name}{labels} {value}");
    }
}

/// A label's value (exposition format: backslash, quote and line end are escaped).
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Sample<'_> {
    /// The text.
    pub fn text(&self) -> String {
        let one = |value: f64| vec![(String::new(), value)];
        let flag = |value: bool| one(f64::from(u8::from(value)));
        let (node, totals) = (self.node, &self.totals);
        let tried = self.held.map_or(0, |(_, tried)| tried).min(totals.deferred);
        let mut out = String::new();
        let mut tell = |name: &str, help: &str, series: Vec<Series>| family(&mut out, name, help, &series);
        tell("accepting", "Whether this node takes mail.", flag(self.why_not.is_none()));
        tell("leading", "Whether this node leads.", flag(node.role == "leader"));
        tell("has_leader", "Whether this node knows a leader.", flag(node.leader.is_some()));
        tell("term", "The term of the cluster.", one(node.term as f64));
        let index = |index: Option<u64>| vec![(String::new(), index.unwrap_or(0) as f64)];
        tell("log_last_index", "Last index of this node's log.", index(node.last_index));
        tell("log_applied_index", "Last index that this node applied.", index(node.applied_index));
        tell("queue_messages", "Messages in the queue.", one(totals.messages as f64));
        tell("queue_bytes", "Octets of the messages in the queue.", one(totals.bytes as f64));
        tell(
            "queue_deferred_messages",
            "Messages that were tried and wait.",
            one((totals.deferred - tried) as f64),
        );
        let held = self.held.map(|(held, _)| (String::new(), held as f64));
        tell(
            "queue_held_messages",
            "Messages with a recipient that is held. Told by the leader.",
            held.into_iter().collect(),
        );
        tell("queue_oldest_age_seconds", "Age of the oldest message.", one(self.oldest_ms as f64 / 1000.0));
        tell(
            "disk_free_bytes",
            "Free octets on the disk of the data directory.",
            one(node.disk_free_bytes as f64),
        );
        tell("log_bytes", "Octets of this node's segments.", one(node.held_bytes as f64));
        tell(
            "log_sealed_bytes",
            "Octets of this node's segments but for the one being written.",
            one(node.sealed_bytes as f64),
        );
        tell(
            "log_sealed_live_bytes",
            "What of log_sealed_bytes is needed.",
            one(node.sealed_live_bytes as f64),
        );
        tell("erase_backlog_bodies", "Bodies that wait to be overwritten.", one(node.erase_backlog as f64));
        let scrub = self.about.scrub.clone().unwrap_or_default();
        tell(
            "scrub_passes",
            "Times that all that is held was read since the start.",
            one(scrub.passes as f64),
        );
        tell("scrub_damaged", "Damaged places found since the start.", one(scrub.damaged as f64));
        tell(
            "scrub_to_mend_bodies",
            "Bodies still to be fetched from other nodes.",
            one(scrub.to_mend as f64),
        );
        let expiry = |c: &Certificate| {
            let file = quoted(&c.path.display().to_string());
            (format!("{{setting=\"{}\",file=\"{file}\"}}", quoted(&c.setting)), c.expires_unix_s as f64)
        };
        tell(
            "certificate_expiry_timestamp_seconds",
            "When a certificate ends, Unix time.",
            self.certificates.iter().map(expiry).collect(),
        );
        out
    }
}

/// The answer to an HTTP request, of which this is the first line.
pub fn answer(request: &str, text: impl FnOnce() -> String) -> String {
    let (status, body) = match request.split(' ').nth(1).map(|target| target.split('?').next()) {
        Some(Some("/metrics")) => ("200 OK", text()),
        _ => ("404 Not Found", "there is /metrics, and nothing else\n".into()),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let node =
            NodeReport { role: "leader".into(), leader: Some(1), last_index: Some(7), ..Default::default() };
        let certificates = [Certificate {
            setting: "smtp.tls_cert".into(),
            path: "a\"b\\c.crt".into(),
            expires_unix_s: 1_800_000_000,
        }];
        let sample = Sample {
            why_not: Some("no room"),
            node: &node,
            about: &About::default(),
            totals: Totals { messages: 3, bytes: 4096, deferred: 2 },
            oldest_ms: 1500,
            held: Some((1, 1)),
            certificates: &certificates,
        };
        let text = sample.text();
        for line in [
            "holdfast_accepting 0",
            "holdfast_leading 1",
            "holdfast_queue_messages 3",
            "holdfast_queue_deferred_messages 1",
            "holdfast_queue_held_messages 1",
            "holdfast_queue_oldest_age_seconds 1.5",
            r#"holdfast_certificate_expiry_timestamp_seconds{setting="smtp.tls_cert",file="a\"b\\c.crt"} 1800000000"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        // Every value has a name that was described just before.
        let mut family = String::new();
        for line in text.lines() {
            match line.strip_prefix("# TYPE ") {
                Some(rest) => family = rest.strip_suffix(" gauge").unwrap().into(),
                None => assert!(line.starts_with("# HELP ") || line.starts_with(&family), "{line}"),
            }
        }
        assert!(!Sample { held: None, ..sample }.text().contains("held_messages"));
    }

    #[test]
    fn another_path_is_not_found() {
        let get = |line: &str| answer(line, || "x".into());
        assert!(get("GET /metrics HTTP/1.1\r\n").starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(
            get("GET /metrics?a=b HTTP/1.1\r\n").ends_with("Content-Length: 1\r\nConnection: close\r\n\r\nx")
        );
        assert!(get("GET / HTTP/1.1\r\n").starts_with("HTTP/1.1 404 "));
        assert!(get("GET").starts_with("HTTP/1.1 404 "));
    }
}
