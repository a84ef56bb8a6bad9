//! Runs the samples of one set.

use serde::Serialize;

use super::text::{AnswerLoss, Answered, SampleScores, Summary, score, summarize};
use crate::dataset::Sample;
use crate::kvw::Gates;
use crate::runtime::{Decoder, Error, Lvlm, generate};

/// One set, evaluated.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Every answer with what it was asked for.
    pub answers: Vec<Answered>,
    /// Every answer's scores, in the same order.
    pub scores: Vec<SampleScores>,
    /// The set in numbers.
    pub summary: Summary,
}

/// Evaluates `samples` under `gates`: greedy answers of at most `max_new_tokens`, and the loss of the
/// true ones. `decoder` is open for [`crate::graph::Outputs::Model`]. `progress` hears how many
/// samples are done.
///
/// # Errors
/// A sample cannot be prepared, or the model fails.
pub fn evaluate(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    samples: &[Sample],
    gates: &Gates,
    max_new_tokens: usize,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation, Error> {
    let mut answers = Vec::with_capacity(samples.len());
    for (done, sample) in samples.iter().enumerate() {
        let answer = generate::greedy(lvlm, decoder, sample, gates, max_new_tokens)?;
        let embedded = lvlm.embed_as(sample, crate::preprocess::Form::WithAnswer)?;
        let (sum_nll, tokens) = generate::answer_loss(decoder, &embedded, gates)?;
        answers.push(Answered {
            id: sample.id.clone(),
            question: sample.question.clone(),
            reference: sample.answer.clone(),
            name: sample.name.clone(),
            facts: sample.facts.clone(),
            prediction: answer.text,
            loss: Some(AnswerLoss { sum_nll, tokens }),
        });
        progress(done + 1);
    }
    let scores: Vec<SampleScores> = answers.iter().map(score).collect();
    let summary = summarize(&scores);
    Ok(Evaluation {
        answers,
        scores,
        summary,
    })
}
