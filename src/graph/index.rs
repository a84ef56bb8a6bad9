//! Who produces a value and who reads it, over the main graph and all its subgraphs.
//!
//! In: a decoded graph. Out: an [`Index`] that resolves a value name, seen from any scope, to its
//! [`Origin`]. A subgraph sees the names of the graphs around it (ONNX IR, "Names Within a Graph");
//! an inner name hides an outer one.

use std::collections::{HashMap, HashSet};

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
    origins: HashMap<&'m str, Origin<'m>>,
    /// Declared types: of inputs, outputs, and values in between where `value_info` has them.
    types: HashMap<&'m str, &'m TypeProto>,
    /// Readers of each value that this scope defines, wherever they are.
    consumers: HashMap<&'m str, Vec<NodeId>>,
    /// How many graphs, this one and those inside it, have such a value as an output.
    outputs: HashMap<&'m str, usize>,
}

/// Producers and consumers of every value of a model.
pub struct Index<'m> {
    scopes: Vec<Scope<'m>>,
}

impl<'m> Index<'m> {
    /// Indexes `graph` and its subgraphs.
    pub fn new(graph: &'m GraphProto) -> Index<'m> {
        let mut index = Index { scopes: Vec::new() };
        index.add_scope(graph, None);
        let ids: Vec<NodeId> = index.nodes().map(|(id, _)| id).collect();
        for id in ids {
            let Some(node) = index.node(id) else { continue };
            for name in &node.input {
                if let Some(scope) = index.defining_scope(id.scope, name)
                    && let Some(scope) = index.scopes.get_mut(scope.0)
                {
                    scope.consumers.entry(name.as_str()).or_default().push(id);
                }
            }
        }
        for scope in 0..index.scopes.len() {
            let graph = index.scopes.get(scope).map(|scope| scope.graph);
            for output in graph.into_iter().flat_map(|graph| &graph.output) {
                if let Some(defining) = index.defining_scope(ScopeId(scope), output.name())
                    && let Some(defining) = index.scopes.get_mut(defining.0)
                {
                    *defining.outputs.entry(output.name()).or_default() += 1;
                }
            }
        }
        index
    }

    fn add_scope(&mut self, graph: &'m GraphProto, owner: Option<NodeId>) {
        let scope = ScopeId(self.scopes.len());
        let mut origins = HashMap::new();
        for input in &graph.input {
            origins.insert(input.name(), Origin::GraphInput);
        }
        // Before IR 4 an initializer was also listed as an input: the tensor is what counts.
        for tensor in &graph.initializer {
            origins.insert(tensor.name(), Origin::Initializer { scope, tensor });
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
                origins.insert(name, Origin::Node { id, output });
            }
        }
        let declared = graph
            .value_info
            .iter()
            .chain(&graph.output)
            .chain(&graph.input);
        let types = declared
            .filter_map(|value| Some((value.name(), value.r#type.as_ref()?)))
            .collect();
        self.scopes.push(Scope {
            graph,
            owner,
            origins,
            types,
            consumers: HashMap::new(),
            outputs: HashMap::new(),
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
        self.defining_scope(scope, name)
            .and_then(|scope| self.scopes.get(scope.0)?.origins.get(name).copied())
            .unwrap_or(Origin::Unknown)
    }

    /// The nodes that read the value `name` of `scope`, in that graph and inside it.
    pub fn consumers(&self, scope: ScopeId, name: &str) -> &[NodeId] {
        self.defining_scope(scope, name)
            .and_then(|scope| self.scopes.get(scope.0)?.consumers.get(name))
            .map_or(&[], Vec::as_slice)
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
                return Some(values.ints.clone());
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
            None => Some(tensor.int64_data.clone()),
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
        let scope = self.defining_scope(scope, name)?;
        match self.scopes.get(scope.0)?.types.get(name)?.value.as_ref()? {
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
        let uses = self
            .scopes
            .get(scope.0)
            .and_then(|scope| scope.outputs.get(name));
        uses.copied().unwrap_or_default()
    }

    /// The graph that defines the value `name`, seen from `scope`.
    pub(super) fn defining_scope(&self, scope: ScopeId, name: &str) -> Option<ScopeId> {
        let mut scope = scope;
        loop {
            let entry = self.scopes.get(scope.0)?;
            if entry.origins.contains_key(name) {
                return Some(scope);
            }
            scope = entry.owner?.scope;
        }
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
