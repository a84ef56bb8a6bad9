//! A file with some bytes cut out and others put in.
//!
//! In: [`Cut`]s into the messages of an [`Anatomy`](super::anatomy::Anatomy). Out: a [`Splice`]: the
//! stretches of the old file that are kept, the new bytes between them, and where each byte of the old
//! file is in the new one. The lengths of the messages around a cut are corrected. Everything that is
//! not cut stays as it is, byte for byte, fields that the schema does not know included; weights are
//! not read, and not copied through memory.

use std::collections::BTreeMap;

use super::ByteSpan;
use super::anatomy::Frame;

/// Bytes of the old file that give way to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The messages around it, outermost first.
    pub frames: Vec<Frame>,
    /// First byte that goes, or before which something is put in.
    pub start: usize,
    /// First byte that stays.
    pub end: usize,
    /// What comes instead.
    pub bytes: Vec<u8>,
}

/// A stretch of the new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'s> {
    /// Bytes of the old file.
    Kept {
        /// Where they lie there.
        from: ByteSpan,
        /// Where they begin in the new file.
        to: u64,
    },
    /// New bytes.
    New {
        /// The bytes.
        bytes: &'s [u8],
        /// What they replace in the old file; empty where nothing.
        from: ByteSpan,
        /// Where they begin in the new file.
        to: u64,
    },
}

/// A file as kept and new stretches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splice {
    /// Sorted, none overlapping.
    cuts: Vec<(ByteSpan, Vec<u8>)>,
    before: u64,
    after: u64,
}

/// Two cuts share bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two changes of the same bytes at byte {offset}")]
pub struct Overlapping {
    /// Where.
    pub offset: usize,
}

impl Splice {
    /// A file of `len` bytes with `cuts`. Cuts at one place come in the order given.
    ///
    /// # Errors
    /// Two cuts share bytes.
    pub fn new(len: usize, cuts: Vec<Cut>) -> Result<Splice, Overlapping> {
        // By how much each message grows: what its own cuts add, and longer lengths inside it.
        let mut growth: BTreeMap<&Frame, i128> = BTreeMap::new();
        for cut in &cuts {
            let grown = cut.bytes.len() as i128 - (cut.end as i128 - cut.start as i128);
            for frame in &cut.frames {
                *growth.entry(frame).or_default() += grown;
            }
        }
        let mut lengths = Vec::new();
        // Inner messages are shorter than those around them.
        let mut frames: Vec<Frame> = growth.keys().map(|&frame| frame.clone()).collect();
        frames.sort_by_key(|frame| (frame.end - frame.start, frame.start));
        let mut growth: BTreeMap<Frame, i128> =
            growth.into_iter().map(|(f, g)| (f.clone(), g)).collect();
        for frame in frames {
            let grown = growth.get(&frame).copied().unwrap_or_default();
            let content = (frame.end - frame.start) as i128 + grown;
            let mut bytes = Vec::new();
            prost::encoding::encode_varint(u64::try_from(content).unwrap_or(0), &mut bytes);
            let longer = bytes.len() as i128 - (frame.start - frame.length_at) as i128;
            if grown == 0 {
                continue;
            }
            for (outer, total) in &mut growth {
                let around = outer.start <= frame.length_at && frame.end <= outer.end;
                if around && *outer != frame {
                    *total += longer;
                }
            }
            lengths.push((frame.length_at, frame.start, bytes));
        }
        let mut all: Vec<(usize, usize, Vec<u8>)> = cuts
            .into_iter()
            .map(|cut| (cut.start, cut.end, cut.bytes))
            .chain(lengths)
            .collect();
        all.sort_by_key(|&(start, end, _)| (start, end));
        let mut after = len as i128;
        let mut reached = 0;
        let mut merged: Vec<(ByteSpan, Vec<u8>)> = Vec::new();
        for (start, end, bytes) in all {
            if start < reached || end < start || end > len {
                return Err(Overlapping { offset: start });
            }
            after += bytes.len() as i128 - (end - start) as i128;
            let touches = !merged.is_empty() && start == reached;
            reached = end;
            match merged.last_mut().filter(|_| touches) {
                Some((span, last)) => {
                    span.len += (end - start) as u64;
                    last.extend(bytes);
                }
                None => merged.push((
                    ByteSpan {
                        offset: start as u64,
                        len: (end - start) as u64,
                    },
                    bytes,
                )),
            }
        }
        Ok(Splice {
            cuts: merged,
            before: len as u64,
            after: u64::try_from(after).unwrap_or(0),
        })
    }

    /// Length of the old file.
    pub fn len_before(&self) -> u64 {
        self.before
    }

    /// Length of the new file.
    pub fn len_after(&self) -> u64 {
        self.after
    }

