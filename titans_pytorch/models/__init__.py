"""The models of the Titans paper, MAC, MAG, MAL and LMM, and a plain transformer to compare with.

from titans_pytorch import TitansConfig, build_model
model = build_model(TitansConfig.tiny(variant="mag"))
"""
