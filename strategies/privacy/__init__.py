"""Differential privacy: releases as data, accountants, noise, and what a run promises."""
