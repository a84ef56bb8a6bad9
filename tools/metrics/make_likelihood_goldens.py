"""Reference values of the metrics that are made of likelihoods and of two sets, and of BLEU.

    pip install -r tools/metrics/requirements.txt
    python tools/metrics/make_likelihood_goldens.py

writes to fixtures/metrics/:
    bleu.json          text pairs -> BLEU by NLTK's sentence_bleu, smoothing method 1, as MLLMU-Bench calls it
    likelihood.json    logits and labels -> per-sample scores by open-unlearning's formulas
    truth_ratio.json   losses -> truth ratio, both aggregations, normalized probability
    distribution.json  two samples -> ROC AUC by scikit-learn, exact Kolmogorov-Smirnov test by scipy, PrivLeak
    bootstrap.json     scores -> percentile interval by numpy over the same draws (SplitMix64, spelled out here)
    harmonic_mean.json values -> harmonic mean by scipy
    zlib.json          texts -> length by Python's zlib at level 6

The formulas of open-unlearning (locuslab/open-unlearning, src/evals/metrics/{memorization,privacy,utils}.py and
mia/{loss,min_k,min_k_plus_plus,zlib}.py, read 2026-11) are written here in numpy float64 from its source; it computes
them in torch float32.
"""

import json
import random
import zlib
from importlib.metadata import version

import numpy as np
from make_goldens import OUT, text_pairs
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

VERSIONS = {name: version(name) for name in ("nltk", "numpy", "scipy", "scikit-learn")}


def bleu(rng):
    smoothing = SmoothingFunction().method1
    rows = []
    for reference, prediction in text_pairs(rng):
        # Python splits at some control characters that Unicode does not call white space.
        if any(0x1C <= ord(c) <= 0x1F for c in reference + prediction):
            continue
        value = sentence_bleu([reference.split()], prediction.split(), smoothing_function=smoothing)
        rows.append({"reference": reference, "prediction": prediction, "bleu": float(value)})
    return rows


def min_k(values, k):
    count = max(1, int(len(values) * k))
    return float(-np.mean(np.sort(values)[:count]))


def likelihood(rng):
    rows = []
    for _ in range(60):
        length, vocabulary = int(rng.integers(1, 24)), int(rng.integers(5, 40))
        logits = (rng.normal(size=(length, vocabulary)) * rng.choice([0.5, 2.0, 8.0])).astype(np.float32)
        labels = rng.integers(0, vocabulary, size=length)
        known = rng.random(length) < 0.7
        labels = np.where(known, logits.argmax(-1), labels)
        wide = logits.astype(np.float64)
        log_probs = wide - wide.max(-1, keepdims=True)
        log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
        token = log_probs[np.arange(length), labels]
        mu = (np.exp(log_probs) * log_probs).sum(-1)
        sigma = np.clip((np.exp(log_probs) * log_probs**2).sum(-1) - mu**2, 1e-6, None)
        normalized = (token - mu) / np.sqrt(sigma)
        hits = log_probs.argmax(-1) == labels
        k = next((k for k in range(length) if hits[k:].all()), length - 1)
        rows.append(
            {
                "logits": logits.tolist(),
                "labels": labels.tolist(),
                "loss": float(-token.mean()),
                "probability": float(np.exp(token.mean())),
                "exact_memorization": float(hits.mean()),
                "extraction_strength": 1 - k / length,
                "last_is_hit": bool(hits[-1]),
                "min_k_20": min_k(token, 0.2),
                "min_k_40": min_k(token, 0.4),
                "min_k_plus_plus_20": min_k(normalized, 0.2),
                "min_k_plus_plus_40": min_k(normalized, 0.4),
            }
        )
    return rows


