"""Write docs/options.md: every command and option, from the tables in option.py.

python docs/options.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from command_line.idle import never_acts  # noqa: E402 (found beside this folder)
from command_line.kinds import Option  # noqa: E402
from option import COMMANDS, GROUPS, OPTIONS  # noqa: E402

PAGE = """# Commands and options

`python main.py [COMMAND] [options]`; without a command it trains. `python main.py COMMAND --help` shows the options
that most runs need, `--help all` shows all of them. `python docs/options.py` writes this page.

| command | what it does | options that it shares with others |
|---|---|---|
{commands}

{groups}
## Options of one command

| command | option | default | what it does |
|---|---|---|---|
{single}
"""
GROUP = """## {title}

| option | default | what it does |
|---|---|---|
{rows}
"""


def commands_of(group: str) -> list[str]:
    """Return the commands that have a group of options."""
    return [command for command in COMMANDS if group in GROUPS[command]]


def typed(name: str, option: Option) -> str:
    """Return what is typed for an option: its name and its values."""
    if name == "inputs":
        return f"`{option.kind['metavar']} ...`"
    if option.has_negation:
        return f"`--{name}`, `--no-{name}`"
    if option.is_flag:
        return f"`--{name}`"
    values = option.kind.get("metavar") or ", ".join(f"`{choice}`" for choice in option.kind["choices"])
    return f"`--{name}` {values}".replace("|", " or ")


def default(option: Option) -> str:
    """Return the default of an option, or nothing if its help says what happens without it."""
    if option.is_flag:
        return "on" if option.default else "off"
    return "" if option.default is None or option.default == "" else f"`{option.default}`"


def rows_of(group: str) -> list[str]:
    """Return a row for each option of a group that the help shows."""
    shown = {name: option for name, option in OPTIONS[group].items() if option.help is not argparse.SUPPRESS}
    return [f"| {typed(name, option)} | {default(option)} | {option.help} |" for name, option in shown.items()]


def command_row(command: str) -> str:
    """Return the row of a command: what it does, the groups that it shares, and what has no effect in it."""
    shared = [group for group in GROUPS[command] if len(commands_of(group)) > 1]
    groups = ", ".join(f"[{group}](#{group.replace(' ', '-')})" for group in shared)
    idle = ", ".join(f"`--{name}`" for name in sorted(never_acts(command)))
    return f"| `{command}` | {COMMANDS[command]} | {groups}{f'; no effect: {idle}' if idle else ''} |"


def page() -> str:
    """Return the whole of docs/options.md."""
    shared = [group for group in OPTIONS if len(commands_of(group)) > 1]
    single = [(command, group) for command in COMMANDS for group in GROUPS[command] if group not in shared]
    return PAGE.format(
        commands="\n".join(map(command_row, COMMANDS)),
        groups="\n".join(GROUP.format(title=group.capitalize(), rows="\n".join(rows_of(group))) for group in shared),
        single="\n".join(f"| `{command}` {row}" for command, group in single for row in rows_of(group)),
    )


if __name__ == "__main__":
    (HERE / "options.md").write_text(page(), encoding="utf-8")
