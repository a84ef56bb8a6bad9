"""Proves on a machine with an NVIDIA GPU that CUDA gives what the CPU gives, and says how fast.

    python tools/gpu-check/check.py target/release/kvw [--model FOLDER --retain FILE --forget FILE] [--batch-sizes 1,8]

Needs numpy and safetensors. Without a model it is the repository's demo (small: its timings say little); for timings take what
`tools/bench/make_lvlm.py` writes. kvw finds or fetches ONNX Runtime for CUDA 13 itself (`--device cuda`); `kvw doctor` says which.

Checked, each a line with its number:
    coefficients    CUDA against CPU, batches of 1, of every other size, and with --share-prefix, whose keys and values stay on the
                    GPU: largest difference of a layer's largest, at most 1e-4
    gates           of a plan weakened on CUDA from CUDA's coefficients, against the CPU's: largest difference, at most 1e-3
    repeatable      the same bytes from two runs on CUDA
Measured: seconds of each collect, from the process's start to its end; peak of the GPU's memory (nvidia-smi, every 0.1 s, less what was
taken before); peak of the process's own resident memory.

Exit code 0: all held. 1: something did not. 2: no GPU here, with what kvw says of it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COEFFICIENTS, GATES = 1e-4, 1e-3


def gpu_memory():
    """Megabytes taken on all GPUs."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())


class Peak:
    """The peak of the GPU's memory while it is open, over what was taken before."""

    def __enter__(self):
        self.before, self.most, self.done = gpu_memory(), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done:
            self.most = max(self.most, gpu_memory() - self.before)
            time.sleep(0.1)

    def __exit__(self, *_):
        self.done = True
        self.thread.join()


def run(command):
    """Seconds, and the peak of resident memory in megabytes."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(str(part) for part in command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def tensors(path, kind):
    import safetensors

    with safetensors.safe_open(path, "numpy") as file:
        found = {name: file.get_tensor(name).astype("float64") for name in file.keys() if name.endswith(f".{kind}")}
    assert found, f"{path} holds no {kind}"
    return found


def apart(a, b):
    assert a.keys() == b.keys()
    return max(float(abs(a[name] - b[name]).max() / abs(a[name]).max()) for name in a)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kvw", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures/demo/model")
    parser.add_argument("--retain", type=Path, default=ROOT / "fixtures/demo/data/retain.jsonl")
    parser.add_argument("--forget", type=Path, default=ROOT / "fixtures/demo/data/forget.jsonl")
    parser.add_argument("--batch-sizes", default="1,8")
    arguments = parser.parse_args()
    kvw, model = arguments.kvw.resolve(), arguments.model

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        # One sample first: it says whether there is a device, and has the library fetched before anything is timed.
        first = scratch / "first.jsonl"
        row = arguments.forget.read_text().splitlines()[0].replace("images/", f"{arguments.forget.parent}/images/")
        first.write_text(row + "\n")
        asked = [kvw, "collect", model, "--data", first, "-o", scratch / "first.kc", "--device", "cuda"]
        said = subprocess.run([str(part) for part in asked], capture_output=True, text=True)
        if said.returncode != 0:
            print(f"no GPU to check here: kvw exits with {said.returncode} and says\n{said.stderr.strip()}")
            sys.exit(2)

        def collect(name, device, *options):
            out = scratch / f"{name}.kc"
            command = [kvw, "collect", model, "--data", arguments.retain, "-o", out, "--device", device]
            return out, *run([*command, "--checkpoint", 0, *options])

        def weaken(name, device, retain):
            out = scratch / f"{name}.plan"
            command = [kvw, "weaken", model, "--forget", arguments.forget, "--retain-coefficients", retain]
            run([*command, "--gamma", 0.5, "--device", device, "-o", out])
            return tensors(out, "gate")

        cpu, seconds, memory = collect("cpu", "cpu")
        expected = tensors(cpu, "coefficient")
        print(f"cpu, batches of 1: {seconds:.2f} s, {memory:.0f} MB resident")
        failed = []

        def check(what, value, limit):
            print(f"{what}: {value:.1e} (at most {limit:.0e}){'' if value <= limit else ' FAILED'}")
            failed.extend([what] if not value <= limit else [])

        ways = {f"batches of {size}": ("--batch-size", size) for size in arguments.batch_sizes.split(",")}
        for what, options in (ways | {"shared prefixes": ("--share-prefix",)}).items():
            with Peak() as peak:
                cuda, on_gpu, memory = collect(what.replace(" ", "-"), "cuda", *options)
            ratio = seconds / on_gpu
            print(f"cuda, {what}: {on_gpu:.2f} s ({ratio:.1f} times faster), {peak.most} MB on the GPU, {memory:.0f} MB resident")
            check(f"coefficients, {what}", apart(expected, tensors(cuda, "coefficient")), COEFFICIENTS)
        once, again = (collect(name, "cuda")[0] for name in ("once", "again"))
        same = once.read_bytes() == again.read_bytes()
        print(f"two runs on cuda give {'the same bytes' if same else 'different bytes FAILED'}")
        failed.extend([] if same else ["repeatable"])
        found = weaken("cuda", "cuda", once)
        check("gates", apart(weaken("cpu", "cpu", cpu), found), GATES)
        print("failed: " + ", ".join(failed) if failed else "everything held")
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
