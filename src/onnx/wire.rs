//! The protobuf wire format, scanned before it is decoded.
//!
//! In: the bytes of a `.onnx` file. Out: nothing, or the first fault. Promised: after a scan that
//! succeeds, decoding the same bytes allocates at most about [`Limits::decoded_bytes`].
//!
//! Why: `prost` bounds recursion, but not amplification. An empty sub-message is two bytes on the
//! wire and hundreds in memory, so 8 MB of them decode to gigabytes. The scan walks every message
//! by its schema, allocates nothing, and adds up what decoding would take: the limit follows the bytes that
//! are not weights ([`limits::allowed_graph`]), so that a small file stays small. It is also what can say at
//! which byte a truncated file breaks off.

use std::mem::size_of;

use super::schema;
use crate::limits;

/// What reading a model may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory that the decoded graph may take, in bytes, and never more than [`limits::allowed_graph`] of
    /// the file without its weights, which stay in the map.
    pub decoded_bytes: u64,
    /// Nesting of messages: subgraphs in attributes of nodes of subgraphs, and so on.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            decoded_bytes: limits::GRAPH_BYTES,
            depth: limits::GRAPH_DEPTH,
        }
    }
}

/// Where and why a scan stopped.
#[derive(Debug)]
pub(super) enum Fault {
    /// The bytes are not a well-formed message.
    Malformed {
        offset: usize,
        message: &'static str,
        found: String,
    },
    /// Decoding would take more than this limit.
    TooLarge(u64),
}

/// Scans `bytes` as a `ModelProto`.
pub(super) fn scan(bytes: &[u8], limits: &Limits) -> Result<(), Fault> {
    let mut scanner = Scanner {
        bytes,
        at: 0,
        charged: 0,
        mapped: 0,
        limits,
    };
    scanner.message(Kind::Model, bytes.len(), 0)
}

/// The messages of ONNX's schema that nest or repeat.
#[derive(Clone, Copy)]
enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    SparseTensor,
    ValueInfo,
    Type,
    /// The members of `TypeProto`'s oneof: all hold types or shapes.
    TypeCase,
    Shape,
    Dimension,
    Function,
    Training,
    Entry,
    OperatorSet,
}

/// What a length-delimited field holds.
enum Payload {
    Message(Kind),
    /// A string or bytes that decoding copies.
    Copied,
    /// `raw_data`, a slice of the map.
    Mapped,
    /// Packed scalars, at most 8 bytes of memory for each byte on the wire.
    Packed,
    /// A message that real models leave out. Charged a flat rate that bounds what it decodes to.
    Rare,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Model => "ModelProto",
            Kind::Graph => "GraphProto",
            Kind::Node => "NodeProto",
            Kind::Attribute => "AttributeProto",
            Kind::Tensor => "TensorProto",
            Kind::SparseTensor => "SparseTensorProto",
            Kind::ValueInfo => "ValueInfoProto",
            Kind::Type | Kind::TypeCase => "TypeProto",
            Kind::Shape => "TensorShapeProto",
            Kind::Dimension => "TensorShapeProto.Dimension",
            Kind::Function => "FunctionProto",
            Kind::Training => "TrainingInfoProto",
            Kind::Entry => "StringStringEntryProto",
            Kind::OperatorSet => "OperatorSetIdProto",
        }
    }

    /// Bytes of memory of one decoded message, without what it points to.
    fn size(self) -> u64 {
        let size = match self {
            Kind::Model => size_of::<schema::ModelProto>(),
            Kind::Graph => size_of::<schema::GraphProto>(),
            Kind::Node => size_of::<schema::NodeProto>(),
            Kind::Attribute => size_of::<schema::AttributeProto>(),
            Kind::Tensor => size_of::<schema::TensorProto>(),
            Kind::SparseTensor => size_of::<schema::SparseTensorProto>(),
            Kind::ValueInfo => size_of::<schema::ValueInfoProto>(),
            Kind::Type | Kind::TypeCase => size_of::<schema::TypeProto>(),
            Kind::Shape => size_of::<schema::TensorShapeProto>(),
            Kind::Dimension => size_of::<schema::tensor_shape_proto::Dimension>(),
            Kind::Function => size_of::<schema::FunctionProto>(),
            Kind::Training => size_of::<schema::TrainingInfoProto>(),
            Kind::Entry => size_of::<schema::StringStringEntryProto>(),
            Kind::OperatorSet => size_of::<schema::OperatorSetIdProto>(),
        };
        size as u64
    }

    /// Whether the message that field `number` holds is the only one.
    fn is_single(self, number: u64) -> bool {
        matches!(
            (self, number),
            (Kind::Model, 7)
                | (Kind::Training, 1 | 2)
                | (Kind::Attribute, 5 | 6 | 14 | 22)
                | (Kind::SparseTensor, 1 | 2)
                | (Kind::ValueInfo, 2)
                | (Kind::Type | Kind::TypeCase, _)
        )
    }

    /// What field `number` holds when it is length-delimited (numbers of `onnx-ml.proto`).
    fn payload(self, number: u64) -> Payload {
        use Kind::*;
        use Payload::{Copied, Mapped, Message, Packed, Rare};
        match (self, number) {
            (Model, 7) => Message(Graph),
            (Model, 8) | (Function, 9) => Message(OperatorSet),
            (Model, 20) => Message(Training),
            (Model, 25) => Message(Function),
            (Model, 26) | (Graph, 14) | (Node, 10) | (Tensor, 3) | (Type, 5) => Rare,
            (Training, 1 | 2) => Message(Graph),
            (Graph, 1) | (Function, 7) => Message(Node),
            (Graph, 5) => Message(Tensor),
            (Graph, 11..=13) | (Function, 12) => Message(ValueInfo),
            (Graph, 15) => Message(SparseTensor),
            (Node, 5) | (Function, 11) => Message(Attribute),
            (Model, 14)
            | (Graph, 16)
            | (Node, 9)
            | (Tensor, 13 | 16)
            | (ValueInfo, 4)
            | (Function, 14)
            | (Training, 3 | 4) => Message(Entry),
            (Attribute, 5 | 10) | (SparseTensor, 1 | 2) => Message(Tensor),
            (Attribute, 6 | 11) => Message(Graph),
            (Attribute, 7 | 8) | (Tensor, 1 | 4 | 5 | 7 | 10 | 11) | (SparseTensor, 3) => Packed,
            (Attribute, 14 | 15) | (ValueInfo, 2) => Message(Type),
            (Attribute, 22 | 23) => Message(SparseTensor),
            (Tensor, 9) => Mapped,
            (Type, 1 | 4 | 7 | 8 | 9) => Message(TypeCase),
            // Length-delimited, number 1 is `elem_type` of sequence and optional, number 2 `shape`.
            (TypeCase, 1) => Message(Type),
            (TypeCase, 2) => Message(Shape),
            (Shape, 1) => Message(Dimension),
            _ => Copied,
        }
    }
}

