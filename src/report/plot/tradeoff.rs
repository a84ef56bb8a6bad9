//! What is forgotten against what is kept, over the settings that were tried.

use plotters::element::{Circle, PathElement, Text};
use plotters::style::text_anchor::HPos;
use plotters::style::{Color as _, FontTransform};

use super::{Error, WIDTH, palette, px, svg, text};

/// A setting that was tried.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Point {
    /// What is still known of what was to be forgotten, in [0, 1].
    pub(in super::super) forget: f64,
    /// What is still known of what was to be kept, in [0, 1].
    pub(in super::super) retain: f64,
    /// Whether no other setting is better in both.
    pub(in super::super) on_front: bool,
    /// Whether the rule picked it.
    pub(in super::super) picked: bool,
}

const LEFT: i32 = 66;
const RIGHT: i32 = 22;
const TOP: i32 = 10;
const BOTTOM: i32 = 46;
const HEIGHT: i32 = 340;

/// A mark for each setting, open where another beats it; a line through the front; a ring around the pick.
/// `forget` runs to the right, `retain` upwards: the best place is the upper left corner.
///
/// # Errors
/// What the drawing library reports.
pub(in super::super) fn plot(
    points: &[Point],
    forget: &str,
    retain: &str,
) -> Result<String, Error> {
    let right = i32::try_from(WIDTH)? - RIGHT;
    let bottom = HEIGHT - BOTTOM;
    let x = |value: f64| LEFT + px(value.clamp(0.0, 1.0) * f64::from(right - LEFT));
    let y = |value: f64| bottom - px(value.clamp(0.0, 1.0) * f64::from(bottom - TOP));
    svg(u32::try_from(HEIGHT)?, |area| {
        for quarter in 0..=4u32 {
            let value = f64::from(quarter) / 4.0;
            let grid = palette::GRID.stroke_width(1);
            area.draw(&PathElement::new(
                vec![(x(value), TOP), (x(value), bottom)],
                grid,
            ))?;
            area.draw(&PathElement::new(
                vec![(LEFT, y(value)), (right, y(value))],
                grid,
            ))?;
            let label = format!("{} %", quarter * 25);
            let below = (x(value), bottom + 14);
            area.draw(&Text::new(
                label.clone(),
                below,
                text(&palette::MUTED, HPos::Center),
            ))?;
            let beside = (LEFT - 8, y(value));
            area.draw(&Text::new(
                label,
                beside,
                text(&palette::MUTED, HPos::Right),
            ))?;
        }
        area.draw(&Text::new(
            super::fitted(forget, right - LEFT),
            ((LEFT + right) / 2, HEIGHT - 10),
            text(&palette::INK, HPos::Center),
        ))?;
        area.draw(&Text::new(
            super::fitted(retain, bottom - TOP),
            (12, (TOP + bottom) / 2),
            text(&palette::INK, HPos::Center).transform(FontTransform::Rotate270),
        ))?;
        let mut front: Vec<&Point> = points.iter().filter(|point| point.on_front).collect();
        front.sort_by(|a, b| a.forget.total_cmp(&b.forget));
        if front.len() > 1 {
            let line: Vec<(i32, i32)> = front
                .iter()
                .map(|point| (x(point.forget), y(point.retain)))
                .collect();
            area.draw(&PathElement::new(line, palette::AFTER.stroke_width(2)))?;
        }
        for point in points {
            let at = (x(point.forget), y(point.retain));
            match point.on_front {
                true => area.draw(&Circle::new(at, 5, palette::AFTER.filled()))?,
                false => area.draw(&Circle::new(at, 4, palette::BEFORE.stroke_width(2)))?,
            }
            if point.picked {
                area.draw(&Circle::new(at, 10, palette::RETRAINED.stroke_width(3)))?;
            }
        }
        Ok(())
    })
}
