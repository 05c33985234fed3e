"""What every room may use: errors, options, signals. Nothing here imports torch."""
