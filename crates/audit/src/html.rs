//! A report as one page of HTML that loads nothing.

use std::fmt::Write as _;

use casemate_report::STYLE;
use casemate_report::plot::{self, Lines, Series, escaped};
use casemate_report::table::figures;

use crate::report::{LIMITS, Point, Report, Scores};

/// The whole page.
pub(crate) fn html(report: &Report) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>Copies of {0}</title>\
         <style>{STYLE}</style></head><body><main><header><p class=\"kicker\">casemate audit extraction</p>\
         <h1>Copies of {0}</h1><p class=\"sub\">{1}</p><ul class=\"notes\">",
        escaped(&report.victim.name),
        escaped(&report.head())
    );
    for limit in LIMITS {
        let _ = write!(page, "<li>{}</li>", escaped(limit));
    }
    page.push_str("</ul></header><section class=\"plots\">");
    curve(
        &mut page,
        report,
        "The same next token",
        "Share of positions of held-out texts at which copy and model find the same token likeliest.",
        |scores| scores.forced_agreement,
    );
    curve(
        &mut page,
        report,
        "Left to itself",
        "Share of tokens of the copy's own continuations that the model would have chosen there.",
        |scores| scores.free_agreement,
    );
    curve(
        &mut page,
        report,
        "Distance",
        "KL divergence of the copy's distribution from the model's, nats per token; less is nearer.",
        |scores| scores.kl,
    );
    curve(
        &mut page,
        report,
        "Text",
        "BLEU of the copy's greedy continuations with the model's as references.",
        |scores| scores.bleu,
    );
    page.push_str("</section><section><h2>Every figure</h2>");
    for section in report.sections() {
        figures(&mut page, &section);
    }
    let program = &report.program;
    let _ = writeln!(
        page,
        "</section><footer><p>casemate {}, PyTorch {}, {}.</p><p>To repeat it:</p><pre>{}</pre></footer></main></body></html>",
        escaped(&program.version),
        escaped(&program.torch),
        escaped(&program.started),
        escaped(&program.command)
    );
    page
}

/// One figure over the number of queries. Who asks nothing is a dashed line across.
fn curve(
    page: &mut String,
    report: &Report,
    title: &str,
    what: &str,
    figure: impl Fn(&Scores) -> f64,
) {
    let asked: Vec<f64> = report
        .points
        .iter()
        .filter(|point| point.queries > 0)
        .map(|point| point.queries as f64)
        .collect();
    let (least, most) = asked
        .iter()
        .fold((f64::MAX, f64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
    let mut series: Vec<Series> = Vec::new();
    let mut legend = String::new();
    let same = |a: &Point, b: &Point| (&a.attacker, &a.told) == (&b.attacker, &b.told);
    for points in report.points.chunk_by(same) {
        let first = &points[0];
        let across = first.queries == 0;
        let colour = match across {
            true => "--muted".to_owned(),
            false => {
                let drawn = series.iter().filter(|s| !s.dashed).count();
                format!("--c{}", drawn % 5 + 1)
            }
        };
        let points = match across {
            true => [least, most].map(|x| (x, figure(&first.scores))).to_vec(),
            false => points
                .iter()
                .map(|point| (point.queries as f64, figure(&point.scores)))
                .collect(),
        };
        if !across {
            let _ = write!(
                legend,
                " <b style=\"color:var({colour})\">{}: {}</b>;",
                escaped(&first.attacker),
                escaped(&first.told)
            );
        }
        series.push(Series {
            name: first.attacker.clone(),
            colour,
            points,
            dashed: across,
        });
    }
    if asked.is_empty() {
        series.clear();
    }
    let svg = plot::lines(&Lines {
        summary: what,
        x_name: "queries",
        y_name: "",
        series,
        doubling: true,
    });
    let _ = write!(
        page,
        "<figure><figcaption><h2>{title}</h2><p>{what}{}</p></figcaption>{svg}</figure>",
        legend.trim_end_matches(';')
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        let page = html(&sample::report());
        for expected in [
            "Copies of stories &lt;260K&gt;",
            "Nothing here stops distillation",
            "<td>no-shield</td>",
            "37.5 %",
            "To repeat it",
        ] {
            assert!(page.contains(expected), "{expected}");
        }
        assert_eq!(page.matches("<svg").count(), 4);
        for tag in [
            "main", "section", "figure", "table", "svg", "div", "p", "header", "footer", "ul",
            "li", "b",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(
                opened,
                page.matches(&format!("</{tag}>")).count(),
                "<{tag}>"
            );
        }
        for foreign in [
            "<script", "http://", "https://", "@import", "url(", "NaN", "<260K>",
        ] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn who_asks_nothing_is_a_line_across() {
        let page = html(&sample::report());
        // Two of them in each of four plots; three attackers with curves.
        assert_eq!(page.matches("class=\"limit\"").count(), 8);
        assert_eq!(page.matches("class=\"line\"").count(), 12);
    }
}
