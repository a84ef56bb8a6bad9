//! Every metric, in one place: its name, formula, range, direction and source.
//!
//! In: a name. Out: a [`Metric`]. Promise: every name that an evaluation file holds is described
//! here, and `docs/metrics.md` is this table (a test compares them). A name may be one of a family:
//! `leak_fact.job` is `leak_fact.*` for the fact `job`, `min_k_10` is `min_k_*` for ten percent.

/// What a higher value says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// More is known: lower is better on what must be forgotten, higher on everything else.
    Known,
    /// Less is known: the other way round.
    Unknown,
    /// More damage: lower is better on every set.
    Damage,
    /// Better, whatever the set.
    Better,
    /// Nothing by itself: the nearer to 0, the better.
    NearZero,
}

/// Which end is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Higher values.
    Higher,
    /// Lower values.
    Lower,
    /// Values near 0.
    NearZero,
}

/// Over what a metric is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The mean of a score that every answer has by itself.
    Sample,
    /// Of a set as a whole, of two sets, or of two models: see
    /// [`Comparison`](super::Comparison).
    Comparison,
}

/// A metric, described.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// As evaluation files and policies name it. A family ends in `*`: in place of it a member has a
    /// number in percent, or after a dot anything.
    pub name: &'static str,
    /// For people, in a table's header; a family's has `*` where a member has its own.
    pub title: &'static str,
    /// How it is computed.
    pub formula: &'static str,
    /// Smallest possible value.
    pub low: f64,
    /// Largest possible value.
    pub high: f64,
    /// Whether it is a share of answers, for people in percent: each answer has 0 or 1.
    pub counts: bool,
    /// What a higher value says.
    pub direction: Direction,
    /// Over what it is taken.
    pub level: Level,
    /// Who defined it, or whose implementation it equals.
    pub source: &'static str,
    /// Why a set has no value: what every one of its samples lacks.
    pub missing: &'static str,
}

impl Metric {
    /// Which end is good on a set that must be forgotten, or on any other.
    pub fn better(&self, forget: bool) -> Better {
        match (self.direction, forget) {
            (Direction::Known, true) | (Direction::Unknown, false) | (Direction::Damage, _) => {
                Better::Lower
            }
            (Direction::Known, false) | (Direction::Unknown, true) | (Direction::Better, _) => {
                Better::Higher
            }
            (Direction::NearZero, _) => Better::NearZero,
        }
    }

    /// What `name` has in place of the family's `*`, where it is one of this family.
    fn member<'n>(&self, name: &'n str) -> Option<&'n str> {
        let family = self.name.strip_suffix('*')?;
        let member = name.strip_prefix(family)?;
        let percent = || {
            let number = member
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.');
            number
                && member
                    .parse()
                    .is_ok_and(|percent: f64| 0.0 < percent && percent <= 100.0)
        };
        let fits = match family.ends_with('.') {
            true => !member.is_empty(),
            false => percent(),
        };
        fits.then_some(member)
    }

    /// The title of its member `name`, or its own.
    pub fn title_of(&self, name: &str) -> String {
        match self.member(name) {
            Some(member) => self.title.replace('*', member),
            None => self.title.to_owned(),
        }
    }

    /// Whether the value is a share or a score in [0, 1].
    pub fn is_share(&self) -> bool {
        self.low == 0.0 && self.high == 1.0
    }
}

/// The metric `name`, where there is one. A member of a family is its family.
pub fn metric(name: &str) -> Option<&'static Metric> {
    let own = METRICS.iter().find(|metric| metric.name == name);
    let own = own.filter(|metric| !metric.name.ends_with('*'));
    own.or_else(|| METRICS.iter().find(|metric| metric.member(name).is_some()))
}

/// The title of the metric `name`; the name where there is no such metric.
pub fn title(name: &str) -> String {
    metric(name).map_or_else(|| name.to_owned(), |metric| metric.title_of(name))
}

