"""Copies a handful of small exports by several exporters into fixtures/exports.

    python tools/exports/import.py SOURCE           # any Python >= 3.9, no packages

SOURCE holds one folder per export (fixtures/exports/README.md says which program made each). Every file must have the sha256 of
tools/exports/SHA256SUMS; it is copied as it is.
"""

import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "fixtures" / "exports"


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
        files[relative] = data
    for relative, data in files.items():
        path = OUT / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes in {OUT.relative_to(HERE.parents[1])}")


if __name__ == "__main__":
    main()
