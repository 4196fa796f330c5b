"""One HTML file that needs nothing else: the template, the style sheet, the figures and Vega.

Its content security policy forbids any request, so that nothing can leave the machine or fail
without a network; Vega runs its expressions by its interpreter, without `eval`.
"""

import importlib.util
import json
from functools import cache
from typing import Any

from gradaccum.errors import MissingExtra
from gradaccum.report.sections import Page

NEEDED = ("altair", "vl_convert", "jinja2")


def check() -> None:
    """Refuse, before any work, to draw without the libraries.

    Raises:
        MissingExtra: One is not installed.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(
                f"the page needs the package {name!r}, which is not installed",
                hint='pip install "gradaccum[report]", or --markdown or --json, which need nothing',
            )


def html(page: Page) -> str:
    """Return the page as HTML; the same page is the same text.

    Raises:
        MissingExtra: The extra `report` is not installed.
    """
    check()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from gradaccum.report.charts import CONFIG

    environment = Environment(
        loader=PackageLoader("gradaccum.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {f.name: f.spec for section in page.sections for f in section.figures}
    source = environment.loader
    assert source is not None, "it was just given"
    return environment.get_template("page.html").render(
        page=page,
        style=source.get_source(environment, "page.css")[0],
        script=_script() if figures else "",
        figures=_for_script({"config": CONFIG, "figures": figures}),
    )


@cache
def _script() -> str:
    """Return Vega and what draws the figures, in one piece."""
    import vl_convert

    return vl_convert.javascript_bundle("window.draw = vegaEmbed;")


def _for_script(value: Any) -> str:
    """Return JSON that cannot end the element it is in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
