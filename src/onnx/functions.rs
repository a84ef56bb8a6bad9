//! A model's own functions, put in the place of their calls.
//!
//! In: a decoded model. Out: its main graph with the bodies of `FunctionProto`s in place of the nodes
//! that call them (ONNX IR, "Functions"), so that what reads the graph sees operators. Bodies of
//! functions share their tensors with the file: nothing of a weight is copied.
//!
//! A function of `ai.onnx` or `com.microsoft` stays: it is a definition of an operator that runtimes
//! have, and that is known by its name. So do calls of functions with another version of `ai.onnx`
//! than the model's.
//!
//! A hostile model can grow exponentially (a function that calls another one twice, and so on): beyond
//! [`FUNCTION_NODES`] nodes or [`FUNCTION_BYTES`] of bodies, or [`FUNCTION_DEPTH`] calls inside each other, the graph is
//! left as it is, calls and all.

use std::collections::{HashMap, HashSet};

use prost::Message;

use super::compact::{List, Text};
use super::schema::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
};
use crate::limits::{FUNCTION_BYTES, FUNCTION_DEPTH, FUNCTION_NODES};

/// The main graph of `model` without calls of its own functions; `None` where there are none, or too
/// many.
pub(super) fn inlined(model: &ModelProto) -> Option<GraphProto> {
    let graph = model.graph.as_ref()?;
    let functions: HashMap<Key<'_>, &FunctionProto> = model
        .functions
        .iter()
        .filter(|function| !matches!(function.domain(), "" | "ai.onnx" | "com.microsoft"))
        .filter(|function| same_operators(&model.opset_import, &function.opset_import))
        .map(|function| {
            let key = (function.domain(), function.name(), function.overload());
            (key, function)
        })
        .collect();
    if functions.is_empty() {
        return None;
    }
    let mut inliner = Inliner {
        functions,
        taken: HashSet::new(),
        calls: 0,
        nodes: 0,
        bytes: 0,
    };
    inliner.take_names(graph);
    let mut result = graph.clone();
    inliner.graph(&mut result, 0)?;
    (inliner.calls > 0).then_some(result)
}

/// Domain, name, overload.
type Key<'m> = (&'m str, &'m str, &'m str);

/// Whether the body of a function means the same in the model: one version of `ai.onnx`.
fn same_operators(model: &[OperatorSetIdProto], function: &[OperatorSetIdProto]) -> bool {
    let version = |imports: &[OperatorSetIdProto]| {
        let mut default = imports
            .iter()
            .filter(|set| matches!(set.domain(), "" | "ai.onnx"));
        default.next().map(OperatorSetIdProto::version)
    };
    match (version(model), version(function)) {
        (Some(model), Some(function)) => model == function,
        (_, None) => true,
        (None, Some(_)) => false,
    }
}

struct Inliner<'m> {
    functions: HashMap<Key<'m>, &'m FunctionProto>,
    /// Value names in use.
    taken: HashSet<Text>,
    calls: usize,
    nodes: usize,
    bytes: usize,
}

impl<'m> Inliner<'m> {
    fn take_names(&mut self, graph: &GraphProto) {
        let infos = graph.input.iter().chain(&graph.output);
        self.taken
            .extend(infos.filter_map(|info| info.name.clone()));
        let tensors = graph.initializer.iter();
        self.taken
            .extend(tensors.filter_map(|tensor| tensor.name.clone()));
        for node in &graph.node {
            self.taken.extend(node.output.iter().cloned());
            for attribute in &node.attribute {
                attribute
                    .g
                    .as_deref()
                    .into_iter()
                    .for_each(|inner| self.take_names(inner));
                attribute
                    .graphs
                    .iter()
                    .for_each(|inner| self.take_names(inner));
            }
        }
    }

    /// Resolves the calls in `graph`; `None` beyond the limits.
    fn graph(&mut self, graph: &mut GraphProto, depth: usize) -> Option<()> {
        graph.node = self.resolved(std::mem::take(&mut graph.node), depth)?;
        Some(())
    }

    fn resolved(&mut self, nodes: List<NodeProto>, depth: usize) -> Option<List<NodeProto>> {
        self.nodes += nodes.len();
        if self.nodes > FUNCTION_NODES || depth > FUNCTION_DEPTH {
            return None;
        }
        let mut result = List::with_capacity(nodes.len());
        for mut node in nodes {
            for attribute in &mut node.attribute {
                let inner = attribute.g.as_deref_mut().into_iter();
                for inner in inner.chain(&mut attribute.graphs) {
                    self.graph(inner, depth + 1)?;
                }
            }
            let key = (node.domain(), node.op_type(), node.overload());
            match self.functions.get(&key).copied() {
                Some(function) => {
                    let body = self.call(&node, function)?;
                    result.extend(self.resolved(body, depth + 1)?);
                }
                None => result.push(node),
            }
        }
        Some(result)
    }

