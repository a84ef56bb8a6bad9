//! Encoded image → upright RGB pixels, as transformers' `load_image` gets them from Pillow: open,
//! `ImageOps.exif_transpose`, `convert("RGB")`.
//!
//! The format is told by the first bytes, never by the name. The header's size is checked before
//! pixels are allocated, and a panic of a decoder is contained. PNG and WebP decode to Pillow's
//! pixels exactly; JPEG decoders round differently (`tests/preprocess_qwen2_vl.rs` states by how
//! much).

#![warn(clippy::indexing_slicing)]

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::LazyLock;

use bytes::Bytes;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use ndarray::Array3;
use regex::bytes::Regex;

use super::Error;
use super::tokenizer::panic_message;
use crate::dataset::ImageSource;
use crate::files::read_limited;
use crate::limits::{IMAGE_BYTES, IMAGE_PIXELS};

/// What a decoder may allocate: [`IMAGE_PIXELS`] in the widest layout (16-bit RGBA), and as much again
/// for working memory.
const MAX_ALLOCATION: u64 = 2 * 8 * IMAGE_PIXELS;

/// The bytes of an encoded image: a file's, or those that the dataset holds.
///
/// # Errors
/// [`Error::Files`].
pub fn read(image: &ImageSource) -> Result<Bytes, Error> {
    match image {
        ImageSource::File(path) => Ok(read_limited(path, IMAGE_BYTES)?.into()),
        ImageSource::Bytes { origin, bytes } if bytes.len() as u64 > IMAGE_BYTES => {
            Err(Error::Files(crate::files::Error::TooLarge {
                path: origin.clone(),
                limit: IMAGE_BYTES,
                found: bytes.len() as u64,
            }))
        }
        ImageSource::Bytes { bytes, .. } => Ok(bytes.clone()),
    }
}

/// Decodes PNG, JPEG or WebP bytes to upright RGB, `[H, W, 3]`. `path` ([`ImageSource::origin`]) is
/// for errors only. Of an animation, the first frame.
///
/// # Errors
/// [`Error::ImageFormat`], [`Error::ImageSize`], [`Error::ImageDecode`], or [`Error::Panic`] where
/// a decoder panicked.
pub fn decode_rgb(path: &Path, bytes: &[u8]) -> Result<Array3<u8>, Error> {
    catch_unwind(AssertUnwindSafe(|| decode(path, bytes))).unwrap_or_else(|payload| {
        Err(Error::Panic {
            path: path.to_path_buf(),
            library: "image",
            message: panic_message(payload.as_ref()),
        })
    })
}

fn decode(path: &Path, bytes: &[u8]) -> Result<Array3<u8>, Error> {
    let failed = |source| Error::ImageDecode {
        path: path.to_path_buf(),
        source,
    };
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        other => {
            let found = other.map_or_else(
                |_| "unknown bytes".to_owned(),
                |format| format!("{format:?}").to_uppercase(),
            );
            return Err(Error::ImageFormat {
                path: path.to_path_buf(),
                found,
            });
        }
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_ALLOCATION);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(failed)?;

    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > IMAGE_PIXELS {
        return Err(Error::ImageSize {
            path: path.to_path_buf(),
            width,
            height,
            limit: IMAGE_PIXELS,
        });
    }
    let orientation = orientation(&mut decoder);
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(failed)?;
    decoded.apply_orientation(orientation);
    let (width, height) = (decoded.width(), decoded.height());
    let rgb = rgb(decoded);
    let found = rgb.len();
    Array3::from_shape_vec((height as usize, width as usize, 3), rgb).map_err(|_| Error::Features {
        expected: format!("{height}×{width}×3 bytes"),
        found: format!("{found}"),
    })
}

/// The orientation by Exif, else by XMP, as Pillow's `getexif` looks for it. Broken metadata is no
/// orientation, as in Pillow.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    #[expect(
        clippy::expect_used,
        reason = "the pattern is a constant, and a test compiles it"
    )]
    static XMP_ORIENTATION: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r#"tiff:Orientation(?:="|>)([0-9])"#).expect("a valid pattern")
    });

    let exif = decoder.exif_metadata().ok().flatten();
    let by_exif = exif.and_then(|exif| {
        // WebP files often keep the prefix that only JPEG calls for.
        Orientation::from_exif_chunk(exif.strip_prefix(b"Exif\0\0").unwrap_or(&exif))
    });
    by_exif
        .or_else(|| {
            let xmp = decoder.xmp_metadata().ok().flatten()?;
            let digit = *XMP_ORIENTATION.captures(&xmp)?.get(1)?.as_bytes().first()?;
            Orientation::from_exif(digit.checked_sub(b'0')?)
        })
        .unwrap_or(Orientation::NoTransforms)
}

/// Pillow's `convert("RGB")`: gray is repeated, alpha is dropped (not blended), and of 16-bit
/// colour the high byte stays. 16-bit gray without alpha is *clipped* to 255, not scaled: that is
/// what Pillow does, so that is what the model was shown. Palettes are resolved by the decoder.
fn rgb(image: DynamicImage) -> Vec<u8> {
    let high = |sample: u16| sample.to_be_bytes()[0];
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageRgba8(image) => image
            .pixels()
            .flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2]])
            .collect(),
        DynamicImage::ImageLuma8(image) => {
            image.pixels().flat_map(|pixel| [pixel.0[0]; 3]).collect()
        }
        DynamicImage::ImageLumaA8(image) => {
            image.pixels().flat_map(|pixel| [pixel.0[0]; 3]).collect()
        }
        DynamicImage::ImageLuma16(image) => image
            .pixels()
            .flat_map(|pixel| [u8::try_from(pixel.0[0]).unwrap_or(u8::MAX); 3])
            .collect(),
        DynamicImage::ImageLumaA16(image) => image
            .pixels()
            .flat_map(|pixel| [high(pixel.0[0]); 3])
            .collect(),
        DynamicImage::ImageRgb16(image) => {
            image.pixels().flat_map(|pixel| pixel.0.map(high)).collect()
        }
        DynamicImage::ImageRgba16(image) => image
            .pixels()
            .flat_map(|pixel| [high(pixel.0[0]), high(pixel.0[1]), high(pixel.0[2])])
            .collect(),
        other => other.into_rgb8().into_raw(),
    }
}
