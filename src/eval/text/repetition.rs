//! Degenerate repetition: a model that was damaged more than it was made to forget says the same
//! thing over and over.
//!
//! In: an answer. Out: a rate ([`seq_rep`]) and a verdict ([`is_degenerate`]). Promise: the rate is
//! Welleck et al.'s, the verdict follows the rule written at the function, and both take time linear
//! in the answer's length.

use std::collections::HashSet;

use super::words::words;

/// seq-rep-n of Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training" (arXiv
/// 1908.04319): 1 − (distinct n-grams ÷ n-grams) of one answer.
///
/// In [0, 1), lower is better; 0 if no n-gram occurs twice. `None` if the answer has fewer than `n`
/// words (or `n` is 0): then there is no n-gram to count. The paper counts model tokens; these are
/// words in lower case without punctuation, so that answers of models with different tokenizers
/// compare.
pub fn seq_rep(n: usize, answer: &str) -> Option<f64> {
    let words = words(answer);
    if n == 0 || words.len() < n {
        return None;
    }
    let total = words.len() - n + 1;
    let distinct = words.windows(n).collect::<HashSet<_>>().len();
    Some(1.0 - distinct as f64 / total as f64)
}

/// Whether an answer is stuck in a loop. Either
///
/// - a block of 1 to 100 words stands three or more times in a row, and these are at least four
///   words ("the the the the", "a red hat a red hat a red hat", but not "very, very, very"); or
/// - a block of 1 to 4 characters stands eight or more times in a row, white space left out
///   ("!!!!!!!!", "hahahahahahahaha", "?!?!?!?!?!?!?!?!"), whatever the words.
///
/// Greedy decoding that has fallen into a loop stays in it (Holtzman et al. 2019, arXiv 1904.09751;
/// Xu et al. 2022, arXiv 2206.02369), so that even a short answer shows it; people hardly ever repeat
/// a phrase three times in a row. An empty answer is not degenerate in this sense.
pub fn is_degenerate(answer: &str) -> bool {
    let words = words(answer);
    let longest = LONGEST_BLOCK.min(words.len() / 3);
    if (1..=longest).any(|n| repeats(&words, n, if n == 1 { 4 } else { 3 })) {
        return true;
    }
    let characters: Vec<char> = answer.chars().filter(|c| !c.is_whitespace()).collect();
    (1..=4).any(|n| repeats(&characters, n, 8))
}

/// Blocks in words: three of them are longer than the 300 new tokens that the longest of the
/// field's protocols (CLEAR's) generates. It keeps the time linear on texts of any length.
const LONGEST_BLOCK: usize = 100;

/// Whether some block of `n` items stands `times` times in a row.
fn repeats<T: PartialEq>(items: &[T], n: usize, times: usize) -> bool {
    // So many items in a row that equal the item `n` before them.
    let needed = n * (times - 1);
    let mut run = 0;
    items
        .iter()
        .zip(items.iter().skip(n))
        .any(|(earlier, later)| {
            run = if earlier == later { run + 1 } else { 0 };
            run >= needed
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_of_words_and_of_phrases_are_degenerate() {
        for answer in [
            "the the the the",
            "A man. A man, a MAN",
            "The picture shows a red hat, a red hat, a red hat, a red",
            "The the picture: is it one? Is it one? Is it one?",
            "\u{7684}\u{7684}\u{7684}\u{7684}",
        ] {
            assert!(is_degenerate(answer), "{answer}");
        }
    }

    #[test]
    fn loops_of_characters_are_degenerate() {
        for answer in [
            "!!!!!!!!",
            ", , , , , , , ,",
            "A hahahahahahahaha",
            "?!?!?!?!?!?!?!?!",
        ] {
            assert!(is_degenerate(answer), "{answer}");
        }
    }

    #[test]
    fn plain_speech_is_not() {
        for answer in [
            "",
            "?",
            "Well...",
            "It is very, very, very good!!!",
            "Population: 1,000,000,000",
            "A man and a dog and a cat and a hat.",
            "This is it. This is it.",
        ] {
            assert!(!is_degenerate(answer), "{answer}");
        }
    }

    #[test]
    fn seq_rep_counts_repeated_ngrams() {
        assert_eq!(seq_rep(4, "one two three"), None);
        assert_eq!(seq_rep(0, "one two three"), None);
        assert_eq!(seq_rep(4, "one two three four five"), Some(0.0));
        assert_eq!(seq_rep(4, "a a a a a a a"), Some(0.75));
    }
}
