"""The settings of a run: the schema, YAML files and overrides, paths, and the errors that users read."""
