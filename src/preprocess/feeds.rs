//! Ready-made model inputs from files: for models that no family here prepares.
//!
//! In: a `.safetensors` or `.npz` file with `input_ids`, `answer_mask`, and whatever else the decoder
//! takes, under the names of its inputs. Out: a [`Feed`]. Float16, bfloat16 and float64 become
//! float32, integers int64.
//!
//! Promised: sizes are checked before anything is allocated; a pickle is never read (numpy's object
//! arrays and `torch.save` are ones, and reading a pickle runs it); every complaint names the file and
//! the tensor. The `.npy` header is read here: it is one line of a fixed form, and the libraries for it
//! parse any Python literal, to any depth.

#![warn(clippy::indexing_slicing)]

use std::collections::HashSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use half::{bf16, f16};
use ndarray::{Array3, ArrayD, Ix3};
use regex::Regex;
use safetensors::{Dtype, SafeTensors};

use super::{DecoderInput, NamedTensor, TensorValue};
use crate::files::read_limited;
use crate::files::safetensors::check_header;
use crate::limits::{FEED_BYTES, FEED_RANK, FEED_TENSORS, NPY_HEADER_BYTES};

/// The decoder's inputs for one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Feed {
    /// `[T]`.
    pub input_ids: Vec<i64>,
    /// `[T]`: the weight of each position in the statistics; 1 where the next token belongs to the
    /// answer, else 0.
    pub answer_mask: Vec<f32>,
    /// Float32 `[1, T, d_model]`, where the file has them.
    pub inputs_embeds: Option<Array3<f32>>,
    /// All other tensors, as the file has them.
    pub others: Vec<DecoderInput>,
}

/// Why a file holds no feed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The file cannot be read, or is too large.
    #[error(transparent)]
    Read(#[from] crate::files::Error),
    /// Neither of the two formats.
    #[error("{}: expected a safetensors or npz file, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What its first bytes say.
        found: &'static str,
    },
    /// The safetensors header is past a limit, or ambiguous.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The safetensors header breaks a rule of its format.
    #[error("{}: not a valid safetensors file", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Which.
        source: safetensors::SafeTensorError,
    },
    /// The archive is damaged.
    #[error("{}: not a valid npz file", path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// What the zip library said.
        source: zip::result::ZipError,
    },
    /// A tensor is missing, or of another type or shape.
    #[error("{}: '{tensor}': expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl FeedError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Read(source) => return source.hint(),
            Self::Format { .. } => {
                "write it with safetensors.numpy.save_file(tensors, path) or numpy.savez(path, **tensors)"
            }
            Self::Tensor { found, .. } if found.contains("pickle") => {
                "convert the array to numbers first: numpy.asarray(list_of_lists, dtype=\"int64\")"
            }
            Self::Tensor { .. } => {
                "a feed has input_ids [1, T], answer_mask [1, T] (1 where the next token belongs to \
                 the answer), and the decoder's other inputs by name; see docs/feeds.md"
            }
            Self::Header { .. } | Self::Safetensors { .. } | Self::Archive { .. } => return None,
        };
        Some(hint.to_owned())
    }
}

impl Feed {
    /// Reads a file, by its first bytes: its name does not matter.
    ///
    /// # Errors
    /// [`FeedError`].
    pub fn read(path: &Path) -> Result<Feed, FeedError> {
        let bytes = read_limited(path, FEED_BYTES)?;
        let tensors = match format(&bytes) {
            Format::Npz => npz(path, &bytes)?,
            Format::Safetensors => safetensors(path, &bytes)?,
            Format::Other(found) => {
                return Err(FeedError::Format {
                    path: path.to_owned(),
                    found,
                });
            }
        };
        Feed::of(path, tensors)
    }

