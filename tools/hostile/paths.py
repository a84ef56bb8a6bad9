#!/usr/bin/env python3
"""What a model may make kvw open: nothing outside its folder.

    tools/hostile/paths.py target/debug/kvw

Runs `kvw inspect` and `kvw diff` under strace on models whose external data, or whose files, lead elsewhere, and looks
at every file that was opened, by the path that the kernel says it has. Opened may be: the model folder (in a Hugging Face
cache, the model's entry), the program's libraries, and what the system tells about the process. Needs strace.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import corpus

SYSTEM = re.compile(r"/(usr/)?lib(64|32)?/|/etc/ld\.so|/proc/(self|\d+)/|/sys/fs/cgroup|/sys/devices/system|/dev/(null|urandom)$|/usr/share/locale|pipe:|socket:|anon_inode:")
OPENED = re.compile(r"\b(?:openat2?|open|creat)\(.*\)\s+= \d+<(.*?)(?: \(deleted\))?>")

# Locations that name something that is there: outside, or not a regular file, or through a link that leads out.
LOCATIONS = [
    "../secret", "../../secret", "a/../../secret", "./../secret", "onnx/../../secret", "onnx/../../../secret", "{secret}", "//{secret}",
    "/etc/passwd", "file:///etc/passwd", "http://localhost/x", "C:\\secret", "..\\secret", "onnx\\..\\..\\secret", "C:secret", "~/secret",
    "up", "absolute", "chain", "through/secret", "parent/secret", "parent/model-evil/secret", "deep/up", "root/etc/passwd", "root{secret}",
    "sibling/secret", "./up", "onnx/../up", "onnx/up2", "loop", "dangling", "dangling-outside", "pipe", "socket", "device", "/dev/zero",
    "magic-exe", "magic-root/etc/passwd", "magic-cwd/../secret", "/proc/self/environ", "/proc/self/mem", "/dev/fd/0", "*/_ORT_MEM_ADDR_/*",
    "*", "_ORT_MEM_ADDR_", "", ".", "..", "onnx", "onnx/", "onnx/.", "weights/", "weights/..", "weights/../../secret", "../model/weights/../../secret",
    "../model-evil/secret", "x" * 5000, "a/" * 3000 + "secret", "up\u0000", "weights\u0000../secret", "\n../secret", "\u202e../secret", "%2e%2e/secret", "..%2fsecret", "．．/secret",
    "$HOME/secret", "`id`", "-", "CON", "weights:stream",
]


def layout(base: Path) -> Path:
    model = base / "model"
    (model / "onnx").mkdir(parents=True)
    (model / "deep").mkdir()
    (base / "model-evil").mkdir()
    for secret in ("secret", "model-evil/secret"):
        (base / secret).write_bytes(b"s" * 64)
    (model / "weights").write_bytes(bytes(64))
    for name, target in {
        "up": "../secret", "absolute": base / "secret", "chain": "up", "parent": "..", "through": "parent", "deep/up": "../../secret", "root": "/",
        "sibling": "../model-evil", "onnx/up2": "../../secret", "loop": "loop", "dangling": "nowhere", "dangling-outside": "../nowhere",
        "device": "/dev/zero", "magic-exe": "/proc/self/exe", "magic-root": "/proc/self/root", "magic-cwd": "/proc/self/cwd",
    }.items():
        (model / name).symlink_to(target)
    os.mkfifo(model / "pipe")
    import socket

    socket.socket(socket.AF_UNIX).bind(os.path.relpath(model / "socket"))
    return model


def opened(command):
    """Exit code, standard error, and the paths of everything that was opened."""
    with tempfile.NamedTemporaryFile("r") as log:
        trace = ["strace", "-f", "-y", "-s", "9000", "-e", "trace=open,openat,openat2,creat", "-o", log.name, *command]
        done = subprocess.run(trace, capture_output=True, text=True, timeout=120, errors="replace")
        return done.returncode, done.stderr, OPENED.findall(log.read())


def judge(name, command, inside, expected):
    code, err, paths = opened(command)
    outside = {path for path in paths if not path.startswith(str(inside)) and not SYSTEM.search(path) and path != command[0]}
    # The folders on the way are opened to resolve paths from, not read.
    outside = {path for path in outside if not str(inside).startswith(path.rstrip("/") + "/")}
    faults = [f"opened {path}" for path in sorted(outside)]
    if not any(path.startswith(str(inside)) for path in paths):
        faults.append("nothing of the model was seen to be opened: is strace at work?")
    if code not in expected:
        faults.append(f"exit code {code}: {err.strip()}")
    if faults:
        print(f"{name!r}: {'; '.join(faults)}")
    return not faults


def main():
    kvw = str(Path(sys.argv[1]).resolve())
    passed, cases = 0, 0

    def case(name, command, inside, expected=(2,)):
        nonlocal passed, cases
        cases += 1
        passed += judge(name, [kvw, *map(str, command)], inside, expected)

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch).resolve()
        os.chdir(base)
        model = layout(base)
        if str(base / "secret") not in opened(["cat", "secret"])[2]:
            sys.exit("strace does not show what is opened")
        file = model / "model.onnx"
        for text in LOCATIONS:
            location = text.format(secret=str(base / "secret").lstrip("/")) if "{secret}" in text else text
            location = "/" + location if text == "{secret}" else location
            file.write_bytes(corpus.external([("location", location)]))
            case(f"initializer: {text[:40]}", ["inspect", file], model)
        # The same, wherever a tensor can hang.
        for name, data, _ in corpus.external_cases():
            if name.split("-")[0] in ("constant", "subgraph", "sparse", "function"):
                file.write_bytes(data)
                case(name, ["inspect", file], model)
        file.write_bytes(corpus.external([("location", "up")]))
        case("diff", ["diff", file, file], model)
        # A hard link is a file of the folder: it is read, and never written to (docs/security.md).
        os.link(base / "secret", model / "hard")
        file.write_bytes(corpus.external([("location", "hard")]))
        case("hard link", ["inspect", file], model, (0, 2))

        # Whole folders, with a file that leads out.
        for number, (name, target) in enumerate([("config.json", "../secret"), ("tokenizer.json", "/etc/passwd"), ("extra.bin", "../secret"), ("onnx", ".."), ("onnx/model.onnx", "../../secret"), ("dangling", "nowhere")]):
            folder = base / f"folder-{number}"
            (folder / "onnx").mkdir(parents=True)
            (folder / "onnx/embed_tokens.onnx").write_bytes(corpus.model())
            path = folder / name
            if name == "onnx":
                path = folder / "more"
            path.symlink_to(target)
            case(f"folder: {name} → {target}", ["inspect", folder], folder)

        # A Hugging Face cache: files are links into blobs/, and that is fine; a neighbour's are not.
        entry = base / "hub/models--a--b"
        snapshot = entry / "snapshots/0123"
        snapshot.mkdir(parents=True)
        (entry / "blobs").mkdir()
        (entry / "blobs/aa").write_bytes(corpus.external([("location", "model.onnx_data")]))
        (entry / "blobs/bb").write_bytes(bytes(64))
        (snapshot / "model.onnx").symlink_to("../../blobs/aa")
        (snapshot / "model.onnx_data").symlink_to("../../blobs/bb")
        case("cache", ["inspect", snapshot / "model.onnx"], entry, (0,))
        case("cache, its folder", ["inspect", snapshot], entry, (0, 2))
        other = base / "hub/models--a--c/blobs"
        other.mkdir(parents=True)
        (other / "bb").write_bytes(bytes(64))
        (snapshot / "model.onnx_data").unlink()
        (snapshot / "model.onnx_data").symlink_to("../../../models--a--c/blobs/bb")
        case("cache, a neighbour's blob", ["inspect", snapshot / "model.onnx"], entry)
        (snapshot / "model.onnx_data").unlink()
        (snapshot / "model.onnx_data").symlink_to("../../blobs/gone")
        case("cache, a blob that is gone", ["inspect", snapshot / "model.onnx"], entry)
    print(f"{cases} path cases, {cases - passed} in which a file outside was opened or the exit code was another")
    sys.exit(passed != cases)


if __name__ == "__main__":
    main()
