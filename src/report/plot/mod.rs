//! Plots, as SVG to be put into a page.
//!
//! In: numbers. Out: one `<svg>` element each, drawn by `plotters`. Promises: no script, no style
//! element, no reference to anything outside; text from files is escaped by the library; what is told
//! by colour is told by shape or position too.
//!
//! The colours are those of the page's light theme. They are few and fixed, so that the page's style
//! sheet can name them and put others in their place ([`palette`]).

pub(super) mod heat;
pub(super) mod intervals;
pub(super) mod layers;
pub(super) mod tradeoff;

use plotters::backend::SVGBackend;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{IntoFont as _, RGBColor, TextStyle};

/// Colours that `page.css` names.
pub(super) mod palette {
    use plotters::style::RGBColor;

    /// Text.
    pub(in super::super) const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
    /// Text and axes that stand back.
    pub(in super::super) const MUTED: RGBColor = RGBColor(0x59, 0x63, 0x6e);
    /// Grid lines.
    pub(in super::super) const GRID: RGBColor = RGBColor(0xd1, 0xd9, 0xe0);
    /// The untouched model.
    pub(in super::super) const BEFORE: RGBColor = RGBColor(0x6e, 0x77, 0x81);
    /// The unlearned model, and what was done to it.
    pub(in super::super) const AFTER: RGBColor = RGBColor(0x09, 0x69, 0xda);
    /// The model that never saw what is to be forgotten.
    pub(in super::super) const RETRAINED: RGBColor = RGBColor(0xbc, 0x4c, 0x00);
}

/// Why a plot was not drawn.
pub(super) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Width of every plot: wide enough for a column of a page, narrow enough that its text can be read on
/// a phone.
const WIDTH: u32 = 420;
/// Size of text as the library takes it. What it writes is `font-size` = size / 1.24.
const TEXT: i32 = 16;
/// About how wide a character of a sans-serif font of that size is.
const CHARACTER: f64 = 7.3;

type Area<'s> = DrawingArea<SVGBackend<'s>, plotters::coord::Shift>;

/// Draws one `<svg>` of [`WIDTH`] × `height`.
fn svg(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<(), Error>) -> Result<String, Error> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        draw(&area)?;
        area.present()?;
    }
    // An XML declaration has no place in the middle of a page.
    let start = text.find("<svg").unwrap_or(0);
    Ok(text.get(start..).unwrap_or_default().trim().to_owned())
}

fn text(color: &RGBColor, horizontal: HPos) -> TextStyle<'_> {
    TextStyle::from(("sans-serif", TEXT).into_font())
        .color(color)
        .pos(Pos::new(horizontal, VPos::Center))
}

/// About how wide a label is.
fn width(label: &str) -> i32 {
    px((f64::from(units(label.chars().count())) * CHARACTER).ceil())
}

/// A label that fits into `width` units, cut with an ellipsis where it must be.
fn fitted(label: &str, width: i32) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // A few dozen.
    let fits = (f64::from(width.max(0)) / CHARACTER) as usize;
    if label.chars().count() <= fits {
        return label.to_owned();
    }
    let cut: String = label.chars().take(fits.saturating_sub(1)).collect();
    format!("{cut}…")
}

/// A whole number of units. Coordinates of plots are small.
#[allow(clippy::cast_possible_truncation)]
fn px(value: f64) -> i32 {
    value.round() as i32
}

/// A count as a coordinate.
fn units(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
