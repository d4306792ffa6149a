"""The configuration of a run. Start at schema.py, which lists every field; load.py reads it from YAML and overrides."""
