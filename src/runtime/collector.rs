//! The instrumented decoder, and where that is measured the vision encoder, as the method's [`Forward`].

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::Arc;

use ndarray::Array1;

use super::prefetch::{self, Prefetch};
use super::{Decoder, Embedded, Error, Towers};
use crate::dataset::Sample;
use crate::graph::LayerId;
use crate::kvw::{Forward, Gates, Sums, TokenWeights};
use crate::preprocess::{self, Family, Feed, Form, ImageInputs, PositionIds, Prepared};

/// Whatever makes decoder inputs of a sample.
pub trait Embed {
    /// A sample.
    type Sample;

    /// A name for messages.
    fn name(&self, sample: &Self::Sample) -> String;

    /// The decoder's inputs for the sample with its answer, on the model as `gates` leave what comes before
    /// the decoder.
    ///
    /// # Errors
    /// The sample cannot be prepared, or a component of the model fails.
    fn embed(&mut self, sample: &Self::Sample, gates: &Gates) -> Result<Embedded, Error>;

    /// The layers before the decoder that are measured and gated, ascending, each with its `d_ff`.
    fn layers(&self) -> &[(LayerId, usize)] {
        &[]
    }
}

/// A family's preprocessing with the model's towers: samples of (image, question, answer), or of
/// ready-made inputs.
pub struct Lvlm {
    /// Chat template, tokenizer, image processor; or why there is none. Ready-made inputs need none.
    family: MaybeFamily,
    /// Token embedding and vision encoder.
    pub towers: Towers,
    /// Which tokens the statistics are taken over.
    pub weights: TokenWeights,
}

impl Lvlm {
    /// A model with its preprocessing, or with the reason why it has none.
    #[must_use]
    pub fn new(family: Result<Box<dyn Family>, preprocess::Error>, towers: Towers) -> Lvlm {
        Lvlm {
            family: family.map_err(Arc::new),
            towers,
            weights: TokenWeights::Answer,
        }
    }

    /// The model's preprocessing.
    ///
    /// # Errors
    /// [`Error::NoFamily`].
    pub fn family(&self) -> Result<&dyn Family, Error> {
        family_of(&self.family)
    }

    /// Prepares a sample and forgets the result: whether it can be.
    ///
    /// # Errors
    /// The sample cannot be prepared.
    pub fn check(&self, sample: &Sample) -> Result<(), Error> {
        Made::of(&self.family, sample, Form::WithAnswer).map(|_| ())
    }

    /// The decoder's inputs for a sample in either form, on the model as `gates` leave the vision encoder.
    ///
    /// # Errors
    /// The sample cannot be prepared, or a component of the model fails.
    pub fn embed_as(
        &mut self,
        sample: &Sample,
        form: Form,
        gates: &Gates,
    ) -> Result<Embedded, Error> {
        let made = Made::of(&self.family, sample, form)?;
        made.embed(&mut self.towers, self.weights, sample, gates)
    }

    /// Encodes the pictures of `samples` and closes the vision encoder, as long as their features take less than
    /// 256 MiB: it and the decoder are then never in memory together. Other pictures are refused
    /// from then on. Returns whether it was closed. It stays open where its own layers are gated.
    ///
    /// # Errors
    /// The first sample that cannot be prepared or whose picture cannot be encoded, with its number.
    pub fn encode_and_close(&mut self, samples: &[Sample]) -> Result<bool, (usize, Error)> {
        let pictured = samples.iter().enumerate();
        let pictured = pictured.filter(|(_, sample)| sample.image.is_some());
        let (numbers, order): (Vec<usize>, Vec<&Sample>) = pictured.unzip();
        let family = &self.family;
        let towers = &mut self.towers;
        prefetch::run(
            &order,
            |sample| Made::of(family, sample, Form::WithAnswer),
            |mut made| {
                let mut at = 0;
                let pictures = numbers.iter().zip(&order).map(|(&number, sample)| {
                    at = number;
                    made.take(sample).map(Made::into_picture)
                });
                let closed = towers.encode_and_close::<Error>(pictures, EARLY_FEATURES);
                closed.map_err(|error| (at, error))
            },
        )
    }

