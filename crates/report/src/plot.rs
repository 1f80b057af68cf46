//! Plots as inline SVG: lines over an axis and distributions. Colours are CSS variables, so that the page around decides
//! between light, dark and paper.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 356.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 92.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 46.0;
/// Room that a label needs for itself, in height.
const LABEL: f64 = 15.0;

/// One line of a plot.
pub struct Series {
    /// At its end; empty for none.
    pub name: String,
    /// CSS variable of its colour, as `--int8`.
    pub colour: String,
    /// Places across, and values.
    pub points: Vec<(f64, f64)>,
    /// A limit rather than a measurement.
    pub dashed: bool,
}

/// Lines over the same places.
pub struct Lines<'a> {
    /// For who cannot see it.
    pub summary: &'a str,
    /// What is across.
    pub x_name: &'a str,
    /// What is upwards.
    pub y_name: &'a str,
    /// The lines, in the order of their colours.
    pub series: Vec<Series>,
    /// Whether each doubling takes the same room, not each step.
    pub doubling: bool,
}

/// Draws lines from zero on.
pub fn lines(plot: &Lines<'_>) -> String {
    let all = || plot.series.iter().flat_map(|s| &s.points);
    let across = |x: f64| if plot.doubling { x.log2() } else { x };
    let (least, most) = all().fold((f64::MAX, f64::MIN), |(a, b), p| {
        (a.min(across(p.0)), b.max(across(p.0)))
    });
    let ticks = ticks(all().fold(0.0, |most: f64, p| most.max(p.1)));
    let top = ticks.last().copied().unwrap_or(1.0);
    let x_of =
        |x: f64| LEFT + (across(x) - least) / (most - least).max(1e-9) * (WIDTH - LEFT - RIGHT);
    let y_of = |y: f64| HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM);

    let mut svg = open(plot.summary, HEIGHT);
    grid(&mut svg, &ticks, y_of);
    let mut places: Vec<f64> = all().map(|p| p.0).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    for x in places {
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x}</text>",
            x_of(x),
            HEIGHT - BOTTOM + 18.0
        );
    }
    names(&mut svg, plot.x_name, plot.y_name, HEIGHT);
    for s in &plot.series {
        let path: Vec<String> = s
            .points
            .iter()
            .map(|&(x, y)| format!("{:.1},{:.1}", x_of(x), y_of(y)))
            .collect();
        let class = if s.dashed { "limit" } else { "line" };
        let _ = write!(
            svg,
            "<polyline class=\"{class}\" style=\"stroke:var({})\" points=\"{}\"/>",
            s.colour,
            path.join(" ")
        );
        for &(x, y) in s.points.iter().filter(|_| !s.dashed) {
            let _ = write!(
                svg,
                "<circle class=\"dot\" style=\"fill:var({})\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}, {x}: {}</title></circle>",
                s.colour,
                x_of(x),
                y_of(y),
                escaped(&s.name),
                number(y)
            );
        }
    }
    end_labels(&mut svg, &plot.series, x_of, y_of);
    svg.push_str("</svg>");
    svg
}

/// Names and last values at the right ends, moved apart where they would lie on each other.
fn end_labels(
    svg: &mut String,
    series: &[Series],
    x_of: impl Fn(f64) -> f64,
    y_of: impl Fn(f64) -> f64,
) {
    let mut ends: Vec<(f64, f64, &Series)> = series
        .iter()
        .filter(|s| !s.name.is_empty())
        .filter_map(|s| s.points.last().map(|&(x, y)| (x_of(x), y_of(y), s)))
        .collect();
    ends.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut free = HEIGHT - BOTTOM + 4.0;
    for (x, y, s) in ends {
        let y = y.min(free);
        free = y - LABEL;
        let _ = write!(
            svg,
            "<text class=\"{}\" style=\"fill:var({})\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            if s.dashed { "end of-limit" } else { "end" },
            s.colour,
            x + 10.0,
            y + 4.0,
            escaped(&s.name)
        );
    }
}

