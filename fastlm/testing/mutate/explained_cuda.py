"""Why a change of a CUDA kernel survives, as in explained.py."""

from .explained import Reason

REASONS: list[Reason] = []
