"""Images on the host: from a file's bytes to patches, and where they stand in a prompt."""
