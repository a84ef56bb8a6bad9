"""The writing verbs, each as a small job: what it starts from, what it writes, and the one command that recovers.

A case is made in an empty folder by `make`, run by `command`, and after a fault recovered by `recover` (the same command
where that is left out). `watched` are the paths that the verb may write: old is what they hold before, new what they hold
after a run without faults.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import supervise

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "fixtures" / "demo"
SAMPLES = 2
# As pinned in src/runtime/fetch.rs.
WHEEL = "onnxruntime==1.32.0"


@dataclass
class Case:
    name: str
    command: list
    watched: list
    needs: list = field(default_factory=list)
    before: list = field(default_factory=list)
    recover: list = None
    # What is watched may be there in part before the command is run again: it says nothing of what is in it.
    piece_by_piece: bool = False
    # The exit code without a fault.
    done: int = 0
    # Environment variables; values are paths in the case's folder where they begin with "./".
    variables: dict = field(default_factory=dict)


def cases():
    gamma = ["--gamma", "0.8", "--layers", "0-2"]
    data = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    sign = ["sign", "out", "--key", "key.pem", "--bill"]
    in_place = ["apply", "model", "--plan", "plan", "--in-place"]
    resume = ["apply", "model", "--resume"]
    short = ["--max-new-tokens", "1"]
    return [
        Case("apply", ["apply", "model", "--plan", "plan", "-o", "out"], ["out"], ["model", "plan"]),
        Case(
            "apply --force",
            ["apply", "model", "--plan", "plan", "-o", "out", "--force"],
            ["out"],
            ["model", "plan", "out-other"],
        ),
        Case("apply --in-place", in_place, ["model"], ["model", "plan"]),
        Case("apply --in-place --undo-log", in_place + ["--undo-log", "undo", "--force"], ["model", "undo"], ["model", "plan"]),
        Case("apply --in-place --shred-plan", in_place + ["--shred-plan"], ["model"], ["model", "plan"], recover=resume),
        Case("apply --resume", resume, ["model"], ["pending"]),
        Case("apply --undo", ["apply", "model", "--undo", "undo"], ["model"], ["patched"]),
        Case("sign", sign, ["out"], ["out", "key.pem"], piece_by_piece=True),
        Case("merge", ["merge", "part0", "part1", "-o", "kc"], ["kc"], ["part0", "part1"]),
        Case("report", ["report", "out", "-o", "page.html", "--original", "model"], ["page.html"], ["model", "out"]),
        Case(
            "collect",
            ["collect", "model", "--data", "retain.jsonl", "-o", "kc"],
            ["kc"],
            ["model", "data"],
        ),
        Case(
            "weaken",
            ["weaken", "model", "--forget", "forget.jsonl", "--retain-coefficients", "retain.kc", "-o", "new-plan"] + gamma,
            ["new-plan"],
            ["model", "data", "retain.kc"],
        ),
        Case(
            "sweep",
            ["sweep", "model"] + data + ["--gamma", "0.4,0.8", "--layers", "0-2", "-o", "sweep.json"],
            ["sweep.json"],
            ["model", "data"],
            piece_by_piece=True,
        ),
        Case(
            "collect --shard",
            ["collect", "model", "--data", "retain.jsonl", "-o", "parts", "--shard", "0/2"],
            ["parts"],
            ["model", "data"],
        ),
        # A cache that cannot be written to costs time and no more: it is not watched.
        Case(
            "collect --feature-cache",
            ["collect", "model", "--data", "retain.jsonl", "-o", "kc", "--feature-cache", "features"],
            ["kc"],
            ["model", "data"],
        ),
        Case(
            "eval",
            ["eval", "model", "--data", "forget=forget.jsonl", "--limit", "1", "-o", "evaluation.json"] + short,
            ["evaluation.json"],
            ["model", "data"],
        ),
        Case(
            "probe",
            ["probe", "model", "--plan", "plan", "--forget", "forget.jsonl", "--limit", "1", "-o", "probes.json"] + short,
            ["probes.json"],
            ["model", "plan", "data"],
        ),
        Case(
            "unlearn",
            ["unlearn", "model"] + data + gamma + short + ["--eval-limit", "1", "-o", "new", "--plan", "new-plan", "--force"],
            ["new", "new.evaluation.json", "new-plan"],
            ["model", "data"],
            piece_by_piece=True,
        ),
        Case("man", ["man", "pages"], ["pages"], piece_by_piece=True),
        # Its own part: the folder with data and model. What comes then, `unlearn` and `report` do; the missing library stops it.
        Case("demo", ["demo", "--output", "demo", "--ort-lib", "none"], ["demo"], done=2),
        # Fetches the wheel from a folder, not from the network.
        Case(
            "runtime --install",
            ["runtime", "--install", "cpu"],
            ["cache"],
            ["wheels"],
            piece_by_piece=True,
            variables={"KVW_CACHE_DIR": "./cache", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "./wheels"},
        ),
    ]


class Store:
    """What cases start from, made once by the tool under test."""

    def __init__(self, kvw, folder, pending=True):
        self.kvw, self.folder = kvw, Path(folder)
        self.folder.mkdir(parents=True)
        for name in ("forget", "retain"):
            rows = (DEMO / "data" / f"{name}.jsonl").read_text().splitlines()[:SAMPLES]
            rows = [json.loads(row) for row in rows]
            for row in rows:
                row["image"] = str(DEMO / "data" / row["image"])
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree(DEMO / "model", self.folder / "model")
        for shard in range(2):
            self.run("collect", "model", "--data", "retain.jsonl", "--shard", f"{shard}/2", "-o", "parts")
        for number, part in enumerate(sorted((self.folder / "parts").iterdir())):
            shutil.copy2(part, self.folder / f"part{number}")
        self.run("merge", "part0", "part1", "-o", "retain.kc")
        weaken = ["weaken", "model", "--forget", "forget.jsonl", "--retain-coefficients", "retain.kc", "--layers", "0-2"]
        self.run(*weaken, "--gamma", "0.8", "-o", "plan")
        self.run(*weaken, "--gamma", "0.4", "-o", "other-plan")
        self.run("apply", "model", "--plan", "plan", "-o", "out")
        self.run("apply", "model", "--plan", "other-plan", "-o", "out-other")
        shutil.copytree(self.folder / "model", self.folder / "patched")
        self.run("apply", "patched", "--plan", "plan", "--in-place", "--undo-log", "undo")
        if pending:
            self.pending()
        if shutil.which("openssl"):
            key = subprocess.run(
                ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"], check=True, capture_output=True
            )
            pem = subprocess.run(
                ["openssl", "pkcs8", "-topk8", "-nocrypt"], input=key.stdout, check=True, capture_output=True
            )
            (self.folder / "key.pem").write_bytes(pem.stdout)

    def run(self, *arguments):
        done = subprocess.run([self.kvw, *arguments], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"

    def pending(self):
        """A folder whose patch was committed and not begun: killed at the first write to the model."""
        folder = self.folder / "pending"
        shutil.copytree(self.folder / "model", folder)
        command = [self.kvw, "apply", "pending", "--plan", "plan", "--in-place"]
        inside = lambda path: path.startswith(f"{folder}/") and ".kvw-" not in path
        kill = lambda _, call: "kill" if call.name == "pwrite64" else None
        supervise.run(command, self.folder, environment(), inside, kill)
        assert (folder / ".kvw-journal").exists(), "the patch is not pending"

    def wheels(self):
        """The folder with the wheel that is to be fetched; from the network the first time."""
        folder = self.folder / "wheels"
        if not folder.exists():
            download = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12"]
            download += ["--platform", "manylinux_2_28_x86_64", "--dest", folder, WHEEL]
            subprocess.run([sys.executable, "-m", *download], check=True)

    def lay(self, case, folder):
        """Makes the folder that `case` starts from."""
        if "wheels" in case.needs:
            self.wheels()
        for need in case.needs:
            sources = {"data": ["forget.jsonl", "retain.jsonl"], "patched": ["patched", "undo"]}.get(need, [need])
            for source in sources:
                target = {"patched": "model", "pending": "model", "out-other": "out"}.get(source, source)
                found = self.folder / source
                if found.is_dir():
                    shutil.copytree(found, folder / target)
                else:
                    shutil.copy2(found, folder / target)


def environment(folder=Path("."), variables={}):
    variables = {name: value.replace("./", f"{folder}/") for name, value in variables.items()}
    # One worker, so that calls come in the same order every time.
    return {**os.environ, "RAYON_NUM_THREADS": "1", **variables}