/// The heap's own, for each block.
const BLOCK: u64 = 16;
/// A vector that holds anything has room for this many.
const LEAST: u64 = 4;
/// The slot of a string in its message or vector.
const STRING: u64 = 24;
/// Flat charge per wire byte of a [`Payload::Rare`] message: no message of the schema that is left
/// to it takes more than 128 bytes of memory for two on the wire.
const RARE_FACTOR: u64 = 64;

/// How often each field was met in a message, by its number; the schema's go to 26.
type Seen = [u32; 32];

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Memory that decoding what was read so far takes.
    charged: u64,
    /// Bytes of weights so far.
    mapped: u64,
    limits: &'a Limits,
}

impl Scanner<'_> {
    fn fault(&self, kind: Kind, found: impl Into<String>) -> Fault {
        Fault::Malformed {
            offset: self.at,
            message: kind.name(),
            found: found.into(),
        }
    }

    fn charge(&mut self, bytes: u64) -> Result<(), Fault> {
        self.charged = self.charged.saturating_add(bytes);
        let structure = (self.at as u64).saturating_sub(self.mapped);
        let limit = limits::allowed_graph(structure).min(self.limits.decoded_bytes);
        match self.charged > limit {
            true => Err(Fault::TooLarge(limit)),
            false => Ok(()),
        }
    }

    /// Charges the next thing of `size` bytes in field `number` of a message that has had `seen` so far.
    fn item(&mut self, seen: &mut Seen, number: u64, size: u64) -> Result<(), Fault> {
        let slot = usize::try_from(number).ok().and_then(|n| seen.get_mut(n));
        let before = slot.map_or(0, |count| {
            let before = *count;
            *count = count.saturating_add(1);
            before
        });
        match u64::from(before) {
            0 => self.charge(BLOCK + LEAST * size),
            1..LEAST => Ok(()),
            _ => self.charge(size),
        }
    }

    fn varint(&mut self, kind: Kind, end: usize) -> Result<u64, Fault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = match self.bytes.get(self.at) {
                Some(byte) if self.at < end => *byte,
                _ => return Err(self.fault(kind, "the end in the middle of a number")),
            };
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.fault(kind, "a number of more than 64 bits"))
    }

    fn skip(&mut self, kind: Kind, length: u64, end: usize) -> Result<usize, Fault> {
        let left = end.saturating_sub(self.at);
        match usize::try_from(length) {
            Ok(length) if length <= left => {
                self.at += length;
                Ok(length)
            }
            _ => Err(self.fault(
                kind,
                format!("a field of {length} bytes where {left} are left"),
            )),
        }
    }

    fn message(&mut self, kind: Kind, end: usize, depth: usize) -> Result<(), Fault> {
        if depth > self.limits.depth {
            return Err(self.fault(
                kind,
                format!("more than {} nested messages", self.limits.depth),
            ));
        }
        let mut seen = Seen::default();
        while self.at < end {
            let tag = self.varint(kind, end)?;
            let number = tag >> 3;
            if number == 0 {
                return Err(self.fault(kind, "field number 0"));
            }
            match tag & 7 {
                0 => {
                    self.varint(kind, end)?;
                    // Repeated scalars may come unpacked.
                    self.item(&mut seen, number, 8)?;
                }
                1 => {
                    self.skip(kind, 8, end)?;
                    self.item(&mut seen, number, 8)?;
                }
                5 => {
                    self.skip(kind, 4, end)?;
                    self.item(&mut seen, number, 8)?;
                }
                2 => {
                    let length = self.varint(kind, end)?;
                    let start = self.at;
                    let read = self.skip(kind, length, end)? as u64;
                    match kind.payload(number) {
                        Payload::Mapped => self.mapped += read,
                        Payload::Copied => {
                            self.item(&mut seen, number, STRING)?;
                            self.charge(read + BLOCK)?;
                        }
                        Payload::Packed => self.charge(read.saturating_mul(8))?,
                        // Two bytes on the wire are the tag and the length of an empty one.
                        Payload::Rare => {
                            self.charge((read + 2).saturating_mul(RARE_FACTOR))?;
                        }
                        Payload::Message(inner) => {
                            let inner_end = self.at;
                            self.at = start;
                            match kind.is_single(number) {
                                true => self.charge(BLOCK + inner.size())?,
                                false => self.item(&mut seen, number, inner.size())?,
                            }
                            self.message(inner, inner_end, depth + 1)?;
                        }
                    }
                }
                other => {
                    return Err(
                        self.fault(kind, format!("wire type {other}, which ONNX never uses"))
                    );
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::{Fault, Limits, scan, schema};

    /// `field` of wire type 2 around `inner`.
    fn field(number: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        prost::encoding::encode_varint(inner.len() as u64, &mut out);
        out.extend_from_slice(inner);
        out
    }

    #[test]
    fn a_bomb_of_empty_messages_is_refused_before_it_is_decoded() {
        // ModelProto.graph.node.attribute: 4 million empty attributes in 8 MB.
        let attributes = [5 << 3 | 2, 0].repeat(4 << 20);
        let model = field(7, &field(1, &attributes));
        let limits = Limits::default();
        assert!(matches!(scan(&model, &limits), Err(Fault::TooLarge(_))));
        // A smaller one is measured by its own size.
        let model = field(7, &field(1, &[5 << 3 | 2, 0].repeat(1 << 19)));
        let limit = crate::limits::allowed_graph(model.len() as u64);
        assert!(limit < 64 << 20);
        match scan(&model, &limits) {
            Err(Fault::TooLarge(at)) => assert!(at <= limit),
            other => panic!("{other:?}"),
        }
        // Weights do not raise the limit.
        let weight = schema::TensorProto {
            raw_data: Some(vec![0; 64 << 20].into()),
            ..Default::default()
        };
        let graph = [field(5, &weight.encode_to_vec()), field(1, &attributes)].concat();
        assert!(
            matches!(scan(&field(7, &graph), &limits), Err(Fault::TooLarge(at)) if at < 256 << 20)
        );
    }

    #[test]
    fn deep_nesting_is_refused() {
        // TypeProto → sequence_type → elem_type → …
        let mut inner = Vec::new();
        for _ in 0..200 {
            inner = field(4, &field(1, &inner));
        }
        let model = field(7, &field(11, &field(2, &inner)));
        assert!(matches!(
            scan(&model, &Limits::default()),
            Err(Fault::Malformed { .. })
        ));
    }

    #[test]
    fn every_truncation_of_a_model_is_named_or_harmless() {
        let graph = schema::GraphProto {
            node: vec![schema::NodeProto {
                input: vec!["x".into(), "w".into()],
                output: vec!["y".into()],
                op_type: Some("MatMul".into()),
                ..Default::default()
            }],
            initializer: vec![schema::TensorProto {
                name: Some("w".into()),
                dims: vec![4, 4],
                raw_data: Some(vec![1u8; 64].into()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let bytes = schema::ModelProto {
            graph: Some(graph),
            ..Default::default()
        }
        .encode_to_vec();
        assert!(scan(&bytes, &Limits::default()).is_ok());
        for length in 1..bytes.len() {
            match scan(&bytes[..length], &Limits::default()) {
                Err(Fault::Malformed { offset, .. }) => assert!(offset <= length),
                other => panic!("{length} of {} bytes: {other:?}", bytes.len()),
            }
        }
    }

    #[test]
    fn what_the_scan_accepts_prost_decodes() {
        let bytes = field(7, &field(1, &field(4, b"MatMul")));
        assert!(scan(&bytes, &Limits::default()).is_ok());
        assert!(schema::ModelProto::decode(bytes.as_slice()).is_ok());
    }
}