    /// The nodes of `function` as `node` calls it.
    fn call(&mut self, node: &NodeProto, function: &FunctionProto) -> Option<List<NodeProto>> {
        self.bytes = self.bytes.checked_add(function.encoded_len())?;
        if self.bytes > FUNCTION_BYTES {
            return None;
        }
        self.calls += 1;
        let produced: HashSet<&str> = function
            .node
            .iter()
            .flat_map(|node| &node.output)
            .map(Text::as_str)
            .collect();
        let mut names = Names {
            prefix: format!("{}.{}.", node.op_type(), self.calls),
            actual: HashMap::new(),
            taken: &mut self.taken,
        };
        for (position, formal) in function.input.iter().enumerate() {
            let actual = node.input.get(position).cloned().unwrap_or_default();
            names.actual.insert(formal.clone(), actual);
        }
        let mut passed = Vec::new();
        for (formal, actual) in function.output.iter().zip(&node.output) {
            if actual.is_empty() {
                continue;
            }
            if produced.contains(formal.as_str()) {
                names.actual.insert(formal.clone(), actual.clone());
            } else {
                // An input that is handed through.
                passed.push(NodeProto {
                    op_type: Some("Identity".into()),
                    input: [names.of(formal)].into(),
                    output: [actual.clone()].into(),
                    ..NodeProto::default()
                });
            }
        }
        let mut body = function.node.clone();
        for inner in &mut body {
            if let Some(name) = inner.name.as_mut() {
                *name = format!("{}/{name}", node.name()).into();
            }
            give_attributes(inner, node, function);
            names.apply(inner);
        }
        body.extend(passed);
        Some(body)
    }
}

/// Values of a function's body under the names that they get in the graph.
struct Names<'t> {
    prefix: String,
    actual: HashMap<Text, Text>,
    taken: &'t mut HashSet<Text>,
}

impl Names<'_> {
    fn of(&mut self, name: &Text) -> Text {
        if name.is_empty() {
            return Text::new();
        }
        if let Some(actual) = self.actual.get(name) {
            return actual.clone();
        }
        let mut new = format!("{}{name}", self.prefix);
        while self.taken.contains(new.as_str()) {
            new.push('\'');
        }
        let new = Text::from(new);
        self.taken.insert(new.clone());
        self.actual.insert(name.clone(), new.clone());
        new
    }

    fn apply(&mut self, node: &mut NodeProto) {
        for name in node.input.iter_mut().chain(&mut node.output) {
            *name = self.of(name);
        }
        for attribute in &mut node.attribute {
            let inner = attribute.g.as_deref_mut().into_iter();
            for graph in inner.chain(&mut attribute.graphs) {
                let infos = graph.input.iter_mut().chain(&mut graph.output);
                let infos = infos.chain(&mut graph.value_info);
                let tensors = graph.initializer.iter_mut();
                let named = infos
                    .filter_map(|info| info.name.as_mut())
                    .chain(tensors.filter_map(|tensor| tensor.name.as_mut()));
                for name in named {
                    *name = self.of(name);
                }
                for node in &mut graph.node {
                    self.apply(node);
                }
            }
        }
    }
}

/// Puts the call's attributes, or the function's defaults, in the place of references to them, in
/// subgraphs too. A reference to an attribute that was not given disappears.
fn give_attributes(inner: &mut NodeProto, call: &NodeProto, function: &FunctionProto) {
    let given = |name: &str| -> Option<AttributeProto> {
        let own = call
            .attribute
            .iter()
            .find(|attribute| attribute.name() == name);
        let default = || {
            function
                .attribute_proto
                .iter()
                .find(|default| default.name() == name)
        };
        own.or_else(default).cloned()
    };
    for mut attribute in std::mem::take(&mut inner.attribute) {
        if attribute.ref_attr_name().is_empty() {
            let graphs = attribute
                .g
                .as_deref_mut()
                .into_iter()
                .chain(&mut attribute.graphs);
            graphs
                .flat_map(|graph| &mut graph.node)
                .for_each(|node| give_attributes(node, call, function));
            inner.attribute.push(attribute);
        } else if let Some(value) = given(attribute.ref_attr_name()) {
            inner.attribute.push(AttributeProto {
                name: attribute.name,
                ..value
            });
        }
    }
}
