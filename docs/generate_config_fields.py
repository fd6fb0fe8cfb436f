"""Writes docs/config_fields.md: every config field with its default and its meaning, from mae_dist/config/default.py.

python docs/generate_config_fields.py

A comment at the end of a field's line is its meaning. Comment lines between two fields belong to the field below them
if that has no comment of its own, else they continue the comment of the field above them.
"""

import ast
import dataclasses
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "mae_dist/config/default.py"
PAGE = Path(__file__).resolve().parent / "config_fields.md"
WIDEST = 110  # characters of a meaning in a table; a longer one stands below the table

HEAD = """\
# Config fields

<!-- Written by docs/generate_config_fields.py from mae_dist/config/default.py: change the comments there. -->

Every field with its default. Set one on the command line with `--config.field=value`, for example:

```sh
python -m mae_dist.main --config smoke --config.model.depth=6 --config.data.crop_scale='(0.5, 1.0)'
```

In Python: `config = mae_dist.get_config("smoke")`, then `config.model.depth = 6`. A field that does not exist, and a
value that cannot work, are errors at the start, which name the cure. The named configs change some of these defaults.
"""


@dataclasses.dataclass
class Entry:
    """A field, or a section whose default is None."""

    name: str  # optim.base_lr
    default: str | None  # as written in Python
    meaning: str


def entries(source: str) -> list[Entry]:
    """Returns the fields and sections of `get_config`, in the order of the file."""
    lines = source.splitlines()
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    assignments = [node for node in function.body if isinstance(node, ast.Assign)]
    found: list[Entry] = []
    end_above = assignments[0].lineno  # `config = ConfigDict()`
    for node in assignments[1:]:
        assert node.end_lineno == node.lineno, f"{node.lineno}: a field takes one line"
        between = [line.strip() for line in lines[end_above : node.lineno - 1]]
        loose = " ".join(line.removeprefix("#").strip() for line in between if line)
        rest = lines[node.lineno - 1].encode()[node.end_col_offset :].decode()
        meaning = rest.strip().removeprefix("#").strip()
        if loose and meaning:
            found[-1].meaning = f"{found[-1].meaning} {loose}"
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        value = ast.get_source_segment(source, node.value)
        found.append(Entry(name, None if value == "ConfigDict()" else value, meaning or loose))
        end_above = node.lineno
    return found


def markdown(text: str) -> str:
    """Returns a comment with Markdown's signs escaped, except those of code."""
    for sign in r"\*[]|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;")


def table(fields: list[Entry]) -> str:
    """Returns a section's fields as a table, followed by the meanings that are too long for it."""
    rows, below = ["| Field | Default | Meaning |", "|---|---|---|"], []
    for field in fields:
        long = len(field.meaning) > WIDEST
        rows.append(f"| `{field.name}` | `{field.default}` | {'(below)' if long else markdown(field.meaning)} |")
        if long:
            below.append(f"`{field.name}`: {markdown(field.meaning)}")
    return "\n\n".join(["\n".join(rows), *below])


def page() -> str:
    """Returns the text of docs/config_fields.md."""
    found = entries(SOURCE.read_text(encoding="utf-8"))
    sections = [Entry("Top level", None, "The run as a whole."), *(entry for entry in found if entry.default is None)]
    contents = " · ".join(f"[{section.name}](#{section.name.lower().replace(' ', '-')})" for section in sections)
    parts = [HEAD.rstrip(), contents]
    for section in sections:
        prefix = "" if section.name == "Top level" else section.name
        fields = [entry for entry in found if entry.default is not None and entry.name.rpartition(".")[0] == prefix]
        meaning = markdown(section.meaning)
        parts += [f"## {section.name}", meaning[:1].upper() + meaning[1:], table(fields)]
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
