//! What nodes leave behind: their queue, their files, their mail logs.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::history::{Custody, What};
use crate::nemesis::CLOCK_STEPS;
use crate::nodes::Nodes;
use crate::record::Record;

/// Names of messages that are queued: the local parts of their senders. Nothing if nobody says.
pub(crate) fn left(nodes: &Nodes) -> Option<BTreeSet<String>> {
    let listed = nodes.ask(&["queue", "list", "--json"]);
    listed.status.success().then_some(())?;
    let lines = String::from_utf8_lossy(&listed.stdout).into_owned();
    let name = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        let sender = value["sender"].as_str()?;
        Some(sender.trim_start_matches('<').split('@').next()?.to_string())
    };
    Some(lines.lines().filter_map(name).collect())
}

/// Names of messages of which a line stands in a file of a directory.
pub(crate) fn canaries(dir: &Path, found: &mut BTreeSet<String>) -> std::io::Result<()> {
    for path in std::fs::read_dir(dir)?.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            canaries(&path, found)?;
        } else if let Ok(octets) = std::fs::read(&path) {
            names_in(&octets, found);
        }
    }
    Ok(())
}

/// What stands between the words that each line of a message has.
fn names_in(octets: &[u8], found: &mut BTreeSet<String>) {
    const BEFORE: &[u8] = b".canary-";
    const NAME_MAX: usize = 40;
    let mut rest = octets;
    while let Some(dot) = rest.iter().position(|octet| *octet == b'.') {
        rest = &rest[dot..];
        let Some(name) = rest.strip_prefix(BEFORE) else {
            rest = &rest[1..];
            continue;
        };
        let name = &name[..name.len().min(NAME_MAX)];
        let end = name.windows(6).position(|w| w == b"-line-");
        if let Some(end) = end.filter(|end| name[..*end].iter().all(u8::is_ascii_alphanumeric)) {
            found.insert(String::from_utf8_lossy(&name[..end]).into_owned());
        }
        rest = &rest[BEFORE.len()..];
    }
}

/// What the nodes wrote of custody and erasure.
pub(crate) fn read_maillogs(nodes: &Nodes, epoch: std::time::SystemTime, record: &Record) {
    let epoch = epoch.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
    let began = Instant::now() - Duration::from_millis(record.now());
    for id in 1..=3 {
        let mut wrong = None;
        for line in nodes.maillog(id).lines() {
            let Some((at, what)) = custody_line(id, line) else { continue };
            let (right, was_wrong) = unstepped(at - epoch, record.now());
            let right = began + Duration::from_millis(right);
            wrong = wrong.or(was_wrong.then_some(right));
            record.note_at(right, what);
        }
        wrong.into_iter().for_each(|at| record.note_at(at, What::WrongClock { node: id }));
    }
}

/// When a line was written, in milliseconds from the beginning of a run of this length, by the node's own wall clock, which may have been
/// set wrong; and whether it was.
fn unstepped(at: i64, length: u64) -> (u64, bool) {
    // Clocks differ by some milliseconds as it is.
    const SLACK: i64 = 60_000;
    let possible = -SLACK..length as i64 + SLACK;
    let steps = CLOCK_STEPS.iter().map(|hours| at - hours * 3_600_000);
    let right = std::iter::once(at).chain(steps).find(|at| possible.contains(at));
    (right.unwrap_or(at).max(0) as u64, right != Some(at))
}

/// What the nodes wrote to standard error of threads that panicked, of damage that is mended, and of snapshots.
pub(crate) fn read_stderr(nodes: &Nodes, epoch: std::time::SystemTime, record: &Record) {
    let epoch = epoch.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
    let began = Instant::now() - Duration::from_millis(record.now());
    for id in 1..=3 {
        // A panic is told without a time: it was when the line before was.
        let mut at = 0;
        for line in nodes.stderr(id).lines() {
            let time = line.split(' ').next().and_then(milliseconds);
            at = time.map_or(at, |time| unstepped(time - epoch, record.now()).0);
            if let Some(what) = told_by(id, line) {
                record.note_at(began + Duration::from_millis(at), what);
            }
        }
    }
}

fn told_by(node: u64, line: &str) -> Option<What> {
    const REPAIRED: [&str; 2] = [
        "a damaged body was fetched from another node",
        "this node has what it lost, and holds back no more",
    ];
    if line.contains("panicked at") {
        Some(What::Panicked { node, what: line.into() })
    } else if REPAIRED.iter().any(|words| line.contains(words)) {
        Some(What::Repaired { node })
    } else if line.contains("the bodies of a snapshot are here") {
        let bodies = line.split_whitespace().find_map(|word| word.strip_prefix("bodies=")?.parse().ok())?;
        Some(What::Snapshot { node, bodies })
    } else {
        None
    }
}

