//! The decoder, instrumented: one session for collecting, weakening, sweeping and evaluating.
//!
//! In: embedded samples and gates. Out: coefficient sums ([`Decoder::sums`]), raw hidden activations
//! ([`Decoder::hidden`]) or logits and the key/value cache ([`Decoder::logits`], [`Decoder::start`],
//! [`Decoder::step`]), depending on the [`Outputs`] that it was opened for. Gates are inputs: no
//! session is rebuilt and no weight is touched, whatever the gates.
//!
//! Layouts differ in how they cut a decoder up. The prompt's graph may hold the whole of it; or
//! further tokens have a graph of their own ([`Decoder::with_decode`]); or the logits have
//! ([`Decoder::with_lm_head`]). A graph without a cache is run on the whole text again for each new
//! token.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{Array1, Array2, Array3, ArrayView2, Axis, s};
use ort::session::SessionOutputs;
use ort::value::DynValue;

use super::engine::{Engine, Work};
use super::part::{Inputs, Part, Run, own_inputs};
use super::prefix::Prefixes;
use super::tensor::to_floats;
use super::{Embedded, Error};
use crate::bundle::DecoderNames;
use crate::graph::{
    ANSWER_MASK, LayerId, Mlp, Outputs, Patch, Tower, hidden_name, positions_name, session,
    sum_name,
};
use crate::kvw::{Gates, Sums};
use crate::onnx::ModelFile;
use crate::preprocess::{DecoderInput, NamedTensor};

/// What a decoder without its own output projection calls its last output.
const HIDDEN_STATES: &[&str] = &["last_hidden_state", "hidden_states"];

/// An open decoder.
pub struct Decoder {
    names: DecoderNames,
    layers: Vec<(LayerId, usize)>,
    /// Runs prompts, and further tokens where nothing else does.
    prompt: Part,
    decode: Option<Part>,
    lm_head: Option<Part>,
    /// Where what samples begin with alike is run once: [`Outputs::SumsAndCache`].
    prefixes: Option<Prefixes>,
}

/// A token to run after those before it.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its id.
    pub id: i64,
    /// Float32 `[1, 1, d_model]`, where the model's embedding is a file of its own.
    pub embedding: Option<Array3<f32>>,
}

/// What is kept of the tokens so far.
pub struct Cache {
    past: Past,
    tokens: usize,
    /// The first prompt's own decoder inputs, of which every step is given its part.
    inputs: Vec<DecoderInput>,
}

enum Past {
    /// Keys and values, by input name.
    Values(Vec<(String, DynValue)>),
    /// All that was run, where the model keeps nothing.
    Nothing(Vec<Embedded>),
}

