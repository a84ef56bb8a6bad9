//! What samples begin with alike, run once for all of them in a row.
//!
//! ```text
//!   system prompt, picture │ question, answer     the first sample of a picture: both parts
//!          ▼               │        ▼
//!     keys, values ────────┴──► sums              the next ones about it: the second part only
//! ```
//!
//! In: a decoder opened for [`Outputs::SumsAndCache`](crate::graph::Outputs::SumsAndCache), samples one by one.
//! Out: their sums.
//!
//! Promises: where a sample is divided depends on that sample alone (behind its last image token), and one that has
//! such a place is always divided, so sums do not depend on which samples came before, to the last bit. Against
//! a run of the whole sample they differ in the last digits of the model's floats, because products of other shapes
//! are summed in another order. That is not taken for granted, for in some models what stands in front sees what follows:
//! the first sample that is divided is also run whole, and [`Error::Divided`] tells if the two are further apart.
//! One prefix is kept at a time: its keys and values are as large as those of a generation.

use ndarray::{Axis, Slice};
use ort::session::SessionInputValue;

use super::decoder::{Decoder, Values, Wanted};
use super::part::Part;
use super::{Embedded, Error};
use crate::kvw::{Gates, Sums};
use crate::preprocess::PositionIds;

/// How far the sums of a divided sample may be from those of a whole one, relative to a layer's largest: where
/// all of the cache is float32. The order of summation makes some 1e-6; a picture that sees the question, far more.
const FLOAT32_TOLERANCE: f32 = 1e-4;
/// The same where it is not: keys and values are rounded to float16 or less.
const ROUNDED_TOLERANCE: f32 = 1e-2;

/// The prefix that was run last.
pub(super) struct Prefixes {
    /// The cache's inputs, each with the outputs that become it.
    cache: Vec<Wanted>,
    tolerance: f32,
    last: Option<Prefix>,
    /// A sample was run both ways, and the sums agreed.
    checked: bool,
    /// How many were run.
    pub(super) runs: u64,
}

struct Prefix {
    head: Embedded,
    gates: Gates,
    values: Values,
}

impl Prefixes {
    /// For the graph `part`, whose `cache` becomes the next run's.
    ///
    /// # Errors
    /// The graph keeps nothing, or what it computes of a token depends on all others.
    pub(super) fn of(part: &Part, cache: Vec<Wanted>) -> Result<Prefixes, Error> {
        let divided = |found: &str| Error::Divided {
            model: part.model.clone(),
            found: found.into(),
        };
        if cache.is_empty() {
            return Err(divided("a prompt's graph that takes no keys and values"));
        }
        if !part.row_by_row {
            return Err(divided(
                "activations quantized by the largest value among all tokens",
            ));
        }
        let mut elements = cache.iter().filter_map(|(name, _)| part.port(name));
        let float32 = elements.all(|port| port.element == ort::value::TensorElementType::Float32);
        Ok(Prefixes {
            cache,
            tolerance: if float32 {
                FLOAT32_TOLERANCE
            } else {
                ROUNDED_TOLERANCE
            },
            last: None,
            checked: false,
            runs: 0,
        })
    }

    /// The sums of `sample`, its prefix run only if it is not that of the sample before.
    pub(super) fn sums(
        &mut self,
        decoder: &mut Decoder,
        sample: &Embedded,
        gates: &Gates,
    ) -> Result<Sums, Error> {
        let Some((head, tail)) = sample.divided() else {
            return whole(decoder, sample, gates);
        };
        let serves = |prefix: &Prefix| prefix.head.same_tokens(&head) && prefix.gates == *gates;
        let prefix = match self.last.take().filter(serves) {
            Some(prefix) => prefix,
            None => {
                let inputs = decoder.prompt_inputs(&[&head], gates, 0)?;
                let (_, values) = decoder.summed(inputs, &[&head], &self.cache)?;
                self.runs += 1;
                Prefix {
                    head,
                    gates: gates.clone(),
                    values,
                }
            }
        };
        let mut inputs = decoder.inputs_after(prefix.head.input_ids.len(), &tail, gates)?;
        let values = prefix.values.iter();
        inputs.extend(values.map(|(name, value)| (name.clone(), SessionInputValue::from(value))));
        let (sums, _) = decoder.summed(inputs, &[&tail], &[])?;
        self.last = Some(prefix);
        if !self.checked {
            let whole = whole(decoder, sample, gates)?;
            self.check(decoder, &sums, &whole)?;
            self.checked = true;
        }
        Ok(sums)
    }

