//! Image features that outlive a run: one file per image in a folder.
//!
//! In: a vision encoder, an image's key, what the encoder made of it. Out: the same again, in any later run,
//! without running the encoder.
//!
//! Promises: a file is used only for the same encoder (digest of its graph and weights), the same image file and
//! processor settings, the same ONNX Runtime, device, threads and prepacking, so a result does not depend on
//! whether it was kept, to the last bit; a file is written whole or not at all, so that many processes may share a
//! folder; one that is damaged, or cannot be read, is made anew. A folder that cannot be written to costs time, not the
//! run.

#![warn(clippy::indexing_slicing)]

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ndarray::ArrayD;
use safetensors::{Dtype, SafeTensors, View};

use super::Error;
use crate::files::map::map_file;
use crate::files::{Sha256, Sha256Hasher, write_atomic};
use crate::graph::session::SessionModel;
use crate::preprocess::{ImageKey, NamedTensor, TensorValue};

/// The one metadata key: the digest of names, shapes and numbers.
const DIGEST: &str = "kvw.sha256";
/// Changes whenever features of earlier files must not be used.
const FORMAT: &str = "kvw-image-features 1";
/// A file larger than this is no file of ours: 16,384 image tokens of 8,192 float32 numbers are half of it.
const MAX_BYTES: u64 = 1 << 30;

/// A folder of features, for one vision encoder.
pub(super) struct KeptFeatures {
    folder: PathBuf,
    /// Digest of everything but the image that features depend on.
    encoder: Sha256,
}

impl KeptFeatures {
    /// The features in `folder` of the encoder `graph`, run as `runtime` describes. The folder is made.
    ///
    /// # Errors
    /// The folder cannot be made, or the encoder's weights cannot be read.
    pub(super) fn open(
        folder: &Path,
        graph: &SessionModel,
        runtime: &serde_json::Value,
    ) -> Result<KeptFeatures, Error> {
        std::fs::create_dir_all(folder).map_err(crate::files::Error::io("create", folder))?;
        let mut digest = Sha256Hasher::default();
        digest.update(FORMAT.as_bytes());
        digest.update(runtime.to_string().as_bytes());
        digest.update(Sha256::of_bytes(&graph.bytes).as_bytes());
        for file in Sha256::of_files(&graph.files)? {
            digest.update(file.as_bytes());
        }
        Ok(KeptFeatures {
            folder: folder.to_owned(),
            encoder: digest.finish(),
        })
    }

    fn path(&self, image: &ImageKey) -> PathBuf {
        let mut digest = Sha256Hasher::default();
        digest.update(self.encoder.as_bytes());
        digest.update(&image.0);
        self.folder.join(format!("{}.safetensors", digest.finish()))
    }

    /// What was kept for an image.
    pub(super) fn load(&self, image: &ImageKey) -> Option<Vec<NamedTensor>> {
        let path = self.path(image);
        if !path.exists() {
            return None;
        }
        let features = read(&path);
        if let Err(reason) = &features {
            tracing::warn!("{}: computed anew: {reason}", path.display());
        }
        features.ok()
    }

    /// Keeps an image's features, in the place of whatever is there.
    pub(super) fn save(&self, image: &ImageKey, features: &[NamedTensor]) {
        let path = self.path(image);
        if let Err(reason) = write(&path, features) {
            tracing::warn!("{}: not kept: {reason}", path.display());
        }
    }
}

/// A float32 tensor as safetensors writes it.
struct Floats<'a>(&'a ArrayD<f32>);

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.0
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    fn data_len(&self) -> usize {
        self.0.len() * size_of::<f32>()
    }
}

/// The order of the encoder's outputs matters (the first is put among the embeddings), and safetensors keeps
/// none: it stands in the name.
fn numbered(index: usize, name: &str) -> String {
    format!("{index}.{name}")
}

fn digest<'a>(tensors: impl Iterator<Item = (&'a str, &'a [usize], Cow<'a, [u8]>)>) -> Sha256 {
    let mut digest = Sha256Hasher::default();
    for (name, shape, bytes) in tensors {
        digest.update(format!("{name} {shape:?} {}:", bytes.len()).as_bytes());
        digest.update(&bytes);
    }
    digest.finish()
}

