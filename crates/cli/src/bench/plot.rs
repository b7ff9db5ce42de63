//! Charts as SVG, by hand: latency and bandwidth over the size, both axes logarithmic, a curve for each operation.
//!
//! Nothing is loaded from elsewhere and nothing is a script. Colours follow the reader's light or dark mode; curves differ in their
//! marks, too, so that they are told apart without colours; the chart has a title and a description for who cannot see it.

use std::fmt::Write;

use super::plan::Size;
use super::report::{Report, Row};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
/// Around the axes: for their labels, and on the right for the names of the curves.
const LEFT: f64 = 76.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 52.0;

/// Of light mode, and then of dark mode. Plain rules: not every renderer knows variables.
const STYLE: &str = "
.chart{font:12px system-ui,sans-serif}.chart text{fill:#1b1f24}.chart .title{font-size:15px;font-weight:600}
.chart .paper{fill:#fff}.chart .grid{stroke:#d0d7de}.chart .curve{fill:none;stroke-width:2}.chart .limit{stroke-dasharray:5 4}
.chart .mark{fill:#fff;stroke-width:2}
.chart .k0{stroke:#0550ae}.chart .k1{stroke:#bc4c00}.chart .k2{stroke:#116329}.chart .k3{stroke:#8250df}.chart .k4{stroke:#57606a}
@media (prefers-color-scheme:dark){.chart text{fill:#e6edf3}.chart .paper,.chart .mark{fill:#0d1117}.chart .grid{stroke:#30363d}
.chart .k0{stroke:#79c0ff}.chart .k1{stroke:#ffa657}.chart .k2{stroke:#7ee787}.chart .k3{stroke:#d2a8ff}.chart .k4{stroke:#8b949e}}
";

/// What is drawn over the size.
#[derive(Clone, Copy)]
pub(crate) enum Figure {
    Latency,
    Bandwidth,
}

impl Figure {
    fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Bandwidth => "bandwidth",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Latency => "Median time of a call, microseconds",
            Self::Bandwidth => "Payload, GB/s (10\u{2079} bytes)",
        }
    }

    fn of(self, row: &Row) -> Option<f64> {
        match self {
            Self::Latency => Some(row.p50_us),
            Self::Bandwidth => row.gb_per_s,
        }
    }

    fn of_limit(self, row: &Row) -> Option<f64> {
        let limit = row.limit.as_ref()?;
        match self {
            Self::Latency => Some(limit.p50_us),
            Self::Bandwidth => Some((row.op.crossings() * row.size_bytes) as f64 / limit.p50_us / 1e3),
        }
    }
}

struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
    /// Of the operation: its colour and its marks.
    kind: usize,
    is_limit: bool,
}

/// Both charts, one below the other, as a document of its own.
pub(crate) fn document(report: &Report) -> String {
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {WIDTH} {}\" width=\"{WIDTH}\" \
         height=\"{}\" role=\"img\" aria-labelledby=\"bench-title bench-description\">\n",
        2.0 * HEIGHT,
        2.0 * HEIGHT
    );
    let _ = writeln!(text, "<title id=\"bench-title\">farcall bench: latency and bandwidth by size</title>");
    let _ = writeln!(text, "<desc id=\"bench-description\">{}</desc>", escape(&describe(report)));
    let _ = writeln!(text, "<style>{STYLE}</style>");
    for (figure, top) in [(Figure::Latency, 0.0), (Figure::Bandwidth, HEIGHT)] {
        let _ = writeln!(text, "<g transform=\"translate(0 {top})\">");
        body(&mut text, report, figure);
        text.push_str("</g>\n");
    }
    text.push_str("</svg>\n");
    text
}

/// One chart, to be part of a page.
pub(crate) fn chart(report: &Report, figure: Figure) -> String {
    let id = figure.name();
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-labelledby=\"{id}-title {id}-description\">\n<title id=\"{id}-title\">{}</title>\n\
         <desc id=\"{id}-description\">{}</desc>\n<style>{STYLE}</style>\n",
        escape(figure.title()),
        escape(&describe(report))
    );
    body(&mut text, report, figure);
    text.push_str("</svg>\n");
    text
}

/// The curves in words.
fn describe(report: &Report) -> String {
    let mut text = String::from("Over sizes in bytes:");
    for row in report.rows.iter().filter(|row| row.op.has_sizes()) {
        let _ = write!(text, " {} of {}: {:.1} us", row.op, Size(row.size_bytes), row.p50_us);
        if let Some(rate) = row.gb_per_s {
            let _ = write!(text, ", {rate:.2} GB/s");
        }
        text.push(';');
    }
    text
}

fn curves(report: &Report, figure: Figure) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    let mut ops: Vec<_> = report.rows.iter().map(|row| row.op).filter(|op| op.has_sizes()).collect();
    ops.dedup();
    for (kind, op) in ops.into_iter().enumerate() {
        for is_limit in [false, true] {
            let value = |row: &Row| if is_limit { figure.of_limit(row) } else { figure.of(row) };
            let point = |row: &Row| Some((row.size_bytes as f64, value(row)?));
            let rows = report.rows.iter().filter(|row| row.op == op);
            let positive = |(x, y): &(f64, f64)| *x > 0.0 && *y > 0.0 && y.is_finite();
            let points: Vec<_> = rows.filter_map(point).filter(positive).collect();
            let name = if is_limit { format!("{op}: limit") } else { op.to_string() };
            if !points.is_empty() {
                curves.push(Curve { name, points, kind: kind % 5, is_limit });
            }
        }
    }
    curves
}

/// A logarithmic axis from one power of its base to another.
struct Axis {
    base: f64,
    first: i32,
    last: i32,
    from: f64,
    to: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64> + Clone, base: f64, from: f64, to: f64) -> Self {
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let exponent = |value: f64| value.ln() / base.ln();
        let first = (exponent(low) + 1e-9).floor() as i32;
        let last = ((exponent(high) - 1e-9).ceil() as i32).max(first + 1);
        Self { base, first, last, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value.ln() / self.base.ln() - f64::from(self.first)) / f64::from(self.last - self.first);
        self.from + share * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        // Few enough that their labels do not touch.
        let step = ((self.last - self.first + 6) / 7).max(1) as usize;
        (self.first..=self.last).step_by(step).map(|exponent| self.base.powi(exponent))
    }
}

