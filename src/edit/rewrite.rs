//! Changes to a graph, as values: what is added, replaced and rewired in one `.onnx` file.
//!
//! In: a decoded model and [`Change`]s to its nodes, initializers and annotations. Out: two views of the
//! same result: a [`Splice`] of the file's bytes, which is what is written, and a changed `ModelProto`,
//! which is what the written file must decode to ([`expected`]). The two share nothing but the list of
//! changes, so one proves the other.
//!
//! The graph is never encoded again as a whole: fields that the schema does not know, and weights, stay
//! where they are, byte for byte.

use crate::graph::{Index, NodeId, ScopeId};
use crate::onnx::anatomy::{
    Anatomy, Field, GraphPlace, Step, Unplaced, end_of, frame, graph_field, node_field,
};
use crate::onnx::schema::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
};
use crate::onnx::splice::{Cut, Splice};
use crate::onnx::{ModelFile, Text, graphs};

/// A graph of the model, by the way to it from the main graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GraphPath(Vec<Step>);

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Change {
    /// A new initializer of the main graph, which every subgraph sees.
    AddInitializer(TensorProto),
    /// Another tensor in the place of an initializer.
    ReplaceInitializer(GraphPath, usize, TensorProto),
    /// Nothing reads it any more.
    DropInitializer(GraphPath, usize),
    /// The shape or type that it tells is no longer true.
    DropValueInfo(GraphPath, usize),
    /// A node reads another value.
    SetInput(GraphPath, usize, usize, String),
    /// An attribute of a node, set or replaced.
    SetAttribute(GraphPath, usize, AttributeProto),
    /// Nodes before the node at this position.
    AddNodes(GraphPath, usize, Vec<NodeProto>),
}

/// Why a graph cannot be changed where it lies.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(super) enum Fault {
    /// The file's messages have no place of their own.
    #[error(transparent)]
    Unplaced(#[from] Unplaced),
    /// Two changes meet.
    #[error(transparent)]
    Overlapping(#[from] crate::onnx::splice::Overlapping),
    /// The file would be larger than protobuf messages may be.
    #[error(
        "expected a file of less than 2 GiB (protobuf's limit) after the change, found {0} bytes"
    )]
    TooLarge(u64),
    /// The graph is spread over functions of the model's own.
    #[error("expected all nodes in the graph itself, found some in the model's own functions")]
    Functions,
    /// A part of the graph that the file does not show as such: in a function, for example.
    #[error("expected '{0}' in the main graph or a subgraph of the file, found it elsewhere")]
    Elsewhere(String),
}

impl Fault {
    fn elsewhere(what: &str) -> Fault {
        Fault::Elsewhere(what.to_owned())
    }
}

/// Finds the parts of one file's graphs.
pub(super) struct Surgeon<'a, 'm> {
    model: &'m ModelFile,
    index: &'a Index<'m>,
    anatomy: Anatomy<'m>,
}

impl<'a, 'm> Surgeon<'a, 'm> {
    pub(super) fn new(model: &'m ModelFile, index: &'a Index<'m>) -> Result<Self, Fault> {
        // Its nodes are not where `index` counts them.
        if model.has_inlined_functions() {
            return Err(Fault::Functions);
        }
        Ok(Surgeon {
            model,
            index,
            anatomy: Anatomy::of(model.map(), model.proto())?,
        })
    }

    fn graph(&self, scope: ScopeId) -> Option<(&'m GraphProto, &GraphPlace)> {
        let graph = self.index.graph(scope)?;
        Some((graph, self.anatomy.graph(graph)?))
    }

    /// The way to the node `id`.
    pub(super) fn node(&self, id: NodeId) -> Result<(GraphPath, usize), Fault> {
        let place = self.graph(id.scope);
        let (_, place) = place.ok_or_else(|| {
            Fault::elsewhere(self.index.node(id).map_or("a node", NodeProto::name))
        })?;
        Ok((GraphPath(place.path.clone()), id.index))
    }

