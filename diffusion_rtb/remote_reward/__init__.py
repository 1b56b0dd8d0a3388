"""A reward in another process: the messages, the server, the client. None of it needs torch to start."""
