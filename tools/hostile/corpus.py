"""The bad files: what they are made from, and how. Standard library only; the same seed gives the same bytes."""

import io
import json
import struct
import zipfile
import zlib
from random import Random

# ---------------------------------------------------------------- generic damage


def damaged(seed: bytes, random: Random, count: int):
    """Truncations, flipped bits, overwritten, repeated and removed stretches of a good file."""
    for index in range(count):
        data = bytearray(seed)
        at = random.randrange(len(data)) if data else 0
        length = min(random.choice([1, 2, 4, 8, 64, 512]), len(data) - at)
        kind = index % 7
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            for _ in range(random.choice([1, 1, 1, 8, 64])):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif kind == 2:
            data[at : at + length] = bytes([random.choice([0, 0x7F, 0x80, 0xFF])]) * length
        elif kind == 3:
            data[at:at] = data[at : at + length] * random.choice([1, 2, 100])
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at : at + length] = random.randbytes(length)
        else:
            other = random.randrange(len(data))
            data[at : at + length] = data[other : other + length]
        yield f"damage-{index}", bytes(data)


# ---------------------------------------------------------------- protobuf and ONNX


def varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value) -> bytes:
    """A field: a number as a varint, bytes or text with its length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, str):
        value = value.encode()
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name="w", dims=(4, 4), kind=1, raw=None, external=(), location=None, extra=b""):
    out = b"".join(field(1, dim) for dim in dims) + field(2, kind) + field(8, name) + extra
    for key, value in external:
        out += field(13, field(1, key) + field(2, value))
    if location is not None:
        out += field(14, location)
    if raw is not None:
        out += field(9, raw)
    return out


def node(op="MatMul", inputs=("x", "w"), outputs=("y",), attributes=()):
    out = b"".join(field(1, name) for name in inputs)
    out += b"".join(field(2, name) for name in outputs)
    return out + field(4, op) + b"".join(field(5, attribute) for attribute in attributes)


def value_info(name, dims=(1, 4)):
    shape = b"".join(field(1, field(1, dim)) for dim in dims)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))


def model(nodes=(node(),), initializers=(tensor(raw=bytes(64)),), graph=b"", extra=b""):
    inner = b"".join(field(1, item) for item in nodes)
    inner += b"".join(field(5, item) for item in initializers)
    inner += field(11, value_info("x")) + field(12, value_info("y")) + graph
    return field(1, 9) + field(8, field(2, 17)) + field(7, inner) + extra


def external(pairs, dims=(4, 4), kind=1):
    return model(initializers=[tensor(dims=dims, kind=kind, external=pairs, location=1)])


def nested(depth: int, number: int) -> bytes:
    """`depth` messages inside each other, without building each in turn."""
    lengths = [0]
    for _ in range(depth):
        lengths.append(lengths[-1] + 1 + len(varint(lengths[-1])))
    head = varint(number << 3 | 2)
    return b"".join(head + varint(length) for length in reversed(lengths[:-1]))


def onnx_cases():
    yield "bomb-attributes-8mb", model(nodes=[b"\x2a\x00" * (4 << 20)])
    yield "bomb-nodes-8mb", field(7, b"\x0a\x00" * (4 << 20))
    yield "bomb-tensors-8mb", field(7, b"\x2a\x00" * (4 << 20))
    yield "bomb-value-infos-8mb", field(7, b"\x6a\x00" * (4 << 20))
    yield "bomb-sparse-8mb", field(7, field(1, node()) + b"\x7a\x00" * (4 << 20))
    yield "bomb-functions-8mb", model(extra=b"\xca\x01\x00" * (2 << 20))
    yield "bomb-opsets-8mb", model(extra=b"\x42\x00" * (4 << 20))
    yield "bomb-metadata-8mb", model(extra=b"\x72\x00" * (4 << 20))
    yield "bomb-training-8mb", model(extra=b"\xa2\x01\x00" * (2 << 20))
    yield "bomb-inputs-8mb", model(nodes=[b"\x0a\x00" * (4 << 20)])
    yield "bomb-dims-8mb", model(initializers=[b"\x08\x00" * (4 << 20)])
    yield "bomb-packed-dims-8mb", model(initializers=[field(1, bytes(8 << 20))])
    yield "bomb-int32-data-8mb", model(initializers=[tensor(extra=field(5, bytes(8 << 20)))])
    yield "bomb-strings-8mb", model(initializers=[b"\x32\x00" * (4 << 20)])
    yield "bomb-dimensions-8mb", model(graph=field(11, field(2, field(1, field(2, b"\x0a\x00" * (4 << 20))))))
    yield "bomb-quantization-8mb", model(graph=b"\x72\x00" * (4 << 20))
    yield "bomb-device-8mb", model(nodes=[node() + b"\x52\x00" * (4 << 20)])
    yield "bomb-groups-1mb", b"\x3b" * (1 << 20)
    for size in (1, 2, 3):
        yield f"bomb-attributes-{size}mb", model(nodes=[b"\x2a\x00" * (size << 19)])
        yield f"bomb-nodes-{size}mb", field(7, b"\x0a\x00" * (size << 19))
    for depth in (50, 101, 1000, 100_000):
        yield f"deep-types-{depth}", model(graph=field(11, field(2, nested(2 * depth, 4))))
        yield f"deep-subgraphs-{depth}", field(7, nested(3 * depth, 1))
    graph = b""
    for _ in range(60):
        graph = field(1, node("If", ("c",), ("o",), [field(1, "then_branch") + field(6, graph) + field(20, 5)]))
    yield "deep-if-60", field(7, graph)
    for dims in [(-1, 4), (1 << 62, 4), (1 << 32, 1 << 32), (1 << 63, 0), (0, 0), (1,) * 10_000, ()]:
        yield f"dims-{len(dims)}-{dims[:2]}", model(initializers=[tensor(dims=dims, raw=bytes(64))])
    for kind in (0, 8, 9, 20, 23, 26, 99, -1, 1 << 40):
        yield f"type-{kind}", model(initializers=[tensor(kind=kind, raw=bytes(64))])
    yield "raw-too-long", model(initializers=[tensor(raw=bytes(65))])
    yield "raw-too-short", model(initializers=[tensor(raw=bytes(63))])
    yield "initializer-twice", model(initializers=[tensor(raw=bytes(64)), tensor(raw=bytes(64))])
    yield "nameless", model(initializers=[tensor(name="", raw=bytes(64))])
    yield "name-of-a-megabyte", model(initializers=[tensor(name="w" * (1 << 20), raw=bytes(64))])
    yield "name-not-utf8", model(initializers=[field(8, b"\xff\xfe") + tensor(raw=bytes(64))])
    yield "op-not-utf8", model(nodes=[field(4, b"\xff") + node()])
    yield "cycle", model(nodes=[node("Add", ("a", "b"), ("b",)), node("Add", ("b", "a"), ("a",))])
    yield "self", model(nodes=[node("Sigmoid", ("y",), ("y",))])
    yield "graph-twice", model() + field(7, b"")
    yield "no-graph", field(1, 9)
    yield "no-nodes", model(nodes=[])
    yield "two-models", model() + model()
    yield "field-0", b"\x02\x00" + model()
    yield "length-2-64", b"\x3a" + b"\xff" * 9 + b"\x01"
    yield "varint-11", b"\x08" + b"\xff" * 11
    functions = b""
    for index in range(24):
        call = node(f"f{index + 1}", ("x",), ("y",)) + field(7, "d")
        body = field(1, f"f{index}") + field(4, "x") + field(5, "y") + field(10, "d")
        functions += field(25, body + field(7, call) + field(7, call) + field(9, field(2, 17)))
    yield "functions-2-24", model(nodes=[node("f0", ("x",), ("y",)) + field(7, "d")], extra=functions)
    loop = field(1, "f") + field(4, "x") + field(5, "y") + field(10, "d") + field(9, field(2, 17))
    loop += field(7, node("f", ("x",), ("y",)) + field(7, "d"))
    yield "function-calls-itself", model(nodes=[node("f", ("x",), ("y",)) + field(7, "d")], extra=field(25, loop))
    chain = [node("Identity", (f"v{i}",), (f"v{i + 1}",)) for i in range(20_000)]
    yield "identity-20000", model(nodes=chain)
    chain = [node("Mul", (f"v{i}", f"v{i}"), (f"v{i + 1}",)) for i in range(2_000)]
    yield "diamonds-2000", model(nodes=[*chain, node("MatMul", ("v2000", "w"), ("y",))])
    wide = node("Concat", tuple(f"v{i}" for i in range(100_000)), ("y",))
    yield "concat-100000", model(nodes=[wide])
    yield "pickle", b"\x80\x04K\x01."
    yield "empty", b""
    yield "text", b"not a model"
    yield "gzip", b"\x1f\x8b\x08\x00" + bytes(60)


def external_cases():
    good = [("location", "data.bin"), ("offset", "0"), ("length", "64")]
    yield "good", external(good), 0
    for key, value in [
        ("offset", "-1"), ("offset", "18446744073709551615"), ("offset", "18446744073709551616"), ("offset", "0x10"),
        ("offset", " 8"), ("offset", "1e3"), ("offset", ""), ("offset", "65"), ("length", "-1"), ("length", "65"),
        ("length", "63"), ("length", "0"), ("length", "18446744073709551615"), ("length", "9" * 1000),
        ("checksum", "x" * 100_000), ("__class__", "x"), ("basepath", "/etc"), ("Location", "data.bin"),
    ]:
        pairs = [pair for pair in good if pair[0] != key] + [(key, value)]
        yield f"{key}-{value[:24]}", external(pairs), 0 if key in ("checksum", "basepath") else 2
    yield "location-twice", external([*good, ("location", "data.bin")]), 2
    yield "no-location", external(good[1:]), 2
    yield "no-pairs", external([]), 2
    yield "huge-dims", external(good, dims=(1 << 31, 1 << 31)), 2
    yield "other-type", external(good, kind=11), 2
    twice = [tensor(name, external=good, location=1) for name in ("w", "v")]
    yield "same-range-twice", model(nodes=[node(), node(inputs=("x", "v"), outputs=("z",))], initializers=twice), 0
    for pairs, name in [([("location", "/etc/passwd")], "absolute"), ([("location", "../data.bin")], "up")]:
        constant = field(1, "value") + field(5, tensor(external=pairs, location=1)) + field(20, 4)
        yield f"constant-{name}", model(nodes=[node("Constant", (), ("w",), [constant]), node()], initializers=()), 2
        inner = field(5, tensor("v", external=pairs, location=1)) + field(1, node(inputs=("x", "v")))
        branch = field(1, "then_branch") + field(6, inner) + field(20, 5)
        yield f"subgraph-{name}", model(nodes=[node("If", ("c",), ("o",), [branch]), node()]), 2
        sparse = field(1, tensor("s", external=pairs, location=1)) + field(2, tensor("i", kind=7, raw=bytes(128)))
        yield f"sparse-{name}", model(graph=field(15, sparse + field(3, 4) + field(3, 4))), 2
        body = field(1, "f") + field(10, "d") + field(7, node("Constant", (), ("w",), [constant]))
        yield f"function-{name}", model(extra=field(25, body)), 2


# ---------------------------------------------------------------- safetensors


def safetensors(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def split_safetensors(seed: bytes):
    length = struct.unpack("<Q", seed[:8])[0]
    return json.loads(seed[8 : 8 + length]), seed[8 + length :]


def safetensors_cases(seed: bytes):
    header, data = split_safetensors(seed)
    names = [name for name in header if name != "__metadata__"]
    first = names[0]

    def changed(**values):
        return {**header, first: {**header[first], **values}}

    size = len(data)
    for name, value in [
        ("offsets-negative", changed(data_offsets=[-4, 0])), ("offsets-back", changed(data_offsets=[8, 0])),
        ("offsets-huge", changed(data_offsets=[0, 1 << 63])), ("offsets-one", changed(data_offsets=[0])),
        ("offsets-float", changed(data_offsets=[0.5, 4])), ("offsets-past", changed(data_offsets=[size, size + 4])),
        ("shape-huge", changed(shape=[1 << 32, 1 << 32])), ("shape-2-64", changed(shape=[1 << 63, 4])),
        ("shape-negative", changed(shape=[-1])), ("shape-empty", changed(shape=[])),
        ("shape-long", changed(shape=[1] * 100_000)), ("dtype-unknown", changed(dtype="F128")),
        ("dtype-number", changed(dtype=3)), ("entry-list", {**header, first: []}), ("entry-null", {**header, first: None}),
        ("metadata-list", {**header, "__metadata__": []}), ("metadata-number", {**header, "__metadata__": {"kvw": 3}}),
        ("metadata-missing", {name: header[name] for name in names}), ("no-tensors", {"__metadata__": header.get("__metadata__", {})}),
        ("list", []), ("null", None),
    ]:
        yield name, safetensors(value, data)
    text = json.dumps(header)
    twice = text[:-1] + f', "{first}": {json.dumps(header[first])}' + "}"
    yield "tensor-twice", safetensors(twice.encode(), data)
    yield "header-length-max", struct.pack("<Q", (1 << 64) - 1) + seed[8:]
    yield "header-length-past-end", struct.pack("<Q", len(seed)) + seed[8:]
    yield "header-length-0", struct.pack("<Q", 0) + seed[8:]
    yield "header-not-utf8", safetensors(b'{"\xff":1}', data)
    yield "header-deep", safetensors(b'{"a":' * 100_000, data)
    yield "header-bomb", safetensors(b'{"a":[0' + b",0" * (7 << 20) + b"]}", data)
    yield "header-tensors", safetensors({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)})
    yield "trailing", seed + bytes(16)
    yield "pickle", b"\x80\x04K\x01."
    yield "zip", b"PK\x03\x04" + bytes(60)
    yield "empty", b""
    for name in names:
        start, end = header[name]["data_offsets"]
        width = {"F32": 4, "I64": 8}.get(header[name]["dtype"])
        for label, value in [("nan", b"\x00\x00\xc0\x7f\x00\x00\xc0\x7f"), ("inf", b"\x00\x00\x80\x7f\x00\x00\x80\xff"), ("max", b"\xff" * 7 + b"\x7f")]:
            if width and end > start:
                yield f"{name}-{label}", safetensors(header, data[:start] + value[:width] + data[start + width :])
        short = {**header, name: {**header[name], "shape": [*header[name]["shape"][:-1], header[name]["shape"][-1] - 1]}}
        yield f"{name}-short", safetensors(short, data)
        renamed = {(key + "9" if key == name else key): value for key, value in header.items()}
        yield f"{name}-renamed", safetensors(renamed, data)
        yield f"{name}-of-layer-2-64", safetensors({(key.replace(".", ".99999999999999999999", 1) if key == name else key): value for key, value in header.items()}, data)
    inner = json.loads(header["__metadata__"]["kvw"]) if "kvw" in header.get("__metadata__", {}) else None
    if inner is not None:
        for key, value in json_mutants(inner):
            yield f"metadata-{key}", safetensors({**header, "__metadata__": {"kvw": value.decode(errors="replace")}}, data)


# ---------------------------------------------------------------- npz


def npy(header: str, data=b"", version=1) -> bytes:
    length = struct.pack("<H", len(header)) if version == 1 else struct.pack("<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin1") + data


def npz(arrays, compression=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in arrays:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def npz_cases():
    def of(descr="<i8", shape="(1, 4)", order="False", data=bytes(32)):
        return npy(f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n", data)

    def with_ids(array):
        return npz([("input_ids.npy", array), ("answer_mask.npy", of("<f4", data=b"\x00\x00\x80\x3f" * 4))])

    yield "object", with_ids(of("|O", data=b"\x80\x04]\x94."))
    for descr in ("|S8", "<U4", ">i8", "<c8", "<M8[ns]", "|V8", "<f16", "x" * 1000, "<i9", ""):
        yield f"descr-{descr[:10]}", with_ids(of(descr))
    for shape in ("(1, 5)", "(-1, 4)", "(18446744073709551616,)", "(4294967296, 4294967296)", "()", "(4)", "(1, 4", "(" + "1, " * 4000 + ")", "(0,)", "(1, 4.0)", "(4, 1)"):
        yield f"shape-{shape[:12]}", with_ids(of(shape=shape))
    yield "order", with_ids(of(order="Maybe"))
    yield "header-long", with_ids(npy("{" + " " * 60_000 + "}"))
    yield "header-2-32", with_ids(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}")
    yield "version-9", with_ids(npy("{}", version=9))
    yield "nested", with_ids(npy("{'descr': " + "[" * 5000 + "}"))
    yield "python", with_ids(npy("{'descr': __import__('os').system('x'), }"))
    yield "bomb", npz([("input_ids.npy", of(shape="(1, 33554432)", data=bytes(256 << 20)))], zipfile.ZIP_DEFLATED)
    yield "bomb-hidden", npz([("input_ids.npy", of(data=bytes(300 << 20)))], zipfile.ZIP_DEFLATED)
    yield "many", npz([(f"{i}.npy", of()) for i in range(5000)])
    yield "torch", npz([("archive/data.pkl", b"\x80\x02}q\x00."), ("archive/data/0", bytes(16))])
    yield "climb", npz([("../../input_ids.npy", of()), ("answer_mask.npy", of("<f4", data=bytes(16)))])
    yield "twice", npz([("input_ids.npy", of()), ("input_ids.npy", of())])
    yield "not-npy", npz([("input_ids.npy", b"x"), ("readme.txt", b"x")])
    yield "nan-mask", npz([("input_ids.npy", of()), ("answer_mask.npy", of("<f4", data=b"\x00\x00\xc0\x7f" * 4))])
    yield "huge-ids", npz([("input_ids.npy", of(data=b"\xff" * 7 + b"\x7f" + bytes(24))), ("answer_mask.npy", of("<f4", data=b"\x00\x00\x80\x3f" * 4))])
    yield "unsigned-ids", npz([("input_ids.npy", of("<u8", data=b"\xff" * 32)), ("answer_mask.npy", of("<f4", data=b"\x00\x00\x80\x3f" * 4))])
    good = with_ids(of())
    yield "wrong-crc", good.replace(good[14:18], b"\x00\x01\x02\x03", 1)
    yield "no-directory", good[:-60]
    yield "pickle", b"\x80\x04K\x01."
    yield "rar", b"Rar!\x1a\x07\x00" + bytes(50)


# ---------------------------------------------------------------- JSON


def paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            yield from paths(value[index], (*path, index))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


ODD = [None, -1, 0, 1 << 63, 1e308, 0.5, "", "x" * 100_000, "\u0000", "../../../etc/passwd", [], {}, [[]], True, "NaN", 10**30]


def json_mutants(value, random=None, count=40):
    """Structure-aware: odd values at every place; then what is odd about the text itself."""
    random = random or Random(7)
    places = list(paths(value))
    random.shuffle(places)
    for index, place in enumerate(places[:count]):
        odd = ODD[index % len(ODD)]
        yield f"{'.'.join(map(str, place))[:40] or 'root'}-{index}", json.dumps(replaced(value, place, odd)).encode()
    text = json.dumps(value)
    key = next(iter(value), "a") if isinstance(value, dict) else "a"
    yield "key-twice", (text[:-1] + f', {json.dumps(key)}: null' + "}").encode()
    yield "trailing", text.encode() + b"x"
    yield "comma", text[:-1].encode() + b",}"
    yield "nan", text.replace("1", "NaN", 1).encode()
    yield "surrogate", (text[:-1] + ', "\\ud800": 1}').encode()
    yield "not-utf8", text[:-1].encode() + b', "\xff\xfe": 1}'
    yield "utf16", text.encode("utf-16")
    yield "bom", b"\xef\xbb\xbf" + text.encode()


def json_bombs():
    yield "depth-1e6", b"[" * 1_000_000
    yield "depth-objects", b'{"a":' * 1_000_000
    yield "depth-200", b"[" * 200 + b"]" * 200
    yield "zeros-14mb", b"[0" + b",0" * (7 << 20) + b"]"
    yield "lists-14mb", b"[[]" + b",[]" * (4 << 20) + b"]"
    yield "objects-14mb", b'{"a":[{}' + b",{}" * (4 << 20) + b"]}"
    yield "keys-8mb", ("{" + ",".join(f'"{index}":0' for index in range(700_000)) + "}").encode()
    yield "number-1e6", b'{"a":' + b"9" * 1_000_000 + b"}"
    yield "exponent", b'{"a":1e999999999}'
    yield "string-15mb", b'{"a":"' + b"x" * (15 << 20) + b'"}'
    yield "too-large", b" " * ((16 << 20) + 1)
    yield "empty", b""
    yield "null", b"null"
    yield "pickle", b"\x80\x04K\x01."


# ---------------------------------------------------------------- tokenizer, template


def tokenizer_cases(seed: bytes):
    value = json.loads(seed)

    def changed(**values):
        return json.dumps({**value, **values}).encode()

    def model_with(**values):
        return changed(model={**value["model"], **values})

    yield "vocab-huge-id", model_with(vocab={**value["model"]["vocab"], "zzz": 4_294_967_295})
    yield "vocab-negative-id", model_with(vocab={**value["model"]["vocab"], "zzz": -1})
    yield "vocab-empty", model_with(vocab={})
    yield "vocab-list", model_with(vocab=[])
    yield "merges-unknown", model_with(merges=[["no", "such"]])
    yield "merges-odd", model_with(merges=["a", "a b c", ""])
    yield "merges-empty-strings", model_with(merges=[["", ""]])
    yield "model-none", changed(model=None)
    for kind in ("WordPiece", "Unigram", "WordLevel", "XYZ", ""):
        yield f"model-{kind}", model_with(type=kind)
    yield "unigram-nan", changed(model={"type": "Unigram", "unk_id": 99, "vocab": [["a", -1e308], ["", 0.0]]})
    yield "unigram-no-unk", changed(model={"type": "Unigram", "unk_id": None, "vocab": []})
    yield "wordpiece", changed(model={"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "", "max_input_chars_per_word": 0, "vocab": {}})
    for pattern in ("(a+)+$", "(?=(?=(?=", "[", "a{1000}{1000}{1000}", "\\p{Nope}", "(" * 10_000, "(?:x{0,1000}){0,1000}", "", "(?!)", "(x*)*y"):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        yield f"regex-{pattern[:16]}", changed(pre_tokenizer=split)
        yield f"replace-{pattern[:16]}", changed(normalizer={"type": "Replace", "pattern": {"Regex": pattern}, "content": "x" * 1000})
    nested_sequence = {"type": "Lowercase"}
    for _ in range(60):
        nested_sequence = {"type": "Sequence", "normalizers": [nested_sequence]}
    yield "normalizers-60", changed(normalizer=nested_sequence)
    yield "normalizers-100000", changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100_000})
    doubling = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "(.)"}, "content": "xxxxxxxx"}] * 12}
    yield "normalizer-8-12", changed(normalizer=doubling)
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 1_000_000}] * 20}
    yield "normalizer-prepend", changed(normalizer=prepend)
    yield "precompiled", changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="})
    yield "precompiled-empty", changed(normalizer={"type": "Precompiled", "precompiled_charsmap": ""})
    token = {"id": 0, "content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    yield "added-empty", changed(added_tokens=[token])
    yield "added-huge", changed(added_tokens=[{**token, "id": 4_294_967_295, "content": "zz"}])
    yield "added-gap", changed(added_tokens=[{**token, "id": 1_000_000_000, "content": "zz"}])
    yield "added-100000", changed(added_tokens=[{**token, "id": i, "content": f"<{i}>"} for i in range(20_000)])
    yield "added-twice", changed(added_tokens=[{**token, "id": 5, "content": "zz"}, {**token, "id": 6, "content": "zz"}])
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}], "pair": [], "special_tokens": {}}
    yield "processor-unknown", changed(post_processor=template)
    yield "processor-bert", changed(post_processor={"type": "BertProcessing", "sep": ["x", 99999999], "cls": ["y", 99999999]})
    yield "decoder-odd", changed(decoder={"type": "Strip", "content": "x", "start": 1 << 62, "stop": 1 << 62})
    yield "truncation", changed(truncation={"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Left"})
    yield "padding", changed(padding={"strategy": {"Fixed": 1 << 40}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"})
    yield "version", changed(version="99")
    yield "lists", b'{"version":"1.0","model":[' + b"[]," * (1 << 20) + b"[]]}"
    yield "deep", b'{"model":' * 100_000
    yield "too-large", b" " * ((128 << 20) + 1)


TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'x' * 4000000000 }}", "{{ ['x'] * 4000000000 }}", "{{ 'x' | indent(4000000000) }}", "{{ [1] | tojson(indent=1000000000) }}",
    "{{ [1] | tojson(indent=-1) }}", "{{ messages | tojson(indent=16) }}", "{{ '%1000000000d' | format(1) }}", "{{ '%.1000000000f' | format(1.5) }}",
    "{{ 'x'.center(1000000000) }}", "{{ 'x'.ljust(1000000000) }}", "{{ 'x'.zfill(1000000000) }}", "{{ 'x'.join(range(100000)) * 100000 }}",
    "{{ 'ab'.replace('', 'x' * 100000) }}", "{{ range(1000000000) | list | length }}", "{{ range(0, 1000000000000000000, 1) | list }}",
    "{{ 9 ** 999999999 }}", "{{ 9223372036854775807 + 1 }}", "{{ -9223372036854775808 // -1 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{{ 1e308 * 10 }}",
    "{% set n = namespace(v='xxxxxxxx') %}{% for i in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}{{ n.v }}",
    "{% set n = namespace(v=[1]) %}{% for i in range(60) %}{% set n.v = n.v + n.v %}{% endfor %}{{ n.v }}",
    "{% include '/etc/passwd' %}", "{% import '/etc/passwd' as p %}", "{% extends 'x' %}", "{% if %}", "{% for %}", "{{", "{%", "{#", "{{ x.y.z }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Q') }}", "{{ strftime_now('%1000000000Y') }}", "{{ strftime_now('%Y' * 1000000) }}",
    "{{ messages[99].content }}", "{{ messages[0]['content'][::0] }}", "{{ messages[0]['content'][9223372036854775807:] }}", "{{ 'x'[::-9223372036854775808] }}",
    "{{ messages | sort(attribute='x') }}", "{{ messages | map(attribute='__class__') | list }}", "{{ ''.__class__.__mro__ }}", "{{ self }}", "{{ loop }}",
    "{{ debug() }}", "{{ lipsum(1000000) }}", "{{ cycler('a') }}", "{{ dict(**{'a': 1}) }}", "{{ caller() }}", "{{ 'x' | batch(0) }}", "{{ 'x' | slice(0) | list }}",
    "{{ 'x' | slice(1000000000) | list }}", "{{ ('x' * 1000) | batch(1) | list | tojson }}", "{{ 'x' | urlencode }}", "{{ 'a' | center(1000000000) }}",
    "{{ ('a' * 100000) | wordwrap(1) }}", "{{ 1 | round(1000000000) }}", "{{ 'x' | truncate(-5) }}", "{{ '' | split('') }}", "{{ 'x'.split('') }}",
    "{% call f() %}{% endcall %}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{% set messages = 1 %}{{ messages }}", "", " " * 100_000,
    "(" * 100_000, "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "{{ " + "-" * 100_000 + "1 }}", "{{ " + "not " * 100_000 + "1 }}",
    "{{ " + "[" * 10_000 + "]" * 10_000 + " }}", "{{ x" + ".y" * 100_000 + " }}", "{{ x" + "[0]" * 50_000 + " }}", "{{ x" + "|upper" * 50_000 + " }}",
    "{% if x %}" * 10_000, "{% if x %}" * 5_000 + "{% endif %}" * 5_000, "{% for a in [1] %}" * 2_000 + "{% endfor %}" * 2_000,
    "{{ 1 " + "+ 1 " * 50_000 + "}}", "{{ 'a' " + "~ 'a' " * 50_000 + "}}", "{{ " + "'a' if 1 else " * 20_000 + "'b' }}", "{{ {" + "'a': 1, " * 50_000 + "} }}",
    "{{ '" + "x" * 900_000 + "' * 100000 }}", "{% set x %}" * 5_000, "{% filter upper %}" * 5_000, "{% macro a() %}" * 5_000,
]


# ---------------------------------------------------------------- pictures


def png(width, height, kind=2, depth=8, rows=None, chunks=(), pixels=None):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if pixels is None:
        pixels = zlib.compress(bytes((1 + 3 * min(width, 64)) * (rows or min(height, 64))))
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    for name, data in chunks:
        out += chunk(name, data)
    return out + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def picture_cases():
    for width, height in [(0, 1), (1, 0), (8193, 8193), (65_536, 65_536), (1 << 31, 1), (4_294_967_295, 4_294_967_295), (1, 1 << 26), (8192, 8192), (100_000, 600)]:
        yield f"png-{width}x{height}", png(width, height)
    for kind, depth in [(2, 3), (3, 16), (5, 8), (0, 32), (6, 16), (4, 1), (3, 8)]:
        yield f"png-kind-{kind}-{depth}", png(64, 64, kind, depth)
    bomb = zlib.compress(bytes(200 << 20), 9)
    yield "png-idat-bomb", png(64, 64, pixels=bomb)
    for name in (b"zTXt", b"iCCP"):
        yield f"png-{name.decode()}-bomb", png(64, 64, chunks=[(name, b"a\x00\x00" + bomb)])
    yield "png-itxt-bomb", png(64, 64, chunks=[(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + bomb)])
    yield "png-exif-odd", png(64, 64, chunks=[(b"eXIf", b"MM\x00*\xff\xff\xff\xff" + bytes(20))])
    yield "png-exif-loop", png(64, 64, chunks=[(b"eXIf", b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\xff\xff\xff\xff\x08\x00\x00\x00\x08\x00\x00\x00")])
    yield "png-chunks-100000", png(64, 64, chunks=[(b"teXt", b"")] * 100_000)
    yield "png-plte-long", png(64, 64, 3, chunks=[(b"PLTE", bytes(769))])
    yield "png-apng", png(64, 64, chunks=[(b"acTL", struct.pack(">II", 1 << 31, 0)), (b"fcTL", struct.pack(">IIIIIHHBB", 0, 1 << 30, 1 << 30, 0, 0, 1, 1, 0, 0))])
    yield "png-header-only", png(64, 64)[:33]

    def jpeg(height, width, parts=3, progressive=False):
        frame = b"\xff\xc2" if progressive else b"\xff\xc0"
        body = struct.pack(">BHHB", 8, height, width, parts) + b"".join(bytes([i + 1, 0x11, 0]) for i in range(parts))
        return b"\xff\xd8" + frame + struct.pack(">H", len(body) + 2) + body + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00" + bytes(64) + b"\xff\xd9"

    for height, width in [(65_535, 65_535), (0, 64), (64, 0), (8192, 8192), (1, 65_535)]:
        yield f"jpeg-{width}x{height}", jpeg(height, width)
        yield f"jpeg-progressive-{width}x{height}", jpeg(height, width, progressive=True)
    yield "jpeg-255-parts", jpeg(64, 64, 255)
    yield "jpeg-no-frame", b"\xff\xd8\xff\xd9"
    yield "jpeg-segments", b"\xff\xd8" + b"\xff\xe1\x00\x02" * 100_000
    yield "jpeg-app1-long", b"\xff\xd8\xff\xe1\xff\xff" + b"Exif\x00\x00II*\x00" + bytes(100)

    def webp(kind, data):
        body = b"WEBP" + kind + struct.pack("<I", len(data)) + data
        return b"RIFF" + struct.pack("<I", len(body)) + body

    yield "webp-vp8x-16384", webp(b"VP8X", b"\x00\x00\x00\x00\xff\x3f\x00\xff\x3f\x00")
    yield "webp-vp8x-2-24", webp(b"VP8X", b"\x02\x00\x00\x00\xff\xff\xff\xff\xff\xff")
    yield "webp-vp8l", webp(b"VP8L", b"\x2f\xff\xff\xff\xff" + bytes(40))
    yield "webp-vp8", webp(b"VP8 ", b"\x00\x00\x00\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(40))
    yield "webp-riff-long", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff"
    yield "webp-chunks", webp(b"VP8X", b"\x2c\x00\x00\x00\x3f\x00\x00\x3f\x00\x00") + b"EXIF\x00\x00\x00\x00" * 50_000
    for name, data in [("gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"), ("tiff", b"II*\x00\x08\x00\x00\x00" + bytes(50)), ("bmp", b"BM" + bytes(60)), ("svg", b"<svg/>"), ("empty", b""), ("pdf", b"%PDF-1.4"), ("text", b"hello")]:
        yield name, data


# ---------------------------------------------------------------- lines, tables, TOML, sums


def jsonl_cases(rows):
    good = json.dumps(rows[0])

    def line(**values):
        return json.dumps({**rows[0], **values}).encode()

    for key in ("question", "answer", "image", "name", "id", "facts", "options", "correct", "task", "paraphrased_questions", "perturbed_answers"):
        for index, odd in enumerate(ODD):
            if not (odd is None or (key in ("name", "id", "question") and isinstance(odd, str))):
                yield f"{key}-{index}", line(**{key: odd})
    yield "image-outside", line(image="../../../../../../etc/passwd")
    yield "image-proc", line(image="/proc/self/mem")
    yield "image-zero", line(image="/dev/zero")
    yield "image-folder", line(image=".")
    yield "image-nul", line(image="a\x00b")
    yield "image-long", line(image="x/" * 5000)
    yield "key-twice", good[:-1].encode() + b', "answer": "another"}'
    yield "id-twice", f"{good}\n{good}\n".encode()
    yield "array", b"[1, 2]"
    yield "deep", b'{"question": ' + b"[" * 1_000_000
    yield "line-bomb", b'{"question": "a", "answer": "b", "x": [0' + b",0" * (16 << 20) + b"]}"
    yield "nul-bytes", bytes(100_000)
    yield "utf16", good.encode("utf-16")
    yield "latin1", b'{"question": "\xe9", "answer": "b"}'
    yield "carriage-returns", b"\r" * 1_000_000
    yield "newlines", b"\n" * 1_000_000
    yield "empty", b""
    yield "bom", b"\xef\xbb\xbf"
    yield "gzip", b"\x1f\x8b\x08\x00" + bytes(60)
    yield "onnx", model()
    yield "answer-not-in-prompt", line(answer="<|im_start|>user")
    yield "placeholder", line(question="<|image_pad|>" * 1000)
    yield "question-long", line(question="x " * 2_000_000)
    yield "surrogates", b'{"question": "\\ud800", "answer": "\\udfff"}'


def toml_cases(seed: bytes):
    yield "deep", b"a = " + b"[" * 100_000
    yield "deep-inline", b"a = " + b"{a=" * 100_000
    yield "dotted", b"a" + b".a" * 100_000 + b" = 1"
    yield "tables", b"[a" + b".a" * 10_000 + b"]"
    yield "array-tables", b"[[a]]\n" * 100_000
    yield "key-twice", seed + b"\nversion = 1\nversion = 1\n"
    yield "unknown", seed + b"\n[nonsense]\nx = 1\n"
    yield "number", seed.replace(b"version = 1", b"version = 99999999999999999999999", 1)
    yield "negative", seed.replace(b"version = 1", b"version = -1", 1)
    yield "date", seed.replace(b"version = 1", b"version = 1979-05-27", 1)
    yield "nan", seed.replace(b"0.", b"nan #", 1)
    yield "inf", seed.replace(b"0.", b"inf #", 1)
    yield "not-utf8", seed + b'\n# \xff\xfe\n"\xff" = 1'
    yield "nul", seed + b"\x00"
    yield "string", b'a = """' + b"x" * 900_000
    yield "escapes", b'a = "\\UFFFFFFFF"'
    yield "too-large", b"#" * ((1 << 20) + 1)
    yield "empty", b""
    yield "json", b'{"version": 1}'
    yield "pickle", b"\x80\x04K\x01."


