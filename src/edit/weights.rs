//! The numbers of a stored `W_down`, whatever its encoding.
//!
//! In: an MLP of an opened file. Out: [`Weights`], which reads rows of the stored matrix and decodes
//! them. Codes are read by `pread`, a piece of a row at a time; scales and zero points, a small part of
//! the whole, are held.
//!
//! | operator | element | from |
//! |---|---|---|
//! | float | as stored | |
//! | `MatMulNBits` | `(q − zero_point) · scale`, low bits first, blocks along K | ONNX Runtime, ContribOperators.md |
//! | `MatMulBnb4` | `table[q] · absmax`, high half first, blocks over the flat matrix | ONNX Runtime, blockwise_quant_block_bnb4.h |
//! | `DequantizeLinear` | `(q − zero_point) · scale`, low bits first | ONNX |
//! | integer products | `(q − zero_point) · scale` | ONNX, `MatMulInteger`, `QLinearMatMul` |

use bytes::Bytes;

use super::Error;
use super::read::{Source, blocks, short};
use super::scale::Block;
use crate::graph::{Bnb4Type, Dequantizer, Encoding, Linear, Stored};
use crate::onnx::schema::TensorProto;
use crate::onnx::{ByteSpan, DataType, ModelFile, Storage};

/// A stored matrix, opened.
pub(super) struct Weights {
    bytes: Stretch,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// The stored axis along the neurons.
    pub(super) axis: usize,
    elements: Elements,
}

/// Where its bytes are.
enum Stretch {
    File {
        source: Source,
        span: ByteSpan,
    },
    /// A typed field, which was decoded with the graph.
    Memory(Bytes),
}

