"""The rewrite of products with quantized weights."""