impl Decoder {
    /// Opens `model`, whose inputs have the usual names, with `mlps` tapped and gated. Without MLPs
    /// it is the model as it is.
    ///
    /// # Errors
    /// An MLP cannot be instrumented, or ONNX Runtime refuses the model.
    pub fn open(
        engine: &Engine,
        model: &ModelFile,
        mlps: &[&Mlp<'_>],
        outputs: Outputs,
        work: Work,
    ) -> Result<Decoder, Error> {
        Decoder::open_named(engine, DecoderNames::default(), model, mlps, outputs, work)
    }

    /// [`Decoder::open`] with the names of the model's layout.
    ///
    /// # Errors
    /// As [`Decoder::open`].
    pub fn open_named(
        engine: &Engine,
        names: DecoderNames,
        model: &ModelFile,
        mlps: &[&Mlp<'_>],
        outputs: Outputs,
        work: Work,
    ) -> Result<Decoder, Error> {
        let (prompt, layers) = instrumented(engine, model, mlps, outputs, work)?;
        let prefixes = match outputs {
            Outputs::SumsAndCache(_) => Some(Prefixes::of(&prompt, wanted(&prompt, &names))?),
            _ => None,
        };
        Ok(Decoder {
            names,
            layers,
            prompt,
            decode: None,
            lm_head: None,
            prefixes,
        })
    }

    /// The same, with `model` for the tokens after the prompt, gated alike. For [`Outputs::Model`].
    ///
    /// # Errors
    /// As [`Decoder::open`]; the two have different layers.
    pub fn with_decode(
        mut self,
        engine: &Engine,
        model: &ModelFile,
        mlps: &[&Mlp<'_>],
        work: Work,
    ) -> Result<Decoder, Error> {
        let (part, layers) = instrumented(engine, model, mlps, Outputs::Model, work)?;
        if layers != self.layers {
            return Err(part.interface(
                format!(
                    "the layers of {}: {:?}",
                    self.prompt.model.display(),
                    self.layers
                ),
                format!("{layers:?}"),
            ));
        }
        self.decode = Some(part);
        Ok(self)
    }

    /// The same, with `model` to make logits of hidden states. For [`Outputs::Model`].
    ///
    /// # Errors
    /// The file cannot be read, or ONNX Runtime refuses it.
    pub fn with_lm_head(
        mut self,
        engine: &Engine,
        model: &ModelFile,
        work: Work,
    ) -> Result<Decoder, Error> {
        let graph = session::encode(model, model.proto().clone())?;
        self.lm_head = Some(Part::open(engine, &graph, model, work)?);
        Ok(self)
    }

    /// The gated layers with their `d_ff`, ascending.
    pub fn layers(&self) -> &[(LayerId, usize)] {
        &self.layers
    }

    /// How many prefixes were run for all samples so far, where they are run once for samples that share them.
    pub fn prefix_runs(&self) -> Option<u64> {
        self.prefixes.as_ref().map(|prefixes| prefixes.runs)
    }

    /// The model file.
    pub fn model(&self) -> &Path {
        &self.prompt.model
    }

    /// The weighted sums of the moment over the answer tokens of `batch`. Needs
    /// [`Outputs::Sums`], or [`Outputs::SumsAndCache`]: a single sample is then run in two parts, of which the
    /// first one serves the next samples too. Shorter samples are padded on the right, with weight 0; samples
    /// that do not fit into one run are run one after the other.
    ///
    /// # Errors
    /// The model fails, or lacks something.
    pub fn sums(&mut self, batch: &[&Embedded], gates: &Gates) -> Result<Sums, Error> {
        if batch.len() > 1 && !self.fit_together(batch) {
            let mut total: Option<Sums> = None;
            for &sample in batch {
                let one = self.sums_of(&[sample], gates)?;
                total = Some(match total {
                    None => one,
                    Some(mut total) => {
                        total.weight += one.weight;
                        for (layer, weight) in one.own_weights {
                            *total.own_weights.entry(layer).or_default() += weight;
                        }
                        for (layer, sum) in one.layers {
                            total
                                .layers
                                .entry(layer)
                                .and_modify(|all| *all += &sum)
                                .or_insert(sum);
                        }
                        total
                    }
                });
            }
            return Ok(total.unwrap_or_default());
        }
        self.sums_of(batch, gates)
    }

    /// Whether these samples can be one run: the graph leaves the batch open, no sample brings tensors of
    /// its own for what is padded here, and those that they do bring can be stacked.
    fn fit_together(&self, batch: &[&Embedded]) -> bool {
        let padded = [
            &self.names.input_ids,
            &self.names.inputs_embeds,
            &self.names.attention_mask,
            &self.names.position_ids,
        ];
        self.prompt.takes_batches(&self.names)
            && !batch
                .iter()
                .flat_map(|sample| &sample.decoder_inputs)
                .any(|own| padded.contains(&&own.tensor.name))
            && own_inputs(batch).is_ok()
    }

    fn sums_of(&mut self, batch: &[&Embedded], gates: &Gates) -> Result<Sums, Error> {
        if let [sample] = batch
            && let Some(mut prefixes) = self.prefixes.take()
        {
            let sums = prefixes.sums(self, sample, gates);
            self.prefixes = Some(prefixes);
            return sums;
        }
        let inputs = self.prompt_inputs(batch, gates, 0)?;
        Ok(self.summed(inputs, batch, &[])?.0)
    }

    /// Runs the decoder on `inputs`, those of `batch` but for the answer mask. Beside the sums, the outputs
    /// that `wanted` asks for.
    pub(super) fn summed(
        &mut self,
        mut inputs: Inputs<'_>,
        batch: &[&Embedded],
        wanted: &[Wanted],
    ) -> Result<(Sums, Values), Error> {
        let tokens = batch.iter().map(|sample| sample.input_ids.len()).max();
        let mut mask = Array2::<f32>::zeros((batch.len(), tokens.unwrap_or(0)));
        for (mut row, sample) in mask.rows_mut().into_iter().zip(batch) {
            row.slice_mut(s![..sample.answer_mask.len()])
                .assign(&ndarray::aview1(&sample.answer_mask));
        }
        let weight = mask.iter().map(|&weight| f64::from(weight)).sum();
        if let Some(port) = self.prompt.port(ANSWER_MASK) {
            let mask = port.floats(mask.view().into_dyn());
            let mask = mask.map_err(|e| self.prompt.failed(e))?;
            inputs.push((ANSWER_MASK.to_owned(), mask));
        }
        let (model, layers) = (self.prompt.model.clone(), &self.layers);
        self.prompt.run(inputs, wanted, |mut outputs| {
            let mut sums = Sums {
                weight,
                ..Sums::default()
            };
            let output = |name: String| {
                let value = outputs.get(name.as_str()).ok_or_else(|| Error::Interface {
                    model: model.clone(),
                    expected: name,
                    found: "no such output".into(),
                })?;
                let floats = to_floats(value).map_err(|source| Error::Run {
                    model: model.clone(),
                    source,
                });
                Ok::<_, Error>(floats?.1)
            };
            for &(layer, _) in layers {
                sums.layers
                    .insert(layer, Array1::from(output(sum_name(layer))?));
                if layer.tower() == Tower::Vision {
                    let weight = output(positions_name(layer))?.into_iter().map(f64::from);
                    sums.own_weights.insert(layer, weight.sum());
                }
            }
            Ok((sums, take(&model, &mut outputs, wanted)?))
        })
    }

    /// The raw hidden activations of one sample, by layer: float32 `[T, d_ff]`, before the gate. Needs
    /// [`Outputs::Hidden`].
    ///
    /// # Errors
    /// The model fails, or lacks something.
    pub fn hidden(
        &mut self,
        sample: &Embedded,
        gates: &Gates,
    ) -> Result<BTreeMap<LayerId, Array2<f32>>, Error> {
        let inputs = self.prompt_inputs(&[sample], gates, 0)?;
        let (model, layers) = (self.prompt.model.clone(), &self.layers);
        self.prompt.run(inputs, &[], |outputs| {
            let mut read = BTreeMap::new();
            for &(layer, d_ff) in layers {
                let hidden = outputs.get(hidden_name(layer)).map(to_floats);
                let hidden = hidden.transpose().map_err(|source| Error::Run {
                    model: model.clone(),
                    source,
                })?;
                let rows = hidden.and_then(|(_, data)| {
                    Array2::from_shape_vec((data.len().checked_div(d_ff)?, d_ff), data).ok()
                });
                let rows = rows.ok_or_else(|| Error::Interface {
                    model: model.clone(),
                    expected: format!("{} [B, T, {d_ff}]", hidden_name(layer)),
                    found: "another shape".into(),
                })?;
                read.insert(layer, rows);
            }
            Ok(read)
        })
    }

    /// The logits of one sample: float32 `[T, vocabulary]`. Needs [`Outputs::Model`].
    ///
    /// # Errors
    /// The model fails, or has neither logits nor hidden states with an output projection beside it.
    pub fn logits(&mut self, sample: &Embedded, gates: &Gates) -> Result<Array2<f32>, Error> {
        let inputs = self.prompt_inputs(&[sample], gates, 0)?;
        let model = self.prompt.model.clone();
        let (names, lm_head) = (&self.names, self.lm_head.as_mut());
        self.prompt.run(inputs, &[], |outputs| {
            logits_of(&model, &outputs, names, lm_head, None)
        })
    }

    /// Whether [`Decoder::start`] takes `prompt` together with others of its length, and each is answered
    /// as it would be alone: every graph leaves the batch open and computes each row by itself, and the
    /// prompt brings nothing of its own.
    pub fn answers_together(&self, prompt: &Embedded) -> bool {
        let parts = [Some(&self.prompt), self.decode.as_ref()];
        prompt.decoder_inputs.is_empty()
            && parts
                .into_iter()
                .flatten()
                .all(|part| part.leaves_batch_open(&self.names))
            && (parts.into_iter().flatten())
                .chain(&self.lm_head)
                .all(|part| part.row_by_row)
    }

    /// Runs `B` prompts of one length and keeps the cache: the logits of the last token of each
    /// `[B, vocabulary]`, and the cache. More than one only where [`Decoder::answers_together`].
    ///
    /// # Errors
    /// As [`Decoder::logits`]; an input of the cache has no output.
    pub fn start(
        &mut self,
        prompts: &[&Embedded],
        gates: &Gates,
    ) -> Result<(Array2<f32>, Cache), Error> {
        let inputs = self.prompt_inputs(prompts, gates, 1)?;
        let first = prompts.first();
        let tokens = first.map_or(0, |prompt| prompt.input_ids.len());
        let next = self.decode.as_ref().unwrap_or(&self.prompt);
        let wanted = wanted(next, &self.names);
        let run = (&mut self.prompt, self.lm_head.as_mut());
        let (logits, values) = run_last(run, inputs, prompts.len(), &self.names, wanted)?;
        let past = match values.is_empty() {
            true => Past::Nothing(prompts.iter().map(|&prompt| prompt.clone()).collect()),
            false => Past::Values(values),
        };
        Ok((
            logits,
            Cache {
                past,
                tokens,
                inputs: first.map_or_else(Vec::new, |prompt| prompt.decoder_inputs.clone()),
            },
        ))
    }

    /// Runs one more token of each of the prompts after `cache`, with its position.
    ///
    /// # Errors
    /// As [`Decoder::start`].
    pub fn step(
        &mut self,
        next: &[(Token, i64)],
        cache: Cache,
        gates: &Gates,
    ) -> Result<(Array2<f32>, Cache), Error> {
        let tokens = cache.tokens + 1;
        let values = match cache.past {
            Past::Values(values) => values,
            Past::Nothing(mut all) => {
                for (text, (token, position)) in all.iter_mut().zip(next) {
                    text.push(token, *position)
                        .map_err(|e| self.prompt.failed(e))?;
                }
                return self.start(&all.iter().collect::<Vec<_>>(), gates);
            }
        };
        let part = self.decode.as_mut().unwrap_or(&mut self.prompt);
        let mut run = Run::step(next, cache.tokens).map_err(|e| part.failed(e))?;
        run.own = (cache.inputs.iter())
            .map(|own| NamedTensor {
                name: own.tensor.name.clone(),
                value: match own.token_axis {
                    Some(axis) => own.tensor.value.last(axis),
                    None => own.tensor.value.clone(),
                },
            })
            .collect();
        let mut inputs: Inputs<'_> = part.inputs(&run, &self.names, &self.layers, gates)?;
        inputs.extend(values.into_iter().map(|(name, value)| (name, value.into())));
        let wanted = wanted(part, &self.names);
        let run = (part, self.lm_head.as_mut());
        let (logits, values) = run_last(run, inputs, next.len(), &self.names, wanted)?;
        Ok((
            logits,
            Cache {
                past: Past::Values(values),
                tokens,
                inputs: cache.inputs,
            },
        ))
    }

    pub(super) fn prompt_inputs(
        &self,
        batch: &[&Embedded],
        gates: &Gates,
        keep: i64,
    ) -> Result<Inputs<'static>, Error> {
        let own = batch.iter().flat_map(|sample| &sample.decoder_inputs);
        for input in own.filter(|input| input.required) {
            let name = &input.tensor.name;
            if self.prompt.port(name).is_none() {
                return Err(self.prompt.interface(
                    format!(
                        "an input {name}: without it, answers are not computed as they are given"
                    ),
                    "no such input",
                ));
            }
        }
        let run = Run::prompts(batch, keep).map_err(|e| self.prompt.failed(e))?;
        self.prompt.inputs(&run, &self.names, &self.layers, gates)
    }

    /// The inputs of a sample's last tokens, but for the cache, which holds the `past` tokens before them.
    pub(super) fn inputs_after(
        &self,
        past: usize,
        tail: &Embedded,
        gates: &Gates,
    ) -> Result<Inputs<'static>, Error> {
        let run = Run::prompts(&[tail], 0).map_err(|e| self.prompt.failed(e))?;
        self.prompt
            .inputs(&run.after(past), &self.names, &self.layers, gates)
    }
}

fn instrumented(
    engine: &Engine,
    model: &ModelFile,
    mlps: &[&Mlp<'_>],
    outputs: Outputs,
    work: Work,
) -> Result<(Part, Vec<(LayerId, usize)>), Error> {
    let patch = Patch::plan(model, mlps, outputs)?;
    tracing::debug!(%patch, "instrumenting {}", model.path().display());
    let graph = session::encode(model, patch.apply(model))?;
    let part = Part::open(engine, &graph, model, work)?;
    Ok((part, patch.layers()))
}

/// An input, with the outputs that may become it.
pub(super) type Wanted = (String, Vec<String>);

/// The cache inputs of the next run, each with the outputs that may become it.
fn wanted(next: &Part, names: &DecoderNames) -> Vec<Wanted> {
    next.cache(names)
        .map(|(port, present)| (port.name.clone(), present))
        .collect()
}

/// Values of inputs, by name.
pub(super) type Values = Vec<(String, DynValue)>;

/// Runs a part: the logits of the last token of each row of the batch, and the outputs that the next run
/// wants as its cache.
fn run_last(
    (part, lm_head): (&mut Part, Option<&mut Part>),
    inputs: Inputs<'_>,
    batch: usize,
    names: &DecoderNames,
    wanted: Vec<Wanted>,
) -> Result<(Array2<f32>, Values), Error> {
    let model = part.model.clone();
    part.run(inputs, &wanted, |mut outputs| {
        let last = logits_of(&model, &outputs, names, lm_head, Some(batch))?;
        Ok((last, take(&model, &mut outputs, &wanted)?))
    })
}

/// The outputs that `wanted` asks for, under the names of the inputs that they become.
fn take(
    model: &Path,
    outputs: &mut SessionOutputs<'_>,
    wanted: &[Wanted],
) -> Result<Values, Error> {
    let value = |(input, present): &Wanted| {
        let value = present.iter().find_map(|output| outputs.remove(output));
        let value = value.ok_or_else(|| Error::Interface {
            model: model.to_owned(),
            expected: format!("an output {} for the input {input}", present.join(" or ")),
            found: "none".into(),
        })?;
        Ok((input.clone(), value))
    };
    wanted.iter().map(value).collect()
}

/// The logits `[T, vocabulary]` among a decoder's outputs, or what its output projection makes of its
/// hidden states; with `last` those of the last token of each of so many rows: `[B, vocabulary]`.
fn logits_of(
    model: &Path,
    outputs: &SessionOutputs<'_>,
    names: &DecoderNames,
    lm_head: Option<&mut Part>,
    last: Option<usize>,
) -> Result<Array2<f32>, Error> {
    if let Some(logits) = outputs.get(names.logits.as_str()) {
        let logits = rows(model, logits)?;
        return match last {
            Some(batch) => last_rows(model, &logits, batch),
            None => Ok(logits),
        };
    }
    let hidden = HIDDEN_STATES.iter().find_map(|name| outputs.get(*name));
    let (Some(hidden), Some(head)) = (hidden, lm_head) else {
        return Err(Error::Interface {
            model: model.to_owned(),
            expected: format!(
                "an output {}, or {} with lm_head beside it",
                names.logits,
                HIDDEN_STATES.join(" or ")
            ),
            found: outputs.keys().collect::<Vec<_>>().join(", "),
        });
    };
    let hidden = rows(model, hidden)?;
    match last {
        Some(batch) => project(head, last_rows(model, &hidden, batch)?.view()),
        None => project(head, hidden.view()),
    }
}

/// The last token's row of each of `batch` samples, out of those of all their tokens `[B · T, size]`.
fn last_rows(model: &Path, rows: &Array2<f32>, batch: usize) -> Result<Array2<f32>, Error> {
    let tokens = rows.nrows().checked_div(batch).unwrap_or(0);
    if tokens == 0 || tokens * batch != rows.nrows() {
        return Err(Error::Interface {
            model: model.to_owned(),
            expected: format!("an output of at least one token for each of {batch} prompts"),
            found: format!("{} rows", rows.nrows()),
        });
    }
    let last: Vec<usize> = (1..=batch).map(|row| row * tokens - 1).collect();
    Ok(rows.select(Axis(0), &last))
}

/// Logits `[T, vocabulary]` of hidden states `[T, d_model]`.
fn project(head: &mut Part, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error> {
    let Some(port) = head.first_port() else {
        return Err(head.interface("an input", "none"));
    };
    let value = port.floats(hidden.insert_axis(Axis(0)).into_dyn());
    let value = value.map_err(|e| head.failed(e))?;
    let inputs = vec![(port.name.clone(), value)];
    let model = head.model.clone();
    head.run(inputs, &[], |outputs| {
        let first = outputs.values().next().ok_or_else(|| Error::Interface {
            model: model.clone(),
            expected: "an output".into(),
            found: "none".into(),
        })?;
        rows(&model, &first)
    })
}

/// An output `[B, T, size]` as float32 `[B · T, size]`.
fn rows(model: &Path, value: &DynValue) -> Result<Array2<f32>, Error> {
    let (shape, data) = to_floats(value).map_err(|source| Error::Run {
        model: model.to_owned(),
        source,
    })?;
    let found = format!("{shape:?}");
    let size = shape.last().copied().unwrap_or(0);
    let rows = data.len().checked_div(size).unwrap_or(0);
    Array2::from_shape_vec((rows, size), data).map_err(|_| Error::Interface {
        model: model.to_owned(),
        expected: "an output [B, T, size]".into(),
        found,
    })
}