fn write(path: &Path, features: &[NamedTensor]) -> Result<(), String> {
    let mut tensors = Vec::with_capacity(features.len());
    for (index, feature) in features.iter().enumerate() {
        let TensorValue::Floats(array) = &feature.value else {
            return Err(format!("'{}' is not float32", feature.name));
        };
        tensors.push((numbered(index, &feature.name), Floats(array)));
    }
    let digest = digest(
        tensors
            .iter()
            .map(|(name, view)| (name.as_str(), view.shape(), view.data())),
    );
    let metadata = HashMap::from([(DIGEST.to_owned(), digest.to_string())]);
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| e.to_string())?;
    write_atomic(path, true, |out| out.write_all(&bytes)).map_err(|e| e.to_string())
}

fn read(path: &Path) -> Result<Vec<NamedTensor>, String> {
    let length = path.metadata().map_err(|e| e.to_string())?.len();
    if length > MAX_BYTES {
        return Err(format!(
            "expected at most {MAX_BYTES} bytes, found {length}"
        ));
    }
    let bytes = map_file(path).map_err(|e| e.to_string())?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| e.to_string())?;
    let expected = metadata.metadata().as_ref().and_then(|m| m.get(DIGEST));
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
    let mut features = Vec::new();
    for (name, view) in tensors.iter() {
        let (index, output) = name.split_once('.').ok_or("a name without its number")?;
        let index: usize = index.parse().map_err(|_| "a name without its number")?;
        if view.dtype() != Dtype::F32 {
            return Err(format!("'{name}' is {:?}, not F32", view.dtype()));
        }
        let (numbers, _) = view.data().as_chunks::<4>();
        let numbers = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let array = ArrayD::from_shape_vec(view.shape(), numbers.collect());
        let array = array.map_err(|e| e.to_string())?;
        features.push((index, name, view, NamedTensor::floats(output, array)));
    }
    features.sort_by_key(|(index, ..)| *index);
    let found = digest(
        features
            .iter()
            .map(|(_, name, view, _)| (*name, view.shape(), Cow::Borrowed(view.data()))),
    );
    if expected.map(String::as_str) != Some(found.to_string().as_str()) {
        return Err("its digest is another".to_owned());
    }
    Ok(features.into_iter().map(|(.., tensor)| tensor).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use ndarray::{Array2, Array3};

    use super::*;

    fn features() -> Vec<NamedTensor> {
        // Not in the order of their names.
        vec![
            NamedTensor::floats(
                "z",
                Array2::from_shape_fn((3, 2), |(i, j)| i as f32 / 3.0 - j as f32),
            ),
            NamedTensor::floats("a.b", Array3::from_elem((1, 2, 2), f32::MIN_POSITIVE)),
        ]
    }

    #[test]
    fn kept_features_come_back_bit_by_bit_and_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("features");
        write(&path, &features()).unwrap();
        assert_eq!(read(&path).unwrap(), features());
    }

    #[test]
    fn no_damaged_byte_goes_unnoticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("features");
        write(&path, &features()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            // Some bytes of the header may change without changing what it says: then nothing is lost.
            assert!(
                read(&path).is_err() || read(&path).unwrap() == features(),
                "byte {at}"
            );
        }
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read(&path).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn other_images_encoders_and_runtimes_have_other_files() {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("weights");
        let mut paths = Vec::new();
        for (weight, graph, runtime, image) in [
            ("w", "g", 1, 0),
            ("v", "g", 1, 0),
            ("w", "h", 1, 0),
            ("w", "g", 2, 0),
            ("w", "g", 1, 1),
        ] {
            std::fs::write(&weights, weight).unwrap();
            let graph = SessionModel {
                bytes: graph.into(),
                folder: folder.path().to_owned(),
                files: vec![weights.clone()],
            };
            let runtime = serde_json::json!({ "threads": runtime });
            let kept = KeptFeatures::open(folder.path(), &graph, &runtime).unwrap();
            paths.push(kept.path(&ImageKey([image; 32])));
        }
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), 5);
    }
}
