//! What a form would do to one MLP, before the gates are known; and with them.
//!
//! In: the arrays whose channels are to be multiplied, as the graph names them. Out: for each the
//! place where its bytes can be rewritten, or the change of the graph that gives the MLP a copy of its
//! own; and, with gates, byte ranges and [`Change`]s.
//!
//! An array is rewritten where it lies if nothing but this MLP reads it. An exporter merges equal
//! constants: such an array is copied first (copy on write).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::Error;
use super::form::{Cost, EditForm, Subject};
use super::rewrite::{Change, Fault, Surgeon};
use super::scale::{Block, Scaling};
use crate::graph::{LayerId, NodeId, ScopeId, Slices, Stored};
use crate::onnx::anatomy::tensor_field;
use crate::onnx::schema::{NodeProto, TensorProto};
use crate::onnx::{ByteSpan, DataType, List, ModelFile, Storage};

/// What a form would do to one MLP.
pub(super) struct Recipe<'m> {
    /// The form.
    pub(super) form: EditForm,
    /// Arrays that are multiplied where they lie.
    pub(super) in_place: Vec<InPlace<'m>>,
    /// Changes of the graph.
    pub(super) rewrites: Vec<Rewrite<'m>>,
    /// What it costs at inference.
    pub(super) cost: Cost,
}

impl Recipe<'_> {
    /// Whether the file's graph changes, and not only bytes of its arrays.
    pub(super) fn changes_graph(&self) -> bool {
        !self.rewrites.is_empty()
    }
}

/// A stored matrix, row-major, some of whose slices along `axis` belong to the gates.
#[derive(Clone)]
pub(super) struct Array<'m> {
    /// The tensor and its reader.
    pub(super) stored: Stored<'m>,
    /// float32, float16 or bfloat16.
    pub(super) dtype: DataType,
    /// Stored rows.
    pub(super) rows: usize,
    /// Stored columns.
    pub(super) columns: usize,
    /// The axis along the channels: 0 or 1.
    pub(super) axis: usize,
    /// The channels that belong to gates `0..`, in order.
    pub(super) channels: Range<usize>,
}

/// An array with bytes that nothing else uses.
pub(super) struct InPlace<'m> {
    pub(super) array: Array<'m>,
    /// Where they lie.
    pub(super) place: Place,
}

/// Bytes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the `.onnx` file itself.
    Onnx(ByteSpan),
    /// In an external data file.
    External {
        /// Relative to the `.onnx` file's folder.
        location: String,
        /// The bytes.
        span: ByteSpan,
    },
}

/// A change of the graph, without the gates.
pub(super) enum Rewrite<'m> {
    /// A scaled copy of an array, read by these inputs in place of the array.
    Copy {
        array: Array<'m>,
        readers: Vec<(NodeId, usize)>,
    },
    /// A scalar becomes a vector with one element per channel: times the gate for `channels`, repeated
    /// for the others.
    Vector {
        scalar: Stored<'m>,
        dtype: DataType,
        len: usize,
        channels: Range<usize>,
        readers: Vec<(NodeId, usize)>,
    },
    /// A scalar zero point, repeated to a vector.
    Repeat {
        scalar: Stored<'m>,
        len: usize,
        readers: Vec<(NodeId, usize)>,
    },
    /// The `axis` of a `DequantizeLinear` whose scale becomes a vector.
    Axis { node: NodeId, axis: i64 },
    /// The annotation of a value whose shape changes.
    Unannotate { scope: ScopeId, value: &'m str },
    /// A `Mul` by the gates before these inputs, all of which read `h`.
    Gate {
        /// `h` and who reads it.
        readers: Vec<Reader<'m>>,
        /// Type of `h`, and so of the gates.
        dtype: DataType,
        d_ff: usize,
        /// Axes of `h` behind the neurons.
        trailing_axes: usize,
    },
}

/// A node that reads the hidden activation.
pub(super) struct Reader<'m> {
    /// The node.
    pub(super) node: NodeId,
    /// Position among its inputs.
    pub(super) position: usize,
    /// The value there.
    pub(super) hidden: &'m str,
}

