//! Greedy answers and the likelihood of given ones.
//!
//! In: a sample, gates, limits. Out: the answer that the model would give, token by token with the
//! key/value cache, as transformers' `generate(do_sample=False)` gives it; or what the model makes of
//! each token of the sample's own answer.

use std::collections::BTreeMap;

use ndarray::{ArrayView1, Axis};
use serde::{Deserialize, Serialize};

use super::{Decoder, Embedded, Error, Lvlm};
use crate::bundle::Config;
use crate::dataset::Sample;
use crate::kvw::Gates;
use crate::preprocess::Form;

/// How long answers may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// At most so many new tokens.
    NewTokens(usize),
    /// At most so many tokens together with the prompt's, those of its image among them.
    Length(usize),
}

/// `max_length` of a `GenerationConfig` that does not state it.
const DEFAULT_MAX_LENGTH: usize = 20;

impl Limit {
    /// New tokens where neither the user nor the model says how many.
    pub const DEFAULT: Limit = Limit::NewTokens(50);

    /// What a model's `generation_config.json` asks for: `max_new_tokens`, else `max_length`, else
    /// [`Limit::DEFAULT`]. transformers' `GenerationMixin._prepare_generated_length` takes them in the
    /// same order, and takes a `max_length` of 20, its own default, for new tokens.
    pub fn of(config: Option<&Config>) -> Limit {
        let new = config.and_then(|config| config.max_new_tokens);
        let length = config.and_then(|config| config.max_length);
        match (new, length) {
            (Some(new), _) => Limit::NewTokens(new),
            (None, Some(DEFAULT_MAX_LENGTH)) => Limit::NewTokens(DEFAULT_MAX_LENGTH),
            (None, Some(length)) => Limit::Length(length),
            (None, None) => Limit::DEFAULT,
        }
    }

    /// The number, whatever it counts: no answer has more tokens.
    pub fn tokens(self) -> usize {
        match self {
            Limit::NewTokens(tokens) | Limit::Length(tokens) => tokens,
        }
    }

    /// The same, where it is `Limit::Length`.
    pub fn length(self) -> Option<usize> {
        match self {
            Limit::NewTokens(_) => None,
            Limit::Length(tokens) => Some(tokens),
        }
    }

    /// The same, for an answer of `tokens` at most, which are granted whatever the length.
    #[must_use]
    pub fn at_most(self, tokens: usize) -> Limit {
        Limit::NewTokens(self.tokens().min(tokens))
    }

    /// New tokens after this prompt.
    fn after(self, prompt: &Embedded) -> Result<usize, Error> {
        let tokens = prompt.input_ids.len();
        match self {
            Limit::NewTokens(limit) => Ok(limit),
            Limit::Length(limit) if tokens < limit => Ok(limit - tokens),
            Limit::Length(limit) => Err(Error::LongPrompt {
                sample: prompt.name.clone(),
                tokens,
                limit,
            }),
        }
    }
}

/// How answers are generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long they may get.
    pub limit: Limit,
    /// Questions of one run, at most.
    pub batch: usize,
}

/// An answer that was generated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended them.
    pub ids: Vec<i64>,
    /// Their text, special tokens left out.
    pub text: String,
    /// Whether a stop token ended it; otherwise the limit did.
    pub stopped: bool,
}

/// Generates the answer to `sample`'s question, as long as `limit` lets it be. `decoder` is open for
/// [`crate::graph::Outputs::Model`].
///
/// # Errors
/// The sample cannot be prepared, its prompt leaves no room for an answer, or the model fails.
pub fn greedy(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    sample: &Sample,
    gates: &Gates,
    limit: Limit,
) -> Result<Generated, Error> {
    let prompt = Prompt::of(lvlm, sample, gates, limit)?;
    let answers = together(lvlm, decoder, &[&prompt], gates)?;
    Ok(answers.into_iter().next().unwrap_or_default())
}

