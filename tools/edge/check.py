"""The small kvw for devices: built, measured, and run where there is no room for a second model.

    python3 tools/edge/check.py [--kvw KVW] [--targets x86_64-unknown-linux-musl,aarch64-unknown-linux-musl]

1. builds `cargo build --no-default-features --profile edge` for each target that rustup has, and prints its size: statically
   linked, at most 8 MB;
2. lays the demo's model on a loop-mounted ext4 that is filled up until exactly the room is left that `apply --in-place --dry-run`
   asks for: a copy must be refused, the patch in place must be done, with `--shred-plan`;
3. compares every byte with what `apply -o` writes elsewhere;
4. counts the bytes written (strace): at most 2.1 times the changed ones;
5. does the patch with the aarch64 build under qemu-user too.

KVW is a build with every verb: it makes the plan. What this machine lacks is skipped, by name. Exit code 1 where anything does not hold.
"""

import argparse
import filecmp
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "faults"))
from cases import Store  # noqa: E402

LARGEST = 8_000_000
WRITTEN = 2.1
FAILED = []


def expect(holds, what):
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)
    if not holds:
        FAILED.append(what)


def skip(what):
    print(f"skipped: {what}", flush=True)


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def build(target):
    installed = run("rustup", "target", "list", "--installed").stdout.split() if shutil.which("rustup") else []
    if target not in installed:
        return skip(f"{target}: rustup target add {target}")
    # The linker that comes with Rust serves every target: no cross compiler is needed.
    linker = "CARGO_TARGET_" + target.upper().replace("-", "_") + "_LINKER"
    command = ["cargo", "build", "--locked", "--no-default-features", "--profile", "edge", "--target", target]
    done = run(*command, cwd=ROOT, env={**os.environ, linker: "rust-lld"})
    expect(done.returncode == 0, f"{target}: builds {done.stderr[-2000:] if done.returncode else ''}")
    folder = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    binary = folder / target / "edge" / "kvw"
    if done.returncode or not binary.exists():
        return None
    size = binary.stat().st_size
    expect(size <= LARGEST, f"{target}: {size / 1e6:.1f} MB, at most {LARGEST / 1e6:.0f}")
    headers = run("readelf", "--program-headers", binary)
    if headers.returncode == 0:
        expect("INTERP" not in headers.stdout, f"{target}: statically linked")
    return binary


def same(a, b):
    """Whether two folders hold the same files with the same bytes."""
    compared = filecmp.dircmp(a, b)
    if compared.left_only or compared.right_only or compared.funny_files:
        return False
    equal = filecmp.cmpfiles(a, b, compared.common_files, shallow=False)[1:] == ([], [])
    return equal and all(same(Path(a) / name, Path(b) / name) for name in compared.common_dirs)


@contextmanager
def disk(work, megabytes):
    """A small ext4, mounted; None where this machine cannot."""
    image, mounted = work / "disk.img", work / "disk"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    made = run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image) if shutil.which("mkfs.ext4") else None
    if made is None or made.returncode or run("mount", "-o", "loop", image, mounted).returncode:
        skip("a loop-mounted ext4 (needs root, mkfs.ext4 and loop devices)")
        yield None
        return
    try:
        yield mounted
    finally:
        run("umount", mounted)


def fill(mounted, left):
    """Fills the disk until `left` bytes are available."""
    with open(mounted / "filler", "wb") as filler:
        while True:
            stat = os.statvfs(mounted)
            over = stat.f_bavail * stat.f_frsize - left
            if over < stat.f_frsize:
                return
            filler.write(bytes(over if over < 1 << 20 else 1 << 19))
            filler.flush()
            os.fsync(filler.fileno())


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kvw", type=Path, default=ROOT / "target" / "debug" / "kvw")
    arguments.add_argument("--targets", default="x86_64-unknown-linux-musl,aarch64-unknown-linux-musl")
    arguments = arguments.parse_args()
    built = {target: build(target) for target in arguments.targets.split(",")}
    runners = {}
    for target, binary in built.items():
        architecture = target.split("-")[0]
        emulator = f"qemu-{architecture}"
        if binary and architecture == platform.machine():
            runners[target] = [binary]
        elif binary and shutil.which(emulator):
            runners[target] = [shutil.which(emulator), binary]
        elif binary:
            skip(f"{target}: cannot run here ({emulator})")
    if not runners:
        sys.exit("nothing to run")
    with tempfile.TemporaryDirectory(prefix="kvw-edge-") as work:
        work = Path(work)
        store = Store(str(arguments.kvw.resolve()), work / "store", pending=False)
        wanted = store.folder / "out"
        for target, kvw in runners.items():
            check(target, kvw, store, wanted, work / target)
    sys.exit(bool(FAILED))


def check(target, kvw, store, wanted, work):
    work.mkdir()
    listed = run(*kvw, "inspect", store.folder / "model")
    expect(listed.returncode == 0 and "language" in listed.stdout, f"{target}: inspects the model")
    size = sum(path.stat().st_size for path in (store.folder / "model").rglob("*") if path.is_file())
    with disk(work, size * 3 // 2 // (1 << 20) + 8) as mounted:
        if mounted is None:
            mounted = work / "folder"
            mounted.mkdir()
        shutil.copytree(store.folder / "model", mounted / "model")
        shutil.copy2(store.folder / "plan", mounted / "plan")
        in_place = [*kvw, "apply", mounted / "model", "--plan", mounted / "plan", "--in-place"]
        dry = json.loads(run(*in_place, "--dry-run", "--format", "json").stdout)["preflight"]
        changed, needed = dry["changed_bytes"], dry["needed_bytes"]
        expect(needed <= changed + (1 << 20), f"{target}: {changed} bytes change, {needed} needed meanwhile")
        if os.path.ismount(mounted):
            fill(mounted, needed)
            stat = os.statvfs(mounted)
            left = stat.f_bavail * stat.f_frsize
            print(f"       {left} bytes left on a disk with a model of {size}")
            copy = run(*kvw, "apply", mounted / "model", "--plan", mounted / "plan", "-o", mounted / "out")
            expect(copy.returncode == 2 and "not enough room" in copy.stderr, f"{target}: a copy has no room, and is refused")
        log = work / "written"
        count = []
        if kvw[0] == kvw[-1] and shutil.which("strace"):
            count = ["strace", "-f", "-y", "-qq", "-o", log, "-e", "trace=write,pwrite64"]
        done = run(*count, *in_place, "--shred-plan")
        expect(done.returncode == 0, f"{target}: patched in place {done.stderr}")
        expect(same(wanted, mounted / "model"), f"{target}: the bytes are those of `apply -o`, receipt included")
        expect(not (mounted / "plan").exists(), f"{target}: the plan is gone")
        if count:
            lines = [line for line in log.read_text(errors="replace").splitlines() if str(mounted / "model") in line]
            written = sum(int(found[1]) for line in lines if (found := re.search(r" = (\d+)$", line)))
            expect(written <= WRITTEN * changed, f"{target}: {written} bytes written, {written / changed:.3f} of the changed ones")
        compared = run(*kvw, "diff", store.folder / "model", mounted / "model")
        expect(compared.returncode == 0, f"{target}: `diff` finds the planned ranges and nothing else")


if __name__ == "__main__":
    main()