impl Stretch {
    fn len(&self) -> u64 {
        match self {
            Stretch::File { span, .. } => span.len,
            Stretch::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Fills `into` from byte `offset` of the stretch.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        match self {
            Stretch::File { source, span } => {
                source.read_at(span.offset.saturating_add(offset), into)
            }
            Stretch::Memory(bytes) => {
                let start = short(offset).min(bytes.len());
                let end = start.saturating_add(into.len()).min(bytes.len());
                for (into, &byte) in into
                    .iter_mut()
                    .zip(bytes.get(start..end).unwrap_or_default())
                {
                    *into = byte;
                }
                Ok(())
            }
        }
    }
}

enum Elements {
    Float(DataType),
    Codes(Codes),
}

/// How codes become numbers.
struct Codes {
    /// Bits of a code: 2, 4 or 8.
    bits: u64,
    signed: bool,
    /// Whether the first code of a byte is in its upper half.
    high_first: bool,
    /// Stored elements from one row to the next; the columns, or more where rows are padded.
    stride: u64,
    decode: Decode,
}

enum Decode {
    /// `(q − zero) · scale`.
    Affine { scales: Groups, zeros: Zeros },
    /// `table[q] · scale`.
    Table {
        table: &'static [f32; 16],
        scales: Groups,
    },
}

enum Zeros {
    /// The same everywhere.
    One(f32),
    Each(Groups),
}

/// Values that stand for groups of elements.
struct Groups {
    values: Vec<f32>,
    by: By,
}

/// Which group an element belongs to.
#[derive(Clone, Copy)]
enum By {
    /// One for all.
    All,
    /// Blocks of `rows` × `columns`; `per_row` groups from one row of blocks to the next.
    Grid {
        rows: u64,
        columns: u64,
        per_row: u64,
    },
    /// Runs of the flat matrix.
    Flat(u64),
}

impl Groups {
    fn at(&self, row: u64, column: u64, stride: u64) -> f32 {
        let index = match self.by {
            By::All => 0,
            By::Grid {
                rows,
                columns,
                per_row,
            } => (row / rows.max(1)) * per_row + column / columns.max(1),
            By::Flat(run) => (row * stride + column) / run.max(1),
        };
        usize::try_from(index)
            .ok()
            .and_then(|index| self.values.get(index).copied())
            .unwrap_or_default()
    }
}

/// Elements decoded at a time. A multiple of the codes in a byte.
const RUN: usize = 1 << 16;

impl Weights {
    /// The weights of `down`, a down projection of `model`.
    ///
    /// # Errors
    /// Outside: the file cannot be read. Inside: why the encoding is not understood.
    pub(super) fn open(
        model: &ModelFile,
        down: &Linear<'_>,
    ) -> Result<Result<Weights, String>, Error> {
        let weight = &down.weight;
        let bytes = match model.storage(weight.tensor)? {
            Storage::Inline(span) => Stretch::File {
                source: Source::open(model.canonical_path())?,
                span,
            },
            Storage::External { file, span, .. } => Stretch::File {
                source: Source::open(&file)?,
                span,
            },
            Storage::Typed => Stretch::Memory(model.bytes(weight.tensor)?),
        };
        let dtype = model.data_type(weight.tensor)?;
        let shape = match shape(down) {
            Ok(shape) => shape,
            Err(reason) => return Ok(Err(reason)),
        };
        let elements = match &weight.encoding {
            Encoding::Float if dtype.is_scalable_float() => Elements::Float(dtype),
            Encoding::Float => return Ok(Err(format!("it is stored as {dtype}"))),
            _ => match codes(model, down, &shape, dtype)? {
                Ok(codes) => Elements::Codes(codes),
                Err(reason) => return Ok(Err(reason)),
            },
        };
        let (bits, stride) = match &elements {
            Elements::Float(dtype) => (dtype.bits().unwrap_or(8), shape.columns),
            Elements::Codes(codes) => (codes.bits, codes.stride),
        };
        let needed = (shape.rows.checked_mul(stride))
            .and_then(|elements| elements.checked_mul(bits))
            .map(|bits| bits.div_ceil(8));
        let sizes = usize::try_from(shape.rows)
            .ok()
            .zip(usize::try_from(shape.columns).ok());
        match (needed, sizes) {
            (Some(needed), Some((rows, columns))) if needed == bytes.len() => Ok(Ok(Weights {
                bytes,
                rows,
                columns,
                axis: shape.axis,
                elements,
            })),
            _ => {
                let (rows, columns, len) = (shape.rows, shape.columns, bytes.len());
                Ok(Err(format!(
                    "{len} bytes do not hold {rows}×{columns} elements"
                )))
            }
        }
    }

    /// The number of neurons.
    pub(super) fn neurons(&self) -> usize {
        match self.axis {
            0 => self.rows,
            _ => self.columns,
        }
    }

    /// Bits of a stored element.
    pub(super) fn bits(&self) -> u64 {
        match &self.elements {
            Elements::Float(dtype) => dtype.bits().unwrap_or(8),
            Elements::Codes(codes) => codes.bits,
        }
    }

    /// Whether they are floats, as they are used.
    pub(super) fn is_float(&self) -> bool {
        matches!(self.elements, Elements::Float(_))
    }

    /// Calls `each` with all stored bytes, a block at a time.
    pub(super) fn for_each_block(&self, mut each: impl FnMut(&[u8])) -> Result<(), Error> {
        let mut bytes = Vec::new();
        let whole = ByteSpan {
            offset: 0,
            len: self.bytes.len(),
        };
        for part in blocks(whole) {
            bytes.resize(short(part.len), 0);
            self.bytes.read_at(part.offset, &mut bytes)?;
            each(&bytes);
        }
        Ok(())
    }

