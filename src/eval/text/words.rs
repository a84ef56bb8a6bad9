//! Words of any script, comparable without regard to case or to how Unicode composed them.
//!
//! In: text. Out: its words in order, in NFKC and lower case. ROUGE does not use them: it has a
//! tokenizer of its own.

use tokenizers::NormalizedString;

/// Maximal runs of alphanumeric characters; every character of a script that is written without
/// spaces, or that glues particles to a name (Korean), is a word by itself.
///
/// NFKC, because a decomposed "é" from one source and a composed one from another are the same
/// letter; `tokenizers` brings the tables, so this needs no dependency of its own.
pub(super) fn words(text: &str) -> Vec<String> {
    let mut normalized = NormalizedString::from(text);
    normalized.nfkc().lowercase();
    let mut words = Vec::new();
    let mut run = String::new();
    for c in normalized.get().chars() {
        let alone = stands_alone(c);
        if (alone || !c.is_alphanumeric()) && !run.is_empty() {
            words.push(std::mem::take(&mut run));
        }
        if alone && c.is_alphanumeric() {
            words.push(c.into());
        } else if c.is_alphanumeric() {
            run.push(c);
        }
    }
    if !run.is_empty() {
        words.push(run);
    }
    words
}

/// Thai and Lao, Burmese, Khmer, Kana, Han and Hangul: there, the edge of a run of letters is no
/// edge of a word ("김민수는" is the name 김민수 and a particle).
fn stands_alone(c: char) -> bool {
    matches!(c,
        '\u{0E00}'..='\u{0EFF}'
        | '\u{1000}'..='\u{109F}'
        | '\u{1780}'..='\u{17FF}'
        | '\u{3040}'..='\u{30FF}'
        | '\u{3400}'..='\u{4DBF}'
        | '\u{4E00}'..='\u{9FFF}'
        | '\u{AC00}'..='\u{D7AF}'
        | '\u{F900}'..='\u{FAFF}'
        | '\u{20000}'..='\u{3FFFF}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn punctuation_and_case_fall_away() {
        assert_eq!(
            words("Anne-Marie's  BAKERY, no. 5"),
            ["anne", "marie", "s", "bakery", "no", "5"]
        );
        assert!(words(" ?! \u{2014} ").is_empty());
    }

    #[test]
    fn composed_and_decomposed_letters_are_the_same() {
        assert_eq!(words("Jose\u{301}"), words("Jos\u{e9}"));
    }

    #[test]
    fn scripts_without_spaces_are_split_into_characters() {
        assert_eq!(words("我叫Li。"), ["我", "叫", "li"]);
        assert_eq!(words("김민수는"), ["김", "민", "수", "는"]);
    }
}