fn body(text: &mut String, report: &Report, figure: Figure) {
    let curves = curves(report, figure);
    let _ = writeln!(text, "<rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>");
    let _ = writeln!(text, "<text class=\"title\" x=\"{LEFT}\" y=\"24\">{}</text>", escape(figure.title()));
    if curves.is_empty() {
        let _ = writeln!(text, "<text x=\"{LEFT}\" y=\"80\">nothing was measured over sizes</text>");
        return;
    }
    let points = curves.iter().flat_map(|curve| curve.points.iter());
    let x = Axis::of(points.clone().map(|point| point.0), 2.0, LEFT, WIDTH - RIGHT);
    let y = Axis::of(points.map(|point| point.1), 10.0, HEIGHT - BOTTOM, TOP);
    for tick in x.ticks() {
        let at = x.place(tick);
        let _ =
            writeln!(text, "<line class=\"grid\" x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{:.1}\"/>", y.from);
        let size = Size(tick as u64);
        let _ = writeln!(text, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{size}</text>", y.from + 18.0);
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        let _ = writeln!(text, "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\"/>", x.to);
        let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>", LEFT - 8.0, at + 4.0);
    }
    let middle = f64::midpoint(x.from, x.to);
    let _ = writeln!(
        text,
        "<text x=\"{middle:.1}\" y=\"{}\" text-anchor=\"middle\">size of the tensor</text>",
        HEIGHT - 12.0
    );
    for (index, curve) in curves.iter().enumerate() {
        draw(text, curve, &x, &y, TOP + 12.0 + 20.0 * index as f64);
    }
}

fn draw(text: &mut String, curve: &Curve, x: &Axis, y: &Axis, legend_y: f64) {
    let kind = curve.kind;
    let limit = if curve.is_limit { " limit" } else { "" };
    let places: Vec<(f64, f64)> = curve.points.iter().map(|point| (x.place(point.0), y.place(point.1))).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(text, "<polyline class=\"curve k{kind}{limit}\" points=\"{}\"/>", path.join(" "));
    let legend_x = WIDTH - RIGHT + 16.0;
    let _ = writeln!(
        text,
        "<line class=\"curve k{kind}{limit}\" x1=\"{legend_x}\" y1=\"{legend_y}\" x2=\"{}\" y2=\"{legend_y}\"/>\
         <text x=\"{}\" y=\"{}\">{}</text>",
        legend_x + 28.0,
        legend_x + 36.0,
        legend_y + 4.0,
        escape(&curve.name)
    );
    if curve.is_limit {
        return;
    }
    let legend = (legend_x + 14.0, legend_y);
    for ((x, y), point) in places.into_iter().zip(curve.points.iter().map(Some)).chain([(legend, None)]) {
        let mark = match kind % 3 {
            0 => format!("<circle class=\"mark k{kind}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\">"),
            1 => format!(
                "<rect class=\"mark k{kind}\" x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\">",
                x - 4.0,
                y - 4.0
            ),
            _ => format!(
                "<path class=\"mark k{kind}\" d=\"M{x:.1} {:.1}L{:.1} {:.1}H{:.1}Z\">",
                y - 5.0,
                x + 5.0,
                y + 4.0,
                x - 5.0
            ),
        };
        let hint = point
            .map(|(size, value)| format!("<title>{}, {}: {value:.3}</title>", escape(&curve.name), Size(*size as u64)));
        let tag = ["circle", "rect", "path"][kind % 3];
        let _ = writeln!(text, "{mark}{}</{tag}>", hint.unwrap_or_default());
    }
}

/// Text between tags and in quoted attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Not a character of XML.
            letter if letter.is_control() && !letter.is_whitespace() => escaped.push('\u{fffd}'),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use roxmltree::Document;

    use super::*;
    use crate::bench::plan::Op;
    use crate::bench::report::tests::{report, row};

    fn sized(op: Op, size_bytes: u64, p50_us: f64) -> Row {
        Row { op, size_bytes, gb_per_s: Some(size_bytes as f64 / p50_us / 1e3), ..row(p50_us) }
    }

    fn two_curves() -> Report {
        let rows = [8, 64, 512]
            .into_iter()
            .flat_map(|size| [sized(Op::Sink, size, size as f64), sized(Op::Echo, size, 3.0 * size as f64)]);
        let mut rows: Vec<Row> = rows.collect();
        rows.sort_by_key(|row| row.op);
        Report { command: "farcall bench --json '<a&b>\u{1}\"'".to_owned(), ..report(rows) }
    }

    /// Points of the curve of that class, in the order of the chart's.
    fn points(document: &Document<'_>, class: &str) -> Vec<(f64, f64)> {
        let mut curves = document.descendants().filter(|node| node.tag_name().name() == "polyline");
        let curve = curves.find(|node| node.attribute("class") == Some(class));
        let points = curve.and_then(|node| node.attribute("points")).expect("a curve");
        let number = |text: &str| text.parse::<f64>().expect("a number");
        points
            .split(' ')
            .map(|point| point.split_once(',').expect("a pair"))
            .map(|(x, y)| (number(x), number(y)))
            .collect()
    }

    #[test]
    fn the_document_is_xml_with_a_title_a_description_and_a_curve_for_each_operation() {
        let text = document(&two_curves());
        let document = Document::parse(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let root = document.root_element();
        let labels: Vec<&str> = root.attribute("aria-labelledby").expect("labelled").split(' ').collect();
        for label in labels {
            let node = document.descendants().find(|node| node.attribute("id") == Some(label));
            assert!(node.and_then(|node| node.text()).is_some_and(|text| !text.is_empty()), "{label}");
        }
        let curves = document.descendants().filter(|node| node.tag_name().name() == "polyline").count();
        assert_eq!(curves, 2 * 4, "latency and bandwidth of two operations and their limits");
        assert!(!text.contains("<script") && !text.contains("href"), "nothing is loaded");
        assert!(text.contains("prefers-color-scheme:dark"));
    }

    /// Sizes and times that grow by one factor lie on a straight line, and the slower curve above the faster.
    #[test]
    fn both_axes_are_logarithmic() {
        let text = chart(&two_curves(), Figure::Latency);
        let document = Document::parse(&text).expect("XML");
        let (sink, echo) = (points(&document, "curve k0"), points(&document, "curve k1"));
        assert_eq!((sink.len(), echo.len()), (3, 3));
        let [dx, dy] = [sink[1].0 - sink[0].0, sink[0].1 - sink[1].1];
        assert!(dx > 10.0 && dy > 10.0, "{sink:?}");
        assert!((sink[2].0 - sink[1].0 - dx).abs() < 0.3 && (sink[1].1 - sink[2].1 - dy).abs() < 0.3, "{sink:?}");
        for (sink, echo) in sink.iter().zip(&echo) {
            assert!(echo.1 < sink.1 && echo.0 == sink.0);
            assert!((LEFT..=WIDTH - RIGHT).contains(&sink.0) && (TOP..=HEIGHT - BOTTOM).contains(&sink.1), "{sink:?}");
        }
    }

    #[test]
    fn charts_of_nothing_and_of_a_single_point_are_charts() {
        for rows in [vec![], vec![sized(Op::Sink, 8, 1.0)], vec![sized(Op::Read, 8, f64::NAN)]] {
            let text = document(&report(rows));
            Document::parse(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            let drawn = text.lines().filter(|line| !line.starts_with("<desc"));
            drawn.for_each(|line| assert!(!line.contains("NaN") && !line.contains("inf"), "{line}"));
        }
    }

    #[test]
    fn the_page_is_well_formed_and_shows_the_command_as_text() {
        let text = crate::bench::html::page(&two_curves());
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let page = Document::parse_with_options(&text, options).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(page.descendants().any(|node| node.text().is_some_and(|text| text.contains("'<a&b>\u{fffd}\"'"))));
        assert_eq!(page.descendants().filter(|node| node.tag_name().name() == "svg").count(), 2);
        let mut ids: Vec<&str> = page.descendants().filter_map(|node| node.attribute("id")).collect();
        ids.sort_unstable();
        ids.windows(2).for_each(|pair| assert_ne!(pair[0], pair[1]));
        assert!(!text.contains("<script") && !text.contains("src=") && !text.contains("href="), "nothing is loaded");
    }
}
