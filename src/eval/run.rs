//! Runs the samples of one set.

use super::answer::{Answered, Chosen, Scoring, score};
use super::evidence::Measured;
use super::likelihood::TokenLog;
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
            },
        }
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
    let mut answers = Vec::with_capacity(samples.len());
    for (done, sample) in samples.iter().enumerate() {
        let mut asked = Asked {
            lvlm,
            decoder,
            gates,
            sample,
        };
        answers.push(score(
            asked.answered(settings.generation.limit)?,
            &settings.scoring,
        ));
        progress(done + 1);
    }
    Ok(Measured {
        summary: Summary::of(&answers),
        answers,
    })
}

/// The longest answer to a question that is put as multiple choice, in tokens.
const CHOICE_TOKENS: usize = 5;

/// One sample, asked.
struct Asked<'a> {
    lvlm: &'a mut Lvlm,
    decoder: &'a mut Decoder,
    gates: &'a Gates,
    sample: &'a Sample,
}

impl Asked<'_> {
    fn answered(&mut self, limit: Limit) -> Result<Answered, Error> {
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
        if let Some(choice) = &sample.choice {
            let question = choice_prompt(&sample.question, &choice.options);
            answered.choice = Some(Chosen {
                options: choice.options.clone(),
                correct: choice.correct,
                prediction: self.says(&question, limit.at_most(CHOICE_TOKENS))?,
            });
        }
        if sample.task == Task::Choice {
            return Ok(answered);
        }
        answered.prediction = Some(self.says(&sample.question, limit)?);
        answered.likelihood = Some(self.likelihood(&sample.answer)?);
        if let Some(paraphrased) = &sample.paraphrased_answer {
            answered.paraphrased = Some(self.likelihood(paraphrased)?.loss());
        }
        for perturbed in &sample.perturbed_answers {
            answered.perturbed.push(self.likelihood(perturbed)?.loss());
        }
        Ok(answered)
    }

    /// The greedy answer to `question`, put in place of the sample's.
    fn says(&mut self, question: &str, limit: Limit) -> Result<String, Error> {
        let sample = Sample {
            question: question.to_owned(),
            ..self.sample.clone()
        };
        let generated = generate::greedy(self.lvlm, self.decoder, &sample, self.gates, limit)?;
        Ok(generated.text)
    }

    /// What the model makes of `answer`, put in place of the sample's.
    fn likelihood(&mut self, answer: &str) -> Result<TokenLog, Error> {
        let sample = Sample {
            answer: answer.to_owned(),
            ..self.sample.clone()
        };
        let embedded = self.lvlm.embed_as(&sample, Form::WithAnswer)?;
        generate::answer_tokens(self.decoder, &embedded, self.gates)
    }
}