def truth_ratio(rng):
    rows = []
    for _ in range(60):
        right = float(rng.gamma(2.0, 0.5))
        wrong = rng.gamma(2.0, 0.8, size=int(rng.integers(1, 6)))
        # memorization.py: wrong and right probabilities of the mean losses, 1e-10 added to the divisor.
        ratio = np.exp(-wrong.mean()) / (np.exp(-right) + 1e-10)
        probabilities = np.exp(-wrong)
        rows.append(
            {
                "right": right,
                "wrong": wrong.tolist(),
                "truth_ratio": float(ratio),
                "closer_to_1_better": float(np.minimum(ratio, 1 / (ratio + 1e-10))),
                "true_better": float(np.maximum(0, 1 - ratio)),
                "probability_w_options": float(np.exp(-right) / (np.exp(-right) + probabilities.sum() + 1e-10)),
            }
        )
    return rows


def distribution(rng):
    rows = []
    for n, m in [(1, 1), (1, 7), (6, 6), (9, 9), (24, 24), (24, 10), (40, 400), (188, 188), (50, 51)]:
        for shift in (0.0, 0.3, 3.0):
            for decimals in (1, 9):
                forget = rng.normal(size=n).round(decimals)
                holdout = (rng.normal(size=m) + shift).round(decimals)
                labels = np.r_[np.zeros(n), np.ones(m)]
                auc = float(roc_auc_score(labels, np.r_[forget, holdout]))
                test = ks_2samp(forget, holdout, method="exact")
                reference = float(rng.random() * 0.98 + 0.01)
                score, ref = 1 - auc, 1 - reference
                rows.append(
                    {
                        "forget": forget.tolist(),
                        "holdout": holdout.tolist(),
                        "auc": auc,
                        "ks": float(test.statistic),
                        "p_value": float(test.pvalue),
                        "reference_auc": reference,
                        "privleak": (score - ref) / (ref + 1e-10) * 100,
                    }
                )
    return rows


class SplitMix64:
    """Steele, Lea, Flood 2014."""

    MASK = (1 << 64) - 1

    def __init__(self, seed):
        self.state = seed

    def below(self, bound):
        self.state = (self.state + 0x9E3779B97F4A7C15) & self.MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.MASK
        return (z ^ (z >> 31)) % bound


def bootstrap(rng):
    rows = []
    for n in (2, 5, 24, 60):
        for kind in ("share", "score"):
            values = rng.random(n) if kind == "score" else (rng.random(n) < 0.3).astype(float)
            values[0] = 1 - values[-1]  # never all the same
            draws = SplitMix64(0)
            means = [np.mean([values[draws.below(n)] for _ in range(n)]) for _ in range(1000)]
            low, high = np.quantile(means, [0.025, 0.975])
            rows.append({"values": values.tolist(), "low": float(low), "high": float(high)})
    return rows


def zlib_lengths(rng):
    texts = sorted({text for pair in text_pairs(rng) for text in pair if text})
    return [{"text": text, "length": len(zlib.compress(text.encode("utf-8")))} for text in texts]


def utility(rng):
    rows = []
    for _ in range(20):
        values = rng.random(int(rng.integers(1, 10)))
        rows.append({"values": values.tolist(), "harmonic_mean": float(hmean(values))})
    return rows


def write(file, rows):
    body = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"versions": {json.dumps(VERSIONS)},\n"rows": [\n{body}\n]}}\n'
    json.loads(text)
    (OUT / file).write_text(text, encoding="ascii", newline="\n")
    print(f"{file}: {len(rows)}")


def main():
    write("bleu.json", bleu(random.Random(5)))
    write("likelihood.json", likelihood(np.random.default_rng(6)))
    write("truth_ratio.json", truth_ratio(np.random.default_rng(7)))
    write("distribution.json", distribution(np.random.default_rng(8)))
    write("bootstrap.json", bootstrap(np.random.default_rng(9)))
    write("zlib.json", zlib_lengths(random.Random(10)))
    write("harmonic_mean.json", utility(np.random.default_rng(11)))


if __name__ == "__main__":
    main()