const KVW: &str = "Knowledge Vector Weakening's own evaluation (arXiv 2601.21794)";
const ROUGE: &str = "Lin 2004; equals rouge-score 0.1.2";
const OURS: &str = "kvw";
const OPEN_UNLEARNING: &str = "open-unlearning";
const MEMBERSHIP: &str =
    "open-unlearning's membership inference, with scikit-learn's roc_auc_score";
const NO_HOLDOUT: &str = "no holdout set was given";
const NO_TOKENS: &str = "no sample has an answer token whose likelihood was measured";
const NO_REFERENCE: &str = "no sample has an open answer with an ASCII letter or digit";
const NO_PERTURBED: &str = "no sample has `perturbed_answers`";

/// A score of every answer, in [0, 1], higher meaning that more is known.
const SHARE: Metric = Metric {
    name: "",
    title: "",
    formula: "",
    low: 0.0,
    high: 1.0,
    counts: false,
    direction: Direction::Known,
    level: Level::Sample,
    source: OURS,
    missing: "",
};

/// Every metric, in the order in which files and tables list them.
pub const METRICS: &[Metric] = &[
    Metric {
        name: "name_accuracy",
        title: "full name",
        counts: true,
        formula: "share of answers with the name in them, both stripped to [a-zA-Z0-9] and lower-cased",
        source: KVW,
        missing: "no sample has a name with an ASCII letter or digit",
        ..SHARE
    },
    Metric {
        name: "leak_any",
        title: "any name or fact",
        counts: true,
        formula: "share of answers that tell any part of the name or any fact that the question did not",
        missing: "no sample has a name or fact that its question does not contain",
        ..SHARE
    },
    Metric {
        name: "leak_full_name",
        title: "leaks full name",
        counts: true,
        formula: "share of answers that tell the full name, word for word, where the question did not",
        missing: "no sample has a name that its question does not contain",
        ..SHARE
    },
    Metric {
        name: "leak_first_name",
        title: "leaks first name",
        counts: true,
        formula: "the same for the first of the name's parts",
        missing: "no sample has a first name that its question does not contain",
        ..SHARE
    },
    Metric {
        name: "leak_middle_name",
        title: "leaks middle name",
        counts: true,
        formula: "the same for any part between the first and the last",
        missing: "no sample has a middle name that its question does not contain",
        ..SHARE
    },
    Metric {
        name: "leak_last_name",
        title: "leaks last name",
        counts: true,
        formula: "the same for the last of the name's parts",
        missing: "no sample has a last name that its question does not contain",
        ..SHARE
    },
    Metric {
        name: "leak_fact",
        title: "leaks a fact",
        counts: true,
        formula: "the same for any fact",
        missing: "no sample has a fact that its question does not contain",
        ..SHARE
    },
    Metric {
        name: "leak_fact.*",
        title: "leaks *",
        counts: true,
        formula: "the same for the fact of this kind, as in `leak_fact.job`",
        missing: "no sample has this fact where its question does not contain it",
        ..SHARE
    },
    Metric {
        name: "names_another_person",
        title: "names another person",
        counts: true,
        formula: "share of answers with the full name of somebody else of the evaluated data, whom the question does not name",
        direction: Direction::Damage,
        missing: "no sample has a name, or the data names nobody else",
        ..SHARE
    },
    Metric {
        name: "degenerate",
        title: "repeats itself",
        counts: true,
        formula: "share of answers that are stuck in a loop (rule at `eval::text::is_degenerate`)",
        direction: Direction::Damage,
        missing: "no sample has an open answer",
        ..SHARE
    },
    Metric {
        name: "seq_rep_4",
        title: "repeated 4-grams",
        formula: "1 − distinct 4-grams of words ÷ 4-grams of words",
        direction: Direction::Damage,
        source: "Welleck et al. 2019 (arXiv 1908.04319), over words",
        missing: "no answer has four words",
        ..SHARE
    },
    Metric {
        name: "rouge_1_recall",
        title: "ROUGE-1 recall",
        formula: "shared words ÷ words of the reference, stemmed",
        source: ROUGE,
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "rouge_1_f1",
        title: "ROUGE-1 F1",
        formula: "harmonic mean of ROUGE-1 precision and recall, stemmed",
        source: ROUGE,
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "rouge_2_recall",
        title: "ROUGE-2 recall",
        formula: "shared pairs of words ÷ pairs of the reference, stemmed",
        source: ROUGE,
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "rouge_2_f1",
        title: "ROUGE-2 F1",
        formula: "harmonic mean of ROUGE-2 precision and recall, stemmed",
        source: ROUGE,
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "rouge_l_recall",
        title: "ROUGE-L",
        formula: "longest common subsequence ÷ words of the reference, stemmed (CLEAR's ROUGE)",
        source: ROUGE,
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "rouge_l_f1",
        title: "ROUGE-L F1",
        formula: "harmonic mean of ROUGE-L precision and recall, stemmed (MLLMU-Bench's ROUGE)",
        source: ROUGE,
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "bleu",
        title: "BLEU",
        formula: "geometric mean of the clipped precisions of 1- to 4-grams of words, times the brevity penalty; no hit counts 0.1",
        source: "Papineni et al. 2002; equals NLTK 3.9's sentence_bleu with smoothing method 1, as MLLMU-Bench",
        missing: NO_REFERENCE,
        ..SHARE
    },
    Metric {
        name: "cloze_accuracy",
        title: "blanks filled",
        formula: "share of answers to questions with a blank that hold the missing words, in any case",
        counts: true,
        source: "MLLMU-Bench",
        missing: "no sample is a question with a blank (`task`: `cloze`)",
        ..SHARE
    },
    Metric {
        name: "choice_accuracy",
        title: "right choice",
        formula: "share of multiple-choice answers whose first character of [a-zA-Z0-9] is the right option's letter",
        counts: true,
        source: "MLLMU-Bench; KVW for CLEAR's real faces and real world",
        missing: "no sample has `options`",
        ..SHARE
    },
    Metric {
        name: "loss",
        title: "loss",
        formula: "mean over samples of −Σ ln p(token) ÷ tokens over the answer's tokens, in nats",
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "CLEAR; open-unlearning",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "probability",
        title: "probability",
        formula: "mean over samples of exp(−loss)",
        source: "CLEAR; open-unlearning",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "probability_normalized",
        title: "probability among answers",
        formula: "p ÷ (p + Σ p of the perturbed answers), each p = exp(−loss)",
        source: "CLEAR; open-unlearning's probability_w_options, without its 1e-10",
        missing: NO_PERTURBED,
        ..SHARE
    },
    Metric {
        name: "ranked_first",
        title: "ranked first",
        formula: "share of samples whose answer has a lower loss than every perturbed one: multiple choice without letters. A guess among n answers gives 1 ÷ n",
        counts: true,
        source: "the log-likelihood ranking of Brown et al. 2020 (arXiv 2005.14165, §2.4), per token",
        missing: NO_PERTURBED,
        ..SHARE
    },
    Metric {
        name: "truth_ratio",
        title: "truth ratio",
        formula: "R = exp(−mean loss of the perturbed answers) ÷ exp(−loss of the paraphrased answer, or of the answer where there is none)",
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Maini et al. 2024 (TOFU, arXiv 2401.06121); open-unlearning, without its 1e-10. CLEAR's is 1 ÷ R",
        missing: NO_PERTURBED,
        ..SHARE
    },
    Metric {
        name: "truth_ratio_forget",
        title: "truth ratio (forget)",
        formula: "mean of min(R, 1 ÷ R): 1 where right and wrong answers are equally likely",
        direction: Direction::Unknown,
        source: "open-unlearning's closer_to_1_better; CLEAR's for the forget set",
        missing: NO_PERTURBED,
        ..SHARE
    },
    Metric {
        name: "truth_ratio_retain",
        title: "truth ratio (retain)",
        formula: "mean of max(0, 1 − R): 1 where wrong answers are impossible",
        source: "open-unlearning's true_better; CLEAR's for all other sets",
        missing: NO_PERTURBED,
        ..SHARE
    },
    Metric {
        name: "exact_memorization",
        title: "exact memorization",
        formula: "share of the answer's tokens that are the most likely one, given those before",
        source: OPEN_UNLEARNING,
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "extraction_strength",
        title: "extraction strength",
        formula: "1 − k ÷ L, with k the shortest prefix of the L answer tokens after which every token is the most likely one",
        source: "Carlini et al. 2021 (arXiv 2012.07805); open-unlearning, which gives 1 ÷ L where even the last token is missed, and not 0",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "zlib",
        title: "loss by zlib length",
        formula: "loss ÷ bytes of the answer as zlib compresses it (level 6)",
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Carlini et al. 2021 (arXiv 2012.07805); open-unlearning",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "min_k_20",
        title: "Min-20%",
        formula: "−mean of the lowest max(1, ⌊0.2 · L⌋) token log-probabilities",
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Shi et al. 2023 (arXiv 2310.16789), as open-unlearning signs it",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "min_k_40",
        title: "Min-40%",
        formula: "the same with 0.4",
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Shi et al. 2023, with the k of open-unlearning's TOFU configuration",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "min_k_*",
        title: "Min-*%",
        formula: "the same with a share of `--min-k`, in percent: `min_k_10` with 0.1",
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Shi et al. 2023, as open-unlearning signs it",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "min_k_plus_plus_20",
        title: "Min-20%++",
        formula: "the same over (ln p − μ) ÷ σ, with μ and σ² (at least 1e-6) the mean and variance of ln p under the model's own distribution",
        low: f64::NEG_INFINITY,
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Zhang et al. 2024 (arXiv 2404.02936), as open-unlearning signs it",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "min_k_plus_plus_40",
        title: "Min-40%++",
        formula: "the same with 0.4",
        low: f64::NEG_INFINITY,
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Zhang et al. 2024, with the k of open-unlearning's TOFU configuration",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "min_k_plus_plus_*",
        title: "Min-*%++",
        formula: "the same with a share of `--min-k`, in percent",
        low: f64::NEG_INFINITY,
        high: f64::INFINITY,
        direction: Direction::Unknown,
        source: "Zhang et al. 2024, as open-unlearning signs it",
        missing: NO_TOKENS,
        ..SHARE
    },
    Metric {
        name: "auc_loss",
        title: "LOSS attack",
        formula: "share of pairs of a forgotten and a never seen sample in which the forgotten one has the lower `loss`, ties counting half",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_zlib",
        title: "ZLib attack",
        formula: "share of pairs of a forgotten and a never seen sample in which the forgotten one has the lower `zlib`, ties counting half",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_min_k_20",
        title: "Min-20% attack",
        formula: "share of pairs of a forgotten and a never seen sample in which the forgotten one has the lower `min_k_20`, ties counting half",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_min_k_40",
        title: "Min-40% attack",
        formula: "share of pairs of a forgotten and a never seen sample in which the forgotten one has the lower `min_k_40`, ties counting half",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_min_k_plus_plus_20",
        title: "Min-20%++ attack",
        formula: "share of pairs of a forgotten and a never seen sample in which the forgotten one has the lower `min_k_plus_plus_20`, ties counting half",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_min_k_plus_plus_40",
        title: "Min-40%++ attack",
        formula: "share of pairs of a forgotten and a never seen sample in which the forgotten one has the lower `min_k_plus_plus_40`, ties counting half",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_min_k_*",
        title: "Min-*% attack",
        formula: "the same with `min_k_*`, for every share of `--min-k`",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "auc_min_k_plus_plus_*",
        title: "Min-*%++ attack",
        formula: "the same with `min_k_plus_plus_*`, for every share of `--min-k`",
        level: Level::Comparison,
        source: MEMBERSHIP,
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "privleak",
        title: "PrivLeak",
        formula: "((1 − AUC) − (1 − AUC of the retrained model)) ÷ (1 − AUC of the retrained model + 1e-10) · 100, with the AUC `auc_min_k_40`",
        low: f64::NEG_INFINITY,
        high: f64::INFINITY,
        direction: Direction::NearZero,
        level: Level::Comparison,
        source: "Shi et al. 2024 (MUSE, arXiv 2407.06460); open-unlearning",
        missing: NO_HOLDOUT,
        ..SHARE
    },
    Metric {
        name: "forget_quality",
        title: "forget quality",
        formula: "p-value of the exact two-sample Kolmogorov–Smirnov test between the `truth_ratio`s of this model and of the retrained one",
        direction: Direction::Better,
        level: Level::Comparison,
        source: "Maini et al. 2024 (TOFU, arXiv 2401.06121); equals scipy's ks_2samp",
        missing: NO_PERTURBED,
        ..SHARE
    },
    Metric {
        name: "model_utility",
        title: "model utility",
        formula: "harmonic mean of `probability`, `rouge_l_recall` and `truth_ratio_retain` of every retain and other set, as far as a set has them",
        direction: Direction::Better,
        level: Level::Comparison,
        source: "TOFU, CLEAR; open-unlearning",
        missing: "no set to keep has one of its terms",
        ..SHARE
    },
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_has_a_name_of_its_own_and_a_description() {
        let names: BTreeSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        let titles: BTreeSet<_> = METRICS.iter().map(|metric| metric.title).collect();
        assert_eq!((names.len(), titles.len()), (METRICS.len(), METRICS.len()));
        for metric in METRICS {
            let plain = metric.name.strip_suffix('*').unwrap_or(metric.name);
            let plain = plain.strip_suffix('.').unwrap_or(plain);
            assert!(
                plain
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'),
                "{}",
                metric.name
            );
            assert!(metric.low < metric.high);
            for text in [metric.formula, metric.source, metric.missing] {
                assert!(!text.is_empty(), "{}", metric.name);
            }
        }
    }

    #[test]
    fn a_name_finds_its_metric_or_its_family() {
        assert_eq!(metric("loss").unwrap().direction, Direction::Unknown);
        assert_eq!(metric("leak_fact.job").unwrap().name, "leak_fact.*");
        assert_eq!(metric("leak_fact").unwrap().name, "leak_fact");
        assert_eq!(metric("min_k_20").unwrap().name, "min_k_20");
        assert_eq!(metric("min_k_10").unwrap().name, "min_k_*");
        assert_eq!(
            metric("min_k_plus_plus_2.5").unwrap().name,
            "min_k_plus_plus_*"
        );
        assert_eq!(metric("auc_min_k_10").unwrap().name, "auc_min_k_*");
        for none in [
            "leak_fact.",
            "accuracy",
            "min_k_",
            "min_k_*",
            "min_k_0",
            "min_k_101",
            "min_k_1e1",
        ] {
            assert!(metric(none).is_none(), "{none}");
        }
        for (name, expected) in [
            ("loss", "loss"),
            ("leak_fact.job", "leaks job"),
            ("min_k_2.5", "Min-2.5%"),
            ("auc_min_k_plus_plus_10", "Min-10%++ attack"),
            ("accuracy", "accuracy"),
        ] {
            assert_eq!(title(name), expected);
        }
    }

    #[test]
    fn what_is_good_depends_on_the_set() {
        let better = |name, forget| metric(name).unwrap().better(forget);
        assert_eq!(better("name_accuracy", true), Better::Lower);
        assert_eq!(better("name_accuracy", false), Better::Higher);
        assert_eq!(better("loss", true), Better::Higher);
        assert_eq!(better("degenerate", true), Better::Lower);
        assert_eq!(better("degenerate", false), Better::Lower);
    }
}
