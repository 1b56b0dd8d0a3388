"""The page as a file: what is in it, that it is sound HTML without anything from elsewhere, and that nothing of others runs."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusion_rtb.estimates import reweighted_mean
from diffusion_rtb.files.plain_text import plain
from diffusion_rtb.report import page as module
from diffusion_rtb.report.charts import histogram
from diffusion_rtb.report.frontier import frontiers
from diffusion_rtb.report.page import write_page
from diffusion_rtb.report.subject import read_subject
from diffusion_rtb.report.tables import overview, prompt_table
from tests.oracles.evaluated import evaluated, training

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\x1b[31m\x00\u202e{{ 7*7 }} {% raw %}",
    "'\"><svg onload=alert(1)> & &amp; ]]>",
)
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Read(HTMLParser):
    """Every element with its attributes and the text inside it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def all(self, *tags: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements of these kinds."""
        return [(attrs, "".join(text).strip()) for tag, attrs, text in self.elements if tag in tags]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A page of one subject, and one of three, with hostile prompts and names."""
    root = tmp_path_factory.mktemp("page")
    run = training(evaluated(root / "run" / "eval", HOSTILE, judged=1.0, name="a <b>run</b>"))
    other = evaluated(root / "other", HOSTILE[:2], kind="images", name="</title><script>1</script>")
    vectors = evaluated(root / "vectors", ("",), pictures=False, shift=0.5)
    Image.new("RGB", (30, 20)).save(vectors / "side_by_side.png")
    return write_page([root / "run"], root / "one.html"), write_page([run, other, vectors], root / "many.html")


@pytest.fixture(scope="module", params=[0, 1], ids=["one", "many"])
def read(request: pytest.FixtureRequest, written: tuple[Path, Path]) -> Read:
    return Read(written[request.param].read_text(encoding="utf-8"))


def test_nothing_comes_from_elsewhere(read: Read) -> None:
    for tag, attributes, _ in read.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert "style" not in attributes, f"the policy blocks it: {tag}"
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in {"iframe", "object", "embed", "base", "form"}
    policy = next(a["content"] for a, _ in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_pictures_are_the_bytes_that_were_written(read: Read, written: tuple[Path, Path]) -> None:
    folder = written[0].parent / "run" / "eval"
    names = [row["file"] for row in json.loads((folder / "pictures.json").read_text())]
    held = {base64.b64encode((folder / name).read_bytes()).decode() for name in names}
    shown = [(a["src"] or "", a["alt"]) for a, _ in read.all("img") if a.get("id") != "zoomed"]
    assert held <= {source.partition("base64,")[2] for source, _ in shown}
    for source, words in shown:
        Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).load()
        assert words
    assert any("reward" in (words or "") and plain(HOSTILE[0]) in (words or "") for _, words in shown)


def test_headings_ids_and_tables_are_in_order(read: Read) -> None:
    levels = [int(tag[1]) for tag, _, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in read.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = [a["href"] or "" for a, _ in read.all("a")]
    labels = [a[key] or "" for _, a, _ in read.elements for key in ("aria-labelledby",) if key in a]
    assert {target[1:] for target in targets} | set(labels) <= set(ids)
    tables = read.all("table")
    assert len(tables) == len(read.all("caption")) > 4
    assert all(a.get("scope") in {"col", "row"} for a, _ in read.all("th"))
    assert all(words for _, words in read.all("caption", "h1", "h2", "h3"))
    assert all(a["aria-label"] for _, a, _ in read.elements if a.get("role") == "img")


def test_texts_of_others_are_texts(read: Read, written: tuple[Path, Path]) -> None:
    prompts = [text for a, text in read.all("th") if a.get("scope") == "row"]
    assert {plain(prompt) for prompt in HOSTILE} <= set(prompts)
    scripts = read.all("script")
    assert [a.get("type") for a, _ in scripts] == ["application/json", None]
    assert "owned" not in scripts[1][1]
    for page in written:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)


def test_the_numbers_come_back_from_the_page(written: tuple[Path, Path]) -> None:
    held = json.loads(Read(written[0].read_text(encoding="utf-8")).all("script")[0][1])
    numbers = json.loads((written[0].parent / "run" / "eval" / "metrics.json").read_text())
    assert held == {"s1": numbers}
    assert [row["prompt"] for row in held["s1"]["per_prompt"]] == list(HOSTILE)


def test_every_section_is_there(written: tuple[Path, Path]) -> None:
    read = Read(written[0].read_text(encoding="utf-8"))
    titles = [text for _, text in read.all("h2")]
    assert titles == [
        "The verdict",
        "In numbers",
        "Side by side",
        "Rewards and held-out judges",
        "Is it the posterior?",
        "What was bought, and at what price",
        "Prompt by prompt",
        "Best and worst samples",
        "Step by step",
        "Training",
        "How it was made",
        "What was left out, and why",
    ]
    words = [a["aria-label"] or "" for _, a, _ in read.elements if a.get("role") == "img"]
    drawn = " ".join(words)
    assert "judge/held, watched" in drawn
    assert "at iteration 4." in " ".join(text for _, text in read.all("li"))
    assert "ELBO, nats: " in drawn
    assert "Shares in prior, re-weighted prior and posterior" in drawn
    assert len(read.all("svg")) == len(words)


def test_the_same_files_give_the_same_page(written: tuple[Path, Path], tmp_path: Path) -> None:
    again = write_page([written[0].parent / "run"], tmp_path / "deep" / "again.html")
    assert again.read_bytes() == written[0].read_bytes()


def test_the_gold_histogram_is_the_reweighted_prior(written: tuple[Path, Path]) -> None:
    subject = read_subject(written[0].parent / "run")
    chart = histogram(subject, "reward", "reward", "x")
    assert chart is not None
    said = dict(
        re.findall(r"([\w\- ]+) mean (\S+?)[;.](?:\s|$)", chart.words.partition(": ")[2].replace("\u2212", "-"))
    )
    reward, prompt = (torch.from_numpy(subject.samples[f"prior.{name}"]) for name in ("reward", "prompt"))
    span = float(torch.from_numpy(subject.samples["posterior.reward"]).max() - reward.min())
    half_a_bin = span / 2 / int(2 * len(reward) ** (1 / 3))
    truth = reweighted_mean(reward, reward.double(), prompt)
    assert float(said["re-weighted prior"]) == pytest.approx(truth, abs=half_a_bin + 0.01)
    assert float(said["prior"]) == pytest.approx(float(reward.mean()), abs=half_a_bin + 0.01)


def test_vendi_scores_are_compared_at_equal_samples_in_one_space_only(written: tuple[Path, Path]) -> None:
    """They grow with the number of samples: 200 are evaluated, and training looked at 8."""
    read = Read(written[0].read_text(encoding="utf-8"))
    assert {"Vendi of 200", "Vendi of 200 before"} <= {text for _, text in read.all("th")}
    assert any(
        (a["aria-label"] or "").startswith("vendi of 8, watched") for _, a, _ in read.elements if "aria-label" in a
    )
    subject = read_subject(written[0].parent / "run")
    space = subject.overall["diversity"]["embedder"]
    for count, watched, there in ((8.0, space, False), (200.0, None, False), (200.0, space, True)):
        looks = tuple(row | {"watch/samples": count} if "watch/vendi" in row else row for row in subject.training)
        numbers = subject.numbers | {"run": {"watch_embedder": watched}}
        price, variety = frontiers([replace(subject, training=looks, numbers=numbers)], "x")
        assert "goes through its training" in price.caption
        assert ("goes through its training" in variety.caption) is there
        assert ("cannot be compared and are left out" in variety.caption) is not there
    fewer = subject.numbers["overall"]["diversity"] | {"samples": 20}
    numbers = subject.numbers | {"overall": subject.overall | {"diversity": fewer}}
    pair = [subject, replace(subject, numbers=numbers)]
    assert [chart.title for chart in frontiers(pair, "x")] == ["Reward and its price"]
    assert not [title for title in overview(pair).head if "Vendi" in title]
    assert "Vendi of 200" in overview([subject] * 2).head


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"overall": {}}, "schema 1, .* evaluate again|schema 1"),
        ({"schema": 99}, "newer version"),
        ("{", "damaged"),
        (None, "no .*metrics.json|holds no"),
    ],
)
def test_what_is_no_evaluation_of_this_schema_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=says):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="at least one"):
        write_page([], tmp_path / "page.html")


