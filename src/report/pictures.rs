//! The pictures of evaluated samples, small, as `data:` URIs.
//!
//! In: data sets. Out: a JPEG of at most 112 pixels a side for each sample that has a picture,
//! found by the set's digest and the sample's id. Promise: what is put into a page was decoded and
//! encoded again: nothing of a picture's file but its pixels gets there.

use std::collections::BTreeMap;
use std::io::Cursor;

use base64::Engine as _;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, RgbImage};

use super::Error;
use crate::dataset::{Dataset, ImageSource};
use crate::preprocess::image::{decode_rgb, read};

/// Longest side, in pixels.
const SIDE: u32 = 112;
/// JPEG quality, from 1 to 100.
const QUALITY: u8 = 80;

/// Pictures by set and sample.
#[derive(Clone, Debug, Default)]
pub struct Pictures {
    /// By the set's digest and the sample's id.
    uris: BTreeMap<(String, String), String>,
}

impl Pictures {
    /// Reads the pictures of the first `limit` samples of each set.
    ///
    /// # Errors
    /// A picture can no longer be read, or is none.
    pub fn of<'d>(
        sets: impl IntoIterator<Item = &'d Dataset>,
        limit: usize,
    ) -> Result<Pictures, Error> {
        let mut uris = BTreeMap::new();
        for set in sets {
            let digest = set.content_sha256()?;
            for sample in set.samples.iter().take(limit) {
                if let Some(image) = &sample.image {
                    uris.insert((digest.clone(), sample.id.clone()), uri(image)?);
                }
            }
        }
        Ok(Pictures { uris })
    }

    /// The picture of a sample.
    pub fn get(&self, set_sha256: &str, id: &str) -> Option<&str> {
        let key = (set_sha256.to_owned(), id.to_owned());
        self.uris.get(&key).map(String::as_str)
    }
}

fn uri(source: &ImageSource) -> Result<String, Error> {
    let pixels = decode_rgb(source.origin(), &read(source)?)?;
    let (height, width, _) = pixels.dim();
    let bytes = pixels.as_standard_layout().iter().copied().collect();
    let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
    // The lengths are those of the pixels that were just decoded.
    let image = RgbImage::from_raw(side(width), side(height), bytes).unwrap_or_default();
    let mut image = DynamicImage::from(image);
    if image.width().max(image.height()) > SIDE {
        image = image.thumbnail(SIDE, SIDE);
    }
    let mut encoded = Cursor::new(Vec::new());
    image.write_with_encoder(JpegEncoder::new_with_quality(&mut encoded, QUALITY))?;
    let text = base64::engine::general_purpose::STANDARD.encode(encoded.into_inner());
    Ok(format!("data:image/jpeg;base64,{text}"))
}
