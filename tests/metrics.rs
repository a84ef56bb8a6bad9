//! The text metrics against other people's implementations (`tools/metrics/make_goldens.py` says
//! whose and which version), and what must hold for any text.

// clippy.toml allows it in test functions only, and reading a golden is a helper of theirs.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use kvw::eval::text::{
    Score, is_degenerate, leakable, leaks, name_is_in, rouge_l, rouge_n, seq_rep, stemmer::stem,
};
use kvw::eval::{Answered, Direction, METRICS, Scoring, Summary, TokenLog, metric, score};
use proptest::prelude::*;
use serde_json::Value;

/// The same few operations on the same integers in the same order; what is left is how JSON's
/// decimals are read.
const TOLERANCE: f64 = 1e-12;

fn golden(file: &str, key: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/metrics")
        .join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()[key].take()
}

#[test]
fn stems_are_nltks() {
    let stems = golden("stems.json", "stems");
    let stems = stems.as_object().unwrap();
    assert!(stems.len() >= 3000, "{} words", stems.len());
    let wrong: Vec<_> = stems
        .iter()
        .filter(|(word, expected)| stem(word) != **expected)
        .collect();
    assert!(
        wrong.is_empty(),
        "{} of {}: {wrong:?}",
        wrong.len(),
        stems.len()
    );
}

#[test]
fn rouge_is_googles() {
    let pairs = golden("rouge.json", "pairs");
    let pairs = pairs.as_array().unwrap();
    assert!(pairs.len() >= 200, "{} pairs", pairs.len());
    let mut largest: f64 = 0.0;
    for pair in pairs {
        let (reference, prediction) = (
            pair["reference"].as_str().unwrap(),
            pair["prediction"].as_str().unwrap(),
        );
        for (mode, stemmer) in [("plain", false), ("stemmed", true)] {
            for (kind, ours) in [
                ("rouge1", rouge_n(1, reference, prediction, stemmer)),
                ("rouge2", rouge_n(2, reference, prediction, stemmer)),
                ("rougeL", rouge_l(reference, prediction, stemmer)),
            ] {
                for (i, ours) in [ours.precision, ours.recall, ours.f1]
                    .into_iter()
                    .enumerate()
                {
                    let difference = (ours - pair[mode][kind][i].as_f64().unwrap()).abs();
                    assert!(
                        difference <= TOLERANCE,
                        "{mode} {kind} {i}: {ours} in {pair}"
                    );
                    largest = largest.max(difference);
                }
            }
        }
    }
    println!("{} pairs, largest difference {largest:e}", pairs.len());
}

#[test]
fn the_name_check_is_the_authors() {
    for check in golden("names.json", "checks").as_array().unwrap() {
        let (answer, name) = (
            check["answer"].as_str().unwrap(),
            check["name"].as_str().unwrap(),
        );
        assert_eq!(name_is_in(answer, name), check["found"], "{check}");
    }
}

#[test]
fn seq_rep_4_is_welleck_and_colleagues_formula() {
    for row in golden("seq_rep.json", "texts").as_array().unwrap() {
        let difference =
            seq_rep(4, row["text"].as_str().unwrap()).unwrap() - row["seq_rep_4"].as_f64().unwrap();
        assert!(difference.abs() <= TOLERANCE, "{row}");
    }
}

/// A number as the table of metrics has it.
fn bound(value: f64) -> String {
    match value {
        f64::INFINITY => "∞".to_owned(),
        f64::NEG_INFINITY => "−∞".to_owned(),
        value => format!("{value}"),
    }
}

/// `UPDATE_DOCS=1 cargo test --test metrics` writes it.
#[test]
fn the_documented_table_is_the_registry() {
    let mut table =
        "| metric | formula | range | a higher value means | source |\n|---|---|---|---|---|\n"
            .to_owned();
    for metric in METRICS {
        let means = match metric.direction {
            Direction::Known => "more is known",
            Direction::Unknown => "less is known",
            Direction::Damage => "more damage",
            Direction::Better => "better",
            Direction::NearZero => "best at 0",
        };
        table += &format!(
            "| `{}` | {} | {} to {} | {means} | {} |\n",
            metric.name,
            metric.formula,
            bound(metric.low),
            bound(metric.high),
            metric.source
        );
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("<!-- metrics -->\n").unwrap();
    let (found, after) = rest.split_once("<!-- end of metrics -->").unwrap();
    if found != table && std::env::var_os("UPDATE_DOCS").is_some() {
        let updated = format!("{before}<!-- metrics -->\n{table}<!-- end of metrics -->{after}");
        std::fs::write(&path, updated).unwrap();
        return;
    }
    assert!(found == table, "docs/metrics.md differs from the registry");
}

/// Words that repeat and collide, odd Unicode, and anything at all.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::collection::vec(
            prop_oneof![
                "[a-c]{1,3}(ing|ed|s|ies)?",
                Just("Maria".to_owned()),
                Just("Rossi,".to_owned()),
                Just("\u{130}\u{ae40}\u{bbfc}".to_owned()),
            ],
            0..30
        )
        .prop_map(|words| words.join(" ")),
        any::<String>(),
    ]
}

