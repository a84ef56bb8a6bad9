//! The Porter stemmer as NLTK extends it.
//!
//! In: a lower-case word of `[a-z0-9]`. Out: its stem. Promise: equal to
//! `nltk.stem.porter.PorterStemmer().stem` (NLTK 3.9.1, mode `NLTK_EXTENSIONS`), which
//! `rouge-score` uses. The published algorithm is Porter 1980, "An algorithm for suffix stripping";
//! Snowball's "porter" (the `rust-stemmers` crate) is that one without NLTK's extensions, and stems
//! "dying", "enjoy" or "flies" differently.
//!
//! A consonant is any character but a, e, i, o, u and a y after a consonant, so digits are
//! consonants. The *measure* m of a stem is the number of times a consonant follows a vowel.

/// The stem of `word`, which must be in lower case. Characters outside `[a-z0-9]` make it come back
/// as it is: `rouge-score` never asks for such a word.
pub fn stem(word: &str) -> String {
    if !word
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    {
        return word.to_owned();
    }
    if let Some((_, stem)) = IRREGULAR.iter().find(|(form, _)| *form == word) {
        return (*stem).to_owned();
    }
    if word.len() <= 2 {
        return word.to_owned();
    }
    let word = step_1a(word);
    let word = step_1b(&word);
    let word = step_1c(word);
    let word = step_2(word);
    let word = first_rule(&word, &STEP_3, |stem, _| measure(stem) > 0);
    let word = first_rule(&word, &STEP_4, |stem, suffix| {
        measure(stem) > 1 && (suffix != "ion" || stem.ends_with(['s', 't']))
    });
    step_5(word)
}

/// NLTK's table of irregular forms: form, stem.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// Suffix, replacement. Of a list, the first suffix that the word ends with decides; if its
/// condition fails, the word stays, and no later rule is tried.
type Rule = (&'static str, &'static str);

/// (m > 0), and "logi" where the l counts with the stem, so that "geo" and "theo" behave like
/// "archaeo".
const STEP_2: [Rule; 22] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
    ("logi", "log"),
];

/// (m > 0)
const STEP_3: [Rule; 7] = [
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
];

/// (m > 1), and "ion" only after s or t.
const STEP_4: [Rule; 19] = [
    ("al", ""),
    ("ance", ""),
    ("ence", ""),
    ("er", ""),
    ("ic", ""),
    ("able", ""),
    ("ible", ""),
    ("ant", ""),
    ("ement", ""),
    ("ment", ""),
    ("ent", ""),
    ("ion", ""),
    ("ou", ""),
    ("ism", ""),
    ("ate", ""),
    ("iti", ""),
    ("ous", ""),
    ("ive", ""),
    ("ize", ""),
];

fn first_rule(word: &str, rules: &[Rule], holds: impl Fn(&str, &str) -> bool) -> String {
    for (suffix, replacement) in rules {
        if let Some(stem) = word.strip_suffix(suffix) {
            return if holds(stem, suffix) {
                format!("{stem}{replacement}")
            } else {
                word.to_owned()
            };
        }
    }
    word.to_owned()
}

/// Plurals. Four letters keep their e: "dies" → "die", but "flies" → "fli".
fn step_1a(word: &str) -> String {
    match word.strip_suffix("ies") {
        Some(stem) if word.len() == 4 => format!("{stem}ie"),
        _ => first_rule(
            word,
            &[("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")],
            |_, _| true,
        ),
    }
}

