"""The README of an exported posterior: what it is, how it was made, how good it is, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from diffusion_rtb.config.beta import BetaConfig, as_section
from diffusion_rtb.config.yaml_text import write_yaml
from diffusion_rtb.files.plain_text import markdown_code, markdown_fence, markdown_text
from diffusion_rtb.run.progress import Progress

__all__ = ["model_card"]

SIDES = ("prior", "reweighted_prior", "posterior")
"""What the evaluation's table compares."""

TEMPLATE = """---
{{ front }}---

# {{ name|text }}

{{ what }} {{ base_model|code }} into a model of the posterior

    p*(x) = p(x) · exp(beta · r(x)) / Z        beta = {{ beta }} nats per unit of reward

where p is the {% if guidance %}{{ guidance.tilted_prior }} {% endif %}prior and r the reward {{ reward|code }}. \
It was trained with the objective {{ objective|code }} by `diffusion_rtb`.

{% if snippet %}## Use it with plain diffusers

{{ snippet|fence }}python
{{ snippet }}
{{ snippet|fence }}
{% else %}## Use it

It is not a LoRA, and {{ prior|code }} names no code that loads it: `diffusion-rtb sample RUN`, with the folder of the run that
trained it and the package of that prior, draws from it.
{% endif %}
{% if guidance %}It samples the posterior of the {{ guidance.tilted_prior }} chain: guidance scale {{ guidance.scale }}, \
{{ sampler.scheduler }}, {{ sampler.steps }} steps{% if sampler.eta is not none %}, eta {{ sampler.eta }}{% endif %}.
Another guidance scale samples neither this posterior nor that of another prior; another sampler or number of steps
approximates it.
{% endif %}{% if elsewhere %}
{{ elsewhere }}
{% endif %}
## Recipe

| setting | value |
|---|---|
{% for key, value in recipe %}| {{ key }} | {{ value }} |
{% endfor %}
## Evaluation

{% if evaluation %}| metric | prior | re-weighted prior | posterior |
|---|---|---|---|
{% for cells in evaluation %}| {{ cells|join(" | ") }} |
{% endfor %}
The re-weighted prior, its samples weighted by exp(beta · r), is what a perfect model would show.
{% else %}Not evaluated: run `eval.py` on the run and export again.
{% endif %}
## Full configuration

{{ config|fence }}yaml
{{ config }}{{ config|fence }}
"""


