//! The instrumented decoder as the method's [`Forward`].

use std::error::Error as StdError;

use super::{Decoder, Embedded, Error, Towers};
use crate::dataset::Sample;
use crate::kvw::{Forward, Gates, Sums, TokenWeights};
use crate::preprocess::{Family, Form};

/// Whatever makes decoder inputs of a sample.
pub trait Embed {
    /// A sample.
    type Sample;

    /// A name for messages.
    fn name<'a>(&self, sample: &'a Self::Sample) -> &'a str;

    /// The decoder's inputs for the sample with its answer.
    ///
    /// # Errors
    /// The sample cannot be prepared, or a component of the model fails.
    fn embed(&mut self, sample: &Self::Sample) -> Result<Embedded, Error>;
}

/// A family's preprocessing with the model's towers: samples of (image, question, answer).
pub struct Lvlm {
    /// Chat template, tokenizer, image processor.
    pub family: Box<dyn Family>,
    /// Token embedding and vision encoder.
    pub towers: Towers,
    /// Which tokens the statistics are taken over.
    pub weights: TokenWeights,
}

impl Lvlm {
    /// The decoder's inputs for a sample in either form.
    ///
    /// # Errors
    /// The sample cannot be prepared, or a component of the model fails.
    pub fn embed_as(&mut self, sample: &Sample, form: Form) -> Result<Embedded, Error> {
        let prepared = self.family.prepare(sample, form)?;
        let answer_mask = match self.weights {
            TokenWeights::Answer => prepared.answer_mask.iter().map(|&c| f32::from(c)).collect(),
        };
        self.towers.prepare(prepared, answer_mask)
    }
}

impl Embed for Lvlm {
    type Sample = Sample;

    fn name<'a>(&self, sample: &'a Sample) -> &'a str {
        &sample.id
    }

    fn embed(&mut self, sample: &Sample) -> Result<Embedded, Error> {
        self.embed_as(sample, Form::WithAnswer)
    }
}

/// A decoder opened for [`crate::graph::Outputs::Sums`], fed by `source`.
pub struct Collector<'a, E> {
    /// Makes the inputs.
    pub source: &'a mut E,
    /// Runs them.
    pub decoder: &'a mut Decoder,
}

impl<E: Embed> Forward for Collector<'_, E> {
    type Sample = E::Sample;

    fn layers(&self) -> &[(usize, usize)] {
        self.decoder.layers()
    }

    fn sample_name<'a>(&self, sample: &'a E::Sample) -> &'a str {
        self.source.name(sample)
    }

    fn sums(
        &mut self,
        batch: &[&E::Sample],
        gates: &Gates,
    ) -> Result<Sums, Box<dyn StdError + Send + Sync>> {
        let embedded = batch
            .iter()
            .map(|sample| self.source.embed(sample))
            .collect::<Result<Vec<_>, _>>()?;
        let batch: Vec<&Embedded> = embedded.iter().collect();
        Ok(self.decoder.sums(&batch, gates)?)
    }
}
