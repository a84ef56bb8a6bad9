//! The instrumented decoder as the method's [`Forward`].

use std::error::Error as StdError;
use std::path::Path;
use std::sync::Arc;

use super::{Decoder, Embedded, Error, Towers};
use crate::dataset::Sample;
use crate::graph::LayerId;
use crate::kvw::{Forward, Gates, Sums, TokenWeights};
use crate::preprocess::{self, Family, Feed, Form, PositionIds};

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

/// A family's preprocessing with the model's towers: samples of (image, question, answer), or of
/// ready-made inputs.
pub struct Lvlm {
    /// Chat template, tokenizer, image processor; or why there is none. Ready-made inputs need none.
    family: Result<Box<dyn Family>, Arc<preprocess::Error>>,
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
        match &self.family {
            Ok(family) => Ok(family.as_ref()),
            Err(source) => Err(Error::NoFamily {
                source: Arc::clone(source),
            }),
        }
    }

    /// Prepares a sample and forgets the result: whether it can be.
    ///
    /// # Errors
    /// The sample cannot be prepared.
    pub fn check(&self, sample: &Sample) -> Result<(), Error> {
        match &sample.feed {
            Some(feed) => Feed::read(feed).map(|_| ())?,
            None => self
                .family()?
                .prepare(sample, Form::WithAnswer)
                .map(|_| ())?,
        }
        Ok(())
    }

    /// The decoder's inputs for a sample in either form.
    ///
    /// # Errors
    /// The sample cannot be prepared, or a component of the model fails.
    pub fn embed_as(&mut self, sample: &Sample, form: Form) -> Result<Embedded, Error> {
        if let Some(feed) = &sample.feed {
            return self.ready(&sample.id, feed);
        }
        let prepared = self.family()?.prepare(sample, form)?;
        let answer_mask = match self.weights {
            TokenWeights::Answer => prepared.answer_mask.iter().map(|&c| f32::from(c)).collect(),
        };
        self.towers.prepare(prepared, answer_mask)
    }

    /// The inputs that a file holds. Ids without embeddings are embedded, where the decoder takes those.
    fn ready(&mut self, id: &str, path: &Path) -> Result<Embedded, Error> {
        let feed = Feed::read(path)?;
        let inputs_embeds = match feed.inputs_embeds {
            Some(embeds) => Some(embeds),
            None => self.towers.embed(&feed.input_ids)?,
        };
        Ok(Embedded {
            id: id.to_owned(),
            next_position: i64::try_from(feed.input_ids.len()).unwrap_or(i64::MAX),
            input_ids: feed.input_ids,
            inputs_embeds,
            position_ids: PositionIds::Unstated,
            answer_mask: feed.answer_mask,
            decoder_inputs: feed.others,
        })
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

    fn layers(&self) -> Vec<(LayerId, usize)> {
        self.decoder.layers().to_vec()
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
