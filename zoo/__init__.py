"""Training, evaluation and data of the shipped models, for developers; not part of the wheel."""

from __future__ import annotations

from pathlib import Path

import mechdsl.zoo

MODELS = Path(mechdsl.zoo.__path__[0])
"""The folder with the weights of every model."""
