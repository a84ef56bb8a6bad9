//! One graph of the decoder in a session, and what it is fed.
//!
//! In: a [`Run`]: some tokens of one or more samples, with what is known of them. Out: the values of
//! the inputs that the graph has, each in the type and rank that the graph states. An input that
//! nothing is known for is an error that names it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView3, Axis, aview1, concatenate, s};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session, SessionInputValue, SessionOutputs};

use super::decoder::Wanted;
use super::device::Device;
use super::engine::{Engine, Work};
use super::tensor::{Port, boolean, int64s};
use super::{Embedded, Error};
use crate::bundle::DecoderNames;
use crate::graph::session::SessionModel;
use crate::graph::{ANSWER_MASK, LayerId, VISION_MASK, gate_name};
use crate::kvw::Gates;
use crate::onnx::{ModelFile, graphs};
use crate::preprocess::feeds::kind;
use crate::preprocess::{DecoderInput, NamedTensor, PositionIds, TensorValue};

/// The inputs of a session.
pub(super) type Inputs<'a> = Vec<(String, SessionInputValue<'a>)>;

/// How many of the last tokens' logits are wanted; 0: all.
const NUM_LOGITS_TO_KEEP: &str = "num_logits_to_keep";
/// Whether a merged decoder takes the branch that reads the cache.
const USE_CACHE_BRANCH: &str = "use_cache_branch";

/// A graph in a session.
pub(super) struct Part {
    pub(super) model: PathBuf,
    session: Session,
    /// Where it computes.
    device: Device,
    ports: BTreeMap<String, Port>,
    /// The inputs of the model as it is; an instrumented graph may need fewer.
    declared: Vec<String>,
    /// Whether what is computed of a row of a batch does not depend on the others.
    pub(super) row_by_row: bool,
}

/// Operators that quantize a tensor by its own largest and smallest value: the rows of a batch would
/// share a scale.
const SCALE_OF_ALL_ROWS: &[&str] = &[
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
];

/// What one run computes: `T` tokens of `B` samples, after `P` that the cache holds.
pub(super) struct Run {
    /// `[B, T]`.
    pub(super) ids: Array2<i64>,
    /// Float32 `[B, T, d_model]`, where the tokens were embedded.
    pub(super) embeds: Option<Array3<f32>>,
    /// `[B, P + T]`: 1 for a token, 0 for padding.
    pub(super) attention: Array2<i64>,
    /// `[4, B, T]`: each token's number, then its temporal, height and width position.
    pub(super) positions: Array3<i64>,
    /// Whether the samples bring ready-made inputs. Their positions are then assumed to be 0, 1, 2, …
    /// where one row of them is wanted, and every tensor must be wanted.
    pub(super) ready: bool,
    /// Tokens whose logits are wanted, from the last back; 0: all.
    pub(super) keep: i64,
    /// Whether a cache is given.
    pub(super) cached: bool,
    /// What the samples bring for inputs by their name. It overrules the above.
    pub(super) own: Vec<NamedTensor>,
    /// The first sample, for messages.
    pub(super) name: String,
}

impl Part {
    pub(super) fn open(
        engine: &Engine,
        graph: &SessionModel,
        model: &ModelFile,
        work: Work,
    ) -> Result<Part, Error> {
        let session = engine.open(graph, model.path(), work)?;
        let ports = session.inputs().iter().filter_map(Port::of);
        let ports = ports.map(|port| (port.name.clone(), port)).collect();
        let placement = engine.placement();
        let device = placement.and_then(|placement| placement.device.parse().ok());
        Ok(Part {
            model: model.path().to_owned(),
            session,
            device: device.unwrap_or(Device::Cpu),
            ports,
            declared: (model.graph().input.iter())
                .map(|input| input.name().to_owned())
                .collect(),
            row_by_row: !graphs(model.proto())
                .into_iter()
                .flat_map(|graph| &graph.node)
                .any(|node| SCALE_OF_ALL_ROWS.contains(&node.op_type())),
        })
    }

