"""Charts as inline SVG: Vega-Lite specifications by altair, drawn by vl-convert, coloured by the page's own CSS variables.

A colour is `var(--prior)` and the like, so one drawing serves light and dark. Charts are narrow enough to be read on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

__all__ = ["COLOURS", "HEIGHT", "PRIOR_ORDER", "SERIES", "WIDTH", "colours", "data", "svg"]

WIDTH, HEIGHT = 360, 210

COLOURS = {
    "prior": "var(--prior)",
    "re-weighted prior": "var(--truth)",
    "posterior": "var(--posterior)",
}
"""The three roles, the same in every chart, table and picture."""

PRIOR_ORDER = tuple(COLOURS)

SERIES = tuple(f"var(--series-{i})" for i in range(1, 7))
"""For several subjects."""

_AXIS = {
    "labelColor": "var(--quiet)",
    "titleColor": "var(--quiet)",
    "domainColor": "var(--line)",
    "tickColor": "var(--line)",
    "gridColor": "var(--grid)",
    "labelFontSize": 11,
    "titleFontSize": 11.5,
    "titleFontWeight": "normal",
}


def data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Rows as a chart takes them."""
    return alt.InlineData(values=[dict(row) for row in rows])


def colours(names: Sequence[str]) -> alt.Scale:
    """The roles' colours, or those of a series of subjects; the page writes legends itself."""
    if set(names) <= COLOURS.keys():
        return alt.Scale(domain=list(names), range=[COLOURS[name] for name in names])
    return alt.Scale(domain=list(names), range=[SERIES[i % len(SERIES)] for i in range(len(names))])


def svg(chart: alt.Chart | alt.LayerChart, name: str, *, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """Draw a chart; `name` keeps the ids inside it apart from those of other charts.

    Raises:
        altair.utils.schemapi.SchemaValidationError: the chart is no valid Vega-Lite.
    """
    sized = chart.properties(
        width=width, height=height, autosize=alt.AutoSizeParams(type="fit", contains="padding"), padding=4
    )
    shown = sized.configure(background="transparent", aria=False, view={"stroke": None}, axis=_AXIS)
    drawn: str = vl_convert.vegalite_to_svg(shown.to_dict(validate=False))  # its parts were checked one by one
    # Inside HTML the namespaces are known; ids are of the whole page.
    drawn = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", drawn, count=3)
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", drawn)
    drawn = drawn.replace('<svg class="marks"', '<svg class="chart" aria-hidden="true" focusable="false"', 1)
    return Markup(drawn)  # the library has escaped the texts