/// How many numbers lie in each of equal parts of a range.
pub struct Bars<'a> {
    /// For who cannot see it.
    pub summary: &'a str,
    /// What is across.
    pub x_name: &'a str,
    /// In each part.
    pub counts: &'a [u64],
    /// What the range begins and ends with.
    pub ends: [&'a str; 2],
    /// CSS variable of the colour, as `--int8`.
    pub colour: &'a str,
}

/// Draws bars from zero on, and as a dashed line the height that all would have if they were equal.
pub fn bars(plot: &Bars<'_>) -> String {
    const TALL: f64 = 240.0;
    let most = plot.counts.iter().copied().max().unwrap_or(0);
    let ticks = ticks(most as f64);
    let top = ticks.last().copied().unwrap_or(1.0);
    let y_of = |y: f64| TALL - BOTTOM - y / top * (TALL - TOP - BOTTOM);
    let mut svg = open(plot.summary, TALL);
    grid(&mut svg, &ticks, y_of);
    let count = plot.counts.len().max(1) as f64;
    let step = (WIDTH - RIGHT - LEFT) / count;
    for (i, &bar) in plot.counts.iter().enumerate() {
        let y = y_of(bar as f64);
        let _ = write!(
            svg,
            "<rect class=\"bar\" style=\"fill:var({})\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{bar}</title></rect>",
            plot.colour,
            LEFT + i as f64 * step,
            (step - 1.0).max(0.5),
            TALL - BOTTOM - y
        );
    }
    let equal = y_of(plot.counts.iter().sum::<u64>() as f64 / count);
    let _ = write!(
        svg,
        "<line class=\"limit\" style=\"stroke:var(--ink)\" x1=\"{LEFT}\" x2=\"{0:.1}\" y1=\"{equal:.1}\" y2=\"{equal:.1}\"/>\
         <text class=\"end of-limit\" style=\"fill:var(--muted)\" x=\"{1:.1}\" y=\"{2:.1}\">uniform</text>",
        WIDTH - RIGHT,
        WIDTH - RIGHT + 10.0,
        equal + 4.0
    );
    for (end, x, anchor) in [
        (plot.ends[0], LEFT, "start"),
        (plot.ends[1], WIDTH - RIGHT, "end"),
    ] {
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            TALL - BOTTOM + 18.0,
            escaped(end)
        );
    }
    names(&mut svg, plot.x_name, "", TALL);
    svg.push_str("</svg>");
    svg
}

/// How often which time was seen, with the median marked. What lies beyond the 99.5 % quantile is one last bar.
pub fn distribution(
    samples: &[f64],
    median: f64,
    unit: &str,
    colour: &str,
    summary: &str,
) -> String {
    const BINS: usize = 48;
    const TALL: f64 = 240.0;
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let least = sorted.first().copied().unwrap_or(0.0);
    let most = crate::quantile(&sorted, 0.995).max(least + 1e-9);
    let width = (most - least) / BINS as f64;
    let mut bins = [0usize; BINS + 1];
    for x in &sorted {
        bins[(((x - least) / width) as usize).min(BINS)] += 1;
    }
    // The largest value within is the end of the last bin, not the beginning of the one for what lies beyond.
    let highest = bins.iter().copied().max().unwrap_or(1).max(1);
    let right = WIDTH - 16.0;
    let step = (right - LEFT) / (BINS + 2) as f64;
    let x_of = |x: f64| LEFT + (x - least) / width * step;
    let y_of = |count: f64| TALL - BOTTOM - count / highest as f64 * (TALL - TOP - BOTTOM);
    let mut svg = open(summary, TALL);
    let _ = write!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{0}\" y2=\"{0}\"/>",
        TALL - BOTTOM
    );
    for (i, &count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        let beyond = i == BINS;
        let x = LEFT + (i + usize::from(beyond)) as f64 * step;
        let from = least + i as f64 * width;
        let what = match beyond {
            true => format!("{count} beyond {} {unit}", number(most)),
            false => format!("{count} from {} {unit}", number(from)),
        };
        let _ = write!(
            svg,
            "<rect class=\"{}\" style=\"fill:var({colour})\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"1\"><title>{what}</title></rect>",
            if beyond { "bar beyond" } else { "bar" },
            y_of(count as f64),
            step - 1.0,
            TALL - BOTTOM - y_of(count as f64),
        );
    }
    for i in 0..=4 {
        let x = least + (most - least) * f64::from(i) / 4.0;
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x_of(x),
            TALL - BOTTOM + 18.0,
            number(x)
        );
    }
    let at = x_of(median.clamp(least, most));
    let anchor = if at > WIDTH / 2.0 {
        ("end", at - 6.0)
    } else {
        ("start", at + 6.0)
    };
    let _ = write!(
        svg,
        "<line class=\"median\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
         <text class=\"end\" style=\"fill:var(--ink)\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{}\">median {} {unit}</text>",
        TOP - 8.0,
        TALL - BOTTOM,
        anchor.1,
        TOP + 2.0,
        anchor.0,
        number(median)
    );
    names(&mut svg, &format!("{unit} from token to token"), "", TALL);
    svg.push_str("</svg>");
    svg
}

