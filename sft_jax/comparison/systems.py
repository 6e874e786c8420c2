"""System prompts to try, from a text file."""

import re
from pathlib import Path
from typing import NamedTuple

from sft_jax.errors import UserError

_HEAD = re.compile(r"---(?:\s+(.*))?")


class System(NamedTuple):
    """A system prompt and what it is called."""

    name: str
    text: str


def read_systems(path: str) -> list[System]:
    """Returns the system prompts of a file: each stands below a line `--- NAME`, and may have several lines.

        --- terse
        Answer with one JSON object.
        --- careful
        You turn requests into commands.

        Answer with one JSON object and nothing else.

    White space around a prompt is left out. Raises UserError naming the line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise UserError(f"--system: {path}: cannot be read ({reason}); name a text file.") from error
    found: list[tuple[int, str, list[str]]] = []
    for number, line in enumerate(lines, 1):
        head = _HEAD.fullmatch(line)
        if head:
            found.append((number, (head[1] or "").strip(), []))
        elif found:
            found[-1][2].append(line)
        elif line.strip():
            raise UserError(f"--system: {path}:{number}: belongs to no prompt; write a line such as '--- terse' above each one.")
    if not found:
        raise UserError(f"--system: {path}: holds no prompt; write each below a line such as '--- terse'.")
    systems: list[System] = []
    for number, name, body in found:
        text = "\n".join(body).strip()
        if not name:
            raise UserError(f"--system: {path}:{number}: names no prompt; write a line such as '--- terse'.")
        if name in (system.name for system in systems):
            raise UserError(f"--system: {path}:{number}: a prompt '{name}' is there already; give this one another name.")
        if not text:
            raise UserError(f"--system: {path}:{number}: the prompt '{name}' has no text; write it below this line, or remove the line.")
        systems.append(System(name, text))
    return systems
