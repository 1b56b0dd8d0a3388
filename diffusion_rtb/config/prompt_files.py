r"""Prompt files as people have them: plain lines, CSV, TSV and JSON lines, in any Unicode encoding that names itself.

The name decides: .csv and .tsv have a header with a column `prompt`, .jsonl (.ndjson) an object with a key `prompt` on each line,
any other file one prompt per line. The other columns and keys are the prompt's metadata. Nothing is guessed: a file of another
kind is refused with what to do.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.config.prompts import PromptTable, Row, merged_table

__all__ = ["decoded", "find_file", "json_object", "prompt_column", "read_prompts"]

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

UNPACK = "unpack it first"
AS_LINES = (
    'save it as JSON lines first, e.g. pandas.read_parquet(FILE).to_json("p.jsonl", orient="records", lines=True)'
)
PACKED = {
    b"\x1f\x8b": ("compressed by gzip", f"{UNPACK}: gunzip FILE"),
    b"BZh": ("compressed by bzip2", f"{UNPACK}: bunzip2 FILE"),
    b"\xfd7zXZ\0": ("compressed by xz", f"{UNPACK}: unxz FILE"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", f"{UNPACK}: unzstd FILE"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet (.xlsx)", f"{UNPACK}, or save the sheet as CSV"),
    b"PAR1": ("a Parquet file", AS_LINES),
    b"ARROW1": ("an Arrow file", AS_LINES),
}
"""How a file of that kind begins, what it is, and what to do."""

REFUSED = {
    ".json": "Write one object per line, {FILE}l: `jq -c '.[]' FILE > FILEl` does that with an array of objects",
    ".yaml": "Put the list into the config, as prompts.list, or write one prompt per line into a .txt file",
}
REFUSED[".yml"] = REFUSED[".yaml"]

JSON_LINE = re.compile(r"""[\[{]\s*["'][^"']*["']\s*:|"[^"]*"\s*:\s|[\[\]{}][,;]?$|\}\s*,\s*\{$""")
"""How a line of JSON begins, or of JSON that goes over several lines; `[cat|dog]` and `{red|blue}` are prompts to some."""

COLUMN = ("prompt", "prompts")

SETS = sorted((Path(__file__).parents[1] / "prompt_sets").glob("*.csv"), key=lambda path: path.stem)
"""Published prompts that come with the package, named by their files' stems."""


def find_file(name: str, folder: Path | str) -> Path:
    """The prompt file that a config in `folder` names: beside it, else in the working directory, else a set of the package.

    Raises:
        ValueError: it is in none of them.
    """
    tried = [Path(folder, Path(name).expanduser()), Path(name).expanduser()]
    tried += [path for path in SETS if path.stem == name]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"prompts.file: there is no file {name!r}, neither beside the config nor in the working directory, and no set of that "
            f"name among {', '.join(path.stem for path in SETS)}."
        )
    return path


