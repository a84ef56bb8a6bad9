#!/usr/bin/env python3
"""Has others verify what `kvw sign` writes: PyPI's model-signing the signature, cyclonedx-python-lib the bill of
materials against its schema, sha256sum the digests; then changes one byte at a time and expects each to be found.

    pip install -r tools/provenance/requirements.txt     # openssl and sha256sum come with the system
    python tools/provenance/check.py --kvw target/release/kvw --tampers 1000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import model_signing
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvw", type=Path, default=ROOT / "target/release/kvw")
    parser.add_argument("--tampers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    random.seed(args.seed)
    kvw, demo = args.kvw.resolve(), ROOT / "fixtures/demo"

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        key, public, out = folder / "key.pem", folder / "public.pem", folder / "unlearned"
        pem = run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout")
        key.write_text(run("openssl", "pkcs8", "-topk8", "-nocrypt", input=pem))
        public.write_text(run("openssl", "ec", "-in", key, "-pubout"))
        run(kvw, "unlearn", demo / "model", "--forget", demo / "data/forget.jsonl", "--retain", demo / "data/forget_heldout.jsonl",
            "--gamma", "0.4", "--eval-limit", "0", "-o", out)
        run(kvw, "sign", out, "--key", key, "--original", demo / "model", "--bill")

        verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)

        def verified_by_others() -> bool:
            try:
                verifier.verify(out, out / "model.sig")
                return True
            except Exception:  # Its errors have no common class.
                return False

        assert verified_by_others(), "model-signing does not verify the signature"
        run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=out)
        invalid = JsonStrictValidator(SchemaVersion.V1_6).validate_str((out / "bom.cdx.json").read_text())
        assert invalid is None, f"the bill of materials is not valid: {invalid}"
        run(kvw, "verify", out, "--public-key", public)

        files = sorted(path for path in out.rglob("*") if path.is_file())
        found = others = 0
        for _ in range(args.tampers):
            path = random.choice(files)
            bytes_before = path.read_bytes()
            changed = bytearray(bytes_before)
            place = random.randrange(len(changed))
            changed[place] ^= random.randrange(1, 256)
            path.write_bytes(changed)
            by_kvw = subprocess.run([kvw, "verify", out, "--public-key", public], capture_output=True).returncode in (1, 2)
            if not by_kvw:
                print(f"not found: {path.relative_to(out)} at {place}: {bytes_before[place - 20:place + 20]}", file=sys.stderr)
            found += by_kvw
            others += not verified_by_others()
            path.write_bytes(bytes_before)
        run(kvw, "verify", out, "--public-key", public)
        print(json.dumps({"model_signing": model_signing.__version__, "verified": True, "bill_valid": True, "tampers": args.tampers,
                          "found_by_kvw": found, "found_by_model_signing": others}))
        return 0 if found == args.tampers else 1


if __name__ == "__main__":
    sys.exit(main())
