"""Sizing: how many machines a load needs, by the costs that a benchmark has measured."""
