"""The text that mini-DSA learns from: documentation in Debian packages, some 29 MB of English and code.

    python scripts/mini_dsa/corpus.py OUT_DIR

Downloads the packages with apt-get (no root is needed, and nothing is installed) and writes `train.txt`, `heldout.txt` and
`corpus.json`, which says what they were made of. Whole documents are held out.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

# Of each package the files that are plain text.
PACKAGES = {
    "python3.11-doc": "usr/share/doc/python3.11/html/_sources/**/*.rst.txt",
    "perl-doc": "usr/share/perl/**/*.pod",
    "vim-runtime": "usr/share/vim/**/doc/*.txt",
}
HELD_OUT = 20  # one document of so many
SHORTEST = 2000  # bytes of a document
SEPARATOR = b"\n\f\n"


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def read_package(package: str, pattern: str) -> Tuple[str, Dict[str, bytes]]:
    """The archive that apt-get finds for a package, by its name, and the documents in it by their paths."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "-q", "download", package], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", archive.name, "files"], cwd=folder, check=True)
        files = Path(folder) / "files"
        paths = sorted(path for path in files.glob(pattern) if path.is_file())
        documents = {
            f"{package}/{path.relative_to(files)}": path.read_bytes() for path in paths
        }
    return archive.name, documents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    parts: Dict[str, List[bytes]] = {"train": [], "heldout": []}
    archives = []
    for package, pattern in PACKAGES.items():
        archive, documents = read_package(package, pattern)
        archives.append(archive)
        for name, document in documents.items():
            if len(document) >= SHORTEST:
                parts["heldout" if is_held_out(name) else "train"].append(document)
    summary = {"packages": archives}
    for part, documents in parts.items():
        text = SEPARATOR.join(documents)
        (out_dir / f"{part}.txt").write_bytes(text)
        summary[part] = {
            "documents": len(documents),
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        }
    (out_dir / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
