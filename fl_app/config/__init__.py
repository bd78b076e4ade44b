"""What a configuration is and what makes one right: the schema, and checks that name every fault at once.

Knows pydantic and the signatures of the classes that a configuration names; `fl_app.compose` brings Hydra.
"""
