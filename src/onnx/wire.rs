//! The protobuf wire format, scanned before it is decoded.
//!
//! In: the bytes of a `.onnx` file. Out: how many of them are not weights, or the first fault. Promised: after a scan
//! that succeeds, the messages that may nest or hold weights are well-formed, and nested no deeper than
//! [`Limits::depth`].
//!
//! Why: what decoding may take follows the bytes that are not weights ([`limits::allowed_graph`]), so that a small
//! file stays small; `prost` bounds recursion, but not amplification. An empty sub-message is two bytes on the wire and
//! tens in memory, so 8 MB of them decode to hundreds. The scan walks the messages by their schema and allocates
//! nothing; [`super::compact`] then counts what decoding takes. The scan is also what can say at which byte a truncated
//! file breaks off.

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

/// Where and why a scan stopped: the bytes are not a well-formed message.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) offset: usize,
    pub(super) message: &'static str,
    pub(super) found: String,
}

/// Scans `bytes` as a `ModelProto`. Returns how many of them are not weights.
pub(super) fn scan(bytes: &[u8], limits: &Limits) -> Result<usize, Fault> {
    let mut scanner = Scanner {
        bytes,
        at: 0,
        mapped: 0,
        limits,
    };
    scanner.message(Kind::Model, bytes.len(), 0)?;
    Ok(bytes.len().saturating_sub(scanner.mapped))
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
    /// `raw_data`, a slice of the map.
    Mapped,
    /// A text, packed scalars, or a message that real models leave out and that holds neither graphs nor weights.
    Other,
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

    /// What field `number` holds when it is length-delimited (numbers of `onnx-ml.proto`).
    fn payload(self, number: u64) -> Payload {
        use Kind::*;
        use Payload::{Mapped, Message, Other};
        match (self, number) {
            (Model, 7) => Message(Graph),
            (Model, 8) | (Function, 9) => Message(OperatorSet),
            (Model, 20) => Message(Training),
            (Model, 25) => Message(Function),
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
            (Attribute, 14 | 15) | (ValueInfo, 2) => Message(Type),
            (Attribute, 22 | 23) => Message(SparseTensor),
            (Tensor, 9) => Mapped,
            (Type, 1 | 4 | 7 | 8 | 9) => Message(TypeCase),
            // Length-delimited, number 1 is `elem_type` of sequence and optional, number 2 `shape`.
            (TypeCase, 1) => Message(Type),
            (TypeCase, 2) => Message(Shape),
            (Shape, 1) => Message(Dimension),
            _ => Other,
        }
    }
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Bytes of weights so far.
    mapped: usize,
    limits: &'a Limits,
}

impl Scanner<'_> {
    fn fault(&self, kind: Kind, found: impl Into<String>) -> Fault {
        Fault {
            offset: self.at,
            message: kind.name(),
            found: found.into(),
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
        while self.at < end {
            let tag = self.varint(kind, end)?;
            let number = tag >> 3;
            if number == 0 {
                return Err(self.fault(kind, "field number 0"));
            }
            match tag & 7 {
                0 => {
                    self.varint(kind, end)?;
                }
                1 => {
                    self.skip(kind, 8, end)?;
                }
                5 => {
                    self.skip(kind, 4, end)?;
                }
                2 => {
                    let length = self.varint(kind, end)?;
                    let start = self.at;
                    let read = self.skip(kind, length, end)?;
                    match kind.payload(number) {
                        Payload::Mapped => self.mapped += read,
                        Payload::Other => {}
                        Payload::Message(inner) => {
                            let inner_end = self.at;
                            self.at = start;
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
pub(super) mod tests {
    use prost::Message;
    use thin_vec::thin_vec;

    use super::super::schema;
    use super::{Fault, Limits, scan};

    /// `field` of wire type 2 around `inner`.
    pub(in crate::onnx) fn field(number: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        prost::encoding::encode_varint(inner.len() as u64, &mut out);
        out.extend_from_slice(inner);
        out
    }

    #[test]
    fn weights_are_told_from_structure() {
        let weight = schema::TensorProto {
            name: Some("w".into()),
            raw_data: Some(vec![0; 1000].into()),
            ..Default::default()
        };
        let model = field(7, &field(5, &weight.encode_to_vec()));
        let structure = scan(&model, &Limits::default()).unwrap();
        assert_eq!(structure, model.len() - 1000);
    }

    #[test]
    fn deep_nesting_is_refused() {
        // TypeProto → sequence_type → elem_type → …
        let mut inner = Vec::new();
        for _ in 0..200 {
            inner = field(4, &field(1, &inner));
        }
        let model = field(7, &field(11, &field(2, &inner)));
        let Fault { message, found, .. } = scan(&model, &Limits::default()).unwrap_err();
        assert!(found.contains("more than 100 nested"), "{message}: {found}");
    }

    #[test]
    fn every_truncation_of_a_model_is_named_or_harmless() {
        let graph = schema::GraphProto {
            node: thin_vec![schema::NodeProto {
                input: ["x".into(), "w".into()].into(),
                output: ["y".into()].into(),
                op_type: Some("MatMul".into()),
                ..Default::default()
            }],
            initializer: thin_vec![schema::TensorProto {
                name: Some("w".into()),
                dims: [4, 4].into(),
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
                Err(Fault { offset, .. }) => assert!(offset <= length),
                Ok(_) => panic!("{length} of {} bytes", bytes.len()),
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