    /// Runs the graph, and `read`s its outputs. Those that become what `kept` asks for stay in the memory of the device
    /// that computed them, from which the next run takes them without a copy; all others are on the host.
    pub(super) fn run<T>(
        &mut self,
        inputs: Inputs<'_>,
        kept: &[Wanted],
        read: impl FnOnce(SessionOutputs<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let model = &self.model;
        let failed = |source| Error::Run {
            model: model.clone(),
            source,
        };
        if kept.is_empty() {
            return read(self.session.run(inputs).map_err(failed)?);
        }
        let binding = self.bind(&inputs, kept).map_err(failed)?;
        let outputs = self.session.run_binding(&binding);
        read(outputs.map_err(failed)?)
    }

    fn bind(&self, inputs: &Inputs<'_>, kept: &[Wanted]) -> Result<IoBinding, ort::Error> {
        let memory = |device, index| {
            MemoryInfo::new(device, index, AllocatorType::Device, MemoryType::Default)
        };
        let host = memory(AllocationDevice::CPU, 0)?;
        let device = match self.device {
            Device::Cuda(index) => memory(AllocationDevice::CUDA, index)?,
            Device::Auto | Device::Cpu => memory(AllocationDevice::CPU, 0)?,
        };
        let mut binding = self.session.create_binding()?;
        for (name, value) in inputs {
            binding.bind_input(name, value)?;
        }
        for output in self.session.outputs() {
            let name = output.name();
            let stays = (kept.iter()).any(|(_, present)| present.iter().any(|kept| kept == name));
            binding.bind_output_to_device(name, if stays { &device } else { &host })?;
        }
        binding.synchronize_inputs()?;
        Ok(binding)
    }

    pub(super) fn port(&self, name: &str) -> Option<&Port> {
        self.ports.get(name)
    }

    /// The first input, by name.
    pub(super) fn first_port(&self) -> Option<&Port> {
        self.ports.values().next()
    }

    /// The cache's inputs, each with the outputs that may become it.
    pub(super) fn cache<'p>(
        &'p self,
        names: &'p DecoderNames,
    ) -> impl Iterator<Item = (&'p Port, Vec<String>)> {
        self.ports
            .values()
            .filter_map(|port| Some((port, names.present(&port.name)?)))
    }

    /// Whether several samples fit into one run.
    pub(super) fn takes_batches(&self, names: &DecoderNames) -> bool {
        let main = [&names.inputs_embeds, &names.input_ids];
        let main = main.into_iter().find_map(|name| self.ports.get(name));
        main.is_some_and(|port| port.dims.first().is_none_or(|&size| size != 1))
    }

    /// Whether every input that has a row for each sample leaves open how many there are.
    pub(super) fn leaves_batch_open(&self, names: &DecoderNames) -> bool {
        let main = [
            &names.inputs_embeds,
            &names.input_ids,
            &names.attention_mask,
        ];
        self.ports.values().all(|port| {
            let axis = if main.contains(&&port.name) || names.present(&port.name).is_some() {
                0
            } else if port.name == names.position_ids {
                port.dims.len().saturating_sub(2)
            } else {
                return true;
            };
            port.dims.get(axis).is_some_and(|&size| size < 0)
        })
    }

    pub(super) fn failed(&self, source: ort::Error) -> Error {
        Error::Run {
            model: self.model.clone(),
            source,
        }
    }

