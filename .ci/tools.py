"""What the checks need beside the tests, as `pyproject.toml` names it, a line each."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = PROJECT["optional-dependencies"]["dev"]
sys.stdout.writelines(f"{name}\n" for name in NAMES if not name.startswith("headrace["))
