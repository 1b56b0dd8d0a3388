"""One call of a reward: how it is made, what it may return, what it is told of prompts, what it remembers."""
