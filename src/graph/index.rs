//! Who produces a value and who reads it, over the main graph and all its subgraphs.
//!
//! In: a decoded graph. Out: an [`Index`] that resolves a value name, seen from any scope, to its
//! [`Origin`]. A subgraph sees the names of the graphs around it (ONNX IR, "Names Within a Graph");
//! an inner name hides an outer one.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::onnx::schema::tensor_proto::DataLocation;
use crate::onnx::schema::{GraphProto, NodeProto, TensorProto, TypeProto, type_proto};
use crate::onnx::{DataType, attribute};

/// A graph within the model: 0 is the main graph, the others are subgraphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeId(usize);

impl ScopeId {
    /// The main graph.
    pub const MAIN: ScopeId = ScopeId(0);

    /// The next graph in the order of [`Index::new`]: a graph, then the subgraphs of its nodes, each
    /// with its own.
    pub(super) fn next(self) -> ScopeId {
        ScopeId(self.0 + 1)
    }
}

/// A node, by its scope and its position in that graph's node list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId {
    /// The graph.
    pub scope: ScopeId,
    /// Position in `GraphProto.node`.
    pub index: usize,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'m> {
    /// Output `output` of a node.
    Node {
        /// The producer.
        id: NodeId,
        /// Which of its outputs.
        output: usize,
    },
    /// An initializer of the graph `scope`.
    Initializer {
        /// The graph that holds it.
        scope: ScopeId,
        /// The tensor.
        tensor: &'m TensorProto,
    },
    /// An input of a graph.
    GraphInput,
    /// Nothing in sight produces it.
    Unknown,
}

struct Scope<'m> {
    graph: &'m GraphProto,
    /// The node whose attribute holds this graph.
    owner: Option<NodeId>,
    /// What this graph defines.
    values: HashMap<&'m str, Value<'m>>,
}

/// A value of a graph. There are as many as nodes, so one table holds all that is known of them.
struct Value<'m> {
    origin: Origin<'m>,
    /// Its type: of inputs, outputs, and values in between where `value_info` has them.
    declared: Option<&'m TypeProto>,
    /// Where its readers, wherever they are, stand in [`Index::readers`].
    readers: Range<u32>,
    /// How many graphs, its own and those inside it, have it as an output.
    outputs: u32,
}

/// Producers and consumers of every value of a model.
pub struct Index<'m> {
    scopes: Vec<Scope<'m>>,
    /// The readers of one value stand together, in the order of the nodes.
    readers: Vec<NodeId>,
}

impl<'m> Index<'m> {
    /// Indexes `graph` and its subgraphs.
    pub fn new(graph: &'m GraphProto) -> Index<'m> {
        let mut index = Index {
            scopes: Vec::new(),
            readers: Vec::new(),
        };
        index.add_scope(graph, None);
        index.add_readers();
        for scope in 0..index.scopes.len() {
            let graph = index.scopes.get(scope).map(|scope| scope.graph);
            for output in graph.into_iter().flat_map(|graph| &graph.output) {
                if let Some(value) = index.value_mut(ScopeId(scope), output.name()) {
                    value.outputs = value.outputs.saturating_add(1);
                }
            }
        }
        index
    }

    /// Counts the readers of every value, gives each value its room, and puts them there.
    fn add_readers(&mut self) {
        let mut total = 0usize;
        self.each_reading(|_, value| {
            value.readers.end = value.readers.end.saturating_add(1);
            total = total.saturating_add(1);
        });
        let mut start = 0u32;
        for value in self.scopes.iter_mut().flat_map(|s| s.values.values_mut()) {
            let count = value.readers.end;
            // The end moves as the readers come.
            value.readers = start..start;
            start = start.saturating_add(count);
        }
        let nobody = NodeId {
            scope: ScopeId::MAIN,
            index: 0,
        };
        let mut readers = vec![nobody; total];
        self.each_reading(|id, value| {
            let slot = usize::try_from(value.readers.end).ok();
            if let Some(slot) = slot.and_then(|slot| readers.get_mut(slot)) {
                *slot = id;
                value.readers.end = value.readers.end.saturating_add(1);
            }
        });
        self.readers = readers;
    }

    /// Shows every node with each value that it reads, as often as it reads it.
    fn each_reading(&mut self, mut show: impl FnMut(NodeId, &mut Value<'m>)) {
        for scope in 0..self.scopes.len() {
            let graph = self.scopes.get(scope).map(|scope| scope.graph);
            let nodes = graph.into_iter().flat_map(|graph| &graph.node);
            for (position, node) in nodes.enumerate() {
                let id = NodeId {
                    scope: ScopeId(scope),
                    index: position,
                };
                for name in &node.input {
                    if let Some(value) = self.value_mut(id.scope, name) {
                        show(id, value);
                    }
                }
            }
        }
    }

    fn add_scope(&mut self, graph: &'m GraphProto, owner: Option<NodeId>) {
        let scope = ScopeId(self.scopes.len());
        let mut values = HashMap::with_capacity(graph.initializer.len() + graph.node.len());
        let mut define = |name, origin| {
            let value = Value {
                origin,
                declared: None,
                readers: 0..0,
                outputs: 0,
            };
            values.insert(name, value);
        };
        for input in &graph.input {
            define(input.name(), Origin::GraphInput);
        }
        // Before IR 4 an initializer was also listed as an input: the tensor is what counts.
        for tensor in &graph.initializer {
            define(tensor.name(), Origin::Initializer { scope, tensor });
        }
        for (position, node) in graph.node.iter().enumerate() {
            for (output, name) in node
                .output
                .iter()
                .enumerate()
                .filter(|(_, name)| !name.is_empty())
            {
                let id = NodeId {
                    scope,
                    index: position,
                };
                define(name, Origin::Node { id, output });
            }
        }
        let declared = graph
            .value_info
            .iter()
            .chain(&graph.output)
            .chain(&graph.input);
        for info in declared {
            if let Some(declared) = &info.r#type
                && let Some(value) = values.get_mut(info.name())
            {
                value.declared = Some(declared);
            }
        }
        self.scopes.push(Scope {
            graph,
            owner,
            values,
        });
        for (position, node) in graph.node.iter().enumerate() {
            let id = NodeId {
                scope,
                index: position,
            };
            for attribute in &node.attribute {
                for inner in attribute.g.as_deref().into_iter().chain(&attribute.graphs) {
                    self.add_scope(inner, Some(id));
                }
            }
        }
    }

    /// Every node, outer graphs before inner ones, each graph in its own (topological) order.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &'m NodeProto)> {
        self.scopes.iter().enumerate().flat_map(|(scope, entry)| {
            entry
                .graph
                .node
                .iter()
                .enumerate()
                .map(move |(index, node)| {
                    (
                        NodeId {
                            scope: ScopeId(scope),
                            index,
                        },
                        node,
                    )
                })
        })
    }

    /// The graph `scope`, if this index made the id.
    pub fn graph(&self, scope: ScopeId) -> Option<&'m GraphProto> {
        Some(self.scopes.get(scope.0)?.graph)
    }