    /// The way to the initializer `tensor` of the graph `scope`.
    pub(super) fn initializer(
        &self,
        scope: ScopeId,
        tensor: &TensorProto,
    ) -> Result<(GraphPath, usize), Fault> {
        let (graph, place) = self
            .graph(scope)
            .ok_or_else(|| Fault::elsewhere(tensor.name()))?;
        let mut initializers = graph.initializer.iter();
        let position = initializers.position(|t| std::ptr::eq(t, tensor));
        let position = position.ok_or_else(|| Fault::elsewhere(tensor.name()))?;
        Ok((GraphPath(place.path.clone()), position))
    }

    /// The field of the initializer `tensor` of the graph `scope`.
    pub(super) fn initializer_field(&self, scope: ScopeId, tensor: &TensorProto) -> Option<&Field> {
        let (graph, place) = self.graph(scope)?;
        let position = graph
            .initializer
            .iter()
            .position(|t| std::ptr::eq(t, tensor))?;
        place.of(graph_field::INITIALIZER).nth(position)
    }

    /// The fields of the message that `field` holds.
    pub(super) fn inside(&self, field: &Field) -> Option<Vec<Field>> {
        self.anatomy.inside(field).ok()
    }

    /// Whether the value `name` is also an input of the graph `scope`: then its shape is declared.
    pub(super) fn is_input(&self, scope: ScopeId, name: &str) -> bool {
        self.index
            .graph(scope)
            .is_some_and(|graph| graph.input.iter().any(|input| input.name() == name))
    }

    /// The ways to all annotations of the value `name` of the graph `scope`.
    pub(super) fn value_info(&self, scope: ScopeId, name: &str) -> Vec<(GraphPath, usize)> {
        let Some((graph, place)) = self.graph(scope) else {
            return Vec::new();
        };
        let named = |info: &ValueInfoProto| info.name() == name;
        (graph.value_info.iter().enumerate())
            .filter(|(_, info)| named(info))
            .map(|(position, _)| (GraphPath(place.path.clone()), position))
            .collect()
    }

    /// A name like `wanted` that no value and no node of the model has.
    pub(super) fn free_name(&self, wanted: &str, taken: &[String]) -> String {
        let names = |name: &str| {
            taken.iter().any(|taken| taken == name)
                || graphs(self.model.proto()).iter().any(|graph| {
                    let values = graph.input.iter().chain(&graph.output).map(|v| v.name());
                    let tensors = graph.initializer.iter().map(TensorProto::name);
                    let nodes = graph
                        .node
                        .iter()
                        .flat_map(|node| node.output.iter().map(Text::as_str).chain([node.name()]));
                    values
                        .chain(tensors)
                        .chain(nodes)
                        .any(|other| other == name)
                })
        };
        let mut name = wanted.to_owned();
        let mut number = 2;
        while names(&name) {
            name = format!("{wanted}.{number}");
            number += 1;
        }
        name
    }

    /// A change in words.
    pub(super) fn describe(&self, change: &Change) -> String {
        let node = |path: &GraphPath, position: usize| {
            let node = self.proto(path).and_then(|graph| graph.node.get(position));
            node.map_or_else(String::new, |n| format!("{} '{}'", n.op_type(), n.name()))
        };
        let initializer = |path: &GraphPath, position: usize| {
            let graph = self.proto(path);
            let tensor = graph.and_then(|graph| graph.initializer.get(position));
            tensor.map_or_else(String::new, |tensor| tensor.name().to_owned())
        };
        match change {
            Change::AddInitializer(tensor) => {
                format!("initializer '{}' {:?} added", tensor.name(), tensor.dims)
            }
            Change::ReplaceInitializer(path, position, tensor) => {
                let name = initializer(path, *position);
                format!("initializer '{name}' replaced, dims now {:?}", tensor.dims)
            }
            Change::DropInitializer(path, position) => {
                format!("initializer '{}' removed", initializer(path, *position))
            }
            Change::DropValueInfo(path, position) => {
                let graph = self.proto(path);
                let info = graph.and_then(|graph| graph.value_info.get(*position));
                let name = info.map_or("", ValueInfoProto::name);
                format!("annotation of '{name}' removed")
            }
            Change::SetInput(path, position, input, name) => {
                format!("input {input} of {} is '{name}'", node(path, *position))
            }
            Change::SetAttribute(path, position, attribute) => {
                let (name, value) = (attribute.name(), attribute.i());
                format!("attribute {name} of {} is {value}", node(path, *position))
            }
            Change::AddNodes(path, position, nodes) => {
                let added: Vec<String> = (nodes.iter())
                    .map(|node| format!("{} '{}'", node.op_type(), node.name()))
                    .collect();
                format!(
                    "{} added before {}",
                    added.join(", "),
                    node(path, *position)
                )
            }
        }
    }