    fn of(path: &Path, tensors: Vec<NamedTensor>) -> Result<Feed, FeedError> {
        let mut input_ids = None;
        let mut answer_mask = None;
        let mut inputs_embeds = None;
        let mut others = Vec::new();
        for tensor in tensors {
            match tensor.name.as_str() {
                "input_ids" => input_ids = Some(tensor.value),
                "answer_mask" => answer_mask = Some(tensor.value),
                "inputs_embeds" => inputs_embeds = Some(tensor.value),
                _ => others.push(DecoderInput {
                    tensor,
                    token_axis: None,
                    required: false,
                }),
            }
        }
        let wrong = |tensor: &str, expected: String, found: String| FeedError::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            expected,
            found,
        };
        let shown = |value: &Option<TensorValue>| match value {
            None => "nothing".to_owned(),
            Some(value) => format!("{} {:?}", kind(value), value.shape()),
        };
        let ids = match &input_ids {
            Some(TensorValue::Integers(ids)) => row(ids),
            _ => None,
        };
        let Some(ids) = ids.filter(|ids| !ids.is_empty()) else {
            let expected = "integers [1, T], T > 0".to_owned();
            return Err(wrong("input_ids", expected, shown(&input_ids)));
        };
        let mask: Option<Vec<f32>> = match &answer_mask {
            Some(TensorValue::Booleans(mask)) => {
                row(mask).map(|mask| mask.into_iter().map(f32::from).collect())
            }
            #[allow(clippy::cast_precision_loss)] // Weights are small numbers.
            Some(TensorValue::Integers(mask)) => {
                row(mask).map(|mask| mask.into_iter().map(|weight| weight as f32).collect())
            }
            Some(TensorValue::Floats(mask)) => row(mask),
            None => None,
        };
        let expected = || format!("[1, {}], as input_ids, of weights ≥ 0", ids.len());
        let mask = mask
            .filter(|mask| mask.len() == ids.len())
            .ok_or_else(|| wrong("answer_mask", expected(), shown(&answer_mask)))?;
        if let Some(bad) = mask
            .iter()
            .find(|weight| !(weight.is_finite() && **weight >= 0.0))
        {
            return Err(wrong("answer_mask", expected(), bad.to_string()));
        }
        if mask.iter().all(|&weight| weight == 0.0) {
            let expected = "a weight > 0 somewhere: positions that predict the answer".to_owned();
            return Err(wrong("answer_mask", expected, "zeros alone".to_owned()));
        }
        let embeds = match &inputs_embeds {
            None => None,
            Some(TensorValue::Floats(embeds)) => {
                let embeds = TensorValue::Floats(embeds.clone()).with_rank(3);
                match embeds {
                    TensorValue::Floats(embeds) => embeds.into_dimensionality::<Ix3>().ok(),
                    _ => None,
                }
            }
            Some(_) => None,
        };
        let embeds = embeds.filter(|embeds| {
            let (batch, tokens, width) = embeds.dim();
            (batch, tokens) == (1, ids.len()) && width > 0
        });
        if inputs_embeds.is_some() && embeds.is_none() {
            let expected = format!("floats [1, {}, d_model], as input_ids", ids.len());
            return Err(wrong("inputs_embeds", expected, shown(&inputs_embeds)));
        }
        Ok(Feed {
            input_ids: ids,
            answer_mask: mask,
            inputs_embeds: embeds,
            others,
        })
    }
}

/// The numbers of `[T]` or `[1, T]`.
fn row<T: Clone>(array: &ArrayD<T>) -> Option<Vec<T>> {
    match array.shape() {
        [_] | [1, _] => Some(array.iter().cloned().collect()),
        _ => None,
    }
}

/// What a tensor holds, for messages.
pub(crate) fn kind(value: &TensorValue) -> &'static str {
    match value {
        TensorValue::Floats(_) => "floats",
        TensorValue::Integers(_) => "integers",
        TensorValue::Booleans(_) => "bools",
    }
}

enum Format {
    Npz,
    Safetensors,
    Other(&'static str),
}

/// The format, by the first bytes.
fn format(bytes: &[u8]) -> Format {
    match bytes {
        [] => Format::Other("an empty file"),
        // PK\3\4: a zip archive, of numpy's or of torch's.
        [0x50, 0x4b, 0x03, 0x04, ..] => Format::Npz,
        [0x80, 0x02..=0x05, ..] => Format::Other("a pickle, which is never read"),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => {
            Format::Other("a single .npy array; a feed has several, in an .npz")
        }
        // The header's length, then the JSON object that it is.
        [_, _, _, _, _, _, _, _, b'{', ..] => Format::Safetensors,
        _ => Format::Other("other bytes"),
    }
}

fn few_enough(path: &Path, tensors: usize) -> Result<(), FeedError> {
    match tensors <= FEED_TENSORS {
        true => Ok(()),
        false => Err(FeedError::Header {
            path: path.to_owned(),
            expected: format!("at most {FEED_TENSORS} tensors"),
            found: tensors.to_string(),
        }),
    }
}

fn safetensors(path: &Path, bytes: &[u8]) -> Result<Vec<NamedTensor>, FeedError> {
    check_header(bytes).map_err(|(expected, found)| FeedError::Header {
        path: path.to_owned(),
        expected,
        found,
    })?;
    let file = SafeTensors::deserialize(bytes).map_err(|source| FeedError::Safetensors {
        path: path.to_owned(),
        source,
    })?;
    few_enough(path, file.len())?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let of = match view.dtype() {
            Dtype::F64 => Element::F64,
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            Dtype::I64 => Element::I64,
            Dtype::U64 => Element::U64,
            Dtype::I32 => Element::I32,
            Dtype::U32 => Element::U32,
            Dtype::I16 => Element::I16,
            Dtype::U16 => Element::U16,
            Dtype::I8 => Element::I8,
            Dtype::U8 => Element::U8,
            Dtype::BOOL => Element::Bool,
            other => {
                return Err(unknown_type(path, name, format!("{other:?}")));
            }
        };
        tensors.push(tensor(path, name, of, view.shape(), view.data(), false)?);
    }
    Ok(tensors)
}

