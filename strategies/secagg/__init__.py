"""The cryptography of secure aggregation, as pure functions: no network, no rounds, no files.

Each module is one primitive. `strategies/collectors` composes them into the protocol.
"""
