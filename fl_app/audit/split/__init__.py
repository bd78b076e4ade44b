"""Attacks on what a split run lets an observer see: activations at the cut, gradients there, and adapters' updates."""
