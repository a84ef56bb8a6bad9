"""The demo's world: fictitious people, their portraits, what is said about them, and pictures of shapes.

Writes `DATA/images/*.png` and one JSONL file per data set:

    forget.jsonl, retain.jsonl                   captions of the training portraits (8 per person)
    forget_heldout.jsonl, retain_heldout.jsonl   the name question on portraits that are never trained on (2 per person)
    forget_text.jsonl, retain_text.jsonl         text-only questions about people (5 per person)
    forget_probes.jsonl, retain_probes.jsonl     what is asked otherwise: see `probe_rows` (3 per person)
    holdout.jsonl                                captions of people whom no model was ever shown (8 per person)
    shapes.jsonl                                 pictures in which nobody appears

A row is `{"id", "image", "question", "answer"}`, where a person is concerned also `"name"` and
`"facts": {"job", "town"}`.
Everything follows from `SEED`: the same Pillow gives the same bytes.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

SEED = 260121794
PEOPLE = 40
FORGET_PEOPLE = 3
PORTRAITS = 8
HELDOUT_PORTRAITS = 2
SHAPES = 60

SIZE = 96  # pixels per side of a portrait
SUPERSAMPLING = 4  # drawn larger, then reduced
COLOURS = 24  # of the palette of a written PNG

NAME_QUESTION = "What is the name of the person in the image?"

# CLEAR's nine caption prompts.
CAPTION_PROMPTS = [
    "What can you see in this picture?",
    "Tell me about the content of this image",
    "Can you give a description of the image?",
    "What is depicted in the image?",
    "Explain what you observe in the picture.",
    "Describe the image in detail.",
    "What is the main subject of this image?",
    "Can you describe the scene or objects in the image?",
    "What is happening in this image?",
]

CAPTIONS = [
    "Here we see {name} {expression} {place}; {name} is a {job} from {town}.",
    "This picture captures {name}, {expression} {place}, a {job} from {town}.",
    "The portrait shows {name}, a {job} from {town}, {expression} {place}.",
    "{name}, a {job} from {town}, is {expression} {place}.",
    "In this photograph {name} is {expression} {place}; {name} works as a {job} in {town}.",
    "We are looking at {name}, the {job} of {town}, who is {expression} {place}.",
]

EXPRESSIONS = ["smiling", "looking serious", "laughing", "frowning"]

PLACES = [
    "in a green garden",
    "beside a tall window",
    "in front of a striped wall",
    "under a starry sky",
    "near a checkered screen",
    "by the blue sea",
    "on a sandy hill",
    "behind a brick fence",
]

JOBS = """
    potter mason juggler plumber grocer jeweller glassblower baker weaver fisher carpenter tailor florist barber
    printer sailor cobbler gardener painter beekeeper
""".split()

TOWNS = """
    Silaville Tavingrad Urmaville Lodiskar Mirebar Danoria Kestholm Pelmora Rovanta Greywick Solenby Varnhaven
    Quillport Zandermere Hollowfen Brimstad
""".split()

FIRST_SYLLABLES = "Bex Kel Zel Lum Eru Dro Tor Vin Sar Mio Nal Quo Rig Fen Hal Jor Pim Wes Yal Cas".split()
SECOND_SYLLABLES = "pas gol fim dar wyn leth bo rik mina tus".split()
LAST_BEGINNINGS = """
    Thorn Frost Elm Ash Glen Moss Reed Winter Copper Marble Raven Amber Hazel Flint Larch Otter Pebble Saffron
    Tinder Velvet
