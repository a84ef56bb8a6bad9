//! The decoder, instrumented: one session for collecting, weakening, sweeping and evaluating.
//!
//! In: embedded samples and gates. Out: coefficient sums ([`Decoder::sums`]), raw hidden activations
//! ([`Decoder::hidden`]) or logits and the key/value cache ([`Decoder::logits`], [`Decoder::step`]),
//! depending on the [`Outputs`] that it was opened for. Gates are inputs: no session is rebuilt and
//! no weight is touched, whatever the gates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2, Array3, ArrayView3, Axis, s};
use ort::session::{Session, SessionInputValue};
use ort::value::DynValue;

use super::engine::{Engine, Work};
use super::tensor::{Port, int64s, to_floats};
use super::{Embedded, Error};
use crate::graph::{ANSWER_MASK, Mlp, Outputs, Patch, gate_name, hidden_name, session, sum_name};
use crate::kvw::{Gates, Sums};
use crate::onnx::ModelFile;
use crate::preprocess::tensors::DECODER_INPUTS;
use crate::preprocess::{DecoderInput, PositionIds, TensorValue};

/// An open decoder session.
pub struct Decoder {
    model: PathBuf,
    session: Session,
    ports: BTreeMap<String, Port>,
    layers: Vec<(usize, usize)>,
}

/// The key/value cache after some tokens, by input name, and how many tokens it covers.
pub struct Cache {
    values: Vec<(String, DynValue)>,
    tokens: usize,
    /// The prompt's own decoder inputs, of which every step is given its part.
    inputs: Vec<DecoderInput>,
}

type Inputs<'a> = Vec<(String, SessionInputValue<'a>)>;