    /// The file with `changes`.
    pub(super) fn splice(&self, changes: &[Change]) -> Result<Splice, Fault> {
        let mut cuts = Vec::with_capacity(changes.len());
        for change in changes {
            cuts.push(self.cut(change)?);
        }
        let len = self.model.map().len();
        let splice = Splice::new(len, cuts)?;
        match i32::try_from(splice.len_after()) {
            Err(_) if i32::try_from(len).is_ok() => Err(Fault::TooLarge(splice.len_after())),
            _ => Ok(splice),
        }
    }

    fn cut(&self, change: &Change) -> Result<Cut, Fault> {
        use graph_field::{INITIALIZER, NODE, VALUE_INFO};
        match change {
            Change::AddInitializer(tensor) => {
                let place = self.place(&GraphPath(Vec::new()))?;
                Ok(at(
                    place,
                    place.end_of(INITIALIZER),
                    message(INITIALIZER, tensor),
                ))
            }
            Change::ReplaceInitializer(path, position, tensor) => {
                self.instead(path, INITIALIZER, *position, message(INITIALIZER, tensor))
            }
            Change::DropInitializer(path, position) => {
                self.instead(path, INITIALIZER, *position, Vec::new())
            }
            Change::DropValueInfo(path, position) => {
                self.instead(path, VALUE_INFO, *position, Vec::new())
            }
            Change::AddNodes(path, position, nodes) => {
                let place = self.place(path)?;
                let node = nth(place, NODE, *position)?;
                let bytes = nodes.iter().flat_map(|node| message(NODE, node)).collect();
                Ok(at(place, node.whole.start, bytes))
            }
            Change::SetInput(path, node, position, name) => {
                let place = self.place(path)?;
                let node = nth(place, NODE, *node)?;
                let inside = self.anatomy.inside(node)?;
                let mut inputs = inside.iter().filter(|f| f.number == node_field::INPUT);
                let input = inputs
                    .nth(*position)
                    .ok_or_else(|| Fault::elsewhere(name))?;
                let mut bytes = Vec::new();
                prost::encoding::string::encode(1, name, &mut bytes);
                Ok(within(place, node, input.whole.clone(), bytes))
            }
            Change::SetAttribute(path, position, attribute) => {
                let place = self.place(path)?;
                let node = nth(place, NODE, *position)?;
                let inside = self.anatomy.inside(node)?;
                let proto = self.proto(path).and_then(|graph| graph.node.get(*position));
                let there = proto.into_iter().flat_map(|node| &node.attribute);
                let there = there
                    .map(AttributeProto::name)
                    .position(|n| n == attribute.name());
                let bytes = message(node_field::ATTRIBUTE, attribute);
                let mut attributes = inside.iter().filter(|f| f.number == node_field::ATTRIBUTE);
                let range = match there.and_then(|there| attributes.nth(there)) {
                    Some(field) => field.whole.clone(),
                    None => {
                        let end = end_of(&inside, node_field::ATTRIBUTE);
                        let end = end.unwrap_or(node.content.start);
                        end..end
                    }
                };
                Ok(within(place, node, range, bytes))
            }
        }
    }

    fn instead(
        &self,
        path: &GraphPath,
        number: u64,
        position: usize,
        bytes: Vec<u8>,
    ) -> Result<Cut, Fault> {
        let place = self.place(path)?;
        let field = nth(place, number, position)?;
        Ok(Cut {
            frames: place.frames.clone(),
            start: field.whole.start,
            end: field.whole.end,
            bytes,
        })
    }

    fn proto(&self, path: &GraphPath) -> Option<&'m GraphProto> {
        let main = self.model.proto().graph.as_ref()?;
        path.0.iter().try_fold(main, |graph, step| {
            let attribute = graph.node.get(step.node)?.attribute.get(step.attribute)?;
            match step.graph {
                None => attribute.g.as_deref(),
                Some(index) => attribute.graphs.get(index),
            }
        })
    }

    fn place(&self, path: &GraphPath) -> Result<&GraphPlace, Fault> {
        self.proto(path)
            .and_then(|graph| self.anatomy.graph(graph))
            .ok_or_else(|| Fault::elsewhere("a graph"))
    }
}

