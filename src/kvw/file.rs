//! Coefficients and plans on disk: safetensors, with everything needed to know what they are.
//!
//! | file | tensors | metadata `kvw` |
//! |---|---|---|
//! | coefficients | `layers.{l}.coefficient` float32 `[d_ff]`, the mean; `layers.{l}.sum` int64 `[d_ff, 2]` and `weight` int64 `[2]`, the exact sums ([`FixedSum::to_words`]) | `format: "kvw-coefficients"`, `format_version`, moment, samples, tokens |
//! | part of coefficients | the same, of some of the samples | also `part`: job, start, end, of ([`Part`]) |
//! | plan | `layers.{l}.gate` float32 `[d_ff]`, cumulative | `format: "kvw-plan"`, `format_version`, rule, parameters, steps |
//!
//! A layer of the vision encoder is `layers.vision.{l}`, and has its own weight, `layers.vision.{l}.weight`.
//! A file with such layers is of version 2, one without of version 1: a program that knows version 1 only
//! refuses the first instead of reading half of it.
//!
//! Both hold a `provenance` object that this module carries and does not read. The metadata is *one*
//! JSON string: safetensors writes a map of several in no fixed order, and the same inputs must give
//! the same bytes.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::coefficients::LayerCoefficients;
use super::{Coefficients, Error, FixedSum, Part, PartFile, Plan};
use crate::files::json;
use crate::files::map::map_file;
use crate::files::safetensors::check_header;
use crate::files::write_atomic;
use crate::graph::{LayerId, Moment, Tower};
use crate::limits;

/// The one metadata key.
const KEY: &str = "kvw";
/// The version of files whose layers are all of the language model.
const LANGUAGE_VERSION: u32 = 1;
/// The version of the others.
const VERSION: u32 = 2;
const COEFFICIENTS: &str = "kvw-coefficients";
const PLAN: &str = "kvw-plan";

