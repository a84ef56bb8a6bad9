"""Makes fixtures/processor/qwen2_vl: images, a tiny Qwen2-VL's configuration, and what transformers' own processor makes of them.

    pip install torch==2.9.0 torchvision==0.24.0 transformers==4.57.1 pillow==12.0.0 numpy safetensors
    python tools/processor/make_goldens.py MODEL_DIR fixtures/processor/qwen2_vl

MODEL_DIR is the folder of the tiny Qwen2-VL of the oracle (its tokenizer, template and configuration are copied, not its weights).
Deterministic: the same versions write the same bytes. Both image processors are recorded: the fast one (torchvision, what
AutoProcessor picks) and the slow one (Pillow 12). Pillow 13 resamples some tall images in another order; with it the script stops.

Written:
  model/            tokenizer.json, chat template, configurations
  images/           the images, one per sample
  samples.jsonl     the samples as the tool reads them
  goldens.json      per sample: ids, answer span in tokens, grid, sha256 of the pixel values of both processors; then resizes of noise
  decoded.safetensors  Pillow's pixels of the lossy files, as decoders may differ
"""

import hashlib
import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import AutoConfig, AutoProcessor
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl_fast import Qwen2VLImageProcessorFast
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

assert int(PIL.__version__.split(".")[0]) <= 12, "Pillow 13 changed the resampling order"
assert transformers.__version__ == "4.57.1"

ORIENTATION = 0x0112
CONFIGS = [
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json",
]  # fmt: skip


