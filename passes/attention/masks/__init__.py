"""Decides how attention operators get a mask: as intervals if its structure is proven, or as its tensor.

Either comes with a tile map.
"""