#[derive(Serialize, Deserialize)]
struct Header<T> {
    format: Cow<'static, str>,
    format_version: u32,
    tool_version: Cow<'static, str>,
    #[serde(flatten)]
    content: T,
    provenance: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct CoefficientsHeader {
    moment: Moment,
    samples: u64,
    /// Sum of the token weights, as a float: for the method, the number of answer tokens.
    tokens: f64,
    /// Present where the sums are of some of the samples only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    part: Option<Part>,
}

#[derive(Serialize, Deserialize)]
struct PlanHeader {
    rule: String,
    parameters: serde_json::Value,
    steps: u64,
}

/// Writes coefficients to `path`, whole or not at all.
///
/// # Errors
/// The file exists and `force` is not set, or cannot be written.
pub fn save_coefficients(
    path: &Path,
    coefficients: &Coefficients,
    provenance: serde_json::Value,
    force: bool,
) -> Result<(), Error> {
    save_sums(path, coefficients, None, provenance, force)
}

/// Writes a part of a job to `path`, whole or not at all. What is there is replaced.
///
/// # Errors
/// The file cannot be written.
pub fn save_part(
    path: &Path,
    coefficients: &Coefficients,
    part: Part,
    provenance: serde_json::Value,
) -> Result<(), Error> {
    save_sums(path, coefficients, Some(part), provenance, true)
}

fn save_sums(
    path: &Path,
    coefficients: &Coefficients,
    part: Option<Part>,
    provenance: serde_json::Value,
    force: bool,
) -> Result<(), Error> {
    let mut tensors = vec![(
        "weight".to_owned(),
        Data::int64(&[2], coefficients.weight.to_words().to_vec()),
    )];
    for (&layer, sums) in &coefficients.layers {
        let mean = coefficients.mean(layer);
        let mean = mean.unwrap_or_else(|| ndarray::Array1::zeros(sums.sums.len()));
        let mean = mean.iter().map(|&value| as_f32(value)).collect();
        let words: Vec<i64> = sums.sums.iter().flat_map(|sum| sum.to_words()).collect();
        tensors.push((format!("layers.{layer}.coefficient"), Data::float(mean)));
        tensors.push((
            format!("layers.{layer}.sum"),
            Data::int64(&[sums.sums.len(), 2], words),
        ));
    }
    for (layer, weight) in &coefficients.own_weights {
        tensors.push((
            format!("layers.{layer}.weight"),
            Data::int64(&[2], weight.to_words().to_vec()),
        ));
    }
    let content = CoefficientsHeader {
        moment: coefficients.moment,
        samples: coefficients.samples,
        tokens: coefficients.weight.value(),
        part,
    };
    let version = version(coefficients.layers.keys());
    save(
        path,
        tensors,
        (COEFFICIENTS, version),
        content,
        provenance,
        force,
    )
}

/// Writes a plan to `path`, whole or not at all.
///
/// # Errors
/// The file exists and `force` is not set, or cannot be written.
pub fn save_plan(
    path: &Path,
    plan: &Plan,
    provenance: serde_json::Value,
    force: bool,
) -> Result<(), Error> {
    let tensors = plan
        .gates
        .iter()
        .map(|(layer, gates)| (format!("layers.{layer}.gate"), Data::float(gates.clone())))
        .collect();
    let content = PlanHeader {
        rule: plan.rule.clone(),
        parameters: plan.parameters.clone(),
        steps: plan.steps,
    };
    let version = version(plan.gates.keys());
    save(path, tensors, (PLAN, version), content, provenance, force)
}

/// Reads coefficients and their provenance.
///
/// # Errors
/// The file cannot be read, is no coefficients file of a version that this one knows, or holds a part
/// of a job only.
pub fn load_coefficients(path: &Path) -> Result<(Coefficients, serde_json::Value), Error> {
    match load_sums(path)? {
        (coefficients, None, provenance) => Ok((coefficients, provenance)),
        (_, Some(part), _) => Err(Error::Part {
            path: path.to_owned(),
            expected: format!("the coefficients of all {} samples", part.of),
            found: format!("those of samples {}..{}", part.start, part.end),
        }),
    }
}

/// Reads a part of a job.
///
/// # Errors
/// The file cannot be read, is no coefficients file of a version that this one knows, or holds no
/// part.
pub fn load_part(path: &Path) -> Result<PartFile, Error> {
    let (coefficients, part, provenance) = load_sums(path)?;
    let part = part.ok_or_else(|| Error::Part {
        path: path.to_owned(),
        expected: "a part of a job".to_owned(),
        found: "the coefficients of all samples".to_owned(),
    })?;
    if part.end.checked_sub(part.start) != Some(coefficients.samples) || part.end > part.of {
        return Err(format_error(
            path,
            format!("the sums of {} samples", coefficients.samples),
            format!("samples {}..{} of {}", part.start, part.end, part.of),
        ));
    }
    Ok(PartFile {
        path: path.to_owned(),
        part,
        coefficients,
        provenance,
    })
}

fn load_sums(path: &Path) -> Result<(Coefficients, Option<Part>, serde_json::Value), Error> {
    let bytes = read(path)?;
    let (tensors, header) = parse::<CoefficientsHeader>(path, &bytes, COEFFICIENTS)?;
    let weight = match *int64s(path, &tensors, "weight", &[2])? {
        [low, high] => FixedSum::from_words([low, high]),
        _ => FixedSum::default(),
    };
    let content = header.content;
    // A part may be empty: there are more of them than batches.
    let empty = content.part.is_some() && content.samples == 0;
    if weight.value() <= 0.0 && !empty {
        return Err(format_error(
            path,
            "a positive sum of token weights",
            weight.value(),
        ));
    }
    let mut layers = BTreeMap::new();
    for (layer, name) in layer_tensors(&tensors, "sum") {
        let shape = tensors
            .tensor(&name)
            .map(|tensor| tensor.shape().to_vec())
            .unwrap_or_default();
        let &[d_ff, 2] = shape.as_slice() else {
            return Err(format_error(
                path,
                format!("'{name}' [d_ff, 2]"),
                format!("{shape:?}"),
            ));
        };
        let sums = int64s(path, &tensors, &name, &[d_ff, 2])?
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&words| FixedSum::from_words(words))
            .collect();
        layers.insert(layer, LayerCoefficients { sums });
    }
    let mut own_weights = BTreeMap::new();
    for (layer, name) in layer_tensors(&tensors, "weight") {
        if let [low, high] = *int64s(path, &tensors, &name, &[2])? {
            own_weights.insert(layer, FixedSum::from_words([low, high]));
        }
    }
    let counts_itself = |layer: &&LayerId| layer.tower() != Tower::Language;
    if !empty && !layers.keys().filter(counts_itself).eq(own_weights.keys()) {
        return Err(format_error(
            path,
            "a weight 'layers.{l}.weight' of each vision layer, and of no other",
            format!("those of {:?}", own_weights.keys().collect::<Vec<_>>()),
        ));
    }
    let coefficients = Coefficients {
        moment: content.moment,
        layers,
        weight,
        own_weights,
        samples: content.samples,
    };
    Ok((coefficients, content.part, header.provenance))
}

