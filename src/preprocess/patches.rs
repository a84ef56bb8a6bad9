//! Pixels → patches, for the Qwen2-VL line of vision encoders: which size an image is resized to, and
//! in which order the patches lie. Source: transformers 4.57, `image_processing_qwen2_vl.py` and
//! `…_fast.py`.

use ndarray::{Array2, ArrayView3};

use super::Error;

/// The largest ratio of the longer to the shorter side, as in transformers.
pub const MAX_ASPECT_RATIO: u32 = 200;

/// Height and width to resize to: both divisible by `factor`, the number of pixels within
/// `min_pixels..=max_pixels` where whole factors allow it, the aspect ratio kept as well as they
/// allow.
///
/// # Errors
/// [`Error::AspectRatio`]; [`Error::ResizeSize`] for a side or a factor of 0.
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(usize, usize), Error> {
    if height == 0 || width == 0 || factor == 0 || max_pixels == 0 {
        return Err(Error::ResizeSize {
            width,
            height,
            new_width: factor,
            new_height: factor,
        });
    }
    let (long, short) = (height.max(width), height.min(width));
    if long as f64 / short as f64 > f64::from(MAX_ASPECT_RATIO) {
        return Err(Error::AspectRatio {
            width,
            height,
            limit: MAX_ASPECT_RATIO,
        });
    }
    let unit = factor as f64;
    let (rows, columns) = (height as f64, width as f64);
    // Python's `round`: half to even.
    let rounded = (
        (rows / unit).round_ties_even() * unit,
        (columns / unit).round_ties_even() * unit,
    );
    let (new_rows, new_columns) = if rounded.0 * rounded.1 > max_pixels as f64 {
        let beta = (rows * columns / max_pixels as f64).sqrt();
        let floor = |side: f64| unit.max((side / beta / unit).floor() * unit);
        (floor(rows), floor(columns))
    } else if rounded.0 * rounded.1 < min_pixels as f64 {
        let beta = (min_pixels as f64 / (rows * columns)).sqrt();
        let ceil = |side: f64| (side * beta / unit).ceil() * unit;
        (ceil(rows), ceil(columns))
    } else {
        rounded
    };
    Ok((whole(new_rows), whole(new_columns)))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a whole, non-negative number of pixels"
)]
fn whole(side: f64) -> usize {
    side as usize
}

/// Patch geometry of a vision encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchLayout {
    /// Side of a patch, in pixels (`P`).
    pub patch_size: usize,
    /// Patches per side that are merged into one token (`m`).
    pub merge_size: usize,
    /// Frames per patch; a still image is repeated (`T`).
    pub temporal_patch_size: usize,
}

/// Cuts `[H, W, 3]` into `[h·w, 3·T·P·P]` and says the grid `[1, h, w]`.
///
/// Rows go by merged block, then by patch within the block; a row holds channel, frame, row,
/// column. `H` and `W` must be multiples of `P·m` (as [`smart_resize`] makes them); what is past
/// the last whole block is left out.
#[must_use]
pub fn flatten(
    image: ArrayView3<'_, u8>,
    layout: PatchLayout,
    levels: &[[f32; 256]; 3],
) -> (Array2<f32>, [usize; 3]) {
    let PatchLayout {
        patch_size,
        merge_size,
        temporal_patch_size,
    } = layout;
    let (height, width, _) = image.dim();
    let (blocks_down, blocks_across) = (
        height / (patch_size * merge_size),
        width / (patch_size * merge_size),
    );
    let grid = [1, blocks_down * merge_size, blocks_across * merge_size];
    let mut patches = Array2::zeros((
        grid[1] * grid[2],
        3 * temporal_patch_size * patch_size * patch_size,
    ));

    for (index, mut patch) in patches.rows_mut().into_iter().enumerate() {
        let (block, within) = (
            index / (merge_size * merge_size),
            index % (merge_size * merge_size),
        );
        let top = (block / blocks_across * merge_size + within / merge_size) * patch_size;
        let left = (block % blocks_across * merge_size + within % merge_size) * patch_size;
        let pixels = image.slice(ndarray::s![
            top..top + patch_size,
            left..left + patch_size,
            ..
        ]);
        let mut values = patch.iter_mut();
        for (channel, levels) in levels.iter().enumerate() {
            for _frame in 0..temporal_patch_size {
                for (&level, value) in pixels
                    .index_axis(ndarray::Axis(2), channel)
                    .iter()
                    .zip(values.by_ref())
                {
                    *value = levels[usize::from(level)];
                }
            }
        }
    }
    (patches, grid)
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_those_of_transformers() {
        // transformers 4.57.1's `smart_resize`, called with the same arguments.
        for ((height, width, min, max), expected) in [
            ((37, 211, 3136, 50176), (28, 224)),
            ((20, 20, 3136, 50176), (56, 56)),
            ((700, 1200, 3136, 50176), (168, 280)),
            ((42, 70, 784, 50176), (56, 56)),
            ((14, 98, 784, 1_003_520), (28, 84)),
            ((1, 200, 3136, 50176), (28, 812)),
        ] {
            assert_eq!(
                smart_resize(height, width, 28, min, max).unwrap(),
                expected,
                "{height}×{width}"
            );
        }
    }

    #[test]
    fn too_thin_an_image_is_an_error() {
        assert!(smart_resize(200, 1, 28, 3136, 50176).is_ok());
        let error = smart_resize(201, 1, 28, 3136, 50176).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1×201 pixels: the aspect ratio must be at most 200"
        );
        assert!(smart_resize(0, 1, 28, 3136, 50176).is_err());
    }

    proptest! {
        #[test]
        fn both_sides_are_positive_multiples_of_the_factor(
            height in 1_usize..9000,
            width in 1_usize..9000,
        ) {
            if let Ok((rows, columns)) = smart_resize(height, width, 28, 3136, 50176) {
                prop_assert!(rows > 0 && columns > 0 && rows % 28 == 0 && columns % 28 == 0);
            }
        }
    }

    #[test]
    fn patches_of_a_block_lie_together_and_frames_are_repeated() {
        // 4 × 8 pixels, patches of 2, merged 2 by 2: two blocks of four patches.
        let image = Array3::from_shape_fn((4, 8, 3), |(row, column, _)| {
            u8::try_from(row * 8 + column).unwrap()
        });
        let mut levels = [[0.0; 256]; 3];
        for channel in &mut levels {
            for (level, value) in channel.iter_mut().enumerate() {
                *value = f32::from(u8::try_from(level).unwrap());
            }
        }
        let layout = PatchLayout {
            patch_size: 2,
            merge_size: 2,
            temporal_patch_size: 2,
        };
        let (patches, grid) = flatten(image.view(), layout, &levels);
        assert_eq!((patches.dim(), grid), ((8, 24), [1, 2, 4]));
        let firsts: Vec<f32> = patches.column(0).to_vec();
        assert_eq!(firsts, [0.0, 2.0, 16.0, 18.0, 4.0, 6.0, 20.0, 22.0]);
        assert_eq!(
            patches.row(0).to_vec()[..8],
            [0.0, 1.0, 8.0, 9.0, 0.0, 1.0, 8.0, 9.0]
        );
    }
}
