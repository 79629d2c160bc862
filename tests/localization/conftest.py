"""Pairs of tiny models and the batches that they answer."""

from tests.support.pairs import batches, collate, pair, samples, toy

__all__ = ["batches", "collate", "pair", "samples", "toy"]
