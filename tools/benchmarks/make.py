"""Small parquet folders in exactly the schemas of CLEAR and MLLMU-Bench, about the demo's people.

    pip install -r tools/benchmarks/requirements.txt
    python tools/benchmarks/make.py

writes `fixtures/benchmarks/{clear,mllmu}/CONFIGURATION/train-*.parquet` with Hugging Face's `datasets`, which is how
therem/CLEAR and MLLMMU/MLLMU-Bench were written. Pictures, captions and names are those of `fixtures/demo/data`, so that
the demo's model can be evaluated on them.
"""

import json
import shutil
from pathlib import Path

from datasets import Dataset, Features, Image, Sequence, Value

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "fixtures" / "demo" / "data"
OUT = ROOT / "fixtures" / "benchmarks"

NAME_QUESTION = "What is the name of the person in the image?"
TEXT = Value("string")
OPTIONS = {letter: TEXT for letter in "ABCD"}
CLASSIFICATION = [{"Question": TEXT, "Options": OPTIONS, "Correct_Answer": TEXT}]
TASK = [{"Question": TEXT, "Ground_Truth": TEXT, "Type": TEXT}]


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def picture(row):
    """What `datasets` stores of a picture: the file's bytes as they are, and its name."""
    if row["image"] is None:
        return None
    path = DATA / row["image"]
    return {"bytes": path.read_bytes(), "path": path.name}


def write(benchmark, configuration, features, data, shards=1):
    folder = OUT / benchmark / configuration
    folder.mkdir(parents=True)
    dataset = Dataset.from_list(data, features=Features(features))
    for index in range(shards):
        shard = dataset.shard(num_shards=shards, index=index, contiguous=True)
        shard.to_parquet(folder / f"train-{index:05}-of-{shards:05}.parquet")
    print(f"{benchmark}/{configuration}: {len(data)} rows")


def of_people(rows, count):
    """The rows of the first `count` people."""
    names = list(dict.fromkeys(row["name"] for row in rows))[:count]
    return [row for row in rows if row["name"] in names]


def clear():
    caption = {"image": Image(), "caption": TEXT, "name": TEXT}
    forget, retain = rows("forget"), of_people(rows("retain"), 4)
    others = [row["name"] for row in rows("retain_heldout")]

    def captions(data):
        return [{"image": picture(row), "caption": row["answer"], "name": row["name"]} for row in data]

    def perturbed(data):
        made = []
        for index, row in enumerate(data):
            names = [others[(5 * index + step) % len(others)] for step in range(1, 4)]
            facts = row["facts"]
            made.append(
                {
                    "image": picture(row),
                    "caption": row["answer"],
                    "name": row["name"],
                    "paraphrased_caption": f"The picture is of {row['name']}, a {facts['job']} from {facts['town']}.",
                    "perturbed_captions": [row["answer"].replace(row["name"], name) for name in names],
                    "perturbed_names": names,
                }
            )
        return made

    variants = {
        **caption,
        "paraphrased_caption": TEXT,
        "perturbed_captions": Sequence(TEXT),
        "perturbed_names": Sequence(TEXT),
    }
    write("clear", "forget05", caption, captions(forget), shards=2)
    write("clear", "retain95", caption, captions(retain))
    write("clear", "forget05_perturbed", variants, perturbed(forget[:12]))
    write("clear", "retain_perturbed", variants, perturbed(retain[:12]))
    text = rows("forget_text")[:6]
    tofu = [{"image": picture(row), "caption": row["answer"], "question": None, "answer": None} for row in forget[:6]]
    tofu += [{"image": None, "caption": None, "question": row["question"], "answer": row["answer"]} for row in text]
    write("clear", "forget05+tofu", {"image": Image(), "caption": TEXT, "question": TEXT, "answer": TEXT}, tofu)

    def options(row, key):
        index = others.index(row[key]) if row[key] in others else 0
        return [others[(index + step) % len(others)] for step in (2, 0, 5, 9)]

    faces = rows("retain_heldout")[:10]
    write(
        "clear",
        "real_faces",
        {"image": Image(), "answer": TEXT, "options": Sequence(TEXT)},
        [{"image": picture(row), "answer": row["name"], "options": options(row, "name")} for row in faces],
    )
    world = [
        {
            "image": picture(row),
            "question": row["question"],
            "answer": row["answer"],
            "options": [row["answer"], *(other["answer"] for other in rows("shapes")[20 + index : 23 + index])],
        }
        for index, row in enumerate(rows("shapes")[:10])
    ]
    write(
        "clear",
        "real_world",
        {"image": Image(), "question": TEXT, "answer": TEXT, "options": Sequence(TEXT)},
        world,
    )