    /// The new file, piece by piece.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let mut pieces = Vec::with_capacity(self.cuts.len() * 2 + 1);
        let (mut from, mut to) = (0u64, 0u64);
        for (span, bytes) in &self.cuts {
            if span.offset > from {
                let len = span.offset - from;
                pieces.push(Piece::Kept {
                    from: ByteSpan { offset: from, len },
                    to,
                });
                to += len;
            }
            pieces.push(Piece::New {
                bytes,
                from: *span,
                to,
            });
            to += bytes.len() as u64;
            from = span.offset + span.len;
        }
        if from < self.before {
            pieces.push(Piece::Kept {
                from: ByteSpan {
                    offset: from,
                    len: self.before - from,
                },
                to,
            });
        }
        pieces.into_iter()
    }

    /// Where `span` of the old file is in the new one; `None` where some of it was cut.
    pub fn moved(&self, span: ByteSpan) -> Option<ByteSpan> {
        self.pieces().find_map(|piece| match piece {
            Piece::Kept { from, to }
                if from.offset <= span.offset && span.end()? <= from.end()? =>
            {
                Some(ByteSpan {
                    offset: to + (span.offset - from.offset),
                    len: span.len,
                })
            }
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use thin_vec::thin_vec;

    use super::super::anatomy::{Anatomy, frame, graph_field, node_field};
    use super::super::schema::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
    use super::{Cut, Piece, Splice};

    fn assembled(bytes: &[u8], splice: &Splice) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in splice.pieces() {
            match piece {
                Piece::Kept { from, to } => {
                    assert_eq!(out.len() as u64, to);
                    let start = usize::try_from(from.offset).unwrap();
                    out.extend(&bytes[start..start + usize::try_from(from.len).unwrap()]);
                }
                Piece::New { bytes, to, .. } => {
                    assert_eq!(out.len() as u64, to);
                    out.extend(bytes);
                }
            }
        }
        assert_eq!(out.len() as u64, splice.len_after());
        out
    }

    /// A model with a node in a subgraph, and an unknown field in each message around it.
    fn model() -> (Vec<u8>, ModelProto) {
        let inner = GraphProto {
            node: thin_vec![NodeProto {
                input: ["a".into(), "b".into()].into(),
                op_type: Some("Mul".into()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let graph = GraphProto {
            node: thin_vec![NodeProto {
                op_type: Some("If".into()),
                attribute: thin_vec![AttributeProto {
                    name: Some("then_branch".into()),
                    g: Some(Box::new(inner)),
                    ..Default::default()
                }],
                ..Default::default()
            }],
            initializer: thin_vec![TensorProto {
                raw_data: Some(vec![7u8; 100].into()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let unknown = [0xf8, 0x3f, 1]; // field 1023, a varint
        let mut graph = graph.encode_to_vec();
        graph.extend(unknown);
        let mut bytes = vec![7 << 3 | 2];
        prost::encoding::encode_varint(graph.len() as u64, &mut bytes);
        bytes.extend(graph);
        bytes.extend(unknown);
        let model = ModelProto::decode(bytes.as_slice()).unwrap();
        (bytes, model)
    }

    #[test]
    fn lengths_around_a_cut_grow_with_it_and_unknown_fields_stay() {
        let (bytes, model) = model();
        let anatomy = Anatomy::of(&bytes, &model).unwrap();
        let main = model.graph.as_ref().unwrap();
        let inner = main.node[0].attribute[0].g.as_deref().unwrap();
        let place = anatomy.graph(inner).unwrap();
        let node = place.of(graph_field::NODE).next().unwrap();
        let input = anatomy.inside(node).unwrap();
        let input = input
            .iter()
            .filter(|f| f.number == node_field::INPUT)
            .nth(1)
            .unwrap();
        for name in ["", "b", "ab", &"x".repeat(130), &"y".repeat(20_000)] {
            let mut new = Vec::new();
            prost::encoding::string::encode(1, &name.to_owned(), &mut new);
            let frames = place.frames.iter().cloned().chain([frame(node)]).collect();
            let cut = Cut {
                frames,
                start: input.whole.start,
                end: input.whole.end,
                bytes: new,
            };
            let splice = Splice::new(bytes.len(), vec![cut]).unwrap();
            let out = assembled(&bytes, &splice);
            let mut expected = model.clone();
            let graph = expected.graph.as_mut().unwrap();
            let inner = graph.node[0].attribute[0].g.as_deref_mut().unwrap();
            inner.node[0].input[1] = name.into();
            assert_eq!(ModelProto::decode(out.as_slice()).unwrap(), expected);
            let unknown = [0xf8, 0x3f, 1];
            assert_eq!(out.windows(3).filter(|w| *w == unknown).count(), 2);
        }
    }

    #[test]
    fn a_second_graph_that_would_be_merged_is_refused() {
        let (bytes, _) = model();
        let twice = [bytes.clone(), bytes].concat();
        let model = ModelProto::decode(twice.as_slice()).unwrap();
        let error = Anatomy::of(&twice, &model).unwrap_err();
        assert_eq!(error.expected, "one graph in the model");
    }

    #[test]
    fn two_changes_of_the_same_bytes_are_refused() {
        let cut = |start, end| Cut {
            frames: Vec::new(),
            start,
            end,
            bytes: Vec::new(),
        };
        assert!(Splice::new(10, vec![cut(2, 5), cut(4, 6)]).is_err());
        assert!(Splice::new(10, vec![cut(9, 11)]).is_err());
        assert!(Splice::new(10, vec![cut(2, 5), cut(5, 6)]).is_ok());
    }
}
