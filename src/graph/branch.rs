//! One branch of an `If` in the place of the `If`.
//!
//! An exporter merges two decoders into one file: `If(use_cache_branch)`, one branch for a prompt, one
//! for a step with a cache. Coefficients are collected on whole prompts, and an output of the main
//! graph cannot name a value of a branch. So for collecting the branch of the prompt is put in place
//! of the `If`; for evaluation the `If` stays.

use std::collections::{HashMap, HashSet};

use super::index::{Index, NodeId, Origin, ScopeId};
use super::rename::rename;
use crate::onnx::Text;
use crate::onnx::schema::{GraphProto, NodeProto};

/// The input by which optimum's merged decoders choose: false for a prompt without a cache.
const USE_CACHE_BRANCH: &str = "use_cache_branch";

/// The branch of an `If` of the main graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Branch {
    /// The `If`, a node of the main graph.
    pub(super) owner: NodeId,
    /// The branch that is taken.
    pub(super) scope: ScopeId,
}

/// The attribute of `If` that holds the graph for false.
pub(super) const ELSE: &str = "else_branch";

impl Branch {
    /// The branch that a prompt takes, of the `If` that holds the graph `scope`.
    ///
    /// # Errors
    /// The graph is not a branch of an `If` in the main graph that chooses by `use_cache_branch`.
    pub(super) fn of_prompt(index: &Index<'_>, scope: ScopeId) -> Result<Branch, String> {
        let owner = index.owner(scope).ok_or("it stands in no subgraph")?;
        let node = index.node(owner).filter(|node| node.op_type() == "If");
        let Some(node) = node.filter(|_| owner.scope == ScopeId::MAIN) else {
            return Err("it stands in a subgraph that is no branch of the main graph".into());
        };
        let condition = node.input.first().map_or("", Text::as_str);
        if condition != USE_CACHE_BRANCH
            || !matches!(index.origin(owner.scope, condition), Origin::GraphInput)
        {
            return Err(format!(
                "it stands in a branch of '{}', which is chosen by '{condition}', not by the input \
                 {USE_CACHE_BRANCH}",
                node.name()
            ));
        }
        let scope = index
            .attribute_scope(owner, ELSE)
            .ok_or_else(|| format!("'{}' has no {ELSE}", node.name()))?;
        Ok(Branch { owner, scope })
    }
}

/// Makes the graph `branch` of the `If` node `owner` fit to stand in its place: for every output of the
/// `If` it gets an `Identity`, and values that bear one of the names `taken` get another.
pub(super) fn unfold(owner: &NodeProto, branch: &mut GraphProto, taken: &HashSet<String>) {
    let mut defined: Vec<&str> = branch
        .initializer
        .iter()
        .map(|tensor| tensor.name())
        .collect();
    defined.extend(
        branch
            .node
            .iter()
            .flat_map(|node| &node.output)
            .map(Text::as_str),
    );
    let renamed: HashMap<Text, Text> = defined
        .into_iter()
        .filter(|name| !name.is_empty() && taken.contains(*name))
        .map(|name| (name.into(), format!("kvw.branch.{name}").into()))
        .collect();
    rename(branch, &renamed);
    for (inner, outer) in branch.output.iter().zip(&owner.output) {
        if !outer.is_empty() {
            branch
                .node
                .push(super::patch::node("Identity", &[inner.name()], outer));
        }
    }
}