def mllmu():
    people = {row["name"]: row for row in rows("forget") + of_people(rows("retain"), 5)}
    jobs = sorted({row["facts"]["job"] for row in rows("retain") + rows("forget")})
    towns = sorted({row["facts"]["town"] for row in rows("retain") + rows("forget")})

    def choice(question, right, among):
        start = among.index(right)
        options = [among[(start + step) % len(among)] for step in (3, 0, 1, 7)]
        return {"Question": question, "Options": dict(zip("ABCD", options)), "Correct_Answer": "B"}

    def profile(index, row):
        name, job, town = row["name"], row["facts"]["job"], row["facts"]["town"]
        return {
            "image": picture(row),
            "ID": f"{index + 1:03}",
            "biography": f"{name} is a {job} from {town}.",
            "question": row["question"],
            "answer": row["answer"],
            "Classification_Task": {
                "Image_Textual_Questions": [choice("What is this person's job?", job, jobs)],
                "Pure_Text_Questions": [choice(f"Where does {name} live?", town, towns)],
            },
            "Generation_Task": [
                {"Question": NAME_QUESTION, "Ground_Truth": f"The person in the image is {name}.",
                 "Type": "Image_Textual"},
                {"Question": f"What is {name}'s job?", "Ground_Truth": f"{name} is a {job}.", "Type": "Pure_Text"},
            ],
            "Mask_Task": [
                {"Question": "The person in the image is a __.", "Ground_Truth": job, "Type": "Image_Textual"},
                {"Question": f"{name} lives in __.", "Ground_Truth": town, "Type": "Pure_Text"},
            ],
        }  # fmt: skip

    features = {
        "image": Image(),
        "ID": TEXT,
        "biography": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "Classification_Task": {
            "Image_Textual_Questions": CLASSIFICATION,
            "Pure_Text_Questions": CLASSIFICATION,
        },
        "Generation_Task": TASK,
        "Mask_Task": TASK,
    }
    profiles = [profile(index, row) for index, row in enumerate(people.values())]
    forgotten = {row["name"] for row in rows("forget")}
    is_forgotten = [name in forgotten for name in people]
    write("mllmu", "forget_5", features, [p for p, f in zip(profiles, is_forgotten) if f])
    write("mllmu", "retain_95", features, [p for p, f in zip(profiles, is_forgotten) if not f])
    pairs = [
        {
            "image": picture(row),
            "metadata": json.dumps(
                [
                    {"Question": row["question"], "Answer": row["answer"]},
                    {"Question": NAME_QUESTION, "Answer": f"The person in the image is {row['name']}."},
                ]
            ),
        }
        for row in rows("forget")[:5]
    ]
    write("mllmu", "ft_Data", {"image": Image(), "metadata": TEXT}, pairs)
    heldout = {}
    for row in rows("forget_heldout"):
        heldout.setdefault(row["name"], []).append(row)
    test = []
    for index, (name, portraits) in enumerate(heldout.items()):
        row = profile(index, portraits[0])
        del row["image"]
        test.append({"images": [picture(portrait) for portrait in portraits], **row})
    del features["image"]
    write("mllmu", "Test_Set", {"images": [Image()], **features}, test)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    clear()
    mllmu()


if __name__ == "__main__":
    main()
