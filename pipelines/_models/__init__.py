"""A published model on disk: found, proved whole, with what users put into it, before any of its weights is loaded."""
