//! Who produces a value and who reads it, over the main graph and all its subgraphs.
//!
//! In: a decoded graph. Out: an [`Index`] that resolves a value name, seen from any scope, to its
//! [`Origin`]. A subgraph sees the names of the graphs around it (ONNX IR, "Names Within a Graph");
//! an inner name hides an outer one.

use std::collections::HashMap;

use crate::onnx::attribute;
use crate::onnx::schema::{GraphProto, NodeProto, TensorProto};

/// A graph within the model: 0 is the main graph, the others are subgraphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeId(usize);

impl ScopeId {
    /// The main graph.
    pub const MAIN: ScopeId = ScopeId(0);
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
    /// Readers of each value that this scope defines, wherever they are.
    consumers: HashMap<&'m str, Vec<NodeId>>,
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
        self.scopes.push(Scope {
            graph,
            owner,
            origins,
            consumers: HashMap::new(),
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

    fn defining_scope(&self, scope: ScopeId, name: &str) -> Option<ScopeId> {
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

/// A chain of form-changing nodes is a handful long; a longer one is a cycle or an attack.
pub(super) const MAX_CHAIN: usize = 32;