    /// The node `id`, if this index made the id.
    pub fn node(&self, id: NodeId) -> Option<&'m NodeProto> {
        self.scopes.get(id.scope.0)?.graph.node.get(id.index)
    }

    /// Where the value `name`, as seen from `scope`, comes from.
    pub fn origin(&self, scope: ScopeId, name: &str) -> Origin<'m> {
        self.value(scope, name)
            .map_or(Origin::Unknown, |value| value.origin)
    }

    /// The nodes that read the value `name` of `scope`, in that graph and inside it.
    pub fn consumers(&self, scope: ScopeId, name: &str) -> &[NodeId] {
        self.value(scope, name)
            .and_then(|value| {
                let start = usize::try_from(value.readers.start).ok()?;
                let end = usize::try_from(value.readers.end).ok()?;
                self.readers.get(start..end)
            })
            .unwrap_or_default()
    }

    /// Whether `name`, defined in `scope`, is an output of that graph.
    pub fn is_graph_output(&self, scope: ScopeId, name: &str) -> bool {
        self.scopes.get(scope.0).is_some_and(|scope| {
            scope
                .graph
                .output
                .iter()
                .any(|output| output.name() == name)
        })
    }

    /// Whether the value is known before the model runs: an initializer, or computed from nothing
    /// but initializers by nodes that only change form.
    pub fn is_constant(&self, scope: ScopeId, name: &str) -> bool {
        let (mut scope, mut name) = (scope, name);
        for _ in 0..MAX_CHAIN {
            match self.origin(scope, name) {
                Origin::Initializer { .. } => return true,
                Origin::Node { id, .. } => match self.node(id) {
                    Some(node) if matches!(node.op_type(), "Constant" | "ConstantOfShape") => {
                        return true;
                    }
                    Some(node)
                        if matches!(
                            node.op_type(),
                            "Identity"
                                | "Cast"
                                | "Transpose"
                                | "Reshape"
                                | "Unsqueeze"
                                | "DequantizeLinear"
                        ) =>
                    {
                        match node.input.first() {
                            Some(input) => (scope, name) = (id.scope, input),
                            None => return false,
                        }
                    }
                    _ => return false,
                },
                Origin::GraphInput | Origin::Unknown => return false,
            }
        }
        false
    }

    /// The scalar that a constant holds, as a float, where it is an initializer or `Constant` node.
    pub fn constant_tensor(&self, scope: ScopeId, name: &str) -> Option<&'m TensorProto> {
        match self.origin(scope, name) {
            Origin::Initializer { tensor, .. } => Some(tensor),
            Origin::Node { id, .. } => {
                let node = self.node(id)?;
                match node.op_type() {
                    "Constant" => attribute(node, "value")?.t.as_deref(),
                    "Identity" | "Cast" => self.constant_tensor(id.scope, node.input.first()?),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The node whose attribute holds the graph `scope`; `None` for the main graph.
    pub fn owner(&self, scope: ScopeId) -> Option<NodeId> {
        self.scopes.get(scope.0)?.owner
    }

    /// The subgraph in the attribute `name` of the node `owner`.
    pub(super) fn attribute_scope(&self, owner: NodeId, name: &str) -> Option<ScopeId> {
        let graph = attribute(self.node(owner)?, name)?.g.as_deref()?;
        let position = self
            .scopes
            .iter()
            .position(|scope| std::ptr::eq(scope.graph, graph))?;
        Some(ScopeId(position))
    }

    /// The integers of the constant `name`, seen from `scope`: an int64 tensor that lies in the file,
    /// or a `Constant` node's.
    pub fn constant_ints(&self, scope: ScopeId, name: &str) -> Option<Vec<i64>> {
        if let Origin::Node { id, .. } = self.origin(scope, name)
            && let Some(node) = self.node(id)
            && node.op_type() == "Constant"
        {
            if let Some(values) = attribute(node, "value_ints") {
                return Some(values.ints.to_vec());
            }
            if let Some(value) = attribute(node, "value_int") {
                return Some(vec![value.i()]);
            }
        }
        let tensor = self.constant_tensor(scope, name)?;
        if DataType::from_code(tensor.data_type()) != Some(DataType::INT64) {
            return None;
        }
        match &tensor.raw_data {
            Some(raw) => Some(
                raw.as_chunks::<8>()
                    .0
                    .iter()
                    .map(|&bytes| i64::from_le_bytes(bytes))
                    .collect(),
            ),
            None if tensor.data_location() == DataLocation::External => None,
            None => Some(tensor.int64_data.to_vec()),
        }
    }

    /// The last integer of a shape: a constant, or a `Concat` that ends in one.
    pub(super) fn last_int(&self, scope: ScopeId, name: &str) -> Option<i64> {
        if let Some(ints) = self.constant_ints(scope, name) {
            return ints.last().copied();
        }
        let Origin::Node { id, .. } = self.origin(scope, name) else {
            return None;
        };
        let node = self.node(id).filter(|node| node.op_type() == "Concat")?;
        let last = self.constant_ints(id.scope, node.input.last()?)?;
        last.last().copied()
    }

    /// The type that the graph declares for the value `name`, seen from `scope`.
    pub fn declared_type(&self, scope: ScopeId, name: &str) -> Option<&'m type_proto::Tensor> {
        match self.value(scope, name)?.declared?.value.as_ref()? {
            type_proto::Value::TensorType(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The number of axes that the graph declares for a value.
    pub(super) fn rank(&self, scope: ScopeId, name: &str) -> Option<usize> {
        let declared = self.declared_type(scope, name)?;
        Some(declared.shape.as_ref()?.dim.len())
    }

    /// How often the value `name`, seen from `scope`, is read: by nodes of all graphs, subgraphs
    /// included, and as a graph's output. A node that only changes the form of a constant (`Identity`,
    /// `Transpose`, `Cast`, …) stands for the readers of its own output.
    pub fn uses(&self, scope: ScopeId, name: &str) -> usize {
        let mut uses = 0;
        let mut seen = HashSet::new();
        let mut waiting = vec![(scope, name)];
        while let Some((scope, name)) = waiting.pop() {
            let Some(scope) = self.defining_scope(scope, name) else {
                continue;
            };
            if !seen.insert((scope, name)) {
                continue;
            }
            uses += self.output_uses(scope, name);
            for &id in self.consumers(scope, name) {
                let form = self.node(id).filter(|node| FORM.contains(&node.op_type()));
                match form.and_then(|node| node.output.first()) {
                    Some(output) => waiting.push((id.scope, output)),
                    None => uses += 1,
                }
            }
        }
        uses
    }

    /// How many graphs have the value `name` of `scope` as an output: a subgraph may name a value of
    /// a graph around it.
    pub(super) fn output_uses(&self, scope: ScopeId, name: &str) -> usize {
        let scope = self.scopes.get(scope.0);
        let value = scope.and_then(|scope| scope.values.get(name));
        value.map_or(0, |value| {
            usize::try_from(value.outputs).unwrap_or(usize::MAX)
        })
    }

    /// The graph that defines the value `name`, seen from `scope`.
    pub(super) fn defining_scope(&self, scope: ScopeId, name: &str) -> Option<ScopeId> {
        let mut scope = scope;
        loop {
            let entry = self.scopes.get(scope.0)?;
            if entry.values.contains_key(name) {
                return Some(scope);
            }
            scope = entry.owner?.scope;
        }
    }

    /// The value `name`, seen from `scope`.
    fn value(&self, scope: ScopeId, name: &str) -> Option<&Value<'m>> {
        let scope = self.defining_scope(scope, name)?;
        self.scopes.get(scope.0)?.values.get(name)
    }

    fn value_mut(&mut self, scope: ScopeId, name: &str) -> Option<&mut Value<'m>> {
        let scope = self.defining_scope(scope, name)?;
        self.scopes.get_mut(scope.0)?.values.get_mut(name)
    }
}

/// Operators that give a constant another form.
const FORM: &[&str] = &[
    "Identity",
    "Cast",
    "CastLike",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "DequantizeLinear",
];

/// A chain of form-changing nodes is a handful long; a longer one is a cycle or an attack.
pub(super) const MAX_CHAIN: usize = 32;
