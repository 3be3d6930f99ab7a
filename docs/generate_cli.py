"""Writes ``docs/cli.md`` from the help pages of the ``semid`` program itself.

python docs/generate_cli.py            # write it
python docs/generate_cli.py --check    # exit code 1 if it is out of date
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
INTRODUCTION = """\
# The command line

`pip install 'semid-index[cpu]'` installs the program `semid`. This page is made from its help by
`python docs/generate_cli.py`.

- Data goes to standard output; progress, warnings and errors to standard error.
- `--format` is one of `table`, `json`, `jsonl`, `csv`, `arrow` (an IPC stream) and `parquet`. Without it, you get a
  table on a screen, cut to 100 rows and to its width, and `jsonl` in a pipe, complete. Columns that have no room on the
  screen are left out from the right, and a line below names them.
- `--metadata` reads numbers, dates and the like from `.csv` as such. A column of whole numbers stays text if one of
  them is written with a zero or a plus before it (`00123`, `+49`), or is too large for 64 bits.
- Exit codes: 0 done; 1 failed, with a message that begins `error:` (or `semid doctor` found a fault); 2 wrong usage;
  130 interrupted by Ctrl-C.
- `NO_COLOR=1` turns colours off.
"""


def page() -> str:
    """The whole page."""
    # Typer reads these when it is imported.
    os.environ |= {"TERMINAL_WIDTH": str(WIDTH), "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    from typer.testing import CliRunner

    from semid_index.cli import app

    sections = [INTRODUCTION]
    for command in [
        "",
        *(str(info.name or info.callback.__name__) for info in app.registered_commands if info.callback),
    ]:
        result = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="semid")
        text = "\n".join(line.rstrip() for line in result.stdout.strip("\n ").splitlines())
        sections.append(f"## semid {command}".rstrip() + f"\n\n```text\n {text}\n```\n")
    return "\n".join(sections)


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/cli.md is out of date. Run: python docs/generate_cli.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
