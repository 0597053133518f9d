"""The former import path of analysis/storing.py."""

from titans_pytorch.analysis.storing import memories_of, page_switches, stop_storing, storing_off

__all__ = ["memories_of", "page_switches", "stop_storing", "storing_off"]
