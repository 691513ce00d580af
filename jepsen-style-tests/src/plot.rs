//! Plots as SVG, one below the other over the same time, with the spans in which something was broken shaded.

use std::fmt::Write;

/// Width of a plot with its margins, in pixels.
const WIDTH: f64 = 960.0;
/// Height of the plotted area.
const HEIGHT: f64 = 150.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;
/// Points of one series that are drawn at the most; of more than that every so many.
const POINTS_MAX: usize = 6_000;

/// A span that is shaded.
#[derive(Clone, Debug)]
pub struct Shade {
    /// From when to when, in milliseconds.
    pub span: (u64, u64),
    /// What it was.
    pub label: String,
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// A dot for each.
    Dots,
    /// A line through them.
    Line,
    /// A line that stays where it is until the next.
    Steps,
}

/// Values over time.
#[derive(Clone, Debug)]
pub struct Series {
    /// What they are.
    pub label: String,
    /// The name of a colour class of the page.
    pub class: &'static str,
    /// How they are drawn.
    pub draw: Draw,
    /// Time in milliseconds and value.
    pub points: Vec<(u64, f64)>,
}

/// How values become heights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// From 0 to the largest.
    Linear,
    /// By powers of ten, from this one on.
    Logarithmic(f64),
    /// Whole numbers from 1 to this, each named on the axis.
    Names(u32),
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Plot {
    /// What it shows, with the unit.
    pub title: String,
    /// How heights are chosen.
    pub scale: Scale,
    /// What is drawn.
    pub series: Vec<Series>,
}