    pub(super) fn interface(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Interface {
            model: self.model.clone(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// The values of the graph's inputs. Those of the cache are left out where `run.cached`, and are
    /// empty otherwise; the answer mask is the caller's.
    pub(super) fn inputs(
        &self,
        run: &Run,
        names: &DecoderNames,
        layers: &[(LayerId, usize)],
        gates: &Gates,
    ) -> Result<Inputs<'static>, Error> {
        let mut inputs =
            gate_values(|name| self.ports.get(name), layers, gates).map_err(|e| self.failed(e))?;
        let gated: Vec<String> = inputs.iter().map(|(name, _)| name.clone()).collect();
        for port in self.ports.values() {
            if port.name == ANSWER_MASK || gated.contains(&port.name) {
                continue;
            }
            self.check_own(port, run)?;
            let cache = names.present(&port.name).is_some();
            if cache && run.cached {
                continue;
            }
            let value = match self.value(port, run, names).map_err(|e| self.failed(e))? {
                Some(value) => value,
                None if cache => self
                    .empty(port, run.ids.nrows(), names)
                    .map_err(|e| self.failed(e))?,
                None => return Err(self.unknown(port, run)),
            };
            inputs.push((port.name.clone(), value));
        }
        if run.ready {
            self.check_wanted(run, names)?;
        }
        Ok(inputs)
    }

    /// Whether the graph has an input for everything that ready-made samples bring. A mask or positions
    /// too many are no mistake: some exports have none.
    fn check_wanted(&self, run: &Run, names: &DecoderNames) -> Result<(), Error> {
        let spare = [&names.attention_mask, &names.position_ids];
        let unwanted = (run.own.iter())
            .find(|own| !self.declared.contains(&own.name) && !spare.contains(&&own.name));
        match unwanted {
            None => Ok(()),
            Some(own) => Err(Error::Input {
                sample: run.name.clone(),
                tensor: own.name.clone(),
                expected: format!("one of the model's inputs {}", self.declared.join(", ")),
                found: "a name that none of them has".to_owned(),
            }),
        }
    }

    /// Whether what the samples bring for this input fits it.
    fn check_own(&self, port: &Port, run: &Run) -> Result<(), Error> {
        let Some(own) = run.own.iter().find(|own| own.name == port.name) else {
            return Ok(());
        };
        match port.takes(&own.value) {
            true => Ok(()),
            false => Err(Error::Input {
                sample: run.name.clone(),
                tensor: own.name.clone(),
                expected: format!("{} {:?}", port.element, port.dims),
                found: format!("{} {:?}", kind(&own.value), own.value.shape()),
            }),
        }
    }

    fn value(
        &self,
        port: &Port,
        run: &Run,
        names: &DecoderNames,
    ) -> Result<Option<SessionInputValue<'static>>, ort::Error> {
        if let Some(own) = run.own.iter().find(|own| own.name == port.name) {
            return port.value(&own.value).map(Some);
        }
        let name = port.name.as_str();
        let integers = |array: &Array2<i64>| {
            port.value(&TensorValue::Integers(array.clone().into_dyn()))
                .map(Some)
        };
        if name == names.inputs_embeds {
            let embeds = run.embeds.as_ref();
            return embeds
                .map(|embeds| port.floats(embeds.view().into_dyn()))
                .transpose();
        }
        if name == names.input_ids {
            return integers(&run.ids);
        }
        if name == names.attention_mask {
            return integers(&run.attention);
        }
        if name == names.position_ids && (!run.ready || port.dims.len() < 3) {
            let ids = positions(&port.dims, &run.positions);
            return port.value(&TensorValue::Integers(ids)).map(Some);
        }
        match name {
            NUM_LOGITS_TO_KEEP => int64s(vec![], vec![run.keep]).map(Some),
            USE_CACHE_BRANCH => boolean(run.cached).map(Some),
            // Every position counts alike, unless the sample says otherwise.
            VISION_MASK => port.floats(aview1(&[1.0]).into_dyn()).map(Some),
            _ => Ok(None),
        }
    }

    /// A cache of no tokens. States of a fixed size begin with zeros.
    fn empty(
        &self,
        port: &Port,
        batch: usize,
        names: &DecoderNames,
    ) -> Result<SessionInputValue<'static>, ort::Error> {
        let last = port.dims.len().saturating_sub(1);
        let shape: Vec<usize> = (port.dims.iter().enumerate())
            .map(|(axis, &dim)| match usize::try_from(dim) {
                _ if axis == 0 => batch,
                Ok(dim) if dim > 0 => dim,
                _ if axis == last => names.head_size.unwrap_or(0),
                _ => 0,
            })
            .collect();
        port.zeros(&shape)
    }

    fn unknown(&self, port: &Port, run: &Run) -> Error {
        let mut known = vec!["input_ids", "attention_mask", "position_ids"];
        known.extend(run.embeds.iter().map(|_| "inputs_embeds"));
        known.extend(run.own.iter().map(|own| own.name.as_str()));
        self.interface(
            format!(
                "a value for its input '{}' {:?}, with -1 for an open dimension",
                port.name, port.dims
            ),
            format!("values for {}", known.join(", ")),
        )
    }
}