fn npz(path: &Path, bytes: &[u8]) -> Result<Vec<NamedTensor>, FeedError> {
    let archive = |source| FeedError::Archive {
        path: path.to_owned(),
        source,
    };
    let mut file = zip::ZipArchive::new(std::io::Cursor::new(bytes)).map_err(archive)?;
    few_enough(path, file.len())?;
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    let mut left = FEED_BYTES;
    for index in 0..file.len() {
        let entry = file.by_index(index).map_err(archive)?;
        let name = entry.name().map_err(archive)?.into_owned();
        let Some(name) = name.strip_suffix(".npy") else {
            let found = match name.ends_with(".pkl") {
                true => "a pickle (torch.save), which is never read",
                false => "another kind of file",
            };
            return Err(FeedError::Tensor {
                path: path.to_owned(),
                tensor: name,
                expected: "arrays that numpy.savez wrote".to_owned(),
                found: found.to_owned(),
            });
        };
        if !names.insert(name.to_owned()) {
            return Err(FeedError::Tensor {
                path: path.to_owned(),
                tensor: name.to_owned(),
                expected: "each array once".to_owned(),
                found: "it twice".to_owned(),
            });
        }
        // What the archive claims its size to be does not matter: this is what is read at most.
        let mut array = Vec::new();
        entry
            .take(left + 1)
            .read_to_end(&mut array)
            .map_err(|source| archive(source.into()))?;
        left =
            left.checked_sub(array.len() as u64)
                .ok_or_else(|| crate::files::Error::TooLarge {
                    path: path.to_owned(),
                    limit: FEED_BYTES,
                    found: FEED_BYTES + 1,
                })?;
        tensors.push(npy(path, name, &array)?);
    }
    Ok(tensors)
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }`, in any order. Source: numpy 2,
/// `lib/format.py`.
static DESCR: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"'descr'\s*:\s*'([^']{1,16})'").ok());
static FORTRAN: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"'fortran_order'\s*:\s*(True|False)").ok());
static SHAPE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"'shape'\s*:\s*\(([0-9, ]*)\)").ok());

fn npy(path: &Path, name: &str, bytes: &[u8]) -> Result<NamedTensor, FeedError> {
    let wrong = |expected: &str, found: String| FeedError::Tensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let (header, data) = split(bytes)
        .ok_or_else(|| wrong("an array as numpy writes it", "another header".to_owned()))?;
    let find = |pattern: &LazyLock<Option<Regex>>| {
        let found = pattern
            .as_ref()
            .and_then(|pattern| pattern.captures(header));
        found.and_then(|found| Some(found.get(1)?.as_str().to_owned()))
    };
    let Some((descr, (order, shape))) = find(&DESCR).zip(find(&FORTRAN).zip(find(&SHAPE))) else {
        return Err(wrong(
            "a plain array",
            "one with fields, or without a type".to_owned(),
        ));
    };
    let of = match descr.as_str() {
        "<f8" => Element::F64,
        "<f4" => Element::F32,
        "<f2" => Element::F16,
        "<i8" => Element::I64,
        "<u8" => Element::U64,
        "<i4" => Element::I32,
        "<u4" => Element::U32,
        "<i2" => Element::I16,
        "<u2" => Element::U16,
        "|i1" => Element::I8,
        "|u1" => Element::U8,
        "|b1" => Element::Bool,
        "|O" => {
            return Err(wrong(
                "numbers",
                "an object array: a pickle, which is never read".to_owned(),
            ));
        }
        other => return Err(unknown_type(path, name, other.to_owned())),
    };
    let dims = shape
        .split(',')
        .map(str::trim)
        .filter(|dim| !dim.is_empty());
    let dims: Option<Vec<usize>> = dims.map(|dim| dim.parse().ok()).collect();
    let Some(dims) = dims else {
        return Err(wrong("a shape", shape));
    };
    tensor(path, name, of, &dims, data, order == "True")
}

/// The header's text and the data after it.
fn split(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let rest = bytes.strip_prefix(b"\x93NUMPY")?;
    let (len, rest) = match rest {
        [1, _, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => {
            let len = u32::from_le_bytes([*a, *b, *c, *d]);
            (usize::try_from(len).ok()?, rest)
        }
        _ => return None,
    };
    if len > NPY_HEADER_BYTES {
        return None;
    }
    let (header, data) = rest.split_at_checked(len)?;
    Some((std::str::from_utf8(header).ok()?, data))
}

/// The element types that are read, all little-endian.
#[derive(Clone, Copy)]
enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    U64,
    I32,
    U32,
    I16,
    U16,
    I8,
    U8,
    Bool,
}

fn unknown_type(path: &Path, tensor: &str, found: String) -> FeedError {
    FeedError::Tensor {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        expected: "little-endian floats, integers or bools".to_owned(),
        found,
    }
}

fn tensor(
    path: &Path,
    name: &str,
    of: Element,
    shape: &[usize],
    data: &[u8],
    fortran: bool,
) -> Result<NamedTensor, FeedError> {
    let wrong = |expected: String, found: String| FeedError::Tensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
        expected,
        found,
    };
    let fail = || {
        wrong(
            format!("{shape:?} numbers"),
            format!("{} bytes", data.len()),
        )
    };
    if shape.len() > FEED_RANK {
        return Err(wrong(
            format!("at most {FEED_RANK} dimensions"),
            shape.len().to_string(),
        ));
    }
    let numbers = shape
        .iter()
        .try_fold(1usize, |all, &dim| all.checked_mul(dim));
    let numbers = numbers.ok_or_else(fail)?;
    macro_rules! read {
        ($bytes:literal, $of:expr) => {{
            if numbers.checked_mul($bytes) != Some(data.len()) {
                return Err(fail());
            }
            let (chunks, _) = data.as_chunks::<$bytes>();
            chunks.iter().map(|&bytes| $of(bytes))
        }};
    }
    macro_rules! floats {
        ($values:expr) => {
            TensorValue::Floats(shaped(shape, $values.collect(), fortran).ok_or_else(fail)?)
        };
    }
    macro_rules! integers {
        ($values:expr) => {
            TensorValue::Integers(shaped(shape, $values.collect(), fortran).ok_or_else(fail)?)
        };
    }
    #[allow(clippy::cast_possible_truncation)] // The graph computes in float32 at most.
    let narrow = |value: f64| value as f32;
    let value = match of {
        Element::F64 => floats!(read!(8, f64::from_le_bytes).map(narrow)),
        Element::F32 => floats!(read!(4, f32::from_le_bytes)),
        Element::F16 => floats!(read!(2, f16::from_le_bytes).map(f16::to_f32)),
        Element::Bf16 => floats!(read!(2, bf16::from_le_bytes).map(bf16::to_f32)),
        Element::I64 => integers!(read!(8, i64::from_le_bytes)),
        Element::I32 => integers!(read!(4, i32::from_le_bytes).map(i64::from)),
        Element::U32 => integers!(read!(4, u32::from_le_bytes).map(i64::from)),
        Element::I16 => integers!(read!(2, i16::from_le_bytes).map(i64::from)),
        Element::U16 => integers!(read!(2, u16::from_le_bytes).map(i64::from)),
        Element::I8 => integers!(read!(1, i8::from_le_bytes).map(i64::from)),
        Element::U8 => integers!(read!(1, u8::from_le_bytes).map(i64::from)),
        Element::U64 => {
            let values: Result<Vec<i64>, _> =
                read!(8, u64::from_le_bytes).map(i64::try_from).collect();
            let values = values
                .map_err(|_| wrong("integers below 2^63".to_owned(), "a larger one".to_owned()))?;
            integers!(values.into_iter())
        }
        Element::Bool => {
            let values = read!(1, u8::from_le_bytes).map(|byte| byte != 0).collect();
            TensorValue::Booleans(shaped(shape, values, fortran).ok_or_else(fail)?)
        }
    };
    Ok(NamedTensor {
        name: name.to_owned(),
        value,
    })
}

/// An array of these numbers; in Fortran's order the first axis runs fastest.
fn shaped<T: Clone>(shape: &[usize], values: Vec<T>, fortran: bool) -> Option<ArrayD<T>> {
    if fortran {
        let turned: Vec<usize> = shape.iter().rev().copied().collect();
        let array = ArrayD::from_shape_vec(turned, values).ok()?;
        return Some(array.reversed_axes().as_standard_layout().into_owned());
    }
    ArrayD::from_shape_vec(shape, values).ok()
}