impl<'m> Array<'m> {
    /// The channels `channels` of `slices`.
    pub(super) fn of(
        model: &ModelFile,
        slices: &Slices<'m>,
        channels: &Range<u64>,
    ) -> Result<Array<'m>, String> {
        let size = |size: u64| usize::try_from(size).map_err(|_| format!("{size} elements"));
        let stored = slices.stored;
        let dtype = model.data_type(stored.tensor).map_err(|e| e.to_string())?;
        if !dtype.is_scalable_float() {
            return Err(format!("'{}' is stored as {dtype}", stored.name));
        }
        let dims = model.dims(stored.tensor).map_err(|e| e.to_string())?;
        if slices.rows.checked_mul(slices.columns) != Some(dims.iter().product()) {
            let (rows, columns) = (slices.rows, slices.columns);
            let expected = format!("expected {rows}×{columns} elements");
            return Err(format!(
                "{expected} in '{}', found dims {dims:?}",
                stored.name
            ));
        }
        Ok(Array {
            stored,
            dtype,
            rows: size(slices.rows)?,
            columns: size(slices.columns)?,
            axis: slices.axis,
            channels: size(channels.start)?..size(channels.end)?,
        })
    }

    /// Number of channels.
    fn width(&self) -> usize {
        match self.axis {
            0 => self.rows,
            _ => self.columns,
        }
    }

    /// One gate for each channel: 1 for those that are not ours.
    pub(super) fn gates(&self, gates: &Arc<[f32]>) -> Arc<[f32]> {
        spread(gates, &self.channels, self.width())
    }

    /// Whether the two are the same array, weakened alike.
    fn same_as(&self, other: &Array<'_>) -> bool {
        let layout = |a: &Array<'_>| (a.rows, a.columns, a.axis, a.channels.clone());
        std::ptr::eq(self.stored.tensor, other.stored.tensor) && layout(self) == layout(other)
    }
}

/// `gates` at `channels` of `width`, 1 elsewhere.
fn spread(gates: &Arc<[f32]>, channels: &Range<usize>, width: usize) -> Arc<[f32]> {
    if *channels == (0..width) {
        return Arc::clone(gates);
    }
    let mut all = vec![1.0; width];
    if let Some(ours) = all.get_mut(channels.clone()) {
        for (ours, &gate) in ours.iter_mut().zip(gates.iter()) {
            *ours = gate;
        }
    }
    all.into()
}

/// Divides `arrays`, all arrays that an edit multiplies, into those that can be rewritten where they
/// lie and those of which the MLP needs a copy.
pub(super) fn settle<'m>(
    subject: &Subject<'_, 'm>,
    arrays: Vec<Array<'m>>,
) -> Result<(Vec<InPlace<'m>>, Vec<Rewrite<'m>>), String> {
    let mut grouped: Vec<(Array<'m>, Vec<(NodeId, usize)>)> = Vec::new();
    for array in arrays {
        let reader = (array.stored.reader, array.stored.position);
        match grouped.iter_mut().find(|(other, _)| other.same_as(&array)) {
            Some((_, readers)) if readers.contains(&reader) => {}
            Some((_, readers)) => readers.push(reader),
            None => grouped.push((array, vec![reader])),
        }
    }
    let (mut in_place, mut rewrites) = (Vec::new(), Vec::new());
    for (array, readers) in grouped {
        let ours = array.stored.uses <= readers.len();
        let place = match ours {
            true => place(subject, array.stored.tensor, array.stored.scope)?,
            false => None,
        };
        match place {
            Some(place) => in_place.push(InPlace { array, place }),
            None => {
                reachable(subject, &readers)?;
                read_once(subject, &readers)?;
                rewrites.push(Rewrite::Copy { array, readers });
            }
        }
    }
    Ok((in_place, rewrites))
}

/// Whether the file shows these nodes as such, so that their inputs can be changed.
pub(super) fn reachable(
    subject: &Subject<'_, '_>,
    readers: &[(NodeId, usize)],
) -> Result<(), String> {
    let surgeon = subject.surgeon.map_err(ToString::to_string)?;
    for (node, _) in readers {
        surgeon.node(*node).map_err(|fault| fault.to_string())?;
    }
    Ok(())
}

/// A reader that is not the layer itself, but a `Transpose` or `Cast` on the way, must lead to one
/// reader only: what it reads is about to change for all of them.
fn read_once(subject: &Subject<'_, '_>, readers: &[(NodeId, usize)]) -> Result<(), String> {
    const FORM: &[&str] = &[
        "Identity",
        "Cast",
        "Transpose",
        "Reshape",
        "DequantizeLinear",
    ];
    for (id, _) in readers {
        let Some(node) = subject.index.node(*id) else {
            continue;
        };
        let Some(output) = node
            .output
            .first()
            .filter(|_| FORM.contains(&node.op_type()))
        else {
            continue;
        };
        let uses = subject.index.uses(id.scope, output);
        if uses > 1 {
            let (op, name) = (node.op_type(), node.name());
            return Err(format!(
                "{op} '{name}', which the weight passes, has {uses} readers"
            ));
        }
    }
    Ok(())
}

/// Where the bytes of `tensor` can be rewritten; `None` where they cannot.
fn place(
    subject: &Subject<'_, '_>,
    tensor: &TensorProto,
    scope: ScopeId,
) -> Result<Option<Place>, String> {
    let storage = subject.model.storage(tensor).map_err(|e| e.to_string())?;
    Ok(match storage {
        Storage::Inline(span) => Some(Place::Onnx(span)),
        Storage::External { location, span, .. } => Some(Place::External { location, span }),
        Storage::Typed => match subject.surgeon {
            Ok(surgeon) => surgeon.packed_floats(scope, tensor).map(Place::Onnx),
            Err(_) => None,
        },
    })
}

impl Surgeon<'_, '_> {
    /// The bytes of an initializer's `float_data`, where they are packed: float32, little-endian, in a
    /// row, as in `raw_data`.
    fn packed_floats(&self, scope: ScopeId, tensor: &TensorProto) -> Option<ByteSpan> {
        let field = self.initializer_field(scope, tensor)?;
        let inside = self.inside(field)?;
        let mut data = inside
            .iter()
            .filter(|f| f.number == tensor_field::FLOAT_DATA);
        let (packed, another) = (data.next()?, data.next());
        let whole = packed.content.len() == tensor.float_data.len().checked_mul(4)?;
        (another.is_none() && packed.delimited && whole).then_some(ByteSpan {
            offset: packed.content.start as u64,
            len: packed.content.len() as u64,
        })
    }
}

/// Changes of one file's graph, as they are collected.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) list: Vec<Change>,
    /// Names given away.
    names: Vec<String>,
    /// How many readers of a tensor read another one now.
    released: BTreeMap<usize, usize>,
}

