//! The reward curve as a picture: mean reward a step and validation accuracy, SVG.
//!
//! Text in an SVG is text, so no font is needed here. Drawn by the recorder when a job ends.

use std::path::Path;

use plotters::prelude::*;

use super::metrics_file::MetricsLine;
use super::{StoreError, write_whole};

const SIZE: (u32, u32) = (900, 480);
const REWARD: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const ACCURACY: RGBColor = RGBColor(0xd6, 0x27, 0x28);

/// Draws the run to `path`. A run without a single figure gives an empty diagram.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, title: &str, lines: &[MetricsLine]) -> Result<(), StoreError> {
    let svg = draw(title, lines).map_err(|problem| StoreError {
        what: "draw",
        path: path.to_owned(),
        source: std::io::Error::other(problem),
    })?;
    write_whole(path, svg.as_bytes())
}

fn draw(title: &str, lines: &[MetricsLine]) -> Result<String, String> {
    let say = |e: &dyn std::fmt::Display| e.to_string();
    let points = |value: fn(&MetricsLine) -> Option<f64>| -> Vec<(f64, f64)> {
        #[expect(clippy::cast_precision_loss, reason = "a pixel is wider")]
        let point = |line: &MetricsLine| value(line).filter(|v| v.is_finite()).map(|v| (line.step as f64, v));
        lines.iter().filter_map(point).collect()
    };
    let series = [
        ("mean reward of a step", points(MetricsLine::reward), REWARD),
        ("validation accuracy", points(MetricsLine::validation), ACCURACY),
    ];
    let all = || series.iter().flat_map(|(_, points, _)| points);
    let last_step = all().map(|p| p.0).fold(1.0, f64::max);
    // Rewards and accuracies lie in [0, 1] as a rule; the axis grows when they do not.
    let low = all().map(|p| p.1).fold(0.0, f64::min);
    let high = all().map(|p| p.1).fold(1.0, f64::max);

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(|e| say(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..last_step, low..high * 1.02)
            .map_err(|e| say(&e))?;
        let steps = |step: &f64| format!("{step:.0}");
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("training step").x_label_formatter(&steps).light_line_style(WHITE.mix(0.0));
        mesh.draw().map_err(|e| say(&e))?;
        for (name, points, colour) in series {
            let dots: Vec<_> = points.iter().map(|&p| Circle::new(p, 2, colour.filled())).collect();
            chart.draw_series(dots).map_err(|e| say(&e))?;
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))
                .map_err(|e| say(&e))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::LowerRight).background_style(WHITE.mix(0.8)).border_style(BLACK);
        labels.draw().map_err(|e| say(&e))?;
        root.present().map_err(|e| say(&e))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_drawn_without_a_font_and_so_is_an_empty_one() {
        let line = |step: u64, name: &str, value: f64| MetricsLine {
            step,
            time: 0.0,
            metrics: [(name.to_owned(), value)].into(),
        };
        let lines = [
            line(0, "val-core/data/acc/mean@1", 0.25),
            line(1, "critic/score/mean", 0.1),
            line(2, "critic/score/mean", 0.4),
            line(2, "critic/score/mean", f64::NAN),
            line(2, "val-core/data/acc/mean@1", 0.5),
        ];
        let svg = draw("AgentRL/default <1>", &lines).unwrap();
        for part in
            ["<svg", "</svg>", "AgentRL/default &lt;1&gt;", "training step", "validation accuracy", "#1F77B4"]
        {
            assert!(svg.contains(part), "{part} is missing in {svg}");
        }
        assert_eq!(svg.matches("<polyline").count(), svg.matches("polyline").count());
        assert!(draw("empty", &[]).unwrap().contains("</svg>"));
    }
}
