import tests.conftest  # noqa: F401  its settings must precede Ray's import, also outside of pytest
