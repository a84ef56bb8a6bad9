//! The text metrics against other people's implementations (`tools/metrics/make_goldens.py` says
//! whose and which version), and what must hold for any text.

// clippy.toml allows it in test functions only, and reading a golden is a helper of theirs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::Path;

use kvw::eval::distribution::{auc, harmonic_mean, kolmogorov_smirnov, privacy_leakage};
use kvw::eval::likelihood::zlib_length;
use kvw::eval::text::bleu::bleu;
use kvw::eval::text::{
    Score, is_degenerate, leakable, leaks, name_is_in, rouge_l, rouge_n, seq_rep, stemmer::stem,
};
use kvw::eval::{
    AnswerLoss, Answered, Direction, Estimate, METRICS, Scoring, Summary, TokenLog, metric, score,
};
use ndarray::Array1;
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

/// Compares two numbers, absolutely below 1 and relatively above, and keeps the largest difference.
struct Difference {
    name: &'static str,
    reference: &'static str,
    checked: usize,
    largest: f64,
}

impl Difference {
    fn new(name: &'static str, reference: &'static str) -> Self {
        let (checked, largest) = (0, 0.0);
        Self {
            name,
            reference,
            checked,
            largest,
        }
    }

    fn add(&mut self, found: f64, expected: &Value) {
        let expected = expected.as_f64().unwrap();
        let difference = (found - expected).abs() / expected.abs().max(1.0);
        assert!(
            difference <= 1e-6,
            "{}: {found} and not {expected}",
            self.name
        );
        self.checked += 1;
        self.largest = self.largest.max(difference);
    }
}

impl Drop for Difference {
    /// A row of the table in docs/metrics.md.
    fn drop(&mut self) {
        println!(
            "| `{}` | {} | {} | {:.0e} |",
            self.name, self.reference, self.checked, self.largest
        );
        assert!(
            self.checked > 0 || std::thread::panicking(),
            "{}",
            self.name
        );
    }
}

fn numbers(values: &Value) -> Vec<f64> {
    let values = values.as_array().unwrap().iter();
    values.map(|value| value.as_f64().unwrap()).collect()
}

fn rows(file: &str) -> Vec<Value> {
    golden(file, "rows").as_array().unwrap().clone()
}

#[test]
fn bleu_is_nltks() {
    let mut difference = Difference::new("bleu", "nltk 3.9.1 sentence_bleu, method1");
    for row in rows("bleu.json") {
        let text = |key: &str| row[key].as_str().unwrap();
        difference.add(bleu(text("reference"), text("prediction")), &row["bleu"]);
    }
}

#[test]
fn what_is_made_of_token_likelihoods_is_open_unlearnings() {
    let of = |name| Difference::new(name, "open-unlearning's formula, numpy float64");
    let mut loss = of("loss");
    let mut probability = of("probability");
    let mut memorization = of("exact_memorization");
    let mut strength = of("extraction_strength");
    let mut lowest = ["min_k_20", "min_k_40"].map(of);
    let mut normalized = ["min_k_plus_plus_20", "min_k_plus_plus_40"].map(of);
    for row in rows("likelihood.json") {
        let mut log = TokenLog::default();
        let logits = row["logits"].as_array().unwrap();
        for (logits, label) in logits.iter().zip(row["labels"].as_array().unwrap()) {
            #[allow(clippy::cast_possible_truncation)]
            let logits: Array1<f32> = numbers(logits).into_iter().map(|x| x as f32).collect();
            log.push(logits.view(), label.as_i64().unwrap());
        }
        loss.add(log.loss().per_token().unwrap(), &row["loss"]);
        probability.add(log.loss().probability().unwrap(), &row["probability"]);
        memorization.add(
            log.exact_memorization().unwrap(),
            &row["exact_memorization"],
        );
        let found = log.extraction_strength().unwrap();
        match row["last_is_hit"] == true {
            true => strength.add(found, &row["extraction_strength"]),
            // open-unlearning's loop ends one short: it gives 1 ÷ L where nothing can be extracted.
            false => assert_eq!(found, 0.0),
        }
        for (i, k) in [0.2, 0.4].into_iter().enumerate() {
            lowest[i].add(log.min_k(k).unwrap(), &row[lowest[i].name]);
            normalized[i].add(log.min_k_plus_plus(k).unwrap(), &row[normalized[i].name]);
        }
    }
}

