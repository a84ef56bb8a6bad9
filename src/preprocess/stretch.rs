//! Image processors that stretch every image to one size, whatever its shape: SigLIP's and those after it.

use ndarray::Axis;

use super::config::{Json, Size};
use super::image_settings::{HALF, ImageSettings};
use super::resize::Filter;
use super::tensors::NamedTensor;
use super::tiles::MAX_SIDE;
use super::{Error, ImageInputs, ModelDir};
use crate::dataset::ImageSource;

/// One size for all.
#[derive(Debug)]
pub struct Stretch {
    settings: ImageSettings,
    /// In pixels.
    pub height: usize,
    /// In pixels.
    pub width: usize,
}

impl Stretch {
    /// Reads `size` and the settings that all processors have; `filter` where the file names none.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(crate) fn read(model: &ModelDir, config: &Json, filter: Filter) -> Result<Stretch, Error> {
        let (height, width) = match config.size_of("size", true, MAX_SIDE)? {
            Size::Sides { height, width } => (height, width),
            Size::ShortestEdge(_) => {
                return Err(config.field("size", "height and width", "a shortest_edge"));
            }
        };
        Ok(Stretch {
            settings: ImageSettings::read(model, config, filter, HALF)?,
            height,
            width,
        })
    }

    /// `pixel_values` `[1, 3, H, W]`.
    ///
    /// # Errors
    /// The image cannot be read or decoded.
    pub fn inputs(&self, source: &ImageSource) -> Result<ImageInputs, Error> {
        let loaded = self.settings.load(source)?;
        let resized = self
            .settings
            .resize(loaded.pixels.view(), self.height, self.width)?;
        let values = self.settings.normalize(resized.view());
        let geometry = ("stretch", self.height, self.width);
        Ok(ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![NamedTensor::floats(
                "pixel_values",
                values.insert_axis(Axis(0)),
            )],
        })
    }
}
