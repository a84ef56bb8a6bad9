//! One `.onnx` file: decoded over a memory map, with the place of every tensor's bytes.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::compact::{self, Failure};
use super::external::Reference;
use super::schema::attribute_proto::AttributeType;
use super::schema::tensor_proto::DataLocation;
use super::schema::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
use super::{ByteSpan, DataType, Error, Limits, wire};
use crate::files::contain::Root;
use crate::files::map::map_file;
use crate::limits::allowed_graph;

/// Where a tensor's bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the `.onnx` file itself, as `raw_data`.
    Inline(ByteSpan),
    /// In an external data file.
    External {
        /// The file, canonical: symbolic links are resolved.
        file: PathBuf,
        /// The reference as the model writes it, relative to the model's folder.
        location: String,
        /// The bytes in that file.
        span: ByteSpan,
    },
    /// In a typed field (`float_data`, `int32_data`, …) of the `.onnx` file: readable, but its
    /// encoding has no fixed width, so it cannot be rewritten in place.
    Typed,
}

/// An ONNX model file, mapped and decoded.
///
/// `raw_data` of every tensor is a slice of the map: nothing of the weights is copied. The file
/// must not be truncated by somebody else while it is open.
pub struct ModelFile {
    path: PathBuf,
    /// The path with symbolic links resolved: where `Inline` bytes lie.
    file: PathBuf,
    map: Bytes,
    root: Root,
    proto: ModelProto,
    /// The main graph without calls of the model's own functions, where there are any.
    inlined: Option<GraphProto>,
}

