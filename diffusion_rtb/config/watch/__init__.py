"""The section `watch:` of a config."""