fn nth(place: &GraphPlace, number: u64, position: usize) -> Result<&Field, Fault> {
    let field = place.of(number).nth(position);
    field.ok_or_else(|| Fault::elsewhere("a field"))
}

fn at(place: &GraphPlace, offset: usize, bytes: Vec<u8>) -> Cut {
    Cut {
        frames: place.frames.clone(),
        start: offset,
        end: offset,
        bytes,
    }
}

fn within(place: &GraphPlace, node: &Field, range: std::ops::Range<usize>, bytes: Vec<u8>) -> Cut {
    Cut {
        frames: place.frames.iter().cloned().chain([frame(node)]).collect(),
        start: range.start,
        end: range.end,
        bytes,
    }
}

/// `inner` as the length-delimited field `number`, below 16.
fn message(number: u64, inner: &impl prost::Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(inner.encoded_len() + 8);
    prost::encoding::encode_varint(number << 3 | 2, &mut bytes);
    prost::encoding::encode_varint(inner.encoded_len() as u64, &mut bytes);
    bytes.extend(inner.encode_to_vec());
    bytes
}

/// What a file with `changes` must decode to: `model` with the same changes, made to what it decodes to.
pub(super) fn expected(model: &ModelProto, changes: &[Change]) -> ModelProto {
    let mut model = model.clone();
    // First what moves nothing, then from behind, inner graphs before those around them, so that no
    // position is used after something before it has moved.
    for change in changes {
        match change {
            Change::ReplaceInitializer(path, position, tensor) => {
                let graph = reach(&mut model, path);
                if let Some(old) = graph.and_then(|g| g.initializer.get_mut(*position)) {
                    old.clone_from(tensor);
                }
            }
            Change::SetInput(path, node, position, name) => {
                let node = reach(&mut model, path).and_then(|g| g.node.get_mut(*node));
                if let Some(input) = node.and_then(|n| n.input.get_mut(*position)) {
                    *input = name.as_str().into();
                }
            }
            Change::SetAttribute(path, node, attribute) => {
                let node = reach(&mut model, path).and_then(|g| g.node.get_mut(*node));
                let Some(node) = node else { continue };
                let mut there = node.attribute.iter_mut();
                match there.find(|a| a.name() == attribute.name()) {
                    Some(old) => old.clone_from(attribute),
                    None => node.attribute.push(attribute.clone()),
                }
            }
            _ => {}
        }
    }
    let mut moving: Vec<(&GraphPath, usize, &Change)> = changes
        .iter()
        .filter_map(|change| match change {
            Change::DropInitializer(path, position)
            | Change::DropValueInfo(path, position)
            | Change::AddNodes(path, position, _) => Some((path, *position, change)),
            _ => None,
        })
        .collect();
    moving.sort_by_key(|(path, position, _)| (path.0.len(), *position));
    for (path, position, change) in moving.into_iter().rev() {
        let Some(graph) = reach(&mut model, path) else {
            continue;
        };
        match change {
            Change::DropInitializer(..) if position < graph.initializer.len() => {
                graph.initializer.remove(position);
            }
            Change::DropValueInfo(..) if position < graph.value_info.len() => {
                graph.value_info.remove(position);
            }
            Change::AddNodes(_, _, nodes) => {
                let position = position.min(graph.node.len());
                graph.node.splice(position..position, nodes.iter().cloned());
            }
            _ => {}
        }
    }
    for change in changes {
        if let (Change::AddInitializer(tensor), Some(graph)) = (change, &mut model.graph) {
            graph.initializer.push(tensor.clone());
        }
    }
    model
}

fn reach<'p>(model: &'p mut ModelProto, path: &GraphPath) -> Option<&'p mut GraphProto> {
    path.0
        .iter()
        .try_fold(model.graph.as_mut()?, |graph, step| {
            let attribute = graph.node.get_mut(step.node)?;
            let attribute = attribute.attribute.get_mut(step.attribute)?;
            match step.graph {
                None => attribute.g.as_deref_mut(),
                Some(index) => attribute.graphs.get_mut(index),
            }
        })
}