impl ModelFile {
    /// Maps, scans and decodes `path`.
    ///
    /// # Errors
    /// The file cannot be read, breaks the wire format (with the byte at which it does), would take
    /// more memory than `limits`, or holds no graph.
    pub fn open(path: &Path, limits: &Limits) -> Result<ModelFile, Error> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let file = path.canonicalize().map_err(io)?;
        let map = map_file(&file).map_err(io)?;
        let malformed = |offset, message, found| Error::Malformed {
            path: path.to_owned(),
            offset,
            size: map.len(),
            message,
            found,
        };
        let structure = wire::scan(&map, limits)
            .map_err(|fault| malformed(fault.offset, fault.message, fault.found))?;
        let budget = allowed_graph(structure as u64).min(limits.decoded_bytes);
        let proto = compact::decode(map.clone(), budget).map_err(|failure| match failure {
            Failure::TooLarge => Error::TooLarge {
                path: path.to_owned(),
                limit: budget,
            },
            Failure::Malformed(error) => malformed(0, "ModelProto", error.to_string()),
        })?;
        if proto
            .graph
            .as_ref()
            .is_none_or(|graph| graph.node.is_empty())
        {
            let found = match map.len() {
                0 => "an empty file".into(),
                size => format!("{size} bytes without a graph"),
            };
            return Err(Error::NotAModel {
                path: path.to_owned(),
                found,
            });
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let root = Root::of(folder).map_err(|source| Error::Folder {
            path: path.to_owned(),
            source,
        })?;
        Ok(ModelFile {
            path: path.to_owned(),
            file,
            map,
            root,
            inlined: super::functions::inlined(&proto),
            proto,
        })
    }

    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path with symbolic links resolved.
    pub fn canonical_path(&self) -> &Path {
        &self.file
    }

    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.map.len() as u64
    }

    /// The file's bytes.
    pub fn map(&self) -> &[u8] {
        &self.map
    }

    /// The decoded model.
    pub fn proto(&self) -> &ModelProto {
        &self.proto
    }

    /// The decoded model but for its main graph.
    pub(crate) fn without_graph(&self) -> ModelProto {
        let ModelProto {
            ir_version,
            opset_import,
            producer_name,
            producer_version,
            domain,
            model_version,
            doc_string,
            graph: _,
            metadata_props,
            training_info,
            functions,
            configuration,
        } = &self.proto;
        ModelProto {
            ir_version: *ir_version,
            opset_import: opset_import.clone(),
            producer_name: producer_name.clone(),
            producer_version: producer_version.clone(),
            domain: domain.clone(),
            model_version: *model_version,
            doc_string: doc_string.clone(),
            graph: None,
            metadata_props: metadata_props.clone(),
            training_info: training_info.clone(),
            functions: functions.clone(),
            configuration: configuration.clone(),
        }
    }

    /// The main graph. Calls of the model's own functions are replaced by the functions' bodies.
    pub fn graph(&self) -> &GraphProto {
        // `open` refuses a model without one.
        self.inlined
            .as_ref()
            .or(self.proto.graph.as_ref())
            .unwrap_or_else(|| unreachable!("a model without a graph"))
    }

    /// Whether [`ModelFile::graph`] is another than the file holds, because functions were put in: its
    /// nodes then have no place of their own in the file.
    pub fn has_inlined_functions(&self) -> bool {
        self.inlined.is_some()
    }

    /// The version of the default operator set (`ai.onnx`), 1 where the model names none.
    pub fn opset(&self) -> i64 {
        self.proto
            .opset_import
            .iter()
            .find(|set| matches!(set.domain(), "" | "ai.onnx"))
            .map_or(1, |set| set.version())
    }

    /// The element type of `tensor`.
    ///
    /// # Errors
    /// A type code that ONNX does not define.
    pub fn data_type(&self, tensor: &TensorProto) -> Result<DataType, Error> {
        DataType::from_code(tensor.data_type()).ok_or_else(|| {
            self.tensor_error(tensor, "a data_type of ONNX's schema", tensor.data_type())
        })
    }

    /// The dimensions of `tensor`, none of them negative, their product within 64 bits.
    ///
    /// # Errors
    /// A negative dimension or an overflow.
    pub fn dims(&self, tensor: &TensorProto) -> Result<Vec<u64>, Error> {
        let dims = tensor
            .dims
            .iter()
            .map(|&dim| u64::try_from(dim))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| self.tensor_error(tensor, "dims ≥ 0", format!("{:?}", tensor.dims)))?;
        dims.iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim))
            .ok_or_else(|| {
                self.tensor_error(tensor, "at most 2^64 elements", format!("dims {dims:?}"))
            })?;
        Ok(dims)
    }

    /// Where the bytes of `tensor` lie, checked: the length is what type and dimensions ask for, and
    /// an external file is inside the model's folder and long enough.
    ///
    /// # Errors
    /// The tensor contradicts itself, or its external data cannot be opened or is too short.
    pub fn storage(&self, tensor: &TensorProto) -> Result<Storage, Error> {
        let expected = self.byte_length(tensor)?;
        if tensor.data_location() == DataLocation::External {
            let reference = Reference::parse(tensor)
                .map_err(|(expected, found)| self.tensor_error(tensor, expected, found))?;
            if let (Some(expected), Some(length)) = (expected, reference.length)
                && expected != length
            {
                return Err(self.tensor_error(
                    tensor,
                    format!("{expected} bytes for its type and dims"),
                    format!("external_data length {length}"),
                ));
            }
            let opened = self
                .root
                .open(&reference.location)
                .map_err(|source| Error::External {
                    path: self.path.clone(),
                    tensor: tensor.name().to_owned(),
                    location: reference.location.clone(),
                    source,
                })?;
            let len = expected
                .or(reference.length)
                .unwrap_or_else(|| opened.len.saturating_sub(reference.offset));
            let span = ByteSpan {
                offset: reference.offset,
                len,
            };
            if span.end().is_none_or(|end| end > opened.len) {
                return Err(Error::ExternalTooShort {
                    path: self.path.clone(),
                    tensor: tensor.name().to_owned(),
                    location: reference.location,
                    span,
                    size: opened.len,
                });
            }
            return Ok(Storage::External {
                file: opened.path,
                location: reference.location,
                span,
            });
        }
        let Some(raw) = &tensor.raw_data else {
            return Ok(Storage::Typed);
        };
        let len = raw.len() as u64;
        if let Some(expected) = expected
            && expected != len
        {
            return Err(self.tensor_error(
                tensor,
                format!("{expected} bytes for its type and dims"),
                format!("raw_data of {len}"),
            ));
        }
        let offset = (raw.as_ptr() as usize)
            .checked_sub(self.map.as_ptr() as usize)
            .filter(|offset| {
                offset
                    .checked_add(raw.len())
                    .is_some_and(|end| end <= self.map.len())
            });
        match offset {
            Some(offset) => Ok(Storage::Inline(ByteSpan {
                offset: offset as u64,
                len,
            })),
            // An empty slice need not point into the map.
            None => Ok(Storage::Typed),
        }
    }

    /// The bytes of `tensor`, little-endian, as `raw_data` or external data hold them. External
    /// data is mapped, not copied.
    ///
    /// # Errors
    /// As [`ModelFile::storage`]; a tensor in a typed field other than those that hold float32, 16-bit
    /// floats and integers of 8 to 64 bits is refused.
    pub fn bytes(&self, tensor: &TensorProto) -> Result<Bytes, Error> {
        match self.storage(tensor)? {
            Storage::Inline(_) => Ok(tensor.raw_data.clone().unwrap_or_default()),
            Storage::External { file, span, .. } => {
                let io = |source| Error::Io {
                    path: file.clone(),
                    source,
                };
                let map = map_file(&file).map_err(io)?;
                let range = usize::try_from(span.offset)
                    .ok()
                    .zip(span.end().and_then(|end| usize::try_from(end).ok()))
                    .filter(|&(_, end)| end <= map.len());
                match range {
                    Some((start, end)) => Ok(map.slice(start..end)),
                    None => Err(Error::ExternalTooShort {
                        path: self.path.clone(),
                        tensor: tensor.name().to_owned(),
                        location: file.display().to_string(),
                        span,
                        size: map.len() as u64,
                    }),
                }
            }
            Storage::Typed => match DataType::from_code(tensor.data_type()) {
                Some(DataType::FLOAT) => Ok(little_endian(&tensor.float_data)),
                Some(DataType::INT64) => Ok(little_endian(&tensor.int64_data)),
                Some(DataType::INT32) => Ok(little_endian(&tensor.int32_data)),
                // Smaller types are stored there too, one element each (`TensorProto.int32_data`).
                Some(dtype) if matches!(dtype.bits(), Some(8 | 16)) => {
                    let size = dtype.bytes(1).and_then(|size| usize::try_from(size).ok());
                    let wide = tensor.int32_data.iter().map(|value| value.to_le_bytes());
                    Ok(wide
                        .flat_map(|bytes| bytes.into_iter().take(size.unwrap_or(1)))
                        .collect())
                }
                _ => Err(self.tensor_error(
                    tensor,
                    "raw_data, external_data, float_data, int32_data or int64_data",
                    "none of them",
                )),
            },
        }
    }

    /// The folder (or Hugging Face cache entry) that external data must stay inside.
    pub fn root(&self) -> &Root {
        &self.root
    }

    fn byte_length(&self, tensor: &TensorProto) -> Result<Option<u64>, Error> {
        let dims = self.dims(tensor)?;
        let data_type = self.data_type(tensor)?;
        let elements = dims.iter().product();
        match data_type.bytes(elements) {
            Some(bytes) => Ok(Some(bytes)),
            None if data_type.bits().is_none() => Ok(None),
            None => Err(self.tensor_error(tensor, "a size in 64 bits", format!("dims {dims:?}"))),
        }
    }

    pub(crate) fn tensor_error(
        &self,
        tensor: &TensorProto,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Error {
        Error::Tensor {
            path: self.path.clone(),
            tensor: tensor.name().to_owned(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }
}

fn little_endian<T: bytemuck::Pod>(values: &[T]) -> Bytes {
    // Typed fields are decoded to the machine's order; the project supports little-endian machines
    // only (see `lib.rs`), where that is the order of `raw_data`.
    Bytes::copy_from_slice(bytemuck::cast_slice(values))
}

/// All graphs of `model`: the main graph, subgraphs in attributes, and those of functions' nodes;
/// an outer graph before its inner ones.
pub fn graphs(model: &ModelProto) -> Vec<&GraphProto> {
    let mut found: Vec<&GraphProto> = model.graph.iter().collect();
    found.extend(
        model
            .functions
            .iter()
            .flat_map(|function| nested(&function.node)),
    );
    let mut next = 0;
    while let Some(graph) = found.get(next) {
        let inner: Vec<_> = nested(&graph.node).collect();
        found.extend(inner);
        next += 1;
    }
    found
}

/// All tensors of `model`, wherever they hang: initializers, dense and sparse, and attributes of nodes
/// of every graph and function.
pub fn tensors(model: &ModelProto) -> Vec<&TensorProto> {
    let graphs = graphs(model);
    let nodes = graphs
        .iter()
        .flat_map(|graph| &graph.node)
        .chain(model.functions.iter().flat_map(|function| &function.node));
    let attributes = nodes.flat_map(|node| &node.attribute).chain(
        model
            .functions
            .iter()
            .flat_map(|function| &function.attribute_proto),
    );
    let mut found = Vec::new();
    let mut sparse = Vec::new();
    for attribute in attributes {
        found.extend(attribute.t.as_deref());
        found.extend(&attribute.tensors);
        sparse.extend(attribute.sparse_tensor.as_deref());
        sparse.extend(&attribute.sparse_tensors);
    }
    for graph in &graphs {
        found.extend(&graph.initializer);
        sparse.extend(&graph.sparse_initializer);
    }
    for tensor in sparse {
        found.extend(tensor.values.iter().chain(&tensor.indices));
    }
    found
}

fn nested(nodes: &[NodeProto]) -> impl Iterator<Item = &GraphProto> {
    nodes
        .iter()
        .flat_map(|node| &node.attribute)
        .flat_map(attribute_graphs)
}

fn attribute_graphs(attribute: &AttributeProto) -> impl Iterator<Item = &GraphProto> {
    attribute.g.as_deref().into_iter().chain(&attribute.graphs)
}

/// An attribute of type `INT`.
pub fn int_attribute(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::Int as i32),
        i: Some(value),
        ..AttributeProto::default()
    }
}

/// The attribute `name` of `node`.
pub fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute
        .iter()
        .find(|attribute| attribute.name() == name)
}
