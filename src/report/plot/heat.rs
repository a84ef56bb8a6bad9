//! Gates per layer and neuron.

use plotters::element::{Rectangle, Text};
use plotters::style::Color as _;
use plotters::style::text_anchor::HPos;

use super::{Error, WIDTH, palette, px, svg, text, units};
use crate::graph::LayerId;

const LEFT: i32 = 44;
const RIGHT: i32 = 10;
const TOP: i32 = 4;
const BOTTOM: i32 = 28;
/// Cells in a row, at most: more are too small to be seen.
const CELLS: usize = 183;

/// A drawn map, and what one cell of it is.
pub(in super::super) struct HeatMap {
    /// The drawing.
    pub(in super::super) svg: String,
    /// The most neurons that share a cell.
    pub(in super::super) neurons_per_cell: usize,
}

/// A row for each layer, neurons from left to right; a cell is the darker, the smaller its mean gate: a
/// gate of 1 leaves no mark, 0 is solid. Gates above 1 count as 1, negative ones as 0.
///
/// # Errors
/// What the drawing library reports.
pub(in super::super) fn plot(layers: &[(LayerId, &[f32])]) -> Result<HeatMap, Error> {
    let row = match layers.len() {
        0..=8 => 26,
        9..=24 => 16,
        _ => 10,
    };
    let plot_height = row * units(layers.len());
    let right = i32::try_from(WIDTH)? - RIGHT;
    let widest = layers.iter().map(|(_, gates)| gates.len()).max();
    let widest = widest.unwrap_or(0);
    let drawn = svg(u32::try_from(TOP + plot_height + BOTTOM)?, |area| {
        for (index, (layer, gates)) in layers.iter().enumerate() {
            let top = TOP + units(index) * row;
            // Where rows are low, every second layer is named.
            if row > 12 || index % 2 == 0 {
                let at = (LEFT - 8, top + row / 2);
                area.draw(&Text::new(
                    layer.to_string(),
                    at,
                    text(&palette::MUTED, HPos::Right),
                ))?;
            }
            let frame = Rectangle::new(
                [(LEFT, top + 1), (right, top + row - 1)],
                palette::GRID.stroke_width(1),
            );
            area.draw(&frame)?;
            let cells = gates.len().clamp(1, CELLS);
            let width = f64::from(right - LEFT) / f64::from(units(cells));
            for cell in 0..cells {
                let start = cell * gates.len() / cells;
                let end = (cell + 1) * gates.len() / cells;
                let of_cell = gates.get(start..end).unwrap_or_default();
                let darkness = 1.0 - mean(of_cell);
                if darkness < 0.005 {
                    continue;
                }
                let x = |cell: usize| LEFT + px(f64::from(units(cell)) * width);
                let shape = [(x(cell), top + 1), (x(cell + 1), top + row - 1)];
                area.draw(&Rectangle::new(
                    shape,
                    palette::AFTER.mix(darkness).filled(),
                ))?;
            }
        }
        let y = TOP + plot_height + BOTTOM / 2;
        for (x, label, side) in [
            (LEFT, "neuron 0".to_owned(), HPos::Left),
            (right, widest.saturating_sub(1).to_string(), HPos::Right),
        ] {
            area.draw(&Text::new(label, (x, y), text(&palette::MUTED, side)))?;
        }
        area.draw(&Text::new(
            "layer",
            (LEFT - 8, y),
            text(&palette::MUTED, HPos::Right),
        ))?;
        Ok(())
    })?;
    Ok(HeatMap {
        svg: drawn,
        neurons_per_cell: widest.div_ceil(CELLS).max(1),
    })
}

fn mean(gates: &[f32]) -> f64 {
    let sum: f64 = gates
        .iter()
        .map(|&gate| f64::from(gate).clamp(0.0, 1.0))
        .sum();
    match gates.len() {
        0 => 1.0,
        count => sum / f64::from(units(count)),
    }
}
