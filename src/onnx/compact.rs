//! How decoded messages lie in memory: smaller than `prost`'s own strings and vectors, and counted.
//!
//! In: a `.onnx` file's bytes and a budget. Out: the decoded model, or that it would take more. Promised: decoding
//! allocates at most the budget.
//!
//! Why: an ONNX graph is hundreds of thousands of short texts in short lists. In the standard library's types a
//! node takes ten times its bytes on the wire: an empty list or text is three words, a list of one has room for four,
//! and a value's name is held by the node that makes it, by every node that reads it and by its type. The messages
//! that `prost` generates are built with [`List`] (one word, exactly as long as what is in it) and [`Text`] (one word)
//! instead, and each text of a file is held once.
//!
//! How: the generated code names its types and functions by the path of the `prost` crate, which may be set
//! (`Config::prost_path`, see `build.rs`). It is this module, which is `prost` but for what is defined here.

use std::cell::RefCell;
use std::collections::HashSet;

pub use prost::bytes;
pub use prost::{DecodeError, Enumeration, Message, Name, Oneof, UnknownEnumValue};

use super::schema::ModelProto;

/// A text of a message: names, operators, keys. Cheap to clone.
pub type Text = arcstr::ArcStr;
/// A list in a message.
pub type List<T> = thin_vec::ThinVec<T>;

/// What generated code takes for the `alloc` crate.
pub mod alloc {
    pub use std::boxed;
    pub mod string {
        pub use super::super::Text as String;
    }
    pub mod vec {
        pub use super::super::List as Vec;
    }
}

/// Why a model was not decoded.
pub(super) enum Failure {
    /// It would take more memory than it may.
    TooLarge,
    /// `prost` could not.
    Malformed(DecodeError),
}

/// Decodes `map`, in at most `budget` bytes of memory beside it.
pub(super) fn decode(map: bytes::Bytes, budget: u64) -> Result<ModelProto, Failure> {
    DECODING.set(Some(Decoding {
        left: budget,
        exceeded: false,
        texts: HashSet::new(),
        scratch: String::new(),
    }));
    let decoded = ModelProto::decode(map);
    let exceeded = DECODING.take().is_some_and(|decoding| decoding.exceeded);
    decoded.map_err(|error| match exceeded {
        true => Failure::TooLarge,
        false => Failure::Malformed(error),
    })
}

thread_local! {
    /// The decoding that goes on. Generated code passes no state of ours along.
    static DECODING: RefCell<Option<Decoding>> = const { RefCell::new(None) };
}

struct Decoding {
    /// Bytes that may still be allocated.
    left: u64,
    exceeded: bool,
    /// Every text so far, once.
    texts: HashSet<Text>,
    scratch: String,
}

/// The heap's own for each block, and what its size is rounded up by.
const BLOCK: usize = 16;
/// In front of the elements of a [`List`] and of a [`Text`]: two words.
const HEADER: usize = 16;
/// What the set of texts takes for each: a word and a byte, in a table that is more than half empty after it has
/// grown, and is copied when it grows.
const ENTRY: usize = 32;

impl Decoding {
    fn charge(&mut self, bytes: usize) -> Result<(), DecodeError> {
        match self.left.checked_sub(bytes as u64) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                self.exceeded = true;
                // Any error ends the decoding, and only `prost` can make one: that of an empty number.
                prost::encoding::decode_varint(&mut [].as_slice()).map(drop)
            }
        }
    }
}

/// Counts `bytes` that are about to be allocated.
fn charge(bytes: usize) -> Result<(), DecodeError> {
    DECODING.with_borrow_mut(|decoding| match decoding {
        Some(decoding) => decoding.charge(bytes),
        None => Ok(()),
    })
}

/// Makes room for `more` elements, counted. Most lists have one to four elements, and get room for no more; long ones
/// grow by an eighth.
fn reserve<T>(list: &mut List<T>, more: usize) -> Result<(), DecodeError> {
    let (length, capacity) = (list.len(), list.capacity());
    if capacity - length >= more {
        return Ok(());
    }
    let more = more.max(length / 8);
    let block = match capacity {
        0 => BLOCK + HEADER,
        _ => 0,
    };
    charge(block.saturating_add(more.saturating_mul(size_of::<T>())))?;
    list.reserve_exact(more);
    Ok(())
}