impl Decoder {
    /// Opens `model` with `mlps` tapped and gated. Without MLPs it is the model as it is.
    ///
    /// # Errors
    /// An MLP cannot be instrumented, ONNX Runtime refuses the model, or it has an input that no
    /// decoder of a known layout has.
    pub fn open(
        engine: &Engine,
        model: &ModelFile,
        mlps: &[&Mlp<'_>],
        outputs: Outputs,
        work: Work,
    ) -> Result<Decoder, Error> {
        let patch = Patch::plan(model, mlps, outputs)?;
        tracing::debug!(%patch, "instrumenting {}", model.path().display());
        let graph = session::encode(model, patch.apply(model))?;
        let session = engine.open(&graph, model.path(), work)?;
        let ports = session.inputs().iter().filter_map(Port::of);
        let ports = ports.map(|port| (port.name.clone(), port)).collect();
        let decoder = Decoder {
            model: model.path().to_owned(),
            session,
            ports,
            layers: patch.layers(),
        };
        decoder.check_inputs()?;
        Ok(decoder)
    }

    /// The gated layers with their `d_ff`, ascending.
    pub fn layers(&self) -> &[(usize, usize)] {
        &self.layers
    }

    /// The model file.
    pub fn model(&self) -> &Path {
        &self.model
    }

    fn check_inputs(&self) -> Result<(), Error> {
        let known = |name: &str| {
            matches!(
                name,
                INPUTS_EMBEDS | ATTENTION_MASK | POSITION_IDS | NUM_LOGITS_TO_KEEP | ANSWER_MASK
            ) || name.starts_with(PAST)
                || DECODER_INPUTS.contains(&name)
                || self
                    .layers
                    .iter()
                    .any(|&(layer, _)| name == gate_name(layer))
        };
        match self.ports.keys().find(|name| !known(name)) {
            None if self.ports.contains_key(INPUTS_EMBEDS) => Ok(()),
            None => Err(self.interface(
                "an input inputs_embeds",
                self.ports.keys().cloned().collect::<Vec<_>>().join(", "),
            )),
            Some(unknown) => Err(self.interface(
                "inputs inputs_embeds, attention_mask, position_ids, num_logits_to_keep, past_key_values.*",
                format!("also '{unknown}'"),
            )),
        }
    }

    fn interface(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Interface {
            model: self.model.clone(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    fn failed(&self, source: ort::Error) -> Error {
        Error::Run {
            model: self.model.clone(),
            source,
        }
    }

    /// The weighted sums of the moment over the answer tokens of `batch`. Needs
    /// [`Outputs::Sums`]. Shorter samples are padded on the right: a causal decoder's tokens do not
    /// see what follows them, and a padded position has weight 0.
    ///
    /// # Errors
    /// The model fails.
    pub fn sums(&mut self, batch: &[&Embedded], gates: &Gates) -> Result<Sums, Error> {
        let mut inputs = self
            .prompt_inputs(batch, gates)
            .map_err(|e| self.failed(e))?;
        let tokens = longest(batch);
        let mut mask = Array2::<f32>::zeros((batch.len(), tokens));
        for (mut row, sample) in mask.rows_mut().into_iter().zip(batch) {
            row.slice_mut(s![..sample.answer_mask.len()])
                .assign(&ndarray::aview1(&sample.answer_mask));
        }
        let weight = mask.iter().map(|&weight| f64::from(weight)).sum();
        if let Some(port) = self.ports.get(ANSWER_MASK) {
            let mask = port
                .floats(mask.view().into_dyn())
                .map_err(|e| self.failed(e))?;
            inputs.push((ANSWER_MASK.to_owned(), mask));
        }
        let model = self.model.clone();
        let fail = |source| Error::Run {
            model: model.clone(),
            source,
        };
        let outputs = self.session.run(inputs).map_err(fail)?;
        let mut layers = BTreeMap::new();
        for &(layer, _) in &self.layers {
            let value = outputs
                .get(sum_name(layer))
                .ok_or_else(|| Error::Interface {
                    model: model.clone(),
                    expected: sum_name(layer),
                    found: "no such output".into(),
                })?;
            layers.insert(layer, Array1::from(to_floats(value).map_err(fail)?.1));
        }
        Ok(Sums { layers, weight })
    }

    /// The raw hidden activations of one sample, by layer: float32 `[T, d_ff]`, before the gate. Needs
    /// [`Outputs::Hidden`].
    ///
    /// # Errors
    /// The model fails.
    pub fn hidden(
        &mut self,
        sample: &Embedded,
        gates: &Gates,
    ) -> Result<BTreeMap<usize, Array2<f32>>, Error> {
        let inputs = self
            .prompt_inputs(&[sample], gates)
            .map_err(|e| self.failed(e))?;
        let model = self.model.clone();
        let fail = |source| Error::Run {
            model: model.clone(),
            source,
        };
        let outputs = self.session.run(inputs).map_err(fail)?;
        let mut layers = BTreeMap::new();
        for &(layer, d_ff) in &self.layers {
            let hidden = outputs
                .get(hidden_name(layer))
                .map(to_floats)
                .transpose()
                .map_err(fail)?;
            let rows = hidden.and_then(|(_, data)| {
                Array2::from_shape_vec((data.len().checked_div(d_ff)?, d_ff), data).ok()
            });
            let rows = rows.ok_or_else(|| Error::Interface {
                model: model.clone(),
                expected: format!("{} [B, T, {d_ff}]", hidden_name(layer)),
                found: "another shape".into(),
            })?;
            layers.insert(layer, rows);
        }
        Ok(layers)
    }

    /// The logits of one sample: float32 `[T, vocabulary]`. Needs [`Outputs::Model`].
    ///
    /// # Errors
    /// The model fails or has no output `logits`.
    pub fn logits(&mut self, sample: &Embedded, gates: &Gates) -> Result<Array2<f32>, Error> {
        let inputs = self
            .prompt_inputs(&[sample], gates)
            .map_err(|e| self.failed(e))?;
        let model = self.model.clone();
        let outputs = self.session.run(inputs).map_err(|source| Error::Run {
            model: model.clone(),
            source,
        })?;
        rows_of(&model, outputs.get(LOGITS))
    }

    /// Runs a prompt and keeps the cache: the logits of its last token `[vocabulary]`, and the cache.
    ///
    /// # Errors
    /// The model fails, or lacks `logits` or an output for one of its cache inputs.
    pub fn start(
        &mut self,
        prompt: &Embedded,
        gates: &Gates,
    ) -> Result<(Array1<f32>, Cache), Error> {
        let mut inputs = self
            .prompt_inputs(&[prompt], gates)
            .map_err(|e| self.failed(e))?;
        keep_last(&mut inputs).map_err(|e| self.failed(e))?;
        self.run_cached(
            inputs,
            prompt.input_ids.len(),
            prompt.decoder_inputs.clone(),
        )
    }

    /// Runs one more token, `embedding` `[1, 1, d_model]` at `position`, after `cache`.
    ///
    /// # Errors
    /// As [`Decoder::start`].
    pub fn step(
        &mut self,
        embedding: ArrayView3<'_, f32>,
        position: i64,
        cache: Cache,
        gates: &Gates,
    ) -> Result<(Array1<f32>, Cache), Error> {
        let tokens = cache.tokens + 1;
        let mut inputs = self
            .step_inputs(embedding, position, tokens, gates)
            .map_err(|e| self.failed(e))?;
        for own in &cache.inputs {
            let Some(port) = self.ports.get(&own.tensor.name) else {
                continue;
            };
            let value = match own.token_axis {
                Some(axis) => port.value(&own.tensor.value.last(axis)),
                None => port.value(&own.tensor.value),
            };
            inputs.push((port.name.clone(), value.map_err(|e| self.failed(e))?));
        }
        inputs.extend(
            cache
                .values
                .into_iter()
                .map(|(name, value)| (name, value.into())),
        );
        self.run_cached(inputs, tokens, cache.inputs)
    }

    fn run_cached(
        &mut self,
        inputs: Inputs<'_>,
        tokens: usize,
        own: Vec<DecoderInput>,
    ) -> Result<(Array1<f32>, Cache), Error> {
        let model = self.model.clone();
        let mut outputs = self.session.run(inputs).map_err(|source| Error::Run {
            model: model.clone(),
            source,
        })?;
        let logits = rows_of(&model, outputs.get(LOGITS))?;
        let last = logits
            .axis_iter(Axis(0))
            .next_back()
            .map(|row| row.to_owned());
        let last = last.ok_or_else(|| Error::Interface {
            model: model.clone(),
            expected: "logits of at least one token".into(),
            found: "none".into(),
        })?;
        let mut values = Vec::new();
        for name in self.ports.keys().filter(|name| name.starts_with(PAST)) {
            let present = name.replacen(PAST, PRESENT, 1);
            let value = outputs.remove(&present).ok_or_else(|| Error::Interface {
                model: model.clone(),
                expected: format!("an output {present} for the input {name}"),
                found: "none".into(),
            })?;
            values.push((name.clone(), value));
        }
        let inputs = own;
        Ok((
            last,
            Cache {
                values,
                tokens,
                inputs,
            },
        ))
    }

    /// The inputs of whole samples, right-padded, with an empty cache.
    fn prompt_inputs(
        &self,
        batch: &[&Embedded],
        gates: &Gates,
    ) -> Result<Inputs<'static>, ort::Error> {
        let tokens = longest(batch);
        let width = batch
            .first()
            .map_or(0, |sample| sample.inputs_embeds.dim().2);
        let mut embeds = Array3::<f32>::zeros((batch.len(), tokens, width));
        let mut attention = vec![0i64; batch.len() * tokens];
        for ((mut row, sample), attention) in embeds
            .outer_iter_mut()
            .zip(batch)
            .zip(attention.chunks_mut(tokens.max(1)))
        {
            let own = sample.inputs_embeds.index_axis(Axis(0), 0);
            row.slice_mut(s![..own.nrows(), ..]).assign(&own);
            attention
                .iter_mut()
                .take(own.nrows())
                .for_each(|position| *position = 1);
        }
        let mut inputs = self.gate_inputs(gates)?;
        for port in self.ports.values() {
            let value = match port.name.as_str() {
                INPUTS_EMBEDS => port.floats(embeds.view().into_dyn())?,
                ATTENTION_MASK => int64s(vec![batch.len(), tokens], attention.clone())?,
                POSITION_IDS => position_ids(port, batch, tokens)?,
                NUM_LOGITS_TO_KEEP => int64s(vec![], vec![0])?,
                name if name.starts_with(PAST) => {
                    port.empty(self.cache_shape(port, batch.len()))?
                }
                name => match decoder_input(name, batch)? {
                    Some(tensor) => port.value(&tensor)?,
                    None => continue,
                },
            };
            inputs.push((port.name.clone(), value));
        }
        Ok(inputs)
    }

    fn step_inputs(
        &self,
        embedding: ArrayView3<'_, f32>,
        position: i64,
        tokens: usize,
        gates: &Gates,
    ) -> Result<Inputs<'static>, ort::Error> {
        let mut inputs = self.gate_inputs(gates)?;
        for port in self.ports.values() {
            let value = match port.name.as_str() {
                INPUTS_EMBEDS => port.floats(embedding.into_dyn())?,
                ATTENTION_MASK => int64s(vec![1, tokens], vec![1; tokens])?,
                POSITION_IDS => match port.dims.len() {
                    3 => {
                        let rows = rows_of_positions(port);
                        int64s(vec![rows, 1, 1], vec![position; rows])?
                    }
                    _ => int64s(vec![1, 1], vec![position])?,
                },
                NUM_LOGITS_TO_KEEP => int64s(vec![], vec![1])?,
                _ => continue,
            };
            inputs.push((port.name.clone(), value));
        }
        Ok(inputs)
    }

    fn gate_inputs(&self, gates: &Gates) -> Result<Inputs<'static>, ort::Error> {
        let mut inputs = Vec::with_capacity(self.layers.len());
        for &(layer, d_ff) in &self.layers {
            let name = gate_name(layer);
            let Some(port) = self.ports.get(&name) else {
                continue;
            };
            #[allow(clippy::cast_possible_truncation)]
            let gate: Array1<f32> = match gates.get(&layer) {
                Some(gates) => gates.mapv(|gate| gate as f32),
                None => Array1::ones(d_ff),
            };
            let value = port.floats(gate.view().into_dyn())?;
            inputs.push((name, value));
        }
        Ok(inputs)
    }

    /// `[B, n_kv, 0, head_dim]`: dimensions that the graph leaves open are the batch (first) and the
    /// tokens; sizes it states are kept.
    fn cache_shape(&self, port: &Port, batch: usize) -> Vec<i64> {
        port.dims
            .iter()
            .enumerate()
            .map(|(axis, &dim)| match (axis, dim) {
                (0, _) => i64::try_from(batch).unwrap_or(1),
                (_, dim) if dim > 0 => dim,
                _ => 0,
            })
            .collect()
    }
}

const INPUTS_EMBEDS: &str = "inputs_embeds";
const ATTENTION_MASK: &str = "attention_mask";
const POSITION_IDS: &str = "position_ids";
const NUM_LOGITS_TO_KEEP: &str = "num_logits_to_keep";
const PAST: &str = "past_key_values.";
const PRESENT: &str = "present.";
const LOGITS: &str = "logits";

fn longest(batch: &[&Embedded]) -> usize {
    batch
        .iter()
        .map(|sample| sample.input_ids.len())
        .max()
        .unwrap_or(0)
}

/// Asks for the last token's logits only, where the model can be asked.
fn keep_last(inputs: &mut Inputs<'_>) -> Result<(), ort::Error> {
    if let Some((_, value)) = inputs
        .iter_mut()
        .find(|(name, _)| name == NUM_LOGITS_TO_KEEP)
    {
        *value = int64s(vec![], vec![1])?;
    }
    Ok(())
}

/// How many rows `[rows, B, T]` the model's position ids have: 3 for mRoPE.
fn rows_of_positions(port: &Port) -> usize {
    port.dims
        .first()
        .and_then(|&rows| usize::try_from(rows).ok())
        .filter(|&r| r > 0)
        .unwrap_or(3)
}

/// The batch's tensors for the input `name`, where its samples bring them.
fn decoder_input(name: &str, batch: &[&Embedded]) -> Result<Option<TensorValue>, ort::Error> {
    let found: Vec<&DecoderInput> = batch
        .iter()
        .filter_map(|sample| {
            let mut inputs = sample.decoder_inputs.iter();
            inputs.find(|input| input.tensor.name == name)
        })
        .collect();
    let Some(first) = found.first() else {
        return Ok(None);
    };
    let values: Vec<&TensorValue> = found.iter().map(|input| &input.tensor.value).collect();
    TensorValue::stack(&values, first.token_axis)
        .filter(|_| found.len() == batch.len())
        .map(Some)
        .ok_or_else(|| {
            ort::Error::new(format!(
                "the samples of a batch differ in '{name}': run them one by one (batch size 1)"
            ))
        })
}

/// `[B, T]`, or `[3, B, T]` where the model's input has three dimensions.
fn position_ids(
    port: &Port,
    batch: &[&Embedded],
    tokens: usize,
) -> Result<SessionInputValue<'static>, ort::Error> {
    let rows = if port.dims.len() == 3 {
        rows_of_positions(port)
    } else {
        1
    };
    let mut ids = Array3::<i64>::zeros((rows, batch.len(), tokens));
    for (sample, row) in batch
        .iter()
        .enumerate()
        .flat_map(|s| (0..rows).map(move |row| (s, row)))
    {
        let (index, sample) = sample;
        let mut place = ids.slice_mut(s![row, index, ..sample.input_ids.len()]);
        match &sample.position_ids {
            PositionIds::Sequential(ids) => place.assign(ids),
            PositionIds::Multimodal(ids) => place.assign(&ids.row(row.min(ids.nrows() - 1))),
        }
    }
    let shape = match port.dims.len() {
        3 => vec![rows, batch.len(), tokens],
        _ => vec![batch.len(), tokens],
    };
    int64s(shape, ids.into_raw_vec_and_offset().0)
}

/// Logits `[1, T, V]` as `[T, V]`.
fn rows_of(model: &Path, logits: Option<&DynValue>) -> Result<Array2<f32>, Error> {
    let interface = |found: String| Error::Interface {
        model: model.to_owned(),
        expected: "an output logits [1, T, vocabulary]".into(),
        found,
    };
    let logits = logits.ok_or_else(|| interface("no such output".into()))?;
    let (shape, data) = to_floats(logits).map_err(|source| Error::Run {
        model: model.to_owned(),
        source,
    })?;
    let vocabulary = shape.last().copied().unwrap_or(0);
    let rows = data.len().checked_div(vocabulary).unwrap_or(0);
    Array2::from_shape_vec((rows, vocabulary), data).map_err(|_| interface(format!("{shape:?}")))
}
