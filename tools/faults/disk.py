"""Disks that are full, and power cuts, under the verbs that write a model.

    python3 tools/faults/disk.py KVW [--cuts N]

- *Full:* a tmpfs and a loop-mounted ext4 with room for the model and a little more, in steps: `apply -o` and `apply --in-place`
  either succeed, or fail with exit code 2, the model as it was, and nothing left behind; made roomier, they succeed.
- *Power cut:* a loop-mounted ext4 is shut down (EXT4_IOC_SHUTDOWN, nothing flushed) at N moments of each verb, spread over its
  mutating calls; after a new mount the output is absent or whole, and the model in place is old, new, or made new by
  `apply --resume`.

Needs root, mkfs.ext4, loop devices and strace; says so where one is missing. Exit code 1 where anything does not hold.
"""

import argparse
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from cases import Store, environment
from inject import leftovers, state
from supervise import REMOVALS

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_FLUSH = 2
FAILED = []

CALLS = REMOVALS | {
    "openat", "mkdir", "mkdirat", "write", "writev", "pwrite64", "ftruncate", "fallocate", "fchmod", "chmod",
    "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat",
}
LINE = re.compile(r"^(\d+) +(\w+)\((.*)")


def listed(log, folder):
    """The mutating calls on files of `folder`, as (call, which of its thread's calls of that name)."""
    counts, calls = Counter(), []
    for line in Path(log).read_text(errors="replace").splitlines():
        found = LINE.match(line)
        if not found or found[2] not in CALLS:
            continue
        thread, name, rest = found.groups()
        counts[thread, name] += 1
        # The folder's path or a relative one, and an open only where it may create or truncate.
        inside = str(folder) in rest or re.match(r'"[^/]', rest)
        if inside and (name != "openat" or "O_CREAT" in rest or "O_TRUNC" in rest):
            calls.append((name, counts[thread, name]))
    return calls


def strace(log, inject=()):
    return ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=" + ",".join(sorted(CALLS)), *inject]


def expect(holds, what):
    if not holds:
        FAILED.append(what)
        print(f"FAILED {what}", flush=True)


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment(), **options)


class Apply:
    """A verb that writes a model to `folder`."""

    def __init__(self, name, arguments, watched):
        self.name, self.arguments, self.watched = name, arguments, watched


VERBS = [
    Apply("apply", ["apply", "model", "--plan", "plan", "-o", "out"], ["out", "model"]),
    Apply("apply --in-place", ["apply", "model", "--plan", "plan", "--in-place"], ["model"]),
]


def lay(store, folder):
    shutil.copytree(store.folder / "model", folder / "model")
    shutil.copy2(store.folder / "plan", folder / "plan")


def mount(folder, image=None, size=None):
    command = ["mount", "-o", "loop", image, folder] if image else ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return run(*command).returncode == 0


def image_of(work, size):
    image = work / "disk.img"
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(size)
    made = run("mkfs.ext4", "-q", "-m", "0", image)
    assert made.returncode == 0, made.stderr
    return image


