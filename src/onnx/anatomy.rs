//! Where the messages of a model's graphs lie in its file.
//!
//! In: the bytes of a `.onnx` file and what they decode to. Out: an [`Anatomy`]: for the main graph
//! and every subgraph the byte ranges of its nodes, initializers and annotations, and of the fields of
//! each. With it a graph can be changed by cutting and inserting bytes, without being encoded again:
//! encoding would lose every field that the schema does not know.
//!
//! Protobuf lets a message that occurs twice be merged. No exporter writes models so; such a file is
//! refused here, because what is cut in one part could be added by the other.

use std::collections::HashMap;
use std::ops::Range;

use super::schema::{GraphProto, ModelProto, NodeProto};

/// One field of a message: from its tag to its end, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Field number of the schema.
    pub number: u64,
    /// Tag, length and content.
    pub whole: Range<usize>,
    /// First byte behind the tag: of the length, or of the value.
    pub behind_tag: usize,
    /// The content of a length-delimited field; for others the value.
    pub content: Range<usize>,
    /// Whether it is length-delimited.
    pub delimited: bool,
}

/// A length-delimited message, and the place of its length: both change when its content does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frame {
    /// First byte of the content.
    pub start: usize,
    /// First byte behind the content.
    pub end: usize,
    /// First byte of the length, which ends at `start`.
    pub length_at: usize,
}

/// One graph.
#[derive(Clone, Debug)]
pub struct GraphPlace {
    /// The messages around the graph's fields, outermost first, the graph itself last.
    pub frames: Vec<Frame>,
    /// All its fields, in the file's order.
    pub fields: Vec<Field>,
    /// How it is reached from the main graph: node, attribute, and position in `g` and `graphs`.
    pub path: Vec<Step>,
}

/// One step into a subgraph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Position of the node in its graph.
    pub node: usize,
    /// Position of the attribute in the node.
    pub attribute: usize,
    /// Position of the graph in the attribute: in `graphs`, or none for `g`.
    pub graph: Option<usize>,
}

/// Field numbers of `GraphProto`.
pub mod graph_field {
    /// `node`.
    pub const NODE: u64 = 1;
    /// `initializer`.
    pub const INITIALIZER: u64 = 5;
    /// `value_info`.
    pub const VALUE_INFO: u64 = 13;
}

/// Field numbers of `NodeProto`.
pub mod node_field {
    /// `input`.
    pub const INPUT: u64 = 1;
    /// `attribute`.
    pub const ATTRIBUTE: u64 = 5;
}

/// Field numbers of `TensorProto`.
pub mod tensor_field {
    /// `float_data`.
    pub const FLOAT_DATA: u64 = 4;
}

const MODEL_GRAPH: u64 = 7;
const ATTRIBUTE_G: u64 = 6;
const ATTRIBUTE_GRAPHS: u64 = 11;

/// Why the parts of a file have no place of their own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found} at byte {offset}")]
pub struct Unplaced {
    /// What a place needs.
    pub expected: &'static str,
    /// What is there.
    pub found: String,
    /// Where.
    pub offset: usize,
}

/// The places of all graphs of a model.
#[derive(Debug)]
pub struct Anatomy<'b> {
    bytes: &'b [u8],
    graphs: Vec<GraphPlace>,
    by_address: HashMap<usize, usize>,
}

impl<'b> Anatomy<'b> {
    /// Walks `bytes`, which decode to `model`.
    ///
    /// # Errors
    /// A message that must stand once stands twice, or the bytes are not those of `model`.
    pub fn of(bytes: &'b [u8], model: &ModelProto) -> Result<Anatomy<'b>, Unplaced> {
        let mut anatomy = Anatomy {
            bytes,
            graphs: Vec::new(),
            by_address: HashMap::new(),
        };
        let fields = fields(bytes, 0..bytes.len())?;
        let Some(graph) = &model.graph else {
            return Err(unplaced("a graph", "none", 0));
        };
        let graphs = fields.iter().filter(|field| field.number == MODEL_GRAPH);
        let field = single(graphs, "one graph in the model")?;
        anatomy.add(graph, &frame(field), &[], &[])?;
        Ok(anatomy)
    }

    /// The place of `graph`, a graph of the model by its address.
    pub fn graph(&self, graph: &GraphProto) -> Option<&GraphPlace> {
        let index = self.by_address.get(&address(graph))?;
        self.graphs.get(*index)
    }

    /// The fields of the message that `field` holds.
    ///
    /// # Errors
    /// Its bytes are no message.
    pub fn inside(&self, field: &Field) -> Result<Vec<Field>, Unplaced> {
        fields(self.bytes, field.content.clone())
    }

    fn add(
        &mut self,
        graph: &GraphProto,
        frame: &Frame,
        outer: &[Frame],
        path: &[Step],
    ) -> Result<(), Unplaced> {
        let frames: Vec<Frame> = outer.iter().chain([frame]).cloned().collect();
        let place = GraphPlace {
            fields: fields(self.bytes, frame.start..frame.end)?,
            frames,
            path: path.to_vec(),
        };
        for (node, (proto, field)) in paired(&graph.node, &place, graph_field::NODE)? {
            if proto
                .attribute
                .iter()
                .all(|a| a.g.is_none() && a.graphs.is_empty())
            {
                continue;
            }
            self.add_inner(node, proto, field, &place, path)?;
        }
        self.by_address.insert(address(graph), self.graphs.len());
        self.graphs.push(place);
        Ok(())
    }

    /// The subgraphs of one node.
    fn add_inner(
        &mut self,
        node: usize,
        proto: &NodeProto,
        field: &Field,
        place: &GraphPlace,
        path: &[Step],
    ) -> Result<(), Unplaced> {
        let inside = fields(self.bytes, field.content.clone())?;
        let attributes = inside.iter().filter(|f| f.number == node_field::ATTRIBUTE);
        for (attribute, (proto, field_of)) in proto.attribute.iter().zip(attributes).enumerate() {
            let inside = fields(self.bytes, field_of.content.clone())?;
            let outer: Vec<Frame> = (place.frames.iter().cloned())
                .chain([frame(field), frame(field_of)])
                .collect();
            let step = |graph| Step {
                node,
                attribute,
                graph,
            };
            if let Some(inner) = proto.g.as_deref() {
                let found = inside.iter().filter(|f| f.number == ATTRIBUTE_G);
                let found = frame(single(found, "one graph in the attribute")?);
                let path: Vec<Step> = path.iter().copied().chain([step(None)]).collect();
                self.add(inner, &found, &outer, &path)?;
            }
            let found = inside.iter().filter(|f| f.number == ATTRIBUTE_GRAPHS);
            for (index, (inner, found)) in proto.graphs.iter().zip(found).enumerate() {
                let path: Vec<Step> = path.iter().copied().chain([step(Some(index))]).collect();
                self.add(inner, &frame(found), &outer, &path)?;
            }
        }
        Ok(())
    }
}

impl GraphPlace {
    /// The graph's fields of this number, in order.
    pub fn of(&self, number: u64) -> impl Iterator<Item = &Field> {
        self.fields
            .iter()
            .filter(move |field| field.number == number)
    }

