import tests.conftest  # noqa: F401  its settings come before Ray is imported, also in a process that is no pytest
