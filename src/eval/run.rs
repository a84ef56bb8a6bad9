//! Runs the samples of one set.

use super::answer::{Answered, Chosen, Scoring, score};
use super::evidence::Measured;
use super::likelihood::{MinK, TokenLog};
use super::summary::Summary;
use super::text::choice_prompt;
use crate::dataset::{Dataset, Sample, Task};
use crate::kvw::Gates;
use crate::preprocess::Form;
use crate::runtime::generate::{self, Limit};
use crate::runtime::{Decoder, Error, Lvlm};

/// How a set is evaluated.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How answers are generated.
    pub generation: generate::Options,
    /// What scoring takes.
    pub scoring: Scoring,
}

impl Settings {
    /// For sets that are evaluated together: the names of one count as other people's in another.
    pub fn new<'d>(
        generation: generate::Options,
        sets: impl IntoIterator<Item = &'d Dataset>,
    ) -> Settings {
        let samples = sets.into_iter().flat_map(|set| &set.samples);
        Settings {
            generation,
            scoring: Scoring {
                people: samples.filter_map(|sample| sample.name.clone()).collect(),
                min_k: Vec::new(),
            },
        }
    }

    /// The same, with further shares of Min-K.
    #[must_use]
    pub fn with_min_k(mut self, shares: &[MinK]) -> Settings {
        self.scoring.min_k = shares.to_vec();
        self
    }
}

/// Evaluates `samples` under `gates`: greedy answers, and the likelihood of the true ones and of their
/// variants. `decoder` is open for [`crate::graph::Outputs::Model`]. `progress` hears how many samples
/// are done.
///
/// # Errors
/// A sample cannot be prepared, or the model fails.
pub fn evaluate(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    samples: &[Sample],
    gates: &Gates,
    settings: &Settings,
    mut progress: impl FnMut(usize),
) -> Result<Measured, Error> {
    let generation = settings.generation;
    let mut answers = Vec::with_capacity(samples.len());
    for window in samples.chunks(generation.batch.saturating_mul(WINDOW).max(1)) {
        let mut say = |question: fn(&Sample, Limit) -> Option<(Sample, Limit)>| {
            let put = window
                .iter()
                .map(|sample| question(sample, generation.limit));
            let put: Vec<Option<(Sample, Limit)>> = put.collect();
            let questions: Vec<_> = put.iter().flatten().cloned().collect();
            let said = generate::greedy_each(lvlm, decoder, &questions, gates, generation.batch)?;
            let mut said = said.into_iter().map(|answer| answer.text);
            let said = put.iter().map(|put| put.as_ref().and_then(|_| said.next()));
            Ok::<Vec<Option<String>>, Error>(said.collect())
        };
        let said = say(choice)?.into_iter().zip(say(open)?);
        for (sample, (choice, open)) in window.iter().zip(said) {
            let mut asked = Asked {
                lvlm,
                decoder,
                gates,
                sample,
            };
            answers.push(score(asked.answered(choice, open)?, &settings.scoring));
            progress(answers.len());
        }
    }
    Ok(Measured {
        summary: Summary::of(&answers),
        answers,
    })
}

/// The longest answer to a question that is put as multiple choice, in tokens.
const CHOICE_TOKENS: usize = 5;

/// Batches of samples whose prompts are held at the same time: the more there are, the more of them are of
/// one length.
const WINDOW: usize = 4;

/// A sample's question as multiple choice, where it is to be put like that.
fn choice(sample: &Sample, limit: Limit) -> Option<(Sample, Limit)> {
    let choice = sample.choice.as_ref().filter(|_| sample.feed.is_none())?;
    let put = Sample {
        question: choice_prompt(&sample.question, &choice.options),
        ..sample.clone()
    };
    Some((put, limit.at_most(CHOICE_TOKENS)))
}

/// A sample's question as it is, where it is to be put.
fn open(sample: &Sample, limit: Limit) -> Option<(Sample, Limit)> {
    // Ready-made inputs end with their answer.
    let put = sample.feed.is_none() && sample.task != Task::Choice;
    put.then(|| (sample.clone(), limit))
}

/// One sample, asked.
struct Asked<'a> {
    lvlm: &'a mut Lvlm,
    decoder: &'a mut Decoder,
    gates: &'a Gates,
    sample: &'a Sample,
}

impl Asked<'_> {
    fn answered(
        &mut self,
        choice: Option<String>,
        open: Option<String>,
    ) -> Result<Answered, Error> {
        let sample = self.sample;
        let mut answered = Answered {
            id: sample.id.clone(),
            question: sample.question.clone(),
            reference: sample.answer.clone(),
            name: sample.name.clone(),
            facts: sample.facts.clone(),
            cloze: sample.task == Task::Cloze,
            ..Answered::default()
        };
        if sample.feed.is_some() {
            // Ready-made inputs end with their answer, and have no text to compare.
            answered.likelihood = Some(self.likelihood(&sample.answer)?);
            return Ok(answered);
        }
        answered.choice = sample
            .choice
            .as_ref()
            .zip(choice)
            .map(|(choice, prediction)| Chosen {
                options: choice.options.clone(),
                correct: choice.correct,
                prediction,
            });
        if sample.task == Task::Choice {
            return Ok(answered);
        }
        answered.prediction = open;
        answered.likelihood = Some(self.likelihood(&sample.answer)?);
        if let Some(paraphrased) = &sample.paraphrased_answer {
            answered.paraphrased = Some(self.likelihood(paraphrased)?.loss());
        }
        for perturbed in &sample.perturbed_answers {
            answered.perturbed.push(self.likelihood(perturbed)?.loss());
        }
        Ok(answered)
    }

    /// What the model makes of `answer`, put in place of the sample's.
    fn likelihood(&mut self, answer: &str) -> Result<TokenLog, Error> {
        let sample = Sample {
            answer: answer.to_owned(),
            ..self.sample.clone()
        };
        let embedded = self.lvlm.embed_as(&sample, Form::WithAnswer, self.gates)?;
        generate::answer_tokens(self.decoder, &embedded, self.gates)
    }
}