/// Reads a plan and its provenance.
///
/// # Errors
/// The file cannot be read, is no plan of a version that this one knows, or holds a gate that is not
/// finite.
pub fn load_plan(path: &Path) -> Result<(Plan, serde_json::Value), Error> {
    let bytes = read(path)?;
    let (tensors, header) = parse::<PlanHeader>(path, &bytes, PLAN)?;
    let mut gates = BTreeMap::new();
    for (layer, name) in layer_tensors(&tensors, "gate") {
        let tensor = tensors
            .tensor(&name)
            .map_err(|error| format_error(path, format!("a tensor '{name}'"), error))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape().len() != 1 {
            return Err(format_error(
                path,
                format!("'{name}' float32 [d_ff]"),
                format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
            ));
        }
        let values: Vec<f32> = tensor
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        if let Some(bad) = values.iter().find(|gate| !gate.is_finite()) {
            return Err(format_error(path, format!("finite gates in '{name}'"), bad));
        }
        gates.insert(layer, values);
    }
    if gates.is_empty() {
        return Err(format_error(
            path,
            "at least one tensor 'layers.{l}.gate'",
            "none",
        ));
    }
    let PlanHeader {
        rule,
        parameters,
        steps,
    } = header.content;
    Ok((
        Plan {
            gates,
            rule,
            parameters,
            steps,
        },
        header.provenance,
    ))
}

/// The version of a file with these layers.
fn version<'l>(layers: impl IntoIterator<Item = &'l LayerId>) -> u32 {
    let mut layers = layers.into_iter();
    match layers.any(|layer| layer.tower() != Tower::Language) {
        true => VERSION,
        false => LANGUAGE_VERSION,
    }
}

/// Rounds to float32, the precision of the files.
#[allow(clippy::cast_possible_truncation)]
fn as_f32(value: f64) -> f32 {
    value as f32
}

/// A tensor to write.
struct Data {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Data {
    fn float(values: Vec<f32>) -> Data {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Data {
            dtype: Dtype::F32,
            shape: vec![values.len()],
            bytes,
        }
    }