def full(kvw, store, work, kind, wanted):
    """Rising sizes of the disk: refused until there is room, then done."""
    folder = work / "mounted"
    folder.mkdir(exist_ok=True)
    size = sum(path.stat().st_size for path in (store.folder / "model").rglob("*") if path.is_file())
    for verb in VERBS:
        done = refused = 0
        for more in range(0, size * 3 // 2, size // 12):
            # ext4 needs room for itself.
            room = size + (1 << 19) + more + (0 if kind == "tmpfs" else 3 << 20)
            ok = mount(folder, size=room) if kind == "tmpfs" else mount(folder, image_of(work, room))
            if not ok:
                print(f"skipped: {kind} (needs root and loop devices)")
                return
            try:
                try:
                    lay(store, folder)
                except OSError:
                    continue
                old = state(folder, verb)
                # A full disk below the preflight's sight: as if somebody else filled it meanwhile.
                result = run(kvw, *verb.arguments, cwd=folder)
                found = state(folder, verb)
                whole = {**old, **wanted[verb.name]}
                if result.returncode == 0:
                    done += 1
                    expect(found == whole, f"{kind}, {verb.name}, {room}: done, and not whole")
                else:
                    refused += 1
                    expect(result.returncode == 2 and found == old, f"{kind}, {verb.name}, {room}: {result.stderr}")
                expect(not leftovers(folder), f"{kind}, {verb.name}, {room}: left {leftovers(folder)}")
            finally:
                run("umount", folder)
        expect(done and refused, f"{kind}, {verb.name}: {done} done, {refused} refused")
        print(f"| full {kind} | {verb.name} | {done + refused} sizes | {refused} refused, {done} done |", flush=True)


def cut(kvw, store, work, wanted, cuts, verbs):
    """Shuts the file system down under the verb, and mounts it again."""
    folder = work / "mounted"
    folder.mkdir(exist_ok=True)
    log = work / "calls.log"
    for verb in verbs:
        image = image_of(work, 48 << 20)
        if not mount(folder, image):
            print("skipped: power cuts (needs root and loop devices)")
            return
        lay(store, folder)
        run(*strace(log), kvw, *verb.arguments, cwd=folder)
        calls = sorted(set(listed(log, folder)))
        run("umount", folder)
        step = max(1, len(calls) // cuts)
        seen = {"old": 0, "new": 0, "resumed": 0}
        for name, which in calls[::step]:
            image = image_of(work, 48 << 20)
            assert mount(folder, image)
            lay(store, folder)
            os.sync()
            old = state(folder, verb)
            new = {**old, **wanted[verb.name]}
            # Held at the call; the power goes; then the process.
            inject = ["-e", f"inject={name}:delay_enter=1000000:when={which}"]
            command = [*strace(log, inject), kvw, *verb.arguments]
            log.unlink(missing_ok=True)
            process = subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                made = len(log.read_text(errors="replace").splitlines()) if log.exists() else 0
                time.sleep(0.3)
                now = len(log.read_text(errors="replace").splitlines()) if log.exists() else 0
                if now == made and now:
                    break
            opened = os.open(folder, os.O_RDONLY)
            fcntl.ioctl(opened, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_FLUSH))
            os.close(opened)
            # The traced one: strace then ends by itself, and has waited for it.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for child in children.read_text().split() if process.poll() is None else []:
                os.kill(int(child), signal.SIGKILL)
            process.wait()
            for _ in range(50):
                if run("umount", folder).returncode == 0:
                    break
                time.sleep(0.1)
            assert mount(folder, image), "the disk cannot be mounted again"
            try:
                found = state(folder, verb)
                pending = (folder / "model" / ".kvw-journal").exists()
                if pending:
                    seen["resumed"] += 1
                    resumed = run(kvw, "apply", "model", "--resume", cwd=folder)
                    expect(state(folder, verb) == new, f"power cut, {verb.name}, {name} {which}: not resumed: {resumed.stderr}")
                elif found == new:
                    seen["new"] += 1
                else:
                    seen["old"] += 1
                    expect(found == old, f"power cut, {verb.name}, {name} {which}: neither old nor new")
                    again = run(kvw, *verb.arguments, cwd=folder)
                    expect(state(folder, verb) == new, f"power cut, {verb.name}, {name} {which}: {again.stderr}")
                expect(not leftovers(folder), f"power cut, {verb.name}, {name} {which}: left {leftovers(folder)}")
            finally:
                run("umount", folder)
        counted = ", ".join(f"{count} {what}" for what, count in seen.items())
        print(f"| power cut, ext4 | {verb.name} | {sum(seen.values())} of {len(calls)} calls | {counted} |", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kvw", type=Path)
    arguments.add_argument("--cuts", type=int, default=30)
    arguments.add_argument("--only", help="a verb: apply, or apply --in-place; and no full disks")
    arguments = arguments.parse_args()
    missing = [tool for tool in ("strace", "mkfs.ext4", "mount") if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        sys.exit(f"skipped: needs root{''.join(', ' + tool for tool in missing)}")
    kvw = str(arguments.kvw.resolve())
    print("| fault | verb | runs | outcome |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="kvw-disk-") as work:
        work = Path(work)
        store = Store(kvw, work / "store", pending=False)
        wanted = {}
        for verb in VERBS:
            folder = work / "wanted" / verb.name
            folder.mkdir(parents=True)
            lay(store, folder)
            run(kvw, *verb.arguments, cwd=folder)
            wanted[verb.name] = {name: found for name, found in state(folder, verb).items() if found}
        for kind in ("tmpfs", "ext4") if not arguments.only else ():
            full(kvw, store, work, kind, wanted)
        verbs = [verb for verb in VERBS if arguments.only in (None, verb.name)]
        cut(kvw, store, work, wanted, arguments.cuts, verbs)
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