/// [`greedy`] for each of `questions`, in their order, up to `batch` of them in one run. Only prompts of
/// one length share a run: none is padded.
///
/// # Errors
/// As [`greedy`].
pub fn greedy_each(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    questions: &[(Sample, Limit)],
    gates: &Gates,
    batch: usize,
) -> Result<Vec<Generated>, Error> {
    let mut answers = Vec::with_capacity(questions.len());
    let mut held = Vec::new();
    let mut tokens = 0;
    for (sample, limit) in questions {
        let prompt = Prompt::of(lvlm, sample, gates, *limit)?;
        if tokens + prompt.tokens() > MOST_TOKENS_HELD && !held.is_empty() {
            answers.extend(each(lvlm, decoder, &held, gates, batch)?);
            held.clear();
            tokens = 0;
        }
        tokens += prompt.tokens();
        held.push(prompt);
    }
    answers.extend(each(lvlm, decoder, &held, gates, batch)?);
    Ok(answers)
}

/// Tokens of all prompts that wait for others of their length, at most: each is an embedding.
const MOST_TOKENS_HELD: usize = 4 * MOST_TOKENS_TOGETHER;

/// Tokens of all prompts of a run, at most, where it holds more than one: a decoder may give logits for
/// every one of them.
const MOST_TOKENS_TOGETHER: usize = 2048;

/// Answers `prompts`, in their order.
fn each(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    prompts: &[Prompt],
    gates: &Gates,
    batch: usize,
) -> Result<Vec<Generated>, Error> {
    let mut alike: BTreeMap<usize, Vec<(usize, &Prompt)>> = BTreeMap::new();
    let mut runs = Vec::new();
    for (place, prompt) in prompts.iter().enumerate() {
        match decoder.answers_together(&prompt.embedded) {
            true => alike
                .entry(prompt.tokens())
                .or_default()
                .push((place, prompt)),
            false => runs.push(vec![(place, prompt)]),
        }
    }
    for (tokens, prompts) in alike {
        let room = MOST_TOKENS_TOGETHER.checked_div(tokens).unwrap_or(1);
        runs.extend(prompts.chunks(batch.min(room).max(1)).map(<[_]>::to_vec));
    }
    let mut answers = BTreeMap::new();
    for run in runs {
        let (places, prompts): (Vec<_>, Vec<_>) = run.into_iter().unzip();
        let answered = together(lvlm, decoder, &prompts, gates)?;
        answers.extend(places.into_iter().zip(answered));
    }
    Ok(answers.into_values().collect())
}

/// A question, ready to be run.
struct Prompt {
    embedded: Embedded,
    /// New tokens after it.
    most: usize,
}

impl Prompt {
    fn of(lvlm: &mut Lvlm, sample: &Sample, gates: &Gates, limit: Limit) -> Result<Prompt, Error> {
        let embedded = lvlm.embed_as(sample, Form::Question, gates)?;
        let most = limit.after(&embedded)?;
        Ok(Prompt { embedded, most })
    }

    fn tokens(&self) -> usize {
        self.embedded.input_ids.len()
    }
}

/// Answers prompts of one length in one run. An answer that ended is run along with the others, and what
/// is said after its end is left out.
fn together(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    prompts: &[&Prompt],
    gates: &Gates,
) -> Result<Vec<Generated>, Error> {
    let embedded: Vec<&Embedded> = prompts.iter().map(|prompt| &prompt.embedded).collect();
    let mut answers = vec![Generated::default(); prompts.len()];
    let (mut logits, mut cache) = decoder.start(&embedded, gates)?;
    for step in 0i64.. {
        let ids: Vec<i64> = logits.outer_iter().map(argmax).collect();
        let stops = lvlm.family()?.eos_token_ids();
        let mut going = false;
        for ((answer, prompt), id) in answers.iter_mut().zip(prompts).zip(&ids) {
            if !answer.stopped && answer.ids.len() < prompt.most {
                match stops.contains(id) {
                    true => answer.stopped = true,
                    false => answer.ids.push(*id),
                }
            }
            going |= !answer.stopped && answer.ids.len() < prompt.most;
        }
        if !going {
            break;
        }
        let tokens = lvlm.towers.tokens(&ids)?.into_iter();
        let positions = embedded.iter().map(|prompt| prompt.next_position + step);
        let next: Vec<_> = tokens.zip(positions).collect();
        (logits, cache) = decoder.step(&next, cache, gates)?;
    }
    for answer in &mut answers {
        answer.text = lvlm.family()?.tokenizer().decode(&answer.ids, true)?;
    }
    Ok(answers)
}

