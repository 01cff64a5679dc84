"""The HTTP API: requests of clients become jobs in a queue, which one worker draws; nothing of drawing is here."""
