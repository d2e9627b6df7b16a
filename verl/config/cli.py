"""The command line of the entry points: hydra's flags that scripts use, `--help` from the yaml and the dataclasses."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verl.config.loader import CONFIG_DIR, resolve, schema_of, to_yaml
from verl.config.schema import docs, flatten, free_keys


def overrides_from(config_name: str, argv: Sequence[str]) -> list[str] | None:
    """The overrides in `argv`; None when `--help` or `--cfg job` has been answered on the terminal.

    `--config-name` and `--config-path` are accepted when they mean the shipped yaml. Raises ValueError otherwise.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cn", "--config-name")
    parser.add_argument("-cp", "--config-path")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-c", "--cfg", choices=("job",))
    known, overrides = parser.parse_known_args(list(argv))
    flags = [text for text in overrides if text.startswith("-")]
    if flags:
        raise ValueError(f"unknown option {flags[0]}; settings are written key=value, see --help")
    name = (known.config_name or config_name).removesuffix(".yaml")
    folder = known.config_path or known.config_dir
    if name != config_name or (folder and Path(folder).name != CONFIG_DIR.name):
        raise ValueError(
            f"--config-name={name} --config-path={folder or ''}: this program reads {CONFIG_DIR / config_name}.yaml;"
            " give your values as overrides, key=value"
        )
    if known.help:
        print(help_text(config_name), end="")
        return None
    if known.cfg:
        print(to_yaml(resolve(config_name, overrides).config), end="")
        return None
    return overrides


def help_text(config_name: str, width: int = 120) -> str:
    """Every key with its default and help."""
    root = schema_of(config_name).root
    raw = yaml.safe_load((CONFIG_DIR / f"{config_name}.yaml").read_text(encoding="utf-8"))
    defaults = flatten(raw, free_keys(root))
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("key", "default", "help"):
        table.add_column(title, overflow="fold", no_wrap=title == "key")
    for key, text in docs(root):
        default = "null" if defaults[key] is None else str(defaults[key])
        table.add_row(escape(key), escape(default), escape(text))
    out = io.StringIO()
    out.write(f"{config_name}: write settings as key=value, the last one wins.\n\n")
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()
