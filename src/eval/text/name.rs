//! Whether an answer names the person, as Knowledge Vector Weakening's authors decide it.
//!
//! In: an answer and a name. Out: yes or no. Promise: equal to the authors' check, wherever that
//! check can tell anything at all.

/// Whether `name` is in `answer`, after both are stripped to `[a-zA-Z0-9]` and lower-cased
/// (`re.sub('[^a-zA-Z0-9]', '', text).lower()`, then a substring check).
///
/// Spaces go too, so this is no whole-word match: "Ann Lee" is found in "Joann Leeds". A name
/// without any such character (one in Hangul, say) would be an empty string, which is in every
/// answer; here it is in none, see [`name_is_checkable`].
pub fn name_is_in(answer: &str, name: &str) -> bool {
    name_is_checkable(name) && strip(answer).contains(&strip(name))
}

/// Whether [`name_is_in`] can say anything about `name`: it keeps at least one of `[a-zA-Z0-9]`.
pub fn name_is_checkable(name: &str) -> bool {
    name.contains(|c: char| c.is_ascii_alphanumeric())
}

fn strip(text: &str) -> String {
    text.chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_spaces_and_punctuation_do_not_matter() {
        assert!(name_is_in("It is MARIA-ROSSI!", "Maria Rossi"));
        assert!(!name_is_in("It is Maria.", "Maria Rossi"));
    }

    #[test]
    fn letters_outside_ascii_are_dropped_on_both_sides() {
        assert!(name_is_in(
            "This is Jos\u{e9} D\u{ed}az.",
            "Jos\u{e9} D\u{ed}az"
        ));
        assert!(name_is_in("This is Jos Daz.", "Jos\u{e9} D\u{ed}az"));
    }

    #[test]
    fn a_name_that_vanishes_is_in_no_answer() {
        assert!(!name_is_checkable("\u{ae40}\u{bbfc}\u{c218}"));
        assert!(!name_is_in("anything", "\u{ae40}\u{bbfc}\u{c218}"));
        assert!(!name_is_in("anything", ""));
    }
}
