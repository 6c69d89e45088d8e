"""Vector quantizers, one method a file."""
