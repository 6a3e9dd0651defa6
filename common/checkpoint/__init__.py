"""Models on disk: finding, describing, tokenizing. No torch here; weights are numpy or bytes."""
