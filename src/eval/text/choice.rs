//! Questions with one right answer: multiple choice and blanks.
//!
//! In: a question, its options or its blank, the model's answer. Out: the prompt, and whether the answer
//! is right. Promise: the prompts and checks of MLLMU-Bench and of Knowledge Vector Weakening's own
//! evaluation.

use std::fmt::Write as _;

/// `question` as multiple choice: each option on a line as "A. option", and what MLLMU-Bench asks for.
pub fn choice_prompt(question: &str, options: &[String]) -> String {
    let mut prompt = question.to_owned();
    for (letter, option) in ('A'..).zip(options) {
        // Writing to a string does not fail.
        let _ = write!(prompt, "\n{letter}. {option}");
    }
    prompt + "\nJust give ONE letter representing the answer directly."
}

/// Whether `answer` picks the option with the index `correct`: its first character of `[a-zA-Z0-9]` is the
/// option's letter, in either case.
pub fn is_choice(answer: &str, correct: usize) -> bool {
    let first = answer.chars().find(char::is_ascii_alphanumeric);
    let letter = ('A'..='Z').nth(correct);
    first.map(|c| c.to_ascii_uppercase()) == letter && letter.is_some()
}

/// Whether `answer` holds `expected`, in any case: MLLMU-Bench's check of a filled blank.
pub fn fills_blank(answer: &str, expected: &str) -> bool {
    answer.to_lowercase().contains(&expected.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_lettered_one_a_line() {
        let options = ["Ada".to_owned(), "Eve".to_owned()];
        assert_eq!(
            choice_prompt("Who?", &options),
            "Who?\nA. Ada\nB. Eve\nJust give ONE letter representing the answer directly."
        );
    }

    #[test]
    fn the_first_letter_or_digit_decides() {
        for (answer, right) in [
            ("B", true),
            ("b.", true),
            (" (B) Eve", true),
            ("**B**", true),
            ("Because", true),
            ("A or B", false),
            ("1", false),
            ("", false),
        ] {
            assert_eq!(is_choice(answer, 1), right, "{answer}");
        }
        assert!(!is_choice("", 99));
    }

    #[test]
    fn a_blank_is_filled_by_what_the_answer_holds() {
        assert!(fills_blank("A Baker, surely.", "baker"));
        assert!(!fills_blank("A bak er", "baker"));
    }
}
