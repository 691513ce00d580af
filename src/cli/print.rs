//! Printing for people and for programs.

use std::io::Write;

use holdfast_storage::log::dump::Line;
use serde_json::{Value, json};

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

pub(super) fn status(status: &Value, json: bool) {
    if json {
        println!("{status}");
        return;
    }
    let field = |name: &str| text(&status[name]);
    println!("cluster {}  leader {}  term {}", field("cluster"), field("leader"), field("term"));
    match status["why_not"].as_str() {
        None => println!("accepting mail"),
        Some(why) => println!("NOT accepting mail: {why}"),
    }
    if status["stale"] == true {
        println!("stale: this node knows of no quorum; what follows is its own view");
    }
    for warning in status["warnings"].as_array().into_iter().flatten() {
        println!("warning: {}", text(warning));
    }
    println!(
        "{:>4} {:<12} {:<8} {:<6} {:<8} {:>12} {:>12} {:>10} {:>10}  delivers from",
        "node", "role", "healthy", "power", "network", "last index", "matched", "free", "scrubbed"
    );
    for n in status["nodes"].as_array().into_iter().flatten() {
        let egress: Vec<String> = n["egress"].as_array().into_iter().flatten().map(text).collect();
        let free = n["disk_free_bytes"].as_u64().map_or("-".into(), |b| format!("{} MiB", b >> 20));
        println!(
            "{:>4} {:<12} {:<8} {:<6} {:<8} {:>12} {:>12} {:>10} {:>10}  {}",
            text(&n["id"]),
            text(&n["role"]),
            if n["healthy"] == true { "yes" } else { "NO" },
            text(&n["placement"]["power"]),
            text(&n["placement"]["network"]),
            text(&n["last_index"]),
            text(&n["matched_index"]),
            free,
            scrubbed(&n["scrub"]),
            egress.join(", ")
        );
        if n["scrub"]["damaged"].as_u64() > Some(0) {
            let (damaged, to_mend) = (text(&n["scrub"]["damaged"]), text(&n["scrub"]["to_mend"]));
            println!("     damage was found in {damaged} places; {to_mend} bodies are still to be fetched");
        }
        if let Some(key) = n["at_rest"]["key"].as_str() {
            let others = match n["at_rest"]["other_key_bytes"].as_u64() {
                Some(bytes) if bytes > 0 => format!("; {} MiB are not yet", bytes >> 20),
                _ => String::new(),
            };
            println!("     sealed with the at-rest key {key}{others}");
        }
    }
    let q = &status["queue"];
    println!(
        "queue: {} messages, {} bytes, {} deferred, {} held, oldest {} s",
        text(&q["messages"]),
        text(&q["bytes"]),
        text(&q["deferred"]),
        text(&q["held"]),
        text(&q["oldest_age_s"])
    );
}

/// How often all was read again, and how much of the next time.
fn scrubbed(scrub: &Value) -> String {
    match (scrub["passes"].as_u64(), scrub["percent"].as_u64()) {
        (Some(passes), Some(percent)) => format!("{passes}x+{percent}%"),
        _ => "-".into(),
    }
}

pub(super) fn route(route: &Value, json: bool) {
    if json {
        println!("{route}");
        return;
    }
    if route["held"] == true {
        println!("{}  removed, its mail is held", text(&route["domain"]));
        return;
    }
    let to: Vec<String> = route["to"].as_array().into_iter().flatten().map(text).collect();
    let to = if to.is_empty() { "MX".into() } else { to.join(",") };
    let lifetime = route["lifetime_s"].as_u64().map_or(String::new(), |s| format!("  lifetime {s}s"));
    let floor = if route["tls_min"] == "1.3" { ", 1.3 or later" } else { "" };
    let pins: Vec<String> = route["pins"].as_array().into_iter().flatten().map(text).collect();
    let pins = if pins.is_empty() { String::new() } else { format!(" by key {}", pins.join(",")) };
    println!("{}  to {to}  tls {}{floor}{pins}{lifetime}", text(&route["domain"]), text(&route["tls"]));
}

