"""Kills, full disks and failing disks at every mutating system call of every writing verb.

    python3 tools/faults/inject.py KVW [--only VERB] [--jobs N] [--faults kill,ENOSPC,EIO]

Each verb of `cases.py` is first run under strace to list its mutating calls (creating opens, writes, truncations,
syncs, renames, links, removals, modes) on files of its folder. Then it is run once for each call and fault: SIGKILL in place of
the call, or the call failing with ENOSPC or EIO. After each:

- the watched files are as before, as after a run without faults, or become so by one command (which is run);
- exit code 0 only where they are as after a run without faults;
- an error that was not in a removal leaves no temporary file behind at once, and nothing does after that one command.

Needs strace. strace counts calls per thread, so calls that two threads make as their n-th are hit once: the table says how many
of the listed calls were hit. Exit code 1 where anything does not hold.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import Store, cases, environment

REMOVALS = {"unlink", "unlinkat", "rmdir"}
CALLS = REMOVALS | {
    "openat", "mkdir", "mkdirat", "write", "writev", "pwrite64", "ftruncate", "fallocate", "fchmod", "chmod",
    "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat",
}
LINE = re.compile(r"^(\d+) +(\w+)\((.*)")


def digest(path):
    """What lies at `path`: None, or a digest of every name and byte below it."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not temporary(p))
        return [(str(p.relative_to(path)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def temporary(path):
    return ".kvw-" in path.name


def state(folder, case):
    return {name: digest(folder / name) for name in case.watched}


def leftovers(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if temporary(p))


def run(command, folder, wrapper=()):
    done = subprocess.run(
        [*wrapper, *command], cwd=folder, capture_output=True, text=True, timeout=600, env=environment()
    )
    return done.returncode, done.stderr


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


class Verb:
    def __init__(self, kvw, store, case, work):
        self.kvw, self.store, self.case, self.work = kvw, store, case, Path(work)
        folder = self.fresh("whole")
        self.old = state(folder, case)
        code, said = run([kvw, *case.command], folder)
        assert code == 0, f"{case.name}: {said}"
        assert not leftovers(folder), leftovers(folder)
        self.new = state(folder, case)
        shutil.rmtree(folder)
        folder = self.fresh("listed")
        log = self.work / "calls.log"
        code, said = run([kvw, *case.command], folder, strace(log))
        assert code == 0 and state(folder, case) == self.new, f"{case.name} under strace: {said}"
        self.calls = listed(log, folder)
        shutil.rmtree(folder)

    def fresh(self, name):
        folder = self.work / f"{self.case.name.replace(' ', '')}-{name}"
        folder.mkdir(parents=True)
        self.store.lay(self.case, folder)
        return folder

    def pending(self, folder):
        return (folder / "model" / ".kvw-journal").exists()

    def fault(self, name, which, fault):
        """Runs one fault. Returns what does not hold."""
        folder = self.fresh(f"{name}-{which}-{fault}")
        try:
            return self.judge(folder, name, which, fault)
        finally:
            shutil.rmtree(folder)

    def judge(self, folder, name, which, fault):
        case, wrong = self.case, []
        what = "signal=SIGKILL" if fault == "kill" else f"error={fault}"
        inject = ["-e", f"inject={name}:{what}:when={which}"]
        code, said = run([self.kvw, *case.command], folder, strace("/dev/null", inject))
        found = state(folder, case)
        if code == 0 and found != self.new:
            wrong.append("said that it was done, and it was not")
        if fault == "kill" and code == 0:
            wrong.append("was not killed")
        if fault != "kill" and code not in (0, 1, 2, 3):
            wrong.append(f"exit code {code}: {said}")
        pending = self.pending(folder)
        if fault != "kill" and name not in REMOVALS and leftovers(folder) and not pending:
            wrong.append(f"left {leftovers(folder)}")
        if found not in (self.old, self.new) and not pending:
            # A single file beside another may be in place before it: what counts is that the command brings the rest.
            parts = [found[n] in (self.old[n], self.new[n]) for n in case.watched]
            recorded = case.name == "sweep"
            torn = case.name == "sign"
            if not all(parts) and not recorded and not torn:
                wrong.append("neither old nor new, and nothing says so")
        if pending and found not in (self.old, self.new):
            code, said = run([self.kvw, "inspect", "model"], folder)
            if code != 2 or "--resume" not in said:
                wrong.append("a half-done patch was read")
        recover = case.recover or case.command
        if case.recover and not self.pending(folder) and found == self.old:
            recover = case.command
        code, said = run([self.kvw, *recover], folder)
        after = state(folder, case)
        if after != self.new:
            wrong.append(f"not recovered by `kvw {' '.join(recover)}`: exit code {code}: {said.strip()}")
        if leftovers(folder):
            wrong.append(f"left after recovery: {leftovers(folder)}")
        return wrong


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kvw", type=Path)
    arguments.add_argument("--only")
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("--faults", default="kill,ENOSPC,EIO")
    arguments = arguments.parse_args()
    if not shutil.which("strace"):
        sys.exit("skipped: no strace")
    kvw = str(arguments.kvw.resolve())
    failed = 0
    print("| verb | mutating calls | hit | runs | SIGKILL | ENOSPC, EIO | not as promised |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="kvw-faults-") as work, ThreadPoolExecutor(arguments.jobs) as pool:
        store = Store(kvw, Path(work) / "store")
        for case in cases():
            if arguments.only and case.name != arguments.only:
                continue
            verb = Verb(kvw, store, case, Path(work) / "runs")
            places = sorted(set(verb.calls))
            # A removal cannot fail for want of room.
            faults = [
                (name, which, fault)
                for name, which in places
                for fault in arguments.faults.split(",")
                if not (fault == "ENOSPC" and name in REMOVALS)
            ]
            wrong = list(pool.map(lambda one: verb.fault(*one), faults))
            for one, found in zip(faults, wrong):
                for line in found:
                    print(f"{case.name}: {one}: {line}", file=sys.stderr, flush=True)
            bad = sum(bool(found) for found in wrong)
            kills = sum(fault == "kill" for _, _, fault in faults)
            failed += bad
            print(
                f"| {case.name} | {len(verb.calls)} | {len(places)} | {len(faults)} | {kills} | {len(faults) - kills} | {bad} |",
                flush=True,
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
