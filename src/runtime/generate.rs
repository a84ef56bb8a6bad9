//! Greedy answers and the loss of given ones.
//!
//! In: a sample, gates, limits. Out: the answer that the model would give, token by token with the
//! key/value cache, as transformers' `generate(do_sample=False)` gives it; or the negative
//! log-likelihood of the sample's own answer.

use ndarray::{ArrayView1, Axis};

use super::{Decoder, Embedded, Error, Lvlm};
use crate::dataset::Sample;
use crate::kvw::Gates;
use crate::preprocess::Form;

/// An answer that was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended them.
    pub ids: Vec<i64>,
    /// Their text, special tokens left out.
    pub text: String,
    /// Whether a stop token ended it; otherwise the limit did.
    pub stopped: bool,
}

/// Generates the answer to `sample`'s question, at most `max_new_tokens` long. `decoder` is open for
/// [`crate::graph::Outputs::Model`].
///
/// # Errors
/// The sample cannot be prepared, or the model fails.
pub fn greedy(
    lvlm: &mut Lvlm,
    decoder: &mut Decoder,
    sample: &Sample,
    gates: &Gates,
    max_new_tokens: usize,
) -> Result<Generated, Error> {
    let prompt = lvlm.embed_as(sample, Form::Question)?;
    let mut position = prompt.next_position;
    let mut ids = Vec::new();
    let mut stopped = false;
    let (mut logits, mut cache) = decoder.start(&prompt, gates)?;
    while ids.len() < max_new_tokens {
        let id = argmax(logits.view());
        if lvlm.family()?.eos_token_ids().contains(&id) {
            stopped = true;
            break;
        }
        ids.push(id);
        if ids.len() == max_new_tokens {
            break;
        }
        let token = lvlm.towers.token(id)?;
        (logits, cache) = decoder.step(&token, position, cache, gates)?;
        position += 1;
    }
    let text = lvlm.family()?.tokenizer().decode(&ids, true)?;
    Ok(Generated { ids, text, stopped })
}

/// Sum of `-ln p` over the answer's tokens, and how many they are. `embedded` holds the answer;
/// `decoder` is open for [`crate::graph::Outputs::Model`].
///
/// # Errors
/// The model fails.
pub fn answer_loss(
    decoder: &mut Decoder,
    embedded: &Embedded,
    gates: &Gates,
) -> Result<(f64, usize), Error> {
    let logits = decoder.logits(embedded, gates)?;
    let mut loss = 0.0;
    let mut tokens = 0;
    let predictions = logits.axis_iter(Axis(0)).zip(&embedded.answer_mask);
    for ((row, &counts), &next) in predictions.zip(embedded.input_ids.iter().skip(1)) {
        if counts > 0.0 {
            loss += negative_log_likelihood(row, next);
            tokens += 1;
        }
    }
    Ok((loss, tokens))
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

/// `-ln softmax(logits)[id]`; infinite for an id that the vocabulary lacks.
fn negative_log_likelihood(logits: ArrayView1<'_, f32>, id: i64) -> f64 {
    let largest = logits.fold(f32::NEG_INFINITY, |largest, &value| largest.max(value));
    let largest = f64::from(largest);
    let sum: f64 = logits
        .iter()
        .map(|&value| (f64::from(value) - largest).exp())
        .sum();
    match usize::try_from(id).ok().and_then(|id| logits.get(id)) {
        Some(&value) => sum.ln() + largest - f64::from(value),
        None => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::{argmax, negative_log_likelihood};

    #[test]
    fn a_tie_goes_to_the_first() {
        assert_eq!(argmax(array![1.0, 3.0, 3.0].view()), 1);
    }

    #[test]
    fn the_loss_of_equal_logits_is_the_log_of_their_number() {
        let loss = negative_log_likelihood(array![7.0, 7.0, 7.0, 7.0].view(), 2);
        assert!((loss - 4f64.ln()).abs() < 1e-12);
        assert_eq!(
            negative_log_likelihood(array![0.0].view(), 5),
            f64::INFINITY
        );
    }
}
