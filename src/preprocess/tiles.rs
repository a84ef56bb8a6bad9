//! Tiles: what high-resolution families cut an image into, so that a vision encoder of one size sees
//! all of it.

use ndarray::{ArrayView3, s};

/// The most pixels that a configuration may ask all tiles of an image to come to.
pub const MAX_PIXELS: usize = 1 << 26;

/// The longest side that a configuration may ask a tile, or an image that is not cut, to have.
pub const MAX_SIDE: usize = 4096;

/// Cuts `[H, W, 3]` into tiles of `[height, width, 3]`, row by row. What is past the last whole tile is
/// left out; families make both sides multiples of the tile's.
#[must_use]
pub fn cut(image: ArrayView3<'_, u8>, height: usize, width: usize) -> Vec<ArrayView3<'_, u8>> {
    let (image_height, image_width, _) = image.dim();
    let tops = (0..image_height.checked_div(height).unwrap_or(0)).map(|row| row * height);
    tops.flat_map(|top| {
        let lefts = (0..image_width.checked_div(width).unwrap_or(0)).map(|column| column * width);
        lefts.map(move |left| image.slice_move(s![top..top + height, left..left + width, ..]))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;

    #[test]
    fn tiles_go_row_by_row_and_a_rest_is_left_out() {
        let image = Array3::from_shape_fn((5, 6, 3), |(row, column, _)| {
            u8::try_from(row * 10 + column).unwrap_or(u8::MAX)
        });
        let tiles = cut(image.view(), 2, 3);
        let corners: Vec<u8> = tiles.iter().map(|tile| tile[(0, 0, 0)]).collect();
        assert_eq!(corners, [0, 3, 20, 23]);
        assert!(tiles.iter().all(|tile| tile.dim() == (2, 3, 3)));
        assert!(cut(image.view(), 0, 0).is_empty());
    }
}
