"""What an iteration costs on this machine: speed, memory, rounding and waits of known models, measured part by part."""