/// What the model makes of an answer, token by token, each given the true ones before it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenLog {
    /// `[L]`: ln p of the token, in nats, ≤ 0.
    pub log_probability: Vec<f64>,
    /// `[L]`: (ln p − μ) ÷ σ, with μ and σ² the mean and variance of ln p over the vocabulary under
    /// the model's own distribution, σ² at least 1e-6.
    pub normalized: Vec<f64>,
    /// `[L]`: whether the token is the most likely one.
    pub is_top: Vec<bool>,
}

impl TokenLog {
    /// Adds a token: `logits` `[vocabulary]` are those that predict it, `id` is the true one.
    pub fn push(&mut self, logits: ArrayView1<'_, f32>, id: i64) {
        let (log_probability, normalized) = likelihood(logits, id);
        self.log_probability.push(log_probability);
        self.normalized.push(normalized);
        self.is_top.push(argmax(logits) == id);
    }
}

/// The answer's tokens under teacher forcing. `embedded` holds the answer; `decoder` is open for
/// [`crate::graph::Outputs::Model`].
///
/// # Errors
/// The model fails.
pub fn answer_tokens(
    decoder: &mut Decoder,
    embedded: &Embedded,
    gates: &Gates,
) -> Result<TokenLog, Error> {
    let logits = decoder.logits(embedded, gates)?;
    let mut log = TokenLog::default();
    let predictions = logits.axis_iter(Axis(0)).zip(&embedded.answer_mask);
    for ((row, &counts), &next) in predictions.zip(embedded.input_ids.iter().skip(1)) {
        if counts > 0.0 {
            log.push(row, next);
        }
    }
    Ok(log)
}

/// The first index of the largest value, as `torch.argmax` on CPU gives it.
fn argmax(logits: ArrayView1<'_, f32>) -> i64 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &value) in (0i64..).zip(logits) {
        if value > best.1 {
            best = (id, value);
        }
    }
    best.0
}

/// `ln softmax(logits)[id]`, and the same less its mean under the softmax, by its standard deviation
/// there. −∞ for an id that the vocabulary lacks.
fn likelihood(logits: ArrayView1<'_, f32>, id: i64) -> (f64, f64) {
    let largest = logits.fold(f32::NEG_INFINITY, |largest, &value| largest.max(value));
    let shifted = logits.mapv(|value| f64::from(value) - f64::from(largest));
    let normalizer = shifted.mapv(f64::exp).sum().ln();
    let (mut mean, mut square) = (0.0, 0.0);
    for log_probability in shifted.iter().map(|value| value - normalizer) {
        let probability = log_probability.exp();
        // A token that is impossible adds nothing: 0 · −∞ is NaN.
        if probability > 0.0 {
            mean += probability * log_probability;
            square += probability * log_probability * log_probability;
        }
    }
    let deviation = (square - mean * mean).max(1e-6).sqrt();
    match usize::try_from(id).ok().and_then(|id| shifted.get(id)) {
        Some(value) => (value - normalizer, (value - normalizer - mean) / deviation),
        None => (f64::NEG_INFINITY, f64::NEG_INFINITY),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::{argmax, likelihood};

    #[test]
    fn a_tie_goes_to_the_first() {
        assert_eq!(argmax(array![1.0, 3.0, 3.0].view()), 1);
    }

    #[test]
    fn equal_logits_are_equally_likely_and_deviate_by_nothing() {
        let (log_probability, normalized) = likelihood(array![7.0, 7.0, 7.0, 7.0].view(), 2);
        assert!((log_probability + 4f64.ln()).abs() < 1e-12);
        assert!(normalized.abs() < 1e-9);
        assert_eq!(likelihood(array![0.0].view(), 5).0, f64::NEG_INFINITY);
    }

    #[test]
    fn an_impossible_token_does_not_spoil_the_others() {
        let (log_probability, normalized) =
            likelihood(array![0.0, f32::NEG_INFINITY, 0.0].view(), 0);
        assert!((log_probability + 2f64.ln()).abs() < 1e-12);
        assert!(normalized.is_finite());
    }
}
