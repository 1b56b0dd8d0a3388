"""What the page says of one subject, section by section; one without anything to show is left out, and the last says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusion_rtb.report.charts import Chart, check_chart, curve, every, histogram, steps_chart
from diffusion_rtb.report.frontier import frontiers
from diffusion_rtb.report.numbers import at, number, of_samples, text
from diffusion_rtb.report.subject import Picture, Subject
from diffusion_rtb.report.tables import VENDI, Table, check_table, facts, judge_table, prompt_table, summary
from diffusion_rtb.report.verdict import achieved

__all__ = ["Gallery", "Section", "Tile", "sections", "tiles"]

CURVES = {
    "reward": "reward",
    "elbo": "ELBO, nats",
    "kl": "KL, nats",
    "ess": "effective share of samples",
    "achieved_strength": "achieved strength",
    "residual_std": "spread of the residual, nats",
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "beta": "beta",
    "lr": "learning rate",
}
"""Keys of metrics.jsonl that are drawn, with what they are called; after them everything under `watch/`."""

ALARMS = 8
"""Iterations of alarms that are listed."""


@dataclass(frozen=True)
class Tile:
    """One number that everybody reads."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture and what it says to who cannot see it."""

    picture: Picture
    words: str


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows; of a row each column has the same seed."""

    title: str
    rows: Sequence[tuple[str, Sequence[Shown]]]
    """Name of each row and its pictures."""


@dataclass(frozen=True)
class Section:
    """A heading with what is below it, in order."""

    key: str
    title: str
    lead: str = ""
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    """Tables that are opened when wanted."""
    sheet: Picture | None = None
    wide: bool = False
    """Each gallery takes the whole width."""
    notes: Sequence[str] = field(default=())

    @property
    def empty(self) -> bool:
        """Nothing to show."""
        return not (self.charts or self.galleries or self.tables or self.folded or self.sheet or self.notes)


def tiles(subject: Subject) -> Iterator[Tile]:
    """Achieved strength first."""
    share, overall = achieved(subject), subject.overall
    if share is not None:
        asked = subject.beta
        value = text(share[0].mean, 2) if asked is None else f"{text(share[0].mean * asked, 2)} of {asked:.3g}"
        r2 = "" if share[1] is None else f", r² {text(share[1], 2)}"
        yield Tile("achieved strength", value, f"{text(100 * share[0].mean, 0)} % of the beta that was asked for{r2}")
    elif why := at(overall, "strength", "why"):
        yield Tile("achieved strength", "unknown", str(why))
    reward = at(overall, "reward")
    if number(reward, "posterior", "mean") is not None:
        before = number(reward, "prior", "mean")
        yield Tile(
            "mean reward",
            text(number(reward, "posterior", "mean"), 2),
            "" if before is None else f"prior {text(before, 2)}",
        )
    if number(overall, "kl", "mean") is not None:
        exact = number(overall, "kl", "reweighted_prior", "mean")
        yield Tile("KL, nats", text(number(overall, "kl", "mean"), 2), f"exact posterior {text(exact, 2)}")
    if number(overall, "diversity", "posterior", "vendi") is not None:
        before = number(overall, "diversity", "prior", "vendi")
        yield Tile(
            f"Vendi{of_samples([overall], *VENDI)}",
            text(number(overall, "diversity", "posterior", "vendi"), 1),
            f"prior {text(before, 1)}",
        )
    if number(overall, "elbo") is not None:
        bound = number(overall, "log_z", "from_prior")
        yield Tile("ELBO, nats", text(number(overall, "elbo"), 2), f"log Z {text(bound, 2)}")


def sections(subject: Subject, key: str) -> list[Section]:
    """All that has something to show; `key` begins the names inside."""
    made = [
        Section("overall", "In numbers", tables=[summary(subject)]),
        _pictures(subject),
        _rewards(subject, key),
        *_checks(subject, key),
        Section(
            "frontier",
            "What was bought, and at what price",
            charts=frontiers([subject], f"{key}-frontier"),
        ),
        _prompts(subject),
        _extremes(subject),
        _steps(subject, key),
        _training(subject, key),
        _how(subject),
        _left_out(subject),
    ]
    return [section for section in made if not section.empty]


def _pictures(subject: Subject) -> Section:
    pairs = [picture for picture in subject.pictures if picture.why == "pair"]
    galleries = []
    for row in dict.fromkeys(picture.prompt for picture in pairs):
        of = [picture for picture in pairs if picture.prompt == row]
        sides = {s: sorted((p for p in of if p.side == s), key=lambda p: p.index) for s in ("prior", "posterior")}
        shown = [(side, _shown(subject, found)) for side, found in sides.items() if found]
        galleries.append(Gallery(subject.prompt(row), shown))
    both = {picture.side for picture in pairs} == {"prior", "posterior"}
    lead = "Above the prior, below the posterior; a column has one seed." if both else ""
    zoom = " Press a picture to enlarge it; the arrow keys then go through all." if galleries else ""
    return Section("pictures", "Side by side", f"{lead}{zoom}", galleries=galleries, sheet=subject.sheet)


def _shown(subject: Subject, pictures: Sequence[Picture]) -> list[Shown]:
    return [
        Shown(p, f"{p.side}, prompt “{subject.prompt(p.prompt)}”, seed {p.index}, reward {text(p.reward, 2)}")
        for p in pictures
    ]


def _rewards(subject: Subject, key: str) -> Section:
    names = sorted({name.partition(".judge.")[2] for name in subject.samples if ".judge." in name})
    keys = {"reward": "reward"} | {f"judge.{name}": name for name in names}
    charts = [histogram(subject, of, title, f"{key}-values{i}") for i, (of, title) in enumerate(keys.items())]
    table = judge_table(subject)
    lead = ["All samples."]
    if subject.beta is not None:
        lead.append("Dashed: the prior re-weighted by exp(beta·r), which a perfect model would match.")
    if names or table:
        lead.append("A reward that rises while held-out judges fall is being hacked.")
    title = "Rewards and held-out judges" if names or table else "Rewards"
    return Section("rewards", title, " ".join(lead), [c for c in charts if c], tables=[table] if table else [])


def _checks(subject: Subject, key: str) -> Iterator[Section]:
    checks = at(subject.numbers, "posterior_check") or []
    charts = [check_chart(check, f"{key}-check{i}") for i, check in enumerate(checks)]
    lead = "Green has to be as long as gold. Thin lines are intervals."
    notes = [_said(check) for check in checks]
    yield Section("check", "Is it the posterior?", lead, charts, folded=[check_table(c) for c in checks], notes=notes)


def _said(check: Mapping[str, Any]) -> str:
    tv, noise = at(check, "tv"), number(check, "noise", "mean")
    missing = f" Never produced: {', '.join(map(str, check['missing']))}." if check.get("missing") else ""
    return (
        f"{check['factor']}: {'passes' if check['passed'] else 'fails'}. Total variation {text(number(tv, 'mean'), 3)} "
        f"[{text(number(tv, 'low'), 3)}, {text(number(tv, 'high'), 3)}], tolerance {text(number(check, 'tolerance'), 2)}; "
        f"sampling alone makes {text(noise, 3)}, the prior has {text(number(check, 'tv_prior'), 3)}.{missing}"
    )


def _prompts(subject: Subject) -> Section:
    table, hidden = prompt_table(subject)
    lead = "Press a column's title to sort by it."
    if hidden:
        lead += (
            f" {hidden} prompts in the middle, by the rise of their reward, are left out here; the numbers hold all."
        )
    return Section("prompts", "Prompt by prompt", lead, tables=[table] if table.rows and table.head[1:] else [])


def _extremes(subject: Subject) -> Section:
    found = {why: [p for p in subject.pictures if p.why == why] for why in ("best", "worst")}
    rows = [(why, _shown(subject, pictures)) for why, pictures in found.items() if pictures]
    galleries = [Gallery("by their reward", rows)] if rows else []
    return Section(
        "extremes",
        "Best and worst samples",
        "Of the posterior, among all that were drawn.",
        galleries=galleries,
        wide=True,
    )


def _steps(subject: Subject, key: str) -> Section:
    overall = subject.overall
    profile, exact = at(overall, "kl_profile") or [], at(overall, "bill", "exact_per_step")
    ratio = at(overall, "norm_ratio", "per_step") or []
    charts = [
        steps_chart(profile, "KL of each step", "nats", f"{key}-kl", exact=exact)
        if isinstance(profile, list)
        else None,
        steps_chart(ratio, "How loud the network is", "|e_q| / |e_p|", f"{key}-norm", level=1.0),
    ]
    lead = "Which steps of the chain the bill falls on. A network far louder than the prior's is a sign of hacking."
    paid, needed, share, last = (
        number(overall, "bill", name) for name in ("paid", "needed", "last_share", "last_steps")
    )
    notes = []
    if paid is not None and needed is not None:
        late = "" if share is None or last is None or paid <= 0 else f"; {share:.0%} of it in the last {last:.0f} steps"
        notes.append(f"It pays {text(paid, 2)} nats where {text(needed, 2)} would do{late}.")
    return Section("steps", "Step by step", lead, [chart for chart in charts if chart], notes=notes)


def _training(subject: Subject, key: str) -> Section:
    rows, log_z = subject.training, number(subject.overall, "log_z", "from_prior")
    watched = {name: f"{name.removeprefix('watch/')}, watched" for name in every(rows) if name.startswith("watch/")}
    for name in ("watch/alarm", "watch/samples"):
        watched.pop(name, None)
    if "watch/vendi" in watched:
        watched["watch/vendi"] = f"vendi{of_samples(rows, 'watch/samples')}, watched"
    alarms = [int(row["iteration"]) for row in rows if number(row, "watch/alarm")]
    exact = {
        "elbo": log_z,
        "kl": number(subject.overall, "kl", "reweighted_prior", "mean"),
        "achieved_strength": 1.0,
        "ess": 1.0,
    }
    levels = exact | {f"watch/{name}": value for name, value in exact.items()}
    charts = [
        curve(rows, name, title, f"{key}-curve{i}", level=levels.get(name), marks=alarms)
        for i, (name, title) in enumerate((CURVES | watched).items())
    ]
    lead = "Dashed: what the exact posterior would show, by the re-weighted prior."
    shown = ", ".join(map(str, alarms[:ALARMS])) + (f" and {len(alarms) - ALARMS} more" if alarms[ALARMS:] else "")
    notes = (
        [f"Red: the reward rose while a judge or variety fell (hacking alarm), at iteration {shown}."] if alarms else []
    )
    return Section("training", "Training", lead, [chart for chart in charts if chart], notes=notes)


def _how(subject: Subject) -> Section:
    about = dict(at(subject.numbers, "subject") or {})
    settings = {name: about.pop(name, None) for name in ("sampling", "seeds", "versions")}
    rest = {
        "subject": about,
        "beta": subject.beta,
        "samples": at(subject.numbers, "samples"),
        "run": at(subject.numbers, "run"),
    }
    tables = [
        facts(f"{title.capitalize()}", title, settings[title])
        for title in settings
        if settings[title] not in (None, {}, [])
    ]
    return Section(
        "how",
        "How it was made",
        tables=[facts("What was evaluated", "setting", {k: v for k, v in rest.items() if v is not None}), *tables],
        folded=[facts("Every number over all prompts", "name", subject.overall)],
    )


def _left_out(subject: Subject) -> Section:
    notes = [f"{row.get('metric')}: {row.get('why')}" for row in at(subject.numbers, "left_out") or []]
    return Section("left-out", "What was left out, and why", notes=[*notes, *subject.missing])