/// Ratios of pairs around one, with the mean and its interval.
pub fn ratios(
    ratios: &[f64],
    (low, mean, high): (f64, f64, f64),
    colour: &str,
    summary: &str,
) -> String {
    const TALL: f64 = 170.0;
    let (least, most) = ratios
        .iter()
        .chain([&low, &high, &1.0])
        .fold((f64::MAX, f64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
    let margin = (most - least).max(0.02) * 0.08;
    let (least, most) = (least - margin, most + margin);
    let right = WIDTH - 16.0;
    let x_of = |x: f64| LEFT + (x - least) / (most - least) * (right - LEFT);
    let mut svg = open(summary, TALL);
    let floor = TALL - BOTTOM;
    let _ = write!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{floor}\" y2=\"{floor}\"/>\
         <line class=\"median\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{TOP}\" y2=\"{floor}\"/>",
        x_of(1.0)
    );
    for (i, &ratio) in ratios.iter().enumerate() {
        let _ = write!(
            svg,
            "<circle class=\"bar\" style=\"fill:var({colour})\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"><title>{ratio:.4}</title></circle>",
            x_of(ratio),
            // Apart in height, so that equal ones can be told from one.
            floor - 12.0 - (i % 4) as f64 * 9.0
        );
    }
    let y = TOP + 14.0;
    let _ = write!(
        svg,
        "<line class=\"whisker\" style=\"stroke:var({colour})\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y}\" y2=\"{y}\"/>\
         <circle class=\"dot\" style=\"fill:var({colour})\" cx=\"{:.1}\" cy=\"{y}\" r=\"6\"/>",
        x_of(low),
        x_of(high),
        x_of(mean)
    );
    for i in 0..=4 {
        let x = least + (most - least) * f64::from(i) / 4.0;
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x:.3}</text>",
            x_of(x),
            floor + 18.0
        );
    }
    names(
        &mut svg,
        "time with protection over time without, pair by pair",
        "",
        TALL,
    );
    svg.push_str("</svg>");
    svg
}

fn open(summary: &str, height: f64) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>",
        escaped(summary)
    )
}

fn grid(svg: &mut String, ticks: &[f64], y_of: impl Fn(f64) -> f64) {
    for &tick in ticks {
        let y = y_of(tick);
        let class = if tick == 0.0 { "axis" } else { "grid" };
        let _ = write!(
            svg,
            "<line class=\"{class}\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0,
            number(tick)
        );
    }
}

fn names(svg: &mut String, x: &str, y: &str, height: f64) {
    let _ = write!(
        svg,
        "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        f64::midpoint(LEFT, WIDTH - RIGHT),
        height - 8.0,
        escaped(x)
    );
    if !y.is_empty() {
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"0\" y=\"11\">{}</text>",
            escaped(y)
        );
    }
}