/// What generated code takes for `prost::encoding`.
pub mod encoding {
    pub use prost::encoding::{DecodeContext, WireType, skip_field, wire_type};

    use super::bytes::{Buf, BufMut, Bytes};
    use super::{
        BLOCK, DECODING, DecodeError, ENTRY, HEADER, List, Message, Text, charge, reserve,
    };

    /// A field of scalars: read and written by `prost`, kept in a [`List`].
    macro_rules! scalar {
        ($name:ident, $type:ty) => {
            pub mod $name {
                pub use prost::encoding::$name::*;

                use super::*;

                pub fn merge_repeated(
                    wire_type: WireType,
                    values: &mut List<$type>,
                    buf: &mut impl Buf,
                    context: DecodeContext,
                ) -> Result<(), DecodeError> {
                    if wire_type != WireType::LengthDelimited {
                        let mut value = <$type>::default();
                        merge(wire_type, &mut value, buf, context)?;
                        reserve(values, 1)?;
                        values.push(value);
                        return Ok(());
                    }
                    // Packed: at least a byte for each, in a vector that is let go again.
                    charge(packed_bytes(buf).saturating_mul(size_of::<$type>()))?;
                    let mut packed = Vec::new();
                    prost::encoding::$name::merge_repeated(wire_type, &mut packed, buf, context)?;
                    reserve(values, packed.len())?;
                    values.extend(packed);
                    Ok(())
                }
            }
        };
    }
    scalar!(float, f32);
    scalar!(double, f64);
    scalar!(int32, i32);
    scalar!(int64, i64);
    scalar!(uint64, u64);

    /// The length that a length-delimited field in front of `buf` states, as far as there are bytes for it.
    fn packed_bytes(buf: &impl Buf) -> usize {
        let mut head = buf.chunk();
        let stated = prost::encoding::decode_varint(&mut head).unwrap_or(u64::MAX);
        usize::try_from(stated).map_or(buf.remaining(), |stated| stated.min(buf.remaining()))
    }

    /// Bytes before `length` bytes of field `tag`.
    fn prefix(tag: u32, length: usize) -> usize {
        prost::encoding::key_len(tag) + prost::encoding::encoded_len_varint(length as u64)
    }

    fn encode_bytes(tag: u32, bytes: &[u8], buf: &mut impl BufMut) {
        prost::encoding::encode_key(tag, WireType::LengthDelimited, buf);
        prost::encoding::encode_varint(bytes.len() as u64, buf);
        buf.put_slice(bytes);
    }

    /// Fields of type `string`.
    pub mod string {
        use super::*;

        pub fn encode(tag: u32, value: &Text, buf: &mut impl BufMut) {
            encode_bytes(tag, value.as_bytes(), buf);
        }

        pub fn encode_repeated(tag: u32, values: &[Text], buf: &mut impl BufMut) {
            for value in values {
                encode(tag, value, buf);
            }
        }

        pub fn encoded_len(tag: u32, value: &Text) -> usize {
            prefix(tag, value.len()) + value.len()
        }

        pub fn encoded_len_repeated(tag: u32, values: &[Text]) -> usize {
            values.iter().map(|value| encoded_len(tag, value)).sum()
        }