/// A line `TIME HOST NAME/SERVICE[N]: ID: durable, nodes=1+3, power=A+C, network=1+3, ...` or `... ID: erased, lag=0.8`; when it was
/// written, in milliseconds since 1970.
fn custody_line(node: u64, line: &str) -> Option<(i64, What)> {
    let (before, rest) = line.split_once("]: ")?;
    let at = milliseconds(before.split(' ').next()?)?;
    let (id, rest) = rest.split_once(": ")?;
    let (word, rest) = rest.split_once(", ")?;
    let value = |key: &str| rest.split(", ").find_map(|field| field.strip_prefix(key)?.strip_prefix('='));
    let labels = |key: &str| value(key).map(|all| all.split('+').map(str::to_string).collect::<Vec<_>>());
    let what = match word {
        "durable" => What::Custody(Custody {
            id: id.into(),
            nodes: labels("nodes")?.iter().filter_map(|node| node.parse().ok()).collect(),
            power: labels("power")?,
            network: labels("network")?,
        }),
        "erased" => {
            let lag = (value("lag")?.parse::<f64>().ok()? * 1000.0) as u64;
            What::Erased { id: id.into(), node, lag }
        }
        _ => return None,
    };
    Some((at, what))
}

/// A time as `2026-01-31T12:34:56.789+02:00` or `2026-01-31T10:34:56.789012Z`, since 1970.
fn milliseconds(text: &str) -> Option<i64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<i64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second, milli) = (number(11, 13)?, number(14, 16)?, number(17, 19)?, number(20, 23)?);
    let zone = 20 + text[20..].bytes().take_while(u8::is_ascii_digit).count();
    let sign = if text.get(zone..=zone)? == "-" { -1 } else { 1 };
    let ahead = match text.get(zone..=zone)? {
        "Z" => 0,
        _ => sign * (number(zone + 1, zone + 3)? * 60 + number(zone + 4, zone + 6)?),
    };
    // Days of the proleptic Gregorian calendar: years that begin in March, so that the leap day is the last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day - 1;
    let days = days - 719_468;
    Some((((days * 24 + hour) * 60 + minute - ahead) * 60 + second) * 1000 + milli)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_mail_log_tell_custody() {
        let line = "2026-03-01T01:00:00.250+01:00 node-1 holdfast/cluster[7]: 4F2A: durable, nodes=1+3, power=A+C, network=1+3, index=9";
        let Some((at, What::Custody(custody))) = custody_line(1, line) else { panic!("{line}") };
        assert_eq!(at, 1_772_323_200_250);
        assert_eq!((custody.id.as_str(), custody.nodes, custody.power.len()), ("4F2A", vec![1, 3], 2));
        let line = "1970-01-01T00:00:01.000Z node-2 holdfast/erase[7]: 4F2A: erased, lag=0.8";
        let told = custody_line(2, line);
        assert!(matches!(told, Some((1000, What::Erased { node: 2, lag: 800, .. }))), "{told:?}");
        assert!(
            custody_line(1, "2026-03-01T01:00:00.250+01:00 node-1 holdfast/qmgr[7]: 4F2A: removed").is_none()
        );
    }

    #[test]
    fn times_are_told_to_the_millisecond_and_finer() {
        let same =
            ["1970-01-01T01:00:00.250+01:00", "1970-01-01T00:00:00.250Z", "1970-01-01T00:00:00.250999Z"];
        assert!(same.iter().all(|text| milliseconds(text) == Some(250)));
        assert_eq!(milliseconds("1969-12-31T23:00:00.000-01:00"), Some(0));
        assert!(
            ["thread", "1970-01-01T00:00:00.250", "1970-01-01"]
                .iter()
                .all(|text| milliseconds(text).is_none())
        );
    }

    #[test]
    fn standard_error_tells_what_became_of_damage() {
        let fetched = "2026-03-01T00:00:00Z  WARN holdfast_cluster::repair: a damaged body was fetched from another node index=7";
        assert!(matches!(told_by(2, fetched), Some(What::Repaired { node: 2 })));
        let came = "2026-03-01T00:00:00Z  INFO the bodies of a snapshot are here last=9 rows=4 bodies=3 fetched=0 bytes=0";
        assert!(matches!(told_by(1, came), Some(What::Snapshot { node: 1, bodies: 3 })));
        assert!(matches!(told_by(1, "thread 'x' panicked at y"), Some(What::Panicked { .. })));
        assert!(told_by(1, "INFO this node leads").is_none());
    }

    #[test]
    fn a_clock_that_was_set_wrong_is_understood() {
        for hours in [0, 20 * 24, -20] {
            let told = unstepped(12_345 + hours * 3_600_000, 60_000);
            assert_eq!(told, (12_345, hours != 0), "{hours} hours");
        }
        assert_eq!(unstepped(-3, 60_000), (0, false));
    }

    #[test]
    fn names_are_found_wherever_a_line_of_them_stands() {
        let mut found = BTreeSet::new();
        names_in(b"..canary-a1-line-000001-abc\r\n.canary-\0\0.canary-b2-line-", &mut found);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["a1", "b2"]);
    }
}
