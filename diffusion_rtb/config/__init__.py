"""From YAML to a checked config: its sections, its prompts, and the components that it names."""
