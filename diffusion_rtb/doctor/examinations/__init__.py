"""One examination per file: `PLACE` on the page and `examine(patient) -> Examined`; a new file is found by itself."""
