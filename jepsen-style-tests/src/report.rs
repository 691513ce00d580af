//! The report of a run: one HTML file that needs nothing else. The verdict first, then the plots, then how to do it again.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::checkers;
use crate::folder::Options;
use crate::history::{History, Outcome, What};
use crate::plot::{Draw, Plot, Scale, Series, Shade, escape};
use crate::verdict::{Answer, Judgement};

/// Offences of each promise that are listed.
const LISTED_MAX: usize = 50;

const STYLE: &str = "
:root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff }
body { max-width: 1000px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.verdict { padding: .9rem 1.1rem; border-radius: 6px; border-left: 8px solid }
.valid { background: #e8f5ec; border-color: #23834a } .invalid { background: #fdeaea; border-color: #c22b2b }
.unknown { background: #fdf4e0; border-color: #c2850b }
.verdict p { margin: .2rem 0 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #e3e7ec; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.ok { color: #23834a } .bad { color: #c22b2b; font-weight: 600 } .open { color: #a06a00; font-weight: 600 }
figure { margin: 1.1rem 0 0 } figcaption { font-weight: 600; display: flex; justify-content: space-between; flex-wrap: wrap }
svg { width: 100%; height: auto; display: block }
.keys { font-weight: 400 } .key { margin-left: 1rem } .key::before { content: '\\25CF'; margin-right: .3rem }
.key.c1::before { color: #2b6cb0 } .key.c2::before { color: #d0452c } .key.c3::before { color: #23834a } .key.c4::before { color: #8a5cc2 } .key.c5::before { color: #c2850b }
circle.c1 { fill: #2b6cb0 } circle.c2 { fill: #d0452c } circle.c5 { fill: #c2850b }
path { fill: none; stroke-width: 1.6 } path.c1 { stroke: #2b6cb0 } path.c2 { stroke: #d0452c } path.c3 { stroke: #23834a } path.c4 { stroke: #8a5cc2 } path.c5 { stroke: #c2850b }
.shade { fill: #f3c9a5; opacity: .45 } .grid { stroke: #e3e7ec } .axis { font-size: 11px; fill: #5a6675 } .label { font-size: 10px; fill: #8a4b12 }
code, pre { font: 13px/1.4 ui-monospace, monospace; background: #f4f6f8; border-radius: 4px } pre { padding: .7rem; overflow-x: auto; white-space: pre-wrap } code { padding: .1rem .3rem }
";

/// The whole page.
pub fn page(options: &Options, history: &History, judgement: &Judgement) -> String {
    let mut page = String::new();
    let out = &mut page;
    let (class, words) = match judgement.answer {
        Answer::Valid => ("valid", "Valid: no promise was broken"),
        Answer::Invalid => ("invalid", "Invalid: a promise was broken"),
        Answer::Unknown => {
            ("unknown", "Unknown: no promise was seen broken, but not all happened that had to")
        }
    };
    let nemeses = if options.nemeses.is_empty() { "none".to_string() } else { options.nemeses.join(", ") };
    put(
        out,
        format_args!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>Holdfast: {class}</title><style>{STYLE}</style><body><h1>Three nodes under test</h1>\
             <p>Workload <b>{}</b> for {} s; broken on purpose: {}.</p>\
             <div class=\"verdict {class}\"><p><b>{words}.</b></p><p>{}</p></div>",
            escape(&options.workload),
            options.seconds,
            escape(&nemeses),
            summary(judgement)
        ),
    );
    promises(out, judgement);
    offences(out, judgement);
    conditions(out, judgement);
    plots(out, history);
    faults(out, history);
    put(
        out,
        format_args!(
            "<h2>Again</h2><pre>{}</pre><p>The same seed makes the same choices; processes, clocks and the network are their \
             own. This run is judged again from its folder with <code>cargo run --release -p jepsen-style-tests -- judge \
             FOLDER</code>.</p></body></html>\n",
            escape(&options.command())
        ),
    );
    page
}

fn put(out: &mut String, what: std::fmt::Arguments<'_>) {
    out.write_fmt(what).expect("writing to a String does not fail");
}

/// The counts in a sentence or two.
pub fn summary(j: &Judgement) -> String {
    let mut text = format!(
        "{} messages acknowledged, {} refused, {} without a reply; {} copies taken, {} of them repeated; {} notices; {} faults.",
        j.acknowledged, j.refused, j.unknown, j.copies, j.repeated, j.notices, j.faults
    );
    if let (Some(p50), Some(max)) = (part(&j.until_next_250, 50), j.until_next_250.last()) {
        let kills = j.until_next_250.len();
        put(
            &mut text,
            format_args!(
                " From a leader's death to the next 250: half within {p50} ms, all within {max} ms ({kills} deaths)."
            ),
        );
    }
    text
}

/// The value below which so many of a hundred lie, of a sorted list.
pub fn part(sorted: &[u64], percent: usize) -> Option<u64> {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied()
}

fn promises(out: &mut String, judgement: &Judgement) {
    put(out, format_args!("<h2>Promises</h2><table>"));
    for (name, about, _) in checkers::ALL {
        let count = judgement.offences.iter().filter(|o| o.promise == name).count();
        let (class, word) =
            if count == 0 { ("ok", "kept".to_string()) } else { ("bad", format!("broken {count} times")) };
        put(
            out,
            format_args!(
                "<tr><td><b>{name}</b></td><td>{}</td><td class=\"{class}\">{word}</td></tr>",
                escape(about)
            ),
        );
    }
    put(out, format_args!("</table>"));
}

fn offences(out: &mut String, judgement: &Judgement) {
    if judgement.offences.is_empty() {
        return;
    }
    put(
        out,
        format_args!(
            "<h2>What was broken</h2><table><tr><th></th><th>at</th><th>message</th><th>what</th></tr>"
        ),
    );
    let mut listed: BTreeMap<&str, usize> = BTreeMap::new();
    for offence in &judgement.offences {
        let count = listed.entry(&offence.promise).or_default();
        *count += 1;
        if *count <= LISTED_MAX {
            let (at, whom, what) = (offence.at as f64 / 1000.0, escape(&offence.whom), escape(&offence.what));
            let promise = &offence.promise;
            put(
                out,
                format_args!(
                    "<tr><td><b>{promise}</b></td><td class=\"n\">{at:.1} s</td><td>{whom}</td><td>{what}</td></tr>"
                ),
            );
        }
    }
    put(out, format_args!("</table>"));
    for (promise, count) in listed.into_iter().filter(|(_, count)| *count > LISTED_MAX) {
        put(out, format_args!("<p>{promise}: {} more are in the history.</p>", count - LISTED_MAX));
    }
}

fn conditions(out: &mut String, judgement: &Judgement) {
    put(out, format_args!("<h2>What had to happen, so that the verdict means something</h2><table>"));
    for condition in &judgement.conditions {
        let (class, word) = if condition.is_met { ("ok", "yes") } else { ("open", "no") };
        put(
            out,
            format_args!("<tr><td>{}</td><td class=\"{class}\">{word}</td></tr>", escape(&condition.what)),
        );
    }
    put(out, format_args!("</table>"));
}

fn faults(out: &mut String, history: &History) {
    let windows = history.windows();
    if windows.is_empty() {
        return;
    }
    put(
        out,
        format_args!(
            "<h2>What was broken on purpose</h2><table><tr><th>from</th><th>until well</th><th></th><th></th></tr>"
        ),
    );
    for window in windows {
        let (from, took) = (window.from as f64 / 1000.0, (window.to - window.from) as f64 / 1000.0);
        let (nemesis, what) = (escape(&window.fault.nemesis), escape(&window.fault.what));
        put(
            out,
            format_args!(
                "<tr><td class=\"n\">{from:.1} s</td><td class=\"n\">{took:.1} s</td><td>{nemesis}</td><td>{what}</td></tr>"
            ),
        );
    }
    put(out, format_args!("</table>"));
}

fn plots(out: &mut String, history: &History) {
    let end = history.events.last().map_or(0, |event| event.at);
    let windows = history.windows().into_iter();
    let shades: Vec<Shade> =
        windows.map(|w| Shade { span: (w.from, w.to), label: w.fault.nemesis }).collect();
    put(
        out,
        format_args!(
            "<h2>The course of it</h2><p>Shaded: from when something was broken until all nodes were well again.</p>"
        ),
    );
    let all = [
        latency(history),
        rates(history),
        deliveries(history),
        leader(history),
        queue(history),
        memory(history),
    ];
    for (n, plot) in all.iter().enumerate() {
        out.push_str(&plot.draw(end, &shades, n == 0));
    }
}

fn series(label: &str, class: &'static str, draw: Draw, points: Vec<(u64, f64)>) -> Series {
    Series { label: label.into(), class, draw, points }
}

/// Milliseconds from the final dot to the reply, with the median and the worst hundredth of each second.
fn latency(history: &History) -> Plot {
    let mut raw = Vec::new();
    let mut seconds: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for event in &history.events {
        if let What::Sent { dot: Some(dot), sent, .. } = &event.what
            && sent.outcome == Outcome::Ok
        {
            let took = event.at - dot;
            raw.push((event.at, took.max(1) as f64));
            seconds.entry(event.at / 1000).or_default().push(took);
        }
    }
    let mut lines = [Vec::new(), Vec::new()];
    for (second, mut all) in seconds {
        all.sort_unstable();
        for (line, percent) in lines.iter_mut().zip([50, 99]) {
            line.push((second * 1000 + 500, part(&all, percent).unwrap_or(0).max(1) as f64));
        }
    }
    let [p50, p99] = lines;
    Plot {
        title: "Final dot to 250, milliseconds".into(),
        scale: Scale::Logarithmic(1.0),
        series: vec![
            series("each", "c1", Draw::Dots, raw),
            series("half", "c3", Draw::Line, p50),
            series("99 of 100", "c2", Draw::Line, p99),
        ],
    }
}

/// Counts what happens in each second.
fn per_second(end: u64, times: impl Iterator<Item = u64>) -> Vec<(u64, f64)> {
    let mut counts = vec![0.0; end as usize / 1000 + 1];
    times.for_each(|at| counts[at as usize / 1000] += 1.0);
    counts.into_iter().enumerate().map(|(n, count)| (n as u64 * 1000 + 500, count)).collect()
}

fn rates(history: &History) -> Plot {
    let end = history.events.last().map_or(0, |event| event.at);
    let of = |wanted: fn(&Outcome) -> bool| {
        per_second(end, history.sent().filter(|(_, s)| wanted(&s.outcome)).map(|(at, _)| at))
    };
    Plot {
        title: "Messages a second".into(),
        scale: Scale::Linear,
        series: vec![
            series("acknowledged", "c3", Draw::Line, of(|o| *o == Outcome::Ok)),
            series("refused or cut off", "c2", Draw::Line, of(|o| matches!(o, Outcome::Fail(_)))),
            series("without a reply", "c5", Draw::Line, of(|o| *o == Outcome::Unknown)),
        ],
    }
}

fn deliveries(history: &History) -> Plot {
    let end = history.events.last().map_or(0, |event| event.at);
    let mut seen = std::collections::BTreeSet::new();
    let mut again = Vec::new();
    for (at, taken) in history.taken() {
        if !seen.insert((&taken.name, &taken.recipient)) {
            again.push(at);
        }
    }
    Plot {
        title: "Copies taken by customers, a second".into(),
        scale: Scale::Linear,
        series: vec![
            series("all", "c1", Draw::Line, per_second(end, history.taken().map(|(at, _)| at))),
            series("repeated", "c2", Draw::Line, per_second(end, again.into_iter())),
        ],
    }
}

fn samples(history: &History) -> impl Iterator<Item = (u64, &crate::history::Sample)> {
    history.events.iter().filter_map(|event| match &event.what {
        What::Sample(sample) => Some((event.at, sample)),
        _ => None,
    })
}

fn leader(history: &History) -> Plot {
    let points = samples(history).filter_map(|(at, s)| Some((at, s.leader? as f64))).collect();
    Plot {
        title: "Who leads, as any node says".into(),
        scale: Scale::Names(3),
        series: vec![series("node", "c4", Draw::Steps, points)],
    }
}

fn queue(history: &History) -> Plot {
    let queued = samples(history).filter_map(|(at, s)| Some((at, s.queued? as f64))).collect();
    let dead = samples(history).filter_map(|(at, s)| Some((at, s.erase_backlog? as f64))).collect();
    Plot {
        title: "Messages".into(),
        scale: Scale::Linear,
        series: vec![
            series("queued", "c1", Draw::Line, queued),
            series("dead and not yet overwritten", "c5", Draw::Line, dead),
        ],
    }
}

fn memory(history: &History) -> Plot {
    let of = |node: u64| {
        let octets =
            |s: &crate::history::Sample| s.resident.iter().find(|(id, _)| *id == node).map(|(_, o)| *o);
        let points = samples(history).filter_map(|(at, s)| Some((at, (octets(s)? >> 20) as f64)));
        points.filter(|(_, mib)| *mib > 0.0).collect::<Vec<_>>()
    };
    Plot {
        title: "Memory of each node, MiB".into(),
        scale: Scale::Linear,
        series: vec![
            series("node 1", "c1", Draw::Line, of(1)),
            series("node 2", "c3", Draw::Line, of(2)),
            series("node 3", "c4", Draw::Line, of(3)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::forged;
    use crate::verdict::judge;

    #[test]
    fn a_report_names_the_verdict_and_what_was_broken() {
        let nemeses = vec!["kill-leader".into()];
        let options = Options { workload: "steady".into(), nemeses, seconds: 9, seed: 4, loopback: true };
        let history = forged::history([
            (10, forged::fault(1, true, &[1])),
            (20, forged::sent("gone", Outcome::Ok, &["r"])),
            (30, forged::fault(1, false, &[1])),
        ]);
        let page = page(&options, &history, &judge(&history, &[]));
        assert!(page.contains("Invalid") && page.contains("gone/r") && page.contains("--seed 4 --loopback"));
        assert_eq!(page.matches("<svg").count(), 6);
    }

    #[test]
    fn parts_of_a_list() {
        let all: Vec<u64> = (1..=200).collect();
        assert_eq!([1, 50, 99, 100].map(|p| part(&all, p)), [Some(2), Some(100), Some(198), Some(200)]);
        assert_eq!((part(&[], 50), part(&[7], 99)), (None, Some(7)));
    }
}