/// Past forms and gerunds: "died" → "die", "spied" → "spi", "agreed" → "agree", "hopping" → "hop",
/// "filing" → "file".
fn step_1b(word: &str) -> String {
    if let Some(stem) = word.strip_suffix("ied") {
        return format!("{stem}{}", if word.len() == 4 { "ie" } else { "i" });
    }
    if let Some(stem) = word.strip_suffix("eed") {
        return if measure(stem) > 0 {
            format!("{stem}ee")
        } else {
            word.to_owned()
        };
    }
    let stripped = word.strip_suffix("ed").or_else(|| word.strip_suffix("ing"));
    let Some(stem) = stripped.filter(|stem| consonants(stem).contains(&false)) else {
        return word.to_owned();
    };
    if stem.ends_with("at") || stem.ends_with("bl") || stem.ends_with("iz") {
        return format!("{stem}e");
    }
    if ends_in_double_consonant(stem) {
        let end = if stem.ends_with(['l', 's', 'z']) {
            stem.len()
        } else {
            stem.len() - 1
        };
        return stem.chars().take(end).collect();
    }
    if measure(stem) == 1 && ends_cvc(stem) {
        format!("{stem}e")
    } else {
        stem.to_owned()
    }
}

/// y after a consonant becomes i, unless only one letter stands before it: "happy" → "happi".
fn step_1c(word: String) -> String {
    match word.strip_suffix('y') {
        Some(stem) if stem.len() > 1 && consonants(stem).last() == Some(&true) => {
            format!("{stem}i")
        }
        _ => word,
    }
}

fn step_2(word: String) -> String {
    // NLTK tries "alli" before "bli", and gives the result to step 2 again.
    if let Some(stem) = word.strip_suffix("alli")
        && measure(stem) > 0
    {
        return step_2(format!("{stem}al"));
    }
    first_rule(&word, &STEP_2, |stem, suffix| {
        if suffix == "logi" {
            measure(&format!("{stem}l")) > 0
        } else {
            measure(stem) > 0
        }
    })
}

/// A final e goes if m > 1, or if m = 1 and the stem does not end in consonant, vowel, consonant;
/// then "ll" becomes "l" if m > 1.
fn step_5(mut word: String) -> String {
    if let Some(stem) = word.strip_suffix('e') {
        let m = measure(stem);
        if m > 1 || (m == 1 && !ends_cvc(stem)) {
            word.pop();
        }
    }
    if word.ends_with("ll") && word.strip_suffix('l').is_some_and(|stem| measure(stem) > 1) {
        word.pop();
    }
    word
}

/// For every character of `word`, whether it is a consonant.
fn consonants(word: &str) -> Vec<bool> {
    let mut previous = false;
    word.bytes()
        .map(|letter| {
            previous = match letter {
                b'a' | b'e' | b'i' | b'o' | b'u' => false,
                // A leading y has no letter before it, and is a consonant.
                b'y' => !previous,
                _ => true,
            };
            previous
        })
        .collect()
}

fn measure(stem: &str) -> usize {
    consonants(stem)
        .windows(2)
        .filter(|pair| *pair == [false, true])
        .count()
}

fn ends_in_double_consonant(word: &str) -> bool {
    let same = matches!(word.as_bytes(), [.., a, b] if a == b);
    same && consonants(word).last() == Some(&true)
}

/// Consonant, vowel, consonant other than w, x, y at the end; NLTK adds the two-letter words of
/// vowel and consonant.
fn ends_cvc(word: &str) -> bool {
    match consonants(word).as_slice() {
        [false, true] => true,
        [.., true, false, true] => !word.ends_with(['w', 'x', 'y']),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nltk_extensions_differ_from_the_published_algorithm() {
        for (word, expected) in [
            ("dying", "die"),
            ("dies", "die"),
            ("died", "die"),
            ("spied", "spi"),
            ("enjoy", "enjoy"),
            ("spy", "spi"),
            ("archaeology", "archaeolog"),
            ("geology", "geolog"),
            ("succeed", "succeed"),
        ] {
            assert_eq!(stem(word), expected, "{word}");
        }
    }

    #[test]
    fn words_that_rouge_never_asks_for_come_back_as_they_are() {
        for word in ["", "a", "of", "caf\u{e9}s", "UPPER"] {
            assert_eq!(stem(word), word);
        }
    }
}
