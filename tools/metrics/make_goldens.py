"""Reference values of the text metrics, from other people's implementations.

    pip install -r tools/metrics/requirements.txt
    python tools/metrics/make_goldens.py            # CPython 3.11, whose texts the words come from

writes to fixtures/metrics/:
    stems.json   word -> stem, by NLTK's PorterStemmer (default mode)
    rouge.json   text pairs -> ROUGE-1, 2, L by Google's rouge-score, without and with stemming
    names.json   answer, name -> found, by Knowledge Vector Weakening's rule
    seq_rep.json text -> seq-rep-4 by Welleck et al.'s formula on NLTK's n-grams

Same versions, same bytes: the only randomness is `random.Random` with a fixed seed.
"""

import json
import platform
import random
import re
from importlib.metadata import version
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from nltk.util import ngrams
from pydoc_data.topics import topics
from rouge_score.rouge_scorer import RougeScorer

OUT = Path(__file__).resolve().parents[2] / "fixtures" / "metrics"
VERSIONS = {
    "python": platform.python_version(),
    "nltk": version("nltk"),
    "rouge-score": version("rouge-score"),
}
TEXT = "\n".join(topics[key] for key in sorted(topics))

# Every suffix that a step of the stemmer looks for, and a few that it only seems to.
SUFFIXES = """s es ss sses ies ied ed eed ing y ly ational tional enci anci ence ance izer bli abli
    alli entli eli ousli ization ation ator alism iveness fulness ousness aliti iviti biliti fulli
    logi ogi icate ative alize iciti ical ful ness al er ic able ible ant ement ment ent ion sion
    tion ou ism ate iti ous ive ize e le ll lle l bling bled ating ated izing ized lling lled ssing
    zzed pping nned edly ingly ably ibly ally fully ology ologies""".split()
STEMS = """a b e y ab ba ay ya by fly tr tree toy syzyg oat troubl priv orr happ enjo hop fil fail
    fall hiss fizz tann roll control sens oper form electr geo theo archaeo vow box snow tax pay
    spy cr d 7 1990 x2 mp3 yy yyy ayay uy quay""".split()
IRREGULAR = """sky skies dying lying tying news innings inning outings outing cannings canning howe
    proceed exceed succeed die dies died lie lies tie ties""".split()


def words(rng):
    found = set(re.findall(r"[a-z0-9]+", TEXT.lower()))
    found |= {stem + suffix for stem in STEMS for suffix in SUFFIXES}
    found |= set(IRREGULAR)
    for _ in range(1500):
        # Few letters, so that vowels, y, doubled consonants and suffixes are frequent.
        found.add("".join(rng.choices("aeiouylstzngdbc7", k=rng.randint(1, 9))))
    return sorted(found)


FIRST = "Maria Jürgen Zoë Anne-Marie José O'Brien Łukasz İpek Kim Владимир 김민수 李明".split()
LAST = "Rossi Müller Díaz Smith Nguyễn Åström van-Dyck Şahin Park Иванова ß Ünal".split()
JOBS = "baker,piano tuner,data-scientist,Café owner,nurse,1st violinist,R&D engineer".split(",")
TOWNS = "York,São Paulo,İzmir,Zürich,New Delhi,St. John's,서울,東京".split(",")
ODD = [
    "", " ", "\n\t", ".", "?!…", "—", "'", "a", "I", "7", "ﬁ", "K", "\u212a", "\u212aelvin waters",
    "\u0130stanbul", "STRASSE straße", "naïve café", "１２３ full-width", "a\u0301", "\u200bzero",
    "x" * 300, "the " * 60, "!!!!!!!!", "snake_case_word", "a\x00b", "A.B.C.", "3.14 1,000,000",
    "dying dies died lying", "relational conditional rational", "👩‍🍳 baker", "yyyy yyy", "ʼn Ǆ",
]