def read_prompts(path: Path | str) -> PromptTable:
    """The prompts of a file with their metadata, in its order; a prompt that is given again counts once.

    Raises:
        ValueError: the file is of another kind, in an unknown encoding, damaged, without prompts, or gives one prompt different
            metadata; the message names the file, the line and the remedy.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in REFUSED:
        raise ValueError(f"{path} is no list of prompts. {REFUSED[kind].replace('FILE', path.name)}.")
    text = decoded(path)
    readers: dict[str, Callable[[str, Path], Iterator[Row]]] = dict.fromkeys((".jsonl", ".ndjson"), _json_rows)
    readers |= dict.fromkeys((".csv", ".tsv"), _column_rows)
    return merged_table(readers.get(kind, _plain_rows)(text, path), path)


def decoded(path: Path) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says; the mark is no part of it.

    Raises:
        ValueError: it is compressed, a table in a binary format, or in an encoding that does not name itself.
    """
    content = path.read_bytes()
    for start, (what, remedy) in PACKED.items():
        if content.startswith(start):
            raise ValueError(f"{path} is {what}: {remedy.replace('FILE', path.name)}.")
    mark, encoding = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, len(mark) + error.start) + 1
        byte = content[len(mark) + error.start]
        guess = "WINDOWS-1252" if not mark else encoding
        raise ValueError(
            f"{path}, line {line}: byte 0x{byte:02x} is not {encoding.upper()}. Save the file as UTF-8, e.g. from Windows' western "
            f"letters: iconv -f {guess} -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from None
    if not mark and content.count(b"\0") * 4 >= max(len(content), 1):
        raise ValueError(
            f"{path} has a NUL beside each letter: it is UTF-16 without a byte-order mark. Save it as UTF-8, e.g. "
            f"iconv -f UTF-16LE -t UTF-8 {path.name} > utf8{path.suffix}"
        )
    return text


def prompt_column(names: Sequence[str], where: str) -> str:
    """Which of these columns holds the prompts: `prompt`, or the only one called Prompt, Prompts or the like.

    Raises:
        ValueError: none, or several.
    """
    if "prompt" in names:
        return "prompt"
    for wanted in COLUMN:
        found = [name for name in names if name.strip().casefold() == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{where}: each of {', '.join(map(repr, found))} may hold the prompts; name one `prompt`.")
    shown = ", ".join(map(repr, names[:20])) or "none"
    raise ValueError(f"{where} has no `prompt`; it has {shown}. Rename the one that holds the prompts.")


def _plain_rows(text: str, path: Path) -> Iterator[Row]:
    """Lines end as in any text file (CR, LF, CR LF); U+2028 and the like are part of a prompt."""
    lines = [line.strip().lstrip("\ufeff") for line in io.StringIO(text, newline=None)]
    meant = [(number, line) for number, line in enumerate(lines, 1) if line and not _comment(line)]
    if meant and _header(meant[0][1]):
        raise ValueError(
            f"{path}, line {meant[0][0]}: {meant[0][1]!r} is a header of columns, not a prompt. Name the file .csv, or .tsv if "
            "tabs part the columns; or take the line out."
        )
    for number, line in meant:
        if JSON_LINE.match(line) or _is_json(line):
            raise ValueError(
                f"{path}, line {number}: {line[:60]!r} is JSON, not a prompt. Write one object with a key `prompt` on each line "
                f"and name the file {path.stem}.jsonl; there any text can be a prompt."
            )
        yield number, line, {}


def _comment(line: str) -> bool:
    return line == "#" or line.startswith(("# ", "#\t"))


def _header(line: str) -> bool:
    for separator in ",;\t":
        names = [name.strip().strip('"').casefold() for name in line.split(separator)]
        if any(name in COLUMN for name in names) and all(re.fullmatch(r"[\w .()-]{0,40}", name) for name in names):
            return True
    return False


def _is_json(line: str) -> bool:
    if line[0] not in "[{":
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _column_rows(text: str, path: Path) -> Iterator[Row]:
    header = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    separators = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
    separator = max(separators, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        rows = ((reader.line_num, row) for row in reader if any(row))
        names = next((row for _, row in rows), [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path} has two columns {twice!r}: rename one.")
        place = names.index(prompt_column(names, f"{path}, line 1: the header"))
        for number, row in rows:
            if len(row) != len(names):
                raise ValueError(
                    f"{path}, line {number} has {len(row)} columns, the header {len(names)}. Put a prompt with {separator!r} in it "
                    'into double quotes, and double those inside: "a sign, ""open"""'
                )
            if not row[place].strip():
                raise ValueError(f"{path}, line {number} has no prompt; delete the line.")
            metadata = {name: cell for i, (name, cell) in enumerate(zip(names, row, strict=True)) if i != place}
            yield number, row[place], metadata
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}. A cell in double quotes ends with them; double those inside."
        ) from None


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = json_object(line.strip().lstrip("\ufeff"), where)
        key = prompt_column(list(entry), where)
        if not isinstance(entry[key], str):
            raise ValueError(f"{where}: the prompt is {entry[key]!r}; it must be a text in quotes.")
        yield number, entry[key], {name: value for name, value in entry.items() if name != key}


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object that a line of strict JSON holds: no key twice, only finite numbers.

    Raises:
        ValueError: it is something else; `where` is what errors call the line.
    """
    remedy = 'write one object per line, e.g. {"prompt": "a cat", "tag": "single"}'
    try:
        found = json.loads(line, object_pairs_hook=_no_key_twice, parse_constant=_no_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not a line of JSON ({error.msg}, column {error.colno}); {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {line[:60]!r} is no object; {remedy}.")
    return found


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; use null")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _no_number(number)
