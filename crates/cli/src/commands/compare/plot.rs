//! Curves as SVG, in the colours of the page: those are its style sheet's, so that light and dark work.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A named curve.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Colours that are drawn and what the page has in their place.
const INK: (RGBColor, &str, &str) = (RGBColor(1, 1, 1), "#010101", "currentColor");
const FAINT: (RGBColor, &str, &str) = (RGBColor(2, 2, 2), "#020202", "var(--faint)");
const CURVES: [(RGBColor, &str, &str); 2] = [(RGBColor(3, 3, 3), "#030303", "var(--a)"), (RGBColor(4, 4, 4), "#040404", "var(--b)")];

const SIZE: (u32, u32) = (560, 300);

/// Two curves over the tokens of context.
pub(super) fn svg(title: &str, unit: &str, curves: &[Curve; 2]) -> Result<String> {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let most = |of: &dyn Fn(&(f64, f64)) -> f64| all().map(of).fold(0.0, f64::max);
    let (right, top) = (most(&|point| point.0).max(1.0), most(&|point| point.1).max(1e-9) * 1.2);
    let mut out = String::new();
    draw(&mut out, title, unit, curves, right, top).map_err(|error| anyhow!("drawing {title}: {error}"))?;
    for (_, drawn, wanted) in [INK, FAINT].iter().chain(&CURVES) {
        out = out.replace(drawn, wanted);
    }
    // As wide as the page has room.
    Ok(out.replacen(&format!("width=\"{}\" height=\"{}\"", SIZE.0, SIZE.1), "role=\"img\"", 1))
}

fn draw(out: &mut String, title: &str, unit: &str, curves: &[Curve; 2], right: f64, top: f64) -> Result<(), Box<dyn std::error::Error>> {
    // Where no curve goes.
    let rises = curves.iter().flat_map(|curve| curve.points.first().zip(curve.points.last())).any(|(first, last)| last.1 > first.1);
    let legend = if rises { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::UpperRight };
    let area = SVGBackend::with_string(out, SIZE).into_drawing_area();
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK.0);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, text(16))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..right * 1.02, 0.0..top)?;
    chart
        .configure_mesh()
        .axis_style(INK.0)
        .bold_line_style(FAINT.0)
        .light_line_style(TRANSPARENT)
        .label_style(text(12))
        .axis_desc_style(text(12))
        .x_desc("tokens of context")
        .y_desc(unit)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| if top >= 10.0 { format!("{y:.0}") } else { format!("{y:.2}") })
        .draw()?;
    for (curve, (colour, ..)) in curves.iter().zip(CURVES) {
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(curve.points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
    }
    chart.configure_series_labels().label_font(text(12)).border_style(TRANSPARENT).position(legend).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_the_pages_colours_alone() {
        let curve = |name: &str, rate: f64| Curve { name: name.into(), points: vec![(0.0, rate), (4096.0, rate / 2.0)] };
        let svg = svg("Decoding", "tokens/s", &[curve("A", 80.0), curve("B <x>", 40.0)]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("var(--a)") && svg.contains("var(--b)") && svg.contains("currentColor"));
        assert!(svg.contains("B &lt;x&gt;") && !svg.contains("\"#0"), "{svg}");
    }
}