#[test]
fn truth_ratios_are_open_unlearnings() {
    let of = |name| Difference::new(name, "open-unlearning's formula, numpy float64");
    let mut ratio = of("truth_ratio");
    let mut forget = of("truth_ratio_forget");
    let mut retain = of("truth_ratio_retain");
    let mut normalized = of("probability_normalized");
    let tokens = |loss: f64| AnswerLoss {
        sum_nll: 7.0 * loss,
        tokens: 7,
    };
    for row in rows("truth_ratio.json") {
        let right = tokens(row["right"].as_f64().unwrap());
        let wrong: Vec<AnswerLoss> = numbers(&row["wrong"]).into_iter().map(tokens).collect();
        let answered = Answered {
            reference: "a".into(),
            paraphrased: Some(right),
            likelihood: Some(TokenLog {
                log_probability: vec![-right.sum_nll / 7.0],
                ..TokenLog::default()
            }),
            perturbed: wrong,
            ..Answered::default()
        };
        let scores = score(answered, &Scoring::default()).scores;
        ratio.add(scores["truth_ratio"], &row["truth_ratio"]);
        forget.add(scores["truth_ratio_forget"], &row["closer_to_1_better"]);
        retain.add(scores["truth_ratio_retain"], &row["true_better"]);
        normalized.add(
            scores["probability_normalized"],
            &row["probability_w_options"],
        );
    }
}

#[test]
fn distributions_are_compared_as_scikit_learn_and_scipy_do() {
    let mut area = Difference::new("auc_*", "scikit-learn roc_auc_score");
    let mut statistic = Difference::new("D of forget_quality", "scipy ks_2samp, exact");
    let mut p_value = Difference::new("forget_quality", "scipy ks_2samp, exact");
    let mut leakage = Difference::new("privleak", "open-unlearning's formula");
    let mut utility = Difference::new("model_utility", "scipy hmean");
    for row in rows("distribution.json") {
        let (forget, holdout) = (numbers(&row["forget"]), numbers(&row["holdout"]));
        let found = auc(&forget, &holdout).unwrap();
        area.add(found, &row["auc"]);
        leakage.add(
            privacy_leakage(found, row["reference_auc"].as_f64().unwrap()),
            &row["privleak"],
        );
        let test = kolmogorov_smirnov(&forget, &holdout).unwrap();
        statistic.add(test.statistic, &row["ks"]);
        p_value.add(test.p_value, &row["p_value"]);
        // Small p-values too, to their own digits.
        let expected = row["p_value"].as_f64().unwrap();
        assert!((test.p_value / expected - 1.0).abs() < 1e-6, "{expected:e}");
    }
    for row in rows("harmonic_mean.json") {
        let found = harmonic_mean(&numbers(&row["values"])).unwrap();
        utility.add(found, &row["harmonic_mean"]);
    }
}

#[test]
fn intervals_are_numpys_quantiles_of_the_same_draws() {
    let mut ends = Difference::new("low, high", "numpy quantile of 1000 draws");
    for row in rows("bootstrap.json") {
        let found = Estimate::mean(&numbers(&row["values"]), true, "");
        ends.add(found.low.unwrap(), &row["low"]);
        ends.add(found.high.unwrap(), &row["high"]);
    }
}

#[test]
fn zlib_lengths_are_pythons_but_for_a_few() {
    let rows = rows("zlib.json");
    let differ = rows.iter().filter(|row| {
        let found = zlib_length(row["text"].as_str().unwrap());
        row["length"].as_u64().unwrap() != found as u64
    });
    let differ: Vec<&Value> = differ.collect();
    println!(
        "{} of {} lengths differ: {differ:?}",
        differ.len(),
        rows.len()
    );
    assert!(differ.len() * 100 < rows.len(), "{differ:?}");
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
        let min_k = vec!["0.1".parse().unwrap()];
        let scoring = Scoring { people, min_k };
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