/// Round numbers from 0 to at least `most`, four to six of them.
pub fn ticks(most: f64) -> Vec<f64> {
    if !(most.is_finite() && most > 0.0) {
        return vec![0.0, 1.0];
    }
    let rough = most / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|&step| step * 5.0 >= most * 0.999)
        .unwrap_or(10.0 * power);
    let count = (most / step * 0.999).ceil() as usize;
    (0..=count).map(|i| i as f64 * step).collect()
}

/// A number with the digits that can be read.
pub fn number(x: f64) -> String {
    let digits = match x.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{x:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Text for HTML and SVG, also inside of quoted attributes.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_the_top() {
        assert_eq!(ticks(118.3), [0.0, 25.0, 50.0, 75.0, 100.0, 125.0]);
        assert_eq!(ticks(26.6), [0.0, 10.0, 20.0, 30.0]);
        assert_eq!(ticks(100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.0), [0.0, 1.0]);
        assert_eq!(ticks(f64::NAN), [0.0, 1.0]);
        for most in [0.003, 0.7, 9.99, 1e6] {
            let ticks = ticks(most);
            assert!(ticks.last().unwrap() >= &(most * 0.999), "{most}");
            assert!((3..=6).contains(&ticks.len()), "{most}: {ticks:?}");
        }
    }

    #[test]
    fn numbers_have_the_digits_that_mean_something() {
        for (x, text) in [
            (0.0, "0"),
            (0.0154, "0.015"),
            (2.5, "2.5"),
            (38.12, "38.1"),
            (118.3, "118"),
            (100.0, "100"),
        ] {
            assert_eq!(number(x), text);
        }
    }

    #[test]
    fn the_last_bar_is_what_lies_beyond() {
        let mut samples: Vec<f64> = (0..1000).map(|i| 10.0 + f64::from(i) / 1000.0).collect();
        samples.push(500.0);
        let svg = distribution(&samples, 10.5, "ms", "--x", "summary");
        assert_eq!(svg.matches("bar beyond").count(), 1);
        assert!(svg.contains("median 10.5 ms"));
        // No samples at all draw nothing and do not panic.
        assert!(!distribution(&[], 0.0, "ms", "--x", "").contains("rect"));
        assert!(distribution(&[5.0; 9], 5.0, "ms", "--x", "").contains("rect"));
    }

    #[test]
    fn bars_reach_their_counts_and_the_line_their_mean() {
        let of = |counts: &[u64]| {
            bars(&Bars {
                summary: "s",
                x_name: "x",
                counts,
                ends: ["0", "<9>"],
                colour: "--x",
            })
        };
        let svg = of(&[100, 0, 50]);
        assert_eq!(svg.matches("<rect").count(), 3);
        assert!(svg.contains("&lt;9&gt;") && svg.contains("<title>50</title>"));
        let heights: Vec<f64> = svg
            .split("height=\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
            .collect();
        assert!(
            (heights[0] - 2.0 * heights[2]).abs() < 0.2 && heights[1] == 0.0,
            "{heights:?}"
        );
        // Nothing at all is drawn as nothing, and without NaN.
        assert!(!of(&[]).contains("NaN") && !of(&[0, 0]).contains("NaN"));
    }

    #[test]
    fn labels_that_would_overlap_are_moved_apart() {
        let series = |name: &str, y| Series {
            name: name.into(),
            colour: "--x".into(),
            points: vec![(1.0, 1.0), (2.0, y)],
            dashed: false,
        };
        let plot = Lines {
            summary: "a \"summary\" <of> it",
            x_name: "x",
            y_name: "y",
            series: vec![series("one", 10.0), series("two", 10.1)],
            doubling: false,
        };
        let svg = lines(&plot);
        let heights: Vec<f64> = svg
            .split("class=\"end\"")
            .skip(1)
            .map(|rest| {
                rest.split("y=\"")
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
                    .parse()
                    .unwrap()
            })
            .collect();
        assert_eq!(heights.len(), 2);
        assert!(
            (heights[0] - heights[1]).abs() >= LABEL - 0.2,
            "{heights:?}"
        );
        assert!(svg.contains("a &quot;summary&quot; &lt;of&gt; it") && !svg.contains("<of>"));
    }
}
