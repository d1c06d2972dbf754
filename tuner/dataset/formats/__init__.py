"""Rows of the file formats that people have, to samples: checked, with an error that says what is expected."""

from tuner.dataset.formats.known import EXAMPLES, FORMATS
from tuner.dataset.messages import RowError

__all__ = ["EXAMPLES", "FORMATS", "RowError"]
