"""Kills, full disks and failing disks at every mutating system call of every writing verb.

    python3 tools/faults/inject.py KVW [--only VERB,...] [--jobs N] [--faults kill,ENOSPC,EIO] [--every N]

Each verb of `cases.py` is first run under supervision (`supervise.py`) to list its mutating calls (creating opens, writes,
truncations, shared blocks, syncs, renames, links, removals, modes) on files of its folder, over all threads and child processes.
Then it is run once for each call and fault: SIGKILL in place of the call, or the call failing with ENOSPC or EIO. After each:

- the watched files are as before, as after a run without faults, or become so by one command (which is run);
- exit code 0 only where they are as after a run without faults;
- an error that was not in a removal leaves no temporary file behind at once, and nothing does after that one command.

The table says how many of the listed calls were hit: all, unless --every hits one in N of each kind, with its first and last.
Exit code 1 where anything does not hold; 77 where calls cannot be stopped here: that needs Linux on x86-64, and seccomp.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import supervise
from cases import Store, cases, environment
from supervise import REMOVALS

def digest(path):
    """What lies at `path`: None, or a digest of every name and byte below it."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not temporary(p))
        digests = [(str(p.relative_to(path)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
        # A folder without files says nothing: what comes into it is what counts.
        return digests or None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def temporary(path):
    return ".kvw-" in path.name


def state(folder, case):
    return {name: digest(folder / name) for name in case.watched}


def leftovers(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if temporary(p))


def run(command, folder, variables):
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment(folder, variables)
    )
    return done.returncode, done.stderr


def supervised(command, folder, variables, decide=lambda number, call: None):
    inside = lambda path: path.startswith(f"{folder}/")
    return supervise.run(command, folder, environment(folder, variables), inside, decide)


def chosen(calls, every):
    """Which of the calls are hit, from 1: one in `every` of each kind, and the first and the last of it."""
    kinds = defaultdict(list)
    for number, call in enumerate(calls, 1):
        kinds[call.name].append(number)
    return sorted({number for kind in kinds.values() for number in [*kind[::every], kind[-1]]})


class Verb:
    def __init__(self, kvw, store, case, work):
        self.kvw, self.store, self.case, self.work = kvw, store, case, Path(work)
        folder = self.fresh("whole")
        self.old = state(folder, case)
        code, said = run([kvw, *case.command], folder, case.variables)
        assert code == case.done, f"{case.name}: {said}"
        assert not leftovers(folder), leftovers(folder)
        self.new = state(folder, case)
        shutil.rmtree(folder)
        folder = self.fresh("listed")
        code, said, self.calls = supervised([kvw, *case.command], folder, case.variables)
        assert code == case.done and state(folder, case) == self.new, f"{case.name}, supervised: {said}"
        shutil.rmtree(folder)

    def fresh(self, name):
        folder = self.work / f"{self.case.name.replace(' ', '')}-{name}"
        folder.mkdir(parents=True)
        self.store.lay(self.case, folder)
        return folder

    def pending(self, folder):
        return (folder / "model" / ".kvw-journal").exists()

    def fault(self, number, fault):
        """Runs one fault. Returns whether the call was made, and what does not hold."""
        folder = self.fresh(f"{number}-{fault}")
        try:
            return self.judge(folder, number, fault)
        finally:
            shutil.rmtree(folder)

    def judge(self, folder, number, fault):
        case, wrong, hit = self.case, [], []

        def decide(which, call):
            if which == number:
                hit.append(call)
                return fault
            return None

        code, said, _ = supervised([self.kvw, *case.command], folder, case.variables, decide)
        if not hit:
            # Threads may have shared the work out otherwise: then there is nothing to judge.
            return False, wrong
        name = f"{hit[0].name} {hit[0].path.removeprefix(str(folder))}"
        found = state(folder, case)
        if code == 0 and found != self.new and case.done == 0:
            wrong.append("said that it was done, and it was not")
        if fault == "kill" and code == 0:
            wrong.append("was not killed")
        if fault != "kill" and code not in (0, 1, 2, 3):
            wrong.append(f"exit code {code}: {said}")
        pending = self.pending(folder)
        if fault != "kill" and hit[0].name not in REMOVALS and leftovers(folder) and not pending:
            wrong.append(f"left {leftovers(folder)}")
        if found not in (self.old, self.new) and not pending:
            parts = [found[n] in (self.old[n], self.new[n]) for n in case.watched]
            if not all(parts) and not case.piece_by_piece:
                wrong.append("neither old nor new, and nothing says so")
        if pending and found not in (self.old, self.new):
            code, said = run([self.kvw, "inspect", "model"], folder, {})
            if code != 2 or "--resume" not in said:
                wrong.append("a half-done patch was read")
        recover = case.recover or case.command
        if case.recover and not self.pending(folder) and found == self.old:
            recover = case.command
        code, said = run([self.kvw, *recover], folder, case.variables)
        after = state(folder, case)
        if after != self.new:
            wrong.append(f"not recovered by `kvw {' '.join(recover)}`: exit code {code}: {said.strip()}")
        if leftovers(folder):
            wrong.append(f"left after recovery: {leftovers(folder)}")
        return True, [f"{name}: {line}" for line in wrong]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kvw", type=Path)
    arguments.add_argument("--only", help="cases, with commas between them")
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("--faults", default="kill,ENOSPC,EIO")
    arguments.add_argument("--every", type=int, default=1, help="hit one in so many calls of a kind")
    arguments = arguments.parse_args()
    if not supervise.supported():
        print("needs Linux on x86-64 with seccomp's user notifications", file=sys.stderr)
        sys.exit(77)
    kvw = str(arguments.kvw.resolve())
    failed = 0
    print("| verb | mutating calls | hit | runs | SIGKILL | ENOSPC, EIO | not as promised |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="kvw-faults-") as work, ThreadPoolExecutor(arguments.jobs) as pool:
        store = Store(kvw, Path(work) / "store")
        for case in cases():
            if arguments.only and case.name not in arguments.only.split(","):
                continue
            verb = Verb(kvw, store, case, Path(work) / "runs")
            places = chosen(verb.calls, arguments.every)
            # A removal cannot fail for want of room.
            faults = [
                (number, fault)
                for number in places
                for fault in arguments.faults.split(",")
                if not (fault == "ENOSPC" and verb.calls[number - 1].name in REMOVALS)
            ]
            found = list(pool.map(lambda one: verb.fault(*one), faults))
            for one, (_, wrong) in zip(faults, found):
                for line in wrong:
                    print(f"{case.name}: {one}: {line}", file=sys.stderr, flush=True)
            bad = sum(bool(wrong) for _, wrong in found)
            done = [one for one, (hit, _) in zip(faults, found) if hit]
            kills = sum(fault == "kill" for _, fault in done)
            failed += bad
            print(
                f"| {case.name} | {len(verb.calls)} | {len({number for number, _ in done})} | {len(done)} | {kills} |"
                f" {len(done) - kills} | {bad} |",
                flush=True,
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