def caption(rng):
    name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    return rng.choice([
        f"The picture shows {name}, a {rng.choice(JOBS)} from {rng.choice(TOWNS)}.",
        f"{name} is smiling; {name} works as a {rng.choice(JOBS)}!",
        f"This is {name}. They were living happily in {rng.choice(TOWNS)}, {rng.randint(1, 2030)}.",
        f"A portrait of a person ({rng.choice(JOBS)}) standing before generalizations of houses",
        f"{name}",
    ])


def perturb(rng, text):
    parts = text.split(" ")
    for _ in range(rng.randint(0, 6)):
        i = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            parts[i] = ""
        elif kind == 1:
            parts[i] = parts[i].upper()
        elif kind == 2:
            parts[i] += rng.choice(["s", "ing", "ed", "'s", ",", " indeed"])
        elif kind == 3:
            parts.insert(i, rng.choice(parts))
        else:
            j = rng.randrange(len(parts))
            parts[i], parts[j] = parts[j], parts[i]
    return " ".join(parts)


def text_pairs(rng):
    pairs = [(a, b) for a in ODD for b in (a, rng.choice(ODD), caption(rng))]
    pairs += [(caption(rng), a) for a in ODD]
    for _ in range(120):
        text = caption(rng)
        pairs.append((text, perturb(rng, text)))
        pairs.append((text, caption(rng)))
    sentences = re.findall(r"[A-Z][^.]{30,300}\.", TEXT)
    for _ in range(100):
        text = rng.choice(sentences)
        pairs.append((text, perturb(rng, text)))
        pairs.append((text, rng.choice(sentences)))
    return pairs


def rouge(pairs):
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorers = {"plain": RougeScorer(kinds), "stemmed": RougeScorer(kinds, use_stemmer=True)}
    return [
        {
            "reference": reference,
            "prediction": prediction,
            **{
                mode: {
                    kind: [score.precision, score.recall, score.fmeasure]
                    for kind, score in scorer.score(reference, prediction).items()
                }
                for mode, scorer in scorers.items()
            },
        }
        for reference, prediction in pairs
    ]


def names(rng):
    def strip(text):
        return re.sub(r"[^a-zA-Z0-9]", "", text).lower()

    rows = []
    for _ in range(200):
        name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        answer = rng.choice([caption(rng), f"It is {name.upper()}.", f"x{strip(name)}y", name])
        # A name without any of [a-zA-Z0-9] is in every answer by this rule: not a reference.
        if strip(name):
            rows.append({"answer": answer, "name": name, "found": strip(name) in strip(answer)})
    return rows


def seq_rep(rng):
    rows = []
    for _ in range(100):
        # Lower-case ASCII words and single spaces: there is only one way to split these.
        text = " ".join(rng.choices("a red hat and blue hats".split(), k=rng.randint(4, 40)))
        grams = list(ngrams(text.split(" "), 4))
        rows.append({"text": text, "seq_rep_4": 1.0 - len(set(grams)) / len(grams)})
    return rows


def write(file, key, value):
    OUT.mkdir(parents=True, exist_ok=True)
    if isinstance(value, dict):
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
        opened, closed = "{", "}"
    else:
        lines, opened, closed = [json.dumps(row) for row in value], "[", "]"
    body = ",\n".join(lines)
    text = f'{{"versions": {json.dumps(VERSIONS)},\n"{key}": {opened}\n{body}\n{closed}}}\n'
    json.loads(text)
    (OUT / file).write_text(text, encoding="ascii", newline="\n")
    print(f"{file}: {len(value)}")


def main():
    stemmer = PorterStemmer()
    write("stems.json", "stems", {w: stemmer.stem(w) for w in words(random.Random(1))})
    write("rouge.json", "pairs", rouge(text_pairs(random.Random(2))))
    write("names.json", "checks", names(random.Random(3)))
    write("seq_rep.json", "texts", seq_rep(random.Random(4)))


if __name__ == "__main__":
    main()