/// The gates of `layers` as inputs, for those that have one; 1 where a layer is not weakened.
pub(super) fn gate_values<'p>(
    port: impl Fn(&str) -> Option<&'p Port>,
    layers: &[(LayerId, usize)],
    gates: &Gates,
) -> Result<Inputs<'static>, ort::Error> {
    let mut inputs = Vec::with_capacity(layers.len());
    for &(layer, d_ff) in layers {
        let name = gate_name(layer);
        let Some(port) = port(&name) else {
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

impl Run {
    /// Whole samples, shorter ones padded on the right: a causal decoder's tokens do not see what
    /// follows them.
    pub(super) fn prompts(batch: &[&Embedded], keep: i64) -> Result<Run, ort::Error> {
        let tokens = batch.iter().map(|sample| sample.input_ids.len()).max();
        let tokens = tokens.unwrap_or(0);
        let mut run = Run {
            ids: Array2::zeros((batch.len(), tokens)),
            embeds: embeddings(batch, tokens)?,
            attention: Array2::zeros((batch.len(), tokens)),
            positions: Array3::zeros((4, batch.len(), tokens)),
            keep,
            cached: false,
            own: own_inputs(batch)?,
            ready: false,
            name: batch
                .first()
                .map_or_else(String::new, |sample| sample.name.clone()),
        };
        for (index, sample) in batch.iter().enumerate() {
            let own = sample.input_ids.len();
            let ids = ndarray::aview1(&sample.input_ids);
            run.ids.slice_mut(s![index, ..own]).assign(&ids);
            run.attention.slice_mut(s![index, ..own]).fill(1);
            let numbers: Array1<i64> = (0..).take(own).collect();
            let mut place = run.positions.slice_mut(s![.., index, ..own]);
            place.row_mut(0).assign(&numbers);
            let mut three = place.slice_mut(s![1.., ..]);
            match &sample.position_ids {
                PositionIds::Sequential(ids) => {
                    three.assign(&ids.broadcast((3, own)).ok_or_else(|| {
                        ort::Error::new(format!("{}: positions of another length", sample.name))
                    })?)
                }
                PositionIds::Unstated => {
                    run.ready = true;
                    three.assign(&numbers.broadcast((3, own)).ok_or_else(|| {
                        ort::Error::new(format!("{}: too many tokens", sample.name))
                    })?);
                }
                PositionIds::Multimodal(ids) if ids.dim() == (3, own) => three.assign(ids),
                PositionIds::Multimodal(ids) => {
                    return Err(ort::Error::new(format!(
                        "{}: expected positions [3, {own}], found {:?}",
                        sample.name,
                        ids.shape()
                    )));
                }
            }
        }
        Ok(run)
    }

    /// The same tokens, after `past` others that the cache holds.
    pub(super) fn after(mut self, past: usize) -> Run {
        let (batch, tokens) = self.ids.dim();
        let mut attention = Array2::ones((batch, past + tokens));
        attention.slice_mut(s![.., past..]).assign(&self.attention);
        self.attention = attention;
        let past = i64::try_from(past).unwrap_or(i64::MAX);
        let mut numbers = self.positions.index_axis_mut(Axis(0), 0);
        numbers += past;
        self.cached = true;
        self
    }

    /// One more token of each sample with its position, after `past` others.
    pub(super) fn step(next: &[(super::Token, i64)], past: usize) -> Result<Run, ort::Error> {
        let batch = next.len();
        let number = i64::try_from(past).unwrap_or(i64::MAX);
        let mut positions = Array3::from_elem((4, batch, 1), number);
        for (index, (_, position)) in next.iter().enumerate() {
            positions.slice_mut(s![1.., index, ..]).fill(*position);
        }
        let embeds: Option<Vec<ArrayView3<'_, f32>>> = (next.iter())
            .map(|(token, _)| token.embedding.as_ref().map(|embedding| embedding.view()))
            .collect();
        let embeds = embeds.map(|embeds| concatenate(Axis(0), &embeds));
        Ok(Run {
            ids: next
                .iter()
                .map(|(token, _)| [token.id])
                .collect::<Vec<_>>()
                .into(),
            embeds: (embeds.transpose()).map_err(|error| ort::Error::new(error.to_string()))?,
            attention: Array2::ones((batch, past + 1)),
            positions,
            keep: 1,
            cached: true,
            ready: false,
            own: Vec::new(),
            name: "an answer".to_owned(),
        })
    }
}

/// The batch's embeddings `[B, T, d_model]`, where all samples have some.
fn embeddings(batch: &[&Embedded], tokens: usize) -> Result<Option<Array3<f32>>, ort::Error> {
    let embedded: Option<Vec<&Array3<f32>>> = batch
        .iter()
        .map(|sample| sample.inputs_embeds.as_ref())
        .collect();
    let Some(embedded) = embedded else {
        return Ok(None);
    };
    let width = embedded.first().map_or(0, |embeds| embeds.dim().2);
    let mut all = Array3::zeros((batch.len(), tokens, width));
    for ((mut row, own), sample) in all.outer_iter_mut().zip(embedded).zip(batch) {
        if own.dim() != (1, sample.input_ids.len(), width) {
            return Err(ort::Error::new(format!(
                "{}: expected embeddings [1, {}, {width}], found {:?}",
                sample.name,
                sample.input_ids.len(),
                own.shape()
            )));
        }
        let own = own.index_axis(Axis(0), 0);
        row.slice_mut(s![..own.nrows(), ..]).assign(&own);
    }
    Ok(Some(all))
}

/// The batch's own tensors, those of one name stacked.
pub(super) fn own_inputs(batch: &[&Embedded]) -> Result<Vec<NamedTensor>, ort::Error> {
    let mut names: Vec<&str> = batch
        .iter()
        .flat_map(|sample| &sample.decoder_inputs)
        .map(|input| input.tensor.name.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    let stack = |name: &str| {
        let found: Vec<&DecoderInput> = batch
            .iter()
            .filter_map(|sample| {
                let mut inputs = sample.decoder_inputs.iter();
                inputs.find(|input| input.tensor.name == name)
            })
            .collect();
        let values: Vec<&TensorValue> = found.iter().map(|input| &input.tensor.value).collect();
        let token_axis = found.first().and_then(|input| input.token_axis);
        let value = match values.as_slice() {
            [one] if batch.len() == 1 => Some((*one).clone()),
            values if values.len() == batch.len() => TensorValue::stack(values, token_axis),
            _ => None,
        };
        value
            .map(|value| NamedTensor {
                name: name.to_owned(),
                value,
            })
            .ok_or_else(|| {
                ort::Error::new(format!(
                    "the samples of a batch differ in '{name}': run them one by one (batch size 1)"
                ))
            })
    };
    names.into_iter().map(stack).collect()
}

/// Position ids in the shape of the model's input: `[B, T]`; `[3, B, T]`; or `[4, B, T]`, where the first
/// row is the token's number.
fn positions(dims: &[i64], all: &Array3<i64>) -> ArrayD<i64> {
    match (dims.len(), dims.first()) {
        (3, Some(4)) => all.clone().into_dyn(),
        (3, _) => all.slice(s![1.., .., ..]).to_owned().into_dyn(),
        _ => all.index_axis(Axis(0), 1).to_owned().into_dyn(),
    }
}

impl Embedded {
    /// These tokens and one more: the prompt of the next step of a decoder that has no cache.
    pub(super) fn push(&mut self, token: &super::Token, position: i64) -> Result<(), ort::Error> {
        let shape = |error: ndarray::ShapeError| ort::Error::new(error.to_string());
        self.input_ids.push(token.id);
        self.answer_mask.push(0.0);
        if let (Some(embeds), Some(embedding)) = (&mut self.inputs_embeds, &token.embedding) {
            let joined = concatenate(Axis(1), &[embeds.view(), embedding.view()]).map_err(shape)?;
            *embeds = joined;
        }
        match &mut self.position_ids {
            PositionIds::Sequential(ids) => ids
                .push(Axis(0), ndarray::arr0(position).view())
                .map_err(shape)?,
            PositionIds::Multimodal(ids) => {
                let column = Array1::from_elem(ids.nrows(), position);
                ids.push(Axis(1), column.view()).map_err(shape)?;
            }
            PositionIds::Unstated => {}
        }
        self.next_position = position + 1;
        for own in &mut self.decoder_inputs {
            if let Some(axis) = own.token_axis {
                own.tensor.value = own.tensor.value.with_last_repeated(axis);
            }
        }
        Ok(())
    }
}
