"""From token ids to the text a client sees: incremental decoding, stop strings, logprobs."""
