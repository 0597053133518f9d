"""The former import path of analysis/overshoot.py."""

from titans_pytorch.analysis.overshoot import OVERSHOOTS, Gains, overshoot_note, watch_gains

__all__ = ["OVERSHOOTS", "Gains", "overshoot_note", "watch_gains"]
