//! Image features: computed once per image, and put in the place of the image tokens' embeddings.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use ndarray::{Array3, ArrayView2};

use super::{Error, ImageInputs, ImageKey, NamedTensor};

/// What the vision encoder made of the images seen so far. As long as its own layers have no gates that change, one run
/// of it per image serves a whole job; a job with more than `MAX_BYTES` of features starts over with
/// an empty cache whenever that is full.
#[derive(Debug, Default)]
pub struct FeatureCache {
    by_key: HashMap<ImageKey, Vec<NamedTensor>>,
    bytes: usize,
}

/// Memory that cached features may take, in bytes: some 600 images of a 2 B model.
const MAX_BYTES: usize = 1 << 30;

impl FeatureCache {
    /// The vision encoder's outputs for an image: those kept under its key, or what `encode` makes of
    /// it now.
    ///
    /// # Errors
    /// What `encode` returns; nothing is kept then.
    pub fn get_or_encode<E>(
        &mut self,
        image: &ImageInputs,
        encode: impl FnOnce(&ImageInputs) -> Result<Vec<NamedTensor>, E>,
    ) -> Result<&[NamedTensor], E> {
        if self.bytes > MAX_BYTES && !self.by_key.contains_key(&image.key) {
            self.by_key.clear();
            self.bytes = 0;
        }
        match self.by_key.entry(image.key) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let features = encode(image)?;
                self.bytes += features.iter().map(NamedTensor::bytes).sum::<usize>();
                Ok(entry.insert(features))
            }
        }
    }

    /// How many images are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether no image is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

/// Replaces, in order, the embedding of every image token by a row of `features` (transformers'
/// `masked_scatter`).
///
/// `inputs_embeds` is `[1, T, D]`, `input_ids` is `[T]`, `features` is `[N, D]` with `N` the number
/// of image tokens.
///
/// # Errors
/// [`Error::Features`] where a shape or the count does not fit; `inputs_embeds` is untouched then.
pub fn merge_image_features(
    inputs_embeds: &mut Array3<f32>,
    input_ids: &[i64],
    features: ArrayView2<'_, f32>,
    image_token_id: i64,
) -> Result<(), Error> {
    let (batch, tokens, width) = inputs_embeds.dim();
    let mismatch = |expected: String, found: String| Err(Error::Features { expected, found });
    if batch != 1 || tokens != input_ids.len() {
        return mismatch(
            format!("inputs_embeds [1, {}, D]", input_ids.len()),
            format!("[{batch}, {tokens}, {width}]"),
        );
    }
    let image_tokens = input_ids.iter().filter(|&&id| id == image_token_id).count();
    if features.dim() != (image_tokens, width) {
        return mismatch(
            format!("[{image_tokens}, {width}]"),
            format!("{:?}", features.shape()),
        );
    }
    let mut embeddings = inputs_embeds.index_axis_mut(ndarray::Axis(0), 0);
    let places = input_ids
        .iter()
        .zip(embeddings.rows_mut())
        .filter(|(id, _)| **id == image_token_id);
    for ((_, mut place), feature) in places.zip(features.rows()) {
        place.assign(&feature);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;

    #[test]
    fn features_take_the_places_of_the_image_tokens_in_order() {
        let mut embeds = Array3::zeros((1, 4, 2));
        merge_image_features(
            &mut embeds,
            &[1, 9, 2, 9],
            array![[1.0, 2.0], [3.0, 4.0]].view(),
            9,
        )
        .unwrap();
        assert_eq!(
            embeds,
            array![[[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]]
        );
    }

    #[test]
    fn a_wrong_count_or_width_is_refused_and_changes_nothing() {
        let mut embeds = Array3::zeros((1, 3, 2));
        for features in [
            Array2::ones((1, 2)),
            Array2::ones((3, 2)),
            Array2::ones((2, 3)),
        ] {
            let error =
                merge_image_features(&mut embeds, &[9, 1, 9], features.view(), 9).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("image features: expected [2, 2], found "),
                "{error}"
            );
        }
        assert!(
            merge_image_features(&mut embeds, &[9, 1], Array2::ones((1, 2)).view(), 9).is_err()
        );
        assert!(embeds.iter().all(|&value| value == 0.0));
    }

    #[test]
    fn an_image_is_encoded_once_and_a_failure_is_not_kept() {
        let image = ImageInputs {
            key: ImageKey([7; 32]),
            tensors: vec![NamedTensor::floats("pixel_values", Array2::zeros((4, 2)))],
        };
        let mut cache = FeatureCache::default();
        assert_eq!(
            cache.get_or_encode(&image, |_| Err("no encoder")),
            Err("no encoder")
        );
        assert!(cache.is_empty());
        let features = vec![NamedTensor::floats("image_features", Array2::ones((1, 2)))];
        let mut runs = 0;
        for _ in 0..3 {
            let found = cache.get_or_encode(&image, |_| {
                runs += 1;
                Ok::<_, Error>(features.clone())
            });
            assert_eq!(found.unwrap(), features);
        }
        assert_eq!((runs, cache.len()), (1, 1));
    }
}