fn in_range(score: Score) -> bool {
    [score.precision, score.recall, score.f1]
        .iter()
        .all(|part| (0.0..=1.0).contains(part))
}

proptest! {
    // Proptest looks for a `lib.rs` beside the test to keep its failures by, and there is none.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rouge_lies_between_zero_and_one_and_swaps_with_its_texts(a in text(), b in text(), stemmer: bool) {
        for kind in [rouge_l, |a: &str, b: &str, s| rouge_n(1, a, b, s), |a: &str, b: &str, s| rouge_n(2, a, b, s)] {
            let (there, back) = (kind(&a, &b, stemmer), kind(&b, &a, stemmer));
            prop_assert!(in_range(there));
            prop_assert_eq!(there.precision, back.recall);
            prop_assert_eq!(there.recall, back.precision);
            prop_assert!((there.f1 - back.f1).abs() <= TOLERANCE);
        }
        let same = rouge_l(&a, &a, stemmer);
        prop_assert!(same.f1 == 1.0 || same == Score::default());
        // A common subsequence is made of common words.
        prop_assert!(rouge_l(&a, &b, stemmer).recall <= rouge_n(1, &a, &b, stemmer).recall);
    }

    #[test]
    fn a_stem_is_never_longer_than_its_word(word in "[a-z0-9]{0,20}|[aeiouylstzngd]{0,12}") {
        prop_assert!(stem(&word).len() <= word.len());
    }

    #[test]
    fn an_answer_that_quotes_a_name_has_it(before in any::<String>(), name in "[A-Za-z]{1,9} [A-Za-z]{1,9}", after in any::<String>()) {
        let answer = format!("{before}{name}{after}");
        prop_assert!(name_is_in(&answer, &name));
    }

    #[test]
    fn leaks_are_some_of_what_could_leak(answer in text(), question in text(), name in text(), fact in text()) {
        let facts: BTreeMap<_, _> = [("town".to_owned(), fact)].into();
        let could = leakable(&question, Some(&name), &facts);
        let did = leaks(&answer, &question, Some(&name), &facts);
        prop_assert!(did.iter().all(|leak| could.contains(leak)));
        // An answer that says everything leaks everything; one that repeats the question, nothing.
        let all = format!("{name} {}", facts["town"]);
        prop_assert_eq!(leaks(&all, &question, Some(&name), &facts), could);
        prop_assert!(leaks(&question, &question, Some(&name), &facts).is_empty());
    }

    #[test]
    fn saying_it_often_is_degenerate_however_it_began(before in text(), phrase in "[a-z]{1,4}( [a-z]{1,4}){0,5}", times in 4_usize..9) {
        let looped = vec![phrase; times].join(" ");
        let answer = format!("{before} {looped}");
        prop_assert!(is_degenerate(&answer));
        let rate = seq_rep(4, &answer).unwrap();
        prop_assert!((0.0..1.0).contains(&rate));
    }

    #[test]
    fn every_metric_of_a_summary_lies_in_its_range_and_its_interval(
        samples in proptest::collection::vec((text(), text(), text(), proptest::option::of(text()), proptest::collection::vec((-1e2..0.0, -9.0..9.0, any::<bool>()), 0..5)), 0..6)
    ) {
        let people = samples.iter().filter_map(|sample| sample.3.clone()).collect();
        let scoring = Scoring { people };
        let answers: Vec<_> = samples.into_iter().map(|(question, reference, prediction, name, tokens)| {
            let facts = name.iter().map(|name| ("town".to_owned(), name.clone())).collect();
            let mut log = TokenLog::default();
            for (log_probability, normalized, is_top) in tokens {
                log.log_probability.push(log_probability);
                log.normalized.push(normalized);
                log.is_top.push(is_top);
            }
            let perturbed = vec![log.loss(); log.is_top.len() / 2];
            score(Answered {
                question, reference, name, facts, perturbed, likelihood: Some(log),
                prediction: Some(prediction), ..Answered::default()
            }, &scoring)
        }).collect();
        for (name, estimate) in Summary::of(&answers).iter() {
            let metric = metric(name).unwrap();
            prop_assert!(estimate.n <= answers.len());
            match estimate.value {
                Some(value) => {
                    prop_assert!(metric.low <= value && value <= metric.high, "{name} {value}");
                    prop_assert!(estimate.low.is_none_or(|low| low <= value), "{name}");
                    prop_assert!(estimate.high.is_none_or(|high| high >= value), "{name}");
                }
                None => prop_assert!(estimate.reason.is_some(), "{name}"),
            }
        }
    }
}
