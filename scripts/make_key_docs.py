"""Writes docs/keys.md: every key with its default and help, and every old name with what happens to it.

python3 scripts/make_key_docs.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from verl.config.legacy import Rule  # noqa: E402
from verl.config.loader import CONFIG_DIR, SCHEMAS  # noqa: E402
from verl.config.schema import docs, flatten, free_keys  # noqa: E402

TARGET = ROOT / "docs" / "keys.md"
PROGRAMS = {
    "ppo_trainer": "verl.trainer.main_ppo",
    "sft_trainer": "verl.trainer.sft_trainer",
    "generation": "verl.trainer.main_generation",
    "evaluation": "verl.trainer.main_eval",
}
HEAD = """# Keys

Made by `python3 scripts/make_key_docs.py` from the yaml files, the config classes and the table of old names.
Settings are written `key=value`; the last one wins. A key that stands nowhere here is an error that names the nearest
known one. Of the old names, *alias* means that the new name takes the value, *warn* that one warning says why it does
nothing, *error* that the run is refused with the reason. Values in the last column ask for what happens anyway and
pass without a word. A path that begins with `hdfs://` is an error, of inputs and of outputs; verl's further copy of
outputs on HDFS, `trainer.default_hdfs_dir`, is a warning.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for name in SCHEMAS for line in _section(name))]) + "\n"


def _section(name: str) -> Iterator[str]:
    schema = SCHEMAS[name]
    raw = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    defaults = flatten(raw, free_keys(schema.root))
    yield from (f"## {name}", "", f"`python3 -m {PROGRAMS[name]}`", "", "| key | default | |", "|---|---|---|")
    for key, text in docs(schema.root):
        yield f"| `{key}` | {_value(defaults[key])} | {_cell(text)} |"
    yield from ("", f"### Old names of {name}", "", "| name | level | |", "|---|---|---|")
    for key, rule in schema.rules.items():
        yield f"| `{key}` | {rule.level.value} | {_what(rule)} |"
    yield from _old_values(schema.values)
    yield ""


def _old_values(values: Mapping[str, Mapping[Any, Rule]]) -> Iterator[str]:
    for key, rules in values.items():
        for value, rule in rules.items():
            yield f"| `{key}={value}` | {rule.level.value} | {_what(rule)} |"


def _what(rule: Rule) -> str:
    parts = [f"`{rule.target}`" if rule.target else "", _cell(rule.reason)]
    if rule.switch:
        parts.append(f"needs `{rule.switch}=True`")
    if rule.neutral:
        parts.append("silent: " + ", ".join(_value(value) for value in rule.neutral))
    return "; ".join(part for part in parts if part)


def _value(value: Any) -> str:
    return "null" if value is None else f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