impl Plot {
    /// The plot as SVG within HTML, over `end` milliseconds.
    pub fn draw(&self, end: u64, shades: &[Shade], labels_shades: bool) -> String {
        let end = end.max(1) as f64;
        let x = |at: u64| LEFT + at as f64 / end * (WIDTH - LEFT - RIGHT);
        let largest = self.series.iter().flat_map(|s| &s.points).map(|(_, value)| *value).fold(0.0, f64::max);
        let (low, high, ticks) = self.axis(largest);
        let height = |value: f64| match self.scale {
            Scale::Logarithmic(_) => (value.max(low).log10() - low.log10()) / (high.log10() - low.log10()),
            _ => (value - low) / (high - low),
        };
        let y = |value: f64| TOP + HEIGHT * (1.0 - height(value).clamp(0.0, 1.0));
        let mut svg = String::new();
        let out = &mut svg;
        let all = TOP + HEIGHT + BOTTOM;
        put(out, format_args!(r#"<figure><figcaption>{}<span class="keys">"#, escape(&self.title)));
        for series in &self.series {
            put(out, format_args!(r#"<span class="key {}">{}</span>"#, series.class, escape(&series.label)));
        }
        put(out, format_args!(r#"</span></figcaption><svg viewBox="0 0 {WIDTH} {all}" role="img">"#));
        for shade in shades {
            let (from, to) = (x(shade.span.0), x(shade.span.1));
            let width = (to - from).max(1.0);
            put(
                out,
                format_args!(
                    r#"<rect class="shade" x="{from:.1}" y="{TOP}" width="{width:.1}" height="{HEIGHT}"><title>{}</title></rect>"#,
                    escape(&shade.label)
                ),
            );
        }
        for tick in ticks {
            let (at, text) = (y(tick), name(tick));
            put(
                out,
                format_args!(
                    r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{at:.1}" y2="{at:.1}"/>"#,
                    WIDTH - RIGHT
                ),
            );
            put(
                out,
                format_args!(
                    r#"<text class="axis" x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#,
                    LEFT - 6.0,
                    at + 4.0
                ),
            );
        }
        let step = step(end / 1000.0);
        let mut second = 0.0;
        while second * 1000.0 <= end {
            let at = x((second * 1000.0) as u64);
            put(
                out,
                format_args!(
                    r#"<text class="axis" x="{at:.1}" y="{:.1}" text-anchor="middle">{second:.0} s</text>"#,
                    all - 8.0
                ),
            );
            second += step;
        }
        for series in &self.series {
            let every = series.points.len().div_ceil(POINTS_MAX).max(1);
            let kept = series.points.iter().step_by(every);
            match series.draw {
                Draw::Dots => kept.for_each(|(at, value)| {
                    put(
                        out,
                        format_args!(
                            r#"<circle class="{}" cx="{:.1}" cy="{:.1}" r="1.3"/>"#,
                            series.class,
                            x(*at),
                            y(*value)
                        ),
                    );
                }),
                Draw::Line | Draw::Steps => {
                    let mut path = String::new();
                    for (at, value) in kept {
                        let (at, value) = (x(*at), y(*value));
                        let first = path.is_empty();
                        if !first && series.draw == Draw::Steps {
                            put(&mut path, format_args!("H{at:.1}"));
                        }
                        put(&mut path, format_args!("{}{at:.1} {value:.1}", if first { 'M' } else { 'L' }));
                    }
                    put(out, format_args!(r#"<path class="{}" d="{path}"/>"#, series.class));
                }
            }
        }
        if labels_shades {
            // Where labels would lie over each other, the next one goes a line deeper.
            let mut ends = [f64::MIN; 5];
            for shade in shades {
                let at = x(shade.span.0) + 2.0;
                let Some(row) = ends.iter().position(|end| *end < at) else { continue };
                ends[row] = at + shade.label.len() as f64 * 5.6 + 6.0;
                let deep = TOP + 11.0 + row as f64 * 12.0;
                put(
                    out,
                    format_args!(
                        r#"<text class="label" x="{at:.1}" y="{deep:.1}">{}</text>"#,
                        escape(&shade.label)
                    ),
                );
            }
        }
        svg + "</svg></figure>\n"
    }

    /// The lowest and the highest value of the axis, and where lines are drawn.
    fn axis(&self, largest: f64) -> (f64, f64, Vec<f64>) {
        match self.scale {
            Scale::Names(count) => (0.5, f64::from(count) + 0.5, (1..=count).map(f64::from).collect()),
            Scale::Logarithmic(low) => {
                let mut ticks = vec![low];
                while *ticks.last().unwrap_or(&low) < largest {
                    ticks.push(ticks[ticks.len() - 1] * 10.0);
                }
                if ticks.len() == 1 {
                    ticks.push(low * 10.0);
                }
                (low, ticks[ticks.len() - 1], ticks)
            }
            Scale::Linear => {
                let step = step(largest.max(1.0));
                let count = (largest.max(1.0) / step).ceil() as u32;
                (0.0, f64::from(count) * step, (0..=count).map(|n| f64::from(n) * step).collect())
            }
        }
    }
}

fn put(out: &mut String, what: std::fmt::Arguments<'_>) {
    out.write_fmt(what).expect("writing to a String does not fail");
}

/// A step of 1, 2 or 5 times a power of ten, of which at most ten make a range, and at least four.
fn step(range: f64) -> f64 {
    let power = 10f64.powf((range / 10.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|n| n * power)
        .find(|step| range / step <= 8.0)
        .unwrap_or(20.0 * power)
}

fn name(value: f64) -> String {
    match value {
        v if v >= 1_000_000.0 => format!("{} M", v / 1_000_000.0),
        v if v >= 10_000.0 => format!("{} k", v / 1_000.0),
        v => format!("{v}"),
    }
}

/// For HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!([3.0, 9.0, 17.0, 240.0, 9999.0].map(step), [0.5, 2.0, 5.0, 50.0, 2000.0]);
        let plot = |scale| Plot { title: String::new(), scale, series: Vec::new() };
        assert_eq!(plot(Scale::Linear).axis(17.0), (0.0, 20.0, vec![0.0, 5.0, 10.0, 15.0, 20.0]));
        assert_eq!(plot(Scale::Logarithmic(1.0)).axis(230.0), (1.0, 1000.0, vec![1.0, 10.0, 100.0, 1000.0]));
    }

    #[test]
    fn a_plot_has_its_points_and_shades_and_no_markup_of_its_labels() {
        let points = vec![(0, 1.0), (500, 10.0), (1000, 100.0)];
        let series = Series { label: "a<b".into(), class: "good", draw: Draw::Dots, points };
        let plot = Plot { title: "t".into(), scale: Scale::Logarithmic(1.0), series: vec![series] };
        let shade = Shade { span: (100, 300), label: "kill".into() };
        let svg = plot.draw(1000, &[shade], true);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert_eq!(svg.matches("class=\"shade\"").count(), 1);
        assert!(svg.contains(">kill</text>") && svg.contains("a&lt;b"));
    }
}