pub(super) fn removed_route(answer: &[Value], json: bool) {
    let Some(answer) = answer.first() else { return };
    if json {
        println!("{answer}");
        return;
    }
    for (field, what) in [("held", "messages are held"), ("bounced", "recipients returned to their senders")]
    {
        if answer[field].as_u64() > Some(0) {
            println!("{} {what}", answer[field]);
        }
    }
}

pub(super) fn message(message: &Value, json: bool) {
    if json {
        println!("{message}");
        return;
    }
    println!(
        "{}  {} bytes  {} s old  {}  from <{}>",
        text(&message["id"]),
        text(&message["size"]),
        text(&message["age_s"]),
        text(&message["state"]),
        text(&message["sender"])
    );
    for r in message["recipients"].as_array().into_iter().flatten() {
        let reply = r["last_reply"].as_str().filter(|s| !s.is_empty());
        let reply = reply.map_or(String::new(), |s| format!("  ({s})"));
        println!("    <{}>  {}{reply}", text(&r["address"]), text(&r["state"]));
    }
}

pub(super) fn count(answer: &[Value], what: &str, json: bool) {
    let Some(answer) = answer.first() else { return };
    match json {
        true => println!("{answer}"),
        false => println!("{} {what}", text(&answer[what])),
    }
    if !json && answer["in_transit"].as_u64() > Some(0) {
        eprintln!("{} are being delivered at this moment, and their results count", answer["in_transit"]);
    }
}

/// How far a new member is, or that it is one.
pub(super) fn joining(item: &Value, json: bool) {
    match item["added"].as_u64() {
        _ if json => println!("{item}"),
        Some(id) => println!("node {id} is a member; name it in the peers of every node file"),
        None => eprintln!("node {}: entry {} of {}", text(&item["id"]), text(&item["at"]), text(&item["of"])),
    }
}

/// That a node is no member any more.
pub(super) fn left(answer: &[Value], json: bool) {
    let Some(answer) = answer.first() else { return };
    match json {
        true => println!("{answer}"),
        false => println!(
            "node {} is no member any more. Stop it, wipe its disk: mail that it held is still there; and take it out of the peers of \
             every node file",
            text(&answer["removed"])
        ),
    }
}

/// Who leads now.
pub(super) fn leader(answer: &[Value], json: bool) {
    let Some(answer) = answer.first() else { return };
    match json {
        true => println!("{answer}"),
        false => println!("node {} leads", text(&answer["leader"])),
    }
}

pub(super) fn record(out: &mut impl Write, line: &Line, as_json: bool) -> std::io::Result<()> {
    match line {
        Line::Record { segment: (segment, file), offset, kind, at, bytes: (head, body_bytes), body } => {
            let (kind, body) = (format!("{kind:?}"), format!("{body:?}").to_lowercase());
            match as_json {
                true => writeln!(
                    out,
                    "{}",
                    json!({
                        "segment": segment.0, "file": file, "offset": offset, "kind": kind, "term": at.term.0,
                        "index": at.index.0, "head_bytes": head, "body_bytes": body_bytes, "body": body,
                    })
                ),
                false => writeln!(
                    out,
                    "{:>6} {offset:>10} {kind:<13} term {:<4} index {:<9} head {head:<7} body {body_bytes:<7} {body}",
                    segment.0, at.term.0, at.index.0
                ),
            }
        }
        Line::Hole { segment: (segment, file), from, to, why } => match as_json {
            true => writeln!(
                out,
                "{}",
                json!({ "segment": segment.0, "file": file, "offset": from, "kind": "Hole", "to": to, "why": why })
            ),
            false => writeln!(out, "{:>6} {from:>10} HOLE          to {to}: {why}", segment.0),
        },
    }
}

pub(super) fn confirm(question: &str) -> bool {
    eprint!("{question} [y/N] ");
    if std::io::stderr().flush().is_err() {
        return false;
    }
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}