    /// Where a field of this number is added: behind the last one of the same or a lower number, which
    /// is where an encoder would have put it.
    pub fn end_of(&self, number: u64) -> usize {
        end_of(&self.fields, number).unwrap_or_else(|| self.frames.last().map_or(0, |f| f.start))
    }
}

/// Which graph it is, as a number that threads may share.
fn address(graph: &GraphProto) -> usize {
    std::ptr::from_ref(graph).addr()
}

/// The end of the last field of this or a lower number.
pub fn end_of(fields: &[Field], number: u64) -> Option<usize> {
    let last = fields.iter().rfind(|field| field.number <= number)?;
    Some(last.whole.end)
}

/// The frame of a length-delimited field.
pub fn frame(field: &Field) -> Frame {
    Frame {
        start: field.content.start,
        end: field.content.end,
        length_at: field.behind_tag,
    }
}

type Paired<'p, T> = std::iter::Enumerate<std::vec::IntoIter<(&'p T, &'p Field)>>;

/// Decoded messages beside their fields; refused where the numbers differ.
fn paired<'p, T>(
    messages: &'p [T],
    place: &'p GraphPlace,
    number: u64,
) -> Result<Paired<'p, T>, Unplaced> {
    let fields: Vec<&Field> = place.of(number).collect();
    if fields.len() != messages.len() {
        let offset = place.frames.last().map_or(0, |frame| frame.start);
        return Err(unplaced(
            "as many fields as decoded messages",
            &format!("{} for {}", fields.len(), messages.len()),
            offset,
        ));
    }
    let pairs: Vec<_> = messages.iter().zip(fields).collect();
    Ok(pairs.into_iter().enumerate())
}

fn single<'f>(
    mut fields: impl Iterator<Item = &'f Field>,
    expected: &'static str,
) -> Result<&'f Field, Unplaced> {
    match (fields.next(), fields.next()) {
        (Some(field), None) => Ok(field),
        (None, _) => Err(unplaced(expected, "none", 0)),
        (_, Some(second)) => Err(unplaced(expected, "another", second.whole.start)),
    }
}

fn unplaced(expected: &'static str, found: &str, offset: usize) -> Unplaced {
    Unplaced {
        expected,
        found: found.to_owned(),
        offset,
    }
}

/// The fields of the message at `range`. The caller has seen the bytes decode, so what fails here is a
/// range that is no message.
fn fields(bytes: &[u8], range: Range<usize>) -> Result<Vec<Field>, Unplaced> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let whole = at;
        let tag = varint(bytes, &mut at, range.end)?;
        let behind_tag = at;
        let (content, delimited) = match tag & 7 {
            0 => {
                let start = at;
                varint(bytes, &mut at, range.end)?;
                (start..at, false)
            }
            1 => (at..at.saturating_add(8), false),
            5 => (at..at.saturating_add(4), false),
            2 => {
                let length = varint(bytes, &mut at, range.end)?;
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                (at..at.saturating_add(length), true)
            }
            other => return Err(unplaced("a field", &format!("wire type {other}"), whole)),
        };
        if content.end > range.end {
            return Err(unplaced(
                "a field within its message",
                "a longer one",
                whole,
            ));
        }
        at = content.end;
        found.push(Field {
            number: tag >> 3,
            whole: whole..at,
            behind_tag,
            content,
            delimited,
        });
    }
    Ok(found)
}

fn varint(bytes: &[u8], at: &mut usize, end: usize) -> Result<u64, Unplaced> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = match bytes.get(*at) {
            Some(byte) if *at < end => *byte,
            _ => break,
        };
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(unplaced("a number", "its end missing", *at))
}
