//! Antialiased resize of 8-bit images, exactly as Pillow and as torchvision do it.
//!
//! Both run a separable filter in fixed point and clamp to 8 bits between the passes; they differ
//! in how the weights are rounded:
//! - Pillow (`src/libImaging/Resample.c`): 22 fractional bits. The horizontal pass comes first.
//!   (Pillow 13 takes the vertical pass first where the height shrinks much more than the width,
//!   python-pillow/Pillow#9549, which moves up to ten levels; that order is not followed.)
//! - torchvision on CPU (`ATen/native/cpu/UpSampleKernel.cpp`, uint8 with `antialias=True`): 16-bit
//!   weights, with as many fractional bits as the largest weight of the axis leaves room for.

use ndarray::{Array3, ArrayView3};
use rayon::prelude::*;

use super::{Error, ImageBackend};

/// Larger sides are refused: sizes stay far from what 32-bit sums hold.
pub const MAX_SIDE: usize = 1 << 16;

const CHANNELS: usize = 3;

/// An interpolation filter; the numbers are Pillow's (`resample` in preprocessor_config.json).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// 1, Pillow only.
    Lanczos,
    /// 2.
    Bilinear,
    /// 3, with `a = -0.5`.
    Bicubic,
}

impl Filter {
    /// The filter of Pillow's number, where it is one of these.
    #[must_use]
    pub fn from_pillow(number: i64) -> Option<Self> {
        match number {
            1 => Some(Self::Lanczos),
            2 => Some(Self::Bilinear),
            3 => Some(Self::Bicubic),
            _ => None,
        }
    }

    /// Half the filter's width, in source pixels at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    /// The filter's value; the order of operations is each library's own, as rounding depends on
    /// it.
    fn weight(self, backend: ImageBackend, x: f64) -> f64 {
        const A: f64 = -0.5;
        let distance = x.abs();
        match (self, backend) {
            (Self::Bilinear, _) if distance < 1.0 => 1.0 - distance,
            (Self::Bicubic, _) if distance < 1.0 => {
                ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0
            }
            (Self::Bicubic, ImageBackend::Pillow) if distance < 2.0 => {
                (((distance - 5.0) * distance + 8.0) * distance - 4.0) * A
            }
            (Self::Bicubic, ImageBackend::Torchvision) if distance < 2.0 => {
                ((A * distance - 5.0 * A) * distance + 8.0 * A) * distance - 4.0 * A
            }
            (Self::Lanczos, _) if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * std::f64::consts::PI;
    x.sin() / x
}

/// Resizes `[H, W, 3]` to `[height, width, 3]`.
///
/// # Errors
/// [`Error::ResizeSize`] for a side of 0 or past [`MAX_SIDE`]; [`Error::Filter`] for Lanczos with
/// torchvision, which has none.
pub fn resize(
    image: ArrayView3<'_, u8>,
    height: usize,
    width: usize,
    filter: Filter,
    backend: ImageBackend,
) -> Result<Array3<u8>, Error> {
    let (old_height, old_width, channels) = image.dim();
    let size_error = Error::ResizeSize {
        width: old_width,
        height: old_height,
        new_width: width,
        new_height: height,
    };
    let sides = [old_height, old_width, height, width];
    if channels != CHANNELS || sides.iter().any(|side| !(1..=MAX_SIDE).contains(side)) {
        return Err(size_error);
    }
    if filter == Filter::Lanczos && backend == ImageBackend::Torchvision {
        return Err(Error::Filter {
            backend: "torchvision",
            filter: "Lanczos",
        });
    }
    // A pass over an axis that keeps its length is left out, as both libraries do.
    let mut levels: Vec<u8> = image.iter().copied().collect();
    if width != old_width {
        let windows = Windows::new(old_width, width, filter, backend);
        levels = horizontal(&levels, old_width, &windows);
    }
    if height != old_height {
        let windows = Windows::new(old_height, height, filter, backend);
        levels = vertical(&levels, width, &windows);
    }
    Array3::from_shape_vec((height, width, CHANNELS), levels).map_err(|_| size_error)
}

/// Rows of `width` pixels → rows of as many pixels as there are windows.
fn horizontal(levels: &[u8], width: usize, windows: &Windows) -> Vec<u8> {
    let new_width = windows.starts.len();
    let mut output = vec![0; levels.len() / width * new_width];
    let rows = levels.par_chunks_exact(width * CHANNELS);
    rows.zip(output.par_chunks_exact_mut(new_width * CHANNELS))
        .for_each(|(row, target)| {
            for ((start, weights), pixel) in windows.iter().zip(target.chunks_exact_mut(CHANNELS)) {
                let mut sums = [0_i32; CHANNELS];
                for (source, &weight) in row.chunks_exact(CHANNELS).skip(start).zip(weights) {
                    for (sum, &level) in sums.iter_mut().zip(source) {
                        *sum += i32::from(level) * weight;
                    }
                }
                pixel
                    .iter_mut()
                    .zip(sums)
                    .for_each(|(level, sum)| *level = windows.round(sum));
            }
        });
    output
}

/// Rows of `width` pixels → as many rows as there are windows.
fn vertical(levels: &[u8], width: usize, windows: &Windows) -> Vec<u8> {
    let stride = width * CHANNELS;
    let mut output = vec![0; windows.starts.len() * stride];
    let targets = output
        .par_chunks_exact_mut(stride)
        .zip(&windows.starts)
        .zip(&windows.weights);
    targets.for_each(|((target, &start), weights)| {
        let mut sums = vec![0_i32; stride];
        for (row, &weight) in levels.chunks_exact(stride).skip(start).zip(weights) {
            for (sum, &level) in sums.iter_mut().zip(row) {
                *sum += i32::from(level) * weight;
            }
        }
        target
            .iter_mut()
            .zip(sums)
            .for_each(|(level, sum)| *level = windows.round(sum));
    });
    output
}

/// The filter of one axis: for every output position, the first source position and the fixed-point
/// weights from there on.
struct Windows {
    /// Fractional bits of the weights.
    precision: u32,
    starts: Vec<usize>,
    weights: Vec<Vec<i32>>,
}

impl Windows {
    #[expect(clippy::cast_precision_loss, reason = "sides are at most 65,536")]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "C's own casts; negative is clamped first"
    )]
    fn new(old: usize, new: usize, filter: Filter, backend: ImageBackend) -> Self {
        let scale = old as f64 / new as f64;
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        let inverse = 1.0 / stretch;

        let mut starts = Vec::with_capacity(new);
        let mut windows = Vec::with_capacity(new);
        for position in 0..new {
            let center = (position as f64 + 0.5) * scale;
            let start = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(old);
            let mut window: Vec<f64> = (start..end)
                .map(|source| filter.weight(backend, (source as f64 - center + 0.5) * inverse))
                .collect();
            let total: f64 = window.iter().fold(0.0, |total, weight| total + weight);
            if total != 0.0 {
                window.iter_mut().for_each(|weight| *weight /= total);
            }
            starts.push(start);
            windows.push(window);
        }

        let largest = windows
            .iter()
            .flatten()
            .fold(0.0_f64, |largest, &weight| largest.max(weight));
        let precision = match backend {
            ImageBackend::Pillow => 32 - 8 - 2,
            // The most bits with which the largest weight still fits 16 bits.
            ImageBackend::Torchvision => (0..22)
                .find(|bits| 0.5 + largest * f64::from(1 << (bits + 1)) >= f64::from(1 << 15))
                .unwrap_or(22),
        };
        let one = f64::from(1 << precision);
        let fixed = |weight: f64| (weight * one + if weight < 0.0 { -0.5 } else { 0.5 }) as i32;
        let weights = windows
            .into_iter()
            .map(|window| window.into_iter().map(fixed).collect())
            .collect();
        Self {
            precision,
            starts,
            weights,
        }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.starts
            .iter()
            .copied()
            .zip(self.weights.iter().map(Vec::as_slice))
    }