def sums_cases(seed: bytes):
    first = seed.splitlines()[0]
    yield "climb", first[:66] + b"../../../etc/passwd\n"
    yield "absolute", first[:66] + b"/etc/passwd\n"
    yield "twice", seed + seed
    yield "short", b"abc  config.json\n"
    yield "upper", seed.upper()
    yield "not-hex", b"g" * 64 + b"  config.json\n"
    yield "lines", b"\n" * 1_000_000
    yield "many", (first[:66] + b"x\n") * 10
    yield "nul", seed.replace(b"config", b"con\x00fig")
    yield "not-utf8", b"a" * 64 + b"  \xff\n"
    yield "empty", b""
    yield "too-large", b"a" * ((32 << 20) + 1)


def key_cases(seed: bytes):
    yield "empty", b""
    yield "encrypted", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    yield "rsa", b"-----BEGIN RSA PUBLIC KEY-----\nAAAA\n-----END RSA PUBLIC KEY-----\n"
    yield "no-end", seed[:60]
    yield "base64", seed.replace(b"M", b"!", 3)
    yield "zeros", b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 124 + b"\n-----END PUBLIC KEY-----\n"
    yield "der-length", b"-----BEGIN PUBLIC KEY-----\nMIT/////////\n-----END PUBLIC KEY-----\n"
    yield "twice", seed + seed
    yield "too-large", b"A" * ((64 << 10) + 1)
    yield "not-utf8", b"\xff" * 100
