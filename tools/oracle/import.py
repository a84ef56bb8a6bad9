"""Copies the reference results of the method's original implementation into fixtures/oracle.

    python tools/oracle/import.py SOURCE            # any Python >= 3.9, no packages

SOURCE is the folder that the reference run wrote (tools/oracle/README.md says how). Every file that is used must have the sha256
of tools/oracle/SHA256SUMS: the tests compare with one run, not with whatever lies in a folder. What no test reads is left out:

  - of samples.safetensors: attention_mask, after checking that it is all ones;
  - of down_proj.safetensors: before.*, which is what the ONNX file holds;
  - of model/: files that no part of the tool opens (slow tokenizer, video processor).

The tensors that stay keep their bytes. Same source, same output bytes.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "fixtures" / "oracle"
REDUCED = {
    "samples.safetensors": lambda name: not name.endswith(".attention_mask"),
    "down_proj.safetensors": lambda name: name.startswith("after."),
}


def read_tensors(data):
    """safetensors: a little-endian length, a JSON header, the bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__", None) is None
    body = data[8 + size :]
    return {name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for name, t in header.items()}


def write_tensors(tensors):
    """The order of the library: widest type first, then by name; the header padded to 8 bytes."""
    width = {"I64": 8, "F32": 4}
    header, body = {}, bytearray()
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: (-width[item[1][0]], item[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def reduced(path, data):
    keep = REDUCED.get(path.name)
    if keep is None:
        return data
    tensors = read_tensors(data)
    for name, (_, _, values) in tensors.items():
        if name.endswith(".attention_mask"):
            assert values == (1).to_bytes(8, "little") * (len(values) // 8), f"{path}: {name} is not all ones"
    return write_tensors({name: tensor for name, tensor in tensors.items() if keep(name)})


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    files = {}
    for line in (HERE / "SHA256SUMS").read_text().splitlines():
        digest, relative = line.split("  ", 1)
        data = (source / relative).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            sys.exit(f"{relative}: expected sha256 {digest}, found {found}")
        files[relative] = reduced(Path(relative), data)
    # Only when every file is the right one.
    shutil.rmtree(OUT, ignore_errors=True)
    for relative, data in files.items():
        path = OUT / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes in {OUT.relative_to(HERE.parents[1])}")


if __name__ == "__main__":
    main()
