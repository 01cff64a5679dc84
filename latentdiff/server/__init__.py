"""The HTTP API and the web page: requests become jobs in a queue, which one worker draws with `drawing`."""
