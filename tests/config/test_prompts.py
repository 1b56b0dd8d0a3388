"""Prompt files as people have them: read as what they are, or refused with the file, the line and the remedy."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffusion_rtb.cli.main import app
from diffusion_rtb.config.load import ConfigError, RunConfig, config_diff, load_config
from diffusion_rtb.config.prompt_files import find_file, read_prompts
from diffusion_rtb.config.prompts import PromptTable
from diffusion_rtb.config.sections import PromptsConfig
from diffusion_rtb.run.folder import RunFolderError, open_run

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}],
     "prompt": "a photo of two cows"},
]  # fmt: skip
"""Two lines as in GenEval's evaluation_metadata.jsonl."""

PLAIN = ("a cat", "ein Bär", "猫", "قطة", "🦊 fox")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines_give_prompts_and_metadata(tmp_path: Path) -> None:
    path = written(tmp_path, "geneval.jsonl", "".join(json.dumps(row) + "\n\n" for row in GENEVAL))
    table = read_prompts(path)
    assert table.texts == ("a photo of a bench", "a photo of two cows")
    assert list(table.metadata) == [{k: v for k, v in row.items() if k != "prompt"} for row in GENEVAL]


@pytest.mark.parametrize(
    "name, separator, header",
    [
        ("draw_bench.csv", ",", ["Prompts", "Category"]),
        ("parti.tsv", "\t", ["Prompt", "Category", "Challenge"]),
        ("excel.csv", ";", ["prompt", "Category"]),
        ("pandas.csv", ",", ["", "prompt"]),
    ],
)
def test_columns_give_prompts_and_metadata(tmp_path: Path, name: str, separator: str, header: list[str]) -> None:
    prompts = ['a sign, large, that says "open"; twice', "two\nlines", "plain"]
    place = next(i for i, column in enumerate(header) if column.lower().startswith("prompt"))
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(header)
        for number, prompt in enumerate(prompts):
            rows.writerow([prompt if i == place else f"{column}{number}" for i, column in enumerate(header)])
    table = read_prompts(tmp_path / name)
    assert table.texts == tuple(prompts)
    others = [column for i, column in enumerate(header) if i != place]
    assert list(table.metadata) == [{column: f"{column}{n}" for column in others} for n in range(3)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"], ids=["plain", "mark", "PowerShell", "UTF-32"]
)
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_every_unicode_encoding_that_names_itself(tmp_path: Path, name: str, encoding: str, end: str) -> None:
    lines = {
        "p.txt": ["# a comment", *PLAIN],
        "p.csv": ["prompt", *PLAIN],
        "p.jsonl": [json.dumps({"prompt": text}, ensure_ascii=False) for text in PLAIN],
    }
    path = written(tmp_path, name, (end.join(lines[name]) + end).encode(encoding))
    assert read_prompts(path).texts == PLAIN


def test_joined_files_keep_no_mark_in_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.txt", "\ufeffa cat\n\ufeffa dog\n")).texts == ("a cat", "a dog")


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    odd = ["a\u2028b", "c\x85d", "e\x0cf", "g\x1ch"]
    assert read_prompts(written(tmp_path, "p.txt", "\n".join(odd))).texts == tuple(odd)


def test_comments_have_a_space_and_hashtags_are_prompts(tmp_path: Path) -> None:
    text = '# a comment\n#\n#nofilter sunset\n  # indented\n#\ttabbed\n(cat:1.2) [dog|fox] {red|blue} car\n[cat]\n"quoted"\n'
    found = read_prompts(written(tmp_path, "p.txt", text)).texts
    assert found == ("#nofilter sunset", "(cat:1.2) [dog|fox] {red|blue} car", "[cat]", '"quoted"')
    line = json.dumps({"prompt": "# really"})
    assert read_prompts(written(tmp_path, "p.jsonl", line)).texts == ("# really",)


ODD = [
    "x" * 10_000, "\x1b[31mred", "tab\tand\nnewline", "\u202eabc", "e\u0301", "👩‍👩‍👧", " blank ", "   ", "",
    "# not a comment", '{"prompt": "a"}', "\ufeffmark", "prompt",
]  # fmt: skip


def test_any_text_can_be_a_prompt(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in ODD))
    config = load_config(run_file(tmp_path, "file: p.jsonl"))
    assert config.prompts.texts() == read_prompts(path).texts == tuple(ODD)
    open_run(config, tmp_path / "run")
    assert load_config(tmp_path / "run").prompts.table() == config.prompts.table()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
"""Strict JSON values."""

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
KEYS = TEXT.filter(lambda key: key != "prompt")