def test_missing_and_damaged_files_are_said(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run" / "eval")
    (folder / "samples.safetensors").write_bytes(b"\x00" * 20)
    first = json.loads((folder / "pictures.json").read_text())[0]["file"]
    (folder / first).write_bytes((folder / first).read_bytes()[:40])
    read = Read(write_page([folder], tmp_path / "page.html").read_text(encoding="utf-8"))
    said = " ".join(text for _, text in read.all("li"))
    assert "samples.safetensors is damaged" in said
    assert f"{Path(first).name} is not shown" in said
    assert "metrics.jsonl of the run is not there" in said
    assert "Rewards" not in [text for _, text in read.all("h2")]


def test_a_page_too_large_to_send_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LARGE", 10_000)
    write_page([evaluated(tmp_path / "eval", count=4, kind="images", prior=False)], tmp_path / "page.html")
    assert "more than many mail programs send" in caplog.text


def test_of_very_many_prompts_the_middle_is_left_to_the_numbers(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "eval", count=2, pictures=False)
    numbers = json.loads((folder / "metrics.json").read_text())
    row = numbers["per_prompt"][0]
    numbers["per_prompt"] = [row | {"prompt": f"prompt {i}"} for i in range(1000)]
    (folder / "metrics.json").write_text(json.dumps(numbers))
    table, left_out = prompt_table(read_subject(folder))
    assert (len(table.rows), left_out) == (400, 600)
