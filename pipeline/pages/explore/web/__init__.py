"""The server of the explorer: what it answers, whom it refuses, and the files of its page."""
