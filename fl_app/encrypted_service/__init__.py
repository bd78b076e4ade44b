"""Predictions on ciphertexts as a service over HTTP: the server's half, and a client's.

The server holds a model and public parameters; clients hold their keys, and alone see the answers. What crosses the
wire is in `messages.py`, the sums are in `clients.encrypted.inference`. docs/encrypted_inference.md says who learns
what.
"""