    fn check(&self, decoder: &Decoder, divided: &Sums, whole: &Sums) -> Result<(), Error> {
        for (layer, whole) in &whole.layers {
            let largest = whole.iter().fold(0.0, |most: f32, sum| most.max(sum.abs()));
            let apart = divided.layers.get(layer).map(|divided| {
                let each = divided.iter().zip(whole);
                each.fold(0.0, |most: f32, (a, b)| most.max((a - b).abs()))
            });
            // Compared so that a NaN is not close to anything.
            let close = apart.is_some_and(|apart| apart <= self.tolerance * largest);
            if !close {
                return Err(Error::Divided {
                    model: decoder.model().to_owned(),
                    found: format!(
                        "sums of layer {layer} that are {:.1e} of the largest apart, with at most {:.0e} expected of rounding",
                        apart.unwrap_or(f32::NAN) / largest,
                        self.tolerance
                    ),
                });
            }
        }
        Ok(())
    }
}

fn whole(decoder: &mut Decoder, sample: &Embedded, gates: &Gates) -> Result<Sums, Error> {
    let inputs = decoder.prompt_inputs(&[sample], gates, 0)?;
    Ok(decoder.summed(inputs, &[sample], &[])?.0)
}

impl Embedded {
    /// The sample's prefix and the rest of it; `None` where there is no prefix, where it holds positions that
    /// count, or where the sample brings inputs of its own, which are for all of its tokens.
    fn divided(&self) -> Option<(Embedded, Embedded)> {
        let at = self.prefix;
        let counts = |mask: &[f32]| mask.iter().any(|&weight| weight != 0.0);
        let fits = 0 < at && at < self.input_ids.len() && self.decoder_inputs.is_empty();
        if !fits || counts(self.answer_mask.get(..at)?) {
            return None;
        }
        let part = |range: Slice| {
            let embeds = self.inputs_embeds.as_ref();
            let mut part = Embedded {
                name: self.name.clone(),
                input_ids: Vec::new(),
                inputs_embeds: embeds.map(|all| all.slice_axis(Axis(1), range).to_owned()),
                position_ids: match &self.position_ids {
                    PositionIds::Sequential(ids) => {
                        PositionIds::Sequential(ids.slice_axis(Axis(0), range).to_owned())
                    }
                    PositionIds::Multimodal(ids) => {
                        PositionIds::Multimodal(ids.slice_axis(Axis(1), range).to_owned())
                    }
                    PositionIds::Unstated => PositionIds::Unstated,
                },
                answer_mask: Vec::new(),
                prefix: 0,
                next_position: self.next_position,
                decoder_inputs: Vec::new(),
                vision: self.vision.clone(),
            };
            let ids = ndarray::aview1(&self.input_ids);
            part.input_ids = ids.slice_axis(Axis(0), range).to_vec();
            let mask = ndarray::aview1(&self.answer_mask);
            part.answer_mask = mask.slice_axis(Axis(0), range).to_vec();
            part
        };
        Some((part((..at).into()), part((at..).into())))
    }

    /// Whether a decoder is given the same for both.
    fn same_tokens(&self, other: &Embedded) -> bool {
        self.input_ids == other.input_ids
            && self.position_ids == other.position_ids
            && self.inputs_embeds == other.inputs_embeds
    }
}