def model_card(
    config: Mapping[str, Any],
    *,
    base_model: str,
    snippet: str,
    fingerprint: Mapping[str, Any],
    trained: Progress,
    elsewhere: str = "",
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
    license_id: str = "other",
    start: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with YAML front matter, as model hubs read it.

    Args:
        config: The resolved run config.
        base_model: Hub id or folder of the prior.
        snippet: Python that samples the posterior with plain diffusers; "": of a LoRA the line that loads it, else none.
        fingerprint: The prior's; its sampler, guidance and adapter are listed.
        trained: How far it was trained, and for which beta.
        elsewhere: Markdown on further files and the programs that they are for.
        evaluation: metric -> {"prior": value, "reweighted_prior": value, "posterior": value}. A value is a number, None where it
            does not apply, or {"mean", "low", "high"}. None: not evaluated.
        license_id: SPDX or hub id of the licence; what is trained from a model inherits its terms.
        start: What the run's manifest says of the run whose posterior it began with; None: it began with the prior.
    """
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    # It is Markdown, not HTML: whatever others wrote goes through one of these.
    environment.filters |= {"text": markdown_text, "code": markdown_code, "fence": markdown_fence}
    plain = json.loads(json.dumps(config, default=str))
    rows = evaluation or {}
    # The analytic priors of vectors have corrections of their own, and no text.
    adapter = fingerprint.get("adapter") or {}
    lora, full = "rank" in adapter, "full" in adapter
    front = _front(base_model, license_id, lora=lora, pictures=lora or full)
    return environment.from_string(TEMPLATE).render(
        lora=lora,
        what="A LoRA that turns"
        if lora
        else f"{'Fully fine-tuned weights' if full else 'Trained corrections'} that turn",
        name=config["name"],
        base_model=base_model,
        beta=f"{trained.beta:.6g}",
        trained=trained,
        reward=_component(config["reward"]),
        objective=_component(config["objective"]),
        guidance=fingerprint.get("guidance"),
        sampler=fingerprint.get("sampler"),
        snippet=snippet.rstrip() or ('pipe.load_lora_weights("lora")' if lora else ""),
        prior=_component(config["prior"]),
        elsewhere=elsewhere.rstrip(),
        recipe=[(key, _cell(value)) for key, value in _recipe(config, fingerprint, trained, start).items()],
        evaluation=[(_cell(key), *(_cell(row.get(side)) for side in SIDES)) for key, row in rows.items()],
        front=write_yaml(front),
        config=write_yaml(plain),
    )


def _front(base_model: str, license_id: str, *, lora: bool, pictures: bool) -> dict[str, Any]:
    # A hub refuses a card whose base_model is a local folder.
    hub = {"base_model": base_model} if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model) else {}
    task: dict[str, Any] = {"pipeline_tag": "text-to-image"} if pictures else {}
    tags = [*task.values(), "diffusers", *(["lora"] if lora else []), "relative-trajectory-balance", "diffusion-rtb"]
    return hub | {"library_name": "diffusers", "license": license_id} | task | {"tags": tags}


def _recipe(
    config: Mapping[str, Any], fingerprint: Mapping[str, Any], trained: Progress, start: Mapping[str, Any] | None
) -> dict[str, Any]:
    train, adapter = config.get("train", {}), fingerprint.get("adapter") or {}
    return {
        "reward": _component(config["reward"]),
        "beta (nats per unit of reward)": f"{trained.beta:.6g}" + _origin(config, trained),
        "objective": _component(config["objective"]),
        **_chain(fingerprint),
        "precision of the frozen network": fingerprint.get("dtype"),
        **_trained(adapter),
        **({} if start is None else {"started from": _started(start)}),
        "iterations": trained.iterations,
        "checkpoint": _checkpoint(trained),
        **({"posterior": trained.average} if trained.average else {}),
        "trajectories per iteration": f"{train['prompts_per_iteration']} prompts x {train['group']}"
        if "group" in train
        else None,
        "learning rate": train.get("lr"),
        "seed": config.get("seed"),
    }


def _trained(adapter: Mapping[str, Any]) -> dict[str, str | None]:
    """What of the network was trained, and how."""
    modules = ", ".join(adapter.get("target_modules", ())) or None
    if "full" in adapter:
        return {"trained in full": modules or "the whole network"}
    rank = f"{adapter['rank']}, {adapter['alpha']:g}" if "rank" in adapter else None
    return {"LoRA rank, alpha": rank, "LoRA modules": modules}


def _origin(config: Mapping[str, Any], trained: Progress) -> str:
    """How the config came to a beta that is not its own."""
    asked = BetaConfig.model_validate(as_section(config["beta"]))
    if asked.kl_budget is not None:
        return f", found by kl_budget from {asked.value:g}"
    return "" if trained.beta == asked.value else f", annealed towards {asked.value:g}"


def _started(start: Mapping[str, Any]) -> str:
    return (
        f"the posterior of {start['name']} for beta {start['beta']:.6g}, after {start['iterations_done']} iterations "
        f"({start.get('weights', 'posterior')}.safetensors {start['posterior_sha256'][:12]})"
    )


def _checkpoint(trained: Progress) -> str | None:
    if trained.checkpoint is None:
        return None
    lost = f" (newer ones are damaged: {', '.join(trained.passed_over)})" if trained.passed_over else ""
    return f"{trained.checkpoint}{lost}"


def _chain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """How the prior is sampled, for families that say so in their fingerprint."""
    guidance, sampler = fingerprint.get("guidance"), fingerprint.get("sampler")
    if not guidance or not sampler:
        return {"prior": fingerprint.get("family")}
    return {
        "prior": f"{guidance['tilted_prior']}, guidance scale {guidance['scale']:g}",
        "negative prompt": repr(guidance["negative_prompt"]) if guidance["negative_prompt"] else None,
        "sampler": sampler["scheduler"],
        "steps": sampler["steps"],
        "eta": sampler["eta"],
    }


def _component(component: Mapping[str, Any] | str) -> str:
    """`{component: clip_score, model: x}` as clip_score(model=x)."""
    if isinstance(component, str):
        return component
    arguments = ", ".join(f"{key}={value!r}" for key, value in component.items() if key != "component")
    return f"{component['component']}({arguments})" if arguments else str(component["component"])


def _cell(value: Any) -> str:
    """One table cell; a dash where there is nothing."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        mean, low, high = (value[end] for end in ("mean", "low", "high"))
        return _cell(mean) if low is None or high is None else f"{_cell(mean)} [{_cell(low)}, {_cell(high)}]"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return markdown_text(text)