@given(rows=st.dictionaries(TEXT, st.dictionaries(KEYS, JSON, max_size=3), min_size=1, max_size=4))
def test_a_table_reads_back_as_it_was_written(rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    table = PromptTable(tuple(rows), tuple(rows.values()))
    path = tmp_path_factory.mktemp("table") / "prompts.jsonl"
    path.write_text(table.lines, encoding="utf-8", newline="")
    again = read_prompts(path)
    assert again == table
    assert again.sha256 == table.sha256


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("p.txt", '{"prompt": "a cat"}\n', r"p\.txt, line 1: .* is JSON, not a prompt\. .*name the file p\.jsonl"),
        ("p.txt", 'a cat\n{"prompt": "a dog", "tag": 1}\n', "line 2: .* is JSON"),
        ("p.txt", "{'prompt': 'a cat'}\n", "is JSON"),
        ("p.txt", '[\n  {\n    "prompt": "a cat"\n  }\n]\n', "line 1: .* is JSON"),
        ("p.txt", '{\n  "prompt": "a cat",\n  "tag": 1\n}\n', "line 1: .* is JSON"),
        ("p.txt", '["a cat", "a dog"]\n', "is JSON"),
        ("p.txt", "prompt,category\na cat,animals\n", r"header of columns, not a prompt\. Name the file \.csv"),
        ("p.txt", "Prompt\tCategory\tChallenge\na cat\tx\ty\n", "header of columns"),
        ("p.txt", '"Prompts","Category"\n"a cat","x"\n', "header of columns"),
        ("p.txt", "prompt\na cat\n", "header of columns"),
        ("p.json", '[{"prompt": "a cat"}]', r"jq -c '\.\[\]' p\.json > p\.jsonl"),
        ("p.yaml", "- a cat\n", r"as prompts\.list"),
        ("p.csv", "text,Category\na cat,x\n", "line 1: the header has no `prompt`; it has 'text', 'Category'. Rename"),
        ("p.csv", "Prompt,PROMPT\na,b\n", "each of 'Prompt', 'PROMPT' may hold the prompts"),
        ("p.csv", "prompt,tag,tag\na,b,c\n", "two columns 'tag'"),
        ("p.csv", "prompt,tag\na cat, sitting,x\n", r"line 2 has 3 columns, the header 2\. Put a prompt with ','"),
        ("p.csv", 'prompt,tag\n"a cat,x\n', "line 2: .*ends with them"),
        ("p.csv", "prompt,tag\n,x\n", "line 2 has no prompt"),
        ("p.csv", "prompt,tag\n", "has no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no `prompt`; it has 'text'"),
        ("p.jsonl", '{"prompt": "a"}\nb\n', r"line 2 is not a line of JSON .* e\.g\. \{\"prompt\""),
        ("p.jsonl", '{\n  "prompt": "a"\n}\n', "line 1 is not a line of JSON"),
        ("p.jsonl", '"a"\n', "is no object"),
        ("p.jsonl", '{"prompt": 3}\n', "the prompt is 3; it must be a text"),
        ("p.jsonl", '{"prompt": "a", "x": NaN}\n', "NaN is not a JSON number"),
        ("p.jsonl", '{"prompt": "a", "x": 1e999}\n', "1e999 is not a JSON number"),
        ("p.jsonl", '{"prompt": "a", "x": 1, "x": 2}\n', "the key 'x' is given twice"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "recursion"),
        ("p.jsonl", '{"prompt": "\\ud83d"}\n', "half a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "x": "\\ud83d"}\n', "half a surrogate pair"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}\n', "line 1: .* NUL"),
        ("p.txt", "a cat and a dog\na\0b\n", "line 2: .* NUL"),
        ("p.txt", "a cat\na dog".encode("utf-16-le"), "UTF-16 without a byte-order mark.*iconv -f UTF-16LE"),
        ("p.txt", "a cat\nein Bär".encode("latin-1"), r"p\.txt, line 2: byte 0xe4 is not UTF-8.*iconv -f WINDOWS-1252"),
        ("p.txt.gz", gzip.compress(b"a cat\n", mtime=0), r"compressed by gzip: unpack it first: gunzip p\.txt\.gz"),
        ("p.parquet", b"PAR1\x15\x04", "a Parquet file: save it as JSON lines"),
        ("p.xlsx", b"PK\x03\x04\x14", "spreadsheet"),
        ("p.txt", "", "has no prompts. Write one per line"),
        ("p.txt", b"\xef\xbb\xbf\r\n  \r\n", "has no prompts"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_prompts_is_refused_with_the_remedy(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    written(tmp_path, name, content)
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(run_file(tmp_path, f"file: {name}"))
    assert name in str(error.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", "a cat\na dog\na cat\n a cat \n"),
        ("p.csv", "prompt,tag\na cat,x\na dog,x\na cat,x\na cat,x\n"),
        ("p.jsonl", '{"prompt": "a cat", "x": 1, "y": 2}\n{"prompt": "a dog"}\n' + '{"y": 2, "prompt": "a cat", "x": 1}\n' * 2),
    ],
)  # fmt: skip
def test_a_prompt_that_is_given_again_counts_once(tmp_path: Path, name: str, content: str) -> None:
    table = read_prompts(written(tmp_path, name, content))
    assert table.texts == ("a cat", "a dog")
    assert table.merged == 2


def test_different_metadata_of_one_prompt_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "prompt,tag\na cat,x\na dog,x\na cat,y\n")
    with pytest.raises(ValueError, match="lines 2 and 4 give the prompt 'a cat' different metadata"):
        read_prompts(path)


@pytest.mark.parametrize("text", ["a\0b", "\ud83d"])
def test_a_list_is_held_to_the_same(text: str) -> None:
    with pytest.raises(ValueError, match="which is no text"):
        PromptsConfig(list=("a cat", text))


def run_file(folder: Path, prompts: str, **more: Any) -> Path:
    sizes = "prompts_per_iteration: 1, group: 2, micro_batch: 2"
    path = folder / "base.yaml"
    path.write_text(
        f"prior: {{component: stable_diffusion, path: nowhere}}\nreward: {{component: jpeg}}\nbeta: 1.0\nout: {folder}/runs\n"
        f"train: {{{sizes}}}\nprompts: {{{prompts}}}\n"
    )
    return path


def opened(folder: Path) -> RunConfig:
    config = load_config(run_file(folder, "file: p.jsonl"))
    open_run(config)
    return config


def test_a_run_keeps_its_prompts_once_and_goes_on_with_them_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "tag": i} for i in range(2000)]
    path = written(tmp_path, "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = opened(tmp_path)
    folder = tmp_path / "runs/base"
    assert (folder / "config.yaml").stat().st_size < 5000
    assert len(json.dumps(config.model_dump(mode="json"))) < 5000  # what checkpoints, trackers and cards carry
    assert (folder / "prompts.jsonl").read_text(encoding="utf-8") == config.prompts.table().lines
    opened(tmp_path)  # the same prompts: goes on
    written(tmp_path, "p.jsonl", path.read_text().replace('"tag": 7}', '"tag": 8}'))
    with pytest.raises(RunFolderError, match=r"prompts: .*no\. 8 .*'tag': 7.* there, .*'tag': 8.* now"):
        opened(tmp_path)
    (folder / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(ConfigError, match=r"no longer holds the prompts it did.*Bring them back"):
        load_config(folder)


def test_prompts_are_compared_by_what_they_are(tmp_path: Path) -> None:
    written(tmp_path, "p.txt", "a cat\na dog\n")
    from_file = load_config(run_file(tmp_path, "file: p.txt"))
    from_list = load_config(run_file(tmp_path, "list: [a cat, a dog]"))
    other = load_config(run_file(tmp_path, "list: [a cat, a fish]"))
    assert config_diff(from_file, from_list) == {}
    there, now = config_diff(from_file, other)["prompts"]
    assert (there, now) == ("2 prompts, no. 2 'a dog'", "2 prompts, no. 2 'a fish'")


def test_a_file_needs_enough_prompts(tmp_path: Path) -> None:
    written(tmp_path, "p.txt", "a cat\n")
    with pytest.raises(ConfigError, match="prompts_per_iteration 2 is more than the 1 prompts"):
        load_config(run_file(tmp_path, "file: p.txt"), ["train.prompts_per_iteration=2", "train.group=1"])


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "p.txt", "a cat\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(run_file(tmp_path, "file: ~/p.txt")).prompts.texts() == ("a cat",)


def test_many_prompts_cost_no_time(tmp_path: Path) -> None:
    texts = tuple(f"a prompt about thing number {i}" for i in range(25_432))
    start = process_time()
    PromptsConfig(list=texts)
    assert process_time() - start < 0.5  # one pass; comparing each with each took 4 s
    written(tmp_path, "p.txt", "\n".join(texts))
    start = process_time()
    config = load_config(run_file(tmp_path, "file: p.txt"))
    open_run(config)
    open_run(load_config(tmp_path / "runs/base"))
    assert process_time() - start < 5


def test_the_commands_say_how_many_lines_were_merged(tmp_path: Path) -> None:
    written(tmp_path, "p.txt", "a cat\na dog\na cat\n")
    path = run_file(tmp_path, "file: p.txt")
    path.write_text(path.read_text().replace("path: nowhere", "path: emoji"))
    shown = CliRunner().invoke(app, ["config", str(path)])
    assert shown.exit_code == 0
    assert "2 different prompts; 1 lines that repeat one count once" in shown.stderr
    assert yaml.safe_load(shown.stdout)["prompts"] == {
        "list": None,
        "file": "p.txt",
        "folder": None,
        "sha256": read_prompts(tmp_path / "p.txt").sha256,
    }


def test_published_sets_are_named_like_files(tmp_path: Path) -> None:
    """Ten of each of the twelve categories of PartiPrompts; what quotes a text quotes it in straight double quotes."""
    parti, quoting = (read_prompts(find_file(name, tmp_path)) for name in ("parti", "parti-text"))
    categories = Counter(row["category"] for row in parti.metadata)
    assert len(categories) == 12
    assert set(categories.values()) == {10}
    assert all(
        row.keys() == {"category", "challenge"} and all(row.values()) for row in (*parti.metadata, *quoting.metadata)
    )
    assert (len(quoting), quoting.merged, parti.merged) == (22, 0, 0)
    assert all(text.count('"') >= 2 for text in quoting.texts)
    (tmp_path / "parti").write_text("mine\n")  # one's own file comes first
    assert read_prompts(find_file("parti", tmp_path)).texts == ("mine",)
    with pytest.raises(ValueError, match="no set of that name among parti, parti-text"):
        find_file("drawbench", tmp_path)