    fn int64(shape: &[usize], values: Vec<i64>) -> Data {
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Data {
            dtype: Dtype::I64,
            shape: shape.to_vec(),
            bytes,
        }
    }
}

impl View for &Data {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn save<T: Serialize>(
    path: &Path,
    tensors: Vec<(String, Data)>,
    (format, format_version): (&'static str, u32),
    content: T,
    provenance: serde_json::Value,
    force: bool,
) -> Result<(), Error> {
    let header = Header {
        format: format.into(),
        format_version,
        tool_version: env!("CARGO_PKG_VERSION").into(),
        content,
        provenance,
    };
    let header = serde_json::to_string(&header)
        .map_err(|error| format_error(path, "metadata that JSON can hold", error))?;
    let metadata = HashMap::from([(KEY.to_owned(), header)]);
    let views = tensors.iter().map(|(name, data)| (name, data));
    let bytes = safetensors::serialize(views, Some(metadata))
        .map_err(|error| format_error(path, "tensors that safetensors can hold", error))?;
    write_atomic(path, force, |out| out.write_all(&bytes)).map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<bytes::Bytes, Error> {
    map_file(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

fn format_error(path: &Path, expected: impl ToString, found: impl ToString) -> Error {
    Error::Format {
        path: path.to_owned(),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

fn parse<'a, T: for<'de> Deserialize<'de>>(
    path: &Path,
    bytes: &'a [u8],
    format: &str,
) -> Result<(SafeTensors<'a>, Header<T>), Error> {
    check_header(bytes).map_err(|(expected, found)| format_error(path, expected, found))?;
    let (_, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| format_error(path, "a safetensors file", error))?;
    let header = metadata
        .metadata()
        .as_ref()
        .and_then(|metadata| metadata.get(KEY))
        .cloned();
    let header =
        header.ok_or_else(|| format_error(path, format!("metadata '{KEY}'"), "no such key"))?;
    #[derive(Deserialize)]
    struct Kind {
        format: String,
        format_version: u32,
    }
    let memory = limits::allowed_memory(header.len() as u64);
    json::scan(header.as_bytes(), memory)
        .map_err(|error| format_error(path, format!("metadata '{KEY}' in JSON"), error))?;
    let kind: Kind = serde_json::from_str(&header)
        .map_err(|error| format_error(path, format!("metadata '{KEY}' with a format"), error))?;
    if kind.format != format || !(LANGUAGE_VERSION..=VERSION).contains(&kind.format_version) {
        return Err(format_error(
            path,
            format!("format {format} version {LANGUAGE_VERSION} or {VERSION}"),
            format!("{} version {}", kind.format, kind.format_version),
        ));
    }
    let header = serde_json::from_str(&header)
        .map_err(|error| format_error(path, format!("the metadata of {format}"), error))?;
    let tensors = SafeTensors::deserialize(bytes)
        .map_err(|error| format_error(path, "a safetensors file", error))?;
    let layers = tensors.names().into_iter().filter_map(|name| {
        let (layer, _) = name.strip_prefix("layers.")?.rsplit_once('.')?;
        layer.parse::<LayerId>().ok()
    });
    let layers: Vec<LayerId> = layers.collect();
    let expected = version(&layers);
    if kind.format_version != expected {
        return Err(format_error(
            path,
            format!("{format} version {expected} for these layers"),
            format!("version {}", kind.format_version),
        ));
    }
    Ok((tensors, header))
}

/// The tensors `layers.{l}.{suffix}` with their layer, in the order of layers.
fn layer_tensors(tensors: &SafeTensors<'_>, suffix: &str) -> Vec<(LayerId, String)> {
    let mut found: Vec<_> = tensors
        .names()
        .into_iter()
        .filter_map(|name| {
            let layer = name
                .strip_prefix("layers.")?
                .strip_suffix(suffix)?
                .strip_suffix('.')?;
            Some((layer.parse().ok()?, name.to_owned()))
        })
        .collect();
    found.sort();
    found
}

fn int64s(
    path: &Path,
    tensors: &SafeTensors<'_>,
    name: &str,
    shape: &[usize],
) -> Result<Vec<i64>, Error> {
    let tensor = tensors
        .tensor(name)
        .map_err(|error| format_error(path, format!("a tensor '{name}'"), error))?;
    if tensor.dtype() != Dtype::I64 || tensor.shape() != shape {
        return Err(format_error(
            path,
            format!("'{name}' int64 {shape:?}"),
            format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
        ));
    }
    Ok(tensor
        .data()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|&bytes| i64::from_le_bytes(bytes))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            gates: BTreeMap::from([(2.into(), vec![1.0, 0.5, 1e-7]), (10.into(), vec![0.25; 3])]),
            rule: "kvw".into(),
            parameters: serde_json::json!({ "gamma": 0.4, "layers": "2-10" }),
            steps: 24,
        }
    }

    fn coefficients() -> Coefficients {
        let sum = |value: f64| FixedSum::default().plus(value).unwrap();
        Coefficients {
            moment: Moment::Absolute,
            layers: BTreeMap::from([(
                0.into(),
                LayerCoefficients {
                    sums: vec![sum(1.5), sum(3e9)],
                },
            )]),
            weight: sum(7.0),
            own_weights: BTreeMap::new(),
            samples: 3,
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan");
        let provenance = serde_json::json!({ "model": { "layers": [1, 2] } });
        save_plan(&path, &plan(), provenance.clone(), false).unwrap();
        assert_eq!(load_plan(&path).unwrap(), (plan(), provenance.clone()));
        let path = folder.path().join("kc");
        save_coefficients(&path, &coefficients(), provenance.clone(), false).unwrap();
        assert_eq!(
            load_coefficients(&path).unwrap(),
            (coefficients(), provenance)
        );
    }

    #[test]
    fn a_part_is_no_set_and_a_set_no_part() {
        let folder = tempfile::tempdir().unwrap();
        let [whole, part, empty] = ["whole", "part", "empty"].map(|name| folder.path().join(name));
        save_coefficients(&whole, &coefficients(), serde_json::Value::Null, false).unwrap();
        let samples = coefficients().samples;
        let of = |start, end| Part {
            job: "job".into(),
            start,
            end,
            of: samples + 5,
        };
        save_part(
            &part,
            &coefficients(),
            of(5, samples + 5),
            serde_json::Value::Null,
        )
        .unwrap();
        let nothing = Coefficients::new(Moment::Absolute, &[(3.into(), 2)]);
        save_part(&empty, &nothing, of(5, 5), serde_json::Value::Null).unwrap();
        assert!(matches!(load_coefficients(&part), Err(Error::Part { .. })));
        assert!(matches!(load_part(&whole), Err(Error::Part { .. })));
        assert_eq!(load_part(&part).unwrap().coefficients, coefficients());
        assert_eq!(load_part(&empty).unwrap().coefficients, nothing);
        save_part(
            &part,
            &coefficients(),
            of(4, samples + 5),
            serde_json::Value::Null,
        )
        .unwrap();
        assert!(matches!(load_part(&part), Err(Error::Format { .. })));
    }

    #[test]
    fn the_same_plan_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = folder.path().join(name);
            save_plan(&path, &plan(), serde_json::json!({ "b": 1, "a": 2 }), false).unwrap();
            std::fs::read(path).unwrap()
        };
        assert_eq!(write("one"), write("two"));
    }

    #[test]
    fn a_file_of_another_kind_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kc");
        save_coefficients(&path, &coefficients(), serde_json::Value::Null, false).unwrap();
        let error = load_plan(&path).unwrap_err().to_string();
        assert!(
            error.contains("kvw-plan") && error.contains("kvw-coefficients"),
            "{error}"
        );
    }

    #[test]
    fn every_truncation_and_an_oversized_header_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan");
        save_plan(&path, &plan(), serde_json::Value::Null, false).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(
                load_plan(&path).is_err(),
                "{length} of {} bytes",
                bytes.len()
            );
        }
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(load_plan(&path).is_err());
    }
}