    /// Lets `f` embed samples with their answers, of which those in `order` are prepared on other threads
    /// before their turn comes.
    pub fn ahead<T>(&mut self, order: &[&Sample], f: impl FnOnce(&mut Ahead<'_>) -> T) -> T {
        let family = &self.family;
        let (towers, weights) = (&mut self.towers, self.weights);
        prefetch::run(
            order,
            |sample| Made::of(family, sample, Form::WithAnswer),
            |made| {
                f(&mut Ahead {
                    made,
                    towers,
                    weights,
                })
            },
        )
    }
}

/// Memory for features of pictures that are encoded before the decoder is open, in bytes: some 1,100 pictures of 64
/// tokens of a 0.5 B model. With more, what closing the encoder spares would be spent on features.
const EARLY_FEATURES: usize = 256 << 20;

/// A family, or why there is none.
type MaybeFamily = Result<Box<dyn Family>, Arc<preprocess::Error>>;

fn family_of(family: &MaybeFamily) -> Result<&dyn Family, Error> {
    match family {
        Ok(family) => Ok(family.as_ref()),
        Err(source) => Err(Error::NoFamily {
            source: Arc::clone(source),
        }),
    }
}

/// A sample that waits for the model.
enum Made {
    Prepared(Prepared),
    Ready(Feed),
}

impl Made {
    /// What can be done without the model: decode, resize, tokenize; or read what is ready.
    fn of(family: &MaybeFamily, sample: &Sample, form: Form) -> Result<Made, Error> {
        Ok(match &sample.feed {
            Some(feed) => Made::Ready(Feed::read(feed)?),
            None => Made::Prepared(family_of(family)?.prepare(sample, form)?),
        })
    }

    fn into_picture(self) -> Option<ImageInputs> {
        match self {
            Made::Prepared(prepared) => prepared.image,
            Made::Ready(_) => None,
        }
    }

    fn embed(
        self,
        towers: &mut Towers,
        weights: TokenWeights,
        sample: &Sample,
        gates: &Gates,
    ) -> Result<Embedded, Error> {
        match self {
            Made::Prepared(prepared) => {
                let answer_mask = match weights {
                    TokenWeights::Answer => {
                        prepared.answer_mask.iter().map(|&c| f32::from(c)).collect()
                    }
                };
                towers.prepare(sample.called(), prepared, answer_mask, gates)
            }
            Made::Ready(feed) => ready(feed, towers, sample.called()),
        }
    }
}

/// The inputs that a file held. Ids without embeddings are embedded, where the decoder takes those.
fn ready(feed: Feed, towers: &mut Towers, name: String) -> Result<Embedded, Error> {
    if !towers.layers().is_empty() {
        return Err(Error::ReadyFeatures { sample: name });
    }
    let inputs_embeds = match feed.inputs_embeds {
        Some(embeds) => Some(embeds),
        None => towers.embed(&feed.input_ids)?,
    };
    Ok(Embedded {
        name,
        next_position: i64::try_from(feed.input_ids.len()).unwrap_or(i64::MAX),
        input_ids: feed.input_ids,
        inputs_embeds,
        position_ids: PositionIds::Unstated,
        answer_mask: feed.answer_mask,
        prefix: 0,
        decoder_inputs: feed.others,
        vision: BTreeMap::new(),
    })
}

/// A model's preprocessing that works ahead, with its towers: see [`Lvlm::ahead`].
pub struct Ahead<'a> {
    made: Prefetch<'a, Sample, Result<Made, Error>>,
    towers: &'a mut Towers,
    weights: TokenWeights,
}

impl Embed for Ahead<'_> {
    type Sample = Sample;

    fn name(&self, sample: &Sample) -> String {
        sample.called()
    }

    fn embed(&mut self, sample: &Sample, gates: &Gates) -> Result<Embedded, Error> {
        let made = self.made.take(sample)?;
        made.embed(self.towers, self.weights, sample, gates)
    }

    fn layers(&self) -> &[(LayerId, usize)] {
        self.towers.layers()
    }
}

impl Embed for Lvlm {
    type Sample = Sample;

    fn name(&self, sample: &Sample) -> String {
        sample.called()
    }

    fn embed(&mut self, sample: &Sample, gates: &Gates) -> Result<Embedded, Error> {
        self.embed_as(sample, Form::WithAnswer, gates)
    }