        pub fn merge(
            wire_type: WireType,
            value: &mut Text,
            buf: &mut impl Buf,
            context: DecodeContext,
        ) -> Result<(), DecodeError> {
            DECODING.with_borrow_mut(|decoding| {
                let Some(decoding) = decoding else {
                    let mut text = String::new();
                    prost::encoding::string::merge(wire_type, &mut text, buf, context)?;
                    *value = text.into();
                    return Ok(());
                };
                let length = packed_bytes(buf);
                if length > decoding.scratch.capacity() {
                    decoding.charge(length)?;
                }
                let mut text = std::mem::take(&mut decoding.scratch);
                prost::encoding::string::merge(wire_type, &mut text, buf, context)?;
                *value = match decoding.texts.get(text.as_str()) {
                    Some(known) => known.clone(),
                    None => {
                        decoding.charge(BLOCK + HEADER + ENTRY + text.len())?;
                        let new = Text::from(text.as_str());
                        decoding.texts.insert(new.clone());
                        new
                    }
                };
                decoding.scratch = text;
                Ok(())
            })
        }

        pub fn merge_repeated(
            wire_type: WireType,
            values: &mut List<Text>,
            buf: &mut impl Buf,
            context: DecodeContext,
        ) -> Result<(), DecodeError> {
            let mut value = Text::default();
            merge(wire_type, &mut value, buf, context)?;
            reserve(values, 1)?;
            values.push(value);
            Ok(())
        }
    }

    /// What a field of type `bytes` is held as.
    pub trait Held: AsRef<[u8]> + Default {
        /// Takes the bytes that `prost` cut out of the file.
        ///
        /// # Errors
        /// They would be copied, and there is no memory for them.
        fn take(bytes: Bytes) -> Result<Self, DecodeError>;
    }

    /// A slice of the map.
    impl Held for Bytes {
        fn take(bytes: Bytes) -> Result<Self, DecodeError> {
            Ok(bytes)
        }
    }

    /// A copy.
    impl Held for List<u8> {
        fn take(bytes: Bytes) -> Result<Self, DecodeError> {
            let mut list = List::new();
            reserve(&mut list, bytes.len())?;
            list.extend_from_slice(&bytes);
            Ok(list)
        }
    }

    /// Fields of type `bytes`.
    pub mod bytes {
        use super::*;

        pub fn encode(tag: u32, value: &impl Held, buf: &mut impl BufMut) {
            encode_bytes(tag, value.as_ref(), buf);
        }

        pub fn encode_repeated<B: Held>(tag: u32, values: &[B], buf: &mut impl BufMut) {
            for value in values {
                encode(tag, value, buf);
            }
        }

        pub fn encoded_len(tag: u32, value: &impl Held) -> usize {
            let length = value.as_ref().len();
            prefix(tag, length) + length
        }

        pub fn encoded_len_repeated<B: Held>(tag: u32, values: &[B]) -> usize {
            values.iter().map(|value| encoded_len(tag, value)).sum()
        }

        pub fn merge<B: Held>(
            wire_type: WireType,
            value: &mut B,
            buf: &mut impl Buf,
            context: DecodeContext,
        ) -> Result<(), DecodeError> {
            let mut slice = Bytes::new();
            prost::encoding::bytes::merge(wire_type, &mut slice, buf, context)?;
            *value = B::take(slice)?;
            Ok(())
        }

        pub fn merge_repeated<B: Held>(
            wire_type: WireType,
            values: &mut List<B>,
            buf: &mut impl Buf,
            context: DecodeContext,
        ) -> Result<(), DecodeError> {
            let mut value = B::default();
            merge(wire_type, &mut value, buf, context)?;
            reserve(values, 1)?;
            values.push(value);
            Ok(())
        }
    }

    /// Fields that hold messages.
    pub mod message {
        pub use prost::encoding::message::{
            encode, encode_repeated, encoded_len, encoded_len_repeated,
        };

        use super::*;

        /// A single message: where it is boxed, its block is new.
        pub fn merge<M: Message, B: Buf>(
            wire_type: WireType,
            message: &mut M,
            buf: &mut B,
            context: DecodeContext,
        ) -> Result<(), DecodeError> {
            charge(BLOCK + size_of::<M>())?;
            prost::encoding::message::merge(wire_type, message, buf, context)
        }