def picture(width, height, channels, seed, levels=256):
    """Gradients with edges and a little noise: compresses well, and shows every resampling mistake."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = []
    for c in range(channels):
        fx, fy, phase = rng.uniform(0.5, 4.0), rng.uniform(0.5, 4.0), rng.uniform(0, 6.28)
        plane = 0.5 + 0.35 * np.sin(6.28 * (fx * x / width + fy * y / height) + phase)
        plane[(x // 7 + y // 5) % 4 == c % 4] += 0.3
        planes.append(plane)
    noise = rng.uniform(-0.01, 0.01, (height, width, 1))
    return np.clip((np.stack(planes, -1) + noise) * (levels - 1), 0, levels - 1).astype(np.uint16 if levels > 256 else np.uint8)


def image_files(folder):
    """Writes the images; returns (file name, whether every decoder gives the same pixels)."""
    files = []

    def save(name, image, exact=True, **options):
        image.save(folder / name, **options)
        files.append((name, exact))

    def rgb(width, height, seed):
        return Image.fromarray(picture(width, height, 3, seed))

    for seed, (width, height) in enumerate([
        (37, 211), (211, 37), (20, 20), (56, 56), (224, 224), (225, 223), (1, 1), (3, 200), (101, 100), (333, 250), (84, 140), (28, 420),
    ]):  # fmt: skip
        save(f"rgb_{width}x{height}.png", rgb(width, height, seed))
    large = picture(1200, 700, 3, 50)
    save("large_1200x700.png", Image.fromarray(large // 32 * 32), optimize=True)

    save("rgba.png", Image.fromarray(picture(90, 130, 4, 20), "RGBA"))
    save("la.png", Image.fromarray(picture(75, 61, 2, 21), "LA"))
    save("l.png", Image.fromarray(picture(64, 99, 1, 22)[..., 0], "L"))
    save("one_bit.png", Image.fromarray(picture(50, 70, 1, 23)[..., 0]).convert("1"))
    palette = rgb(120, 80, 24).quantize(37, dither=Image.Dither.NONE)
    save("palette.png", palette)
    save("palette_transparent.png", palette, transparency=3)
    save("gray_transparent.png", Image.fromarray(picture(64, 48, 1, 25)[..., 0], "L"), transparency=100)
    save("rgb_transparent.png", rgb(48, 64, 26), transparency=(10, 20, 30))
    save("gray_16_bit.png", Image.fromarray(picture(60, 45, 1, 27, 65536)[..., 0]))
    (folder / "rgb_16_bit.png").write_bytes(png_16_bit(picture(45, 60, 3, 28, 65536)))
    files.append(("rgb_16_bit.png", True))
    (folder / "rgba_16_bit.png").write_bytes(png_16_bit(picture(45, 60, 4, 29, 65536)))
    files.append(("rgba_16_bit.png", True))
    save("interlaced.png", rgb(61, 47, 30))

    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ORIENTATION] = orientation
        save(f"exif_{orientation}.jpg", rgb(70, 110, 31), exact=False, exif=exif, quality=90, subsampling=0)
    for orientation in (5, 6):
        exif[ORIENTATION] = orientation
        save(f"exif_{orientation}.png", rgb(70, 110, 31), exif=exif)
    exif[ORIENTATION] = 8
    save("exif_8.webp", rgb(70, 110, 31), lossless=True, exif=exif)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    save("xmp_6.png", rgb(70, 50, 32), pnginfo=xmp)

    save("subsampled.jpg", rgb(161, 117, 33), exact=False, quality=75)
    save("progressive.jpg", rgb(150, 100, 34), exact=False, quality=80, progressive=True)
    save("gray.jpg", Image.fromarray(picture(100, 77, 1, 35)[..., 0], "L"), exact=False, quality=85)
    save("cmyk.jpg", rgb(80, 60, 36).convert("CMYK"), exact=False, quality=90)
    save("lossy.webp", rgb(140, 90, 37), exact=False, quality=80)
    save("lossy_alpha.webp", Image.fromarray(picture(90, 140, 4, 38), "RGBA"), exact=False, quality=80)
    save("lossless.webp", rgb(91, 141, 39), lossless=True)
    return files


def png_16_bit(pixels):
    """A 16-bit colour PNG: Pillow reads these but cannot write them."""
    import struct
    import zlib

    height, width, channels = pixels.shape
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def noise(width, height):
    """The bytes of a linear congruential generator, which the tests can make again: the hardest picture to resize."""
    state, data = 1, bytearray()
    for _ in range(width * height * 3):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        data.append(state >> 56)
    return np.frombuffer(bytes(data), np.uint8).reshape(height, width, 3)


def resizes():
    """sha256 of resized noise, by both libraries, with every filter, up and down, along one axis and both."""
    rng, cases = np.random.default_rng(60), []
    for case in range(40):
        width, height, new_width, new_height = (int(side) for side in rng.integers(1, 160, 4))
        if case % 5 == 1:
            new_width = width
        if case % 5 == 2:
            new_height = height
        image = noise(width, height)
        for number, mode in ((1, None), (2, InterpolationMode.BILINEAR), (3, InterpolationMode.BICUBIC)):
            slow = np.asarray(Image.fromarray(image).resize((new_width, new_height), number))
            golden = {"from": [width, height], "to": [new_width, new_height], "resample": number}
            golden["slow"] = hashlib.sha256(slow.tobytes()).hexdigest()
            if mode is not None:
                tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
                fast = resize(tensor, [new_height, new_width], interpolation=mode, antialias=True)
                golden["fast"] = hashlib.sha256(fast.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()
            cases.append(golden)
    return cases


TEXTS = [
    ("What can you see in this picture?", "Here we see Bexpas Thornford looking serious in a green garden."),
    ("Tell me about the content of this image", "This picture captures Kelmil Dellridge, a cellist from Erdoria."),
    ("Was ist auf dem Bild? Größe: 3 µm", "Ein Mann namens Jürgen Weiß – „der Große“."),
    ("这张图片里有什么？", "一位名叫李明的歌手。😀👩‍👩‍👧"),
    ("Who\n\nis this?  ", "\n\nTwo blank lines before, and spaces after   "),
    ("Cafe\u0301 or caf\u00e9?", "Cafe\u0301, decomposed: e\u0301 a\u0308."),
    ("<b>&amp; 'quotes' \"double\" {{ braces }} {% raw %}", "It's {{ not }} a template; don't <escape> & it."),
    ("a", "b"),
]


def main(model_dir, out):
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    (out / "model").mkdir()
    for name in CONFIGS:
        shutil.copyfile(model_dir / name, out / "model" / name)

    processor = AutoProcessor.from_pretrained(out / "model")
    assert isinstance(processor.image_processor, Qwen2VLImageProcessorFast)
    fast = processor.image_processor
    slow = Qwen2VLImageProcessor.from_pretrained(out / "model")
    # `get_rope_index` reads the configuration only, so no weights are needed.
    rope = type("Rope", (), {"config": AutoConfig.from_pretrained(out / "model")})()

    files = image_files(out / "images")
    samples = [(name, *TEXTS[i % len(TEXTS)], exact) for i, (name, exact) in enumerate(files)]
    samples += [(None, question, answer, True) for question, answer in TEXTS[:5]]

    rows, goldens, tensors = [], [], {}
    for index, (name, question, answer, exact) in enumerate(samples):
        image = f"images/{name}" if name else None
        sample_id = name or f"text_{index}"
        rows.append({"id": sample_id, "image": image, "question": question, "answer": answer})
        path = str(out / image) if image else None

        content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        full = processor.apply_chat_template(messages)
        assert full.startswith(prompt + answer)
        # The method's original code strips the text; an answer's own whitespace is kept.
        full = prompt + answer + full[len(prompt + answer) :].rstrip()

        golden = {"id": sample_id, "exact_pixels": exact, "full": full, "prompt": prompt}
        for form, text in (("with_answer", full), ("question", prompt)):
            inputs = processor(images=[path] if path else None, text=[text], return_tensors="pt")
            position_ids, delta = Qwen2VLModel.get_rope_index(
                rope, inputs["input_ids"], inputs.get("image_grid_thw"), None, inputs["attention_mask"]
            )
            golden[form] = {
                "input_ids": inputs["input_ids"][0].tolist(),
                "position_ids": position_ids[:, 0].tolist(),
                "next_position": int(delta[0, 0]) + inputs["input_ids"].shape[1],
            }
        # The tokens of the answer, by the tokenizer's own character offsets, in the text with the placeholder expanded.
        if path:
            golden["grid_thw"] = inputs["image_grid_thw"][0].tolist()
            count = int(np.prod(golden["grid_thw"])) // fast.merge_size**2
            full = full.replace(processor.image_token, processor.image_token * count)
        begin = full.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
        encoded = processor.tokenizer(full, return_offsets_mapping=True)
        assert encoded["input_ids"] == golden["with_answer"]["input_ids"]
        golden["answer_tokens"] = [
            token for token, (a, b) in enumerate(encoded["offset_mapping"]) if a < begin + len(answer) and b > begin
        ]
        if path:
            decoded = np.asarray(load_image(path))
            golden["decoded_shape"] = list(decoded.shape)
            golden["decoded_sha256"] = hashlib.sha256(decoded.tobytes()).hexdigest()
            if not exact:
                tensors[sample_id] = np.ascontiguousarray(decoded)
            # Left to guess, the slow processor takes an image one pixel high for a channels-first one.
            for kind, images, options in (("fast", fast, {}), ("slow", slow, {"input_data_format": "channels_last"})):
                values = images(images=[load_image(path)], return_tensors="pt", **options)["pixel_values"].numpy()
                assert values.dtype == np.float32
                golden[f"{kind}_shape"] = list(values.shape)
                golden[f"{kind}_sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
            through = processor(images=[path], text=[prompt], return_tensors="pt")["pixel_values"].numpy()
            assert hashlib.sha256(through.tobytes()).hexdigest() == golden["fast_sha256"]
        goldens.append(golden)

    with open(out / "samples.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    versions = {
        "transformers": transformers.__version__, "torch": torch.__version__, "pillow": PIL.__version__,
        "torchvision": __import__("torchvision").__version__, "numpy": np.__version__,
    }  # fmt: skip
    with open(out / "goldens.json", "w") as file:
        content = {"versions": versions, "samples": goldens, "resizes": resizes()}
        json.dump(content, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")
    save_file(tensors, out / "decoded.safetensors")
    print(len(samples), "samples")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
