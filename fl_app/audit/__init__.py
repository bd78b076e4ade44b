"""Audit by attack: what can be learnt of a run's clients and examples, measured against what the run promises."""