    /// A fixed-point sum as a level.
    #[expect(clippy::cast_sign_loss, reason = "clamped to 0..=255")]
    fn round(&self, sum: i32) -> u8 {
        ((sum + (1 << (self.precision - 1))) >> self.precision).clamp(0, 255) as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BACKENDS: [ImageBackend; 2] = [ImageBackend::Pillow, ImageBackend::Torchvision];

    proptest! {
        #[test]
        fn a_flat_image_stays_flat(
            (height, width) in (1_usize..90, 1_usize..90),
            to in (1_usize..90, 1_usize..90),
            level: u8,
        ) {
            let image = Array3::from_elem((height, width, 3), level);
            for backend in BACKENDS {
                let resized = resize(image.view(), to.0, to.1, Filter::Bicubic, backend).unwrap();
                prop_assert_eq!(resized.dim(), (to.0, to.1, 3));
                prop_assert!(resized.iter().all(|&value| value.abs_diff(level) <= 1));
            }
        }
    }

    #[test]
    fn the_same_size_is_the_same_image() {
        let image = Array3::from_shape_fn((5, 7, 3), |(row, column, channel)| {
            u8::try_from(row * 31 + column * 7 + channel).unwrap()
        });
        for backend in BACKENDS {
            assert_eq!(
                resize(image.view(), 5, 7, Filter::Bilinear, backend).unwrap(),
                image
            );
        }
    }

    #[test]
    fn sides_of_no_length_or_past_the_limit_are_refused() {
        let image = Array3::<u8>::zeros((2, 2, 3));
        for (height, width) in [(0, 2), (2, 0), (MAX_SIDE + 1, 2)] {
            assert!(matches!(
                resize(
                    image.view(),
                    height,
                    width,
                    Filter::Bicubic,
                    ImageBackend::Pillow
                ),
                Err(Error::ResizeSize { .. })
            ));
        }
        assert!(
            resize(
                Array3::zeros((0, 2, 3)).view(),
                2,
                2,
                Filter::Bicubic,
                ImageBackend::Pillow
            )
            .is_err()
        );
        assert!(
            resize(
                image.view(),
                3,
                3,
                Filter::Lanczos,
                ImageBackend::Torchvision
            )
            .is_err()
        );
    }
}