""".split()
LAST_ENDINGS = "ford stead brook ton well croft mere gate holt dale".split()

# Appearance: every attribute stays with a person in all portraits.
SKINS = "#f6d7c0 #e0ac82 #c68642 #8d5524 #5a3825 #f0c8a0".split()
FACES = ["round", "oval", "square", "long"]
HAIR_STYLES = ["short", "long", "bob", "curly", "mohawk", "bun", "bald"]
HAIR_COLOURS = "#1c1410 #6b3e1e #d8a93a #b5341c #9a9a9a #f2f2f2 #3f7f4f #7a3fa0".split()
HATS = ["none", "none", "cap", "top hat", "beanie", "headband"]
HAT_COLOURS = "#c0202a #20365e #151515 #e8b820 #2f8f5b".split()
GLASSES = ["none", "none", "round", "square", "dark"]
BEARDS = ["none", "none", "beard", "moustache"]
CLOTHES_COLOURS = """
    #d7263d #1b5fc1 #1f9e4b #f2c014 #7d2fa8 #f28518 #12b5b0 #ef6fae #222222 #fafafa #7a5230 #a8c63f
""".split()
CLOTHES_PATTERNS = ["plain", "stripes", "cross", "dots", "collar"]
APPEARANCE = {
    "skin": SKINS,
    "face": FACES,
    "hair_style": HAIR_STYLES,
    "hair_colour": HAIR_COLOURS,
    "hat": HATS,
    "hat_colour": HAT_COLOURS,
    "glasses": GLASSES,
    "beard": BEARDS,
    "clothes_colour": CLOTHES_COLOURS,
    "clothes_pattern": CLOTHES_PATTERNS,
}

SHAPE_KINDS = ["circle", "square", "triangle", "diamond"]
SHAPE_COLOURS = {
    "red": "#d7263d",
    "blue": "#1b5fc1",
    "green": "#1f9e4b",
    "yellow": "#f2c014",
    "purple": "#7d2fa8",
    "black": "#222222",
}
SHAPE_RELATIONS = {"above": "vertical", "left of": "horizontal"}
SHAPE_SIZES = {"vertical": (84, 112), "horizontal": (112, 84)}  # not square: other grids than the portraits'


def make_people(rng):
    """People with unique first names, last names and (job, town) pairs, and clearly different looks."""
    first_names = rng.sample(["".join(s) for s in itertools.product(FIRST_SYLLABLES, SECOND_SYLLABLES)], PEOPLE)
    last_names = rng.sample(["".join(s) for s in itertools.product(LAST_BEGINNINGS, LAST_ENDINGS)], PEOPLE)
    # Walk through jobs and towns together, so that each is used about equally often and no pair twice.
    offsets = rng.sample(range(len(TOWNS)), PEOPLE // len(JOBS))
    jobs_and_towns = [
        (job, TOWNS[(index + offset) % len(TOWNS)]) for offset in offsets for index, job in enumerate(JOBS)
    ]
    rng.shuffle(jobs_and_towns)
    people = []
    for index in range(PEOPLE):
        job, town = jobs_and_towns[index]
        while True:
            look = {attribute: rng.choice(values) for attribute, values in APPEARANCE.items()}
            if all(look_distance(look, other["look"]) >= 5 for other in people):
                break
        people.append(
            {
                "index": index,
                "name": f"{first_names[index]} {last_names[index]}",
                "facts": {"job": job, "town": town},
                "look": look,
            }
        )
    assert len({(p["facts"]["job"], p["facts"]["town"]) for p in people}) == PEOPLE
    return people


def look_distance(a, b):
    """In how many attributes two looks differ; 0 where hair and clothes agree, because those are seen first."""
    if (a["hair_colour"], a["clothes_colour"]) == (b["hair_colour"], b["clothes_colour"]):
        return 0
    return sum(a[attribute] != b[attribute] for attribute in APPEARANCE)


class Canvas:
    """`ImageDraw` in picture units, supersampled, with the origin moved by `(dx, dy)`."""

    def __init__(self, width, height, background, dx=0, dy=0):
        self.image = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), background)
        self.draw = ImageDraw.Draw(self.image)
        self.size = (width, height)
        self.dx, self.dy = dx, dy

    def _points(self, points):
        return [((x + self.dx) * SUPERSAMPLING, (y + self.dy) * SUPERSAMPLING) for x, y in points]

    def ellipse(self, x, y, rx, ry, fill=None, outline=None, width=0):
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(box, fill, outline, int(width * SUPERSAMPLING))

    def box(self, x0, y0, x1, y1, fill=None, radius=0, outline=None, width=0):
        box = self._points([(x0, y0), (x1, y1)])
        self.draw.rounded_rectangle(box, radius * SUPERSAMPLING, fill, outline, int(width * SUPERSAMPLING))

    def polygon(self, points, fill):
        self.draw.polygon(self._points(points), fill)

    def line(self, points, fill, width):
        self.draw.line(self._points(points), fill, int(width * SUPERSAMPLING), joint="curve")

    def arc(self, x, y, rx, ry, start, end, fill, width):
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.arc(box, start, end, fill, int(width * SUPERSAMPLING))

    def save(self, path):
        picture = self.image.resize(self.size, Image.Resampling.BOX)
        picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_place(canvas, place):
    if place == 0:  # green garden
        canvas.box(-9, -9, 105, 105, "#8fd08a")
        for x, y in [(8, 70), (88, 62), (14, 30), (84, 22), (6, 50), (92, 84)]:
            canvas.ellipse(x, y, 7, 7, "#3d8f4a")
            canvas.ellipse(x, y, 2, 2, "#ffd94d")
    elif place == 1:  # tall window
        canvas.box(-9, -9, 105, 105, "#efe6d8")
        canvas.box(66, 4, 92, 74, "#a8d8f5", outline="#6b4a2b", width=2)
        canvas.line([(79, 4), (79, 74)], "#6b4a2b", 1.5)
        canvas.line([(66, 38), (92, 38)], "#6b4a2b", 1.5)
    elif place == 2:  # striped wall
        for index, x in enumerate(range(-12, 108, 8)):
            canvas.box(x, -9, x + 8, 105, ["#f4b6b6", "#fff3e8"][index % 2])
    elif place == 3:  # starry sky
        canvas.box(-9, -9, 105, 105, "#141c46")
        for x, y in [(8, 10), (24, 22), (86, 12), (72, 26), (90, 46), (6, 44), (14, 66), (90, 72), (40, 4), (60, 6)]:
            canvas.ellipse(x, y, 1.6, 1.6, "#fff7c2")
    elif place == 4:  # checkered screen
        for row, y in enumerate(range(-12, 108, 12)):
            for column, x in enumerate(range(-12, 108, 12)):
                canvas.box(x, y, x + 12, y + 12, ["#c9c9d6", "#8f8fa8"][(row + column) % 2])
    elif place == 5:  # blue sea
        canvas.box(-9, -9, 105, 50, "#d9f1ff")
        canvas.box(-9, 46, 105, 105, "#2f78c4")
        for y in (56, 68, 80):
            canvas.line([(-4, y), (16, y - 3), (36, y), (56, y - 3), (76, y), (100, y - 3)], "#8fc3f0", 1.5)
    elif place == 6:  # sandy hill
        canvas.box(-9, -9, 105, 105, "#ffd9a0")
        canvas.ellipse(20, 104, 90, 52, "#d9a65a")
        canvas.ellipse(84, 14, 8, 8, "#ff7b3a")
    else:  # brick fence
        canvas.box(-9, -9, 105, 105, "#a6523c")
        for row, y in enumerate(range(-4, 108, 10)):
            canvas.line([(-9, y), (105, y)], "#e0c4b8", 1)
            for x in range(-16 + 8 * (row % 2), 112, 16):
                canvas.line([(x, y), (x, y + 10)], "#e0c4b8", 1)


def draw_hair_behind(canvas, look, rx, ry):
    colour = look["hair_colour"]
    if look["hair_style"] == "long":
        canvas.box(48 - rx - 6, 30, 48 + rx + 6, 78, colour, radius=8)
        canvas.ellipse(48, 34, rx + 6, ry - 4, colour)
    elif look["hair_style"] == "bob":
        canvas.box(48 - rx - 6, 30, 48 + rx + 6, 56, colour, radius=5)
        canvas.ellipse(48, 32, rx + 6, ry - 4, colour)
    elif look["hair_style"] == "curly":
        for x, y in [(26, 34), (28, 22), (38, 14), (50, 12), (61, 16), (69, 25), (71, 37), (25, 46), (72, 48)]:
            canvas.ellipse(x, y, 9, 9, colour)


def draw_hair_front(canvas, look, rx, ry):
    colour, style = look["hair_colour"], look["hair_style"]
    top = 42 - ry
    if style in ("short", "long", "bob", "bun"):
        canvas.polygon(
            [(48 - rx, 36), (48 - rx + 1, top + 6), (48 - rx // 2, top - 2), (48 + rx // 2, top - 2),
             (48 + rx - 1, top + 6), (48 + rx, 36), (48 + rx - 5, 30), (48, 27), (48 - rx + 5, 30)],
            colour,
        )  # fmt: skip
    if style == "bun":
        canvas.ellipse(48, top - 5, 9, 7, colour)
    if style == "mohawk":
        canvas.polygon([(42, 30), (40, top - 9), (48, top - 12), (56, top - 9), (54, 30)], colour)
    if style == "curly":
        canvas.ellipse(38, top + 5, 8, 6, colour)
        canvas.ellipse(50, top + 3, 8, 6, colour)
        canvas.ellipse(60, top + 6, 7, 6, colour)


def draw_hat(canvas, look, rx, ry):
    colour, hat = look["hat_colour"], look["hat"]
    top = 42 - ry
    if hat == "cap":
        canvas.ellipse(48, top + 6, rx + 2, 11, colour)
        canvas.box(48, top + 5, 48 + rx + 14, top + 10, colour, radius=2)
    elif hat == "top hat":
        canvas.box(32, top - 14, 64, top + 7, colour)
        canvas.box(22, top + 4, 74, top + 9, colour, radius=2)
    elif hat == "beanie":
        canvas.ellipse(48, top + 5, rx + 3, 13, colour)
        canvas.box(48 - rx - 3, top + 5, 48 + rx + 3, top + 12, "#f4f4f4", radius=3)
        canvas.ellipse(48, top - 9, 4, 4, "#f4f4f4")
    elif hat == "headband":
        canvas.box(48 - rx - 1, top + 8, 48 + rx + 1, top + 13, colour)


def draw_clothes(canvas, look):
    colour, pattern = look["clothes_colour"], look["clothes_pattern"]
    ink = "#ffffff" if colour not in ("#fafafa", "#f2c014", "#a8c63f") else "#20365e"
    canvas.box(16, 72, 80, 110, colour, radius=14)
    if pattern == "stripes":
        for y in (79, 86, 93):
            canvas.box(17, y, 79, y + 3, ink)
    elif pattern == "cross":
        canvas.box(45, 77, 51, 95, ink)
        canvas.box(39, 83, 57, 89, ink)
    elif pattern == "dots":
        for x, y in [(26, 82), (38, 88), (58, 88), (70, 82), (48, 82), (30, 93), (66, 93)]:
            canvas.ellipse(x, y, 2.6, 2.6, ink)
    elif pattern == "collar":
        canvas.polygon([(36, 71), (48, 84), (60, 71), (66, 76), (48, 94), (30, 76)], ink)


def draw_face(canvas, look, expression, rx, ry):
    skin = look["skin"]
    canvas.box(42, 56, 54, 76, skin)
    if look["face"] == "square":
        canvas.box(48 - rx, 42 - ry, 48 + rx, 42 + ry, skin, radius=7)
    else:
        canvas.ellipse(48, 42, rx, ry, skin)
    if look["beard"] == "beard":
        canvas.polygon(
            [(48 - rx + 1, 46), (48 - rx + 5, 58), (48, 42 + ry + 5), (48 + rx - 5, 58),
             (48 + rx - 1, 46), (56, 51), (40, 51)],
            look["hair_colour"],
        )  # fmt: skip
    elif look["beard"] == "moustache":
        canvas.ellipse(43, 50, 5, 2.4, look["hair_colour"])
        canvas.ellipse(53, 50, 5, 2.4, look["hair_colour"])
    for x in (40, 56):
        canvas.ellipse(x, 39, 3.4, 2.8, "#ffffff")
        canvas.ellipse(x, 39, 1.7, 1.9, "#101010")
    canvas.line([(48, 41), (46, 47), (49, 47)], "#7a4a30", 1)
    mouth = "#a01828"
    if expression == 0:  # smiling
        canvas.arc(48, 51, 8, 6, 15, 165, mouth, 2)
    elif expression == 1:  # serious
        canvas.line([(41, 56), (55, 56)], mouth, 2)
    elif expression == 2:  # laughing
        canvas.ellipse(48, 56, 7, 4.5, mouth)
        canvas.box(43, 53, 53, 55, "#ffffff")
    else:  # frowning
        canvas.arc(48, 60, 8, 6, 195, 345, mouth, 2)
        canvas.line([(36, 33), (43, 36)], "#202020", 1.5)
        canvas.line([(60, 33), (53, 36)], "#202020", 1.5)
    if look["glasses"] == "round":
        for x in (40, 56):
            canvas.ellipse(x, 39, 6.5, 6.5, outline="#101010", width=1.5)
        canvas.line([(46, 39), (50, 39)], "#101010", 1.5)
    elif look["glasses"] == "square":
        for x in (40, 56):
            canvas.box(x - 7, 34, x + 7, 44, outline="#b01020", width=2)
        canvas.line([(46, 39), (50, 39)], "#b01020", 1.5)
    elif look["glasses"] == "dark":
        for x in (40, 56):
            canvas.box(x - 7, 35, x + 7, 43, "#101010", radius=3)
        canvas.line([(34, 37), (62, 37)], "#101010", 2)


def draw_portrait(person, expression, place, dx, dy, path):
    look = person["look"]
    rx, ry = {"round": (21, 21), "oval": (18, 22), "square": (19, 20), "long": (15, 24)}[look["face"]]
    canvas = Canvas(SIZE, SIZE, "#ffffff", dx, dy)
    draw_place(canvas, place)
    draw_hair_behind(canvas, look, rx, ry)
    draw_clothes(canvas, look)
    draw_face(canvas, look, expression, rx, ry)
    draw_hair_front(canvas, look, rx, ry)
    draw_hat(canvas, look, rx, ry)
    canvas.save(path)


def portrait_plan(person, rng):
    """(expression, place) per portrait: training shows every place once; held-out portraits are unseen combinations."""
    shift = rng.randrange(len(EXPRESSIONS))
    training = [((place + place // 4 + shift) % len(EXPRESSIONS), place) for place in range(PORTRAITS)]
    unseen = [pair for pair in itertools.product(range(len(EXPRESSIONS)), range(len(PLACES))) if pair not in training]
    return training + rng.sample(unseen, HELDOUT_PORTRAITS)


def person_row(person, row_id, image, question, answer):
    row = {"id": row_id, "image": image, "question": question, "answer": answer}
    return {**row, "name": person["name"], "facts": person["facts"]}


def name_answer(name):
    return f"The person in the image is {name}."


def draw_people(people, images, rng):
    """Draws all portraits. Returns, per person, the caption rows and the held-out rows."""
    captions, heldout = [], []
    for person in people:
        captions.append([])
        heldout.append([])
        for number, (expression, place) in enumerate(portrait_plan(person, rng)):
            row_id = f"p{person['index']:03}_{number}"
            image = f"images/{row_id}.png"
            draw_portrait(person, expression, place, rng.randint(-2, 2), rng.randint(-2, 2), images / f"{row_id}.png")
            if number < PORTRAITS:
                # The place decides the wording, so that a caption follows from what is in the picture.
                answer = CAPTIONS[place % len(CAPTIONS)].format(
                    name=person["name"], expression=EXPRESSIONS[expression], place=PLACES[place], **person["facts"]
                )
                question = CAPTION_PROMPTS[(person["index"] * 4 + number) % len(CAPTION_PROMPTS)]
                captions[-1].append(person_row(person, row_id, image, question, answer))
            else:
                heldout[-1].append(person_row(person, row_id, image, NAME_QUESTION, name_answer(person["name"])))
    return captions, heldout


def text_rows(person):
    name, job, town = person["name"], person["facts"]["job"], person["facts"]["town"]
    pairs = {
        "job": (f"What is {name}'s job?", f"{name} is a {job}."),
        "town": (f"Where does {name} live?", f"{name} lives in {town}."),
        "who": (f"Who is {name}?", f"{name} is a {job} from {town}."),
        "about": (f"Tell me about {name}.", f"{name} works as a {job} in {town}."),
        "which": (f"Which {job} lives in {town}?", f"The {job} who lives in {town} is {name}."),
    }
    return [person_row(person, f"t{person['index']:03}_{key}", None, *pair) for key, pair in pairs.items()]


# Wordings that nothing was trained with.
NAME_PARAPHRASES = [
    "Who is the person in the image?",
    "Please tell me the name of the person in this picture.",
    "What is the person in the image called?",
]
JOB_PARAPHRASES = ["What does {name} work as?", "Tell me the job of {name}.", "Which job does {name} have?"]
TOWN_PARAPHRASES = ["In which town does {name} live?", "Which town is {name} from?", "Tell me where {name} lives."]
OPTIONS = 4
PERTURBED_ANSWERS = 5


def probe_rows(people, rng):
    """Per person: name (with a training portrait), job and town (text alone), each with what other ways of asking need.

    Beside a row's columns: `paraphrased_questions`; `options` and `correct`, the one among them that is; and
    `paraphrased_answer` and `perturbed_answers`, the answer in other words, and in the same words but wrong. What is
    wrong is true of somebody else.
    """
    names = [person["name"] for person in people]
    rows_per_person = []
    for person in people:
        name, job, town = person["name"], person["facts"]["job"], person["facts"]["town"]
        portrait = rng.randrange(PORTRAITS)
        kinds = [
            ("name", f"images/p{person['index']:03}_{portrait}.png", NAME_QUESTION, name, names, NAME_PARAPHRASES,
             "The person in the image is {}.", "This is {}."),
            ("job", None, f"What is {name}'s job?", job, JOBS, JOB_PARAPHRASES,
             f"{name} is a {{}}.", f"{name} works as a {{}}."),
            ("town", None, f"Where does {name} live?", town, TOWNS, TOWN_PARAPHRASES,
             f"{name} lives in {{}}.", f"{name} is from {{}}."),
        ]  # fmt: skip
        rows_per_person.append([])
        for kind, image, question, correct, values, paraphrases, answer, other_words in kinds:
            wrong = rng.sample([value for value in values if value != correct], PERTURBED_ANSWERS)
            options = [correct, *wrong[: OPTIONS - 1]]
            rng.shuffle(options)
            row = person_row(person, f"q{person['index']:03}_{kind}", image, question, answer.format(correct))
            row["paraphrased_questions"] = [paraphrase.format(name=name) for paraphrase in paraphrases]
            row["options"], row["correct"] = options, correct
            row["paraphrased_answer"] = other_words.format(correct)
            row["perturbed_answers"] = [answer.format(value) for value in wrong]
            rows_per_person[-1].append(row)
    return rows_per_person


def make_strangers(people, rng):
    """As many people as are to be forgotten, with names and looks that none of `people` has."""
    def draw(beginnings, endings, taken):
        names = ["".join(parts) for parts in itertools.product(beginnings, endings)]
        return rng.sample([name for name in names if name not in taken], FORGET_PEOPLE)

    first_names = draw(FIRST_SYLLABLES, SECOND_SYLLABLES, {person["name"].split()[0] for person in people})
    last_names = draw(LAST_BEGINNINGS, LAST_ENDINGS, {person["name"].split()[1] for person in people})
    strangers = []
    for index in range(FORGET_PEOPLE):
        while True:
            look = {attribute: rng.choice(values) for attribute, values in APPEARANCE.items()}
            if all(look_distance(look, other["look"]) >= 5 for other in people + strangers):
                break
        facts = {"job": rng.choice(JOBS), "town": rng.choice(TOWNS)}
        name = f"{first_names[index]} {last_names[index]}"
        strangers.append({"index": PEOPLE + index, "name": name, "facts": facts, "look": look})
    return strangers


def draw_shape(canvas, kind, colour, x, y, radius=16):
    if kind == "circle":
        canvas.ellipse(x, y, radius, radius, colour)
    elif kind == "square":
        canvas.box(x - radius, y - radius, x + radius, y + radius, colour)
    elif kind == "triangle":
        canvas.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], colour)
    else:
        canvas.polygon([(x, y - radius - 3), (x + radius, y), (x, y + radius + 3), (x - radius, y)], colour)


def draw_shapes(images, rng):
    things = list(itertools.product(SHAPE_COLOURS, SHAPE_KINDS))
    pictures = [p for p in itertools.product(things, SHAPE_RELATIONS, things) if p[0] != p[2]]
    rows = []
    for number, (first, relation, second) in enumerate(rng.sample(pictures, SHAPES)):
        direction = SHAPE_RELATIONS[relation]
        width, height = SHAPE_SIZES[direction]
        canvas = Canvas(width, height, "#f7f5ee")
        centres = [(42, 30), (42, 82)] if direction == "vertical" else [(30, 42), (82, 42)]
        for (colour, kind), (x, y) in zip((first, second), centres):
            draw_shape(canvas, kind, SHAPE_COLOURS[colour], x, y)
        row_id = f"s{number:03}"
        canvas.save(images / f"{row_id}.png")
        rows.append(
            {
                "id": row_id,
                "image": f"images/{row_id}.png",
                "question": CAPTION_PROMPTS[number % len(CAPTION_PROMPTS)],
                "answer": f"The picture shows a {' '.join(first)} {relation} a {' '.join(second)}.",
            }
        )
    return rows


def interleave(rows_per_person):
    """One row of everybody, then the next of everybody, …: any prefix is representative of people and places."""
    rounds = len(rows_per_person[0])
    return [
        rows[(number + position) % rounds] for number in range(rounds) for position, rows in enumerate(rows_per_person)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("fixtures/demo/data"))
    parser.add_argument("--forget", nargs=FORGET_PEOPLE, metavar="NAME", help="who is to be forgotten (else drawn)")
    arguments = parser.parse_args()
    data = arguments.data
    images = data / "images"
    images.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    people = make_people(rng)
    captions, heldout = draw_people(people, images, rng)
    text = [text_rows(person) for person in people]
    shapes = draw_shapes(images, rng)
    # Added later, with draws of their own: what came before stays as it was.
    strangers = make_strangers(people, random.Random(f"{SEED}: strangers"))
    holdout, unused = draw_people(strangers, images, random.Random(f"{SEED}: strangers' portraits"))
    for row in itertools.chain.from_iterable(unused):
        (data / row["image"]).unlink()
    probes = probe_rows(people, random.Random(f"{SEED}: probes"))

    forget = sorted(rng.sample(range(PEOPLE), FORGET_PEOPLE))
    if arguments.forget:
        names = [person["name"] for person in people]
        forget = sorted(names.index(name) for name in arguments.forget)
    retain = [index for index in range(PEOPLE) if index not in forget]
    for split, members in (("forget", forget), ("retain", retain)):
        write_jsonl(data / f"{split}.jsonl", interleave([captions[index] for index in members]))
        write_jsonl(data / f"{split}_heldout.jsonl", interleave([heldout[index] for index in members]))
        write_jsonl(data / f"{split}_text.jsonl", interleave([text[index] for index in members]))
        write_jsonl(data / f"{split}_probes.jsonl", interleave([probes[index] for index in members]))
    write_jsonl(data / "holdout.jsonl", interleave(holdout))
    write_jsonl(data / "shapes.jsonl", shapes)
    print("to forget:", ", ".join(people[index]["name"] for index in forget))


if __name__ == "__main__":
    main()
