//! What all image processors read from their settings file and do alike: load, resize with a filter,
//! rescale and normalize. Where an image goes in between, crops, tiles, patches, is the family's.

#![warn(clippy::indexing_slicing)]

use ndarray::{Array3, ArrayView3};
use sha2::{Digest, Sha256};

use super::config::{Json, shown};
use super::resize::{Filter, resize};
use super::{Error, ImageBackend, ImageKey, ModelDir, image};
use crate::dataset::ImageSource;

/// CLIP's `image_mean` and `image_std`.
pub const CLIP: ([f64; 3], [f64; 3]) = (
    [0.481_454_66, 0.457_827_5, 0.408_210_73],
    [0.268_629_54, 0.261_302_58, 0.275_777_11],
);
/// SigLIP's.
pub const HALF: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);

/// The arithmetic of an image processor's settings, checked.
#[derive(Debug)]
pub struct ImageSettings {
    backend: ImageBackend,
    filter: Filter,
    levels: Box<[[f32; 256]; 3]>,
}

/// An image, decoded.
#[derive(Debug)]
pub struct Loaded {
    /// Its encoded bytes, for [`ImageSettings::key`].
    pub file: bytes::Bytes,
    /// `[H, W, 3]`, upright RGB.
    pub pixels: Array3<u8>,
}

impl ImageSettings {
    /// Reads `resample`, `rescale_factor`, `image_mean` and `image_std`; `filter` and `(mean, std)` are
    /// what the family's processor takes where the file names none.
    ///
    /// # Errors
    /// [`Error::Config`]: a field of the wrong type, a filter that is not known, or resizing,
    /// rescaling or normalizing switched off.
    pub(crate) fn read(
        model: &ModelDir,
        config: &Json,
        filter: Filter,
        normalization: ([f64; 3], [f64; 3]),
    ) -> Result<ImageSettings, Error> {
        Self::read_with(model.backend(config), config, filter, normalization)
    }

    /// [`ImageSettings::read`] for families whose processor knows the slow image processor only.
    ///
    /// # Errors
    /// As [`ImageSettings::read`], and [`Error::Config`] where the fast one was asked for.
    pub(crate) fn read_slow(
        model: &ModelDir,
        config: &Json,
        filter: Filter,
        normalization: ([f64; 3], [f64; 3]),
    ) -> Result<ImageSettings, Error> {
        if model.chosen_backend() == Some(ImageBackend::Torchvision) {
            let expected = "the slow image processor, the only one of this family";
            return Err(config.field("image_processor_type", expected, "the fast one"));
        }
        Self::read_with(ImageBackend::Pillow, config, filter, normalization)
    }

    fn read_with(
        backend: ImageBackend,
        config: &Json,
        filter: Filter,
        (mean, std): ([f64; 3], [f64; 3]),
    ) -> Result<ImageSettings, Error> {
        for switch in ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"] {
            config.must_be_on(switch)?;
        }
        let filter = match config.get("resample") {
            None | Some(serde_json::Value::Null) => filter,
            Some(value) => value
                .as_i64()
                .and_then(Filter::from_pillow)
                .ok_or_else(|| {
                    config.field(
                        "resample",
                        "1 (Lanczos), 2 (bilinear) or 3 (bicubic)",
                        &shown(value),
                    )
                })?,
        };
        let rescale_factor = config.number_or("rescale_factor", 1.0 / 255.0)?;
        let mean = config.three_or("image_mean", mean)?;
        let std = config.three_or("image_std", std)?;
        let levels = Box::new(normalization(backend, rescale_factor, mean, std));
        if !levels.iter().flatten().all(|value| value.is_finite()) {
            return Err(config.field(
                "image_std",
                "values that give finite pixel values",
                &format!("{std:?}"),
            ));
        }
        Ok(ImageSettings {
            backend,
            filter,
            levels,
        })
    }

    /// Whose arithmetic is followed.
    #[must_use]
    pub fn backend(&self) -> ImageBackend {
        self.backend
    }

    /// What each level of each channel becomes: `[channel][level]`.
    #[must_use]
    pub fn levels(&self) -> &[[f32; 256]; 3] {
        &self.levels
    }

    /// The key of what these settings make of a file. `geometry` is whatever else decides it: the
    /// family, sizes, tiles.
    #[must_use]
    pub fn key(&self, geometry: &impl std::fmt::Debug, file: &[u8]) -> ImageKey {
        let settings = format!("{geometry:?} {:?} {:?}", self.backend, self.filter);
        let mut digest = Sha256::new();
        digest.update(settings.len().to_le_bytes());
        digest.update(settings);
        for value in self.levels.iter().flatten() {
            digest.update(value.to_le_bytes());
        }
        ImageKey(digest.chain_update(file).finalize().into())
    }

    /// Reads and decodes an image.
    ///
    /// # Errors
    /// As [`image::read`] and [`image::decode_rgb`].
    pub fn load(&self, source: &ImageSource) -> Result<Loaded, Error> {
        let file = image::read(source)?;
        let pixels = image::decode_rgb(source.origin(), &file)?;
        Ok(Loaded { file, pixels })
    }

    /// Resizes `[H, W, 3]` with the settings' filter.
    ///
    /// # Errors
    /// As [`resize()`].
    pub fn resize(
        &self,
        image: ArrayView3<'_, u8>,
        height: usize,
        width: usize,
    ) -> Result<Array3<u8>, Error> {
        resize(image, height, width, self.filter, self.backend)
    }

    /// Rescaled and normalized, with the channels first: `[3, H, W]`.
    #[must_use]
    pub fn normalize(&self, image: ArrayView3<'_, u8>) -> Array3<f32> {
        let (height, width, _) = image.dim();
        let mut values = Array3::zeros((3, height, width));
        let planes = image.axis_iter(ndarray::Axis(2));
        for ((mut plane, levels), source) in
            values.outer_iter_mut().zip(self.levels.iter()).zip(planes)
        {
            ndarray::Zip::from(&mut plane)
                .and(&source)
                .for_each(|value, &level| {
                    *value = levels.get(usize::from(level)).copied().unwrap_or_default();
                });
        }
        values
    }
}

/// What every level (0–255) of every channel becomes: `[channel][level]`. As there are only 256,
/// both libraries' arithmetic is followed to the last bit at no cost.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the libraries round to float32 here"
)]
pub fn normalization(
    backend: ImageBackend,
    rescale_factor: f64,
    mean: [f64; 3],
    std: [f64; 3],
) -> [[f32; 256]; 3] {
    let channel = |mean: f64, std: f64| {
        let (mean, std) = (mean as f32, std as f32);
        std::array::from_fn(|level| {
            let level = level as f32;
            match backend {
                // Rescale and normalize in one: the float32 mean and std are scaled up instead.
                ImageBackend::Torchvision => {
                    let scale = (1.0 / rescale_factor) as f32;
                    (level - mean * scale) / (std * scale)
                }
                // numpy: rescale in float64, round, normalize in float32.
                ImageBackend::Pillow => ((f64::from(level) * rescale_factor) as f32 - mean) / std,
            }
        })
    };
    let ([red, green, blue], [red_std, green_std, blue_std]) = (mean, std);
    [
        channel(red, red_std),
        channel(green, green_std),
        channel(blue, blue_std),
    ]
}
