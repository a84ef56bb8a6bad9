//! New names for values of a graph, in all places where they are written and read.

use std::collections::{HashMap, HashSet};

use crate::onnx::Text;
use crate::onnx::schema::GraphProto;

/// Every value name that `graph` defines or reads, in its subgraphs too.
pub(super) fn names(graph: &GraphProto) -> HashSet<Text> {
    let mut names = HashSet::new();
    let mut waiting = vec![graph];
    while let Some(graph) = waiting.pop() {
        let infos = graph
            .input
            .iter()
            .chain(&graph.output)
            .chain(&graph.value_info);
        names.extend(infos.filter_map(|info| info.name.clone()));
        let tensors = graph.initializer.iter();
        names.extend(tensors.filter_map(|tensor| tensor.name.clone()));
        for node in &graph.node {
            names.extend(node.input.iter().chain(&node.output).cloned());
            let attributes = node.attribute.iter();
            waiting.extend(
                attributes.flat_map(|attribute| {
                    attribute.g.as_deref().into_iter().chain(&attribute.graphs)
                }),
            );
        }
    }
    names
}

/// Renames values by `new`, old name to new one, in `graph` and its subgraphs. No new name may be in
/// use.
pub(super) fn rename(graph: &mut GraphProto, new: &HashMap<Text, Text>) {
    let replace = |name: &mut Text| {
        if let Some(new) = new.get(name.as_str()) {
            name.clone_from(new);
        }
    };
    let infos = graph.input.iter_mut().chain(&mut graph.output);
    let infos = infos
        .chain(&mut graph.value_info)
        .filter_map(|info| info.name.as_mut());
    infos.for_each(replace);
    let sparse = graph
        .sparse_initializer
        .iter_mut()
        .filter_map(|sparse| sparse.values.as_mut());
    let tensors = graph.initializer.iter_mut().chain(sparse);
    tensors
        .filter_map(|tensor| tensor.name.as_mut())
        .for_each(replace);
    for node in &mut graph.node {
        node.input
            .iter_mut()
            .chain(&mut node.output)
            .for_each(replace);
        for attribute in &mut node.attribute {
            let inner = attribute
                .g
                .as_deref_mut()
                .into_iter()
                .chain(&mut attribute.graphs);
            inner.for_each(|graph| rename(graph, new));
        }
    }
}
