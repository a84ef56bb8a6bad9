//! One metric on every set: each model's value with its interval.

use plotters::element::{Circle, PathElement, Text, TriangleMarker};
use plotters::style::text_anchor::HPos;
use plotters::style::{Color as _, RGBColor, ShapeStyle};

use super::{Error, WIDTH, fitted, palette, px, svg, text, units, width};

/// A model's mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Mark {
    /// An open circle.
    Before,
    /// A filled circle.
    After,
    /// A triangle.
    Retrained,
}

/// A value with its interval.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Point {
    /// Whose it is.
    pub(in super::super) mark: Mark,
    /// The value.
    pub(in super::super) value: f64,
    /// The interval; the value twice where there is none.
    pub(in super::super) interval: (f64, f64),
}

/// One set.
#[derive(Clone, Debug)]
pub(in super::super) struct Row {
    /// The set's name.
    pub(in super::super) label: String,
    /// Its models.
    pub(in super::super) points: Vec<Point>,
}

/// The place for labels: as wide as they need, within these.
const LEFT: (i32, i32) = (116, 196);
const RIGHT: i32 = 22;
const TOP: i32 = 8;
const BOTTOM: i32 = 28;
const POINT: i32 = 14;
const GAP: i32 = 12;

/// The values of a metric in [0, 1], as percentages.
///
/// # Errors
/// What the drawing library reports.
pub(in super::super) fn plot(rows: &[Row]) -> Result<String, Error> {
    let row_height = |row: &Row| units(row.points.len()) * POINT + GAP;
    let plot_height: i32 = rows.iter().map(row_height).sum();
    let height = u32::try_from(TOP + plot_height + BOTTOM)?;
    let right = i32::try_from(WIDTH)? - RIGHT;
    let longest = rows.iter().map(|row| width(&row.label)).max().unwrap_or(0);
    let left = (longest + 12).clamp(LEFT.0, LEFT.1);
    let x = |value: f64| left + px(value.clamp(0.0, 1.0) * f64::from(right - left));
    svg(height, |area| {
        for quarter in 0..=4u32 {
            let value = f64::from(quarter) / 4.0;
            let line = vec![(x(value), TOP), (x(value), TOP + plot_height)];
            area.draw(&PathElement::new(line, palette::GRID.stroke_width(1)))?;
            let label = format!("{} %", quarter * 25);
            let at = (x(value), TOP + plot_height + BOTTOM / 2);
            area.draw(&Text::new(label, at, text(&palette::MUTED, HPos::Center)))?;
        }
        let mut top = TOP;
        for row in rows {
            let middle = top + row_height(row) / 2;
            let label = fitted(&row.label, left - 12);
            area.draw(&Text::new(
                label,
                (left - 10, middle),
                text(&palette::INK, HPos::Right),
            ))?;
            for (index, point) in row.points.iter().enumerate() {
                let y = top + GAP / 2 + units(index) * POINT + POINT / 2;
                draw_point(area, &x, y, point)?;
            }
            top += row_height(row);
        }
        Ok(())
    })
}

fn draw_point(
    area: &super::Area<'_>,
    x: &impl Fn(f64) -> i32,
    y: i32,
    point: &Point,
) -> Result<(), Error> {
    let color = color(point.mark);
    let (low, high) = point.interval;
    let thick: ShapeStyle = color.stroke_width(2);
    area.draw(&PathElement::new(vec![(x(low), y), (x(high), y)], thick))?;
    for end in [low, high] {
        area.draw(&PathElement::new(
            vec![(x(end), y - 3), (x(end), y + 3)],
            thick,
        ))?;
    }
    let at = (x(point.value), y);
    match point.mark {
        Mark::Before => {
            // The line must not show through: the page's own background is put behind by its style.
            area.draw(&Circle::new(at, 5, HOLLOW.filled()))?;
            area.draw(&Circle::new(at, 5, color.stroke_width(2)))?;
        }
        Mark::After => area.draw(&Circle::new(at, 5, color.filled()))?,
        Mark::Retrained => area.draw(&TriangleMarker::new(at, 6, color.filled()))?,
    }
    Ok(())
}

/// Stands for the page's background.
const HOLLOW: RGBColor = RGBColor(0xff, 0xff, 0xff);

fn color(mark: Mark) -> RGBColor {
    match mark {
        Mark::Before => palette::BEFORE,
        Mark::After => palette::AFTER,
        Mark::Retrained => palette::RETRAINED,
    }
}

/// A mark by itself, for a legend.
///
/// # Errors
/// What the drawing library reports.
pub(in super::super) fn legend(mark: Mark) -> Result<String, Error> {
    let mut drawn = svg(16, |area| {
        let point = Point {
            mark,
            value: 0.5,
            interval: (0.0, 1.0),
        };
        draw_point(area, &|value| 4 + px(value * 24.0), 8, &point)
    })?;
    drawn = drawn.replacen(&format!("width=\"{WIDTH}\""), "width=\"32\"", 1);
    Ok(drawn.replacen(&format!("0 0 {WIDTH} 16"), "0 0 32 16", 1))
}
