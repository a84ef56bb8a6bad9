//! A patched model, ready for a runtime: a few kilobytes that refer to the weights where they lie.
//!
//! In: a [`ModelFile`] and a patched copy of its protobuf. Out: [`SessionModel`], the encoded graph,
//! whose large tensors are external data references *into the original files* (an inline weight
//! becomes a reference into its own `.onnx` file, at the offset known from the map), and the folder
//! that the references are relative to. A runtime maps what it needs; nothing of the weights is
//! copied here, so a 1.5 GB model with inline weights opens in 0.03 s instead of 5.5 s.

use std::path::{Path, PathBuf};

use prost::Message;

use super::Error;
use crate::onnx::schema::tensor_proto::DataLocation;
use crate::onnx::schema::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};
use crate::onnx::{ModelFile, Storage};

/// An encoded model and the folder that its external data references are relative to.
pub struct SessionModel {
    /// The encoded `ModelProto`.
    pub bytes: Vec<u8>,
    /// Canonical folder that holds all files the references name.
    pub folder: PathBuf,
    /// The canonical data files, each once.
    pub files: Vec<PathBuf>,
}

/// Below this an inline tensor stays inline: runtimes read shapes and axes while they load the graph,
/// before external data is there.
const MIN_EXTERNAL_BYTES: usize = 4096;

/// Encodes `proto`, a patched copy of `model`'s, for a session.
///
/// # Errors
/// A tensor of the model contradicts itself or its external data cannot be opened.
pub fn encode(model: &ModelFile, mut proto: ModelProto) -> Result<SessionModel, Error> {
    let mut places = Vec::new();
    if let Some(graph) = &mut proto.graph {
        collect(model, graph, &mut places)?;
    }
    let mut files: Vec<PathBuf> = places.iter().map(|place| place.file.clone()).collect();
    files.sort();
    files.dedup();
    let folder = common_folder(&files)
        .or_else(|| model.canonical_path().parent().map(Path::to_owned))
        .unwrap_or_default();
    let mut places = places.into_iter();
    if let Some(graph) = &mut proto.graph {
        rewrite(graph, &folder, &mut places);
    }
    Ok(SessionModel {
        bytes: proto.encode_to_vec(),
        folder,
        files,
    })
}

struct Place {
    file: PathBuf,
    offset: u64,
    len: u64,
}

fn is_external(tensor: &TensorProto) -> bool {
    tensor.data_location() == DataLocation::External
        || tensor
            .raw_data
            .as_ref()
            .is_some_and(|raw| raw.len() >= MIN_EXTERNAL_BYTES)
}

/// The places of all tensors that will be external, in the order in which `rewrite` meets them.
fn collect(model: &ModelFile, graph: &GraphProto, places: &mut Vec<Place>) -> Result<(), Error> {
    for tensor in graph
        .initializer
        .iter()
        .filter(|tensor| is_external(tensor))
    {
        places.push(match model.storage(tensor)? {
            Storage::Inline(span) => Place {
                file: model.canonical_path().to_owned(),
                offset: span.offset,
                len: span.len,
            },
            Storage::External { file, span, .. } => Place {
                file,
                offset: span.offset,
                len: span.len,
            },
            Storage::Typed => {
                return Err(model
                    .tensor_error(tensor, "raw_data inside the file", "bytes from elsewhere")
                    .into());
            }
        });
    }
    for inner in subgraphs(graph) {
        collect(model, inner, places)?;
    }
    Ok(())
}

fn rewrite(graph: &mut GraphProto, folder: &Path, places: &mut impl Iterator<Item = Place>) {
    for tensor in graph
        .initializer
        .iter_mut()
        .filter(|tensor| is_external(tensor))
    {
        let Some(place) = places.next() else { return };
        let location = place.file.strip_prefix(folder).unwrap_or(&place.file);
        let entry = |key: &str, value: &str| StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value.into()),
        };
        tensor.raw_data = None;
        tensor.data_location = Some(DataLocation::External as i32);
        tensor.external_data = [
            entry("location", &location.to_string_lossy()),
            entry("offset", &place.offset.to_string()),
            entry("length", &place.len.to_string()),
        ]
        .into();
    }
    for node in &mut graph.node {
        for attribute in &mut node.attribute {
            for inner in attribute
                .g
                .as_deref_mut()
                .into_iter()
                .chain(&mut attribute.graphs)
            {
                rewrite(inner, folder, places);
            }
        }
    }
}

fn subgraphs(graph: &GraphProto) -> impl Iterator<Item = &GraphProto> {
    graph
        .node
        .iter()
        .flat_map(|node| &node.attribute)
        .flat_map(|attribute| attribute.g.as_deref().into_iter().chain(&attribute.graphs))
}

/// The deepest folder that holds all `files`.
fn common_folder(files: &[PathBuf]) -> Option<PathBuf> {
    let mut common = files.first()?.parent()?.to_owned();
    for file in files {
        while !file.starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    Some(common)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::common_folder;

    #[test]
    fn the_common_folder_holds_every_file() {
        let files = [PathBuf::from("/m/onnx/a.onnx"), PathBuf::from("/m/blobs/x")];
        assert_eq!(common_folder(&files), Some(PathBuf::from("/m")));
        assert_eq!(common_folder(&files[..1]), Some(PathBuf::from("/m/onnx")));
        assert_eq!(common_folder(&[]), None);
    }
}
