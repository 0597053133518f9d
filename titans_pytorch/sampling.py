"""The former import path of decoding/sampling.py."""

from titans_pytorch.decoding.sampling import gumbel_sample, min_p_filter, sample, top_k_filter, top_p_filter

__all__ = ["gumbel_sample", "min_p_filter", "sample", "top_k_filter", "top_p_filter"]