    fn layers(&self) -> &[(LayerId, usize)] {
        self.towers.layers()
    }
}

/// A source of which some samples are embedded already, so that batches can be formed by what they are.
pub struct Window<'a, E: Embed> {
    source: &'a mut E,
    embedded: Vec<(&'a E::Sample, Embedded)>,
    /// What they were embedded under.
    gates: Gates,
}

impl<'a, E: Embed> Window<'a, E> {
    /// Embeds `samples`, each once, on the model as `gates` leave it.
    ///
    /// # Errors
    /// The first sample that cannot be embedded, with its number.
    pub fn open(
        source: &'a mut E,
        samples: &'a [E::Sample],
        gates: &Gates,
    ) -> Result<Window<'a, E>, (usize, Error)> {
        let mut embedded = Vec::with_capacity(samples.len());
        for (index, sample) in samples.iter().enumerate() {
            let made = source
                .embed(sample, gates)
                .map_err(|error| (index, error))?;
            embedded.push((sample, made));
        }
        Ok(Window {
            source,
            embedded,
            gates: gates.clone(),
        })
    }

    /// The samples by their number of tokens; those of equal length in their order.
    pub fn by_length(&self) -> Vec<&'a E::Sample> {
        let lengths = self.embedded.iter();
        let mut lengths: Vec<_> = lengths
            .map(|(sample, embedded)| (embedded.input_ids.len(), *sample))
            .collect();
        lengths.sort_by_key(|(length, _)| *length);
        lengths.into_iter().map(|(_, sample)| sample).collect()
    }
}

impl<E: Embed> Embed for Window<'_, E> {
    type Sample = E::Sample;

    fn name(&self, sample: &E::Sample) -> String {
        self.source.name(sample)
    }

    fn embed(&mut self, sample: &E::Sample, gates: &Gates) -> Result<Embedded, Error> {
        let mut embedded = self.embedded.iter();
        match embedded.position(|(made_of, _)| std::ptr::eq(*made_of, sample)) {
            Some(index) if *gates == self.gates => Ok(self.embedded.swap_remove(index).1),
            _ => self.source.embed(sample, gates),
        }
    }

    fn layers(&self) -> &[(LayerId, usize)] {
        self.source.layers()
    }
}

/// The sum of the answer tokens' weights.
fn weight_of(batch: &[&Embedded]) -> f64 {
    let weights = batch.iter().flat_map(|sample| &sample.answer_mask);
    weights.map(|&weight| f64::from(weight)).sum()
}

/// A decoder opened for [`crate::graph::Outputs::Sums`], fed by `source`. One without layers is not run.
pub struct Collector<'a, E> {
    /// Makes the inputs.
    pub source: &'a mut E,
    /// Runs them.
    pub decoder: &'a mut Decoder,
}

impl<E: Embed> Forward for Collector<'_, E> {
    type Sample = E::Sample;

    fn layers(&self) -> Vec<(LayerId, usize)> {
        let mut layers = self.decoder.layers().to_vec();
        layers.extend(self.source.layers());
        layers
    }

    fn sample_name(&self, sample: &E::Sample) -> String {
        self.source.name(sample)
    }

    fn sums(
        &mut self,
        batch: &[&E::Sample],
        gates: &Gates,
    ) -> Result<Sums, Box<dyn StdError + Send + Sync>> {
        let embedded = batch
            .iter()
            .map(|sample| self.source.embed(sample, gates))
            .collect::<Result<Vec<_>, _>>()?;
        let batch: Vec<&Embedded> = embedded.iter().collect();
        let mut sums = match self.decoder.layers().is_empty() {
            // Only the vision encoder is measured.
            true => Sums {
                weight: weight_of(&batch),
                ..Sums::default()
            },
            false => self.decoder.sums(&batch, gates)?,
        };
        for &(layer, d_ff) in self.source.layers() {
            let (mut sum, mut weight) = (Array1::zeros(d_ff), 0.0);
            for seen in batch.iter().filter_map(|sample| sample.vision.get(&layer)) {
                sum += &seen.sum;
                weight += seen.weight;
            }
            sums.layers.insert(layer, sum);
            sums.own_weights.insert(layer, weight);
        }
        Ok(sums)
    }
}
