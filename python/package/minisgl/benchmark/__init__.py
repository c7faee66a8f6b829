"""mini-sglang's `minisgl.benchmark`."""
