"""The commands, one file each; the work is done elsewhere, and nothing imports this."""
