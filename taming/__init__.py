"""What both stages of the toolkit stand on: config, data, layers, discriminators, training, metrics."""

__version__ = "0.1.0"
