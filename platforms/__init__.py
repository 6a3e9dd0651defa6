"""Hardware: the only package that knows vendors. Everything above speaks `platforms.interface`."""
