//! How much of each layer was weakened.

use plotters::element::{PathElement, Rectangle, Text};
use plotters::style::Color as _;
use plotters::style::text_anchor::HPos;

use super::{Error, WIDTH, palette, px, svg, text, units};
use crate::graph::LayerId;

const LEFT: i32 = 44;
const RIGHT: i32 = 56;
const TOP: i32 = 4;
const BOTTOM: i32 = 28;

/// One layer.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Layer {
    /// Decoder layer.
    pub(in super::super) layer: LayerId,
    /// Mean over its neurons of 1 − gate, in [0, 1].
    pub(in super::super) weakened: f64,
}

/// A bar for each layer: the mean of 1 − gate over its neurons.
///
/// # Errors
/// What the drawing library reports.
pub(in super::super) fn plot(layers: &[Layer]) -> Result<String, Error> {
    let row = if layers.len() <= 12 { 24 } else { 15 };
    let plot_height = row * units(layers.len());
    let right = i32::try_from(WIDTH)? - RIGHT;
    let x = |value: f64| LEFT + px(value.clamp(0.0, 1.0) * f64::from(right - LEFT));
    svg(u32::try_from(TOP + plot_height + BOTTOM)?, |area| {
        for quarter in 0..=4u32 {
            let value = f64::from(quarter) / 4.0;
            let line = vec![(x(value), TOP), (x(value), TOP + plot_height)];
            area.draw(&PathElement::new(line, palette::GRID.stroke_width(1)))?;
            let at = (x(value), TOP + plot_height + BOTTOM / 2);
            let label = format!("{} %", quarter * 25);
            area.draw(&Text::new(label, at, text(&palette::MUTED, HPos::Center)))?;
        }
        for (index, layer) in layers.iter().enumerate() {
            let top = TOP + units(index) * row;
            let middle = top + row / 2;
            area.draw(&Text::new(
                layer.layer.to_string(),
                (LEFT - 8, middle),
                text(&palette::MUTED, HPos::Right),
            ))?;
            area.draw(&Rectangle::new(
                [(LEFT, top + 3), (x(layer.weakened), top + row - 3)],
                palette::AFTER.filled(),
            ))?;
            area.draw(&Text::new(
                format!("{:.0} %", 100.0 * layer.weakened),
                (x(layer.weakened) + 6, middle),
                text(&palette::INK, HPos::Left),
            ))?;
        }
        Ok(())
    })
}
