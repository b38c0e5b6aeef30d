"""Pages for any browser: a template of this folder, filled in, as one file that asks no network for anything."""

from pathlib import Path
from typing import Any

from lockstep.files import replace_file


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fill in a template and write the page; texts are escaped, and a value that is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("lockstep.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    replace_file(path, environment.get_template(template).render(**values).encode(errors="replace"))
