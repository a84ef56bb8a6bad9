#!/usr/bin/env python3
"""What real ONNX graphs take in memory, against their bytes.

    tools/hostile/graphs.py target/release/kvw FOLDER.. [--times N] [--than OTHER_KVW]

For every `.onnx` file below the folders, and for the largest ones with their nodes, initializers and annotations repeated
N times under other names (as large as the graph of a model of a hundred layers): the bytes that are not inline weights,
and what `kvw inspect` takes: resident memory of the whole process at its peak, the program and the mapped file included
(and never less than the 18 MB of the process that starts it). With `--than`, the same of another `kvw`, and how long both
take, alternately. Needs onnx (1.23). Ends with exit code 1 if a graph is refused, or takes more than 4 times its bytes
and 64 MiB.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import onnx
from check import MIB, Runner

ROUNDS = 5


def repeated(path, times, to):
    """Writes the graph of `path`, `times` times, without large inline weights."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for tensor in graph.initializer:
        if len(tensor.raw_data) > 64:
            del tensor.dims[:]
            tensor.dims.append(0)
            tensor.raw_data = b""
    parts = [(getattr(graph, name), list(getattr(graph, name))) for name in ("node", "initializer", "value_info")]
    for copy in range(1, times):
        for field, items in parts:
            for item in items:
                new = field.add()
                new.CopyFrom(item)
                new.name = f"{copy}{item.name}"
                if isinstance(item, onnx.NodeProto):
                    for values in (new.input, new.output):
                        values[:] = [value and f"{copy}{value}" for value in values]
    to.write_bytes(model.SerializeToString())


def structure(path):
    """Bytes of `path` that are not inline weights."""
    weights = 0
    graphs = [onnx.load(path, load_external_data=False).graph]
    while graphs:
        graph = graphs.pop()
        weights += sum(len(tensor.raw_data) for tensor in graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    return path.stat().st_size - weights


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kvw", type=Path)
    options.add_argument("folder", type=Path, nargs="+")
    options.add_argument("--times", type=int, default=40)
    options.add_argument("--large", type=int, default=4, help="how many of the largest are repeated")
    options.add_argument("--than", type=Path)
    options = options.parse_args()
    programs = [str(each.resolve()) for each in (options.kvw, options.than) if each]
    runner = Runner()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        inspect = lambda program, path: runner.run([program, "inspect", str(path)], scratch, 1 << 16)
        files = {path.resolve() for folder in options.folder for path in folder.rglob("*.onnx")}
        sizes = sorted(((structure(path), path) for path in files), reverse=True)
        rows = [(size, path, f"{path.parent.name}/{path.name}") for size, path in sizes]
        for number, (_, path, name) in enumerate(rows[: options.large]):
            large = Path(scratch) / f"large-{number}.onnx"
            repeated(path, options.times, large)
            rows.insert(0, (structure(large), large, f"{options.times} times {name}"))
        print("| graph | MB | resident, MB | times its bytes | seconds |\n|---|---|---|---|---|")
        for size, path, name in rows:
            runs = [[inspect(program, path) for program in programs] for _ in range(ROUNDS if size > 4 * MIB else 1)]
            taken = [max(run[each][3] for run in runs) for each in range(len(programs))]
            seconds = [statistics.median(run[each][2] for run in runs) for each in range(len(programs))]
            code, text, *_ = runs[0][0]
            # Some fixtures are graphs without their weights; they are decoded all the same.
            bad = code != 0 and "cannot be opened" not in text or taken[0] > 4 * size + 64 * MIB
            failed += bad
            if size > 4 * MIB or bad:
                of = lambda values, form: " / ".join(format(value, form) for value in values)
                print(f"| {name} | {size / 1e6:.1f} | {of([t / 1e6 for t in taken], '.0f')} | {of([t / size for t in taken], '.1f')} | {of(seconds, '.2f')} |", flush=True)
            if code and bad:
                print(text, file=sys.stderr)
    runner.close()
    print(f"\n{len(rows)} graphs, {failed} refused or past 4 times their bytes and 64 MiB")
    sys.exit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()