    /// Calls `each` with the decoded elements of stored row `row` in the columns `wanted`, which ascend.
    pub(super) fn for_each_in_row(
        &self,
        row: usize,
        wanted: impl IntoIterator<Item = usize>,
        mut each: impl FnMut(f32),
    ) -> Result<(), Error> {
        let (bits, stride) = match &self.elements {
            Elements::Float(dtype) => (dtype.bits().unwrap_or(8), self.columns as u64),
            Elements::Codes(codes) => (codes.bits, codes.stride),
        };
        let first_bit = (row as u64).saturating_mul(stride).saturating_mul(bits);
        let mut wanted = wanted.into_iter().peekable();
        let mut block = Block::with_capacity(0);
        for start in (0..self.columns).step_by(RUN) {
            let end = self.columns.min(start + RUN);
            if wanted.peek().is_none_or(|&column| column >= end) {
                continue;
            }
            let from = first_bit + start as u64 * bits;
            let until = first_bit + end as u64 * bits;
            let len = short(until.div_ceil(8) - from / 8);
            block.reserve(len);
            self.bytes.read_at(from / 8, block.resized(len))?;
            while let Some(column) = wanted.next_if(|&column| column < end) {
                let value = match &self.elements {
                    Elements::Float(dtype) => block.value(*dtype, column - start),
                    Elements::Codes(codes) => {
                        let bit = from % 8 + (column - start) as u64 * bits;
                        let byte = block.bytes().get(short(bit / 8)).copied();
                        byte.map(|byte| codes.decode(byte, bit % 8, row as u64, column as u64))
                    }
                };
                each(value.unwrap_or_default());
            }
        }
        Ok(())
    }
}

impl Codes {
    fn decode(&self, byte: u8, bit: u64, row: u64, column: u64) -> f32 {
        let shift = match self.high_first {
            true => 8 - self.bits - bit,
            false => bit,
        };
        let mask = u8::MAX >> (8 - self.bits);
        let code = (byte >> shift) & mask;
        let signed = || {
            let up = 8 - self.bits;
            (code << up).cast_signed() >> up
        };
        match &self.decode {
            Decode::Table { table, scales } => {
                let entry = table.get(usize::from(code)).copied().unwrap_or_default();
                entry * scales.at(row, column, self.stride)
            }
            Decode::Affine { scales, zeros } => {
                let code = match self.signed {
                    true => f32::from(signed()),
                    false => f32::from(code),
                };
                let zero = match zeros {
                    Zeros::One(zero) => *zero,
                    Zeros::Each(zeros) => zeros.at(row, column, self.stride),
                };
                (code - zero) * scales.at(row, column, self.stride)
            }
        }
    }
}

struct Shape {
    rows: u64,
    columns: u64,
    axis: usize,
}

fn shape(down: &Linear<'_>) -> Result<Shape, String> {
    if let Encoding::Opaque(reason) = &down.weight.encoding {
        return Err(reason.clone());
    }
    let (k, n) = (down.k, down.n);
    let of = |rows, columns, axis| Shape {
        rows,
        columns,
        axis,
    };
    match (&down.weight.encoding, down.weight.input_axis) {
        (Encoding::NBits(_) | Encoding::Bnb4(_), _) | (_, Some(1)) => Ok(of(n, k, 1)),
        (_, Some(_)) => Ok(of(k, n, 0)),
        (_, None) => Err("which axis of the stored weight is d_ff is not known".to_owned()),
    }
}

fn codes(
    model: &ModelFile,
    down: &Linear<'_>,
    shape: &Shape,
    dtype: DataType,
) -> Result<Result<Codes, String>, Error> {
    let integer = |decode| {
        let bits = dtype.bits().filter(|&bits| bits <= 8);
        match bits.filter(|_| dtype.is_quantized_integer()) {
            Some(bits) => Ok(Codes {
                bits,
                signed: dtype.is_signed(),
                high_first: false,
                stride: shape.columns,
                decode,
            }),
            None => Err(format!("its codes are stored as {dtype}")),
        }
    };
    Ok(match &down.weight.encoding {
        Encoding::NBits(nbits) => {
            let blocks = shape.columns.div_ceil(nbits.block_size.max(1));
            if !matches!(nbits.bits, 2 | 4 | 8) || nbits.block_size * nbits.bits % 8 != 0 {
                return Ok(Err(format!("blocks of {} bits", nbits.bits)));
            }
            if nbits.g_idx.is_some() {
                return Ok(Err("its input channels are reordered (g_idx)".to_owned()));
            }
            let by = By::Grid {
                rows: 1,
                columns: nbits.block_size,
                per_row: blocks,
            };
            let count = shape.rows.saturating_mul(blocks);
            let scales = match floats(model, &nbits.scales, count)? {
                Ok(values) => Groups { values, by },
                Err(reason) => return Ok(Err(reason)),
            };
            let zeros = match &nbits.zero_points {
                None => Zeros::One(f32::from(1u8 << (nbits.bits - 1))),
                Some(zeros) => {
                    let values = match model.data_type(zeros.tensor)?.is_scalable_float() {
                        true => floats(model, zeros, count)?,
                        false => {
                            let bytes = model.bytes(zeros.tensor)?;
                            packed_rows(&bytes, shape.rows, blocks, nbits.bits)
                        }
                    };
                    match values {
                        Ok(values) => Zeros::Each(Groups { values, by }),
                        Err(reason) => return Ok(Err(reason)),
                    }
                }
            };
            Ok(Codes {
                bits: nbits.bits,
                signed: false,
                high_first: false,
                stride: blocks.saturating_mul(nbits.block_size),
                decode: Decode::Affine { scales, zeros },
            })
        }
        Encoding::Bnb4(bnb4) => {
            let elements = shape.rows.saturating_mul(shape.columns);
            let count = elements.div_ceil(bnb4.block_size.max(1));
            let scales = match floats(model, &bnb4.absmax, count)? {
                Ok(values) => Groups {
                    values,
                    by: By::Flat(bnb4.block_size),
                },
                Err(reason) => return Ok(Err(reason)),
            };
            Ok(Codes {
                bits: 4,
                signed: false,
                high_first: true,
                stride: shape.columns,
                decode: Decode::Table {
                    table: match bnb4.quant_type {
                        Bnb4Type::Fp4 => &FP4,
                        Bnb4Type::Nf4 => &NF4,
                    },
                    scales,
                },
            })
        }
        Encoding::Dequantized(dequantizer) => {
            let by = dequantizer_groups(dequantizer, shape);
            let scale = values(model, &dequantizer.scale)?;
            let count = scale.len();
            let scales = Groups {
                by: if count == 1 { By::All } else { by },
                values: scale,
            };
            let zeros = match &dequantizer.zero_point {
                None => Zeros::One(0.0),
                Some(zeros) => Zeros::Each(Groups {
                    values: values(model, zeros)?,
                    by: scales.by,
                }),
            };
            integer(Decode::Affine { scales, zeros })
        }
        Encoding::Integer(operands) => {
            let scales = channels(model, &operands.scale, shape)?;
            let zeros = match &operands.zero_point {
                None => Zeros::One(0.0),
                Some(zeros) => Zeros::Each(channels(model, zeros, shape)?),
            };
            integer(Decode::Affine { scales, zeros })
        }
        Encoding::QLinear(operands) => {
            let scales = channels(model, &operands.scale, shape)?;
            let zeros = Zeros::Each(channels(model, &operands.zero_point, shape)?);
            integer(Decode::Affine { scales, zeros })
        }
        _ => Err("its encoding is not known".to_owned()),
    })
}

/// One value for all, or one for each output channel: the axis that is not the neurons'.
fn channels(model: &ModelFile, stored: &Stored<'_>, shape: &Shape) -> Result<Groups, Error> {
    let values = values(model, stored)?;
    let by = match (values.len(), shape.axis) {
        (1, _) => By::All,
        (_, 0) => By::Grid {
            rows: u64::MAX,
            columns: 1,
            per_row: 0,
        },
        _ => By::Grid {
            rows: 1,
            columns: u64::MAX,
            per_row: 1,
        },
    };
    Ok(Groups { values, by })
}

fn dequantizer_groups(dequantizer: &Dequantizer<'_>, shape: &Shape) -> By {
    match (dequantizer.axis, dequantizer.block_size) {
        (0, 0) => By::Grid {
            rows: 1,
            columns: u64::MAX,
            per_row: 1,
        },
        (_, 0) => By::Grid {
            rows: u64::MAX,
            columns: 1,
            per_row: 0,
        },
        (0, size) => By::Grid {
            rows: size,
            columns: 1,
            per_row: shape.columns,
        },
        (_, size) => By::Grid {
            rows: 1,
            columns: size,
            per_row: shape.columns.div_ceil(size),
        },
    }
}

fn floats(
    model: &ModelFile,
    stored: &Stored<'_>,
    expected: u64,
) -> Result<Result<Vec<f32>, String>, Error> {
    let values = values(model, stored)?;
    Ok(match values.len() as u64 == expected {
        true => Ok(values),
        false => {
            let (name, found) = (stored.name, values.len());
            Err(format!(
                "expected {expected} elements in '{name}', found {found}"
            ))
        }
    })
}

/// The elements of a tensor of floats or of integers of up to 8 bits, packed ones in flat order.
fn values(model: &ModelFile, stored: &Stored<'_>) -> Result<Vec<f32>, Error> {
    let tensor: &TensorProto = stored.tensor;
    let dtype = model.data_type(tensor)?;
    let bytes = model.bytes(tensor)?;
    if dtype.is_scalable_float() {
        let mut block = Block::with_capacity(bytes.len());
        block.resized(bytes.len()).copy_from_slice(&bytes);
        let mut values = Vec::new();
        block.widened(dtype, |_, value| values.push(value));
        return Ok(values);
    }
    let elements: u64 = model.dims(tensor)?.iter().product();
    let bits = match dtype.bits() {
        Some(bits @ (2 | 4 | 8)) if dtype.is_quantized_integer() => bits,
        _ => {
            let expected = "floats, or integers of up to 8 bits";
            return Err(model.tensor_error(tensor, expected, dtype).into());
        }
    };
    let one = Codes {
        bits,
        signed: dtype.is_signed(),
        high_first: false,
        stride: elements,
        decode: Decode::Affine {
            scales: Groups {
                values: vec![1.0],
                by: By::All,
            },
            zeros: Zeros::One(0.0),
        },
    };
    Ok((0..elements)
        .map(|element| {
            let bit = element * bits;
            let byte = bytes.get(short(bit / 8)).copied().unwrap_or_default();
            one.decode(byte, bit % 8, 0, 0)
        })
        .collect())
}

/// Codes packed within each row, the last byte of a row padded.
fn packed_rows(bytes: &[u8], rows: u64, columns: u64, bits: u64) -> Result<Vec<f32>, String> {
    let row_bytes = columns.saturating_mul(bits).div_ceil(8);
    let expected = rows.saturating_mul(row_bytes);
    if bytes.len() as u64 != expected {
        return Err(format!(
            "expected {expected} bytes of zero points, found {}",
            bytes.len()
        ));
    }
    let mask = u8::MAX >> (8 - bits);
    let mut values = Vec::new();
    for row in bytes.chunks_exact(short(row_bytes).max(1)) {
        for column in 0..columns {
            let bit = column * bits;
            let byte = row.get(short(bit / 8)).copied().unwrap_or_default();
            values.push(f32::from((byte >> (bit % 8)) & mask));
        }
    }
    Ok(values)
}

/// bitsandbytes' 4-bit float: code to value, in units of the block's largest magnitude.
const FP4: [f32; 16] = [
    0.0,
    5.208_333_3e-3,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -5.208_333_3e-3,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// bitsandbytes' NormalFloat4 (Dettmers et al. 2023, QLoRA, appendix E).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
