"""The tests: a package, since others (torch-fidelity) install one of this name that would come before a mere folder."""