/// One MLP's rewrites, made into changes.
pub(super) struct Rewriter<'a, 'm> {
    pub(super) subject: &'a Subject<'a, 'm>,
    pub(super) layer: LayerId,
    pub(super) gates: &'a Arc<[f32]>,
}

/// Why a rewrite could not be made.
pub(super) enum Failure {
    /// The graph does not allow it.
    Fault(Fault),
    /// A value cannot be read, or a product is not finite.
    Error(Error),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure::Fault(fault)
    }
}

impl From<crate::onnx::Error> for Failure {
    fn from(error: crate::onnx::Error) -> Failure {
        Failure::Error(error.into())
    }
}

impl<'m> Rewriter<'_, 'm> {
    /// Adds what `rewrite` changes to `changes`.
    pub(super) fn add(&self, rewrite: &Rewrite<'m>, changes: &mut Changes) -> Result<(), Failure> {
        let surgeon = self.surgeon()?;
        match rewrite {
            Rewrite::Copy { array, readers } => {
                let gates = array.gates(self.gates);
                let bytes = self.subject.model.bytes(array.stored.tensor)?;
                let bytes = self.scaled(&bytes, array, &gates)?;
                let dims = array.stored.tensor.dims.clone();
                let tensor = tensor(array.dtype, dims, bytes);
                self.give(&array.stored, tensor, readers, changes)
            }
            Rewrite::Vector {
                scalar,
                dtype,
                len,
                channels,
                readers,
            } => {
                let one = self.subject.model.bytes(scalar.tensor)?;
                let vector = Array {
                    stored: *scalar,
                    dtype: *dtype,
                    rows: *len,
                    columns: 1,
                    axis: 0,
                    channels: channels.clone(),
                };
                let gates = vector.gates(self.gates);
                let bytes = self.scaled(&one.repeat(*len), &vector, &gates)?;
                let tensor = tensor(*dtype, [dim(*len)].into(), bytes);
                self.give(scalar, tensor, readers, changes)
            }
            Rewrite::Repeat {
                scalar,
                len,
                readers,
            } => {
                let one = self.subject.model.bytes(scalar.tensor)?;
                let dtype = self.subject.model.data_type(scalar.tensor)?;
                let tensor = tensor(dtype, [dim(*len)].into(), one.repeat(*len));
                self.give(scalar, tensor, readers, changes)
            }
            Rewrite::Axis { node, axis } => {
                let (graph, position) = surgeon.node(*node)?;
                let attribute = crate::onnx::int_attribute("axis", *axis);
                changes
                    .list
                    .push(Change::SetAttribute(graph, position, attribute));
                Ok(())
            }
            Rewrite::Unannotate { scope, value } => {
                let found = surgeon.value_info(*scope, value).into_iter();
                let drops = found.map(|(graph, position)| Change::DropValueInfo(graph, position));
                changes.list.extend(drops);
                Ok(())
            }
            Rewrite::Gate {
                readers,
                dtype,
                d_ff,
                trailing_axes,
            } => {
                let dims: List<i64> = std::iter::once(dim(*d_ff))
                    .chain(std::iter::repeat_n(1, *trailing_axes))
                    .collect();
                self.gate(surgeon, readers, *dtype, dims, changes)
            }
        }
    }

    fn surgeon(&self) -> Result<&Surgeon<'_, 'm>, Fault> {
        self.subject.surgeon.map_err(Clone::clone)
    }

    fn gate(
        &self,
        surgeon: &Surgeon<'_, 'm>,
        readers: &[Reader<'m>],
        dtype: DataType,
        dims: List<i64>,
        changes: &mut Changes,
    ) -> Result<(), Failure> {
        let d_ff = self.gates.len();
        let name = surgeon.free_name(&format!("kvw.layers.{}.gate", self.layer), &changes.names);
        let ones = match dtype {
            DataType::FLOAT16 => half::f16::ONE.to_le_bytes().to_vec(),
            DataType::BFLOAT16 => half::bf16::ONE.to_le_bytes().to_vec(),
            _ => 1f32.to_le_bytes().to_vec(),
        };
        let weight = self.subject.mlp.down().weight.stored();
        let array = Array {
            stored: Stored {
                name: "gates",
                ..weight
            },
            dtype,
            rows: d_ff,
            columns: 1,
            axis: 0,
            channels: 0..d_ff,
        };
        let bytes = self.scaled(&ones.repeat(d_ff), &array, self.gates)?;
        let mut gates = tensor(dtype, dims, bytes);
        gates.name = Some(name.as_str().into());
        changes.names.push(name.clone());
        changes.list.push(Change::AddInitializer(gates));
        for reader in readers {
            let wanted = format!("kvw.layers.{}.gated", self.layer);
            let gated = surgeon.free_name(&wanted, &changes.names);
            changes.names.push(gated.clone());
            let (graph, position) = surgeon.node(reader.node)?;
            let multiplication = NodeProto {
                op_type: Some("Mul".into()),
                name: Some(format!("{gated}/Mul").into()),
                input: [reader.hidden.into(), name.as_str().into()].into(),
                output: [gated.as_str().into()].into(),
                ..NodeProto::default()
            };
            let nodes = vec![multiplication];
            changes
                .list
                .push(Change::AddNodes(graph.clone(), position, nodes));
            changes
                .list
                .push(Change::SetInput(graph, position, reader.position, gated));
        }
        Ok(())
    }

    /// Puts `tensor` in the place of `old` for `readers`: under its name where nobody else reads it.
    fn give(
        &self,
        old: &Stored<'m>,
        mut tensor: TensorProto,
        readers: &[(NodeId, usize)],
        changes: &mut Changes,
    ) -> Result<(), Failure> {
        let surgeon = self.surgeon()?;
        let place = surgeon.initializer(old.scope, old.tensor);
        let alone = old.uses <= readers.len() && !surgeon.is_input(old.scope, old.name);
        if let (Ok((graph, position)), true) = (&place, alone) {
            tensor.name.clone_from(&old.tensor.name);
            let change = Change::ReplaceInitializer(graph.clone(), *position, tensor);
            changes.list.push(change);
            return Ok(());
        }
        let wanted = format!("{}.kvw.layers.{}", old.name, self.layer);
        let name = surgeon.free_name(&wanted, &changes.names);
        tensor.name = Some(name.as_str().into());
        changes.names.push(name.clone());
        changes.list.push(Change::AddInitializer(tensor));
        for &(node, input) in readers {
            let (graph, position) = surgeon.node(node)?;
            changes
                .list
                .push(Change::SetInput(graph, position, input, name.clone()));
        }
        let address = std::ptr::from_ref(old.tensor).addr();
        let released = changes.released.entry(address).or_default();
        *released += readers.len();
        if let Ok((graph, position)) = place
            && *released == old.uses
            && !surgeon.is_input(old.scope, old.name)
        {
            changes.list.push(Change::DropInitializer(graph, position));
        }
        Ok(())
    }

    fn scaled(
        &self,
        bytes: &[u8],
        array: &Array<'_>,
        gates: &Arc<[f32]>,
    ) -> Result<Vec<u8>, Failure> {
        let mut block = Block::with_capacity(bytes.len());
        block.resized(bytes.len()).copy_from_slice(bytes);
        let scaling = Scaling {
            dtype: array.dtype,
            columns: array.columns,
            axis: array.axis,
            gates,
        };
        match scaling.apply(0, &mut block) {
            Ok(_) => Ok(block.bytes().to_vec()),
            Err(fault) => Err(Failure::Error(Error::NotFinite {
                file: self.subject.model.path().display().to_string(),
                tensor: array.stored.name.to_owned(),
                element: fault.index as u64,
                found: fault.found,
                gate: fault.gate,
                dtype: array.dtype,
            })),
        }
    }
}

fn tensor(dtype: DataType, dims: List<i64>, bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        data_type: Some(dtype.code()),
        dims,
        raw_data: Some(bytes.into()),
        ..TensorProto::default()
    }
}

fn dim(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}