        pub fn merge_repeated<M: Message + Default>(
            wire_type: WireType,
            messages: &mut List<M>,
            buf: &mut impl Buf,
            context: DecodeContext,
        ) -> Result<(), DecodeError> {
            reserve(messages, 1)?;
            let mut message = M::default();
            prost::encoding::message::merge(wire_type, &mut message, buf, context)?;
            messages.push(message);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use thin_vec::thin_vec;

    use super::super::schema::{self, ModelProto};
    use super::super::wire::tests::field;
    use super::{Failure, Text, decode};
    use crate::limits::allowed_graph;

    fn is_too_large(bytes: Vec<u8>, budget: u64) -> bool {
        matches!(decode(bytes.into(), budget), Err(Failure::TooLarge))
    }

    /// Real `fixtures`, where decoding takes most.
    fn graphs() -> Vec<Vec<u8>> {
        let exports = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/exports/");
        ["dynamo-gpt2", "optimum124-opt-legacy"]
            .iter()
            .flat_map(|name| std::fs::read_dir(format!("{exports}{name}")).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "onnx"))
            .map(|path| std::fs::read(path).unwrap())
            .collect()
    }

    #[test]
    fn a_bomb_of_empty_messages_is_refused_by_its_size() {
        // ModelProto.graph.node.attribute: 4 million empty attributes in 8 MB.
        let attributes = [5 << 3 | 2, 0].repeat(4 << 20);
        let model = field(7, &field(1, &attributes));
        let budget = allowed_graph(model.len() as u64);
        assert!(budget < 64 << 20);
        assert!(is_too_large(model, budget));
        // Half a million of them fit into what every graph may take, and no more than that.
        let model = field(7, &field(1, &[5 << 3 | 2, 0].repeat(1 << 17)));
        assert!(is_too_large(model.clone(), 16 << 20));
        assert!(decode(model.into(), 64 << 20).is_ok());
    }

    /// Texts, numbers and bytes are counted like messages.
    #[test]
    fn whatever_grows_is_counted() {
        let small = 64 << 10;
        let text = field(4, &[b'x'; 200_000]);
        let texts = (0..20_000u32).flat_map(|n| field(1, format!("{n:05}").as_bytes()));
        // `AttributeProto.ints`, packed; `s`; `strings`, empty.
        let attribute = |inner: &[u8]| field(7, &field(1, &field(5, inner)));
        for bomb in [
            field(7, &field(1, &text)),
            field(7, &field(1, &texts.collect::<Vec<u8>>())),
            attribute(&field(8, &[1; 20_000])),
            attribute(&[8 << 3, 1].repeat(20_000)),
            attribute(&field(4, &[1; 100_000])),
            attribute(&field(9, &[]).repeat(20_000)),
        ] {
            assert!(is_too_large(bomb.clone(), small));
            assert!(decode(bomb.into(), 16 << 20).is_ok());
        }
    }

    #[test]
    fn each_text_is_held_once_and_the_next_file_starts_anew() {
        let node = |input: &str| schema::NodeProto {
            input: [input.into()].into(),
            output: ["y".into()].into(),
            ..Default::default()
        };
        let graph = schema::GraphProto {
            node: thin_vec![node("x"), node("x")],
            ..Default::default()
        };
        let model = schema::ModelProto {
            graph: Some(graph),
            ..Default::default()
        };
        let decoded = || {
            let Ok(model) = decode(model.encode_to_vec().into(), 1 << 20) else {
                panic!("not decoded");
            };
            model.graph.unwrap().node
        };
        let (one, other) = (decoded(), decoded());
        assert!(Text::ptr_eq(&one[0].input[0], &one[1].input[0]));
        assert!(!Text::ptr_eq(&one[0].input[0], &other[0].input[0]));
    }

    /// Byte for byte what was read, where exporters write fields in order.
    #[test]
    fn what_is_decoded_is_encoded_again() {
        let graphs = graphs();
        assert!(graphs.len() >= 2);
        for bytes in graphs {
            let model = ModelProto::decode(bytes.as_slice()).unwrap();
            let again = model.encode_to_vec();
            assert_eq!(again.len(), model.encoded_len());
            assert_eq!(ModelProto::decode(again.as_slice()).unwrap(), model);
        }
    }
}
